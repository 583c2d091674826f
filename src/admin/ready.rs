//! Whether this proxy should get traffic, and if not, why.

use std::sync::atomic::Ordering;

use super::Admin;
use crate::drain::Phase;
use crate::tls::unix_now;

/// Why not, one reason a line; empty: ready.
pub fn reasons(admin: &Admin) -> Vec<String> {
    let mut reasons = Vec::new();
    match admin.drain.phase() {
        Phase::Serving => {}
        Phase::Lame | Phase::Closing | Phase::Gone => reasons.push("leaving".to_owned()),
    }
    if admin.failed.load(Ordering::Relaxed) {
        reasons.push("failed by /healthcheck/fail".to_owned());
    }
    if admin.workers.is_empty() {
        reasons.push("workers have not yet started".to_owned());
    }
    reasons.extend(admin.now().unready(unix_now()));
    reasons
}

/// Waits for the first moment without a reason.
pub async fn wait_until_ready(admin: &Admin) {
    let mut published = admin.published.clone();
    while !reasons(admin).is_empty() {
        if published.changed().await.is_err() {
            // Nobody publishes any more, so it will not become ready.
            std::future::pending::<()>().await;
        }
    }
}
