//! `probe`: what the proxy would find out about the application, without a proxy.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use proxy_config::Source;
use proxy_config::bootstrap::proxy_config::overlay_text;
use serde::Deserialize;
use tokio::sync::watch;

use crate::net::interfaces;
use crate::probe::{self, Event, Probe};

/// Changes that wait to be printed.
const CHANGES: usize = 16;

/// Flags of `probe`.
#[derive(Debug, Args)]
pub(super) struct ProbeArgs {
    /// A VM's mesh file, with defaultConfig.readinessProbe.
    #[arg(value_name = "FILE", default_value = "./etc/istio/config/mesh")]
    mesh: PathBuf,
    /// Address of the application where the probe names no host [default: this machine's first].
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// Ask for as long as it takes to see so many changes, and print each.
    #[arg(long, value_name = "N")]
    events: Option<usize>,
}

/// Asks once, or until there were enough changes; whether the last answer was good.
///
/// # Errors
/// A file that says no probe.
pub(super) fn run(args: &ProbeArgs) -> Result<bool> {
    let probe = read(&args.mesh)?;
    let first = || interfaces::addresses().ok()?.first().map(|(_, ip)| *ip);
    let own = args.address.or_else(first).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let Some(events) = args.events else {
        return tell(runtime.block_on(probe::ask(&probe, own)).err().as_deref());
    };
    let (_ready, ready) = watch::channel(true);
    let (sender, mut changes) = tokio::sync::mpsc::channel::<Event>(CHANGES);
    runtime.block_on(async {
        // They are printed one by one, and there is one a period at most.
        let asking = probe::run(probe, own, ready, move |event| drop(sender.try_send(event)));
        tokio::pin!(asking);
        let mut healthy = true;
        for _ in 0..events {
            let event = tokio::select! {
                event = changes.recv() => event,
                () = &mut asking => None,
            };
            let Some(event) = event else { break };
            healthy = tell((!event.healthy).then_some(event.message.as_str()))?;
        }
        Ok(healthy)
    })
}

/// Prints an answer; whether it is good.
fn tell(trouble: Option<&str>) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match trouble {
        None => writeln!(out, "healthy"),
        Some(why) => writeln!(out, "unhealthy: {why}"),
    }
    .and_then(|()| out.flush())
    .context("standard output")?;
    Ok(trouble.is_none())
}

fn read(mesh: &PathBuf) -> Result<Probe> {
    let text = std::fs::read_to_string(mesh).with_context(|| mesh.display().to_string())?;
    let source = Source { name: mesh.display().to_string(), text };
    let mut said = serde_json::Map::new();
    overlay_text(&mut said, &source, Some("defaultConfig"), &mut Vec::new()).map_err(|e| anyhow!(e))?;
    let probe =
        said.get("readinessProbe").with_context(|| format!("{}: no defaultConfig.readinessProbe", source.name))?;
    Probe::deserialize(probe).with_context(|| format!("{}: defaultConfig.readinessProbe", source.name))
}
