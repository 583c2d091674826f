//! What was said, as data: the [`Model`] and the two mouths that produce it.
//!
//! * [`compile`] makes it from Istio and Kubernetes YAML, as istiod would for one proxy;
//! * [`xds`] makes it from Envoy resources as istiod sends them.
//!
//! This crate does no I/O and names no runtime: texts and bytes go in, a model and rejects come out.

pub mod bootstrap;
pub mod ca;
pub mod compile;
pub mod describe;
mod diagnose;
pub mod diff;
pub mod istio;
pub mod k8s;
mod load;
pub mod model;
mod objects;
pub mod peer;
pub mod re2;
pub mod registry;
pub mod sds;
mod validate;
pub mod xds;
mod yaml;

pub use diagnose::{Level, Message};
pub use load::{AutoEntry, Folder, Inputs, Loaded, Source, Store, WhoAmI, analyze, from_yaml, validate};
pub use model::{Model, Name, Reject, Severity};
pub use validate::{Verdict, fragment_verdict, verdict};
