//! What is compiled decides as the model says, read naively.
#![cfg(test)]

use std::sync::Arc;

use ipnet::IpNet;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use proxy_config::model::{
    self, ChainMatch, HeaderMatcher, HeaderValueMatch, MetadataMatcher, PathMatch, Permission, Principal, QueryMatcher,
    RbacAction, RbacPolicy, RbacRules, SourceType, StringMatcher, StringPattern, TransportProtocol, ValueMatcher,
};

use super::chain_match::ChainMatcher;
use super::cluster::Ids;
use super::compile::Sink;
use super::*;

// ---- values: few, so that they meet ----

fn words() -> impl Strategy<Value = String> {
    select(vec!["", "a", "A", "ab", "b", "/a", "/a/b", "/ab", "/A/b/", "a.b", "/", "/ns/a/"]).prop_map(str::to_owned)
}

fn string_matcher() -> impl Strategy<Value = StringMatcher> {
    let pattern = (0..5, words()).prop_map(|(kind, text)| match kind {
        0 => StringPattern::Exact(text),
        1 => StringPattern::Prefix(text),
        2 => StringPattern::Suffix(text),
        3 => StringPattern::Contains(text),
        _ => StringPattern::Regex(format!(".*{}.*", text.replace('.', r"\."))),
    });
    (pattern, any::<bool>()).prop_map(|(pattern, fold)| {
        let ignore_case = fold && !matches!(pattern, StringPattern::Regex(_));
        StringMatcher { pattern, ignore_case }
    })
}

fn header_matcher() -> impl Strategy<Value = HeaderMatcher> {
    let value = prop_oneof![
        any::<bool>().prop_map(HeaderValueMatch::Present),
        string_matcher().prop_map(HeaderValueMatch::String),
        (-1_i64..3, 0_i64..4).prop_map(|(a, b)| HeaderValueMatch::Range(a, b)),
    ];
    let name = select(vec!["x", "y", ":method", ":authority", ":path"]).prop_map(str::to_owned);
    (name, value, any::<bool>(), any::<bool>()).prop_map(|(name, value, invert, treat_missing_as_empty)| {
        HeaderMatcher { name, value, invert, treat_missing_as_empty }
    })
}

#[derive(Debug, Clone)]
struct Req {
    method: Method,
    authority: String,
    path: String,
    headers: Vec<(&'static str, String)>,
}

impl Req {
    fn map(&self) -> HeaderMap {
        self.headers.iter().map(|(n, v)| (n.parse().unwrap(), v.parse().unwrap())).fold(
            HeaderMap::new(),
            |mut map, (n, v): (http::HeaderName, http::HeaderValue)| {
                map.append(n, v);
                map
            },
        )
    }

    fn path_and_query(&self) -> (&str, &str) {
        let path = self.path.split('#').next().unwrap();
        path.split_once('?').unwrap_or((path, ""))
    }
}

fn request() -> impl Strategy<Value = Req> {
    let value = prop_oneof![words(), select(vec!["0", "1", "-1", "2"]).prop_map(str::to_owned)];
    let header = (select(vec!["x", "y", "content-type"]), value);
    let host = select(vec!["a.b", "A.b:80", "x.a.b", "a.x", "c", "", "x.c.b:1"]).prop_map(str::to_owned);
    let query = select(vec!["", "?q", "?q=a", "?p=1&q=A", "?q=a&q=b#?q", "#q=a"]);
    let path = (select(vec!["/", "/a", "/a/b", "/ab", "/A/b/"]), query).prop_map(|(p, q)| format!("{p}{q}"));
    (select(vec![Method::GET, Method::POST]), host, path, vec(header, 0..4))
        .prop_map(|(method, authority, path, headers)| Req { method, authority, path, headers })
}

// ---- the model, read naively ----

fn string_holds(said: &StringMatcher, value: &str) -> bool {
    let fold = |s: &str| if said.ignore_case { s.to_lowercase() } else { s.to_owned() };
    let value = fold(value);
    match &said.pattern {
        StringPattern::Exact(t) => value == fold(t),
        StringPattern::Prefix(t) => value.starts_with(&fold(t)),
        StringPattern::Suffix(t) => value.ends_with(&fold(t)),
        StringPattern::Contains(t) => value.contains(&fold(t)),
        // The only expressions that are made here.
        StringPattern::Regex(t) => value.contains(&t[2..t.len() - 2].replace('\\', "")),
    }
}

fn header_holds(said: &HeaderMatcher, request: &Req) -> bool {
    let mut lines: Vec<&str> = match &*said.name {
        ":method" => vec![request.method.as_str()],
        ":authority" => vec![&request.authority],
        ":path" => vec![&request.path],
        name => request.headers.iter().filter(|(n, _)| *n == name).map(|(_, v)| &**v).collect(),
    };
    if let HeaderValueMatch::Present(wanted) = said.value {
        return (lines.is_empty() != wanted) != said.invert;
    }
    if lines.is_empty() && said.treat_missing_as_empty {
        lines.push("");
    }
    let one = |line: &&str| match &said.value {
        HeaderValueMatch::String(text) => string_holds(text, line),
        HeaderValueMatch::Range(a, b) => line.parse::<i64>().is_ok_and(|n| (*a..*b).contains(&n)),
        HeaderValueMatch::Present(_) => unreachable!(),
    };
    !lines.is_empty() && lines.iter().any(one) != said.invert
}

fn query_holds(said: &QueryMatcher, query: &str) -> bool {
    let first = query.split('&').map(|p| p.split_once('=').unwrap_or((p, ""))).find(|(name, _)| *name == said.name);
    match (&said.value, first) {
        (Some(value), first) => first.is_some_and(|(_, v)| string_holds(value, v)),
        (None, first) => first.is_some() == said.present.unwrap_or(true),
    }
}

fn route_holds(said: &model::RouteMatch, request: &Req) -> bool {
    let (path, query) = request.path_and_query();
    let fold = |s: &str| if said.case_sensitive { s.to_owned() } else { s.to_lowercase() };
    let by_path = match &said.path {
        PathMatch::Prefix(t) => fold(path).starts_with(&fold(t)),
        PathMatch::Exact(t) => fold(path) == fold(t),
        PathMatch::PathSeparatedPrefix(t) => fold(path) == fold(t) || fold(path).starts_with(&(fold(t) + "/")),
        PathMatch::Regex(t) => {
            let text = t.trim_end_matches("(/.*)?");
            path == text || path.starts_with(&format!("{text}/"))
        }
        PathMatch::Template(_) | PathMatch::Connect => false,
    };
    by_path
        && said.headers.iter().all(|h| header_holds(h, request))
        && said.query.iter().all(|q| query_holds(q, query))
        && !said.grpc
}

/// The rank of a virtual host for a host; greater is better.
fn domain_rank(domain: &str, host: &str) -> Option<(u8, usize)> {
    let domain = domain.to_lowercase();
    if domain == "*" {
        return Some((0, 0));
    }
    if let Some(suffix) = domain.strip_prefix('*') {
        return (host.ends_with(suffix) && host.len() > suffix.len()).then_some((2, suffix.len()));
    }
    if let Some(prefix) = domain.strip_suffix('*') {
        return (host.starts_with(prefix) && host.len() > prefix.len()).then_some((1, prefix.len()));
    }
    (domain == host).then_some((3, 0))
}

fn naive_route(said: &model::RouteTable, request: &Req) -> Result<(String, String), NoRoute> {
    let mut host = request.authority.to_lowercase();
    if said.ignore_port_in_host_matching
        && let Some(colon) = host.rfind(':')
    {
        host.truncate(colon);
    }
    let ranked = said
        .virtual_hosts
        .iter()
        .filter_map(|v| v.domains.iter().filter_map(|d| domain_rank(d, &host)).max().map(|rank| (rank, v)));
    let best = ranked.fold(None, |best: Option<((u8, usize), &model::VirtualHost)>, (rank, v)| match best {
        Some((other, _)) if other >= rank => best,
        _ => Some((rank, v)),
    });
    let (_, vhost) = best.ok_or(NoRoute::VirtualHost)?;
    let route = vhost.routes.iter().find(|r| route_holds(&r.matches, request)).ok_or(NoRoute::Route)?;
    Ok((vhost.name.to_string(), route.name.to_string()))
}

// ---- routes ----

fn route_match() -> impl Strategy<Value = model::RouteMatch> {
    let path = (0..4, select(vec!["/", "/a", "/A", "/a/b", ""])).prop_map(|(kind, text)| match kind {
        0 => PathMatch::Prefix(text.to_owned()),
        1 => PathMatch::Exact(text.to_owned()),
        2 => PathMatch::PathSeparatedPrefix(text.to_owned()),
        _ => PathMatch::Regex(format!("{text}(/.*)?")),
    });
    let value = option::of(string_matcher());
    let query = (select(vec!["q", "p"]), value, option::of(any::<bool>())).prop_map(|(name, value, present)| {
        QueryMatcher { name: name.to_owned(), present: present.filter(|_| value.is_none()), value }
    });
    (path, any::<bool>(), vec(header_matcher(), 0..2), vec(query, 0..2), prop::bool::weighted(0.1)).prop_map(
        |(path, case_sensitive, headers, query, grpc)| model::RouteMatch {
            path,
            case_sensitive,
            headers,
            query,
            dynamic_metadata: Vec::new(),
            grpc,
        },
    )
}

fn route_table() -> impl Strategy<Value = model::RouteTable> {
    let domains = vec!["*", "a.b", "A.B:80", "*.b", "*.a.b", "a.*", "*b", "a*", "x.*", "c"];
    let count = domains.len();
    (Just(domains).prop_shuffle(), 0..=count, vec(vec(route_match(), 0..4), count), any::<bool>()).prop_map(
        |(domains, used, mut routes, ignore_port)| model::RouteTable {
            virtual_hosts: domains[..used]
                .chunks(2)
                .enumerate()
                .map(|(i, domains)| model::VirtualHost {
                    name: format!("v{i}").into(),
                    domains: domains.iter().map(|d| (*d).to_owned()).collect(),
                    routes: std::mem::take(&mut routes[i]).into_iter().enumerate().map(direct).collect(),
                    include_request_attempt_count: false,
                })
                .collect(),
            ignore_port_in_host_matching: ignore_port,
            ..model::RouteTable::default()
        },
    )
}

fn direct((index, matches): (usize, model::RouteMatch)) -> model::Route {
    model::Route {
        name: format!("r{index}").into(),
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

// ---- policies ----

fn network() -> impl Strategy<Value = IpNet> {
    select(vec!["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "0.0.0.0/0", "::/0", "fd00::/8"])
        .prop_map(|net| net.parse().unwrap())
}

fn metadata_matcher() -> impl Strategy<Value = MetadataMatcher> {
    let leaf = prop_oneof![
        string_matcher().prop_map(ValueMatcher::String),
        any::<bool>().prop_map(ValueMatcher::Present),
        Just(ValueMatcher::Null),
    ];
    let value = leaf.prop_recursive(2, 6, 3, |inner| {
        prop_oneof![
            inner.clone().prop_map(|v| ValueMatcher::ListOneOf(Box::new(v))),
            vec(inner, 0..3).prop_map(ValueMatcher::Or),
        ]
    });
    (select(vec!["iss", "aud", "none"]), value, any::<bool>()).prop_map(|(key, value, invert)| MetadataMatcher {
        filter: "jwt".into(),
        path: vec!["payload".into(), key.into()],
        value,
        invert,
    })
}

fn permission() -> impl Strategy<Value = Permission> {
    let leaf = prop_oneof![
        Just(Permission::Any),
        header_matcher().prop_map(Permission::Header),
        string_matcher().prop_map(Permission::UrlPath),
        network().prop_map(Permission::DestinationIp),
        (79_u16..82).prop_map(Permission::DestinationPort),
        string_matcher().prop_map(Permission::ServerName),
        metadata_matcher().prop_map(Permission::Metadata),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..3).prop_map(Permission::And),
            vec(inner.clone(), 0..3).prop_map(Permission::Or),
            inner.prop_map(|p| Permission::Not(Box::new(p))),
        ]
    })
}

fn principal() -> impl Strategy<Value = Principal> {
    let leaf = prop_oneof![
        Just(Principal::Any),
        option::of(string_matcher()).prop_map(Principal::Authenticated),
        network().prop_map(Principal::DirectRemoteIp),
        network().prop_map(Principal::RemoteIp),
        header_matcher().prop_map(Principal::Header),
        string_matcher().prop_map(Principal::UrlPath),
        metadata_matcher().prop_map(Principal::Metadata),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..3).prop_map(Principal::And),
            vec(inner.clone(), 0..3).prop_map(Principal::Or),
            inner.prop_map(|p| Principal::Not(Box::new(p))),
        ]
    })
}

fn rbac_rules() -> impl Strategy<Value = RbacRules> {
    let policy = (vec(permission(), 0..3), vec(principal(), 0..3))
        .prop_map(|(permissions, principals)| RbacPolicy { permissions, principals });
    let action = select(vec![RbacAction::Allow, RbacAction::Deny, RbacAction::Log]);
    let name = select(vec!["p0", "p1", "a"]).prop_map(Name::from);
    (action, btree_map(name, policy, 0..3)).prop_map(|(action, policies)| RbacRules { action, policies })
}

/// Everything that policy may ask about, owned.
#[derive(Debug, Clone)]
struct World {
    request: Option<Req>,
    sans: Option<Vec<String>>,
    direct: SocketAddr,
    remote: IpAddr,
    destination: SocketAddr,
    sni: Option<String>,
    token: bool,
}

fn address() -> impl Strategy<Value = IpAddr> {
    select(vec!["10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.1", "fd00::1", "2001::1"]).prop_map(|a| a.parse().unwrap())
}

fn world() -> impl Strategy<Value = World> {
    let peer = option::of(vec(words(), 1..3));
    let place = || (address(), 79_u16..82).prop_map(|(ip, port)| SocketAddr::new(ip, port));
    (option::of(request()), peer, place(), address(), place(), option::of(words()), any::<bool>()).prop_map(
        |(request, sans, direct, remote, destination, sni, token)| World {
            request,
            sans,
            direct,
            remote,
            destination,
            sni,
            token,
        },
    )
}

fn token() -> serde_json::Value {
    serde_json::json!({"jwt": {"payload": {"iss": "a", "aud": ["ab", "/a"]}}})
}

impl World {
    fn header(&self, said: &HeaderMatcher) -> bool {
        let nothing = Req { method: Method::GET, authority: String::new(), path: String::new(), headers: Vec::new() };
        match &self.request {
            Some(request) => header_holds(said, request),
            // Even pseudo-headers are absent on a connection.
            None => header_holds(&HeaderMatcher { name: "absent".into(), ..said.clone() }, &nothing),
        }
    }

    fn path(&self, said: &StringMatcher) -> bool {
        self.request.as_ref().is_some_and(|request| string_holds(said, request.path_and_query().0))
    }

    fn metadata(&self, said: &MetadataMatcher) -> bool {
        let token = token();
        let value = self.token.then(|| token["jwt"]["payload"].get(&said.path[1])).flatten();
        value_holds(&said.value, value) != said.invert
    }

    fn permits(&self, said: &Permission) -> bool {
        match said {
            Permission::Any => true,
            Permission::And(of) => of.iter().all(|p| self.permits(p)),
            Permission::Or(of) => of.iter().any(|p| self.permits(p)),
            Permission::Not(of) => !self.permits(of),
            Permission::Header(header) => self.header(header),
            Permission::UrlPath(text) => self.path(text),
            Permission::UriTemplate(_) => unreachable!(),
            Permission::DestinationIp(net) => net.contains(&self.destination.ip()),
            Permission::DestinationPort(port) => self.destination.port() == *port,
            Permission::ServerName(text) => string_holds(text, &self.sni.clone().unwrap_or_default().to_lowercase()),
            Permission::Metadata(metadata) => self.metadata(metadata),
        }
    }

    fn is(&self, said: &Principal) -> bool {
        match said {
            Principal::Any => true,
            Principal::And(of) => of.iter().all(|p| self.is(p)),
            Principal::Or(of) => of.iter().any(|p| self.is(p)),
            Principal::Not(of) => !self.is(of),
            Principal::Authenticated(None) => self.sans.is_some(),
            Principal::Authenticated(Some(name)) => self.sans.iter().flatten().any(|san| string_holds(name, san)),
            Principal::DirectRemoteIp(net) => net.contains(&self.direct.ip()),
            Principal::RemoteIp(net) => net.contains(&self.remote),
            Principal::Header(header) => self.header(header),
            Principal::UrlPath(text) => self.path(text),
            Principal::Metadata(metadata) => self.metadata(metadata),
            Principal::FilterState(..) => unreachable!(),
        }
    }

    fn judge<'r>(&self, rules: &'r RbacRules) -> (bool, Option<&'r Name>) {
        let mut names: Vec<&Name> = rules.policies.keys().collect();
        names.sort();
        let matched = names.into_iter().find(|name| {
            let policy = &rules.policies[*name];
            policy.permissions.iter().any(|p| self.permits(p)) && policy.principals.iter().any(|p| self.is(p))
        });
        let allowed = match rules.action {
            RbacAction::Allow => matched.is_some(),
            RbacAction::Deny => matched.is_none(),
            RbacAction::Log => true,
        };
        (allowed, matched)
    }
}

fn value_holds(said: &ValueMatcher, value: Option<&serde_json::Value>) -> bool {
    match (said, value) {
        (ValueMatcher::Present(wanted), value) => value.is_some() == *wanted,
        (ValueMatcher::String(text), Some(serde_json::Value::String(v))) => string_holds(text, v),
        (ValueMatcher::ListOneOf(one), Some(serde_json::Value::Array(list))) => {
            list.iter().any(|v| value_holds(one, Some(v)))
        }
        (ValueMatcher::Or(of), value) => of.iter().any(|one| value_holds(one, value)),
        _ => false,
    }
}

// ---- filter chains ----

/// Nothing most of the time: chains that ask for everything are met by nobody.
fn seldom<T: Clone + std::fmt::Debug + 'static>(of: Vec<T>) -> impl Strategy<Value = Vec<T>> {
    prop_oneof![3 => Just(Vec::new()), 1 => subsequence(of, 1..3)]
}

fn seldom_networks() -> impl Strategy<Value = Vec<IpNet>> {
    seldom(vec!["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "0.0.0.0/0", "fd00::/8"])
        .prop_map(|list| list.into_iter().map(|net| net.parse().unwrap()).collect())
}

fn seldom_texts(of: Vec<&'static str>) -> impl Strategy<Value = Vec<String>> {
    seldom(of).prop_map(|list| list.into_iter().map(str::to_owned).collect())
}

fn chain_match() -> impl Strategy<Value = ChainMatch> {
    let transport = option::weighted(0.3, select(vec![TransportProtocol::RawBuffer, TransportProtocol::Tls]));
    let kinds = [SourceType::Any, SourceType::Any, SourceType::Any, SourceType::SameIpOrLoopback, SourceType::External];
    let sources = (seldom_networks(), select(kinds.to_vec()), seldom_networks(), seldom(vec![79_u16, 80]));
    (
        option::weighted(0.3, 79_u16..82),
        prop_oneof![1 => seldom_networks(), 1 => vec(network(), 1..2)],
        seldom_texts(vec!["a.b", "x.a.b", "*.b", "*.a.b", "c"]),
        transport,
        seldom_texts(vec!["h2", "istio", "http/1.1"]),
        sources,
    )
        .prop_map(|(port, dst, names, transport, alpn, (direct, kind, src, ports))| ChainMatch {
            destination_port: port,
            prefix_ranges: dst,
            server_names: names,
            transport_protocol: transport,
            application_protocols: alpn,
            direct_source_prefix_ranges: direct,
            source_type: kind,
            source_prefix_ranges: src,
            source_ports: ports,
        })
}

/// Keeps the chains with the best value of one criterion, as a trie does; `rank` is the best rank of a chain's values.
fn narrow<'m, R: Ord>(left: &mut Vec<(usize, &'m ChainMatch)>, rank: impl Fn(&'m ChainMatch) -> Vec<Option<R>>) {
    let best = left.iter().flat_map(|(_, m)| rank(m)).flatten().max();
    left.retain(|(_, m)| best.is_some() && rank(m).contains(&best));
}

fn ranks<T, R>(values: &[T], unset: R, rank: impl Fn(&T) -> Option<R>) -> Vec<Option<R>> {
    if values.is_empty() { vec![Some(unset)] } else { values.iter().map(rank).collect() }
}

fn net_ranks(values: &[IpNet], ip: IpAddr) -> Vec<Option<u8>> {
    ranks(values, 0, |net| net.contains(&ip).then(|| net.prefix_len()))
}

fn naive_chain(all: &[ChainMatch], input: &ChainInput<'_>) -> Option<usize> {
    let mut left: Vec<(usize, &ChainMatch)> = all.iter().enumerate().collect();
    narrow(&mut left, |m| vec![m.destination_port.map_or(Some(0), |p| (p == input.dst.port()).then_some(1))]);
    narrow(&mut left, |m| net_ranks(&m.prefix_ranges, input.dst.ip()));
    let sni = input.sni.unwrap_or_default();
    narrow(&mut left, |m| {
        ranks(&m.server_names, 0, |name| match name.strip_prefix('*') {
            Some(suffix) => (sni.len() > suffix.len() && sni.ends_with(suffix)).then_some(suffix.len()),
            None => (name == sni).then_some(usize::MAX),
        })
    });
    narrow(&mut left, |m| vec![m.transport_protocol.map_or(Some(0), |t| (t == input.transport).then_some(1))]);
    narrow(&mut left, |m| {
        ranks(&m.application_protocols, 0, |p| input.alpn.iter().position(|o| o == p).map(|at| usize::MAX - at))
    });
    narrow(&mut left, |m| net_ranks(&m.direct_source_prefix_ranges, input.src.ip()));
    let local = input.src.ip() == input.dst.ip() || input.src.ip().is_loopback();
    narrow(&mut left, |m| match m.source_type {
        SourceType::Any => vec![Some(0)],
        SourceType::SameIpOrLoopback => vec![local.then_some(1)],
        SourceType::External => vec![(!local).then_some(1)],
    });
    narrow(&mut left, |m| net_ranks(&m.source_prefix_ranges, input.src.ip()));
    narrow(&mut left, |m| ranks(&m.source_ports, 0, |p| (*p == input.src.port()).then_some(1)));
    left.first().map(|(index, _)| *index)
}

type Arrival = (SocketAddr, SocketAddr, Option<&'static str>, bool, Vec<String>);

fn arrival() -> impl Strategy<Value = Arrival> {
    let place = |ip: BoxedStrategy<IpAddr>| (ip, 79_u16..82).prop_map(|(ip, port)| SocketAddr::new(ip, port));
    let source = prop_oneof![5 => address(), 1 => Just(IpAddr::V4(Ipv4Addr::LOCALHOST))];
    let sni = option::of(select(vec!["a.b", "x.a.b", "y.a.b", "b", "x.b", "c"]));
    let alpn = Just(vec!["h2".to_owned(), "istio".to_owned(), "http/1.1".to_owned()]).prop_shuffle();
    let offered = (alpn, 0_usize..4).prop_map(|(mut all, count)| {
        all.truncate(count);
        all
    });
    (place(address().boxed()), place(source.boxed()), sni, any::<bool>(), offered)
}

fn chain(index: usize) -> Arc<Chain> {
    Arc::new(Chain {
        name: index.to_string().into(),
        tls: None,
        l4: Box::default(),
        terminal: Terminal::Refuse("test".into()),
        unusable: None,
        handshake_timeout: None,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn routes(said in route_table(), requests in vec(request(), 8)) {
        let (names, mut rejects) = (ByName::default(), Vec::new());
        let table = route_compile::table(&said, &Ids(&names), &mut Sink::new(&mut rejects, "test"));
        prop_assert_eq!(&rejects, &[]);
        for said_request in &requests {
            let headers = said_request.map();
            let request = RequestView {
                method: &said_request.method,
                scheme: "http",
                authority: &said_request.authority,
                path: &said_request.path,
                headers: &headers,
            };
            let found = route::find(&table, &request, 0).map(|f| (f.vhost.name.to_string(), f.route.name.to_string()));
            prop_assert_eq!(found, naive_route(&said, said_request), "{:?}", said_request);
        }
    }

    #[test]
    fn policies(rules in option::of(rbac_rules()), shadow in option::of(rbac_rules()), worlds in vec(world(), 8)) {
        let said = model::Rbac { rules, shadow_rules: shadow, ..model::Rbac::default() };
        let rbac = Rbac::compile(&said).unwrap();
        let token = token();
        for world in &worlds {
            let headers = world.request.as_ref().map(Req::map).unwrap_or_default();
            let view = world.request.as_ref().map(|r| RequestView {
                method: &r.method,
                scheme: "http",
                authority: &r.authority,
                path: &r.path,
                headers: &headers,
            });
            let peer = world.sans.as_ref().map(|sans| {
                let mut peer = Peer::default();
                peer.uri_sans.clone_from(sans);
                peer
            });
            let attributes = Attributes {
                peer: peer.as_ref(),
                direct_remote: world.direct,
                remote_ip: world.remote,
                destination: world.destination,
                sni: world.sni.as_deref(),
                request: view.as_ref(),
                metadata: token.as_object().filter(|_| world.token),
            };
            let verdict = rbac.check(&attributes);
            let (allowed, policy) = said.rules.as_ref().map_or((true, None), |rules| world.judge(rules));
            prop_assert_eq!((verdict.allowed, verdict.policy), (allowed, policy), "{:?}", world);
            prop_assert_eq!(verdict.shadow, said.shadow_rules.as_ref().map(|rules| world.judge(rules)));
            prop_assert_eq!(rbac.why(&attributes).is_some(), !allowed, "every denial has a reason, nothing else has");
        }
    }

    #[test]
    fn chains(matches in vec(chain_match(), 0..10), arrivals in vec(arrival(), 16)) {
        let (matcher, _) = ChainMatcher::new(matches.iter().enumerate().map(|(i, m)| (m, chain(i))), None);
        for (dst, src, sni, tls, alpn) in &arrivals {
            let input = ChainInput {
                dst: *dst,
                src: *src,
                sni: *sni,
                transport: if *tls { TransportProtocol::Tls } else { TransportProtocol::RawBuffer },
                alpn,
            };
            let found = matcher.find(&input).map(|c| c.name.parse::<usize>().unwrap());
            prop_assert_eq!(found, naive_chain(&matches, &input), "{:?}", input);
        }
    }

    #[test]
    fn weights(weights in vec(0_u32..5, 1..6), turns in 1_u64..4) {
        let (names, mut rejects) = (ByName::default(), Vec::new());
        let clusters = weights.iter().enumerate().map(|(i, weight)| model::WeightedCluster {
            name: i.to_string().into(),
            weight: *weight,
            ..model::WeightedCluster::default()
        });
        let forward = model::Forward { clusters: clusters.collect(), ..model::Forward::default() };
        let said = model::RouteAction::Forward(Box::new(forward));
        let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
        let compiled = action_compile::action(&said, &Ids(&names), &mut Sink::new(&mut rejects, "test"));
        if total == 0 && weights.len() > 1 {
            prop_assert!(compiled.is_err());
            return Ok(());
        }
        let Ok(action::Action::Forward(forward)) = compiled else { panic!("it forwards") };
        let mut picked = vec![0_u64; weights.len()];
        for draw in 0..total.max(1) * turns {
            picked[forward.pick(draw).unwrap().cluster.name.parse::<usize>().unwrap()] += 1;
        }
        for (weight, count) in weights.iter().zip(&picked) {
            let share = if weights.len() == 1 { total.max(1) } else { u64::from(*weight) };
            prop_assert_eq!(*count, share * turns);
        }
    }
}
