//! The discovery half: a world of resources, streams that watch it, and orders to misbehave.
//!
//! ```ignore
//! let ads = Arc::new(Ads::default());
//! ads.set(Kind::Cluster, "a", resources::eds_cluster("a", 1));
//! let istiod = Istiod::start(Setup { services: vec![(ads::SERVICE, Arc::clone(&ads) as _)], ..Setup::default() }).await?;
//! ads.hold(Kind::Endpoints);                                   // asked for, never sent, until
//! ads.release(Kind::Endpoints);
//! let request = ads.hears(|heard| heard.request.error().is_some()).await;
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use istio_proxy::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, Kind, Request, Resource};
use proxy_config::xds::{Any, DiscoveryResponse};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};
use tonic_prost::ProstCodec;

use super::{Call, Log, Peer, Reply, Service};

/// Its full name.
pub const SERVICE: &str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
/// Orders that a slow stream may be behind.
const ORDERS: usize = 4096;

/// A request as it was heard.
#[derive(Debug, Clone)]
pub struct Heard {
    /// Counts streams from 1.
    pub stream: usize,
    /// Metadata of the stream.
    pub metadata: http::HeaderMap,
    /// Whether the stream's peer showed a certificate.
    pub certified: bool,
    /// What was said.
    pub request: Request,
}

/// What every stream is told to do.
#[derive(Debug, Clone)]
enum Order {
    /// Send these of a kind, all of them when there are no names; and say that others are gone.
    Push { kind: Kind, names: Option<Vec<String>>, removed: Vec<String> },
    /// Send this, whatever it is.
    Say(Box<DeltaDiscoveryResponse>),
    /// End.
    End(Option<Status>),
}

/// The service.
pub struct Ads {
    world: Mutex<World>,
    orders: broadcast::Sender<Order>,
    /// Everything that was asked and answered.
    pub heard: Log<Heard>,
    /// Streams that were opened.
    pub opened: Log<usize>,
    /// Streams that were refused, by their metadata.
    pub refused: Log<http::HeaderMap>,
}

#[derive(Default)]
struct World {
    resources: BTreeMap<Kind, BTreeMap<String, Any>>,
    held: BTreeSet<Kind>,
    silent: bool,
    refusal: Option<Status>,
    version: usize,
}

impl Default for Ads {
    fn default() -> Self {
        let orders = broadcast::Sender::new(ORDERS);
        Self { world: Mutex::default(), orders, heard: Log::default(), opened: Log::default(), refused: Log::default() }
    }
}

impl Ads {
    /// Puts a resource into the world; nobody is told.
    pub fn set(&self, kind: Kind, name: &str, any: Any) {
        self.world().resources.entry(kind).or_default().insert(name.to_owned(), any);
    }

    /// Puts the resources of a recorded response into the world; nobody is told.
    pub fn load(&self, response: DiscoveryResponse, name_of: impl Fn(&Any) -> String) {
        for any in response.resources {
            if let Some(kind) = Kind::of(&any.type_url) {
                self.set(kind, &name_of(&any), any);
            }
        }
    }

    /// Takes a resource out of the world and says so.
    pub fn remove(&self, kind: Kind, name: &str) {
        self.world().resources.entry(kind).or_default().remove(name);
        self.order(Order::Push { kind, names: Some(Vec::new()), removed: vec![name.to_owned()] });
    }

    /// Sends all of a kind to everybody who watches it.
    pub fn push(&self, kind: Kind) {
        self.order(Order::Push { kind, names: None, removed: Vec::new() });
    }

    /// Sends some of a kind, asked for or not.
    pub fn push_some(&self, kind: Kind, names: &[&str]) {
        let names = Some(names.iter().map(|name| (*name).to_owned()).collect());
        self.order(Order::Push { kind, names, removed: Vec::new() });
    }

    /// Sends a response as it is: a nonce of before, a type that nobody asked for, nonsense. Streams of the state of the
    /// world get the same without what only a delta has.
    pub fn say(&self, response: DeltaDiscoveryResponse) {
        self.order(Order::Say(Box::new(response)));
    }

    /// Ends all streams, with OK or a status; connections stay.
    pub fn end(&self, status: Option<Status>) {
        self.order(Order::End(status));
    }

    /// Questions about a kind are heard and not answered.
    pub fn hold(&self, kind: Kind) {
        self.world().held.insert(kind);
    }

    /// Answers them.
    pub fn release(&self, kind: Kind) {
        self.world().held.remove(&kind);
        self.push(kind);
    }

    /// New streams are opened and never answered.
    pub fn set_silent(&self, silent: bool) {
        self.world().silent = silent;
    }

    /// New streams are refused.
    pub fn refuse(&self, status: Option<Status>) {
        self.world().refusal = status;
    }

    /// Waits for the first request of which this holds.
    ///
    /// # Panics
    /// When it does not come within a minute.
    pub async fn hears(&self, is: impl Fn(&Heard) -> bool) -> Heard {
        self.heard.find(0, is).await
    }

    fn order(&self, order: Order) {
        // Without streams there is nobody to order.
        let _ = self.orders.send(order);
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, metadata: &http::HeaderMap, peer: &Peer) -> Result<Session, Status> {
        if let Some(status) = self.world().refusal.clone() {
            self.refused.push(metadata.clone());
            return Err(status);
        }
        let stream = self.opened.len() + 1;
        self.opened.push(stream);
        let certified = !peer.certificates.is_empty();
        Ok(Session { stream, metadata: metadata.clone(), certified, watched: BTreeMap::new() })
    }

    fn response(&self, kind: Kind, which: impl Fn(&str) -> bool, removed: Vec<String>) -> DeltaDiscoveryResponse {
        let mut world = self.world();
        world.version += 1;
        let version = world.version;
        let all = world.resources.get(&kind).into_iter().flatten();
        let resource = |(name, any): (&String, &Any)| Resource {
            version: String::new(),
            resource: Some(any.clone()),
            name: name.clone(),
        };
        DeltaDiscoveryResponse {
            system_version_info: format!("test/{version}"),
            resources: all.filter(|(name, _)| which(name)).map(resource).collect(),
            type_url: kind.url().to_owned(),
            nonce: format!("nonce-{version}"),
            removed_resources: removed,
        }
    }
}

/// One stream.
struct Session {
    stream: usize,
    metadata: http::HeaderMap,
    certified: bool,
    /// Names by kind; none for a wildcard.
    watched: BTreeMap<Kind, BTreeSet<String>>,
}

impl Session {
    fn heard(&self, request: Request) -> Heard {
        Heard { stream: self.stream, metadata: self.metadata.clone(), certified: self.certified, request }
    }

    /// What a request of a stream of the state of the world is answered with: everything of it.
    fn answer_all(&mut self, ads: &Ads, request: &DiscoveryRequest) -> Option<DeltaDiscoveryResponse> {
        let kind = Kind::of(&request.type_url)?;
        let names: BTreeSet<String> = request.resource_names.iter().cloned().collect();
        let old = self.watched.insert(kind, names.clone());
        if !request.response_nonce.is_empty() && old.as_ref() == Some(&names) || ads.world().held.contains(&kind) {
            return None;
        }
        Some(ads.response(kind, |name| kind.is_wildcard() || names.contains(name), Vec::new()))
    }

    /// What a delta request is answered with.
    fn answer(&mut self, ads: &Ads, request: &DeltaDiscoveryRequest) -> Option<DeltaDiscoveryResponse> {
        let kind = Kind::of(&request.type_url)?;
        if !request.response_nonce.is_empty() {
            return None;
        }
        let first = !self.watched.contains_key(&kind);
        let watched = self.watched.entry(kind).or_default();
        let asked: BTreeSet<String> = request.resource_names_subscribe.iter().cloned().collect();
        watched.extend(asked.iter().cloned());
        if !kind.is_wildcard() {
            watched.extend(request.initial_resource_versions.keys().cloned());
        }
        for name in &request.resource_names_unsubscribe {
            watched.remove(name);
        }
        if ads.world().held.contains(&kind) || !first && asked.is_empty() {
            return None;
        }
        let has = ads.world().resources.get(&kind).cloned().unwrap_or_default();
        let listed = request.initial_resource_versions.keys().chain(&asked);
        let missing = listed.filter(|name| !has.contains_key(*name)).cloned().collect();
        let wildcard = kind.is_wildcard();
        Some(ads.response(kind, |name| wildcard || asked.contains(name), missing))
    }

    fn obey(&self, ads: &Ads, order: Order) -> Result<Option<DeltaDiscoveryResponse>, Option<Status>> {
        match order {
            Order::End(status) => Err(status),
            Order::Say(response) => Ok(Some(*response)),
            Order::Push { kind, names, removed } => {
                let Some(watched) = self.watched.get(&kind) else { return Ok(None) };
                let which = |name: &str| match &names {
                    Some(names) => names.iter().any(|n| n == name),
                    None => kind.is_wildcard() || watched.contains(name),
                };
                Ok(Some(ads.response(kind, which, removed)))
            }
        }
    }
}

impl Service for Ads {
    fn answer(self: Arc<Self>, call: Call) -> Reply {
        Box::pin(async move {
            let (ads, peer) = (self, call.peer);
            if call.request.uri().path().ends_with("/DeltaAggregatedResources") {
                let codec = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
                tonic::server::Grpc::new(codec).streaming(Delta { ads, peer }, call.request).await
            } else {
                let codec = ProstCodec::<DiscoveryResponse, DiscoveryRequest>::default();
                tonic::server::Grpc::new(codec).streaming(StateOfTheWorld { ads, peer }, call.request).await
            }
        })
    }
}

type Answers<T> = ReceiverStream<Result<T, Status>>;
type Opening<T> = std::future::Ready<Result<Response<Answers<T>>, Status>>;

struct Delta {
    ads: Arc<Ads>,
    peer: Arc<Peer>,
}

impl tonic::server::StreamingService<DeltaDiscoveryRequest> for Delta {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = Answers<DeltaDiscoveryResponse>;
    type Future = Opening<DeltaDiscoveryResponse>;

    fn call(&mut self, request: tonic::Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        std::future::ready(open(&self.ads, &self.peer, request, Request::Delta, |response| response))
    }
}

struct StateOfTheWorld {
    ads: Arc<Ads>,
    peer: Arc<Peer>,
}

impl tonic::server::StreamingService<DiscoveryRequest> for StateOfTheWorld {
    type Response = DiscoveryResponse;
    type ResponseStream = Answers<DiscoveryResponse>;
    type Future = Opening<DiscoveryResponse>;

    fn call(&mut self, request: tonic::Request<Streaming<DiscoveryRequest>>) -> Self::Future {
        std::future::ready(open(&self.ads, &self.peer, request, Request::Sotw, whole))
    }
}

/// What of a delta response there is in one of the state of the world.
fn whole(delta: DeltaDiscoveryResponse) -> DiscoveryResponse {
    DiscoveryResponse {
        version_info: delta.system_version_info,
        resources: delta.resources.into_iter().filter_map(|r| r.resource).collect(),
        type_url: delta.type_url,
        nonce: delta.nonce,
    }
}

fn open<Q, R>(
    ads: &Arc<Ads>,
    peer: &Peer,
    request: tonic::Request<Streaming<Q>>,
    asked: fn(Q) -> Request,
    told: fn(DeltaDiscoveryResponse) -> R,
) -> Result<Response<Answers<R>>, Status>
where
    Q: Send + 'static,
    R: Send + 'static,
{
    let metadata = request.metadata().clone().into_headers();
    let session = ads.begin(&metadata, peer)?;
    let (send, answers) = mpsc::channel(64);
    tokio::spawn(talk(Arc::clone(ads), session, request.into_inner(), send, (asked, told)));
    Ok(Response::new(ReceiverStream::new(answers)))
}

/// A form's requests as ours, and our responses in that form.
type Forms<Q, R> = (fn(Q) -> Request, fn(DeltaDiscoveryResponse) -> R);

async fn talk<Q, R>(
    ads: Arc<Ads>,
    mut session: Session,
    mut requests: Streaming<Q>,
    send: mpsc::Sender<Result<R, Status>>,
    (asked, told): Forms<Q, R>,
) {
    let mut orders = ads.orders.subscribe();
    let silent = ads.world().silent;
    loop {
        let response = tokio::select! {
            request = requests.message() => {
                let Ok(Some(request)) = request else { return };
                let request = asked(request);
                let response = match &request {
                    _ if silent => None,
                    Request::Delta(request) => session.answer(&ads, request),
                    Request::Sotw(request) => session.answer_all(&ads, request),
                };
                ads.heard.push(session.heard(request));
                response
            }
            order = orders.recv() => {
                let Ok(order) = order else { return };
                match session.obey(&ads, order) {
                    Ok(response) => response.filter(|_| !silent),
                    Err(Some(status)) => {
                        let _ = send.send(Err(status)).await;
                        return;
                    }
                    Err(None) => return,
                }
            }
        };
        // A client that left hears of nothing; its requests end too.
        if let Some(response) = response
            && send.send(Ok(told(response))).await.is_err()
        {
            return;
        }
    }
}
