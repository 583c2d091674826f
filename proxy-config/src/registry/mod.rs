//! Who is where, and what do I see: services, endpoints, the proxy's own targets.
//!
//! The registry is built from loaded objects and asked by `compile`; it knows nothing of listeners or clusters.

pub(crate) mod allocate;
pub(crate) mod catalog;
pub(crate) mod ingress;
pub(crate) mod names;
pub(crate) mod scope;
pub(crate) mod services;
pub(crate) mod targets;
pub(crate) mod workload;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::istio::destination_rule::ConnectionPool;
use crate::istio::sidecar::ServerTls;
use crate::model::{Address, HealthStatus, Locality};

/// The proxy that a configuration is compiled for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Proxy {
    /// Workload name (`payment-v2-0`).
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Own addresses; the first one is the main one.
    pub ips: Vec<IpAddr>,
    /// Workload labels.
    pub labels: BTreeMap<String, String>,
    /// Service account name.
    pub service_account: String,
    /// DNS domain of the namespace (`default.svc.cluster.local`).
    pub dns_domain: String,
    /// Locality.
    pub locality: Locality,
    /// Network, empty when unknown.
    pub network: String,
    /// Cluster id (`Kubernetes`).
    pub cluster_id: String,
    /// Kubernetes node name, when it is a pod.
    pub node_name: String,
    /// Raw node metadata, names without `ISTIO_META_`.
    pub metadata: serde_json::Map<String, serde_json::Value>,
    /// Joined by `AUTO_REGISTER_GROUP` and not (yet) listed as a WorkloadEntry.
    pub auto_registered: bool,
}

/// Application protocol of a port (istio-api.md section 1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// HTTP forward proxy.
    HttpProxy,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC.
    Grpc,
    /// gRPC-Web.
    GrpcWeb,
    /// Opaque TLS, SNI-routable.
    Https,
    /// Opaque TLS, SNI-routable.
    Tls,
    /// Opaque bytes.
    Tcp,
    /// MongoDB.
    Mongo,
    /// MySQL.
    Mysql,
    /// Redis.
    Redis,
    /// UDP: ignored.
    Udp,
    /// Not said: sniffed.
    Auto,
}

impl Protocol {
    /// Declared HTTP of any kind.
    pub fn is_http(self) -> bool {
        matches!(self, Self::Http | Self::HttpProxy | Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }
    /// Declared HTTP whose upstream side is HTTP/2.
    pub fn is_http2(self) -> bool {
        matches!(self, Self::Http2 | Self::Grpc | Self::GrpcWeb)
    }
    /// Declared TCP of any kind, opaque TLS included.
    pub fn is_tcp(self) -> bool {
        matches!(self, Self::Https | Self::Tls | Self::Tcp | Self::Mongo | Self::Mysql | Self::Redis)
    }
    /// SNI-routable.
    pub fn is_tls(self) -> bool {
        matches!(self, Self::Https | Self::Tls)
    }
}

/// How a service's hosts are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    /// EDS: the proxy balances.
    ClientSideLb,
    /// STRICT_DNS.
    DnsLb,
    /// LOGICAL_DNS.
    DnsRoundRobinLb,
    /// ORIGINAL_DST (headless, ServiceEntry NONE).
    Passthrough,
    /// Another name for a service (ExternalName).
    Alias,
    /// Resolved per request.
    DynamicDns,
}

/// Where a service was declared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Provider {
    /// A Kubernetes Service.
    Kubernetes,
    /// A ServiceEntry.
    External,
}

/// One service host.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// FQDN.
    pub hostname: String,
    /// Object name; of a ServiceEntry the host, as istiod has it.
    pub name: String,
    /// Object namespace.
    pub namespace: String,
    /// VIPs or CIDRs; empty stands for istiod's `0.0.0.0`.
    pub addresses: Vec<String>,
    /// Ports in declared order, UDP left out.
    pub ports: Vec<ServicePort>,
    /// How hosts are found.
    pub resolution: Resolution,
    /// `MESH_EXTERNAL`: no automatic mTLS.
    pub mesh_external: bool,
    /// Kubernetes headless.
    pub headless: bool,
    /// Where it was declared.
    pub provider: Provider,
    /// Pod and WorkloadEntry selector; empty selects nothing.
    pub selector: BTreeMap<String, String>,
    /// Labels of the object.
    pub labels: BTreeMap<String, String>,
    /// Visibility list; empty takes the mesh default.
    pub export_to: Vec<String>,
    /// SANs allowed besides those of the endpoints.
    pub service_accounts: Vec<String>,
    /// ExternalName's target.
    pub external_name: Option<String>,
    /// `internalTrafficPolicy: Local`.
    pub node_local: bool,
    /// `trafficDistribution` after its precedence, empty when unset.
    pub traffic_distribution: String,
    /// `publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `metadata.creationTimestamp` (RFC 3339), empty when absent: older sorts first.
    pub created: String,
}

/// One port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Name, may be empty.
    pub name: String,
    /// Service port number.
    pub number: u16,
    /// Protocol after istio-api.md section 1.2.
    pub protocol: Protocol,
    /// Numeric or named target; numeric equals `number` when not said.
    pub target: TargetPort,
}

/// `targetPort`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// A number.
    Number(u16),
    /// A container port name or a key of `WorkloadEntry.ports`.
    Name(String),
}

/// One endpoint of one service port.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceEndpoint {
    /// Where.
    pub address: Address,
    /// Name of the service port it serves.
    pub service_port: String,
    /// Workload labels with the synthetic topology labels.
    pub labels: BTreeMap<String, String>,
    /// SPIFFE id without scheme's account part resolved (`spiffe://td/ns/NS/sa/SA`), empty when unknown.
    pub service_account: String,
    /// Locality.
    pub locality: Locality,
    /// Network.
    pub network: String,
    /// At least 1.
    pub weight: u32,
    /// `tlsMode: istio`.
    pub mtls: bool,
    /// Health.
    pub health: HealthStatus,
    /// Workload name for `istio.workload` metadata.
    pub workload: String,
    /// Workload namespace.
    pub namespace: String,
    /// Kubernetes node.
    pub node_name: String,
    /// Host name of headless pods.
    pub hostname: String,
}

/// A service port that the proxy itself serves (inbound).
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceTarget {
    /// The service.
    pub service: Arc<Service>,
    /// Its port.
    pub port: ServicePort,
    /// Port of the application.
    pub target_port: u16,
    /// What a Sidecar says of it, when it was declared there.
    pub ingress: Option<Arc<Ingress>>,
}

/// An inbound port of a Sidecar.
#[derive(Debug, Clone, PartialEq)]
pub struct Ingress {
    /// Address that the port's chains are named after.
    pub bind: String,
    /// `SIDECAR.NAMESPACE`, for traces.
    pub host: String,
    /// `NAMESPACE/SIDECAR`.
    pub object: String,
    /// Where the application listens; `None` is where the caller dialled.
    pub endpoint: Option<Address>,
    /// Pool limits of this port alone.
    pub pool: Option<ConnectionPool>,
    /// A Service serves the port as well.
    pub served: bool,
    /// The port is listened on; its traffic is not captured.
    pub bound: bool,
    /// TLS that the proxy ends where no mTLS is asked for.
    pub tls: Option<ServerTls>,
}

/// `spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
pub(crate) fn spiffe_id(trust_domain: &str, namespace: &str, account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}")
}
