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

use super::{Call, Log, Reply, Service};

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
        Self { world: Mutex::default(), orders, heard: Log::default(), opened: Log::default() }
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

    /// Sends a response as it is: a nonce of before, a type that nobody asked for, nonsense.
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

    fn begin(&self, metadata: &http::HeaderMap) -> Result<Session, Status> {
        if let Some(status) = &self.world().refusal {
            return Err(status.clone());
        }
        let stream = self.opened.len() + 1;
        self.opened.push(stream);
        Ok(Session { stream, metadata: metadata.clone(), watched: BTreeMap::new() })
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
    /// Names by kind; none for a wildcard.
    watched: BTreeMap<Kind, BTreeSet<String>>,
}

impl Session {
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
            if call.request.uri().path().ends_with("/DeltaAggregatedResources") {
                let codec = ProstCodec::<DeltaDiscoveryResponse, DeltaDiscoveryRequest>::default();
                tonic::server::Grpc::new(codec).streaming(Delta(self), call.request).await
            } else {
                let codec = ProstCodec::<DiscoveryResponse, DiscoveryRequest>::default();
                tonic::server::Grpc::new(codec).streaming(StateOfTheWorld(self), call.request).await
            }
        })
    }
}

type Answers<T> = ReceiverStream<Result<T, Status>>;
type Opening<T> = std::future::Ready<Result<Response<Answers<T>>, Status>>;

struct Delta(Arc<Ads>);

impl tonic::server::StreamingService<DeltaDiscoveryRequest> for Delta {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = Answers<DeltaDiscoveryResponse>;
    type Future = Opening<DeltaDiscoveryResponse>;

    fn call(&mut self, request: tonic::Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let metadata = request.metadata().clone().into_headers();
        std::future::ready(self.0.begin(&metadata).map(|session| {
            let (send, answers) = mpsc::channel(64);
            tokio::spawn(delta(Arc::clone(&self.0), session, request.into_inner(), send));
            Response::new(ReceiverStream::new(answers))
        }))
    }
}

async fn delta(
    ads: Arc<Ads>,
    mut session: Session,
    mut requests: Streaming<DeltaDiscoveryRequest>,
    send: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) {
    let mut orders = ads.orders.subscribe();
    let silent = ads.world().silent;
    loop {
        let response = tokio::select! {
            request = requests.message() => {
                let Ok(Some(request)) = request else { return };
                let response = if silent { None } else { session.answer(&ads, &request) };
                let request = Request::Delta(request);
                ads.heard.push(Heard { stream: session.stream, metadata: session.metadata.clone(), request });
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
            && send.send(Ok(response)).await.is_err()
        {
            return;
        }
    }
}

/// State of the world: whatever is asked is answered with everything of it.
struct StateOfTheWorld(Arc<Ads>);

impl tonic::server::StreamingService<DiscoveryRequest> for StateOfTheWorld {
    type Response = DiscoveryResponse;
    type ResponseStream = Answers<DiscoveryResponse>;
    type Future = Opening<DiscoveryResponse>;

    fn call(&mut self, request: tonic::Request<Streaming<DiscoveryRequest>>) -> Self::Future {
        let metadata = request.metadata().clone().into_headers();
        std::future::ready(self.0.begin(&metadata).map(|session| {
            let (send, answers) = mpsc::channel(64);
            tokio::spawn(world(Arc::clone(&self.0), session, request.into_inner(), send));
            Response::new(ReceiverStream::new(answers))
        }))
    }
}

async fn world(
    ads: Arc<Ads>,
    mut session: Session,
    mut requests: Streaming<DiscoveryRequest>,
    send: mpsc::Sender<Result<DiscoveryResponse, Status>>,
) {
    while let Ok(Some(request)) = requests.message().await {
        let kind = Kind::of(&request.type_url);
        let names: BTreeSet<String> = request.resource_names.iter().cloned().collect();
        let nonce = request.response_nonce.clone();
        let request = Request::Sotw(request);
        ads.heard.push(Heard { stream: session.stream, metadata: session.metadata.clone(), request });
        let Some(kind) = kind else { continue };
        let old = session.watched.insert(kind, names.clone());
        if !nonce.is_empty() && old.as_ref() == Some(&names) || ads.world().held.contains(&kind) {
            continue;
        }
        let delta = ads.response(kind, |name| kind.is_wildcard() || names.contains(name), Vec::new());
        let response = DiscoveryResponse {
            version_info: delta.system_version_info,
            resources: delta.resources.into_iter().filter_map(|r| r.resource).collect(),
            type_url: delta.type_url,
            nonce: delta.nonce,
        };
        if send.send(Ok(response)).await.is_err() {
            return;
        }
    }
}
