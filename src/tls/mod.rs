//! Who is on the other end. The only place that names rustls.
//!
//! It decides whether a peer's certificate is acceptable (chain, dates, key usage, SAN rules of the configuration,
//! exactly one SPIFFE identity) and what a handshake offers. It never decides what that peer may do: that is policy.
//!
//! Contexts are compiled on the control thread and shared by all workers, tickets and session caches included:
//!
//! ```ignore
//! let secrets = Secrets::load(Path::new("/etc/certs"))?;
//! let context = ServerTls::compile(&chain.tls, &secrets, "virtualInbound/0.0.0.0_8080")?;
//! let (stream, peer) = tls::accept(stream, &context, tls::HANDSHAKE_LIMIT).await?;
//! ```

mod certs;
mod config;
mod handshake;
mod peer;
mod spiffe;
mod verify;

#[cfg(test)]
mod tests;

pub use certs::{CertInfo, Identity, Roots, Secrets, pem};
pub use config::{ClientTls, ServerTls};
pub use handshake::{HANDSHAKE_LIMIT, TlsError, accept, connect};
pub use peer::{Peer, hex, hex_sha256};
pub use spiffe::SpiffeId;

/// The time by which certificates are good or not: seconds since 1970.
pub fn unix_now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
