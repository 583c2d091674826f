//! From an accepted socket to a connection whose chain, peer and policy are known.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proxy_config::model::{Direction, TransportProtocol};
use tokio::time::{Instant, timeout};

use super::Env;
use super::server_first::{self, Early, QUIET};
use super::watched::HEAD_LIMIT;
use crate::drain::Guard;
use crate::error::Kind;
use crate::net::Stream;
use crate::net::sniff::{Inspectors, Sniffed, Sniffer, Transport};
use crate::snapshot::{Attributes, Chain, ChainInput, Filter, Listener, Terminal};
use crate::telemetry::{Record, RecordKind, Reporter, Stats};
use crate::tls::{self, HANDSHAKE_LIMIT, Peer};

/// How long a client that has said nothing is waited for: Envoy's default limit on idle connections.
const SILENCE: Duration = Duration::from_secs(3600);

/// The secret that every workload has.
const WORKLOAD: &str = "default";

/// Who connected to where, and where that leads: the client, the destination, the same when the client's wish is known.
pub(super) type Ends = (SocketAddr, SocketAddr, Option<SocketAddr>);

/// A connection as it was accepted.
pub(super) struct Arrival {
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    pub(super) destination: SocketAddr,
    /// `destination` is where the client wanted to go, not only where it was let in.
    pub(super) captured: bool,
    pub(super) listener: Arc<Listener>,
    pub(super) env: Arc<Env>,
}

/// A connection that has its chain; shared by its requests.
pub(super) struct Conn {
    pub(super) env: Arc<Env>,
    pub(super) listener: Arc<Listener>,
    pub(super) chain: Arc<Chain>,
    pub(super) peer: SocketAddr,
    pub(super) local: SocketAddr,
    pub(super) destination: SocketAddr,
    /// Where the client wanted to go; `None` on a listener that traffic is not redirected to: a cluster of original
    /// destinations would lead back to it.
    pub(super) original_dst: Option<SocketAddr>,
    /// `None` is plaintext.
    pub(super) tls: Option<Arc<Peer>>,
    /// Server name that the client sent, whoever ends its TLS.
    pub(super) sni: Option<String>,
    /// The client sent a ClientHello, whoever ends its TLS.
    pub(super) client_tls: bool,
    /// What the client offered, or what inspection found.
    pub(super) alpn: Vec<String>,
    /// The client had finished sending when its first bytes were looked at.
    pub(super) eof: bool,
    pub(super) id: u64,
    pub(super) start: Instant,
    pub(super) started: SystemTime,
    _guard: Guard,
}

/// Why a connection ends before its chain serves it.
#[derive(Debug)]
pub(super) enum Refusal {
    /// No chain takes it.
    NoChain,
    /// It did not say in time what it is.
    Silent,
    /// Its handshake failed.
    Tls(tls::TlsError),
    /// Policy; the details.
    Denied(String),
    /// The chain cannot be used; why.
    Unusable(String),
    /// The client left, or broke off.
    Gone,
}

/// Finds the chain, ends TLS, asks policy. `None`: the connection is over and was accounted for.
pub(super) async fn open(stream: Stream, mut arrival: Arrival) -> Option<(Stream, Arc<Conn>, Option<Early>)> {
    let guard = arrival.env.drain.guard();
    let view = arrival.env.view();
    if let Some(other) = view.snap.hand_off(&arrival.listener, arrival.destination) {
        arrival.listener = Arc::clone(other);
    }
    drop(view);
    let begun = (Instant::now(), SystemTime::now());
    match establish(stream, &arrival).await {
        Ok(found) => {
            let original_dst = arrival.original_dst();
            let conn = Conn {
                id: arrival.env.next_connection(),
                env: arrival.env,
                listener: arrival.listener,
                chain: found.chain,
                peer: arrival.peer,
                local: arrival.local,
                destination: arrival.destination,
                original_dst,
                tls: found.tls,
                sni: found.sni,
                client_tls: found.client_tls,
                alpn: found.alpn,
                eof: found.eof,
                start: begun.0,
                started: begun.1,
                _guard: guard,
            };
            Some((found.stream, Arc::new(conn), found.early))
        }
        Err(refusal) => {
            refused(&arrival, &refusal, begun);
            None
        }
    }
}

/// Accounts for a connection that ends before its chain serves it.
fn refused(arrival: &Arrival, refusal: &Refusal, (start, started): (Instant, SystemTime)) {
    tracing::debug!(peer = %arrival.peer, listener = %arrival.listener.name, ?refusal, "connection refused");
    let logs = &arrival.listener.access_log;
    let Some(sink) = arrival.env.log().filter(|sink| sink.wants(logs)) else { return };
    let mut record = Record::new(RecordKind::Conn, started, start.elapsed());
    record.downstream_remote = Some(arrival.peer);
    record.downstream_direct_remote = Some(arrival.peer);
    record.downstream_local = Some(arrival.destination);
    let failure;
    if let Some(kind) = refusal.kind() {
        record.flags = kind.row().flag;
        record.details = kind.row().details;
    }
    match refusal {
        Refusal::Tls(error) => {
            failure = error.to_string();
            record.downstream_failure = &failure;
        }
        Refusal::Denied(details) => {
            record.kind = RecordKind::Tcp;
            record.details = "";
            record.termination_details = details;
        }
        Refusal::Unusable(why) => record.termination_details = why,
        Refusal::NoChain | Refusal::Silent | Refusal::Gone => {}
    }
    sink.log(&record, logs);
}

/// What [`establish`] finds out.
struct Established {
    stream: Stream,
    chain: Arc<Chain>,
    tls: Option<Arc<Peer>>,
    sni: Option<String>,
    client_tls: bool,
    alpn: Vec<String>,
    eof: bool,
    early: Option<Early>,
}

async fn establish(mut stream: Stream, arrival: &Arrival) -> Result<Established, Refusal> {
    if arrival.listener.proxy_protocol {
        return Err(Refusal::Unusable("the PROXY protocol of clients is not read yet".to_owned()));
    }
    let (seen, early) = inspect(&mut stream, arrival).await.inspect_err(|_| stream.reset_on_drop())?;
    let chain = chain_for(arrival, &seen).ok_or(Refusal::NoChain).inspect_err(|_| stream.reset_on_drop())?;
    let chain = Arc::clone(chain);
    stream = stream.replay(seen.prefix);
    let mut tls = None;
    if let Some(context) = &chain.tls {
        let limit = chain.handshake_timeout.unwrap_or(HANDSHAKE_LIMIT);
        let (inner, peer) = Box::pin(tls::accept(stream, context, limit)).await.map_err(Refusal::Tls)?;
        stream = inner;
        tls = Some(peer);
    }
    let sni = tls.as_ref().and_then(|peer| peer.sni.clone()).or(seen.sni);
    check_filters(&chain, arrival, tls.as_deref(), sni.as_deref())?;
    let client_tls = seen.transport == Transport::Tls;
    Ok(Established { stream, chain, tls, sni, client_tls, alpn: seen.alpn, eof: seen.eof, early })
}

/// Looks at the first bytes as far as the listener asks.
async fn inspect(stream: &mut Stream, arrival: &Arrival) -> Result<(Sniffed, Option<Early>), Refusal> {
    let plan = arrival.listener.inspect(arrival.destination.port());
    let mut sniffer = Sniffer::new(Inspectors { tls: plan.tls, http: plan.http });
    if sniffer.is_done() {
        return Ok((sniffer.finish(), None));
    }
    if let Some(limit) = plan.timeout {
        return match timeout(limit, sniffer.run(stream)).await {
            Ok(run) => run.map(|()| (sniffer.finish(), None)).map_err(|_| Refusal::Gone),
            Err(_) if plan.continue_on_timeout => Ok((sniffer.finish(), None)),
            Err(_) => Err(Refusal::Silent),
        };
    }
    if let Ok(run) = timeout(QUIET, sniffer.run(stream)).await {
        return run.map(|()| (sniffer.finish(), None)).map_err(|_| Refusal::Gone);
    }
    Box::pin(wait(stream, arrival, sniffer, plan.http)).await
}

/// Goes on with a client that has not said enough and for whom configuration sets no limit.
async fn wait(
    stream: &mut Stream,
    arrival: &Arrival,
    mut sniffer: Sniffer,
    looks_for_http: bool,
) -> Result<(Sniffed, Option<Early>), Refusal> {
    let plain = chain_for(arrival, &Sniffed::default()).filter(|chain| chain.tls.is_none());
    if let Some(chain) = plain
        && let Terminal::Tcp(tcp) = &chain.terminal
        && looks_for_http
        && sniffer.seen() == 0
        && check_filters(chain, arrival, None, None).is_ok()
    {
        let early = server_first::race(stream, &mut sniffer, arrival, tcp).await?;
        let seen = sniffer.finish();
        let same = chain_for(arrival, &seen).is_some_and(|chosen| Arc::ptr_eq(chosen, chain));
        return Ok((seen, early.filter(|_| same)));
    }
    if plain.is_none() {
        // Plaintext is not served, so whoever has not finished a ClientHello by then never will.
        return match timeout(HANDSHAKE_LIMIT, sniffer.run(stream)).await {
            Ok(run) => run.map(|()| (sniffer.finish(), None)).map_err(|_| Refusal::Gone),
            Err(_) => Err(Refusal::Silent),
        };
    }
    say_something(stream, &mut sniffer).await?;
    Ok((sniffer.finish(), None))
}

/// Waits for a client's first words to make sense. Text without a line end is held back only for so long: then it is bytes
/// like any other.
pub(super) async fn say_something(stream: &mut Stream, sniffer: &mut Sniffer) -> Result<(), Refusal> {
    if sniffer.seen() == 0 {
        let first = timeout(SILENCE, sniffer.read(stream)).await.map_err(|_| Refusal::Silent)?;
        first.map_err(|_| Refusal::Gone)?;
    }
    timeout(HEAD_LIMIT, sniffer.run(stream)).await.unwrap_or(Ok(())).map_err(|_| Refusal::Gone)
}

fn chain_for<'a>(arrival: &'a Arrival, seen: &Sniffed) -> Option<&'a Arc<Chain>> {
    arrival.listener.chain(&ChainInput {
        dst: arrival.destination,
        src: arrival.peer,
        sni: seen.sni.as_deref(),
        transport: match seen.transport {
            Transport::RawBuffer => TransportProtocol::RawBuffer,
            Transport::Tls => TransportProtocol::Tls,
        },
        alpn: &seen.alpn,
    })
}

/// Network filters in order; a chain that serves bytes and cannot be used ends here, after the handshake.
fn check_filters(chain: &Chain, arrival: &Arrival, tls: Option<&Peer>, sni: Option<&str>) -> Result<(), Refusal> {
    match (&chain.terminal, &chain.unusable) {
        (Terminal::Refuse(why), _) => return Err(Refusal::Unusable(why.to_string())),
        (Terminal::Tcp(_), Some(why)) => return Err(Refusal::Unusable(why.to_string())),
        _ => {}
    }
    let attributes = Attributes {
        peer: tls,
        direct_remote: arrival.peer,
        remote_ip: arrival.peer.ip(),
        destination: arrival.destination,
        sni,
        request: None,
        metadata: None,
    };
    for filter in &chain.l4 {
        if let Filter::Unsupported(name) = filter {
            return Err(Refusal::Unusable(format!("filter {name} is not supported")));
        }
    }
    check_policy(chain, &attributes, &arrival.env).map_err(Refusal::Denied)
}

/// Asks the policies of a chain; the details of the one that refuses.
pub(super) fn check_policy(chain: &Chain, attributes: &Attributes<'_>, env: &Env) -> Result<(), String> {
    for filter in &chain.l4 {
        let Filter::Rbac(rbac) = filter else { continue };
        let verdict = rbac.check(attributes);
        if !verdict.allowed {
            if let Some(denial) = rbac.why(attributes).filter(|_| env.denials.may()) {
                let principal = attributes.peer.map_or("none (plaintext)", Peer::principal);
                let (peer, destination) = (attributes.direct_remote, attributes.destination);
                tracing::info!(%peer, principal, %destination, "RBAC: connection denied: {denial}");
            }
            return Err(verdict.details());
        }
    }
    Ok(())
}

impl Arrival {
    fn original_dst(&self) -> Option<SocketAddr> {
        self.captured.then_some(self.destination)
    }

    pub(super) fn ends(&self) -> Ends {
        (self.peer, self.destination, self.original_dst())
    }
}

impl Conn {
    pub(super) fn ends(&self) -> Ends {
        (self.peer, self.destination, self.original_dst)
    }

    /// What policy may ask about on this connection.
    pub(super) fn attributes(&self) -> Attributes<'_> {
        Attributes {
            peer: self.tls.as_deref(),
            direct_remote: self.peer,
            remote_ip: self.peer.ip(),
            destination: self.destination,
            sni: self.sni.as_deref(),
            request: None,
            metadata: None,
        }
    }

    /// Whether the application behind us is the one asked for.
    pub(super) fn is_inbound(&self) -> bool {
        self.listener.direction == Direction::Inbound
    }

    /// Which side we are in metrics.
    pub(super) fn reporter(&self) -> Reporter {
        if self.is_inbound() { Reporter::Destination } else { Reporter::Source }
    }

    /// What counts where nothing says so: without a control plane everything is counted.
    pub(super) fn default_stats(&self) -> Option<Arc<Stats>> {
        let view = self.env.view();
        let default = if self.is_inbound() { &self.env.stats.inbound } else { &self.env.stats.outbound };
        view.snap.counts_by_default().then(|| Arc::clone(default))
    }

    /// URI names of our workload certificate.
    pub(super) fn local_uris(&self) -> Arc<[String]> {
        let view = self.env.view();
        view.snap.secrets().identity(WORKLOAD).map_or_else(Arc::default, |identity| Arc::clone(&identity.uris))
    }

    /// A log record with what the connection knows.
    pub(super) fn record(&self, kind: RecordKind, start: SystemTime, duration: Duration) -> Record<'_> {
        let mut record = Record::new(kind, start, duration);
        record.downstream_remote = Some(self.peer);
        record.downstream_direct_remote = Some(self.peer);
        record.downstream_local = Some(self.destination);
        record.sni = self.sni.as_deref().unwrap_or_default();
        record.filter_chain = &self.chain.name;
        record.connection_id = self.id;
        record.outbound = !self.is_inbound();
        record.mtls = self.tls.as_ref().is_some_and(|peer| peer.has_certificate());
        if let Some(peer) = &self.tls {
            record.peer_uri = peer.uri_sans.first().map_or("", String::as_str);
            record.peer_subject = &peer.subject;
            record.tls_version = peer.tls_version;
            record.tls_cipher = &peer.cipher;
        }
        record
    }
}

impl Refusal {
    /// The row of the error table, when there is one.
    pub(super) fn kind(&self) -> Option<Kind> {
        match self {
            Self::NoChain | Self::Silent => Some(Kind::NoChain),
            Self::Unusable(_) => Some(Kind::PolicyUnusable),
            Self::Denied(_) => Some(Kind::RbacDenied),
            Self::Tls(_) | Self::Gone => None,
        }
    }
}
