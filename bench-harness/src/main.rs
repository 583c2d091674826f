//! Load, peers and the conformance runner.
fn main() {}
