//! Clusters: sockets, hosts, breakers.

use std::sync::Arc;

use proxy_config::model;

use super::host::{Breakers, HostSet};
use super::hosts::Hosts;
use super::{ClusterId, Name, TcpExchange};
use crate::tls::{ClientTls, Secrets};

/// A reference to a cluster by name. The hint makes resolving free while the cluster stays where it was; a wrong hint
/// costs a hash lookup, so a table compiled against an older snapshot stays right.
#[derive(Debug, Clone)]
pub struct ClusterRef {
    /// Cluster name.
    pub name: Name,
    pub(super) hint: u32,
}

/// A cluster as all workers share it.
#[derive(Debug)]
pub struct ClusterShared {
    /// Name.
    pub name: Name,
    /// What was said.
    pub config: Arc<model::Cluster>,
    /// Limits and use; the same object for all versions of this cluster.
    pub breakers: Arc<Breakers>,
    /// Hosts, compiled when they are first asked for; [`Self::hosts`] asks.
    pub hosts: Arc<Hosts>,
    /// Sockets: one for each transport match, the default last; [`super::Host::transport`] is an index.
    pub transports: Arc<[Transport]>,
    /// Peer metadata on its TCP connections.
    pub exchange: Option<Arc<TcpExchange>>,
}

impl ClusterShared {
    /// A cluster outside any snapshot, for tests and benches of what uses clusters.
    pub fn alone(config: model::Cluster, hosts: &model::Endpoints, secrets: &Secrets) -> Self {
        let matches = config.transport_matches.iter().map(|m| &m.transport);
        let transports =
            matches.chain([&config.transport]).map(|said| Transport::compile(said, &config, secrets)).collect();
        let config = Arc::new(config);
        let breakers = Arc::new(Breakers::new(&config.limits));
        Self {
            name: Arc::clone(&config.name),
            hosts: Arc::new(Hosts::new(Some(Arc::new(hosts.clone())), &config, &breakers)),
            breakers,
            transports,
            exchange: config.metadata_exchange.as_ref().map(TcpExchange::new),
            config,
        }
    }

    /// The same cluster with another load assignment; hosts that stay keep their statistics.
    #[must_use]
    pub fn with_hosts(&self, hosts: &model::Endpoints) -> Self {
        Self {
            name: Arc::clone(&self.name),
            config: Arc::clone(&self.config),
            breakers: Arc::clone(&self.breakers),
            hosts: Arc::new(Hosts::new(Some(Arc::new(hosts.clone())), &self.config, &self.breakers)),
            transports: Arc::clone(&self.transports),
            exchange: self.exchange.clone(),
        }
    }

    /// Its hosts, compiled now if nobody has asked before. Whoever only wants to see them uses [`Hosts::look`].
    pub fn hosts(&self) -> &HostSet {
        self.hosts.get()
    }

    /// Its name in statistics: `alt_stat_name`, up to the `;` by which Istio marks its end.
    pub fn stat_name(&self) -> &str {
        match self.config.alt_stat_name.split(';').next() {
            None | Some("") => &self.name,
            Some(name) => name,
        }
    }

    /// The socket of a host.
    pub fn transport(&self, host: &super::Host) -> &Transport {
        self.transports.get(host.transport).unwrap_or_else(|| self.default_transport())
    }

    /// The socket when no match is configured or none fits.
    pub fn default_transport(&self) -> &Transport {
        self.transports.last().expect("the default socket is always there")
    }
}

/// A compiled transport socket.
#[derive(Clone, PartialEq)]
pub enum Transport {
    /// Plaintext.
    Raw,
    /// TLS.
    Tls(ClientTls),
    /// PROXY protocol header (version 1 or 2) in front of another socket.
    ProxyProtocol(u8, Box<Self>),
    /// Cannot be used, and why (no certificate yet, not supported).
    Unusable(Name),
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Raw => f.write_str("raw"),
            Self::Tls(_) => f.write_str("tls"),
            Self::ProxyProtocol(version, inner) => write!(f, "proxy-protocol v{version} over {inner:?}"),
            Self::Unusable(why) => write!(f, "unusable: {why}"),
        }
    }
}

impl Transport {
    /// Why it cannot be used, if so.
    pub fn unusable(&self) -> Option<&Name> {
        match self {
            Self::Unusable(why) => Some(why),
            Self::ProxyProtocol(_, inner) => inner.unusable(),
            Self::Raw | Self::Tls(_) => None,
        }
    }

    /// Compiles; what cannot be used is compiled too, with its reason.
    /// `cluster` may ask that the certificate carries the name that was asked for (`auto_san_validation`).
    pub fn compile(said: &model::Transport, cluster: &model::Cluster, secrets: &Secrets) -> Self {
        match said {
            model::Transport::Raw => Self::Raw,
            model::Transport::Tls(tls) => {
                let mut tls = (**tls).clone();
                tls.auto_sni_san_validation |= cluster.http.auto_san_validation;
                match ClientTls::compile(&tls, secrets) {
                    Ok(tls) => Self::Tls(tls),
                    Err(why) => Self::Unusable(why.into()),
                }
            }
            model::Transport::ProxyProtocol(version, inner) => {
                Self::ProxyProtocol(*version, Box::new(Self::compile(inner, cluster, secrets)))
            }
            model::Transport::Unsupported(name) => {
                Self::Unusable(format!("transport socket {name} is not supported").into())
            }
        }
    }
}

/// Clusters with weights; one entry takes everything.
#[derive(Debug, Clone)]
pub struct WeightedClusters {
    entries: Box<[(ClusterRef, u64)]>,
}

impl WeightedClusters {
    pub(super) fn new(entries: impl IntoIterator<Item = (ClusterRef, u32)>) -> Self {
        let mut sum = 0;
        let running = entries.into_iter().map(|(cluster, weight)| {
            sum += u64::from(weight);
            (cluster, sum)
        });
        Self { entries: running.collect() }
    }

    /// One of them for a draw; `None` when nothing has weight.
    pub fn pick(&self, draw: u64) -> Option<&ClusterRef> {
        if let [(only, _)] = &*self.entries {
            return Some(only);
        }
        let total = self.entries.last().map_or(0, |(_, sum)| *sum);
        let at = draw.checked_rem(total)?;
        self.entries.iter().find(|(_, sum)| at < *sum).map(|(cluster, _)| cluster)
    }

    /// Names and weights.
    pub fn iter(&self) -> impl Iterator<Item = (&ClusterRef, u64)> {
        let mut before = 0;
        self.entries.iter().map(move |(cluster, sum)| {
            let weight = sum - before;
            before = *sum;
            (cluster, weight)
        })
    }
}

/// Assigns hints while tables are compiled.
pub(super) struct Ids<'a>(pub(super) &'a super::ByName<ClusterId>);

impl Ids<'_> {
    pub(super) fn refer(&self, name: &Name) -> ClusterRef {
        ClusterRef { name: Arc::clone(name), hint: self.0.get(name).map_or(u32::MAX, |id| id.0) }
    }
}
