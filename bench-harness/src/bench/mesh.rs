//! A large mesh as istiod says it: for each service of two ports a cluster, its load assignment and a virtual host a port.
//!
//! The shapes are those of a recorded mesh of 1,000 services: what a cluster carries (breakers, metadata, two sockets), what an
//! endpoint does (workload, health), what a virtual host does (five domains, retries).

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr};

use envoy_types::pb::envoy::config::cluster::v3::{self as cluster, cluster as part};
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::retry::host::previous_hosts::v3::PreviousHostsPredicate;
use envoy_types::pb::envoy::extensions::transport_sockets::raw_buffer::v3::RawBuffer;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::r#type::v3::Percent;
use envoy_types::pb::google::protobuf as wkt;
use istio_proxy::xds::Kind;

use crate::istiod::ads::Ads;
use crate::istiod::resources::{address, ads, any, http_listener, packed};

/// Ports of each service.
pub(super) const PORTS: [u16; 2] = [80, 9090];
/// Services that get traffic: the first ones. Their endpoints take plaintext, all others mutual TLS.
pub(super) const USED: usize = 10;
/// Endpoints of each service.
pub(super) const ENDPOINTS: usize = 10;
/// Namespaces that services are spread over.
const NAMESPACES: usize = 20;

/// Whose mesh it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum For {
    /// A proxy with Istio's own filters, which gets certificates from its agent.
    Istio,
    /// Envoy as its makers build it: without those filters, with secrets from the same stream.
    Envoy,
}

/// A service's host name.
pub(super) fn host(service: usize) -> String {
    format!("svc-{service}.ns{}.svc.cluster.local", service % NAMESPACES)
}

/// Where a mesh is: requests come in on a socket for each port (nothing is redirected), and all endpoints are addresses of
/// the loopback with the backend's port.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) entries: [SocketAddr; 2],
    pub(super) backend: u16,
}

/// Puts a mesh of so many services into a world.
pub(super) fn fill(world: &Ads, services: usize, whose: For, place: Place) {
    let mut tables: Vec<Vec<route::VirtualHost>> = PORTS.iter().map(|_| Vec::with_capacity(services)).collect();
    for service in 0..services {
        for (port, table) in PORTS.iter().zip(&mut tables) {
            let name = cluster_name(service, *port);
            world.set(Kind::Cluster, &name, any(&cluster(service, &name, whose)));
            world.set(Kind::Endpoints, &name, any(&assignment(service, &name, place.backend)));
            table.push(virtual_host(service, *port, name));
        }
    }
    for ((port, at), virtual_hosts) in PORTS.iter().zip(place.entries).zip(tables) {
        let table = route::RouteConfiguration { name: port.to_string(), virtual_hosts, ..Default::default() };
        world.set(Kind::Routes, &port.to_string(), any(&table));
        let name = format!("bench_{port}");
        world.set(Kind::Listener, &name, http_listener(&name, at, &port.to_string(), Vec::new()));
    }
    world.set(Kind::Names, "", crate::istiod::resources::no_names());
}

/// One load assignment with its last endpoint on another address, for a push.
pub(super) fn moved(service: usize, backend: u16, turn: u8) -> (String, proxy_config::xds::Any) {
    let name = cluster_name(service, PORTS[0]);
    let mut said = assignment(service, &name, backend);
    let last = said.endpoints.first_mut().and_then(|group| group.lb_endpoints.last_mut());
    if let Some(last) = last {
        *last = lb_endpoint(service, SocketAddr::new(Ipv4Addr::new(127, 255, 0, turn).into(), backend));
    }
    (name, any(&said))
}

fn cluster_name(service: usize, port: u16) -> String {
    format!("outbound|{port}||{}", host(service))
}

fn cluster(service: usize, name: &str, whose: For) -> cluster::Cluster {
    let most = || Some(wkt::UInt32Value { value: u32::MAX });
    let thresholds = cluster::circuit_breakers::Thresholds {
        max_connections: most(),
        max_pending_requests: most(),
        max_requests: most(),
        max_retries: most(),
        ..Default::default()
    };
    let sni = name.replace('|', "_").replacen("outbound_", "outbound_.", 1).replacen("__", "_._.", 1);
    let filters = if whose == For::Istio { vec![metadata_exchange()] } else { Vec::new() };
    cluster::Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(part::ClusterDiscoveryType::Type(part::DiscoveryType::Eds as i32)),
        eds_cluster_config: Some(part::EdsClusterConfig { eds_config: Some(ads()), service_name: name.to_owned() }),
        connect_timeout: Some(wkt::Duration { seconds: 10, nanos: 0 }),
        lb_policy: part::LbPolicy::LeastRequest as i32,
        circuit_breakers: Some(cluster::CircuitBreakers { thresholds: vec![thresholds], ..Default::default() }),
        metadata: Some(metadata(&[("istio", structure(&[("services", services(service))]))])),
        common_lb_config: Some(part::CommonLbConfig {
            healthy_panic_threshold: Some(Percent { value: 0.0 }),
            ..Default::default()
        }),
        alt_stat_name: format!("{name};"),
        filters,
        transport_socket_matches: vec![
            part::TransportSocketMatch {
                name: "tlsMode-istio".to_owned(),
                r#match: Some(structure(&[("tlsMode", text("istio"))])),
                transport_socket: Some(socket("envoy.transport_sockets.tls", &tls_context(sni, whose))),
            },
            part::TransportSocketMatch {
                name: "tlsMode-disabled".to_owned(),
                r#match: Some(wkt::Struct::default()),
                transport_socket: Some(socket("envoy.transport_sockets.raw_buffer", &RawBuffer::default())),
            },
        ],
        ..Default::default()
    }
}

fn services(service: usize) -> wkt::Value {
    let fields = [
        ("host", text(&host(service))),
        ("name", text(&format!("svc-{service}"))),
        ("namespace", text(&format!("ns{}", service % NAMESPACES))),
    ];
    let one = wkt::Value { kind: Some(wkt::value::Kind::StructValue(structure(&fields))) };
    wkt::Value { kind: Some(wkt::value::Kind::ListValue(wkt::ListValue { values: vec![one] })) }
}

/// The filter that Istio puts before every upstream connection.
fn metadata_exchange() -> cluster::Filter {
    let enabled = wkt::Value { kind: Some(wkt::value::Kind::BoolValue(true)) };
    let config = TypedStruct {
        type_url: "type.googleapis.com/envoy.tcp.metadataexchange.config.MetadataExchange".to_owned(),
        value: Some(structure(&[("enable_discovery", enabled), ("protocol", text("istio-peer-exchange"))])),
    };
    cluster::Filter {
        name: "istio.metadata_exchange".to_owned(),
        typed_config: Some(wkt::Any {
            type_url: "type.googleapis.com/udpa.type.v1.TypedStruct".to_owned(),
            value: prost::Message::encode_to_vec(&config),
        }),
        ..Default::default()
    }
}

fn tls_context(sni: String, whose: For) -> tls::UpstreamTlsContext {
    use tls::common_tls_context::{CombinedCertificateValidationContext, ValidationContextType};
    let secret = |name: &str| tls::SdsSecretConfig { name: name.to_owned(), sds_config: Some(secrets_from(whose)) };
    let validation = CombinedCertificateValidationContext {
        default_validation_context: Some(tls::CertificateValidationContext::default()),
        validation_context_sds_secret_config: Some(secret("ROOTCA")),
        ..Default::default()
    };
    let common = tls::CommonTlsContext {
        tls_params: Some(tls::TlsParameters {
            tls_minimum_protocol_version: tls::tls_parameters::TlsProtocol::TlSv12 as i32,
            tls_maximum_protocol_version: tls::tls_parameters::TlsProtocol::TlSv13 as i32,
            ..Default::default()
        }),
        alpn_protocols: vec!["istio-peer-exchange".to_owned(), "istio".to_owned()],
        tls_certificate_sds_secret_configs: vec![secret("default")],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(validation)),
        ..Default::default()
    };
    tls::UpstreamTlsContext { common_tls_context: Some(common), sni, ..Default::default() }
}

fn secrets_from(whose: For) -> core::ConfigSource {
    if whose == For::Envoy {
        return ads();
    }
    let grpc = core::grpc_service::EnvoyGrpc { cluster_name: "sds-grpc".to_owned(), ..Default::default() };
    let service = core::GrpcService {
        target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(grpc)),
        ..Default::default()
    };
    let api = core::ApiConfigSource {
        api_type: core::api_config_source::ApiType::Grpc as i32,
        transport_api_version: core::ApiVersion::V3 as i32,
        grpc_services: vec![service],
        set_node_on_first_message_only: true,
        ..Default::default()
    };
    core::ConfigSource {
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::ApiConfigSource(api)),
        initial_fetch_timeout: Some(wkt::Duration::default()),
        resource_api_version: core::ApiVersion::V3 as i32,
        ..Default::default()
    }
}

fn socket<M: prost::Message + prost::Name>(name: &str, config: &M) -> core::TransportSocket {
    core::TransportSocket {
        name: name.to_owned(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(packed(config))),
    }
}

fn assignment(service: usize, name: &str, backend: u16) -> endpoint::ClusterLoadAssignment {
    let at = |n: usize| {
        let number = u32::try_from(service * ENDPOINTS + n).unwrap_or(u32::MAX) + 0x7f01_0000;
        lb_endpoint(service, SocketAddr::new(Ipv4Addr::from(number).into(), backend))
    };
    let group = endpoint::LocalityLbEndpoints {
        locality: Some(core::Locality { region: "r1".to_owned(), zone: "z1".to_owned(), sub_zone: String::new() }),
        load_balancing_weight: Some(wkt::UInt32Value { value: u32::try_from(ENDPOINTS).unwrap_or(u32::MAX) }),
        lb_endpoints: (0..ENDPOINTS).map(at).collect(),
        ..Default::default()
    };
    endpoint::ClusterLoadAssignment { cluster_name: name.to_owned(), endpoints: vec![group], ..Default::default() }
}

fn lb_endpoint(service: usize, at: SocketAddr) -> endpoint::LbEndpoint {
    let workload = format!("svc-{service};ns{};svc-{service};latest;Kubernetes", service % NAMESPACES);
    let mut about = vec![("istio", structure(&[("workload", text(&workload))]))];
    if service >= USED {
        about.push(("envoy.transport_socket_match", structure(&[("tlsMode", text("istio"))])));
    }
    let host = endpoint::Endpoint { address: Some(address(at)), ..Default::default() };
    endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(host)),
        health_status: core::HealthStatus::Healthy as i32,
        load_balancing_weight: Some(wkt::UInt32Value { value: 1 }),
        metadata: Some(metadata(&about)),
    }
}

fn virtual_host(service: usize, port: u16, cluster: String) -> route::VirtualHost {
    let (host, number) = (host(service), u32::try_from(service).unwrap_or(u32::MAX));
    let short = host.trim_end_matches(".svc.cluster.local");
    let address = Ipv4Addr::from(0x0a60_0001_u32.wrapping_add(number));
    let mut action = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(cluster)),
        timeout: Some(wkt::Duration::default()),
        retry_policy: Some(retries()),
        ..Default::default()
    };
    action.max_stream_duration = Some(route::route_action::MaxStreamDuration {
        max_stream_duration: Some(wkt::Duration::default()),
        grpc_timeout_header_max: Some(wkt::Duration::default()),
        ..Default::default()
    });
    let one = route::Route {
        name: "default".to_owned(),
        r#match: Some(route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".to_owned())),
            ..Default::default()
        }),
        decorator: Some(route::Decorator { operation: format!("{host}:{port}/*"), ..Default::default() }),
        action: Some(route::route::Action::Route(action)),
        ..Default::default()
    };
    route::VirtualHost {
        name: format!("{host}:{port}"),
        domains: vec![host.clone(), format!("{host}."), short.to_owned(), format!("{short}.svc"), address.to_string()],
        routes: vec![one],
        include_request_attempt_count: true,
        ..Default::default()
    }
}

fn retries() -> route::RetryPolicy {
    route::RetryPolicy {
        retry_on: "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes".to_owned(),
        num_retries: Some(wkt::UInt32Value { value: 2 }),
        retry_host_predicate: vec![route::retry_policy::RetryHostPredicate {
            name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
            config_type: Some(route::retry_policy::retry_host_predicate::ConfigType::TypedConfig(packed(
                &PreviousHostsPredicate::default(),
            ))),
        }],
        host_selection_retry_max_attempts: 5,
        ..Default::default()
    }
}

fn metadata(about: &[(&str, wkt::Struct)]) -> core::Metadata {
    let filter_metadata = about.iter().map(|(name, fields)| ((*name).to_owned(), fields.clone())).collect();
    core::Metadata { filter_metadata, ..Default::default() }
}

fn structure(fields: &[(&str, wkt::Value)]) -> wkt::Struct {
    let fields: HashMap<_, _> = fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    wkt::Struct { fields: fields.into_iter().collect() }
}

fn text(of: &str) -> wkt::Value {
    wkt::Value { kind: Some(wkt::value::Kind::StringValue(of.to_owned())) }
}

/// `udpa.type.v1.TypedStruct`.
#[derive(Clone, PartialEq, prost::Message)]
struct TypedStruct {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(message, optional, tag = "2")]
    value: Option<wkt::Struct>,
}
