//! Route tables and the lookup: virtual host, then the first route that matches.

use std::sync::Arc;

use http::Method;
use http::header::{CONTENT_TYPE, HeaderValue};
use regex::bytes::Regex;

use super::action::{Action, Cors, Forward, HeaderOps, WeightedCluster};
use super::chain_match::lower;
use super::cluster::ClusterRef;
use super::matcher::{HeaderMatch, QueryMatch, query, url_path};
use super::metadata::MetadataMatch;
use super::{ByName, Name, RequestView};

/// A compiled route table.
#[derive(Debug)]
pub struct RouteTable {
    /// RDS name.
    pub name: Name,
    /// Virtual hosts, in configured order.
    pub virtual_hosts: Box<[VirtualHost]>,
    pub(super) domains: Domains,
    pub(super) ignore_port: bool,
}

/// A virtual host.
#[derive(Debug)]
pub struct VirtualHost {
    /// Name.
    pub name: Name,
    /// First match wins.
    pub routes: Box<[Route]>,
    /// x-envoy-attempt-count is sent upstream.
    pub include_attempt_count: bool,
    /// Domains, as said.
    pub domains: Box<[Box<str>]>,
}

/// A route.
#[derive(Debug)]
pub struct Route {
    /// `%ROUTE_NAME%`; may be empty.
    pub name: Name,
    pub(super) matches: RouteMatch,
    /// What it does.
    pub action: Action,
    /// Request header changes.
    pub request_headers: HeaderOps,
    /// Response header changes.
    pub response_headers: HeaderOps,
    /// `x-envoy-decorator-operation`.
    pub decorator: Option<HeaderValue>,
    /// Fault injection.
    pub fault: Option<Arc<proxy_config::model::Fault>>,
    /// CORS.
    pub cors: Option<Box<Cors>>,
    /// Istio object it comes from.
    pub config: Option<Name>,
    /// Per-filter configuration that is not done: requests get 501. Its name.
    pub unsupported: Option<Name>,
}

/// When a route applies.
#[derive(Debug)]
pub(super) struct RouteMatch {
    pub(super) path: PathRule,
    pub(super) case_sensitive: bool,
    pub(super) headers: Box<[HeaderMatch]>,
    pub(super) query: Box<[QueryMatch]>,
    pub(super) metadata: Box<[MetadataMatch]>,
    pub(super) grpc: bool,
}

/// The path of a route.
#[derive(Debug)]
pub(super) enum PathRule {
    Prefix(Box<str>),
    Exact(Box<str>),
    Regex(Box<Regex>),
    SegmentPrefix(Box<str>),
    Template(Box<Regex>),
    Connect,
}

/// Virtual hosts by domain, in Envoy's order of preference. Names are lower case.
#[derive(Debug, Default)]
pub(super) struct Domains {
    pub(super) exact: ByName<u32>,
    /// `*.suffix` without the star, longest first.
    pub(super) suffixes: Box<[(Box<str>, u32)]>,
    /// `prefix.*` without the star, longest first.
    pub(super) prefixes: Box<[(Box<str>, u32)]>,
    pub(super) any: Option<u32>,
}

/// Why no route was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoRoute {
    /// No virtual host has the request's host.
    VirtualHost,
    /// None of the virtual host's routes matches.
    Route,
}

/// A route with the cluster that the draw chose.
#[derive(Debug, Clone, Copy)]
pub struct Found<'t> {
    /// Virtual host.
    pub vhost: &'t VirtualHost,
    /// Route.
    pub route: &'t Route,
    /// The forwarding action, when it is one.
    pub forward: Option<&'t Forward>,
    /// Chosen cluster with its header changes; `None` when the route does not forward or nothing has weight.
    pub weighted: Option<&'t WeightedCluster>,
}

impl<'t> Found<'t> {
    /// The chosen cluster; resolve it with [`super::Snapshot::resolve`].
    pub fn cluster(&self) -> Option<&'t ClusterRef> {
        self.weighted.map(|w| &w.cluster)
    }
}

/// The route of a request. `draw` is uniform over `u64` and chooses among weighted clusters.
pub fn find<'t>(table: &'t RouteTable, request: &RequestView<'_>, draw: u64) -> Result<Found<'t>, NoRoute> {
    let vhost = table.virtual_host(request.authority).ok_or(NoRoute::VirtualHost)?;
    let route = vhost.routes.iter().find(|r| r.matches.holds(request)).ok_or(NoRoute::Route)?;
    let forward = match &route.action {
        Action::Forward(forward) => Some(&**forward),
        _ => None,
    };
    Ok(Found { vhost, route, forward, weighted: forward.and_then(|f| f.pick(draw)) })
}

impl RouteTable {
    /// The virtual host of an authority: the exact name, else the longest `*.suffix`, else the longest `prefix.*`, else
    /// `*`. Case plays no part, the port only where the table says so.
    pub fn virtual_host(&self, authority: &str) -> Option<&VirtualHost> {
        let host = if self.ignore_port { without_port(authority) } else { authority };
        let index = self.domains.find(&lower(host))?;
        self.virtual_hosts.get(index as usize)
    }
}

impl Domains {
    /// `host` is lower case. A wildcard stands for at least one character.
    fn find(&self, host: &str) -> Option<u32> {
        if let Some(index) = self.exact.get(host) {
            return Some(*index);
        }
        let suffix = |(suffix, _): &&(Box<str>, u32)| host.len() > suffix.len() && host.ends_with(&**suffix);
        let prefix = |(prefix, _): &&(Box<str>, u32)| host.len() > prefix.len() && host.starts_with(&**prefix);
        let wild = self.suffixes.iter().find(suffix).or_else(|| self.prefixes.iter().find(prefix));
        wild.map(|(_, index)| *index).or(self.any)
    }
}

/// Envoy cuts at the last colon, whatever stands behind it, unless it is inside the brackets of an IPv6 address.
fn without_port(authority: &str) -> &str {
    match authority.rfind(':') {
        Some(colon) if authority.rfind(']').is_none_or(|bracket| bracket < colon) => &authority[..colon],
        _ => authority,
    }
}

impl Route {
    /// What the route matched of the path: the prefix; of an exact path, a template or an expression all of it. This is
    /// what a prefix rewrite replaces. `None`: the route takes CONNECT requests.
    pub fn matched<'p>(&self, path: &'p str) -> Option<&'p str> {
        let path = url_path(path);
        match &self.matches.path {
            PathRule::Prefix(prefix) | PathRule::SegmentPrefix(prefix) => {
                Some(path.get(..prefix.len()).unwrap_or(path))
            }
            PathRule::Exact(_) | PathRule::Regex(_) | PathRule::Template(_) => Some(path),
            PathRule::Connect => None,
        }
    }

    /// How the route matches the path, for people: `prefix /api`, `exact /`, ...
    pub fn path_rule(&self) -> String {
        match &self.matches.path {
            PathRule::Prefix(text) => format!("prefix {text}"),
            PathRule::Exact(text) => format!("exact {text}"),
            PathRule::SegmentPrefix(text) => format!("path-separated prefix {text}"),
            PathRule::Regex(re) | PathRule::Template(re) => format!("regex {re}"),
            PathRule::Connect => "CONNECT".to_owned(),
        }
    }
}

impl RouteMatch {
    /// Whether the route takes the request. What is cheap comes first.
    fn holds(&self, request: &RequestView<'_>) -> bool {
        self.path_holds(request)
            && (!self.grpc || is_grpc(request))
            && self.headers.iter().all(|header| header.matches(request))
            && self.query_holds(request)
            && self.metadata.iter().all(|metadata| metadata.matches(None))
    }

    fn path_holds(&self, request: &RequestView<'_>) -> bool {
        // A CONNECT without path belongs to the routes that ask for it and to no other, not even `.*`.
        if request.method == Method::CONNECT && !request.path.starts_with('/') {
            return matches!(self.path, PathRule::Connect);
        }
        let path = url_path(request.path);
        match &self.path {
            PathRule::Prefix(prefix) => self.starts(path, prefix),
            PathRule::Exact(exact) => path.len() == exact.len() && self.starts(path, exact),
            PathRule::SegmentPrefix(prefix) => {
                self.starts(path, prefix) && matches!(path.as_bytes().get(prefix.len()), None | Some(b'/'))
            }
            PathRule::Regex(re) | PathRule::Template(re) => re.is_match(path.as_bytes()),
            PathRule::Connect => request.method == Method::CONNECT,
        }
    }

    fn starts(&self, path: &str, prefix: &str) -> bool {
        let Some(start) = path.as_bytes().get(..prefix.len()) else { return false };
        if self.case_sensitive { start == prefix.as_bytes() } else { start.eq_ignore_ascii_case(prefix.as_bytes()) }
    }

    fn query_holds(&self, request: &RequestView<'_>) -> bool {
        if self.query.is_empty() {
            return true;
        }
        let query = query(request.path);
        self.query.iter().all(|parameter| parameter.matches(query))
    }
}

/// Whether the content type is gRPC's; gRPC-Web's is not.
fn is_grpc(request: &RequestView<'_>) -> bool {
    let rest = request.headers.get(CONTENT_TYPE).and_then(|value| value.as_bytes().strip_prefix(b"application/grpc"));
    matches!(rest, Some([] | [b'+', ..]))
}
