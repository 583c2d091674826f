//! Bytes: one connection here, one there, and what goes between them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_utils::CachePadded;
use tokio::time::sleep;

use super::conn::{Conn, check_policy};
use super::ctx::{local_principal, peer_principal, service};
use super::exchange::Exchanged;
use super::live::{Now, chain_now};
use super::quiet::Quiet;
use super::server_first::Early;
use crate::drain::Phase;
use crate::error::{Error, Flags, Kind};
use crate::net::{Stream, copy};
use crate::snapshot::{Filter, TcpChain};
use crate::telemetry::{Labels, Protocol, RecordKind, TcpMetrics, TcpReport};
use crate::upstream::{self, ClusterLocal, TcpCall, TcpUpstream, Trace, View};

/// Tries until an upstream connection stands, as Envoy's default.
const CONNECT_ATTEMPTS: u32 = 1;

/// Relays a connection to its end. `early`: its upstream connection stands already.
pub(super) async fn serve(client: Stream, conn: &Arc<Conn>, chain: &TcpChain, early: Option<Early>) {
    let mut account = Account::open(conn, chain);
    let upstream = match early {
        Some(Early { upstream, cluster, trace }) => {
            account.trace = trace;
            account.cluster = Some(cluster);
            Ok(upstream)
        }
        None => Box::pin(account.connect()).await,
    };
    let mut upstream = match upstream {
        Ok(upstream) => upstream,
        Err(error) => {
            account.failed(&error);
            client.reset_on_drop();
            return;
        }
    };
    account.connected(&upstream);
    let mut client = Exchanged::new(client, exchanges(conn));
    let is_peer = account.exchanges(&upstream);
    let mut server = Exchanged::new(&mut upstream.stream, is_peer);
    let relay = copy::both(&mut client, &mut server, &account.counters, chain.idle_timeout);
    let outcome = tokio::select! {
        biased;
        end = relay => Outcome::Ended(end),
        outcome = Quiet::new(until_over(conn, chain)) => outcome,
    };
    account.ended(outcome);
}

/// Whether the client's proxy puts its metadata in front.
fn exchanges(conn: &Conn) -> bool {
    let Some(alpn) = conn.tls.as_ref().and_then(|peer| peer.alpn.as_deref()) else { return false };
    conn.chain.l4.iter().any(|filter| matches!(filter, Filter::MetadataExchange(name) if **name == *alpn))
}

/// How a relay ended.
enum Outcome {
    Ended(copy::End),
    TooOld,
    Left,
    Denied(String),
}

/// Opens the upstream connection of a client.
pub(super) async fn dial(
    view: &View,
    chain: &TcpChain,
    (peer, destination): (SocketAddr, SocketAddr),
    trace: &mut Trace,
) -> Result<(TcpUpstream, Arc<ClusterLocal>), (Error, Option<Arc<ClusterLocal>>)> {
    let nowhere = || (Error::local(Kind::NoCluster), None);
    let cluster = chain.clusters.pick(fastrand::u64(..)).ok_or_else(nowhere)?;
    let id = view.snap.resolve(cluster).ok_or_else(nowhere)?;
    let cluster = view.cluster(id);
    let call = TcpCall {
        cluster,
        max_connect_attempts: CONNECT_ATTEMPTS,
        hash: chain.hash_source_ip.then(|| upstream::xx_hash(peer.ip().to_string().as_bytes())),
        original_dst: Some(destination),
        client: Some((peer, destination)),
    };
    match upstream::connect_tcp(&call, trace).await {
        Ok(upstream) => Ok((upstream, Arc::clone(cluster))),
        Err(error) => Err((error, Some(Arc::clone(cluster)))),
    }
}

/// Waits for a reason to end a connection that goes on.
async fn until_over(conn: &Conn, chain: &TcpChain) -> Outcome {
    let mut drain = conn.env.drain.clone();
    tokio::select! {
        () = limit(chain.max_duration) => Outcome::TooOld,
        () = drain.reached(Phase::Gone) => Outcome::Left,
        details = denied(conn) => Outcome::Denied(details),
    }
}

async fn limit(duration: Option<Duration>) {
    match duration {
        Some(duration) => sleep(duration).await,
        None => std::future::pending().await,
    }
}

/// Ends when policy no longer lets this connection be, with the details. Only policy closes a connection: other changes
/// of its chain are for new connections.
pub(super) async fn denied(conn: &Conn) -> String {
    let mut views = conn.env.view.subscribe();
    // What changed before we listened was not judged yet.
    views.mark_changed();
    while views.changed().await.is_ok() {
        let view = Arc::clone(&views.borrow_and_update());
        if let Some(details) = judge(&view, conn) {
            return details;
        }
    }
    std::future::pending().await
}

/// What the policy of the chain that would take this connection now says. That no chain would, is policy only inbound: a
/// peer that has to authenticate now and did not.
fn judge(view: &View, conn: &Conn) -> Option<String> {
    match chain_now(view, conn, &conn.chain) {
        Now::Same => None,
        Now::Gone if view.snap.listener(&conn.listener.name).is_none() => None,
        Now::Gone => conn.is_inbound().then(|| Kind::NoChain.row().details.to_owned()),
        // New connections are refused there, and no policy stands where one cannot be used.
        Now::Other(chain) if chain.unusable.is_some() && conn.is_inbound() => {
            Some(Kind::PolicyUnusable.row().details.to_owned())
        }
        Now::Other(chain) => check_policy(chain, &conn.attributes(), &conn.env).err(),
    }
}

/// What a connection counts and logs, settled when it is dropped.
struct Account<'a> {
    metrics: Arc<CachePadded<TcpMetrics>>,
    conn: &'a Conn,
    chain: &'a TcpChain,
    cluster: Option<Arc<ClusterLocal>>,
    trace: Trace,
    counters: copy::Counters,
    report: Option<TcpReport>,
    upstream_host: Option<SocketAddr>,
    flags: Flags,
    details: String,
    settled: bool,
}

impl<'a> Account<'a> {
    fn open(conn: &'a Conn, chain: &'a TcpChain) -> Self {
        let metrics = conn.env.shard().tcp(&chain.stat_prefix);
        metrics.cx_total.inc();
        metrics.cx_active.inc();
        Self {
            metrics,
            conn,
            chain,
            cluster: None,
            trace: Trace::default(),
            counters: copy::Counters::default(),
            report: None,
            upstream_host: None,
            flags: Flags::NONE,
            details: String::new(),
            settled: false,
        }
    }

    async fn connect(&mut self) -> Result<TcpUpstream, Error> {
        let view = self.conn.env.view();
        let ends = (self.conn.peer, self.conn.destination);
        match dial(&view, self.chain, ends, &mut self.trace).await {
            Ok((upstream, cluster)) => {
                self.cluster = Some(cluster);
                Ok(upstream)
            }
            Err((error, cluster)) => {
                self.cluster = cluster;
                Err(error)
            }
        }
    }

    fn connected(&mut self, upstream: &TcpUpstream) {
        self.upstream_host = Some(upstream.host.address);
        self.report = Some(self.conn.env.shard().open_tcp(&self.labels()));
    }

    /// Whether the server's proxy puts its metadata in front.
    fn exchanges(&self, upstream: &TcpUpstream) -> bool {
        let said = self.cluster.as_ref().and_then(|cluster| cluster.shared.config.metadata_exchange.as_deref());
        said.is_some() && said == upstream.peer.as_ref().and_then(|peer| peer.alpn.as_deref())
    }

    fn failed(&mut self, error: &Error) {
        tracing::debug!(peer = %self.conn.peer, %error, "upstream connection failed");
        self.flags.insert(error.kind.row().flag);
        if matches!(error.kind, Kind::NoCluster) {
            self.metrics.cx_no_route.inc();
        }
        if self.report.is_none() {
            // A refused connection is one that was opened and closed.
            self.report = Some(self.conn.env.shard().open_tcp(&self.labels()));
        }
        self.settled = true;
    }

    fn ended(&mut self, outcome: Outcome) {
        self.settled = true;
        match outcome {
            Outcome::Denied(details) => self.details = details,
            Outcome::TooOld => {
                self.metrics.max_duration.inc();
                self.flags.insert(Flags::DT);
            }
            Outcome::Ended(copy::End::Upstream(e)) => {
                let is_reset = e.kind() == std::io::ErrorKind::ConnectionReset;
                self.flags.insert(if is_reset { Flags::UR } else { Flags::UC });
            }
            Outcome::Ended(copy::End::Client(_)) => self.flags.insert(Flags::DC),
            Outcome::Ended(copy::End::Idle) => self.metrics.idle_timeout.inc(),
            Outcome::Ended(copy::End::Done(_)) | Outcome::Left => {}
        }
    }

    fn labels(&self) -> Labels<'_> {
        Labels {
            reporter: self.conn.reporter(),
            protocol: Protocol::Tcp,
            service: self.cluster.as_ref().and_then(service),
            cluster: self.cluster_name(),
            authority: "",
            workload: self.trace.host.as_ref().map_or("", |host| &host.workload),
            local_principal: local_principal(self.conn, &[], &self.trace),
            peer_principal: peer_principal(self.conn, &self.trace),
            code: 0,
            grpc_status: None,
            flags: self.flags | self.trace.flags,
        }
    }

    fn cluster_name(&self) -> &str {
        self.cluster.as_ref().map_or("", |cluster| &cluster.shared.name)
    }
}

impl Drop for Account<'_> {
    fn drop(&mut self) {
        self.flags.insert(self.trace.flags);
        if !self.settled {
            self.flags.insert(Flags::DC);
        }
        let sent = *self.counters.received.get_mut();
        let received = *self.counters.sent.get_mut();
        if let Some(report) = self.report.take() {
            report.bytes(sent, received);
        }
        self.metrics.cx_active.dec();
        self.metrics.cx_rx_bytes.add(received);
        self.metrics.cx_tx_bytes.add(sent);
        let Some(sink) = self.conn.env.log().filter(|sink| sink.wants(&self.chain.access_log)) else { return };
        let mut record = self.conn.record(RecordKind::Tcp, self.conn.started, self.conn.start.elapsed());
        record.flags = self.flags;
        record.termination_details = &self.details;
        record.transport_failure = self.trace.transport_failure.as_deref().unwrap_or_default();
        record.bytes_sent = sent;
        record.bytes_received = received;
        record.upstream_cluster = self.cluster_name();
        record.upstream_host = self.upstream_host.or_else(|| self.trace.host.as_ref().map(|host| host.address));
        record.upstream_local = self.trace.upstream_local;
        record.attempts = self.trace.attempts;
        sink.log(&record, &self.chain.access_log);
    }
}
