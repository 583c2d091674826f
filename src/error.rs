//! Every failure, and what it means outside: one enum, one table.
//!
//! Names, flags, statuses and details strings are Envoy's (`response_flags`, `response_code_details`), so that logs,
//! dashboards and clients read the same. Configuration errors are `proxy_config::Reject`, never an [`Error`].

use std::fmt;

/// Everything that can go wrong with a connection or a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// No filter chain matches the connection.
    NoChain,
    /// No route matches the request.
    NoRoute,
    /// The route names a cluster that is not there.
    NoCluster,
    /// The cluster has no host that may be used.
    NoHealthyHost,
    /// A circuit breaker is open.
    Overflow(Limit),
    /// A name could not be resolved.
    DnsFailed,
    /// The upstream refused or reset the connection attempt.
    ConnectRefused,
    /// The upstream did not answer the connection attempt in time.
    ConnectTimeout,
    /// The upstream TLS handshake failed.
    TlsHandshake,
    /// The upstream presented another identity than it should.
    PeerIdentity,
    /// The upstream reset the stream.
    UpstreamReset,
    /// The upstream refused the stream (REFUSED_STREAM): surely not processed.
    UpstreamRefused,
    /// The upstream closed the connection before the response.
    UpstreamClosed,
    /// The upstream sent something that is not HTTP.
    UpstreamProtocol,
    /// We reset the upstream stream.
    LocalReset,
    /// The route timeout.
    ResponseTimeout,
    /// The limit of one try.
    PerTryTimeout,
    /// The longest life of a stream, from `grpc-timeout` or configuration.
    MaxStreamDuration,
    /// A stream was idle for too long.
    StreamIdle,
    /// The whole request did not arrive in time.
    RequestTimeout,
    /// The head of a request did not arrive in time.
    HeadTimeout,
    /// The longest life of a connection.
    ConnDuration,
    /// The client went away.
    DownstreamGone,
    /// The client reset the stream.
    DownstreamReset,
    /// The client broke the protocol.
    DownstreamProtocol,
    /// A policy refused.
    RbacDenied,
    /// An external authorizer refused.
    ExtAuthDenied,
    /// A JWT was missing or bad.
    JwtDenied,
    /// A local rate limit.
    RateLimited,
    /// An injected abort.
    FaultAbort,
    /// The local application is unhealthy.
    LocalHealthFailed,
    /// We are overloaded.
    Overload,
    /// Configuration asks for something that we do not do.
    UnsupportedConfig,
    /// A security object that selects this traffic could not be compiled.
    PolicyUnusable,
    /// A bug.
    Internal,
}

/// Which limit of a circuit breaker was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Limit {
    /// `max_connections`.
    Connections,
    /// `max_pending_requests`.
    Pending,
    /// `max_requests`.
    Requests,
    /// `max_retries` or the retry budget.
    Retries,
}

/// Whose doing a failure was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The client's.
    Downstream,
    /// The upstream's.
    Upstream,
    /// Ours.
    Local,
}

/// Whether the same request may be sent again without asking the route's policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Never on our own account.
    No,
    /// The request was surely not processed.
    Yes,
    /// Only because a reused connection turned out dead.
    ReusedOnly,
}

/// Envoy's response flags as a set.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Flags(u32);

macro_rules! flags {
    ($($name:ident = $bit:literal, $text:literal, $doc:literal;)*) => {
        impl Flags {
            $(#[doc = $doc] pub const $name: Self = Self(1 << $bit);)*
            const ALL: &'static [(Self, &'static str)] = &[$((Self::$name, $text),)*];
        }
    };
}

flags! {
    LH = 0, "LH", "Local service failed its health check.";
    UH = 1, "UH", "No healthy upstream.";
    UT = 2, "UT", "Upstream request timeout.";
    LR = 3, "LR", "Local reset.";
    UR = 4, "UR", "Upstream remote reset.";
    UF = 5, "UF", "Upstream connection failure.";
    UC = 6, "UC", "Upstream connection termination.";
    UO = 7, "UO", "Upstream overflow (circuit breaker).";
    NR = 8, "NR", "No route or no filter chain.";
    DI = 9, "DI", "Delay injected.";
    FI = 10, "FI", "Fault injected.";
    RL = 11, "RL", "Rate limited.";
    UAEX = 12, "UAEX", "Refused by the external authorizer.";
    DC = 13, "DC", "Downstream connection termination.";
    URX = 14, "URX", "Retry limit exceeded.";
    SI = 15, "SI", "Stream idle timeout.";
    DPE = 16, "DPE", "Downstream protocol error.";
    UPE = 17, "UPE", "Upstream protocol error.";
    UMSDR = 18, "UMSDR", "Upstream max stream duration reached.";
    OM = 19, "OM", "Overload manager.";
    DF = 20, "DF", "DNS resolution failure.";
    NC = 21, "NC", "No cluster.";
    DT = 22, "DT", "Downstream duration timeout.";
    DR = 23, "DR", "Downstream remote reset.";
}

impl Flags {
    /// No flag.
    pub const NONE: Self = Self(0);

    /// Whether nothing is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
    /// Whether all of `other` is set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// Whether any of `other` is set.
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
    /// The set as a number.
    pub fn bits(self) -> u32 {
        self.0
    }
    /// A flag by Envoy's short string.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, text)| *text == name).map(|(flag, _)| *flag)
    }
    /// Sets `other`.
    pub fn insert(&mut self, other: Self) {
        self.0 |= other.0;
    }
    /// Clears `other`.
    pub fn remove(&mut self, other: Self) {
        self.0 &= !other.0;
    }
}

impl std::ops::BitOr for Flags {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Envoy's short strings, comma-separated in the order of `ALL`; `-` when empty.
impl fmt::Display for Flags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("-");
        }
        let mut first = true;
        for (flag, text) in Self::ALL {
            if self.contains(*flag) {
                if !first {
                    f.write_str(",")?;
                }
                f.write_str(text)?;
                first = false;
            }
        }
        Ok(())
    }
}

/// What a [`Kind`] means outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Flag in the log.
    pub flag: Flags,
    /// HTTP status of the local reply; 0: none is sent.
    pub status: u16,
    /// `%RESPONSE_CODE_DETAILS%`.
    pub details: &'static str,
    /// Body of the local reply; upstream resets put their reason behind it (see `proxy::reply`).
    pub body: &'static str,
    /// The host is blamed (outlier detection, local origin).
    pub blames_host: bool,
}

const fn row(flag: Flags, status: u16, details: &'static str, body: &'static str, blames_host: bool) -> Row {
    Row { flag, status, details, body, blames_host }
}

const RESET: &str = "upstream connect error or disconnect/reset before headers. reset reason: ";

impl Kind {
    /// Every kind, in the order of the enum.
    pub const ALL: &'static [Self] = &[
        Self::NoChain,
        Self::NoRoute,
        Self::NoCluster,
        Self::NoHealthyHost,
        Self::Overflow(Limit::Connections),
        Self::Overflow(Limit::Pending),
        Self::Overflow(Limit::Requests),
        Self::Overflow(Limit::Retries),
        Self::DnsFailed,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::TlsHandshake,
        Self::PeerIdentity,
        Self::UpstreamReset,
        Self::UpstreamRefused,
        Self::UpstreamClosed,
        Self::UpstreamProtocol,
        Self::LocalReset,
        Self::ResponseTimeout,
        Self::PerTryTimeout,
        Self::MaxStreamDuration,
        Self::StreamIdle,
        Self::RequestTimeout,
        Self::HeadTimeout,
        Self::ConnDuration,
        Self::DownstreamGone,
        Self::DownstreamReset,
        Self::DownstreamProtocol,
        Self::RbacDenied,
        Self::ExtAuthDenied,
        Self::JwtDenied,
        Self::RateLimited,
        Self::FaultAbort,
        Self::LocalHealthFailed,
        Self::Overload,
        Self::UnsupportedConfig,
        Self::PolicyUnusable,
        Self::Internal,
    ];

    /// The table.
    pub const fn row(self) -> Row {
        match self {
            Self::NoChain => row(Flags::NR, 0, "filter_chain_not_found", "", false),
            Self::NoRoute => row(Flags::NR, 404, "route_not_found", "", false),
            Self::NoCluster => row(Flags::NC, 503, "cluster_not_found", "", false),
            Self::NoHealthyHost => row(Flags::UH, 503, "no_healthy_upstream", "no healthy upstream", false),
            Self::Overflow(_) => row(Flags::UO, 503, "upstream_reset_before_response_started{overflow}", RESET, false),
            Self::DnsFailed => row(Flags::DF, 503, "dns_resolution_failure", "DNS resolution failure", false),
            Self::ConnectRefused => {
                row(Flags::UF, 503, "upstream_reset_before_response_started{remote_connection_failure}", RESET, true)
            }
            Self::ConnectTimeout => {
                row(Flags::UF, 503, "upstream_reset_before_response_started{connection_timeout}", RESET, true)
            }
            Self::TlsHandshake | Self::PeerIdentity => {
                row(Flags::UF, 503, "upstream_reset_before_response_started{remote_connection_failure}", RESET, true)
            }
            Self::UpstreamReset => {
                row(Flags::UR, 503, "upstream_reset_before_response_started{remote_reset}", RESET, true)
            }
            Self::UpstreamRefused => {
                row(Flags::UR, 503, "upstream_reset_before_response_started{remote_refused_stream_reset}", RESET, true)
            }
            Self::UpstreamClosed => {
                row(Flags::UC, 503, "upstream_reset_before_response_started{connection_termination}", RESET, true)
            }
            Self::UpstreamProtocol => {
                row(Flags::UPE, 502, "upstream_reset_before_response_started{protocol_error}", RESET, true)
            }
            Self::LocalReset => {
                row(Flags::LR, 503, "upstream_reset_before_response_started{local_reset}", RESET, false)
            }
            other => other.row_without_upstream(),
        }
    }

    /// The part of the table that no upstream reset stands behind.
    const fn row_without_upstream(self) -> Row {
        match self {
            Self::ResponseTimeout => row(Flags::UT, 504, "response_timeout", "upstream request timeout", true),
            Self::PerTryTimeout => row(Flags::UT, 504, "upstream_per_try_timeout", "upstream request timeout", true),
            Self::MaxStreamDuration => {
                row(Flags::NONE, 408, "max_duration_timeout", "downstream duration timeout", false)
            }
            Self::StreamIdle => row(Flags::SI, 408, "stream_idle_timeout", "stream timeout", false),
            Self::RequestTimeout => row(Flags::NONE, 408, "request_overall_timeout", "request timeout", false),
            Self::HeadTimeout => row(Flags::NONE, 408, "request_header_timeout", "request header timeout", false),
            Self::ConnDuration => row(Flags::DT, 0, "duration_timeout", "", false),
            Self::DownstreamGone => row(Flags::DC, 0, "downstream_remote_disconnect", "", false),
            Self::DownstreamReset => row(Flags::DR, 0, "downstream_remote_reset", "", false),
            Self::DownstreamProtocol => row(Flags::DPE, 400, "http1.codec_error", "Bad Request", false),
            Self::RbacDenied => {
                row(Flags::NONE, 403, "rbac_access_denied_matched_policy[none]", "RBAC: access denied", false)
            }
            Self::ExtAuthDenied => row(Flags::UAEX, 403, "ext_authz_denied", "", false),
            Self::JwtDenied => {
                row(Flags::NONE, 401, "jwt_authn_access_denied{Jwt_is_missing}", "Jwt is missing", false)
            }
            Self::RateLimited => row(Flags::RL, 429, "local_rate_limited", "local_rate_limited", false),
            Self::FaultAbort => row(Flags::FI, 503, "fault_filter_abort", "fault filter abort", false),
            Self::LocalHealthFailed => row(Flags::LH, 503, "health_check_failed", "", false),
            Self::Overload => row(Flags::OM, 503, "overload", "envoy overloaded", false),
            Self::UnsupportedConfig => row(Flags::NONE, 501, "unsupported_config", "unsupported configuration", false),
            Self::PolicyUnusable => row(Flags::NONE, 503, "policy_unusable", "policy unusable", false),
            _ => row(Flags::NONE, 500, "internal_error", "internal error", false),
        }
    }

    /// Reason behind `reset reason: ` in the body of an upstream reset.
    pub const fn reset_reason(self) -> &'static str {
        match self {
            Self::Overflow(_) => "overflow",
            Self::ConnectTimeout => "connection timeout",
            Self::ConnectRefused | Self::TlsHandshake | Self::PeerIdentity => "remote connection failure",
            Self::UpstreamReset => "remote reset",
            Self::UpstreamRefused => "remote refused stream reset",
            Self::UpstreamClosed => "connection termination",
            Self::UpstreamProtocol => "protocol error",
            Self::LocalReset => "local reset",
            _ => "",
        }
    }
}

/// A failure with its circumstances.
#[derive(Debug)]
pub struct Error {
    /// What.
    pub kind: Kind,
    /// Whose doing.
    pub source: Source,
    /// May it be tried again at once.
    pub retry: Retry,
    /// Details string when it is not the table's.
    pub details: Option<Box<str>>,
    /// Underlying error.
    pub cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of ours, no retry.
    pub fn local(kind: Kind) -> Self {
        Self { kind, source: Source::Local, retry: Retry::No, details: None, cause: None }
    }
    /// An upstream failure, no retry of our own.
    pub fn upstream(kind: Kind) -> Self {
        Self { kind, source: Source::Upstream, retry: Retry::No, details: None, cause: None }
    }
    /// A failure of the client's.
    pub fn downstream(kind: Kind) -> Self {
        Self { kind, source: Source::Downstream, retry: Retry::No, details: None, cause: None }
    }
    /// Adds what lies behind it.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }
    /// Sets the retry class.
    #[must_use]
    pub fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }
    /// Details for the log: its own, else the table's.
    pub fn details(&self) -> &str {
        self.details.as_deref().unwrap_or_else(|| self.kind.row().details)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.details())?;
        if let Some(cause) = &self.cause {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Names of gRPC's codes as Go's library and Envoy write them, each at its number.
pub const GRPC_CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// gRPC's fixed mapping of an HTTP status to a gRPC status, for trailers-only replies.
pub const fn grpc_status(http: u16) -> u32 {
    match http {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502..=504 => 14,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_print_in_table_order() {
        assert_eq!((Flags::URX | Flags::UF).to_string(), "UF,URX");
        assert_eq!(Flags::NONE.to_string(), "-");
        assert_eq!((Flags::named("URX"), Flags::named("NONE")), (Some(Flags::URX), None));
        assert!((Flags::URX | Flags::UF).intersects(Flags::UF) && !Flags::UF.intersects(Flags::URX));
    }

    #[test]
    fn upstream_resets_name_their_reason() {
        for kind in [Kind::UpstreamClosed, Kind::Overflow(Limit::Pending), Kind::ConnectTimeout] {
            assert!(!kind.reset_reason().is_empty());
            assert!(kind.row().details.starts_with("upstream_reset_before_response_started{"));
        }
    }
}
