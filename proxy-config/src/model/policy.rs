//! RBAC and JWT as Envoy's filters hold them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use super::{HeaderMatcher, Name, StringMatcher};

/// `envoy.filters.{http,network}.rbac`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Rbac {
    /// Enforced rules; `None` lets everything pass.
    pub rules: Option<RbacRules>,
    /// Rules that are only evaluated (dry run, CUSTOM).
    pub shadow_rules: Option<RbacRules>,
    /// Prefix of shadow results.
    pub shadow_rules_stat_prefix: String,
    /// Statistics prefix (TCP).
    pub stat_prefix: String,
}

/// `envoy.config.rbac.v3.RBAC`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RbacRules {
    /// What a match means.
    pub action: RbacAction,
    /// By name (`ns[NS]-policy[NAME]-rule[i]`); looked at in name order.
    pub policies: BTreeMap<Name, RbacPolicy>,
}

/// What a match means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub enum RbacAction {
    /// A match allows, no match denies.
    #[default]
    Allow,
    /// A match denies.
    Deny,
    /// A match is only noted.
    Log,
}

/// One policy: any permission and any principal.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RbacPolicy {
    /// Any must hold.
    pub permissions: Vec<Permission>,
    /// Any must hold.
    pub principals: Vec<Principal>,
}

/// `envoy.config.rbac.v3.Permission`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Permission {
    /// Always.
    Any,
    /// All.
    And(Vec<Self>),
    /// One of.
    Or(Vec<Self>),
    /// Opposite.
    Not(Box<Self>),
    /// A header or pseudo-header.
    Header(HeaderMatcher),
    /// Path without query and fragment.
    UrlPath(StringMatcher),
    /// Istio path template (`{*}`, `{**}`).
    UriTemplate(String),
    /// Destination address.
    DestinationIp(IpNet),
    /// Destination port.
    DestinationPort(u16),
    /// SNI.
    ServerName(StringMatcher),
    /// Dynamic metadata.
    Metadata(MetadataMatcher),
}

/// `envoy.config.rbac.v3.Principal`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum Principal {
    /// Always.
    Any,
    /// All.
    And(Vec<Self>),
    /// One of.
    Or(Vec<Self>),
    /// Opposite.
    Not(Box<Self>),
    /// Peer identity; `None` is any authenticated peer.
    Authenticated(Option<StringMatcher>),
    /// Connection's peer address.
    DirectRemoteIp(IpNet),
    /// Peer address after x-forwarded-for.
    RemoteIp(IpNet),
    /// A header.
    Header(HeaderMatcher),
    /// Path without query.
    UrlPath(StringMatcher),
    /// Dynamic metadata (JWT).
    Metadata(MetadataMatcher),
    /// Filter state (`io.istio.peer_principal`).
    FilterState(String, StringMatcher),
}

/// A condition on dynamic metadata.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MetadataMatcher {
    /// Filter name (`envoy.filters.http.jwt_authn`).
    pub filter: String,
    /// Keys to descend.
    pub path: Vec<String>,
    /// Value.
    pub value: ValueMatcher,
    /// Negated.
    pub invert: bool,
}

/// `ValueMatcher`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum ValueMatcher {
    /// Null.
    Null,
    /// A string.
    String(StringMatcher),
    /// A boolean.
    Bool(bool),
    /// There (`true`) or not.
    Present(bool),
    /// A list with one element that matches.
    ListOneOf(Box<Self>),
    /// One of several.
    Or(Vec<Self>),
    /// A number.
    Double(f64),
}

/// `envoy.filters.http.jwt_authn` as istiod sends it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct JwtAuthn {
    /// By name (`origins-0`).
    pub providers: BTreeMap<String, JwtProvider>,
    /// What is required of which path prefix.
    pub rules: Vec<(String, JwtRequirement)>,
    /// CORS preflights pass.
    pub bypass_cors_preflight: bool,
}

/// `JwtProvider`.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct JwtProvider {
    /// `iss`.
    pub issuer: String,
    /// Accepted audiences; empty accepts any.
    pub audiences: Vec<String>,
    /// Keys.
    pub jwks: JwksSource,
    /// The token stays in the request.
    pub forward: bool,
    /// Header that carries the payload.
    pub forward_payload_header: String,
    /// Header and prefix to look in.
    pub from_headers: Vec<(String, String)>,
    /// Query parameters to look in.
    pub from_params: Vec<String>,
    /// Cookies to look in.
    pub from_cookies: Vec<String>,
    /// Metadata key of the payload.
    pub payload_in_metadata: String,
    /// Claims that are split at spaces.
    pub space_delimited_claims: Vec<String>,
    /// Header and claim.
    pub claim_to_headers: Vec<(String, String)>,
    /// Allowed clock difference.
    pub clock_skew: Option<Duration>,
}

/// Where keys come from.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[allow(missing_docs, reason = "a variant's line tells its fields")]
pub enum JwksSource {
    /// None given: nothing verifies.
    #[default]
    None,
    /// JSON text.
    Inline(String),
    /// URI, the cluster that leads there (empty: straight), limit on one fetch, how long the answer is good, and what was
    /// fetched last: nobody says that, the control loop fills it in.
    Remote {
        uri: String,
        cluster: Name,
        timeout: Option<Duration>,
        cache: Option<Duration>,
        #[serde(skip_serializing_if = "Option::is_none")]
        keys: Option<Arc<str>>,
    },
}

/// `JwtRequirement`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub enum JwtRequirement {
    /// This provider.
    Provider(String),
    /// This provider, with audiences of its own.
    ProviderAndAudiences(String, Vec<String>),
    /// Any of.
    Any(Vec<Self>),
    /// All of.
    All(Vec<Self>),
    /// No token is fine, a bad one is not.
    AllowMissing,
    /// Anything is fine.
    AllowMissingOrFailed,
}
