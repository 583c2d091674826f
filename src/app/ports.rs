//! The proxy's own ports: admin, metrics, readiness.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use proxy_config::bootstrap::Bootstrap;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::sleep;

use super::ProxyArgs;
use crate::admin::{self, Admin, Port};
use crate::control::Published;
use crate::drain::Drain;
use crate::net::{self, ListenOptions};
use crate::telemetry::Telemetry;
use crate::telemetry::logging::Levels;
use crate::worker;

/// How soon readiness follows what nobody announces: an expired certificate, `/healthcheck/fail`.
const READY_PERIOD: Duration = Duration::from_secs(1);

/// Which ports are opened; 0 is none.
pub(super) struct Ports {
    admin: u16,
    metrics: u16,
    ready: u16,
    /// Metrics are for this machine alone.
    metrics_local: bool,
    levels: Levels,
    started: SystemTime,
}

impl Ports {
    /// Flags win; then what the environment says, which only a proxy under istiod is asked about.
    pub(super) fn new(
        args: &ProxyArgs,
        agent: Option<&Bootstrap>,
        variables: &BTreeMap<String, String>,
        levels: Levels,
    ) -> Self {
        let said = agent.map(|agent| agent.ports);
        let local = variables.get("METRICS_LOCALHOST_ACCESS_ONLY").is_some_and(|v| v == "true");
        Self {
            admin: args.admin_port.or_else(|| said.map(|p| p.admin)).unwrap_or(15000),
            metrics: args.metrics_port.or_else(|| said.map(|p| p.metrics)).unwrap_or(15090),
            ready: args.status_port.or_else(|| said.map(|p| p.ready)).unwrap_or(15021),
            metrics_local: agent.map_or(local, |agent| agent.metrics_local),
            levels,
            started: SystemTime::now(),
        }
    }

    /// What the servers look at.
    pub(super) fn state(
        &self,
        published: watch::Receiver<Arc<Published>>,
        telemetry: &Arc<Telemetry>,
        drain: &Arc<Drain>,
        workers: &[worker::Handle],
    ) -> Admin {
        Admin {
            published,
            telemetry: Arc::clone(telemetry),
            drain: Arc::clone(drain),
            workers: workers.into(),
            levels: Some(self.levels.clone()),
            started: self.started,
            failed: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Opens them. Readiness is answered by a worker, so that it says something about workers; the rest is served by the
    /// thread that calls.
    ///
    /// # Errors
    /// A port that is taken, by name.
    pub(super) fn open(&self, state: &Admin) -> Result<()> {
        if let Some(listener) = local(self.admin).with_context(|| format!("admin port {}", self.admin))? {
            tokio::spawn(admin::serve(listener, state.clone(), Port::Admin));
        }
        let opened = if self.metrics_local { local(self.metrics) } else { everywhere(self.metrics) };
        if let Some(listener) = opened.with_context(|| format!("metrics port {}", self.metrics))? {
            tokio::spawn(admin::serve(listener, state.clone(), Port::Metrics));
        }
        let opened = everywhere(self.ready).and_then(|listener| listener.map(TcpListener::into_std).transpose());
        if let (Some(listener), Some(worker)) =
            (opened.with_context(|| format!("status port {}", self.ready))?, state.workers.first())
        {
            let state = state.clone();
            worker.spawn(async move {
                match TcpListener::from_std(listener) {
                    Ok(listener) => admin::serve(listener, state, Port::Ready).await,
                    Err(error) => tracing::error!("status port: {error}"),
                }
            });
        }
        Ok(())
    }
}

/// Keeps the flag that tells whether this proxy should get traffic.
pub(super) async fn keep_ready(state: Admin, ready: watch::Sender<bool>) {
    let mut published = state.published.clone();
    loop {
        let is = admin::reasons(&state).is_empty();
        ready.send_if_modified(|was| std::mem::replace(was, is) != is);
        tokio::select! {
            changed = published.changed() => if changed.is_err() { return },
            () = sleep(READY_PERIOD) => {}
        }
    }
}

fn local(port: u16) -> io::Result<Option<TcpListener>> {
    at((Ipv4Addr::LOCALHOST, port).into())
}

/// On all addresses; where there is no IPv6, on those of IPv4.
fn everywhere(port: u16) -> io::Result<Option<TcpListener>> {
    match at((Ipv6Addr::UNSPECIFIED, port).into()) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => at((Ipv4Addr::UNSPECIFIED, port).into()),
        opened => opened,
    }
}

fn at(address: SocketAddr) -> io::Result<Option<TcpListener>> {
    if address.port() == 0 {
        return Ok(None);
    }
    net::listen(address, ListenOptions { dual_stack: true, ..ListenOptions::default() }).map(Some)
}
