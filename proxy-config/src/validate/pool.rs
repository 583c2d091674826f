//! `connectionPool`.

use super::at::At;
use super::{Findings, duration};

/// Findings of a pool's limits.
pub(super) fn check(found: &mut Findings, pool: &At<'_>) {
    if !pool.is_said() {
        return;
    }
    let (http, tcp) = (pool.get("http"), pool.get("tcp"));
    found.expect(http.is_said() || tcp.is_said(), pool, "http or tcp is expected");
    let counts = [
        "http1MaxPendingRequests",
        "http2MaxRequests",
        "maxRequestsPerConnection",
        "maxRetries",
        "maxConcurrentStreams",
    ];
    for count in counts.map(|c| http.get(c)).into_iter().chain([tcp.get("maxConnections")]) {
        found.expect(count.whole_or_zero() >= 0, &count, "0 or more is expected");
    }
    duration::check(found, &http.get("idleTimeout"));
    let upgrade = http.get("h2UpgradePolicy").text() == "UPGRADE";
    let client = http.get("useClientProtocol");
    found.expect(!(upgrade && client.is_true()), &client, "h2UpgradePolicy UPGRADE decides the protocol already");
    let keepalive = http.get("http2KeepAlive");
    for field in ["interval", "timeout"].map(|f| keepalive.get(f)) {
        found.expect(!keepalive.is_said() || field.is_said(), &field, "a duration is missing");
        duration::check(found, &field);
    }
    for field in ["connectTimeout", "maxConnectionDuration"] {
        duration::check(found, &tcp.get(field));
    }
    let idle = tcp.get("idleTimeout");
    // Less than a millisecond switches the timeout off.
    if duration::nanoseconds(idle.text()).is_none_or(|ns| ns.abs() >= 1_000_000) {
        duration::check(found, &idle);
    }
    for field in ["time", "interval"] {
        duration::check(found, &tcp.get("tcpKeepalive").get(field));
    }
}
