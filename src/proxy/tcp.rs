//! Bytes: one connection here, one there, and what goes between them.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_utils::CachePadded;
use tokio::time::sleep;

use super::conn::{Conn, Ends, check_policy};
use super::ctx::{local_principal, peer_principal, service};
use super::exchange::{self, Exchanged, Known};
use super::live::{Now, chain_now};
use super::quiet::Quiet;
use super::server_first::Early;
use crate::drain::Phase;
use crate::error::{Error, Flags, Kind};
use crate::net::{Stream, copy};
use crate::snapshot::{Filter, TcpChain, TcpExchange};
use crate::telemetry::{
    Facts, Labels, Moving, Overrides, Peer, Protocol, Record, RecordKind, Stats, TcpMetrics, TcpReport, Values,
};
use crate::upstream::{self, ClusterLocal, TcpCall, TcpUpstream, Trace, View};

/// Tries until an upstream connection stands, as Envoy's default.
const CONNECT_ATTEMPTS: u32 = 1;

/// Relays a connection to its end. `early`: its upstream connection stands already.
pub(super) async fn serve(client: Stream, conn: &Arc<Conn>, chain: &TcpChain, early: Option<Early>) {
    // Apart from the future, which every kind of connection pays for.
    let mut account = Box::new(Account::open(conn, chain));
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
    account.upstream_host = Some(upstream.host.address);
    let mut client = Exchanged::new(client, exchange_with_client(conn));
    let towards_server = account.exchange_with(&upstream);
    let mut server = Exchanged::new(&mut upstream.stream, towards_server.as_ref());
    let mut known = if conn.is_inbound() { client.known() } else { server.known() };
    let bytes = Arc::clone(&account.bytes);
    let mut relay = pin!(relay(&mut client, &mut server, conn, &bytes.0, chain.idle_timeout));
    let mut over = pin!(Quiet::new(until_over(conn, chain)));
    let ended = tokio::select! {
        biased;
        end = &mut relay => Some(Outcome::Ended(end)),
        outcome = &mut over => Some(outcome),
        now_known = exchange::settled(&mut known) => {
            account.peer_known(&now_known);
            account.opened();
            None
        }
    };
    let outcome = match ended {
        Some(outcome) => outcome,
        None => tokio::select! {
            biased;
            end = &mut relay => Outcome::Ended(end),
            outcome = &mut over => outcome,
        },
    };
    if account.report.is_none() {
        let at_last = known.borrow().clone();
        account.peer_known(&at_last);
    }
    account.ended(outcome);
}

/// Tells the peers of us and relays bytes.
async fn relay(
    client: &mut Exchanged<Stream>,
    server: &mut Exchanged<&mut Stream>,
    conn: &Conn,
    counters: &copy::Counters,
    idle: Option<Duration>,
) -> copy::End {
    let node = &conn.env.node;
    let metrics = &conn.env.shard().exchange;
    if let Err(error) = server.tell(node, metrics).await {
        return copy::End::Upstream(error);
    }
    if let Err(error) = client.tell(node, metrics).await {
        return copy::End::Client(error);
    }
    copy::both(client, server, counters, idle).await
}

/// The exchange that the client's proxy and we agreed on.
fn exchange_with_client(conn: &Conn) -> Option<&Arc<TcpExchange>> {
    let alpn = conn.tls.as_ref().and_then(|peer| peer.alpn.as_deref());
    let said =
        conn.chain.l4.iter().find_map(|f| if let Filter::MetadataExchange(said) = f { Some(said) } else { None })?;
    let exchange = &conn.env.shard().exchange;
    if alpn != Some(&said.protocol) {
        exchange.not_found.inc();
        return None;
    }
    exchange.found.inc();
    Some(said)
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
    (peer, destination, original_dst): Ends,
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
        original_dst,
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
        details = denied(conn, |view| judge(view, conn)) => Outcome::Denied(details),
    }
}

async fn limit(duration: Option<Duration>) {
    match duration {
        Some(duration) => sleep(duration).await,
        None => std::future::pending().await,
    }
}

/// Ends when this says that policy no longer lets a connection be, with the details. Only policy closes a connection: other
/// changes of its chain are for new connections.
pub(super) async fn denied(conn: &Conn, judge: impl Fn(&View) -> Option<String>) -> String {
    let mut views = conn.env.view.subscribe();
    // What changed before we listened was not judged yet.
    views.mark_changed();
    while views.changed().await.is_ok() {
        let view = Arc::clone(&views.borrow_and_update());
        if let Some(details) = judge(&view) {
            return details;
        }
    }
    std::future::pending().await
}

/// What the policy of the chain that would take this connection now says. That no chain would, is policy only inbound: a
/// peer that has to authenticate now and did not.
pub(super) fn judge(view: &View, conn: &Conn) -> Option<String> {
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
    bytes: Arc<Bytes>,
    /// What the other proxy said of its workload.
    peer: Option<Arc<Peer>>,
    report: Option<TcpReport>,
    upstream_host: Option<SocketAddr>,
    flags: Flags,
    details: String,
    settled: bool,
    /// URI names of our certificate.
    local_uris: Arc<[String]>,
    /// What changes the metrics, with its values.
    values: Option<(Arc<Overrides>, Values)>,
}

/// Bytes of a relay.
#[derive(Debug, Default)]
struct Bytes(copy::Counters);

impl Moving for Bytes {
    fn moved(&self) -> (u64, u64) {
        (self.0.received.load(Ordering::Relaxed), self.0.sent.load(Ordering::Relaxed))
    }
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
            bytes: Arc::default(),
            peer: None,
            report: None,
            upstream_host: None,
            flags: Flags::NONE,
            details: String::new(),
            settled: false,
            local_uris: conn.local_uris(),
            values: None,
        }
    }

    async fn connect(&mut self) -> Result<TcpUpstream, Error> {
        let view = self.conn.env.view();
        match dial(&view, self.chain, self.conn.ends(), &mut self.trace).await {
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

    fn peer_known(&mut self, known: &Known) {
        known.count(&self.conn.env.shard().exchange);
        self.peer = known.peer();
    }

    /// Counts the connection as opened; once everything is known that its labels tell, or at its end.
    fn opened(&mut self) {
        let Some(stats) = self.stats() else { return };
        let shard = self.conn.env.shard();
        let record;
        let values = match &stats.overrides {
            None => None,
            Some(overrides) => {
                record = self.record();
                let facts = Facts { record: &record, node: shard.node() };
                Some((overrides, overrides.evaluate(&facts)))
            }
        };
        let changed = values.as_ref().map(|(overrides, values)| (*overrides, values));
        let report = shard.open_tcp(&Labels { changed, ..self.labels() }, Arc::clone(&self.bytes) as Arc<dyn Moving>);
        self.report = Some(report);
        self.values = values.map(|(overrides, values)| (Arc::clone(overrides), values));
    }

    fn stats(&self) -> Option<Arc<Stats>> {
        self.chain.stats.clone().or_else(|| self.conn.default_stats())
    }

    /// The exchange that the server's proxy and we agreed on.
    fn exchange_with(&self, upstream: &TcpUpstream) -> Option<Arc<TcpExchange>> {
        let cluster = self.cluster.as_ref()?;
        let said = cluster.shared.exchange.as_ref()?;
        let alpn = upstream.peer.as_ref().and_then(|peer| peer.alpn.as_deref());
        (alpn == Some(&*said.protocol)).then(|| Arc::clone(said))
    }

    fn failed(&mut self, error: &Error) {
        tracing::debug!(peer = %self.conn.peer, %error, "upstream connection failed");
        self.flags.insert(error.kind.row().flag);
        if matches!(error.kind, Kind::NoCluster) {
            self.metrics.cx_no_route.inc();
        }
        self.settled = true;
    }

    fn ended(&mut self, outcome: Outcome) {
        self.settled = true;
        match outcome {
            Outcome::Denied(details) => {
                self.metrics.cx_policy_close.inc();
                self.details = details;
            }
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
            peer: self.peer(),
            local_principal: local_principal(self.conn, &self.local_uris, &self.trace),
            peer_principal: peer_principal(self.conn, &self.trace),
            code: 0,
            grpc_status: None,
            flags: self.flags | self.trace.flags,
            changed: None,
        }
    }

    /// The other side's workload: as it said itself, else as its endpoint says.
    fn peer(&self) -> Option<&Arc<Peer>> {
        let endpoint = || self.trace.host.as_ref().and_then(|host| host.peer.as_ref());
        self.peer.as_ref().or_else(|| endpoint().filter(|_| !self.conn.is_inbound()))
    }

    fn record(&self) -> Record<'_> {
        let mut record = self.conn.record(RecordKind::Tcp, self.conn.started, self.conn.start.elapsed());
        let (sent, received) = self.bytes.moved();
        record.flags = self.flags;
        record.termination_details = &self.details;
        record.transport_failure = self.trace.transport_failure.as_deref().unwrap_or_default();
        record.bytes_sent = sent;
        record.bytes_received = received;
        record.upstream_cluster = self.cluster_name();
        record.upstream_host = self.upstream_host.or_else(|| self.trace.host.as_ref().map(|host| host.address));
        record.upstream_local = self.trace.upstream_local;
        record.attempts = self.trace.attempts;
        record.local_uri = self.local_uris.first().map_or("", String::as_str);
        record.peer = self.peer();
        record
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
        if self.report.is_none() {
            // A connection that was never opened was opened and closed.
            self.opened();
        }
        self.report = None;
        if let Some((overrides, values)) = self.values.take() {
            self.conn.env.shard().record_custom(&overrides, &values);
        }
        let (sent, received) = self.bytes.moved();
        self.metrics.cx_active.dec();
        self.metrics.cx_rx_bytes.add(received);
        self.metrics.cx_tx_bytes.add(sent);
        let Some(sink) = self.conn.env.log().filter(|sink| sink.wants(&self.chain.access_log)) else { return };
        sink.log(&self.record(), &self.chain.access_log);
    }
}
