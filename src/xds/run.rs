//! The stream's I/O: connects, carries messages between istiod and [`Ads`], comes back when it ends.
//!
//! It decides when to give a server up and which one to try next; what is said is for [`Ads`]. One stream is one
//! connection, as the agent has it: its end, whoever brought it about, is answered by a new one after a random wait.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use proxy_config::Name;
use proxy_config::bootstrap::Bootstrap;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::ads::{Ads, Health, Options, Step};
use super::check::Checks;
use super::codec::AdsCodec;
use super::messages::{Request, Response};
use super::pace::{Backoff, Debounce};
use super::received::Received;
use super::warm::Update;
use crate::grpc::{Channel, Credentials, Server};
use crate::telemetry::control_plane::{self, Came};
use crate::tls::unix_now;

/// Longest wait for a connection, handshake included; the agent's.
const DIAL: Duration = Duration::from_secs(5);
/// Longest wait for the first answer of a stream.
const FIRST_ANSWER: Duration = Duration::from_secs(30);
/// Responses are as large as the mesh; the agent takes what fits into an int32.
const MAX_RESPONSE: usize = i32::MAX as usize;
/// What came is packed this long after it was handed on: serving it comes first, and pushes come in bursts.
const PACK_AFTER: Duration = Duration::from_secs(3);
/// Nothing to do at any known time.
const LATER: Duration = Duration::from_secs(3600);
const DELTA: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const SOTW: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";

/// Whom to ask, and as whom.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Control planes, at least one, tried in turn; files are read anew for each connection.
    pub servers: Vec<Server>,
    /// What goes along.
    pub credentials: Credentials,
    /// Protocol and node.
    pub options: Options,
}

impl Settings {
    /// What the environment asks for; what `checks` find is refused.
    pub fn of(bootstrap: &Bootstrap, checks: Checks) -> Self {
        let node = Bytes::from(bootstrap.node.encode());
        Self {
            servers: vec![Server::from(&bootstrap.xds)],
            credentials: Credentials::from(&bootstrap.xds),
            options: Options {
                delta: bootstrap.delta,
                node,
                names: bootstrap.dns.is_some(),
                proxy_config: bootstrap.pushed_proxy_config,
                checks,
            },
        }
    }
}

/// What came last, and what keeps news away.
#[derive(Debug, Clone, Default)]
pub struct News {
    /// What is to be served; `None`: nothing complete yet.
    pub update: Option<Arc<Update>>,
    /// Updates so far. Whoever missed one must not trust [`Update::endpoints`].
    pub updates: u64,
    /// Why there is no stream, for people; `None`: there is one.
    pub trouble: Option<String>,
}

/// A stream that goes on for ever.
#[derive(Debug, Clone)]
pub struct Stream {
    /// What came last.
    pub news: watch::Receiver<News>,
    /// Everything as it came.
    pub received: Arc<Received>,
    /// Further CAs that the mesh trusts, PEM, as they were said last.
    pub anchors: watch::Receiver<Vec<String>>,
    /// For those who want something of it.
    pub asks: mpsc::Sender<Ask>,
}

/// Something that others want of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Endpoints of these clusters do not work: send them again.
    Resubscribe(Vec<Name>),
    /// A new stream to the next server.
    ChangeServer,
}

/// Begins to ask, in a task that ends with the last receiver of news. `health` is what istiod is to hear of the
/// application.
pub fn start(settings: Settings, health: watch::Receiver<Option<Health>>) -> Stream {
    let ads = Ads::new(settings.options.clone());
    let received = ads.bytes();
    let (sender, news) = watch::channel(News::default());
    let (trusted, anchors) = watch::channel(Vec::new());
    let (asks, asked) = mpsc::channel(8);
    let client = Client {
        ads,
        settings,
        health,
        news: sender,
        anchors: trusted,
        asks: asked,
        debounce: Debounce::default(),
        turn: 0,
        pushes: 0,
        packing: None,
    };
    tokio::spawn(client.run());
    Stream { news, received, anchors, asks }
}

/// Speaks with a control plane.
struct Client {
    ads: Ads,
    settings: Settings,
    health: watch::Receiver<Option<Health>>,
    news: watch::Sender<News>,
    anchors: watch::Sender<Vec<String>>,
    asks: mpsc::Receiver<Ask>,
    debounce: Debounce,
    /// Which server and which of its addresses is next.
    turn: usize,
    /// Responses so far.
    pushes: u64,
    packing: Option<JoinHandle<()>>,
}

/// Why a stream ended.
#[derive(Debug)]
enum End {
    /// No connection, or no stream on it.
    Unreachable(String),
    /// The server ended it after it had answered.
    Ended(String),
    /// A question stayed open.
    Silent,
    /// The server does not know the protocol.
    Unknown,
    /// Somebody asked for another server.
    Unwanted,
    /// Nobody listens to us any more.
    Unheard,
}

impl Client {
    /// Speaks until nobody listens any more.
    async fn run(mut self) {
        let mut backoff = Backoff::default();
        let first = self.health.borrow_and_update().clone();
        self.ads.report(first);
        while !self.news.is_closed() {
            let pushes = self.pushes;
            let end = Box::pin(self.stream()).await;
            self.ads.disconnected();
            control_plane::connected(false);
            if self.pushes != pushes {
                backoff.reset();
            }
            if self.went(end) {
                self.rest(Instant::now() + backoff.next(fastrand::f64())).await;
            }
        }
    }

    /// What the end of a stream means for the next; `false`: it begins at once.
    fn went(&mut self, end: End) -> bool {
        let address = self.server().address.clone();
        let why = match end {
            End::Unheard => return false,
            End::Unwanted => {
                self.turn += 1;
                return false;
            }
            End::Unknown => {
                self.ads.set_delta(!self.ads.is_delta());
                "it does not speak this protocol; the other one is tried".to_owned()
            }
            End::Ended(why) => why,
            End::Unreachable(why) => {
                self.turn += 1;
                why
            }
            End::Silent => {
                self.turn += 1;
                "questions stay unanswered".to_owned()
            }
        };
        tracing::warn!("istiod at {address}: {why}; what was received is served on");
        self.news.send_modify(|news| news.trouble = Some(format!("istiod at {address}: {why}")));
        true
    }

    /// Waits, and serves meanwhile what has come and become warm.
    async fn rest(&mut self, until: Instant) {
        loop {
            let due = self.due();
            if due >= until {
                return sleep_until(until).await;
            }
            sleep_until(due).await;
            self.publish(Instant::now());
        }
    }

    fn server(&self) -> &Server {
        &self.settings.servers[self.turn % self.settings.servers.len()]
    }

    async fn stream(&mut self) -> End {
        let (send, messages) = mpsc::channel(16);
        let mut queue = VecDeque::new();
        let mut answers = match self.open(messages, &send, &mut queue).await {
            Ok(answers) => answers,
            Err(end) => return end,
        };
        control_plane::connected(true);
        tracing::info!("istiod at {}: the stream is open", self.server().address);
        self.news.send_modify(|news| news.trouble = None);
        loop {
            let wake = [Some(self.due()), self.ads.patience()].into_iter().flatten().min().expect("one is there");
            tokio::select! {
                answer = answers.message() => match answer {
                    Ok(Some(response)) => queue.extend(self.take(response)),
                    Ok(None) => return End::Ended("OK".to_owned()),
                    Err(status) => return ended(&status),
                },
                permit = send.reserve(), if !queue.is_empty() => match permit {
                    Ok(permit) => permit.send(queue.pop_front().expect("it is not empty")),
                    // Its other end goes with the connection; the answers tell why.
                    Err(_) => queue.clear(),
                },
                Ok(()) = self.health.changed() => {
                    let health = self.health.borrow_and_update().clone();
                    queue.extend(self.ads.report(health));
                }
                Some(ask) = self.asks.recv() => match ask {
                    Ask::Resubscribe(names) => queue.extend(self.ads.resubscribe(&names)),
                    Ask::ChangeServer => return End::Unwanted,
                },
                () = self.news.closed() => return End::Unheard,
                () = sleep_until(wake) => {
                    let now = Instant::now();
                    if self.ads.patience().is_some_and(|end| now >= end) {
                        return End::Silent;
                    }
                    queue.extend(self.ads.tick(now));
                    if !self.publish(now) {
                        return End::Unheard;
                    }
                }
            }
        }
    }

    /// Connects and opens the stream with the first requests in it: servers answer only to those.
    async fn open(
        &mut self,
        messages: mpsc::Receiver<Request>,
        send: &mpsc::Sender<Request>,
        queue: &mut VecDeque<Request>,
    ) -> Result<Streaming<Response>, End> {
        let mut endpoint = self.server().endpoint(unix_now()).map_err(End::Unreachable)?;
        endpoint.attempt = self.turn / self.settings.servers.len();
        let channel = Channel::connect(&endpoint, DIAL).await.map_err(|e| End::Unreachable(e.to_string()))?;
        let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_RESPONSE);
        grpc.ready().await.map_err(|e| End::Unreachable(e.to_string()))?;
        queue.extend(self.ads.connected(Instant::now()));
        while let Some(request) = queue.pop_front() {
            if let Err(mpsc::error::TrySendError::Full(request)) = send.try_send(request) {
                queue.push_front(request);
                break;
            }
        }
        let delta = self.ads.is_delta();
        let path = if delta { DELTA } else { SOTW };
        let request = self.settings.credentials.sign(tonic::Request::new(ReceiverStream::new(messages)));
        let call = grpc.streaming(request, http::uri::PathAndQuery::from_static(path), AdsCodec { delta });
        match timeout(FIRST_ANSWER, call).await {
            Ok(Ok(answers)) => Ok(answers.into_inner()),
            Ok(Err(status)) => Err(refused(&status)),
            Err(_) => Err(End::Silent),
        }
    }

    /// A response came; what to send.
    fn take(&mut self, response: Response) -> Vec<Request> {
        let now = Instant::now();
        let Step { send, changed, refused } = self.ads.received(response, now, SystemTime::now());
        self.pushes += 1;
        let came = match (refused.is_empty(), changed) {
            (false, _) => Came::Refused,
            (true, true) => Came::Changed,
            (true, false) => Came::Same,
        };
        control_plane::pushed(SystemTime::now(), came);
        for reject in &refused {
            tracing::error!("istiod was told that this is not served: {reject}");
        }
        if changed {
            self.debounce.changed(now);
        }
        let anchors = self.ads.anchors();
        self.anchors.send_if_modified(|old| std::mem::replace(old, anchors.clone()) != anchors);
        send
    }

    /// Packs received bytes, on a thread beside this one. What comes while it packs waits for the next time.
    fn pack_later(&mut self) {
        if self.packing.as_ref().is_some_and(|packing| !packing.is_finished()) {
            return;
        }
        let received = self.ads.bytes();
        let pack = move || {
            std::thread::sleep(PACK_AFTER);
            received.pack();
        };
        match std::thread::Builder::new().name("pack".to_owned()).spawn(pack) {
            Ok(packing) => self.packing = Some(packing),
            Err(e) => tracing::debug!("received bytes stay as they are: {e}"),
        }
    }

    /// When something is to be done although nothing comes.
    fn due(&self) -> Instant {
        [self.debounce.due(), self.ads.wake()].into_iter().flatten().min().unwrap_or_else(|| Instant::now() + LATER)
    }

    /// Hands on what can be served; `false`: nobody takes it.
    fn publish(&mut self, now: Instant) -> bool {
        self.debounce.done();
        if let Some(update) = self.ads.update(now) {
            self.news.send_modify(|news| {
                news.update = Some(Arc::new(update));
                news.updates += 1;
            });
            self.pack_later();
        }
        !self.news.is_closed()
    }
}

fn refused(status: &Status) -> End {
    match status.code() {
        Code::Unimplemented => End::Unknown,
        _ => End::Unreachable(told(status)),
    }
}

fn ended(status: &Status) -> End {
    match status.code() {
        Code::Unimplemented => End::Unknown,
        _ => End::Ended(told(status)),
    }
}

fn told(status: &Status) -> String {
    format!("{:?} {}", status.code(), status.message())
}
