//! What happens to headers: hop-by-hop ones end here, clients may not steer us, and the next hop learns where a request
//! came from.

use std::net::{IpAddr, SocketAddr};

use http::header::{
    ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONNECTION, COOKIE, HeaderMap, HeaderName, HeaderValue, TE,
    TRANSFER_ENCODING, UPGRADE, USER_AGENT, VIA,
};
use http::{StatusCode, Version};
use proxy_config::model::{ServerHeader, UnderscoreHeaders};
use smallvec::SmallVec;

use super::head::{Head, Malformed};
use super::{request_id, xfcc};
use crate::snapshot::HttpOptions;

pub(super) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
pub(super) const DECORATOR: HeaderName = HeaderName::from_static("x-envoy-decorator-operation");
pub(super) const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");
pub(super) const EXPECTED_TIMEOUT: HeaderName = HeaderName::from_static("x-envoy-expected-rq-timeout-ms");
pub(super) const ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");
pub(super) const ORIGINAL_HOST: HeaderName = HeaderName::from_static("x-envoy-original-host");
pub(super) const INTERNAL: HeaderName = HeaderName::from_static("x-envoy-internal");
pub(super) const OVERLOADED: HeaderName = HeaderName::from_static("x-envoy-overloaded");
pub(super) const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");
pub(super) const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_PORT: HeaderName = HeaderName::from_static("x-forwarded-port");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// With these a client outside the mesh could steer our retries and timeouts. Behind `x-envoy-`.
const CONTROL: [&str; 17] = [
    "internal",
    "retry-on",
    "retry-grpc-on",
    "max-retries",
    "retriable-status-codes",
    "retriable-header-names",
    "upstream-alt-stat-name",
    "upstream-rq-timeout-ms",
    "upstream-rq-per-try-timeout-ms",
    "upstream-rq-timeout-alt-response",
    "upstream-stream-duration-ms",
    "expected-rq-timeout-ms",
    "hedge-on-per-try-timeout",
    "force-trace",
    "ip-tags",
    "original-url",
    "is-timeout-retry",
];

/// What a connection knows about its client.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin<'a> {
    pub(super) peer: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) tls: bool,
    /// XFCC element of the connection.
    pub(super) xfcc: Option<&'a HeaderValue>,
}

/// Whether a request asks for another protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Upgrade {
    /// No, or for one that is ignored (`h2c`).
    No,
    /// For one that is allowed.
    Allowed,
    /// For another one: 403 `upgrade_failed`.
    Refused,
}

/// What the headers turned out to say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Arrived {
    /// The client after x-forwarded-for.
    pub(super) remote: IpAddr,
    pub(super) upgrade: Upgrade,
}

/// Headers that are there, found in one pass, so that the many that are not cost nothing.
#[derive(Default)]
struct Seen(u32);

impl Seen {
    const CONNECTION: u32 = 1;
    const KEEP_ALIVE: u32 = 1 << 1;
    const PROXY_CONNECTION: u32 = 1 << 2;
    const TE: u32 = 1 << 3;
    const UPGRADE: u32 = 1 << 4;
    const TRANSFER_ENCODING: u32 = 1 << 5;
    const FORWARDED_FOR: u32 = 1 << 6;
    const FORWARDED_PROTO: u32 = 1 << 7;
    const XFCC: u32 = 1 << 8;
    const CONTROL: u32 = 1 << 9;

    fn of(headers: &HeaderMap) -> Self {
        headers.keys().fold(Self::default(), |seen, name| Self(seen.0 | Self::bit(name.as_str())))
    }

    fn bit(name: &str) -> u32 {
        match name.as_bytes()[0] {
            b'c' if name == "connection" => Self::CONNECTION,
            b'k' if name == "keep-alive" => Self::KEEP_ALIVE,
            b'p' if name == "proxy-connection" => Self::PROXY_CONNECTION,
            b't' if name == "te" => Self::TE,
            b't' if name == "transfer-encoding" => Self::TRANSFER_ENCODING,
            b'u' if name == "upgrade" => Self::UPGRADE,
            b'x' => match name {
                "x-forwarded-for" => Self::FORWARDED_FOR,
                "x-forwarded-proto" => Self::FORWARDED_PROTO,
                "x-forwarded-client-cert" => Self::XFCC,
                _ if name.starts_with("x-envoy-") => Self::CONTROL,
                _ => 0,
            },
            _ => 0,
        }
    }

    fn any(&self, bits: u32) -> bool {
        self.0 & bits != 0
    }
}

/// Everything that happens to a request's headers before filters see them.
pub(super) fn on_request(
    head: &mut Head,
    options: &HttpOptions,
    from: Origin<'_>,
    random: impl FnOnce() -> u128,
) -> Result<Arrived, Malformed> {
    if options.headers_with_underscores != UnderscoreHeaders::Allow {
        underscores(&mut head.headers, options.headers_with_underscores)?;
    }
    let seen = Seen::of(&head.headers);
    let mut upgrade = Upgrade::No;
    if seen.any(Seen::CONNECTION | Seen::UPGRADE | Seen::TE | Seen::KEEP_ALIVE | Seen::PROXY_CONNECTION) {
        upgrade = requested_upgrade(head, &options.upgrades);
        hop_by_hop(&mut head.headers, upgrade == Upgrade::Allowed)?;
    }
    if seen.any(Seen::TRANSFER_ENCODING) {
        head.headers.remove(TRANSFER_ENCODING);
    }
    if head.headers.len() != head.headers.keys_len() {
        join_lines(&mut head.headers, head.version);
    }
    let internal = is_internal(&head.headers, (&options.internal_cidrs, options.use_remote_address), from.peer.ip());
    if seen.any(Seen::CONTROL) && !internal {
        remove_control(&mut head.headers);
    }
    if internal {
        head.headers.insert(INTERNAL, HeaderValue::from_static("true"));
    }
    let mut remote = from.peer.ip();
    if seen.any(Seen::FORWARDED_FOR) {
        remote = options.client(&head.headers, remote);
    }
    if options.use_remote_address {
        append_forwarded_for(&mut head.headers, from.peer.ip());
    }
    if !seen.any(Seen::FORWARDED_PROTO) {
        let scheme = HeaderValue::from_static(if from.tls { "https" } else { "http" });
        head.headers.insert(FORWARDED_PROTO, scheme);
    }
    if options.append_x_forwarded_port && !head.headers.contains_key(FORWARDED_PORT) {
        head.headers.insert(FORWARDED_PORT, HeaderValue::from(from.destination.port()));
    }
    if options.generate_request_id && head.headers.get(REQUEST_ID).is_none_or(HeaderValue::is_empty) {
        let random = random();
        let sampled = request_id::sampled(options.tracing.as_ref(), (random >> 64) as u64);
        head.headers.insert(REQUEST_ID, request_id::new(random, sampled));
    }
    if seen.any(Seen::XFCC) || from.xfcc.is_some() {
        xfcc::apply(&mut head.headers, options.forward_client_cert, from.xfcc);
    }
    Ok(Arrived { remote, upgrade })
}

/// Whether a request comes from an address that is configured as internal, as Envoy sees it: `x-forwarded-for`, after we
/// have added to it what we add, is that one address. Such a client may steer us.
fn is_internal(headers: &HeaderMap, (cidrs, appends): (&[ipnet::IpNet], bool), peer: IpAddr) -> bool {
    if cidrs.is_empty() {
        return false;
    }
    let mut lines = headers.get_all(FORWARDED_FOR).iter();
    let client = match (lines.next(), lines.next(), appends) {
        (None, _, true) => Some(peer),
        (Some(only), None, false) => only.to_str().ok().and_then(|text| text.trim().parse().ok()),
        _ => None,
    };
    client.is_some_and(|client: IpAddr| cidrs.iter().any(|cidr| cidr.contains(&client.to_canonical())))
}

/// The upgrade that a request asks for. HTTP/2 has none; `h2c` is not offered and dropped without a word.
fn requested_upgrade(head: &Head, allowed: &[Box<str>]) -> Upgrade {
    let Some(wanted) = head.headers.get(UPGRADE) else { return Upgrade::No };
    if head.version != Version::HTTP_11
        || !tokens(&head.headers, &CONNECTION).any(|t| t.eq_ignore_ascii_case(b"upgrade"))
    {
        return Upgrade::No;
    }
    if wanted.as_bytes().eq_ignore_ascii_case(b"h2c") {
        return Upgrade::No;
    }
    let known = allowed.iter().any(|name| wanted.as_bytes().eq_ignore_ascii_case(name.as_bytes()));
    if known { Upgrade::Allowed } else { Upgrade::Refused }
}

/// Whether a route lets the upgrade through that its connection manager allows.
pub(super) fn may_upgrade(headers: &HeaderMap, said: &[(Box<str>, bool)]) -> bool {
    let wanted = headers.get(UPGRADE).map(HeaderValue::as_bytes).unwrap_or_default();
    said.iter().all(|(name, on)| *on || !wanted.eq_ignore_ascii_case(name.as_bytes()))
}

/// The comma-separated words of a header.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    headers.get_all(name).into_iter().flat_map(|v| v.as_bytes().split(|b| *b == b',')).map(<[u8]>::trim_ascii)
}

/// Removes what is meant for this hop only.
fn hop_by_hop(headers: &mut HeaderMap, keep_upgrade: bool) -> Result<(), Malformed> {
    let mut named: SmallVec<[HeaderName; 4]> = SmallVec::new();
    for token in tokens(headers, &CONNECTION) {
        let Ok(name) = HeaderName::from_bytes(token) else { continue };
        match name.as_str() {
            // Dropping them would change where the request goes or how it is framed.
            "host" | "content-length" | "transfer-encoding" | "x-forwarded-for" | "x-forwarded-host"
            | "x-forwarded-proto" | "cookie" | "authorization" => return Err(Malformed::Codec),
            "close" | "keep-alive" | "upgrade" | "te" => {}
            _ => named.push(name),
        }
    }
    for name in named {
        headers.remove(name);
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(HTTP2_SETTINGS);
    let trailers = tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case(b"trailers"));
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    } else {
        headers.remove(TE);
    }
    if keep_upgrade {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    } else {
        headers.remove(CONNECTION);
        headers.remove(UPGRADE);
    }
    Ok(())
}

/// Lists that may come in several lines become one, as the peers of a mesh are used to.
fn join_lines(headers: &mut HeaderMap, version: Version) {
    for name in [ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, FORWARDED_FOR, FORWARDED_PROTO, USER_AGENT, VIA] {
        join(headers, name, b",");
    }
    if version == Version::HTTP_2 {
        join(headers, COOKIE, b"; ");
    }
}

fn join(headers: &mut HeaderMap, name: HeaderName, separator: &[u8]) {
    let mut lines = headers.get_all(&name).iter();
    let (Some(first), Some(second)) = (lines.next(), lines.next()) else { return };
    let mut all = first.as_bytes().to_vec();
    for line in std::iter::once(second).chain(lines) {
        all.extend_from_slice(separator);
        all.extend_from_slice(line.as_bytes());
    }
    let joined = HeaderValue::from_bytes(&all).expect("parts of header values, joined");
    headers.insert(name, joined);
}

/// Servers that turn `-` and `_` into one character could be told what policy never saw.
fn underscores(headers: &mut HeaderMap, action: UnderscoreHeaders) -> Result<(), Malformed> {
    let names: SmallVec<[HeaderName; 4]> = headers.keys().filter(|name| name.as_str().contains('_')).cloned().collect();
    if !names.is_empty() && action == UnderscoreHeaders::RejectRequest {
        return Err(Malformed::Underscore);
    }
    for name in names {
        headers.remove(name);
    }
    Ok(())
}

fn remove_control(headers: &mut HeaderMap) {
    let unwanted: SmallVec<[HeaderName; 4]> = headers
        .keys()
        .filter(|name| name.as_str().strip_prefix("x-envoy-").is_some_and(|rest| CONTROL.contains(&rest)))
        .cloned()
        .collect();
    for name in unwanted {
        headers.remove(name);
    }
}

pub(super) fn append_forwarded_for(headers: &mut HeaderMap, address: IpAddr) {
    join(headers, FORWARDED_FOR, b",");
    let text = match headers.get(FORWARDED_FOR).and_then(|v| v.to_str().ok()) {
        Some(before) => format!("{before},{address}"),
        None => address.to_string(),
    };
    headers.insert(FORWARDED_FOR, HeaderValue::try_from(text).expect("an address is visible ASCII"));
}

/// Everything that happens to a response's headers before the route's own changes. `upgraded` keeps the switch.
pub(super) fn on_response(headers: &mut HeaderMap, status: StatusCode) {
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let seen = Seen::of(headers);
        if seen.any(Seen::CONNECTION) {
            headers.remove(CONNECTION);
        }
        if seen.any(Seen::UPGRADE) {
            headers.remove(UPGRADE);
        }
        if seen.any(Seen::KEEP_ALIVE) {
            headers.remove(KEEP_ALIVE);
        }
        if seen.any(Seen::PROXY_CONNECTION) {
            headers.remove(PROXY_CONNECTION);
        }
        if seen.any(Seen::TRANSFER_ENCODING) {
            headers.remove(TRANSFER_ENCODING);
        }
    }
}

/// The `server` header.
pub(super) fn server(headers: &mut HeaderMap, options: &HttpOptions) {
    use http::header::SERVER;
    match options.server_header {
        ServerHeader::Overwrite => {
            headers.insert(SERVER, options.server_name.clone());
        }
        ServerHeader::AppendIfAbsent => {
            headers.entry(SERVER).or_insert_with(|| options.server_name.clone());
        }
        ServerHeader::PassThrough => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::head::tests::head;
    use super::*;

    fn names(head: &Head) -> Vec<String> {
        let mut all: Vec<_> = head
            .headers
            .iter()
            .map(|(name, value)| format!("{name}: {}", String::from_utf8_lossy(value.as_bytes())))
            .collect();
        all.sort();
        all
    }

    #[test]
    fn what_is_for_this_hop_ends_here() {
        for (sent, expected) in [
            (&[("connection", "x-foo"), ("x-foo", "1")][..], Ok(&[][..])),
            (&[("connection", "keep-alive, x-foo"), ("x-foo", "1"), ("keep-alive", "timeout=5")], Ok(&[])),
            (&[("proxy-connection", "close"), ("te", "gzip")], Ok(&[])),
            (&[("connection", "te"), ("te", "trailers, deflate")], Ok(&["te: trailers"])),
            (&[("te", "trailers;q=1")], Ok(&[])),
            (&[("connection", "host")], Err(Malformed::Codec)),
            (&[("connection", "upgrade, http2-settings"), ("upgrade", "h2c"), ("http2-settings", "A")], Ok(&[])),
        ] {
            let mut head = head("GET", "/", sent);
            let result = hop_by_hop(&mut head.headers, false).map(|()| names(&head));
            assert_eq!(result, expected.map(|e| e.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()), "{sent:?}");
        }
    }

    #[test]
    fn upgrades() {
        let allowed: [Box<str>; 1] = ["websocket".into()];
        for (connection, upgrade, expected) in [
            ("Upgrade", "WebSocket", Upgrade::Allowed),
            ("keep-alive, upgrade", "websocket", Upgrade::Allowed),
            ("keep-alive", "websocket", Upgrade::No),
            ("upgrade", "h2c", Upgrade::No),
            ("upgrade", "foo", Upgrade::Refused),
        ] {
            let head = head("GET", "/", &[("connection", connection), ("upgrade", upgrade)]);
            assert_eq!(requested_upgrade(&head, &allowed), expected, "{connection} {upgrade}");
        }
    }

    #[test]
    fn clients_do_not_steer() {
        let mut head = head(
            "GET",
            "/",
            &[
                ("x-envoy-internal", "true"),
                ("x-envoy-retry-on", "5xx"),
                ("x-envoy-force-trace", "1"),
                ("x-envoy-original-path", "/o"),
                ("x-envoy-attempt-count", "9"),
                ("x-envoy-foo", "bar"),
            ],
        );
        remove_control(&mut head.headers);
        assert_eq!(names(&head), ["x-envoy-attempt-count: 9", "x-envoy-foo: bar", "x-envoy-original-path: /o"]);
    }

    #[test]
    fn lists_become_one_line() {
        let mut head = head(
            "GET",
            "/",
            &[("accept", "a"), ("accept", "b"), ("x-a", "1"), ("x-a", "2"), ("cookie", "c=1"), ("cookie", "d=2")],
        );
        join_lines(&mut head.headers, Version::HTTP_2);
        assert_eq!(names(&head), ["accept: a,b", "cookie: c=1; d=2", "x-a: 1", "x-a: 2"]);
    }

    #[test]
    fn underscores_are_dropped_or_refused() {
        let mut head = head("GET", "/", &[("a_b", "1"), ("a-b", "2")]);
        assert_eq!(underscores(&mut head.headers, UnderscoreHeaders::RejectRequest), Err(Malformed::Underscore));
        assert_eq!(underscores(&mut head.headers, UnderscoreHeaders::DropHeader), Ok(()));
        assert_eq!(names(&head), ["a-b: 2"]);
    }

    #[test]
    fn a_route_may_refuse_an_upgrade() {
        let head = head("GET", "/", &[("connection", "upgrade"), ("upgrade", "WebSocket")]);
        let may = |said: &[(Box<str>, bool)]| may_upgrade(&head.headers, said);
        assert!(may(&[]) && may(&[("websocket".into(), true)]) && may(&[("connect".into(), false)]));
        assert!(!may(&[("websocket".into(), false)]));
    }

    #[test]
    fn internal_clients_have_one_address_of_a_configured_network() {
        let cidrs = ["10.0.0.0/8".parse().unwrap()];
        let internal = |forwarded: &[&str], trusting: bool, peer: &str| {
            let lines: Vec<(&str, &str)> = forwarded.iter().map(|v| ("x-forwarded-for", *v)).collect();
            is_internal(&head("GET", "/", &lines).headers, (&cidrs, !trusting), peer.parse().unwrap())
        };
        assert!(internal(&["10.1.2.3"], true, "192.0.2.1"));
        assert!(internal(&[], false, "10.1.2.3"), "our own word");
        assert!(!internal(&[], true, "10.1.2.3"), "nobody said so");
        assert!(!internal(&["10.1.2.3"], false, "10.1.2.4"), "two addresses");
        assert!(!internal(&["10.1.2.3, 10.1.2.4"], true, "10.1.2.3"), "two addresses");
        assert!(!internal(&["192.0.2.1"], true, "10.1.2.3"));
        assert!(!is_internal(&head("GET", "/", &[]).headers, (&[], true), "10.1.2.3".parse().unwrap()));
    }
}
