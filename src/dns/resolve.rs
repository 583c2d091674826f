//! Asking for addresses: `/etc/hosts` first, then the resolvers of `/etc/resolv.conf` with its search list.
//!
//! `getaddrinfo` is out of the question: in a static binary it needs the shared libraries of the machine that built it.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::rr::RecordType;
use hickory_resolver::{MAX_TTL, TokioResolver, system_conf};
use tokio::time::timeout;

/// Longest wait for an answer, whatever `/etc/resolv.conf` says of timeouts, attempts and search domains.
const LIMIT: Duration = Duration::from_secs(10);

const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";

/// Which addresses of a name are wanted (Envoy's `DnsLookupFamily`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub enum Family {
    /// IPv6, and IPv4 where there is none.
    #[default]
    Auto,
    /// IPv4.
    V4Only,
    /// IPv6.
    V6Only,
    /// IPv4, and IPv6 where there is none.
    V4Preferred,
    /// Both.
    All,
}

impl Family {
    /// By Envoy's name of it; `AUTO`, its default, for any other word.
    pub fn named(name: &str) -> Self {
        match name {
            "V4_ONLY" => Self::V4Only,
            "V6_ONLY" => Self::V6Only,
            "V4_PREFERRED" => Self::V4Preferred,
            "ALL" => Self::All,
            _ => Self::Auto,
        }
    }

    /// Those of the addresses that are wanted, in order.
    fn of(self, all: &[IpAddr]) -> Vec<IpAddr> {
        let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = all.iter().partition(|ip| ip.is_ipv4());
        match self {
            Self::V4Only => v4,
            Self::V6Only => v6,
            Self::Auto if v6.is_empty() => v4,
            Self::Auto => v6,
            Self::V4Preferred if v4.is_empty() => v6,
            Self::V4Preferred => v4,
            Self::All => all.to_vec(),
        }
    }
}

/// What a name means at the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// Addresses in the order of the answer, each once. Empty: the name is known to have none.
    pub addresses: Vec<IpAddr>,
    /// How long the answer holds, by its shortest-lived record; `None` where nobody said (`/etc/hosts`, a literal address).
    pub ttl: Option<Duration>,
}

/// No answer: nobody was reached, or who was could not say.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{host} is not resolved: {why}")]
pub struct Error {
    /// What was asked for.
    pub host: String,
    /// What went wrong.
    pub why: String,
}

/// Asks for addresses. Cheap to clone; remembers no answers, so that every question is a question.
#[derive(Clone)]
pub struct Resolver {
    /// Resolvers to ask; empty: the host's.
    servers: Arc<[SocketAddr]>,
    /// Whose names nobody else is asked for; none with given resolvers.
    hosts: Option<Arc<Path>>,
    current: Arc<Mutex<Option<Read>>>,
}

/// The files as they were, and what they said.
type Read = (Stamps, Arc<Current>);

/// What the files said when they were read last.
struct Current {
    hosts: HashMap<String, Vec<IpAddr>>,
    resolver: TokioResolver,
}

impl std::fmt::Debug for Resolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resolver").field("servers", &self.servers).finish_non_exhaustive()
    }
}

/// When and how large the files were that a resolver was made from.
type Stamps = [Option<(SystemTime, u64)>; 2];

impl Resolver {
    /// With the host's own files. They are looked at again when they change: a container may start before its network.
    pub fn system() -> Self {
        Self { servers: Arc::from([]), hosts: Some(Path::new(HOSTS).into()), current: Arc::default() }
    }

    /// With these resolvers and without a search list.
    pub fn with_servers(servers: &[SocketAddr]) -> Self {
        Self { servers: servers.into(), hosts: None, current: Arc::default() }
    }

    /// With names of this file, in the form of hosts(5), before all resolvers.
    #[must_use]
    pub fn with_hosts(self, file: &Path) -> Self {
        Self { hosts: Some(file.into()), current: Arc::default(), ..self }
    }

    /// The addresses of a name or literal address, within ten seconds. A name that does not exist, or has no address of
    /// the family, is an answer without addresses.
    ///
    /// # Errors
    /// No resolver could say.
    pub async fn addresses(&self, host: &str, family: Family) -> Result<Answer, Error> {
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(Answer { addresses: vec![ip], ttl: None });
        }
        let failed = |why: String| Error { host: host.to_owned(), why };
        let current = self.current().map_err(|e| failed(e.to_string()))?;
        if let Some(known) = current.hosts.get(&host.trim_end_matches('.').to_ascii_lowercase()) {
            // The other family is not asked for elsewhere, as with getaddrinfo: who wrote the line means it.
            return Ok(Answer { addresses: family.of(known), ttl: None });
        }
        match timeout(LIMIT, ask(&current.resolver, host, family)).await {
            Ok(answer) => answer.map_err(|e| failed(e.to_string())),
            Err(_) => Err(failed(format!("no answer within {LIMIT:?}"))),
        }
    }

    fn current(&self) -> Result<Arc<Current>, NetError> {
        let stamps = [stamp(Path::new(RESOLV_CONF)), self.hosts.as_deref().and_then(stamp)];
        // Whoever panicked with the lock held left a whole value behind: it is only replaced.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        match &*current {
            Some((of, known)) if *of == stamps => Ok(Arc::clone(known)),
            _ => {
                let hosts = self.hosts.as_deref().map(read_hosts).unwrap_or_default();
                let fresh = Arc::new(Current { hosts, resolver: build(&self.servers)? });
                *current = Some((stamps, Arc::clone(&fresh)));
                Ok(fresh)
            }
        }
    }
}

/// Names of a file in the form of hosts(5); one that cannot be read has none.
fn read_hosts(file: &Path) -> HashMap<String, Vec<IpAddr>> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let mut hosts: HashMap<String, Vec<IpAddr>> = HashMap::new();
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let Some(address) = words.next().and_then(|word| word.parse().ok()) else { continue };
        for name in words {
            let known = hosts.entry(name.to_ascii_lowercase()).or_default();
            if !known.contains(&address) {
                known.push(address);
            }
        }
    }
    hosts
}

fn stamp(file: &Path) -> Option<(SystemTime, u64)> {
    std::fs::metadata(file).and_then(|m| Ok((m.modified()?, m.len()))).ok()
}

fn build(servers: &[SocketAddr]) -> Result<TokioResolver, NetError> {
    let (config, mut options) = if servers.is_empty() { host_settings() } else { settings(servers) };
    options.cache_size = 0;
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    builder.build()
}

/// The host's settings; where `/etc/resolv.conf` is missing or names nobody, the machine itself is asked (resolv.conf(5)).
fn host_settings() -> (ResolverConfig, ResolverOpts) {
    system_conf::read_system_conf().unwrap_or_else(|e| {
        tracing::warn!("{RESOLV_CONF}: {e}; names are asked of this machine");
        settings(&[SocketAddr::from((Ipv4Addr::LOCALHOST, 53))])
    })
}

fn settings(servers: &[SocketAddr]) -> (ResolverConfig, ResolverOpts) {
    let at = |port| {
        move |mut way: ConnectionConfig| {
            way.port = port;
            way
        }
    };
    let server = |to: &SocketAddr| {
        let ways = [ConnectionConfig::udp(), ConnectionConfig::tcp()].map(at(to.port()));
        NameServerConfig::new(to.ip(), true, ways.into())
    };
    (ResolverConfig::from_name_servers(servers.iter().map(server).collect()), ResolverOpts::default())
}

async fn ask(resolver: &TokioResolver, host: &str, family: Family) -> Result<Answer, NetError> {
    use RecordType::{A, AAAA};
    let first_of = async |first, second| {
        let answer = records(resolver, host, first).await;
        match answer {
            Ok(answer) if !answer.addresses.is_empty() => Ok(answer),
            other => either(other, records(resolver, host, second).await),
        }
    };
    match family {
        Family::V4Only => records(resolver, host, A).await,
        Family::V6Only => records(resolver, host, AAAA).await,
        Family::Auto => first_of(AAAA, A).await,
        Family::V4Preferred => first_of(A, AAAA).await,
        Family::All => {
            let (v4, v6) = tokio::join!(records(resolver, host, A), records(resolver, host, AAAA));
            either(v4, v6)
        }
    }
}

/// Both answers together. One that failed matters only where the other has nothing.
fn either(a: Result<Answer, NetError>, b: Result<Answer, NetError>) -> Result<Answer, NetError> {
    let (mut both, other) = match (a, b) {
        (Ok(a), Ok(b)) => (a, b),
        (Ok(one), Err(e)) | (Err(e), Ok(one)) if one.addresses.is_empty() => return Err(e),
        (Ok(one), Err(_)) | (Err(_), Ok(one)) => return Ok(one),
        (Err(e), Err(_)) => return Err(e),
    };
    both.addresses.extend(other.addresses);
    both.ttl = both.ttl.into_iter().chain(other.ttl).min();
    Ok(both)
}

async fn records(resolver: &TokioResolver, host: &str, kind: RecordType) -> Result<Answer, NetError> {
    let found = match resolver.lookup(host, kind).await {
        Ok(found) => found,
        Err(e) if e.is_nx_domain() || e.is_no_records_found() => return Ok(Answer::default()),
        Err(e) => return Err(e),
    };
    let mut answer = Answer::default();
    for record in found.answers() {
        let Some(ip) = record.data.ip_addr() else { continue };
        if !answer.addresses.contains(&ip) {
            answer.addresses.push(ip);
        }
        // The library's word for "for ever", which it gives to lines of /etc/hosts.
        if record.ttl < MAX_TTL {
            let ttl = Duration::from_secs(record.ttl.into());
            answer.ttl = Some(answer.ttl.map_or(ttl, |shortest| shortest.min(ttl)));
        }
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::server;
    use super::*;

    fn answer(addresses: &[&str], ttl: Option<u64>) -> Answer {
        let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        Answer { addresses, ttl: ttl.map(Duration::from_secs) }
    }

    #[tokio::test]
    async fn families() {
        let resolver = server().await;
        for (host, family, expected) in [
            ("two.example", Family::V4Only, answer(&["10.0.0.1", "10.0.0.2"], Some(20))),
            ("two.example", Family::V6Only, answer(&["fd00::1"], Some(10))),
            ("two.example", Family::Auto, answer(&["fd00::1"], Some(10))),
            ("two.example", Family::V4Preferred, answer(&["10.0.0.1", "10.0.0.2"], Some(20))),
            ("two.example", Family::All, answer(&["10.0.0.1", "10.0.0.2", "fd00::1"], Some(10))),
            ("four.example", Family::Auto, answer(&["10.0.0.4"], Some(5))),
            ("four.example", Family::V6Only, answer(&[], None)),
            ("nobody.example", Family::All, answer(&[], None)),
            ("10.1.2.3", Family::V6Only, answer(&["10.1.2.3"], None)),
            ("fd00::7", Family::V4Only, answer(&["fd00::7"], None)),
        ] {
            assert_eq!(resolver.addresses(host, family).await.unwrap(), expected, "{host} {family:?}");
        }
    }

    #[tokio::test]
    async fn who_cannot_say_is_no_answer() {
        let error = server().await.addresses("broken.example", Family::All).await.unwrap_err();
        assert_eq!(error.host, "broken.example");
        assert!(!error.why.is_empty());
    }

    #[tokio::test]
    async fn the_host_knows_itself() {
        let found = Resolver::system().addresses("localhost", Family::V4Only).await.unwrap();
        assert_eq!(found, answer(&["127.0.0.1"], None));
    }

    #[tokio::test]
    async fn a_name_of_the_hosts_file_is_asked_of_nobody() {
        // Bound and never read: whoever asks waits.
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "# a VM's\n10.0.0.9 istiod.istio-system.svc istiod # here\nfd00::9 six\nbad x\n")
            .unwrap();
        let resolver = Resolver::with_servers(&[silent.local_addr().unwrap()]).with_hosts(file.path());
        for (host, family, expected) in [
            ("istiod.istio-system.svc", Family::Auto, answer(&["10.0.0.9"], None)),
            ("Istiod.", Family::All, answer(&["10.0.0.9"], None)),
            ("istiod", Family::V6Only, answer(&[], None)),
            ("six", Family::V4Preferred, answer(&["fd00::9"], None)),
        ] {
            assert_eq!(resolver.addresses(host, family).await.unwrap(), expected, "{host} {family:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silence_ends() {
        // Bound and never read.
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let resolver = Resolver::with_servers(&[silent.local_addr().unwrap()]);
        let start = tokio::time::Instant::now();
        resolver.addresses("two.example", Family::All).await.unwrap_err();
        assert!(start.elapsed() <= LIMIT);
    }

    #[test]
    fn names_of_families() {
        for (name, family) in [("V4_ONLY", Family::V4Only), ("ALL", Family::All), ("AUTO", Family::Auto)] {
            assert_eq!(Family::named(name), family);
        }
    }
}
