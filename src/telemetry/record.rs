//! The facts of one request or connection, borrowed from whoever knows them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};
use smallvec::SmallVec;

use super::peer::Peer;
use crate::error::Flags;

/// What a record tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// A request.
    Http,
    /// A TCP connection that reached its chain.
    Tcp,
    /// A connection that ended before its chain served it: no chain, a failed handshake, a limit.
    Conn,
}

impl RecordKind {
    /// `http`, `tcp` or `conn`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Tcp => "tcp",
            Self::Conn => "conn",
        }
    }
}

/// Everything that a log line may tell. An empty text, `None` and 0 mean: there is none.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    /// What it is.
    pub kind: RecordKind,
    /// When the request or connection began.
    pub start: SystemTime,
    /// From `start` to the end.
    pub duration: Duration,
    /// From `start` to the last byte of the request.
    pub request_duration: Option<Duration>,
    /// From `start` to the first byte of the upstream's response.
    pub response_duration: Option<Duration>,
    /// From sending the request upstream to its response headers: `x-envoy-upstream-service-time`.
    pub upstream_service_time: Option<Duration>,
    /// Method.
    pub method: &'a str,
    /// Path with query, as sent upstream.
    pub path: &'a str,
    /// Path before a rewrite; empty when nothing was rewritten.
    pub original_path: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// Host with port.
    pub authority: &'a str,
    /// `HTTP/1.1`, `HTTP/2`.
    pub protocol: &'a str,
    /// Request headers.
    pub request_headers: Headers<'a>,
    /// Response headers.
    pub response_headers: Headers<'a>,
    /// Status sent downstream; 0: none.
    pub code: u16,
    /// gRPC status from trailers or headers.
    pub grpc_status: Option<u32>,
    /// Response flags.
    pub flags: Flags,
    /// `%RESPONSE_CODE_DETAILS%`
    pub details: &'a str,
    /// `%CONNECTION_TERMINATION_DETAILS%`
    pub termination_details: &'a str,
    /// `%UPSTREAM_TRANSPORT_FAILURE_REASON%`
    pub transport_failure: &'a str,
    /// `%DOWNSTREAM_TRANSPORT_FAILURE_REASON%`: why the client's handshake failed.
    pub downstream_failure: &'a str,
    /// The policy that decided, as the filter names it (`ns[a]-policy[b]-rule[0]`).
    pub policy: &'a str,
    /// Body bytes received (TCP: bytes).
    pub bytes_received: u64,
    /// Body bytes sent (TCP: bytes).
    pub bytes_sent: u64,
    /// Name of the cluster.
    pub upstream_cluster: &'a str,
    /// Host that served.
    pub upstream_host: Option<SocketAddr>,
    /// Our end of the connection to it.
    pub upstream_local: Option<SocketAddr>,
    /// Attempts made upstream.
    pub attempts: u32,
    /// The client after x-forwarded-for.
    pub downstream_remote: Option<SocketAddr>,
    /// The connection's peer.
    pub downstream_direct_remote: Option<SocketAddr>,
    /// Where the client wanted to go.
    pub downstream_local: Option<SocketAddr>,
    /// Server name that the client sent.
    pub sni: &'a str,
    /// Route name.
    pub route: &'a str,
    /// Virtual host name.
    pub virtual_host: &'a str,
    /// Filter chain name.
    pub filter_chain: &'a str,
    /// First URI SAN of the client's certificate.
    pub peer_uri: &'a str,
    /// Subject of the client's certificate.
    pub peer_subject: &'a str,
    /// First URI SAN of our certificate.
    pub local_uri: &'a str,
    /// `TLSv1.3`
    pub tls_version: &'a str,
    /// Cipher suite.
    pub tls_cipher: &'a str,
    /// Number of the client connection.
    pub connection_id: u64,
    /// We are the client's proxy.
    pub outbound: bool,
    /// The client presented a certificate.
    pub mtls: bool,
    /// What the other proxy said of its workload: the server's outbound, the client's inbound.
    pub peer: Option<&'a Arc<Peer>>,
}

impl Record<'_> {
    /// A record with nothing in it but its kind and times.
    pub const fn new(kind: RecordKind, start: SystemTime, duration: Duration) -> Self {
        Self {
            kind,
            start,
            duration,
            request_duration: None,
            response_duration: None,
            upstream_service_time: None,
            method: "",
            path: "",
            original_path: "",
            scheme: "",
            authority: "",
            protocol: "",
            request_headers: Headers::None,
            response_headers: Headers::None,
            code: 0,
            grpc_status: None,
            flags: Flags::NONE,
            details: "",
            termination_details: "",
            transport_failure: "",
            downstream_failure: "",
            policy: "",
            bytes_received: 0,
            bytes_sent: 0,
            upstream_cluster: "",
            upstream_host: None,
            upstream_local: None,
            attempts: 0,
            downstream_remote: None,
            downstream_direct_remote: None,
            downstream_local: None,
            sni: "",
            route: "",
            virtual_host: "",
            filter_chain: "",
            peer_uri: "",
            peer_subject: "",
            local_uri: "",
            tls_version: "",
            tls_cipher: "",
            connection_id: 0,
            outbound: false,
            mtls: false,
            peer: None,
        }
    }
}

/// Header values that were kept because a format asks for them. A value costs a reference count.
pub type Captured = SmallVec<[(HeaderName, HeaderValue); 4]>;

/// Where a record finds headers.
#[derive(Debug, Clone, Copy)]
pub enum Headers<'a> {
    /// There are none.
    None,
    /// All of them.
    Map(&'a HeaderMap),
    /// Those that [`super::AccessLogs::capture_request`] or `capture_response` kept.
    Captured(&'a Captured),
}

impl<'a> Headers<'a> {
    /// The first value of a header.
    pub fn get(self, name: &HeaderName) -> Option<&'a HeaderValue> {
        match self {
            Self::None => None,
            Self::Map(map) => map.get(name),
            Self::Captured(kept) => kept.iter().find(|(kept, _)| kept == name).map(|(_, value)| value),
        }
    }
}
