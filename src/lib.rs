//! istio-proxy: a sidecar data plane.
//!
//! Said → compiled → served: `proxy-config` turns YAML or xDS into a `Model`; [`snapshot`] compiles it into one immutable
//! snapshot; identical single-threaded [`worker`]s serve it. Imports point down only; `tests/architecture.rs` enforces it.

pub mod ca;
pub mod control;
pub mod drain;
pub mod error;
pub mod iptables;
pub mod net;
pub mod probe;
pub mod proxy;
pub mod snapshot;
pub mod telemetry;
pub mod tls;
pub mod upstream;
