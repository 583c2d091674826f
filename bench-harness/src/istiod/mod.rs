//! A control plane for tests: gRPC over TLS with istiod's names, whose misbehaviour is ordered.
//!
//! ```ignore
//! let istiod = Istiod::start(Setup::default()).await?;
//! istiod.ca.then([Answer::Status(Code::Unavailable)]);           // one failure, then it signs
//! std::fs::write("root-cert.pem", istiod.roots())?;
//! // … start what is tested with istiod.address(), then wait for what it does:
//! istiod.ca.calls_reach(2).await;
//! ```
//!
//! Everything that was asked is recorded; tests wait for the record to grow instead of sleeping.

pub mod ads;
pub mod ca;
mod log;
pub mod resources;
pub mod server;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;

pub use ca::{Answer, Ca};
pub use log::Log;
pub use server::{Call, Connection, Peer, Reply, Server, Service};

/// Host in istiod's certificate.
pub const NAME: &str = "istiod.istio-system.svc";

/// A running control plane; it ends when dropped.
pub struct Istiod {
    /// Signs.
    pub ca: Arc<Ca>,
    /// Connections.
    pub server: Server,
}

/// What it begins with.
#[derive(Default)]
pub struct Setup {
    /// Further services by their full names, as `envoy.service.discovery.v3.AggregatedDiscoveryService`.
    pub services: Vec<(&'static str, Arc<dyn Service>)>,
    /// The CA to use; a new one when `None`.
    pub ca: Option<Arc<Ca>>,
    /// Hosts of the server's certificate; [`NAME`] when empty.
    pub names: Vec<String>,
    /// Whose certificate the server shows; its own CA's when `None`.
    pub server_ca: Option<Arc<Ca>>,
    /// The certificate that the server shows is over.
    pub expired: bool,
}

impl Istiod {
    /// Starts on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When no socket or no certificate can be made.
    pub async fn start(setup: Setup) -> Result<Self> {
        let ca = match setup.ca {
            Some(ca) => ca,
            None => Arc::new(Ca::new("cluster.local")?),
        };
        let names = if setup.names.is_empty() { vec![NAME.to_owned()] } else { setup.names };
        let signer = setup.server_ca.as_ref().unwrap_or(&ca);
        let tls = signer.server_config(&names, &ca, setup.expired)?;
        let mut services = setup.services;
        services.push((ca::SERVICE, Arc::clone(&ca) as _));
        let server = Server::start(Some(tls), services).await?;
        Ok(Self { ca, server })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// What a client must trust, PEM.
    pub fn roots(&self) -> String {
        self.ca.root()
    }
}
