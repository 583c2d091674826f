//! Listener and cluster of one proxy in the wire format that a control plane uses.

use std::collections::HashMap;

use envoy_types::pb::envoy::config::cluster::v3::{Cluster, Filter as UpstreamFilter, cluster};
use envoy_types::pb::envoy::config::core::v3::{
    Address, Metadata, SocketAddress, TrafficDirection, TransportSocket, address, socket_address, transport_socket,
};
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint,
};
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener, filter};
use envoy_types::pb::envoy::config::route::v3::{
    Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, route, route_action, route_match,
};
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, http_filter,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::{
    CombinedCertificateValidationContext, ValidationContextType,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, UpstreamTlsContext,
};
use envoy_types::pb::google::protobuf as wkt;
use envoy_types::util::pack_any;
use prost::Message;
use proxy_config::xds::{Any, DiscoveryResponse};
use serde_json::{Value, json};

/// What one proxy does.
pub(super) struct Leg {
    pub(super) inbound: bool,
    /// Port it listens on.
    pub(super) listen: u16,
    /// Port it sends to.
    pub(super) to: u16,
    /// Bytes instead of HTTP.
    pub(super) tcp: bool,
    /// TLS between the proxies, with this ALPN.
    pub(super) tls: Option<Vec<String>>,
    /// `stats.PluginConfig` as JSON.
    pub(super) stats: Option<Value>,
    /// The metadata exchange as JSON.
    pub(super) exchange: Option<Value>,
    /// Services of the cluster.
    pub(super) services: Value,
    /// `istio.workload` of the endpoint.
    pub(super) endpoint: String,
    /// Further fields of the cluster's `istio` metadata.
    pub(super) cluster: Value,
}

/// An untyped configuration in a typed envelope.
#[derive(Clone, PartialEq, Message)]
struct TypedStruct {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(message, optional, tag = "2")]
    value: Option<wkt::Struct>,
}

/// Files of an `--xds-dir` with their content.
pub(super) fn responses(leg: &Leg) -> [(&'static str, DiscoveryResponse); 2] {
    [
        ("lds.pb", response("envoy.config.listener.v3.Listener", listener(leg).encode_to_vec())),
        ("cds.pb", response("envoy.config.cluster.v3.Cluster", cluster(leg).encode_to_vec())),
    ]
}

fn response(name: &str, resource: Vec<u8>) -> DiscoveryResponse {
    let type_url = format!("type.googleapis.com/{name}");
    let resources = vec![Any { type_url: type_url.clone(), value: resource.into() }];
    DiscoveryResponse { version_info: "1".to_owned(), resources, type_url, nonce: "1".to_owned() }
}

fn name(leg: &Leg) -> String {
    let kind = if leg.tcp { "tcp" } else { "http" };
    if leg.inbound {
        "inbound|9080||".to_owned()
    } else {
        format!("outbound|9080|{kind}|server.default.svc.cluster.local")
    }
}

fn listener(leg: &Leg) -> Listener {
    let mut filters = Vec::new();
    if leg.tcp {
        let exchange = leg.exchange.as_ref().filter(|_| leg.inbound);
        filters.extend(exchange.map(|said| network("istio.metadata_exchange", EXCHANGE, said)));
        filters.extend(leg.stats.iter().map(|said| network("istio.stats", STATS, said)));
        let cluster_specifier = Some(tcp_proxy::ClusterSpecifier::Cluster(name(leg)));
        let proxy = TcpProxy { stat_prefix: "tcp".to_owned(), cluster_specifier, ..Default::default() };
        filters.push(Filter {
            name: "tcp_proxy".to_owned(),
            config_type: Some(filter::ConfigType::TypedConfig(pack_any(proxy))),
        });
    } else {
        let manager = pack_any(manager(leg));
        filters.push(Filter { name: "http".to_owned(), config_type: Some(filter::ConfigType::TypedConfig(manager)) });
    }
    let transport_socket = leg.tls.as_ref().filter(|_| leg.inbound).map(|alpn| {
        socket(pack_any(DownstreamTlsContext {
            common_tls_context: Some(common(alpn)),
            require_client_certificate: Some(wkt::BoolValue { value: true }),
            ..Default::default()
        }))
    });
    let direction = if leg.inbound { TrafficDirection::Inbound } else { TrafficDirection::Outbound };
    Listener {
        name: if leg.inbound { "server" } else { "client" }.to_owned(),
        address: Some(place(leg.listen)),
        traffic_direction: direction as i32,
        filter_chains: vec![FilterChain { filters, transport_socket, ..Default::default() }],
        ..Default::default()
    }
}

const STATS: &str = "stats.PluginConfig";
const EXCHANGE: &str = "envoy.tcp.metadataexchange.config.MetadataExchange";

fn network(name: &str, of: &str, said: &Value) -> Filter {
    Filter { name: name.to_owned(), config_type: Some(filter::ConfigType::TypedConfig(untyped(of, said))) }
}

fn http(name: &str, any: wkt::Any) -> HttpFilter {
    let config_type = Some(http_filter::ConfigType::TypedConfig(any));
    HttpFilter { name: name.to_owned(), config_type, ..Default::default() }
}

fn manager(leg: &Leg) -> HttpConnectionManager {
    let mut filters: Vec<HttpFilter> = Vec::new();
    let exchange = "io.istio.http.peer_metadata.Config";
    filters.extend(leg.exchange.iter().map(|said| http("istio.metadata_exchange", untyped(exchange, said))));
    filters.extend(leg.stats.iter().map(|said| http("istio.stats", untyped(STATS, said))));
    filters.push(http("envoy.filters.http.router", pack_any(Router::default())));
    let action = RouteAction {
        cluster_specifier: Some(route_action::ClusterSpecifier::Cluster(name(leg))),
        ..Default::default()
    };
    let route = Route {
        name: "r".to_owned(),
        r#match: Some(RouteMatch {
            path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
            ..Default::default()
        }),
        action: Some(route::Action::Route(action)),
        ..Default::default()
    };
    let host =
        VirtualHost { name: "v".to_owned(), domains: vec!["*".to_owned()], routes: vec![route], ..Default::default() };
    let table = RouteConfiguration { name: "t".to_owned(), virtual_hosts: vec![host], ..Default::default() };
    HttpConnectionManager {
        stat_prefix: "http".to_owned(),
        http_filters: filters,
        route_specifier: Some(RouteSpecifier::RouteConfig(table)),
        ..Default::default()
    }
}

fn cluster(leg: &Leg) -> Cluster {
    let mut istio = if leg.cluster.is_object() { leg.cluster.clone() } else { json!({}) };
    if leg.services.is_array() {
        istio["services"] = leg.services.clone();
    }
    let filters = leg.exchange.iter().filter(|_| leg.tcp && !leg.inbound).map(|said| UpstreamFilter {
        name: "istio.metadata_exchange".to_owned(),
        typed_config: Some(untyped(EXCHANGE, said)),
        ..Default::default()
    });
    let transport_socket = leg.tls.as_ref().filter(|_| !leg.inbound).map(|alpn| {
        let sni = "server.default.svc.cluster.local".to_owned();
        socket(pack_any(UpstreamTlsContext { common_tls_context: Some(common(alpn)), sni, ..Default::default() }))
    });
    let endpoint = Endpoint { address: Some(place(leg.to)), ..Default::default() };
    let host = LbEndpoint {
        host_identifier: Some(lb_endpoint::HostIdentifier::Endpoint(endpoint)),
        metadata: (!leg.endpoint.is_empty()).then(|| metadata(&json!({"workload": leg.endpoint}))),
        ..Default::default()
    };
    let hosts = LocalityLbEndpoints { lb_endpoints: vec![host], ..Default::default() };
    Cluster {
        name: name(leg),
        cluster_discovery_type: Some(cluster::ClusterDiscoveryType::Type(cluster::DiscoveryType::Static as i32)),
        load_assignment: Some(ClusterLoadAssignment {
            cluster_name: name(leg),
            endpoints: vec![hosts],
            ..Default::default()
        }),
        metadata: Some(metadata(&istio)),
        filters: filters.collect(),
        transport_socket,
        ..Default::default()
    }
}

fn metadata(istio: &Value) -> Metadata {
    Metadata { filter_metadata: HashMap::from([("istio".to_owned(), structure(istio))]), ..Default::default() }
}

fn place(port: u16) -> Address {
    let socket = SocketAddress {
        address: "127.0.0.1".to_owned(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(port.into())),
        ..Default::default()
    };
    Address { address: Some(address::Address::SocketAddress(socket)) }
}

fn socket(any: wkt::Any) -> TransportSocket {
    let config_type = Some(transport_socket::ConfigType::TypedConfig(any));
    TransportSocket { name: "envoy.transport_sockets.tls".to_owned(), config_type }
}

fn common(alpn: &[String]) -> CommonTlsContext {
    let secret = |name: &str| SdsSecretConfig { name: name.to_owned(), ..Default::default() };
    let combined = CombinedCertificateValidationContext {
        default_validation_context: Some(CertificateValidationContext::default()),
        validation_context_sds_secret_config: Some(secret("ROOTCA")),
        ..Default::default()
    };
    CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![secret("default")],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
        alpn_protocols: alpn.to_vec(),
        ..Default::default()
    }
}

fn untyped(of: &str, said: &Value) -> wkt::Any {
    let wrapped = TypedStruct { type_url: format!("type.googleapis.com/{of}"), value: Some(structure(said)) };
    let type_url = "type.googleapis.com/udpa.type.v1.TypedStruct".to_owned();
    wkt::Any { type_url, value: wrapped.encode_to_vec() }
}

fn structure(of: &Value) -> wkt::Struct {
    let fields = of.as_object().into_iter().flatten();
    wkt::Struct { fields: fields.map(|(key, value)| (key.clone(), value_of(value))).collect() }
}

fn value_of(of: &Value) -> wkt::Value {
    use wkt::value::Kind;
    let kind = match of {
        Value::Null => Kind::NullValue(0),
        Value::Bool(flag) => Kind::BoolValue(*flag),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(wkt::ListValue { values: items.iter().map(value_of).collect() }),
        Value::Object(_) => Kind::StructValue(structure(of)),
    };
    wkt::Value { kind: Some(kind) }
}
