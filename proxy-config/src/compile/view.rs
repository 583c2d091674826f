//! What listeners and routes of one proxy are made from: the loader's and the registry's answers, ready to be read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::peer_auth;
use super::trust_domain::TrustDomains;
use super::virtual_services::Routes;
use crate::istio::destination_rule::ConnectionPool;
use crate::istio::virtual_service::{Destination, HttpRetry};
use crate::model::{
    AccessLog, ClientCertDetails, Direction, EscapedSlashes, ForwardClientCert, HashPolicy, HttpFilter, IstioStats,
    Rbac, ServerHeader, TlsVersion, Tracing,
};
use crate::registry::{Proxy, Service, ServiceEndpoint, ServicePort, ServiceTarget};

/// Everything that one proxy sees.
#[derive(Clone, Copy)]
pub struct View<'a> {
    /// The proxy.
    pub proxy: &'a Proxy,
    /// Mesh-wide settings after their defaults.
    pub mesh: &'a Settings,
    /// Services that the proxy may call, in istiod's order (oldest first).
    pub services: &'a [Arc<Service>],
    /// Services that only routes lead to: they have clusters, but neither listeners nor routes of their own.
    pub dependencies: &'a [Arc<Service>],
    /// Egress listeners of the Sidecar, the one without a port last; empty: one that sees everything.
    pub egress: &'a [Egress],
    /// Service ports that the proxy itself serves, oldest service first.
    pub targets: &'a [ServiceTarget],
    /// VirtualServices of the mesh gateway that the proxy sees, in order of precedence.
    pub virtual_services: &'a [Routes],
    /// mTLS mode of the proxy's own ports.
    pub mtls: &'a peer_auth::Effective,
    /// Policies that select the proxy.
    pub policies: &'a Policies,
    /// What DestinationRules say about a destination: host, explicit port, subset.
    pub rules: &'a dyn Fn(&str, Option<u16>, &str) -> Rules,
    /// Endpoints of a service port, whatever their health.
    pub endpoints: &'a dyn Fn(&Service, u16) -> Vec<ServiceEndpoint>,
}

impl View<'_> {
    /// Every service that a route may lead to.
    pub(super) fn reachable(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.iter().chain(self.dependencies)
    }

    /// What is seen through an egress listener.
    pub(super) fn through<'b>(&'b self, egress: &'b Egress) -> View<'b> {
        View { services: &egress.services, virtual_services: &egress.routes, ..*self }
    }

    /// Whether the proxy listens for everything itself.
    pub(super) fn is_uncaptured(&self) -> bool {
        self.mesh.interception == Interception::None
    }

    /// Whether the proxy itself needs the port on the wildcard address.
    pub(super) fn is_reserved(&self, port: u16) -> bool {
        port == self.mesh.outbound_port || port == self.mesh.inbound_port || self.mesh.reserved_ports.contains(&port)
    }
}

/// An egress listener of a Sidecar, with what it sees.
#[derive(Debug, Clone)]
pub struct Egress {
    /// Its port; `None` is every port of its services.
    pub port: Option<ServicePort>,
    /// Address to listen on; empty follows from the services.
    pub bind: String,
    /// It is listened on; its traffic is not captured.
    pub bound: bool,
    /// Services that can be called through it.
    pub services: Vec<Arc<Service>>,
    /// VirtualServices that hold on it.
    pub routes: Vec<Routes>,
}

/// Policies as filters of the proxy's inbound chains.
#[derive(Debug, Clone, Default)]
pub struct Policies {
    /// CUSTOM on HTTP chains.
    pub http_custom: Vec<Rbac>,
    /// Token validation.
    pub jwt: Option<HttpFilter>,
    /// AUDIT, DENY, ALLOW on HTTP chains.
    pub http: Vec<Rbac>,
    /// CUSTOM, AUDIT, DENY, ALLOW on TCP chains.
    pub tcp: Vec<Rbac>,
    /// A security object that could not be compiled: no inbound chain may serve.
    pub unusable: Option<String>,
}

/// What the listener side reads of a DestinationRule.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules {
    /// Consistent hashing.
    pub hash: Option<HashPolicy>,
    /// TCP: the source address is hashed.
    pub hash_source_ip: bool,
    /// TCP idle limit.
    pub idle_timeout: Option<Duration>,
    /// Longest life of a client connection.
    pub max_connection_duration: Option<Duration>,
    /// CONNECT tunnel: host name and POST instead of CONNECT.
    pub tunneling: Option<(String, bool)>,
}

/// How the proxy gets its traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Interception {
    /// iptables REDIRECT.
    #[default]
    Redirect,
    /// iptables TPROXY.
    Tproxy,
    /// Not at all: every listener binds.
    None,
}

/// What happens to traffic that no service explains.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum OutboundPolicy {
    /// It goes to where it was sent.
    #[default]
    AllowAny,
    /// It goes to this destination.
    EgressProxy(Destination),
    /// It is refused.
    RegistryOnly,
}

/// Mesh-wide settings that listeners and routes read; [`Settings::default`] is istiod's built-in mesh.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Domain of service names.
    pub domain: String,
    /// Namespace of mesh-wide objects.
    pub root_namespace: String,
    /// Own trust domain and aliases.
    pub trust_domains: TrustDomains,
    /// Trust domains that peers may come from, own one first; empty accepts any.
    pub peer_domains: Vec<String>,
    /// Port of `virtualOutbound`.
    pub outbound_port: u16,
    /// Port of `virtualInbound`.
    pub inbound_port: u16,
    /// Interception of this proxy.
    pub interception: Interception,
    /// Unknown traffic.
    pub outbound: OutboundPolicy,
    /// Normalisation of paths.
    pub normalize_path: bool,
    /// Duplicate slashes.
    pub merge_slashes: bool,
    /// Escaped slashes.
    pub escaped_slashes: EscapedSlashes,
    /// Limit on protocol detection; `None` is for ever.
    pub detection_timeout: Option<Duration>,
    /// Retries of routes that set none.
    pub retries: Option<HttpRetry>,
    /// Retries towards the application.
    pub inbound_retries: Option<HttpRetry>,
    /// Lowest TLS version of inbound mTLS.
    pub min_tls: TlsVersion,
    /// TLS 1.2 suites of inbound mTLS.
    pub cipher_suites: Vec<String>,
    /// What is told of traffic to the application.
    pub inbound_told: Told,
    /// What is told of traffic from the application.
    pub outbound_told: Told,
    /// `ISTIO_META_IDLE_TIMEOUT`.
    pub idle_timeout: Option<Duration>,
    /// `ISTIO_META_HTTP10`.
    pub http10: bool,
    /// `ISTIO_META_INBOUND_LISTENER_EXACT_BALANCE`.
    pub inbound_exact_balance: bool,
    /// `ISTIO_META_OUTBOUND_LISTENER_EXACT_BALANCE`.
    pub outbound_exact_balance: bool,
    /// `proxyHeaders` of ProxyConfig.
    pub headers: ProxyHeaders,
    /// Pool limits of every inbound port, as the Sidecar says.
    pub inbound_pool: Option<ConnectionPool>,
    /// Ports that the proxy serves itself and no service may take (15021, 15090, admin).
    pub reserved_ports: Vec<u16>,
}

/// What is told of traffic in one direction.
#[derive(Debug, Clone)]
pub struct Told {
    /// Access logs of requests and connections.
    pub access_log: Vec<AccessLog>,
    /// Access logs of connections that found no chain.
    pub listener_access_log: Vec<AccessLog>,
    /// Tracing of connection managers.
    pub tracing: Option<Tracing>,
    /// The request id carries the decision on tracing.
    pub trace_by_request_id: bool,
    /// Istio's metrics.
    pub stats: Option<IstioStats>,
}

impl Default for Told {
    fn default() -> Self {
        Self {
            access_log: Vec::new(),
            listener_access_log: Vec::new(),
            tracing: None,
            trace_by_request_id: true,
            stats: None,
        }
    }
}

impl Settings {
    /// What is told of a direction.
    pub(super) fn told(&self, direction: Direction) -> &Told {
        if direction == Direction::Inbound { &self.inbound_told } else { &self.outbound_told }
    }
}

/// `proxyHeaders` of ProxyConfig.
#[derive(Debug, Clone, PartialEq)]
pub struct ProxyHeaders {
    /// `server` of inbound responses; empty is Envoy's default.
    pub inbound_server: String,
    /// `server` of outbound responses; empty is Envoy's default.
    pub outbound_server: String,
    /// What happens to an upstream's `server`.
    pub server_transformation: ServerHeader,
    /// XFCC handling of inbound requests.
    pub forward_client_cert: ForwardClientCert,
    /// Parts of XFCC.
    pub client_cert: ClientCertDetails,
    /// `x-envoy-attempt-count` is sent.
    pub attempt_count: bool,
    /// `x-request-id` is made when absent.
    pub request_id: bool,
    /// `x-envoy-*` debug headers are left out.
    pub suppress_debug: bool,
    /// `x-forwarded-port` is sent.
    pub forwarded_port: bool,
    /// `x-forwarded-host` is sent.
    pub forwarded_host: bool,
    /// Header case is kept.
    pub preserve_case: bool,
    /// Metadata exchange headers stay inside the mesh.
    pub metadata_in_mesh: bool,
}

impl Default for ProxyHeaders {
    fn default() -> Self {
        Self {
            inbound_server: "istio-envoy".to_owned(),
            outbound_server: String::new(),
            server_transformation: ServerHeader::Overwrite,
            forward_client_cert: ForwardClientCert::AppendForward,
            client_cert: ClientCertDetails { subject: true, cert: false, chain: false, dns: true, uri: true },
            attempt_count: true,
            request_id: true,
            suppress_debug: false,
            forwarded_port: false,
            forwarded_host: false,
            preserve_case: false,
            metadata_in_mesh: false,
        }
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            domain: "cluster.local".to_owned(),
            root_namespace: "istio-system".to_owned(),
            trust_domains: TrustDomains::new("cluster.local", &[]),
            peer_domains: vec!["cluster.local".to_owned()],
            outbound_port: 15001,
            inbound_port: 15006,
            interception: Interception::Redirect,
            outbound: OutboundPolicy::AllowAny,
            normalize_path: true,
            merge_slashes: false,
            escaped_slashes: EscapedSlashes::KeepUnchanged,
            detection_timeout: None,
            retries: None,
            inbound_retries: None,
            min_tls: TlsVersion::V1_2,
            cipher_suites: default_cipher_suites(),
            inbound_told: Told::default(),
            outbound_told: Told::default(),
            idle_timeout: None,
            http10: false,
            inbound_exact_balance: false,
            outbound_exact_balance: false,
            headers: ProxyHeaders::default(),
            inbound_pool: None,
            reserved_ports: vec![15021, 15090],
        }
    }
}

/// Suites of inbound mTLS under TLS 1.2, OpenSSL names.
fn default_cipher_suites() -> Vec<String> {
    [
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-RSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-RSA-AES128-GCM-SHA256",
        "AES256-GCM-SHA384",
        "AES128-GCM-SHA256",
    ]
    .map(str::to_owned)
    .to_vec()
}

/// Names of ExternalName services by the service that they stand for, sorted.
pub(super) fn aliases(services: &[Arc<Service>]) -> BTreeMap<&str, Vec<&str>> {
    let alias_of: BTreeMap<&str, &str> = services
        .iter()
        .filter_map(|s| s.external_name.as_deref().map(|target| (s.hostname.as_str(), target)))
        .collect();
    let mut out: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for alias in alias_of.keys() {
        let mut target = alias_of[alias];
        // A chain of aliases ends somewhere unless it is a ring; each step uses up one alias.
        for _ in 0..alias_of.len() {
            let Some(next) = alias_of.get(target) else { break };
            target = next;
        }
        if !alias_of.contains_key(target) {
            out.entry(target).or_default().push(alias);
        }
    }
    out
}
