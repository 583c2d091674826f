//! istiod's discovery service for tests: a delta stream that answers every question with the resources it was given and
//! keeps what it was asked. Messages are the few fields that are needed, written by hand.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use bench_harness::istiod::{Call, Log, Reply, Service};
use bytes::Bytes;
use istio_proxy::xds::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use prost::Message;
use proxy_config::xds::Any;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

/// Full name of the service.
pub const SERVICE: &str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
pub const HEALTH: &str = "type.googleapis.com/istio.v1.HealthInformation";

/// One message that came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Counts streams from 1.
    pub stream: usize,
    /// The message.
    pub request: DeltaDiscoveryRequest,
    /// The token of the stream.
    pub authorization: String,
    /// Whether the stream's peer showed a certificate.
    pub certified: bool,
}

/// The service.
pub struct Discovery {
    resources: BTreeMap<&'static str, Vec<(String, Bytes)>>,
    pub asked: Log<Asked>,
    streams: Log<()>,
}

impl Discovery {
    /// Answers with these resources, by type.
    pub fn new(resources: BTreeMap<&'static str, Vec<(String, Bytes)>>) -> Arc<Self> {
        Arc::new(Self { resources, asked: Log::default(), streams: Log::default() })
    }

    /// Waits until a message that fits has come; the first such.
    pub async fn until(&self, what: &str, mut fits: impl FnMut(&Asked) -> bool) -> Asked {
        let mut count = 0;
        loop {
            let all = self.asked.all();
            if let Some(found) = all.iter().find(|asked| fits(asked)) {
                return found.clone();
            }
            assert!(count < 10_000, "{what} did not come");
            count = all.len() + 1;
            self.asked.reach(count).await;
        }
    }

    fn answer_to(&self, request: &DeltaDiscoveryRequest, number: usize) -> Option<DeltaDiscoveryResponse> {
        let opens = request.response_nonce.is_empty() || !request.resource_names_subscribe.is_empty();
        if !opens || request.type_url == HEALTH {
            return None;
        }
        let known = self.resources.iter().find(|(url, _)| **url == request.type_url).map(|(_, r)| r.as_slice());
        let resources = known.unwrap_or_default().iter().map(|(name, value)| Resource {
            version: String::new(),
            resource: Some(Any { type_url: request.type_url.clone(), value: value.clone() }),
            name: name.clone(),
        });
        Some(DeltaDiscoveryResponse {
            system_version_info: "push-1".to_owned(),
            resources: resources.collect(),
            type_url: request.type_url.clone(),
            nonce: format!("n{number}"),
            ..DeltaDiscoveryResponse::default()
        })
    }
}

impl Service for Discovery {
    fn answer(self: Arc<Self>, call: Call) -> Reply {
        Box::pin(async move {
            self.streams.push(());
            let certified = !call.peer.certificates.is_empty();
            let stream = Deltas { service: Arc::clone(&self), stream: self.streams.len(), certified };
            tonic::server::Grpc::new(ProstCodec::default()).streaming(stream, call.request).await
        })
    }
}

struct Deltas {
    service: Arc<Discovery>,
    stream: usize,
    certified: bool,
}

type Responses = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

impl tonic::server::StreamingService<DeltaDiscoveryRequest> for Deltas {
    type Response = DeltaDiscoveryResponse;
    type ResponseStream = Responses;
    type Future = Pin<Box<dyn Future<Output = Result<tonic::Response<Responses>, Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<Streaming<DeltaDiscoveryRequest>>) -> Self::Future {
        let (service, stream, certified) = (Arc::clone(&self.service), self.stream, self.certified);
        Box::pin(async move {
            let token = request.metadata().get("authorization").and_then(|t| t.to_str().ok()).unwrap_or_default();
            let authorization = token.to_owned();
            let mut requests = request.into_inner();
            let (send, responses) = tokio::sync::mpsc::channel(16);
            tokio::spawn(async move {
                while let Some(Ok(request)) = requests.next().await {
                    let answer = service.answer_to(&request, service.asked.len());
                    service.asked.push(Asked { stream, request, authorization: authorization.clone(), certified });
                    // A stream that is over takes no more answers.
                    if let Some(answer) = answer
                        && send.send(Ok(answer)).await.is_err()
                    {
                        return;
                    }
                }
            });
            Ok(tonic::Response::new(Box::pin(ReceiverStream::new(responses)) as Responses))
        })
    }
}

#[derive(Clone, PartialEq, Message)]
struct SocketAddress {
    #[prost(string, tag = "2")]
    address: String,
    #[prost(uint32, tag = "3")]
    port: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Address {
    #[prost(message, optional, tag = "1")]
    socket: Option<SocketAddress>,
}

impl From<SocketAddr> for Address {
    fn from(at: SocketAddr) -> Self {
        Self { socket: Some(SocketAddress { address: at.ip().to_string(), port: at.port().into() }) }
    }
}

#[derive(Clone, PartialEq, Message)]
struct Filter {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "4")]
    config: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct FilterChain {
    #[prost(message, repeated, tag = "3")]
    filters: Vec<Filter>,
}

#[derive(Clone, PartialEq, Message)]
struct Listener {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    address: Option<Address>,
    #[prost(message, repeated, tag = "3")]
    chains: Vec<FilterChain>,
}

#[derive(Clone, PartialEq, Message)]
struct TcpProxy {
    #[prost(string, tag = "1")]
    stat_prefix: String,
    #[prost(string, tag = "2")]
    cluster: String,
}

#[derive(Clone, PartialEq, Message)]
struct Endpoint {
    #[prost(message, optional, tag = "1")]
    address: Option<Address>,
}

#[derive(Clone, PartialEq, Message)]
struct LbEndpoint {
    #[prost(message, optional, tag = "1")]
    endpoint: Option<Endpoint>,
}

#[derive(Clone, PartialEq, Message)]
struct Locality {
    #[prost(message, repeated, tag = "2")]
    endpoints: Vec<LbEndpoint>,
}

#[derive(Clone, PartialEq, Message)]
struct Assignment {
    #[prost(string, tag = "1")]
    cluster: String,
    #[prost(message, repeated, tag = "2")]
    localities: Vec<Locality>,
}

#[derive(Clone, PartialEq, Message)]
struct Cluster {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "33")]
    assignment: Option<Assignment>,
}

/// A listener that hands connections to one endpoint, and the cluster with that endpoint.
pub fn forward(from: SocketAddr, to: SocketAddr) -> BTreeMap<&'static str, Vec<(String, Bytes)>> {
    let proxy = TcpProxy { stat_prefix: "app".to_owned(), cluster: "app".to_owned() };
    let config = Any {
        type_url: "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy".to_owned(),
        value: proxy.encode_to_vec().into(),
    };
    let filter = Filter { name: "envoy.filters.network.tcp_proxy".to_owned(), config: Some(config) };
    let listener = Listener {
        name: "front".to_owned(),
        address: Some(from.into()),
        chains: vec![FilterChain { filters: vec![filter] }],
    };
    let endpoint = LbEndpoint { endpoint: Some(Endpoint { address: Some(to.into()) }) };
    let assignment = Assignment { cluster: "app".to_owned(), localities: vec![Locality { endpoints: vec![endpoint] }] };
    let cluster = Cluster { name: "app".to_owned(), assignment: Some(assignment) };
    BTreeMap::from([
        (LISTENER, vec![("front".to_owned(), listener.encode_to_vec().into())]),
        (CLUSTER, vec![("app".to_owned(), cluster.encode_to_vec().into())]),
    ])
}
