//! What a route does: forwarding with retries and rewrites, redirects, header changes, CORS.

use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use proxy_config::model::{AppendAction, Fault, Mirror};
use regex::bytes::Regex;

use super::cluster::ClusterRef;
use super::matcher::StringMatch;
use super::{Name, RequestView};
use crate::telemetry::Format;

/// What a route does.
#[derive(Debug)]
pub enum Action {
    /// Forward.
    Forward(Box<Forward>),
    /// Redirect.
    Redirect(Redirect),
    /// Answer.
    Direct {
        /// Status.
        status: u16,
        /// Body.
        body: Bytes,
    },
    /// 501 `unsupported_config`; names what.
    Unsupported(Name),
}

/// Forwarding.
#[derive(Debug)]
pub struct Forward {
    /// Clusters with running sums of their weights.
    pub clusters: Box<[WeightedCluster]>,
    /// Route timeout; `None` is off.
    pub timeout: Option<Duration>,
    /// Stream idle limit: `None` takes the connection manager's, `Some(None)` is off.
    pub idle_timeout: Option<Option<Duration>>,
    /// Legacy cap on grpc-timeout; `None` ignores the header, zero takes it as it is.
    pub max_grpc_timeout: Option<Duration>,
    /// Longest life of the stream: `None` takes the connection manager's, `Some(None)` is off.
    pub max_stream_duration: Option<Option<Duration>>,
    /// `None` ignores grpc-timeout, zero takes it as it is.
    pub grpc_timeout_header_max: Option<Duration>,
    /// Retries; `None` is none.
    pub retry: Option<RetryPolicy>,
    /// Path rewriting.
    pub rewrite: Rewrite,
    /// Host rewrite; a weighted cluster's own comes first.
    pub host_rewrite: Option<HostRewrite>,
    /// x-forwarded-host keeps the old host.
    pub append_x_forwarded_host: bool,
    /// Mirrors with where they go.
    pub mirrors: Box<[(ClusterRef, Mirror)]>,
    /// Consistent hashing, in order.
    pub hash: Box<[HashPolicy]>,
    /// Status when the cluster is not there.
    pub cluster_not_found_status: u16,
    /// Upgrades by name (lower case) that differ from the connection manager's.
    pub upgrades: Box<[(Box<str>, bool)]>,
}

/// A cluster of a route.
#[derive(Debug)]
pub struct WeightedCluster {
    /// Which.
    pub cluster: ClusterRef,
    /// Relative weight.
    pub weight: u32,
    pub(super) sum: u64,
    /// Request header changes.
    pub request_headers: HeaderOps,
    /// Response header changes.
    pub response_headers: HeaderOps,
    /// Host rewrite.
    pub host_rewrite: Option<HeaderValue>,
}

impl Forward {
    /// The cluster for a draw; `None` when nothing has weight.
    pub fn pick(&self, draw: u64) -> Option<&WeightedCluster> {
        if let [only] = &*self.clusters {
            return Some(only);
        }
        let total = self.clusters.last().map_or(0, |c| c.sum);
        let at = draw.checked_rem(total)?;
        self.clusters.iter().find(|c| at < c.sum)
    }
}

/// Host rewriting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostRewrite {
    /// This text.
    Literal(HeaderValue),
    /// The chosen host's name.
    Auto,
}

/// Path rewriting.
#[derive(Debug, Default)]
pub enum Rewrite {
    /// None.
    #[default]
    None,
    /// The matched prefix (an exact path: all of it) becomes this.
    Prefix(Box<str>),
    /// Every match of the expression becomes the substitution (RE2's `\1`, already translated).
    Regex(Box<Regex>, Box<str>),
}

/// Source of a consistent hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashSource {
    /// A header's value.
    Header(HeaderName),
    /// A cookie; with a lifetime it is made when absent.
    Cookie {
        /// Name.
        name: Box<str>,
        /// Path attribute.
        path: Box<str>,
        /// Lifetime.
        ttl: Option<Duration>,
    },
    /// The source address.
    SourceIp,
    /// A query parameter.
    Query(Box<str>),
}

/// One hash policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashPolicy {
    /// Source.
    pub source: HashSource,
    /// Nothing after it is looked at when it gave a hash.
    pub terminal: bool,
}

/// When a try counts as failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetryOn(pub u32);

macro_rules! retry_on {
    ($($name:ident = $bit:literal, $word:literal, $doc:literal;)*) => {
        impl RetryOn {
            $(#[doc = $doc] pub const $name: Self = Self(1 << $bit);)*
            const WORDS: &'static [(Self, &'static str)] = &[$((Self::$name, $word),)*];

            /// The word of `retry_on`; `None` for words that mean nothing here.
            pub fn word(word: &str) -> Option<Self> {
                match word {
                    $($word => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

retry_on! {
    SERVER_ERROR = 0, "5xx", "Any 5xx, or no response at all.";
    GATEWAY_ERROR = 1, "gateway-error", "502, 503, 504.";
    RESET = 2, "reset", "No response at all.";
    RESET_BEFORE_REQUEST = 3, "reset-before-request", "Reset before the request headers were sent.";
    CONNECT_FAILURE = 4, "connect-failure", "The connection could not be opened.";
    RETRIABLE_4XX = 5, "retriable-4xx", "409.";
    REFUSED_STREAM = 6, "refused-stream", "REFUSED_STREAM.";
    RETRIABLE_STATUS_CODES = 7, "retriable-status-codes", "One of the listed statuses.";
    ENVOY_RATELIMITED = 9, "envoy-ratelimited", "`x-envoy-ratelimited`.";
    GRPC_CANCELLED = 10, "cancelled", "grpc-status 1.";
    GRPC_DEADLINE_EXCEEDED = 11, "deadline-exceeded", "grpc-status 4.";
    GRPC_INTERNAL = 12, "internal", "grpc-status 13.";
    GRPC_RESOURCE_EXHAUSTED = 13, "resource-exhausted", "grpc-status 8.";
    GRPC_UNAVAILABLE = 14, "unavailable", "grpc-status 14.";
    POST_CONNECT_FAILURE = 15, "http3-post-connect-failure", "HTTP/3; never.";
}

impl RetryOn {
    /// Whether any of `other` is in it.
    pub fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
    /// Both.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The words, comma-separated.
impl std::fmt::Display for RetryOn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let words = Self::WORDS.iter().filter(|(on, _)| self.has(*on)).map(|(_, word)| *word);
        f.write_str(&words.collect::<Vec<_>>().join(","))
    }
}

/// Retries of a route.
#[derive(Debug, Clone, PartialEq)]
pub struct RetryPolicy {
    /// When.
    pub on: RetryOn,
    /// Retries after the first try.
    pub retries: u32,
    /// Limit of each try; `None` is the route's.
    pub per_try_timeout: Option<Duration>,
    /// What `retriable-status-codes` means.
    pub statuses: Box<[u16]>,
    /// Hosts already tried are avoided.
    pub avoid_previous_hosts: bool,
    /// Times that host selection is repeated.
    pub host_selection_attempts: u32,
    /// `previous_priorities` update frequency.
    pub previous_priorities: Option<u32>,
    /// First back-off.
    pub backoff_base: Duration,
    /// Longest back-off.
    pub backoff_max: Duration,
}

/// Redirect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Redirect {
    pub(super) said: proxy_config::model::Redirect,
}

/// Header changes in the order in which they are applied: additions, then removals.
#[derive(Debug, Default)]
pub struct HeaderOps {
    /// Additions.
    pub set: Box<[HeaderSet]>,
    /// Removals.
    pub remove: Box<[HeaderName]>,
}

impl HeaderOps {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.remove.is_empty()
    }
}

/// One header addition.
#[derive(Debug)]
pub struct HeaderSet {
    /// Header.
    pub name: Target,
    /// Value.
    pub value: Format,
    /// What happens to an existing one.
    pub action: AppendAction,
}

/// What a header operation writes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A header.
    Header(HeaderName),
    /// `:authority` (or `host`).
    Authority,
    /// `:path`.
    Path,
    /// `:method`.
    Method,
    /// `:scheme`.
    Scheme,
}

/// CORS of a route.
#[derive(Debug)]
pub struct Cors {
    /// Origins.
    pub origins: Box<[StringMatch]>,
    /// `access-control-allow-methods`.
    pub allow_methods: Option<HeaderValue>,
    /// `access-control-allow-headers`.
    pub allow_headers: Option<HeaderValue>,
    /// `access-control-expose-headers`.
    pub expose_headers: Option<HeaderValue>,
    /// `access-control-max-age`.
    pub max_age: Option<HeaderValue>,
    /// `access-control-allow-credentials: true`.
    pub allow_credentials: bool,
    /// Preflights that match no origin go on to the upstream.
    pub forward_not_matching_preflights: bool,
}

impl Cors {
    /// Whether an origin may.
    pub fn allows(&self, origin: &[u8]) -> bool {
        self.origins.iter().any(|o| o.matches(origin))
    }
}

/// Fault injection, as said; shares are in millionths.
pub type RouteFault = Fault;

impl Redirect {
    /// Status.
    pub fn status(&self) -> u16 {
        self.said.status
    }

    /// The `location` for a request. `matched` is the prefix that the route matched (an exact path: all of it).
    pub fn location(&self, request: &RequestView<'_>, matched: Option<&str>) -> String {
        let said = &self.said;
        let scheme = match &said.scheme {
            Some(scheme) => scheme,
            None if said.https => "https",
            None => request.scheme,
        };
        let host = self.host(request, scheme);
        let path = self.path(request.path, matched);
        let slash = if path.starts_with('/') { "" } else { "/" };
        format!("{scheme}://{host}{slash}{path}")
    }

    /// The host with the port that remains. A port that was the old scheme's default goes when the scheme changes.
    fn host(&self, request: &RequestView<'_>, scheme: &str) -> String {
        let said = &self.said;
        let (bare, port) = split_port(request.authority);
        let default_of = |scheme: &str| if scheme.eq_ignore_ascii_case("https") { "443" } else { "80" };
        let base = said.host.as_deref().unwrap_or(bare);
        if let Some(port) = said.port {
            return format!("{base}:{port}");
        }
        if said.host.is_some() {
            return base.to_owned();
        }
        match port {
            Some(port) if scheme != request.scheme && port == default_of(request.scheme) => base.to_owned(),
            Some(port) => format!("{base}:{port}"),
            None => base.to_owned(),
        }
    }

    fn path(&self, path: &str, matched: Option<&str>) -> String {
        let said = &self.said;
        let query_at = path.find('?').unwrap_or(path.len());
        let (bare, query) = path.split_at(query_at);
        let query = if said.strip_query { "" } else { query };
        if let Some(new) = &said.path {
            // A new path that has a query of its own keeps only that one.
            return if new.contains('?') { new.clone() } else { format!("{new}{query}") };
        }
        if let (Some(new), Some(matched)) = (&said.prefix, matched) {
            return format!("{new}{}{query}", bare.get(matched.len()..).unwrap_or_default());
        }
        format!("{bare}{query}")
    }
}

/// Host and port of an authority; brackets of IPv6 addresses stay with the host.
pub(super) fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rfind(':') {
        Some(at) if !authority[at..].contains(']') && authority[at + 1..].bytes().all(|b| b.is_ascii_digit()) => {
            // More than one colon without brackets is a bare IPv6 address.
            if authority[..at].contains(':') && !authority.starts_with('[') {
                return (authority, None);
            }
            (&authority[..at], Some(&authority[at + 1..]))
        }
        _ => (authority, None),
    }
}
