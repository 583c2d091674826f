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
        found.or(if ip.is_ipv4() { self.v4.as_ref() } else { self.v6.as_ref() })
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

/// Adds a chain under every combination of what its match lists.
fn insert(ports: &mut Exact<u16, Networks<Names>>, said: &ChainMatch, chain: usize) -> Result<(), String> {
    let by_destination = ports.at(said.destination_port);
    for net in networks(&said.prefix_ranges).iter() {
        for name in options(&said.server_names) {
            let transports = by_destination.at(*net).at(name.map(String::as_str))?;
            insert_protocols(transports.at(said.transport_protocol), said, chain)?;
        }
    }
    Ok(())
}

fn insert_protocols(
    protocols: &mut Exact<String, Networks<Types>>,
    said: &ChainMatch,
    chain: usize,
) -> Result<(), String> {
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
                        return Err(format!("it matches the same connections as filter chain {slot}"));
                    }
                }
            }
        }
    }
    Ok(())
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
