//! Under istiod: the stream, the certificate, and the application's health, which istiod is told on change.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result};
use bytes::Bytes;
use proxy_config::WhoAmI;
use proxy_config::bootstrap::{Bootstrap, Identity};
use serde::Deserialize;
use tokio::sync::watch;

use crate::control::{self, Certs, Control, Input, Settings};
use crate::identity;
use crate::probe::{self, Probe};
use crate::xds::{self, Health};

/// Revocation lists of the mesh's CAs, where istiod's chart mounts them.
const REVOKED: &str = "/var/run/secrets/istio/crl/ca-crl.pem";

/// Folder for what was served last, under the proxy's own.
const LAST_GOOD: &str = "last-good";

/// Begins to ask istiod for configuration and for a certificate. Needs a runtime.
///
/// # Errors
/// A probe that asks nothing; mounted certificates that cannot be read; no thread.
pub(super) fn begin(agent: &Bootstrap) -> Result<(Control, Option<Reports>)> {
    let (sender, health) = watch::channel(None);
    let reports = Reports::of(agent, sender)?;
    let stream = xds::start(xds::Settings::of(agent, control::CHECKS), health);
    let node = Bytes::from(agent.node.encode());
    let anchors = agent.pushed_proxy_config.then(|| stream.anchors.clone());
    let revoked = Some(REVOKED.into());
    let certs = match (&agent.identity, identity::Settings::of(agent, node)) {
        (Identity::Files(files), _) => {
            identity::serve_mounted(agent.identity_socket.clone(), files.clone());
            Certs::Mounted { files: files.clone(), revoked, anchors }
        }
        (_, Some(settings)) => {
            Certs::Issued { news: identity::start(identity::Settings { anchors, ..settings }), revoked }
        }
        (_, None) => Certs::None,
    };
    let settings = Settings {
        input: Input::Stream(stream),
        who: WhoAmI::Node(agent.node.protojson().to_string()),
        certs,
        publish_health: None,
    };
    let mut control = Control::start(settings)?;
    control.keep(&agent.config_path().join(LAST_GOOD), &agent.node.id())?;
    Ok((control, reports))
}

/// How the application is asked, and where it is.
pub(super) struct Reports {
    probe: Probe,
    own: IpAddr,
    health: watch::Sender<Option<Health>>,
}

impl Reports {
    /// `None`: nobody asks, and istiod counts the workload as healthy.
    fn of(agent: &Bootstrap, health: watch::Sender<Option<Health>>) -> Result<Option<Self>> {
        let Some(said) = &agent.readiness_probe else { return Ok(None) };
        let probe = Probe::deserialize(said).context("readinessProbe")?;
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let own = if agent.probe_localhost { None } else { agent.node.ips.first().copied() };
        Ok(Some(Self { probe, own: own.unwrap_or(local), health }))
    }

    /// Asks for ever. Begins when the proxy is ready: before that, nobody could reach the application through it.
    pub(super) async fn run(self, ready: watch::Receiver<bool>) {
        let tell = |event: probe::Event| {
            match event.healthy {
                true => tracing::info!("the application is healthy"),
                false => tracing::warn!("the application is unhealthy: {}", event.message),
            }
            self.health.send_replace(Some(Health { healthy: event.healthy, message: event.message }));
        };
        probe::run(self.probe, self.own, ready, tell).await;
    }
}
