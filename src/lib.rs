//! istio-proxy: a sidecar data plane.
//!
//! Said → compiled → served: `proxy-config` turns YAML or xDS into a `Model`; [`snapshot`] compiles it into one immutable
//! snapshot; identical single-threaded [`worker`]s serve it. Imports point down only; `tests/architecture.rs` enforces it.

pub mod admin;
pub mod app;
pub mod ca;
pub mod cli;
pub mod control;
pub mod dns;
pub mod drain;
pub mod error;
pub mod explain;
pub mod grpc;
pub mod identity;
pub mod iptables;
pub mod jwks;
pub mod net;
pub mod probe;
pub mod proxy;
pub mod snapshot;
pub mod telemetry;
pub mod tls;
pub mod upstream;
pub mod validate;
pub mod worker;
pub mod xds;
