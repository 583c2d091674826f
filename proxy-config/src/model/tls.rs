//! TLS contexts of chains and clusters; key material is named, never held.

use serde::Serialize;

use super::{Name, StringMatcher};

/// TLS protocol versions that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum TlsVersion {
    /// TLS 1.0: never served, kept so that it can be named in an error.
    V1_0,
    /// TLS 1.1: never served, kept so that it can be named in an error.
    V1_1,
    /// TLS 1.2.
    V1_2,
    /// TLS 1.3.
    V1_3,
}

/// What both directions share (`CommonTlsContext`).
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct CommonTls {
    /// SDS names of the certificates to present (`default`, `file-cert:...~...`).
    pub certificates: Vec<Name>,
    /// How the peer is checked; `None` checks nothing.
    pub validation: Option<Validation>,
    /// ALPN names, in order of preference.
    pub alpn: Vec<String>,
    /// Lowest version; `None` is the default (1.2).
    pub min_version: Option<TlsVersion>,
    /// Highest version; `None` is the default (1.3).
    pub max_version: Option<TlsVersion>,
    /// OpenSSL names of TLS 1.2 cipher suites; empty is the default list.
    pub cipher_suites: Vec<String>,
    /// Groups for key exchange (`X25519`, `P-256`, `X25519MLKEM768`); empty is the default list.
    pub ecdh_curves: Vec<String>,
}

/// Peer validation: SDS roots merged with the inline SAN rules.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Validation {
    /// SDS name of the roots (`ROOTCA`, `file-root:...`, `kubernetes://...-cacert`).
    pub roots: Option<Name>,
    /// The peer needs one SAN that matches one of these; empty accepts any.
    pub san: Vec<SanMatcher>,
    /// Verification is off (`trust_chain_verification: ACCEPT_UNTRUSTED`).
    pub accept_untrusted: bool,
}

/// One rule about subject alternative names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct SanMatcher {
    /// Which kind of SAN; `Any` is the legacy untyped field.
    pub kind: SanKind,
    /// What it must be.
    pub value: StringMatcher,
}

/// SAN kinds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum SanKind {
    /// Any of URI, DNS, IP, email.
    Any,
    /// URI.
    Uri,
    /// DNS.
    Dns,
    /// IP address.
    Ip,
    /// Email address.
    Email,
}

/// TLS termination on a filter chain (`DownstreamTlsContext`).
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DownstreamTls {
    /// Shared part.
    pub common: CommonTls,
    /// Without a client certificate the handshake fails.
    pub require_client_certificate: bool,
}

/// TLS origination on a cluster (`UpstreamTlsContext`).
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct UpstreamTls {
    /// Shared part.
    pub common: CommonTls,
    /// SNI to send; empty sends none.
    pub sni: String,
    /// Take the SNI from the request's host (`auto_sni` lives in the protocol options; this is `auto_host_sni`).
    pub auto_host_sni: bool,
    /// Accept the SAN equal to the SNI (`auto_sni_san_validation`).
    pub auto_sni_san_validation: bool,
}
