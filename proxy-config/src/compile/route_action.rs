//! What an HTTP route of a VirtualService does: forward, redirect, answer; retries, header changes, faults, CORS.

use std::time::Duration;

use base64::Engine as _;

use super::route_match;
use crate::istio::virtual_service::{
    CorsPolicy as IstioCors, DerivePort, Destination, FaultAbort, FaultDelay, GRPC_CODES, HeaderOperations, Headers,
    HttpDirectResponse, HttpFault, HttpMirror, HttpRedirect, HttpRetry, HttpRoute, Percent, UnmatchedPreflights,
};
use crate::model::{
    AppendAction, CorsPolicy, Fault, Forward, HashPolicy, HeaderOps, HeaderSet, HostRewrite, Mirror, Name, Redirect,
    RetryPolicy, RouteAction, StringMatcher, WeightedCluster,
};

const MILLION: u32 = 1_000_000;

/// What the translation of a route needs to know of the world.
pub(super) struct Lookup<'a> {
    /// Cluster name of a destination seen from the listener's port.
    pub(super) cluster: &'a dyn Fn(&Destination) -> String,
    /// Consistent hashing of a destination, from its DestinationRule.
    pub(super) hash: &'a dyn Fn(&Destination) -> Option<HashPolicy>,
    /// The mesh's retry policy for routes that set none.
    pub(super) retries: Option<&'a HttpRetry>,
    /// Old host in x-forwarded-host.
    pub(super) append_x_forwarded_host: bool,
    /// Port of the listener.
    pub(super) port: u16,
}

/// An action with the header changes of route and destination.
pub(super) struct Translated {
    pub(super) action: RouteAction,
    pub(super) request_headers: HeaderOps,
    pub(super) response_headers: HeaderOps,
}

/// Translates the action of a route.
pub(super) fn translate(route: &HttpRoute, lookup: &Lookup<'_>) -> Translated {
    let (request_headers, authority) = request_ops(route.headers.as_ref());
    let response_headers = route.headers.as_ref().map(|h| header_ops(&h.response)).unwrap_or_default();
    let mut out =
        Translated { action: RouteAction::Direct { status: 500, body: Vec::new() }, request_headers, response_headers };
    if let Some(r) = &route.redirect {
        out.action = redirect(r, lookup.port);
        return out;
    }
    if let Some(response) = &route.direct_response {
        out.action = direct(response);
        return out;
    }
    if route.route.iter().all(|d| d.weight == 0) && route.route.len() != 1 {
        out.action = RouteAction::Unsupported("route without a destination".to_owned());
        return out;
    }
    forward(route, lookup, authority, &mut out);
    out
}

fn forward(route: &HttpRoute, lookup: &Lookup<'_>, authority: Option<String>, out: &mut Translated) {
    let timeout = route.timeout.map_or(Duration::ZERO, |d| d.0);
    let mut f = Forward {
        timeout: Some(timeout),
        max_grpc_timeout: Some(timeout),
        host_rewrite: authority.map(HostRewrite::Literal),
        ..Forward::default()
    };
    if let Some(rewrite) = &route.rewrite {
        f.append_x_forwarded_host = lookup.append_x_forwarded_host;
        match &rewrite.uri_regex_rewrite {
            Some(regex) => f.regex_rewrite = Some((regex.matches.clone(), regex.rewrite.clone())),
            None if !rewrite.uri.is_empty() => f.prefix_rewrite = Some(rewrite.uri.clone()),
            None => {}
        }
        if !rewrite.authority.is_empty() {
            f.host_rewrite = Some(HostRewrite::Literal(rewrite.authority.clone()));
        }
    }
    f.mirrors = mirrors(route, lookup);
    let consistent_hash = destinations(route, lookup, &mut f, out);
    f.retry = retry(route.retries.as_ref().or(lookup.retries), consistent_hash);
    out.action = RouteAction::Forward(Box::new(f));
}

/// Fills clusters, hash policies and, for a single destination, its header changes. Tells whether that one hashes.
fn destinations(route: &HttpRoute, lookup: &Lookup<'_>, f: &mut Forward, out: &mut Translated) -> bool {
    if let [only] = route.route.as_slice() {
        let (request, authority) = request_ops(only.headers.as_ref());
        let response = only.headers.as_ref().map(|h| header_ops(&h.response)).unwrap_or_default();
        append(&mut out.request_headers, request);
        append(&mut out.response_headers, response);
        if f.host_rewrite.is_none() {
            f.host_rewrite = authority.map(HostRewrite::Literal);
        }
        let name = Name::from((lookup.cluster)(&only.destination));
        f.clusters = vec![WeightedCluster { name, weight: 1, ..WeightedCluster::default() }];
        let hash = (lookup.hash)(&only.destination);
        let hashes = hash.is_some();
        f.hash_policy.extend(hash);
        return hashes;
    }
    for destination in route.route.iter().filter(|d| d.weight != 0) {
        let (request_headers, host_rewrite) = request_ops(destination.headers.as_ref());
        f.clusters.push(WeightedCluster {
            name: Name::from((lookup.cluster)(&destination.destination)),
            weight: destination.weight,
            request_headers,
            response_headers: destination.headers.as_ref().map(|h| header_ops(&h.response)).unwrap_or_default(),
            host_rewrite,
        });
        f.hash_policy.extend((lookup.hash)(&destination.destination));
    }
    false
}

fn append(ops: &mut HeaderOps, more: HeaderOps) {
    ops.set.extend(more.set);
    ops.remove.extend(more.remove);
}

fn mirrors(route: &HttpRoute, lookup: &Lookup<'_>) -> Vec<Mirror> {
    let mut out = Vec::new();
    let mut push = |destination: &Destination, millionths: u32| {
        if millionths > 0 {
            let cluster = Name::from((lookup.cluster)(destination));
            out.push(Mirror { cluster, millionths, shadow_suffix: false });
        }
    };
    if let Some(mirror) = &route.mirror {
        let share = match (&route.mirror_percentage, route.mirror_percent) {
            (Some(percentage), _) => millionths(percentage),
            (None, Some(percent)) => percent.saturating_mul(10_000),
            (None, None) => MILLION,
        };
        push(mirror, share);
    }
    for HttpMirror { destination, percentage } in &route.mirrors {
        if let Some(destination) = destination {
            push(destination, percentage.as_ref().map_or(MILLION, millionths));
        }
    }
    out
}

/// istiod truncates at a ten-thousandth of a percent.
fn millionths(percent: &Percent) -> u32 {
    (percent.value * 10_000.0) as u32
}

/// Envoy's retry policy for Istio's; `None` means no retries at all.
pub(super) fn retry(policy: Option<&HttpRetry>, consistent_hash: bool) -> Option<RetryPolicy> {
    let mut out = RetryPolicy {
        retry_on: words("connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes"),
        num_retries: 2,
        avoid_previous_hosts: !consistent_hash,
        host_selection_attempts: 5,
        ..RetryPolicy::default()
    };
    let Some(policy) = policy else { return Some(out) };
    out.num_retries = u32::try_from(policy.attempts).ok().filter(|n| *n > 0)?;
    retry_conditions(policy, &mut out);
    out.per_try_timeout = policy.per_try_timeout.map(|d| d.0);
    if let Some(ignore) = policy.retry_ignore_previous_hosts {
        out.avoid_previous_hosts = ignore;
    }
    if policy.retry_remote_localities == Some(true) {
        out.previous_priorities = Some(2);
    }
    Some(out)
}

/// Retries towards the application: only what never reached it.
pub(super) fn inbound_retry(policy: Option<&HttpRetry>) -> Option<RetryPolicy> {
    let mut out = RetryPolicy { retry_on: words("reset-before-request"), num_retries: 2, ..RetryPolicy::default() };
    let Some(policy) = policy else { return Some(out) };
    out.num_retries = u32::try_from(policy.attempts).ok().filter(|n| *n > 0)?;
    retry_conditions(policy, &mut out);
    Some(out)
}

/// Numbers among the conditions are status codes.
fn retry_conditions(policy: &HttpRetry, out: &mut RetryPolicy) {
    out.backoff_base = policy.backoff.map(|d| d.0);
    if policy.retry_on.is_empty() {
        return;
    }
    out.retry_on.clear();
    for word in policy.retry_on.split(',').map(str::trim).filter(|w| !w.is_empty()) {
        match word.parse::<u16>() {
            Ok(code) if is_known_status(code) => out.retriable_status_codes.push(code),
            _ => out.retry_on.push(word.to_owned()),
        }
    }
    let says_codes = out.retry_on.iter().any(|w| w.contains("retriable-status-codes"));
    if !out.retriable_status_codes.is_empty() && !says_codes {
        out.retry_on.push("retriable-status-codes".to_owned());
    }
}

/// Statuses that have a registered name.
fn is_known_status(code: u16) -> bool {
    matches!(code, 100..=103 | 200..=208 | 226 | 300..=305 | 307 | 308 | 400..=418 | 421..=426 | 428 | 429 | 431 | 451
        | 500..=508 | 510 | 511)
}

fn words(text: &str) -> Vec<String> {
    text.split(',').map(str::to_owned).collect()
}

pub(super) fn redirect(r: &HttpRedirect, listener_port: u16) -> RouteAction {
    let status = if r.redirect_code == 0 { 301 } else { r.redirect_code };
    if !matches!(status, 301 | 302 | 303 | 307 | 308) {
        return RouteAction::Unsupported(format!("redirect code {status}"));
    }
    let text = |t: &String| (!t.is_empty()).then(|| t.clone());
    let wanted = match r.derive_port {
        Some(DerivePort::FromRequestPort) => Some(listener_port),
        Some(DerivePort::FromProtocolDefault) => None,
        None => r.port,
    };
    let scheme = if r.scheme.is_empty() { "http" } else { r.scheme.as_str() };
    let port = wanted.filter(|p| !matches!((*p, scheme), (0, _) | (80, "http") | (443, "https")));
    let prefix = text(&r.prefix_rewrite);
    RouteAction::Redirect(Redirect {
        status,
        host: text(&r.authority),
        path: if prefix.is_some() { None } else { text(&r.uri) },
        prefix,
        scheme: text(&r.scheme),
        https: false,
        port,
        strip_query: false,
    })
}

pub(super) fn direct(response: &HttpDirectResponse) -> RouteAction {
    let body = response.body.as_ref();
    let text = body.and_then(|b| b.string.as_ref()).map(|s| s.clone().into_bytes());
    let bytes = body.and_then(|b| b.bytes.as_ref());
    let decoded = bytes.map(|b| base64::engine::general_purpose::STANDARD.decode(b.trim()));
    match (text, decoded) {
        (None, Some(Err(_))) => RouteAction::Unsupported("direct response body that is no base64".to_owned()),
        (text, decoded) => RouteAction::Direct {
            status: response.status,
            body: text.or_else(|| decoded.and_then(Result::ok)).unwrap_or_default(),
        },
    }
}

/// Request changes, and the host that `Host` or `:authority` among them sets.
fn request_ops(headers: Option<&Headers>) -> (HeaderOps, Option<String>) {
    let Some(headers) = headers else { return (HeaderOps::default(), None) };
    let request = &headers.request;
    let host = |of: &std::collections::BTreeMap<String, String>| {
        let found = of.iter().find(|(k, _)| k.eq_ignore_ascii_case("host") || k.eq_ignore_ascii_case(":authority"));
        found.map(|(_, v)| v.clone()).filter(|v| !v.is_empty())
    };
    (header_ops(request), host(&request.set).or_else(|| host(&request.add)))
}

fn header_ops(ops: &HeaderOperations) -> HeaderOps {
    let internal = |name: &str| name.starts_with(':') || name.eq_ignore_ascii_case("host");
    let entries = |of: &std::collections::BTreeMap<String, String>, action: AppendAction| {
        of.iter()
            .filter(|(name, _)| !internal(name))
            .map(|(name, value)| HeaderSet { name: name.clone(), value: value.clone(), action })
            .collect::<Vec<_>>()
    };
    let mut set = entries(&ops.set, AppendAction::Overwrite);
    set.extend(entries(&ops.add, AppendAction::Append));
    let remove = ops.remove.iter().filter(|n| !internal(n)).map(|n| n.to_ascii_lowercase()).collect();
    HeaderOps { set, remove }
}

/// Fault injection of a route; a share that is not said is none.
pub(super) fn fault(f: &HttpFault) -> Option<Fault> {
    let share = |p: Option<&Percent>, whole: u32| p.map_or_else(|| whole.saturating_mul(10_000), millionths);
    let delay = f.delay.as_ref().and_then(|FaultDelay { percent, percentage, fixed_delay, .. }| {
        fixed_delay.map(|d| (d.0, share(percentage.as_ref(), *percent)))
    });
    let mut out = Fault { delay, ..Fault::default() };
    if let Some(FaultAbort { http_status, grpc_status, percentage, .. }) = &f.abort {
        let share = share(percentage.as_ref(), 0);
        out.abort_http = http_status.map(|status| (status, share));
        if http_status.is_none() {
            out.abort_grpc = grpc_status.as_deref().and_then(grpc_code).map(|code| (code, share));
        }
    }
    (out != Fault::default()).then_some(out)
}

pub(super) fn grpc_code(name: &str) -> Option<u32> {
    GRPC_CODES.iter().position(|n| *n == name).and_then(|i| u32::try_from(i).ok())
}

/// CORS of a route.
pub(super) fn cors(c: &IstioCors) -> CorsPolicy {
    let origins = if c.allow_origins.is_empty() {
        c.allow_origin.iter().map(StringMatcher::exact).collect()
    } else {
        c.allow_origins.iter().filter_map(|m| route_match::string(Some(m))).collect()
    };
    CorsPolicy {
        allow_origins: origins,
        allow_methods: c.allow_methods.join(","),
        allow_headers: c.allow_headers.join(","),
        expose_headers: c.expose_headers.join(","),
        max_age: c.max_age.map(|d| d.0.as_secs().to_string()).unwrap_or_default(),
        allow_credentials: c.allow_credentials,
        forward_not_matching_preflights: Some(c.unmatched_preflights != UnmatchedPreflights::Ignore),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::common::IstioDuration;
    use crate::istio::virtual_service::HttpDestination;

    fn lookup<'a>(
        cluster: &'a dyn Fn(&Destination) -> String,
        hash: &'a dyn Fn(&Destination) -> Option<HashPolicy>,
    ) -> Lookup<'a> {
        Lookup { cluster, hash, retries: None, append_x_forwarded_host: false, port: 8080 }
    }

    fn to(host: &str, weight: u32) -> HttpDestination {
        HttpDestination {
            destination: Destination { host: host.to_owned(), ..Destination::default() },
            weight,
            headers: None,
        }
    }

    fn forwarded(route: &HttpRoute) -> Forward {
        let cluster = |d: &Destination| d.host.clone();
        match translate(route, &lookup(&cluster, &|_| None)).action {
            RouteAction::Forward(f) => *f,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn weights() {
        let one = forwarded(&HttpRoute { route: vec![to("a", 0)], ..HttpRoute::default() });
        assert_eq!((one.clusters.len(), one.clusters[0].weight), (1, 1));
        let two = forwarded(&HttpRoute { route: vec![to("a", 0), to("b", 5)], ..HttpRoute::default() });
        assert_eq!((two.clusters.len(), two.clusters[0].weight), (1, 5), "zero weights vanish");
    }

    #[test]
    fn retries() {
        let default = retry(None, false).expect("default retries");
        assert_eq!((default.num_retries, default.avoid_previous_hosts), (2, true));
        assert!(!retry(None, true).expect("default").avoid_previous_hosts);
        assert_eq!(retry(Some(&HttpRetry::default()), false), None, "attempts 0 is off");
        let custom = HttpRetry {
            attempts: 3,
            retry_on: "5xx,503,foo".to_owned(),
            backoff: Some(IstioDuration(Duration::from_millis(5))),
            ..HttpRetry::default()
        };
        let custom = retry(Some(&custom), false).expect("retries");
        assert_eq!(custom.retry_on, ["5xx", "foo", "retriable-status-codes"]);
        assert_eq!(custom.retriable_status_codes, [503]);
    }

    #[test]
    fn redirects_elide_default_ports() {
        let r = HttpRedirect { port: Some(443), scheme: "https".to_owned(), ..HttpRedirect::default() };
        let RouteAction::Redirect(out) = redirect(&r, 80) else { panic!("no redirect") };
        assert_eq!((out.status, out.port), (301, None));
        let r = HttpRedirect { derive_port: Some(DerivePort::FromRequestPort), ..HttpRedirect::default() };
        let RouteAction::Redirect(out) = redirect(&r, 8080) else { panic!("no redirect") };
        assert_eq!(out.port, Some(8080));
        let r = HttpRedirect { redirect_code: 306, ..HttpRedirect::default() };
        assert!(matches!(redirect(&r, 80), RouteAction::Unsupported(_)));
    }

    #[test]
    fn a_host_header_rewrites_the_authority() {
        let mut route = HttpRoute { route: vec![to("a", 1)], ..HttpRoute::default() };
        let mut headers = Headers::default();
        headers.request.set.insert("Host".to_owned(), "x".to_owned());
        headers.request.set.insert("b".to_owned(), "2".to_owned());
        headers.request.add.insert("a".to_owned(), "1".to_owned());
        route.headers = Some(headers);
        let cluster = |d: &Destination| d.host.clone();
        let out = translate(&route, &lookup(&cluster, &|_| None));
        let names: Vec<&str> = out.request_headers.set.iter().map(|h| h.name.as_str()).collect();
        assert_eq!(names, ["b", "a"], "set before add");
        let RouteAction::Forward(f) = out.action else { panic!("no forward") };
        assert_eq!(f.host_rewrite, Some(HostRewrite::Literal("x".to_owned())));
    }

    #[test]
    fn a_fault_without_share_is_none() {
        let f = HttpFault {
            delay: Some(FaultDelay {
                fixed_delay: Some(IstioDuration(Duration::from_secs(1))),
                ..FaultDelay::default()
            }),
            abort: None,
        };
        assert_eq!(fault(&f).expect("kept").delay, Some((Duration::from_secs(1), 0)));
    }
}
