//! Listeners: which inspectors run, which chain takes a connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use proxy_config::model::{self, Direction, ListenerFilterKind, PortPredicate, TransportProtocol};

use super::Name;
use super::chain::Chain;
use super::chain_match::ChainMatcher;
use crate::telemetry::AccessLogs;

/// A listener, bound or reached by hand-off.
#[derive(Debug)]
pub struct Listener {
    /// Name.
    pub name: Name,
    /// Where it listens, or the original destination it stands for; `None` for pipes and internal listeners.
    pub address: Option<SocketAddr>,
    /// Further addresses.
    pub additional: Box<[SocketAddr]>,
    /// Which way traffic flows.
    pub direction: Direction,
    /// Has a socket.
    pub bound: bool,
    /// Hands connections to the listener of their original destination.
    pub use_original_dst: bool,
    /// The original destination is restored (a listener filter, with or without hand-off).
    pub original_dst: bool,
    /// IP_TRANSPARENT.
    pub transparent: bool,
    /// Source address and mark are kept upstream (TPROXY).
    pub original_src: Option<u32>,
    /// PROXY protocol is read first.
    pub proxy_protocol: bool,
    /// Connections are balanced exactly.
    pub exact_balance: bool,
    /// Logs of connections without a chain.
    pub access_log: Arc<AccessLogs>,
    /// What was said.
    pub config: Arc<model::Listener>,
    pub(super) inspectors: Inspectors,
    pub(super) chains: ChainMatcher,
}

/// The inspectors of a listener.
#[derive(Debug, Default)]
pub(super) struct Inspectors {
    tls: Option<Inspector>,
    http: Option<Inspector>,
    timeout: Option<Duration>,
    continue_on_timeout: bool,
}

/// `Some` predicate: where it does nothing.
#[derive(Debug)]
struct Inspector(Option<PortPredicate>);

impl Inspector {
    fn runs(&self, port: u16) -> bool {
        !self.0.as_ref().is_some_and(|off| off.holds(port))
    }
}

/// What has to be found out before a chain can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inspect {
    /// Look for a ClientHello.
    pub tls: bool,
    /// Tell HTTP from other bytes.
    pub http: bool,
    /// How long; `None` is for ever.
    pub timeout: Option<Duration>,
    /// After that time: go on with what is known (`true`) or close.
    pub continue_on_timeout: bool,
}

/// What is known about a connection when its chain is chosen.
#[derive(Debug, Clone, Copy)]
pub struct ChainInput<'a> {
    /// Original destination.
    pub dst: SocketAddr,
    /// Peer.
    pub src: SocketAddr,
    /// Server name that the client sent.
    pub sni: Option<&'a str>,
    /// Whether a ClientHello was seen.
    pub transport: TransportProtocol,
    /// Offered ALPN names, or what HTTP inspection found.
    pub alpn: &'a [String],
}

impl Listener {
    /// Which inspectors run for an original destination port.
    pub fn inspect(&self, dst_port: u16) -> Inspect {
        let runs = |inspector: &Option<Inspector>| inspector.as_ref().is_some_and(|i| i.runs(dst_port));
        Inspect {
            tls: runs(&self.inspectors.tls),
            http: runs(&self.inspectors.http),
            timeout: self.inspectors.timeout,
            continue_on_timeout: self.inspectors.continue_on_timeout,
        }
    }

    /// The chain that takes a connection; `None` closes it (NR).
    pub fn chain(&self, input: &ChainInput<'_>) -> Option<&Arc<Chain>> {
        self.chains.find(input)
    }

    /// All chains, the default one last.
    pub fn all_chains(&self) -> impl Iterator<Item = &Arc<Chain>> {
        self.chains.all()
    }
}

impl Inspectors {
    pub(super) fn new(said: &model::Listener) -> Self {
        let find = |wanted: fn(&ListenerFilterKind) -> bool| {
            said.listener_filters.iter().find(|f| wanted(&f.kind)).map(|f| Inspector(f.disabled.clone()))
        };
        Self {
            tls: find(|kind| matches!(kind, ListenerFilterKind::TlsInspector { .. })),
            http: find(|kind| matches!(kind, ListenerFilterKind::HttpInspector)),
            timeout: said.listener_filters_timeout,
            continue_on_timeout: said.continue_on_listener_filters_timeout,
        }
    }
}
