//! Load, peers, the demo and the conformance runner. Never part of the product: the product is run as a user runs it, by
//! its command line.

pub mod app;
pub mod bench;
pub mod child;
pub mod conformance;
pub mod demo;
pub mod istiod;
pub mod netns;
#[cfg(feature = "conformance")]
pub mod wire;
