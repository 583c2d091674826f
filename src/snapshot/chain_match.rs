//! Chooses the filter chain of a connection, as Envoy does: one criterion after the other, the most specific value of each
//! first, and never a step back. A value that leads nowhere ends the search although a less specific one would have led
//! somewhere.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use hashbrown::HashMap;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use proxy_config::model::{ChainMatch, SourceType, TransportProtocol};

use super::chain::Chain;
use super::listener::ChainInput;

/// All chains of a listener, arranged for lookup.
#[derive(Debug, Default)]
pub(super) struct ChainMatcher {
    chains: Box<[Arc<Chain>]>,
    default: Option<Arc<Chain>>,
    ports: Exact<u16, Networks<Names>>,
}

impl ChainMatcher {
    /// Arranges chains, given in configured order. Problems name a chain by its index: a match that an earlier chain has
    /// already (the earlier one keeps it), or one that cannot be (a partial wildcard).
    pub(super) fn new<'m>(
        chains: impl IntoIterator<Item = (&'m ChainMatch, Arc<Chain>)>,
        default: Option<Arc<Chain>>,
    ) -> (Self, Vec<(usize, String)>) {
        let (mut all, mut ports, mut problems) = (Vec::new(), Exact::default(), Vec::new());
        for (index, (said, chain)) in chains.into_iter().enumerate() {
            all.push(chain);
            if let Err(why) = insert(&mut ports, said, index) {
                problems.push((index, why));
            }
        }
        (Self { chains: all.into(), default, ports }, problems)
    }

    pub(super) fn find(&self, input: &ChainInput<'_>) -> Option<&Arc<Chain>> {
        self.index(input).map(|index| &self.chains[index]).or(self.default.as_ref())
    }

    /// A chain by its place in the configuration.
    pub(super) fn nth(&self, index: usize) -> Option<&Arc<Chain>> {
        self.chains.get(index)
    }

    pub(super) fn default_chain(&self) -> Option<&Arc<Chain>> {
        self.default.as_ref()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Chain>> {
        self.chains.iter().chain(&self.default)
    }

    fn index(&self, input: &ChainInput<'_>) -> Option<usize> {
        let (dst, src) = (input.dst.ip().to_canonical(), input.src.ip().to_canonical());
        let names = self.ports.get(&input.dst.port())?.get(dst)?;
        let transports = names.get(input.sni)?;
        let protocols = transports.get(input.transport)?;
        let types = input.alpn.iter().find_map(|p| protocols.known.get(p)).or(protocols.any.as_ref())?.get(src)?;
        types.get(src == dst || src.is_loopback())?.get(src)?.get(&input.src.port()).copied()
    }
}

/// Envoy keeps going from the outermost criterion to the innermost; so do these types.
type Names = ServerNames<Transports>;
type Transports = ByTransport<Exact<String, Networks<Types>>>;
type Types = BySourceType<Networks<Exact<u16, usize>>>;

/// A value, or none asked for.
#[derive(Debug)]
struct Exact<K, T> {
    known: HashMap<K, T>,
    any: Option<T>,
}

impl<K, T> Default for Exact<K, T> {
    fn default() -> Self {
        Self { known: HashMap::default(), any: None }
    }
}

impl<K: std::hash::Hash + Eq, T> Exact<K, T> {
    fn get(&self, key: &K) -> Option<&T> {
        self.known.get(key).or(self.any.as_ref())
    }

    fn at(&mut self, key: Option<K>) -> &mut T
    where
        T: Default,
    {
        match key {
            Some(key) => self.known.entry(key).or_default(),
            None => self.any.get_or_insert_default(),
        }
    }
}

/// Networks; none asked for is all of both families.
#[derive(Debug)]
struct Networks<T> {
    /// Longest first.
    by_prefix: Vec<(IpNet, T)>,
    /// Everything of a family: what asks for `0.0.0.0/0` shares it with what asks for nothing.
    v4: Option<T>,
    v6: Option<T>,
}

impl<T> Default for Networks<T> {
    fn default() -> Self {
        Self { by_prefix: Vec::new(), v4: None, v6: None }
    }
}

impl<T: Default> Networks<T> {
    fn get(&self, ip: IpAddr) -> Option<&T> {
        let found = self.by_prefix.iter().find(|(net, _)| net.contains(&ip)).map(|(_, next)| next);
        found.or_else(|| if ip.is_ipv4() { self.v4.as_ref() } else { self.v6.as_ref() })
    }

    fn at(&mut self, net: IpNet) -> &mut T {
        let net = net.trunc();
        if net.prefix_len() == 0 {
            return if net.addr().is_ipv4() { &mut self.v4 } else { &mut self.v6 }.get_or_insert_default();
        }
        let index = self.by_prefix.iter().position(|(known, _)| *known == net).unwrap_or_else(|| {
            let place = self.by_prefix.partition_point(|(known, _)| known.prefix_len() >= net.prefix_len());
            self.by_prefix.insert(place, (net, T::default()));
            place
        });
        &mut self.by_prefix[index].1
    }
}

/// Server names: exact, then the longest wildcard, then none asked for.
#[derive(Debug)]
struct ServerNames<T> {
    exact: HashMap<String, T>,
    /// `*.suffix` as `.suffix`.
    wildcards: HashMap<String, T>,
    any: Option<T>,
}

impl<T> Default for ServerNames<T> {
    fn default() -> Self {
        Self { exact: HashMap::default(), wildcards: HashMap::default(), any: None }
    }
}

impl<T: Default> ServerNames<T> {
    fn get(&self, sni: Option<&str>) -> Option<&T> {
        let name = lower(sni.unwrap_or_default());
        if let Some(found) = self.exact.get(&*name).filter(|_| !name.is_empty()) {
            return Some(found);
        }
        if !self.wildcards.is_empty() {
            let dots = name.char_indices().skip(1).filter(|(_, c)| *c == '.');
            let mut suffixes = dots.map(|(at, _)| &name[at..]).filter(|suffix| suffix.len() > 1);
            if let Some(found) = suffixes.find_map(|suffix| self.wildcards.get(suffix)) {
                return Some(found);
            }
        }
        self.any.as_ref()
    }

    fn at(&mut self, name: Option<&str>) -> Result<&mut T, String> {
        let Some(said) = name.filter(|name| !name.is_empty()) else { return Ok(self.any.get_or_insert_default()) };
        let name = said.to_ascii_lowercase();
        match name.strip_prefix('*') {
            Some(suffix) if suffix.len() > 1 && suffix.starts_with('.') && !suffix.contains('*') => {
                Ok(self.wildcards.entry(suffix.to_owned()).or_default())
            }
            None if !name.contains('*') => Ok(self.exact.entry(name).or_default()),
            _ => Err(format!("server name {said:?} is neither a name nor '*.' and a name")),
        }
    }
}

/// What the inspectors saw, or none asked for.
#[derive(Debug)]
struct ByTransport<T> {
    raw: Option<T>,
    tls: Option<T>,
    any: Option<T>,
}

impl<T> Default for ByTransport<T> {
    fn default() -> Self {
        Self { raw: None, tls: None, any: None }
    }
}

impl<T: Default> ByTransport<T> {
    fn get(&self, transport: TransportProtocol) -> Option<&T> {
        let exact = match transport {
            TransportProtocol::RawBuffer => &self.raw,
            TransportProtocol::Tls => &self.tls,
        };
        exact.as_ref().or(self.any.as_ref())
    }

    fn at(&mut self, transport: Option<TransportProtocol>) -> &mut T {
        match transport {
            Some(TransportProtocol::RawBuffer) => &mut self.raw,
            Some(TransportProtocol::Tls) => &mut self.tls,
            None => &mut self.any,
        }
        .get_or_insert_default()
    }
}

/// Where the source is, or not asked for.
#[derive(Debug)]
struct BySourceType<T> {
    local: Option<T>,
    external: Option<T>,
    any: Option<T>,
}

impl<T> Default for BySourceType<T> {
    fn default() -> Self {
        Self { local: None, external: None, any: None }
    }
}

impl<T: Default> BySourceType<T> {
    fn get(&self, is_local: bool) -> Option<&T> {
        let exact = if is_local { &self.local } else { &self.external };
        exact.as_ref().or(self.any.as_ref())
    }

    fn at(&mut self, kind: SourceType) -> &mut T {
        match kind {
            SourceType::Any => &mut self.any,
            SourceType::SameIpOrLoopback => &mut self.local,
            SourceType::External => &mut self.external,
        }
        .get_or_insert_default()
    }
}

/// Adds a chain under every combination of what its match lists. The error is the first combination that cannot be or
/// that an earlier chain has; the others are added nevertheless.
fn insert(ports: &mut Exact<u16, Networks<Names>>, said: &ChainMatch, chain: usize) -> Result<(), String> {
    let by_destination = ports.at(said.destination_port);
    let mut result = Ok(());
    for net in networks(&said.prefix_ranges).iter() {
        for name in options(&said.server_names) {
            let transports = by_destination.at(*net).at(name.map(String::as_str));
            let one = transports.and_then(|t| insert_protocols(t.at(said.transport_protocol), said, chain));
            result = result.and(one);
        }
    }
    result
}

fn insert_protocols(
    protocols: &mut Exact<String, Networks<Types>>,
    said: &ChainMatch,
    chain: usize,
) -> Result<(), String> {
    let mut result = Ok(());
    for protocol in options(&said.application_protocols) {
        for direct in networks(&said.direct_source_prefix_ranges).iter() {
            let sources = protocols.at(protocol.cloned()).at(*direct).at(said.source_type);
            for source in networks(&said.source_prefix_ranges).iter() {
                for port in options(&said.source_ports) {
                    let place = sources.at(*source);
                    let slot = *match port {
                        Some(port) => place.known.entry(*port).or_insert(chain),
                        None => place.any.get_or_insert(chain),
                    };
                    if slot != chain {
                        result = Err(format!("it matches the same connections as filter chain {slot}"));
                    }
                }
            }
        }
    }
    result
}

/// Each of a list; an empty list asks for nothing.
fn options<T>(list: &[T]) -> impl Iterator<Item = Option<&T>> {
    list.iter().map(Some).chain(list.is_empty().then_some(None))
}

fn networks(list: &[IpNet]) -> Cow<'_, [IpNet]> {
    if !list.is_empty() {
        return Cow::Borrowed(list);
    }
    let v4 = Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0);
    let v6 = Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0);
    Cow::Owned(vec![v4.into(), v6.into()])
}

/// Lower case, without a copy when it is so already.
pub(super) fn lower(text: &str) -> Cow<'_, str> {
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Cow::Owned(text.to_ascii_lowercase());
    }
    Cow::Borrowed(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::Terminal;

    fn chain(name: &str) -> Arc<Chain> {
        Arc::new(Chain {
            name: name.into(),
            tls: None,
            l4: Box::default(),
            terminal: Terminal::Refuse("test".into()),
            unusable: None,
            handshake_timeout: None,
        })
    }

    fn matcher(chains: &[(&str, ChainMatch)]) -> ChainMatcher {
        let (matcher, problems) = ChainMatcher::new(chains.iter().map(|(n, m)| (m, chain(n))), Some(chain("default")));
        assert_eq!(problems, []);
        matcher
    }

    fn on_port(port: u16) -> ChainMatch {
        ChainMatch { destination_port: Some(port), ..ChainMatch::default() }
    }

    fn networks(list: &[&str]) -> Vec<IpNet> {
        list.iter().map(|net| net.parse().unwrap()).collect()
    }

    /// Destination, server name, TLS, protocols, source.
    fn found(m: &ChainMatcher, dst: &str, sni: &str, tls: bool, alpn: &[&str], src: &str) -> String {
        let alpn: Vec<String> = alpn.iter().map(|p| (*p).to_owned()).collect();
        let input = ChainInput {
            dst: dst.parse().unwrap(),
            src: src.parse().unwrap(),
            sni: (!sni.is_empty()).then_some(sni),
            transport: if tls { TransportProtocol::Tls } else { TransportProtocol::RawBuffer },
            alpn: &alpn,
        };
        m.find(&input).unwrap().name.to_string()
    }

    #[test]
    fn a_port_that_leads_nowhere_does_not_step_back() {
        let names = |port, name: &str| ChainMatch { server_names: vec![name.into()], ..port };
        let m = matcher(&[("80-a", names(on_port(80), "a")), ("any-b", names(ChainMatch::default(), "b"))]);
        for (dst, sni, expected) in [
            ("1.1.1.1:80", "a", "80-a"),
            ("1.1.1.1:80", "b", "default"),
            ("1.1.1.1:81", "b", "any-b"),
            ("1.1.1.1:81", "a", "default"),
        ] {
            assert_eq!(found(&m, dst, sni, true, &[], "9.9.9.9:1"), expected, "{dst} {sni}");
        }
    }

    #[test]
    fn the_longest_prefix_wins() {
        let nets = |list: &[&str]| ChainMatch { prefix_ranges: networks(list), ..ChainMatch::default() };
        let m = matcher(&[
            ("eight", nets(&["10.0.0.0/8"])),
            ("host", nets(&["10.1.2.3/32"])),
            ("sixteen", nets(&["10.1.9.9/16", "fd00::/8"])),
            ("all", nets(&["0.0.0.0/0"])),
        ]);
        for (dst, expected) in [
            ("10.1.2.3:1", "host"),
            ("10.1.2.4:1", "sixteen"),
            ("10.2.0.1:1", "eight"),
            ("11.0.0.1:1", "all"),
            ("[fd01::1]:1", "sixteen"),
            ("[::ffff:10.1.2.3]:1", "host"),
            ("[2001::1]:1", "default"),
        ] {
            assert_eq!(found(&m, dst, "", false, &[], "9.9.9.9:1"), expected, "{dst}");
        }
    }

    #[test]
    fn server_names() {
        let names = |list: &[&str]| ChainMatch {
            server_names: list.iter().map(|n| (*n).to_owned()).collect(),
            ..ChainMatch::default()
        };
        let m = matcher(&[
            ("exact", names(&["www.Example.com", "com"])),
            ("example", names(&["*.example.com"])),
            ("com", names(&["*.com"])),
            ("none", names(&[])),
        ]);
        for (sni, expected) in [
            ("WWW.example.COM", "exact"),
            ("a.example.com", "example"),
            ("a.b.example.com", "example"),
            ("example.com", "com"),
            (".example.com", "com"),
            ("com", "exact"),
            ("org", "none"),
            ("", "none"),
        ] {
            assert_eq!(found(&m, "1.1.1.1:1", sni, true, &[], "9.9.9.9:1"), expected, "{sni}");
        }
        for name in ["*", "a*", "*.*.a", "*a"] {
            let said = names(&[name]);
            let (_, problems) = ChainMatcher::new([(&said, chain("x"))], None);
            assert_eq!(problems.len(), 1, "{name}");
        }
    }

    /// The chains of an inbound port in PERMISSIVE mode.
    #[test]
    fn permissive_auto_port() {
        let with = |tls, protocols: &[&str]| ChainMatch {
            transport_protocol: Some(if tls { TransportProtocol::Tls } else { TransportProtocol::RawBuffer }),
            application_protocols: protocols.iter().map(|p| (*p).to_owned()).collect(),
            ..on_port(80)
        };
        let m = matcher(&[
            ("mtls-http", with(true, &["istio-http/1.0", "istio-http/1.1", "istio-h2"])),
            ("http", with(false, &["http/1.1", "h2c"])),
            ("mtls-tcp", with(true, &["istio-peer-exchange", "istio"])),
            ("raw", with(false, &[])),
            ("tls", with(true, &[])),
        ]);
        for (tls, alpn, expected) in [
            (true, &["istio-http/1.1", "istio", "http/1.1"][..], "mtls-http"),
            (true, &["istio", "istio-h2"], "mtls-tcp"),
            (true, &["h2", "http/1.1"], "tls"),
            (true, &[], "tls"),
            (false, &["http/1.1"], "http"),
            (false, &["http/1.0"], "raw"),
            (false, &[], "raw"),
        ] {
            assert_eq!(found(&m, "1.1.1.1:80", "", tls, alpn, "9.9.9.9:1"), expected, "{tls} {alpn:?}");
        }
        assert_eq!(found(&m, "1.1.1.1:81", "", false, &[], "9.9.9.9:1"), "default");
    }

    #[test]
    fn sources() {
        let any = ChainMatch::default;
        let m = matcher(&[
            ("local", ChainMatch { source_type: SourceType::SameIpOrLoopback, ..any() }),
            ("net", ChainMatch { source_prefix_ranges: networks(&["9.0.0.0/8"]), ..any() }),
            ("port", ChainMatch { source_prefix_ranges: networks(&["9.0.0.0/8"]), source_ports: vec![7], ..any() }),
            ("direct", ChainMatch { direct_source_prefix_ranges: networks(&["8.0.0.0/8"]), ..any() }),
        ]);
        for (src, expected) in [
            ("127.0.0.1:1", "local"),
            ("1.1.1.1:1", "local"),
            ("9.0.0.1:1", "net"),
            ("9.0.0.1:7", "port"),
            ("8.0.0.1:7", "direct"),
            ("7.0.0.1:7", "default"),
        ] {
            assert_eq!(found(&m, "1.1.1.1:1", "", false, &[], src), expected, "{src}");
        }
    }

    #[test]
    fn the_first_of_equal_matches_stays() {
        let (a, b) = (on_port(80), on_port(80));
        let (m, problems) = ChainMatcher::new([(&a, chain("first")), (&b, chain("second"))], None);
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].0, 1);
        assert_eq!(found(&m, "1.1.1.1:80", "", false, &[], "9.9.9.9:1"), "first");
        assert_eq!(m.all().count(), 2);
    }
}
