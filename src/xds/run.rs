//! The stream itself: connects, hands what comes to [`Ads`], sends what that says, and begins again when it ends.
//!
//! What was received stays while there is no stream: a control plane that is away costs nothing but news.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use proxy_config::bootstrap::Bootstrap;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

use super::ads::{Ads, Health, Options};
use super::messages::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, Request, Response};
use super::received::Received;
use super::warm::Update;
use crate::grpc::{Channel, Credentials, Server};

const DELTA: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const SOTW: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";
/// Requests that wait for the socket: more than one for each type, and for each a report and an answer.
const REQUESTS: usize = 64;
/// How long a connection may take.
const DIAL_LIMIT: Duration = Duration::from_secs(10);
/// A new stream begins after this time, then after twice of it, and so on.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A stream that lived for so long was a good one: the next pause is the first again.
const GOOD: Duration = Duration::from_secs(10);

/// Whom to ask, and as whom.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where.
    pub server: Server,
    /// What goes along.
    pub credentials: Credentials,
    /// Protocol and node.
    pub options: Options,
}

impl Settings {
    /// What the environment asks for.
    pub fn of(bootstrap: &Bootstrap) -> Self {
        let node = Bytes::from(bootstrap.node.encode());
        Self {
            server: Server::from(&bootstrap.xds),
            credentials: Credentials::from(&bootstrap.xds),
            options: Options { delta: bootstrap.delta, node, names: bootstrap.dns.is_some() },
        }
    }
}

/// What came last, and what keeps news away.
#[derive(Debug, Clone, Default)]
pub struct News {
    /// What is to be served; `None`: nothing complete yet.
    pub update: Option<Arc<Update>>,
    /// Updates so far.
    pub updates: u64,
    /// Why there is no stream, for people; `None`: there is one.
    pub trouble: Option<String>,
}

/// A stream that goes on for ever.
pub struct Stream {
    /// What came last.
    pub news: watch::Receiver<News>,
    /// Everything as it came.
    pub received: Arc<Received>,
}

/// Begins to ask, in a task that ends with the last receiver. `health` is what istiod is to hear of the application.
pub fn start(settings: Settings, health: watch::Receiver<Option<Health>>) -> Stream {
    let ads = Ads::new(settings.options.clone());
    let received = ads.bytes();
    let (sender, news) = watch::channel(News::default());
    tokio::spawn(async move {
        let closed = sender.clone();
        let mut client = Client { settings, ads, health, news: sender };
        tokio::select! {
            () = client.run() => {}
            () = closed.closed() => {}
        }
    });
    Stream { news, received }
}

struct Client {
    settings: Settings,
    ads: Ads,
    health: watch::Receiver<Option<Health>>,
    news: watch::Sender<News>,
}

/// Requests and responses of one protocol.
trait Protocol: prost::Message + Default + 'static {
    type Answer: prost::Message + Default + Into<Response> + 'static;
    const PATH: &'static str;
    fn of(request: Request) -> Option<Self>;
}

impl Protocol for DeltaDiscoveryRequest {
    type Answer = DeltaDiscoveryResponse;
    const PATH: &'static str = DELTA;
    fn of(request: Request) -> Option<Self> {
        if let Request::Delta(request) = request { Some(request) } else { None }
    }
}

impl Protocol for DiscoveryRequest {
    type Answer = proxy_config::xds::DiscoveryResponse;
    const PATH: &'static str = SOTW;
    fn of(request: Request) -> Option<Self> {
        if let Request::Sotw(request) = request { Some(request) } else { None }
    }
}

impl Client {
    async fn run(&mut self) {
        let mut pause = FIRST_PAUSE;
        loop {
            let begun = Instant::now();
            let end = match self.ads.is_delta() {
                true => self.stream::<DeltaDiscoveryRequest>().await,
                false => self.stream::<DiscoveryRequest>().await,
            };
            self.ads.disconnected();
            let why = end.err().unwrap_or_else(|| "the stream was closed".to_owned());
            let address = &self.settings.server.address;
            tracing::warn!("istiod at {address}: {why}; what was received is served on");
            self.news.send_modify(|news| news.trouble = Some(format!("istiod at {address}: {why}")));
            pause = if begun.elapsed() >= GOOD { FIRST_PAUSE } else { pause };
            // Proxies that lost the same istiod must not come back at the same moment.
            sleep(pause.mul_f64(0.5 + fastrand::f64())).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            // What waited for something that did not come may be due.
            self.publish();
        }
    }

    /// One stream, to its end.
    async fn stream<P: Protocol>(&mut self) -> Result<(), String> {
        let now = time::OffsetDateTime::now_utc().unix_timestamp();
        let endpoint = self.settings.server.endpoint(now)?;
        let channel = Channel::connect(&endpoint, DIAL_LIMIT).await.map_err(|e| e.to_string())?;
        let mut grpc = Grpc::new(channel).max_decoding_message_size(usize::MAX);
        grpc.ready().await.map_err(|e| e.to_string())?;
        let (send, requests) = mpsc::channel::<P>(REQUESTS);
        let first = self.ads.connected(Instant::now());
        ask(&send, first).await;
        let request = self.settings.credentials.sign(tonic::Request::new(ReceiverStream::new(requests)));
        let path = PathAndQuery::from_static(P::PATH);
        let codec = ProstCodec::<P, P::Answer>::default();
        let opening = timeout(DIAL_LIMIT.saturating_mul(3), grpc.streaming(request, path, codec));
        let opened = opening.await.map_err(|_| "no answer".to_owned())?;
        let mut answers = opened.map_err(|status| told(&status))?.into_inner();
        tracing::info!("istiod at {}: the stream is open", self.settings.server.address);
        self.news.send_modify(|news| news.trouble = None);
        loop {
            let wake = self.ads.wake();
            let patience = self.ads.patience();
            let due = wake.into_iter().chain(patience).min();
            let say = tokio::select! {
                answer = answers.message() => match answer {
                    Ok(Some(answer)) => self.take(answer.into()),
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(told(&status)),
                },
                Ok(()) = self.health.changed() => {
                    let now = self.health.borrow_and_update().clone();
                    self.ads.report(now)
                }
                () = until(due) => {
                    if patience.is_some_and(|end| end <= Instant::now()) {
                        return Err("questions stay unanswered".to_owned());
                    }
                    self.ads.tick(Instant::now())
                }
            };
            if !ask(&send, say).await {
                return Ok(());
            }
            self.publish();
        }
    }

    fn take(&mut self, answer: Response) -> Vec<Request> {
        let step = self.ads.received(answer, Instant::now(), SystemTime::now());
        for reject in &step.refused {
            tracing::error!("istiod was told that this is not served: {reject}");
        }
        step.send
    }

    fn publish(&mut self) {
        if let Some(update) = self.ads.update(Instant::now()) {
            self.news.send_modify(|news| {
                news.update = Some(Arc::new(update));
                news.updates += 1;
            });
        }
    }
}

/// Hands requests to the stream; `false` when it is over.
async fn ask<P: Protocol>(stream: &mpsc::Sender<P>, all: Vec<Request>) -> bool {
    for request in all.into_iter().filter_map(P::of) {
        if stream.send(request).await.is_err() {
            return false;
        }
    }
    true
}

/// A status in few words.
fn told(status: &tonic::Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}
