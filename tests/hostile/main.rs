//! Peers that mean harm: each test is a row of a list of what broke other proxies, named in its comment, tried on the real
//! program behind the redirect rules of a sidecar. While an attack runs, an honest client is served; afterwards the
//! program has not panicked, has not grown without bound, and serves new connections.
//!
//! Each test runs in a network namespace of its own ([`world::inside`]) and needs the privilege to make one.

#[path = "../support/mod.rs"]
mod support;
mod world;

mod crowd;
mod http1;
mod http2;
mod slow;
mod tls;
