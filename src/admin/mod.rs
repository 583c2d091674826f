//! Shows everything, changes little: the admin server, metrics for a scraper, readiness for the kubelet.
//!
//! It decides nothing about traffic. Three ports, one handler each: 127.0.0.1:15000 for people and istioctl, 15090 for
//! `/stats/prometheus`, 15021 for `/healthz/ready`; whatever other hosts may ask for is on the last two. What changes
//! something is asked for with POST.
//!
//! ```ignore
//! let admin = Admin { published, telemetry, drain, workers, .. };
//! tokio::spawn(admin::serve(listener, admin.clone(), admin::Port::Admin));
//! workers.handles()[0].spawn(admin::serve(ready_listener, admin, admin::Port::Ready));
//! ```

mod clusters;
mod config_dump;
mod dump;
mod ready;
mod server;
mod stats;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::control::Published;
use crate::drain::Drain;
use crate::telemetry::Telemetry;
use crate::telemetry::logging::Levels;
use crate::worker;

pub use ready::{reasons, wait_until_ready};
pub use server::{Port, serve};

/// What the servers look at; cheap to clone.
#[derive(Clone)]
pub struct Admin {
    /// What is served.
    pub published: watch::Receiver<Arc<Published>>,
    /// What was counted.
    pub telemetry: Arc<Telemetry>,
    /// The goodbye, shared with whoever carries it out.
    pub drain: Arc<Drain>,
    /// The workers.
    pub workers: Arc<[worker::Handle]>,
    /// The process's log; `None` when somebody else owns it.
    pub levels: Option<Levels>,
    /// When the process started.
    pub started: SystemTime,
    /// `/healthcheck/fail` was asked for: not ready until `/healthcheck/ok`.
    pub failed: Arc<AtomicBool>,
}

impl Admin {
    /// What is served now.
    pub(crate) fn now(&self) -> Arc<Published> {
        Arc::clone(&self.published.borrow())
    }
}

#[cfg(test)]
mod tests;
