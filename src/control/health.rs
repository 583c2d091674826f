//! Tells a mesh without istiod how a workload is: its own WorkloadEntry, one file in a watched folder.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proxy_config::{AutoEntry, Loaded};
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::watch;

use super::Published;
use crate::drain::{Phase, Watch};
use crate::probe::{self, Probe};

/// What there is to publish.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// How the application is asked; `None`: it counts as healthy whenever the proxy is ready.
    pub probe: Option<Probe>,
    /// The entry.
    pub entry: AutoEntry,
}

impl Spec {
    /// What was loaded says; `None` for workloads that belong to no WorkloadGroup.
    pub(super) fn of(loaded: &Loaded) -> Option<Self> {
        let entry = loaded.auto_entry.clone()?;
        let probe = loaded.probe.as_ref().and_then(|said| {
            // The loader has checked it; what is left are kinds of probe that do not exist.
            Probe::deserialize(said).inspect_err(|e| tracing::error!("WorkloadGroup spec.probe: {e}")).ok()
        });
        Some(Self { probe, entry })
    }
}

/// Keeps the file true until the proxy leaves, then removes it: peers stop sending before we stop answering.
pub async fn run(
    folder: PathBuf,
    mut published: watch::Receiver<Arc<Published>>,
    ready: watch::Receiver<bool>,
    mut leaving: Watch,
) {
    let mut written: Option<PathBuf> = None;
    loop {
        let (spec, own) = {
            let now = published.borrow_and_update();
            (now.health.clone(), now.proxy.ips.first().copied())
        };
        let reporting = report(&folder, spec.clone(), own, ready.clone(), &mut written);
        tokio::select! {
            // Nobody knows any more whether we are ready.
            () = reporting => break,
            () = changed(&mut published, spec.as_ref()) => {}
            () = leaving.reached(Phase::Lame) => break,
        }
    }
    if let Some(file) = written {
        remove(&file);
    }
}

/// Waits until there is something else to publish.
async fn changed(published: &mut watch::Receiver<Arc<Published>>, spec: Option<&Arc<Spec>>) {
    if published.wait_for(|now| now.health.as_ref() != spec).await.is_err() {
        std::future::pending::<()>().await;
    }
}

async fn report(
    folder: &Path,
    spec: Option<Arc<Spec>>,
    own: Option<IpAddr>,
    mut ready: watch::Receiver<bool>,
    written: &mut Option<PathBuf>,
) {
    let (Some(spec), Some(own)) = (spec, own) else {
        return std::future::pending().await;
    };
    let file = folder.join(format!("workloadentry-{}-{}.yaml", spec.entry.namespace, spec.entry.name));
    if let Some(old) = written.replace(file.clone()).filter(|old| *old != file) {
        remove(&old);
    }
    match &spec.probe {
        Some(probe) => {
            let tell = |event: probe::Event| write(&file, &spec.entry, event.healthy, &event.message);
            probe::run(probe.clone(), own, ready, tell).await;
        }
        None => {
            while ready.wait_for(|ready| *ready).await.is_ok() {
                write(&file, &spec.entry, true, "");
                if ready.wait_for(|ready| !*ready).await.is_ok() {
                    write(&file, &spec.entry, false, "the proxy is not ready");
                }
            }
        }
    }
}

/// Replaces the file as a whole: readers see the old one or the new one. The name in between is hidden from them.
fn write(file: &Path, entry: &AutoEntry, healthy: bool, message: &str) {
    let now = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let now = now.format(&Rfc3339).unwrap_or_default();
    let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let new = file.with_file_name(format!(".{name}.new"));
    let text = entry.document(healthy, message, &now);
    match std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, file)) {
        Ok(()) => tracing::info!("{}: published as {}", file.display(), if healthy { "healthy" } else { "unhealthy" }),
        Err(e) => tracing::error!("health cannot be published: {}: {e}", file.display()),
    }
}

fn remove(file: &Path) {
    if let Err(e) = std::fs::remove_file(file)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("{}: {e}", file.display());
    }
}
