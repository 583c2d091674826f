//! Route tables and the lookup: virtual host, then the first route that matches.

use std::sync::Arc;

use http::Method;
use http::header::{CONTENT_TYPE, HeaderValue};
use regex::bytes::Regex;

use super::action::{Action, Cors, Forward, HeaderOps, WeightedCluster};
use super::chain_match::lower;
use super::cluster::ClusterRef;
use super::matcher::{HeaderMatch, QueryMatch, query, url_path};
use super::metadata::{Metadata, MetadataMatch};
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
    /// Some route asks for what a token says.
    pub(super) asks_metadata: bool,
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
    find_knowing(table, request, None, draw)
}

/// The route of a request of which filters know more, from its tokens.
pub fn find_knowing<'t>(
    table: &'t RouteTable,
    request: &RequestView<'_>,
    metadata: Option<&Metadata>,
    draw: u64,
) -> Result<Found<'t>, NoRoute> {
    let vhost = table.virtual_host(request.authority).ok_or(NoRoute::VirtualHost)?;
    let path = url_path(request.path);
    let route = vhost.routes.iter().find(|r| r.matches.holds(request, path, metadata)).ok_or(NoRoute::Route)?;
    let forward = match &route.action {
        Action::Forward(forward) => Some(&**forward),
        _ => None,
    };
    Ok(Found { vhost, route, forward, weighted: forward.and_then(|f| f.pick(draw)) })
}

impl RouteTable {
    /// Whether some route asks for what a token says, so that it is worth looking again once that is known.
    pub fn asks_metadata(&self) -> bool {
        self.asks_metadata
    }

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
    /// Whether the route takes the request, whose path without query is `path`. What is cheap comes first.
    fn holds(&self, request: &RequestView<'_>, path: &str, metadata: Option<&Metadata>) -> bool {
        self.path_holds(request, path)
            && (!self.grpc || is_grpc(request))
            && self.headers.iter().all(|header| header.matches(request))
            && self.query_holds(request)
            && self.metadata.iter().all(|wanted| wanted.matches(metadata))
    }

    fn path_holds(&self, request: &RequestView<'_>, path: &str) -> bool {
        // A CONNECT without path belongs to the routes that ask for it and to no other, not even `.*`.
        if request.method == Method::CONNECT && !request.path.starts_with('/') {
            return matches!(self.path, PathRule::Connect);
        }
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

#[cfg(test)]
mod tests {
    use http::HeaderMap;
    use proxy_config::model::{self, PathMatch};

    use super::super::cluster::Ids;
    use super::super::compile::Sink;
    use super::super::route_compile;
    use super::*;

    fn table(said: &model::RouteTable) -> RouteTable {
        let (names, mut rejects) = (ByName::default(), Vec::new());
        let table = route_compile::table(said, &Ids(&names), &mut Sink::new(&mut rejects, "test"));
        assert_eq!(rejects, []);
        table
    }

    fn vhosts(domains: &[(&str, &[&str])], ignore_port: bool) -> RouteTable {
        let vhost = |(name, domains): &(&str, &[&str])| model::VirtualHost {
            name: (*name).into(),
            domains: domains.iter().map(|d| (*d).to_owned()).collect(),
            ..model::VirtualHost::default()
        };
        table(&model::RouteTable {
            virtual_hosts: domains.iter().map(vhost).collect(),
            ignore_port_in_host_matching: ignore_port,
            ..model::RouteTable::default()
        })
    }

    #[test]
    fn virtual_hosts_in_order_of_preference() {
        let all: &[(&str, &[&str])] = &[
            ("any", &["*"]),
            ("com", &["*.com"]),
            ("example", &["*.example.com", "*-x.example.com"]),
            ("exact", &["Web.example.com", "[::1]"]),
            ("prefix", &["web.*", "w*"]),
        ];
        let with_port = vhosts(all, false);
        let without_port = vhosts(all, true);
        for (authority, kept, ignored) in [
            ("web.example.com", "exact", "exact"),
            ("WEB.Example.com", "exact", "exact"),
            ("web.example.com:8080", "prefix", "exact"),
            ("a.example.com", "example", "example"),
            ("a-x.example.com", "example", "example"),
            (".example.com", "com", "com"),
            ("example.com", "com", "com"),
            ("web.", "prefix", "prefix"),
            ("w", "any", "any"),
            ("web.org", "prefix", "prefix"),
            ("", "any", "any"),
            ("[::1]:80", "any", "exact"),
            ("[::1]", "exact", "exact"),
        ] {
            assert_eq!(&*with_port.virtual_host(authority).unwrap().name, kept, "{authority}");
            assert_eq!(&*without_port.virtual_host(authority).unwrap().name, ignored, "{authority} without port");
        }
        assert!(vhosts(&[("a", &["a"])], true).virtual_host("b").is_none());
    }

    pub(super) fn route(matches: model::RouteMatch) -> model::Route {
        model::Route {
            name: "".into(),
            matches,
            action: model::RouteAction::Direct { status: 200, body: Vec::new() },
            request_headers: model::HeaderOps::default(),
            response_headers: model::HeaderOps::default(),
            decorator: None,
            fault: None,
            cors: None,
            config: None,
            stat_prefix: String::new(),
            unsupported: Vec::new(),
        }
    }

    fn on(path: PathMatch) -> model::RouteMatch {
        model::RouteMatch {
            path,
            case_sensitive: true,
            headers: Vec::new(),
            query: Vec::new(),
            dynamic_metadata: Vec::new(),
            grpc: false,
        }
    }

    fn takes(matches: model::RouteMatch, method: &Method, path: &str, headers: &[(&'static str, &str)]) -> bool {
        let vhost = model::VirtualHost {
            domains: vec!["*".into()],
            routes: vec![route(matches)],
            ..model::VirtualHost::default()
        };
        let table = table(&model::RouteTable { virtual_hosts: vec![vhost], ..model::RouteTable::default() });
        let headers: HeaderMap = headers.iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).collect();
        let request = RequestView { method, scheme: "http", authority: "h", path, headers: &headers };
        match find(&table, &request, 0) {
            Ok(_) => true,
            Err(NoRoute::Route) => false,
            Err(NoRoute::VirtualHost) => panic!("* takes every host"),
        }
    }

    #[test]
    fn paths() {
        let folded = |path| model::RouteMatch { case_sensitive: false, ..on(path) };
        let (prefix, exact) = (|t: &str| PathMatch::Prefix(t.into()), |t: &str| PathMatch::Exact(t.into()));
        let segments = |t: &str| PathMatch::PathSeparatedPrefix(t.into());
        let regex = |t: &str| PathMatch::Regex(t.into());
        for (matches, path, expected) in [
            (on(prefix("/foo")), "/foobar", true),
            (on(prefix("/foo")), "/fo", false),
            (on(prefix("/foo?x")), "/foo?x", false),
            (on(prefix("/foo")), "/FOO", false),
            (folded(prefix("/foo")), "/FOOd", true),
            (on(exact("/foo")), "/foo?q=1", true),
            (on(exact("/foo")), "/foo/", false),
            (folded(exact("/Foo")), "/fOO#x", true),
            (on(segments("/foo")), "/foo", true),
            (on(segments("/foo")), "/foo/bar", true),
            (on(segments("/foo")), "/foobar", false),
            (folded(segments("/foo")), "/FOO/bar", true),
            (on(regex("/a.*b")), "/axxb?c", true),
            (on(regex("/a.*b")), "/axxbc", false),
            (folded(regex("/a")), "/A", false),
            (on(PathMatch::Template("/u/{id}/x".into())), "/u/1/x", true),
            (on(PathMatch::Template("/u/{id}/x".into())), "/u/1/2/x", false),
            (on(PathMatch::Connect), "/", false),
            (on(prefix("/\u{e4}")), "/\u{e4}x", true),
            (on(prefix("/x\u{e4}")), "/x", false),
        ] {
            assert_eq!(takes(matches.clone(), &Method::GET, path, &[]), expected, "{:?} {path}", matches.path);
        }
    }

    #[test]
    fn connect() {
        assert!(takes(on(PathMatch::Connect), &Method::CONNECT, "", &[]));
        assert!(takes(on(PathMatch::Connect), &Method::CONNECT, "/p", &[]));
        assert!(!takes(on(PathMatch::Prefix(String::new())), &Method::CONNECT, "", &[]));
        assert!(!takes(on(PathMatch::Regex(".*".into())), &Method::CONNECT, "h:1", &[]));
    }

    #[test]
    fn everything_must_hold() {
        let said = model::RouteMatch {
            headers: vec![model::HeaderMatcher {
                name: "x".into(),
                value: model::HeaderValueMatch::String(model::StringMatcher::exact("1")),
                invert: false,
                treat_missing_as_empty: false,
            }],
            query: vec![model::QueryMatcher { name: "q".into(), value: None, present: None }],
            grpc: true,
            ..on(PathMatch::Prefix("/".into()))
        };
        let all = [("x", "1"), ("content-type", "application/grpc+proto")];
        assert!(takes(said.clone(), &Method::POST, "/?q", &all));
        assert!(!takes(said.clone(), &Method::POST, "/", &all));
        assert!(!takes(said.clone(), &Method::POST, "/?q", &all[1..]));
        assert!(!takes(said.clone(), &Method::POST, "/?q", &all[..1]));
        assert!(!takes(said, &Method::POST, "/?q", &[("x", "1"), ("content-type", "application/grpc-web")]));
    }

    #[test]
    fn what_was_matched() {
        let one = |path| {
            let vhost = model::VirtualHost { routes: vec![route(on(path))], ..model::VirtualHost::default() };
            table(&model::RouteTable { virtual_hosts: vec![vhost], ..model::RouteTable::default() })
        };
        let prefix = one(PathMatch::Prefix("/a".into()));
        assert_eq!(prefix.virtual_hosts[0].routes[0].matched("/abc?d"), Some("/a"));
        let exact = one(PathMatch::Exact("/abc".into()));
        assert_eq!(exact.virtual_hosts[0].routes[0].matched("/abc?d"), Some("/abc"));
        assert_eq!(one(PathMatch::Connect).virtual_hosts[0].routes[0].matched("/"), None);
    }
}
