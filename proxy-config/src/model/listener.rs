//! Listeners, listener filters, filter chains and their match.

use std::net::SocketAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use super::{AccessLog, DownstreamTls, Name, NetworkFilter};

/// `envoy.config.listener.v3.Listener`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listener {
    /// Resource name.
    pub name: Name,
    /// Where it listens, or the original destination it stands for.
    pub address: Address,
    /// Further addresses (dual stack).
    pub additional_addresses: Vec<Address>,
    /// Which way traffic flows.
    pub direction: Direction,
    /// `false`: reached only by hand-off from the listener with `use_original_dst`.
    pub bind_to_port: bool,
    /// Connections are handed to the listener of their original destination.
    pub use_original_dst: bool,
    /// IP_TRANSPARENT (TPROXY interception).
    pub transparent: bool,
    /// What inspects the first bytes, in order.
    pub listener_filters: Vec<ListenerFilter>,
    /// How long inspection may take; `None` is for ever (`0s` on the wire).
    pub listener_filters_timeout: Option<Duration>,
    /// After that time: go on with what is known (`true`) or close.
    pub continue_on_listener_filters_timeout: bool,
    /// Chains, in configured order.
    pub filter_chains: Vec<FilterChain>,
    /// The chain when none matches; without it the connection is closed (NR).
    pub default_filter_chain: Option<FilterChain>,
    /// Listener-level access logs (connections without a chain).
    pub access_log: Vec<AccessLog>,
    /// Connections are balanced exactly over the workers.
    pub exact_balance: bool,
    /// Accepts taken per readiness event; `None` takes all.
    pub max_accepts_per_event: Option<u32>,
}

/// A socket address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Address {
    /// IP and port.
    Socket(SocketAddr),
    /// Unix domain socket path.
    Pipe(String),
    /// An Envoy internal listener's name and endpoint id.
    Internal(String, String),
    /// Host name and port, to be resolved (DNS clusters).
    Host(String, u16),
}

/// `traffic_direction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum Direction {
    /// Not said.
    #[default]
    Unspecified,
    /// To the local application.
    Inbound,
    /// From the local application.
    Outbound,
}

/// One listener filter with the predicate that switches it off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListenerFilter {
    /// What it does.
    pub kind: ListenerFilterKind,
    /// Where it does nothing; `None` is nowhere.
    pub disabled: Option<PortPredicate>,
}

/// The listener filters that istiod sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "a variant's line tells its fields")]
pub enum ListenerFilterKind {
    /// Restores the original destination.
    OriginalDst,
    /// Keeps the client's source address upstream, with this mark (TPROXY).
    OriginalSrc { mark: u32 },
    /// Reads SNI and ALPN of a ClientHello.
    TlsInspector { initial_read_buffer_size: Option<u32> },
    /// Tells HTTP from other bytes.
    HttpInspector,
    /// PROXY protocol.
    ProxyProtocol,
}

/// `ListenerFilterChainMatchPredicate` over destination ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum PortPredicate {
    /// Everything.
    Any,
    /// Ports in `[start, end)`.
    Range(u16, u32),
    /// One of these holds.
    Or(Vec<Self>),
    /// All of these hold.
    And(Vec<Self>),
    /// The opposite.
    Not(Box<Self>),
}

impl PortPredicate {
    /// Whether the predicate holds for a destination port.
    pub fn holds(&self, port: u16) -> bool {
        match self {
            Self::Any => true,
            Self::Range(start, end) => port >= *start && u32::from(port) < *end,
            Self::Or(of) => of.iter().any(|p| p.holds(port)),
            Self::And(of) => of.iter().all(|p| p.holds(port)),
            Self::Not(of) => !of.holds(port),
        }
    }
}

/// `envoy.config.listener.v3.FilterChain`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct FilterChain {
    /// Chain name (`0.0.0.0_8080`, `virtualInbound-catchall-http`, ...); may repeat inside a listener.
    pub name: Name,
    /// When it is chosen.
    pub matches: ChainMatch,
    /// TLS termination; `None` is plaintext.
    pub tls: Option<DownstreamTls>,
    /// Network filters in order; the last one is terminal.
    pub filters: Vec<NetworkFilter>,
    /// Limit on the TLS handshake; `None` is our own default.
    pub transport_socket_connect_timeout: Option<Duration>,
    /// Set where a security object that selects this chain could not be compiled: nothing may pass it
    /// (503, gRPC 14, TCP closed after the handshake). Holds the object's name.
    pub unusable: Option<String>,
}

/// `FilterChainMatch`; empty fields match anything. Precedence: destination port, destination prefix (longest),
/// server name, transport protocol, application protocol, direct source prefix, source type, source prefix, source port.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ChainMatch {
    /// Original destination port.
    pub destination_port: Option<u16>,
    /// Original destination.
    pub prefix_ranges: Vec<IpNet>,
    /// SNI: exact or `*.suffix`.
    pub server_names: Vec<String>,
    /// What the inspectors saw.
    pub transport_protocol: Option<TransportProtocol>,
    /// ALPN names offered by the client, or what HTTP inspection found.
    pub application_protocols: Vec<String>,
    /// Peer address, before PROXY protocol.
    pub direct_source_prefix_ranges: Vec<IpNet>,
    /// Local or external source.
    pub source_type: SourceType,
    /// Peer address.
    pub source_prefix_ranges: Vec<IpNet>,
    /// Peer ports.
    pub source_ports: Vec<u16>,
}

/// `source_type` of a chain match.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
pub enum SourceType {
    /// Any.
    #[default]
    Any,
    /// Same IP or loopback.
    SameIpOrLoopback,
    /// Not local.
    External,
}

/// Result of TLS inspection as chains ask for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum TransportProtocol {
    /// No TLS seen.
    RawBuffer,
    /// A ClientHello was seen.
    Tls,
}
