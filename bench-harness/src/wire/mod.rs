//! The two ends of a wire case, driven by lines of JSON: applications that do what a script says and note what they
//! see, clients that send what no library would send.
//!
//! A peer process runs inside a network namespace; the conformance runner talks to it over its standard input and
//! output. TLS is OpenSSL's, because the library of the product refuses to do wrong.

pub mod client;
mod conn;
mod http1;
mod http2;
pub mod peer;
mod raw2;
pub mod server;
mod value;
