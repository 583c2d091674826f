//! Load, peers, the demo, the conformance runner and the soak. Never part of the product: the product is run as a user runs
//! it, by its command line. Only the discovery stream, which is a value without I/O, is asked directly.

pub mod app;
pub mod bench;
pub mod child;
pub mod conformance;
pub mod demo;
pub mod envoy;
pub mod frames;
pub mod istiod;
pub mod netns;
pub mod soak;
#[cfg(feature = "conformance")]
pub mod wire;
