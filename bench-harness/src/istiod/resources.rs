//! Small resources as istiod would send them.

use std::net::SocketAddr;

use envoy_types::pb::envoy::config::cluster::v3 as cluster;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::rbac::v3 as rbac;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3 as http_rbac;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3 as network_rbac;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as tls;
use envoy_types::pb::envoy::extensions::upstreams::http::v3 as upstream;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::google::protobuf as wkt;
use prost::{Message, Name};
use proxy_config::xds::Any;

pub use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;

fn url<M: Name>() -> String {
    format!("type.googleapis.com/{}", M::full_name())
}

/// A message as a resource.
pub fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: url::<M>(), value: message.encode_to_vec().into() }
}

/// A message inside another.
pub fn packed<M: Message + Name>(message: &M) -> wkt::Any {
    wkt::Any { type_url: url::<M>(), value: message.encode_to_vec() }
}

/// "From this stream".
pub fn ads() -> core::ConfigSource {
    let ads = core::config_source::ConfigSourceSpecifier::Ads(core::AggregatedConfigSource::default());
    core::ConfigSource { config_source_specifier: Some(ads), ..Default::default() }
}

/// A socket's address.
pub fn address(of: SocketAddr) -> core::Address {
    let socket = core::SocketAddress {
        address: of.ip().to_string(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(of.port().into())),
        ..Default::default()
    };
    core::Address { address: Some(core::address::Address::SocketAddress(socket)) }
}

/// A cluster that gets its endpoints from the stream; `seconds`, its connect timeout, tells versions apart.
pub fn eds_cluster(name: &str, seconds: i64) -> Any {
    any(&cluster::Cluster {
        name: name.to_owned(),
        connect_timeout: Some(wkt::Duration { seconds, nanos: 0 }),
        cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(3)),
        eds_cluster_config: Some(cluster::cluster::EdsClusterConfig {
            eds_config: Some(ads()),
            service_name: name.to_owned(),
        }),
        ..Default::default()
    })
}

/// A cluster that sends to where a connection was going.
pub fn direct_cluster(name: &str) -> Any {
    any(&cluster::Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(4)),
        // The one that such clusters must have.
        lb_policy: 6,
        ..Default::default()
    })
}

/// A listener without a socket of its own.
pub fn unbound(listener: Any) -> Any {
    let mut message = listener::Listener::decode(&*listener.value).unwrap_or_default();
    message.bind_to_port = Some(wkt::BoolValue { value: false });
    any(&message)
}

/// A load assignment with these endpoints.
pub fn assignment(name: &str, of: &[SocketAddr]) -> Any {
    let one = |of: &SocketAddr| endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(endpoint::Endpoint {
            address: Some(address(*of)),
            ..Default::default()
        })),
        ..Default::default()
    };
    let locality = endpoint::LocalityLbEndpoints { lb_endpoints: of.iter().map(one).collect(), ..Default::default() };
    any(&endpoint::ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![locality],
        ..Default::default()
    })
}

/// The same with one more endpoint, which is ill.
pub fn with_ill(name: &str, of: &[SocketAddr], ill: SocketAddr) -> Any {
    let mut all: endpoint::ClusterLoadAssignment = unpacked(&assignment(name, of));
    let added: endpoint::ClusterLoadAssignment = unpacked(&assignment(name, &[ill]));
    let mut added = added.endpoints.into_iter().flat_map(|locality| locality.lb_endpoints);
    let mut endpoint = added.next().expect("one endpoint");
    endpoint.health_status = core::HealthStatus::Unhealthy.into();
    all.endpoints[0].lb_endpoints.push(endpoint);
    any(&all)
}

/// A table that sends everything to one cluster; `marks` are further, unused virtual hosts, to tell versions apart.
pub fn table(name: &str, cluster: &str, marks: usize) -> Any {
    let action = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
        timeout: Some(wkt::Duration::default()),
        ..Default::default()
    };
    let one = route::Route {
        r#match: Some(route::RouteMatch {
            path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".into())),
            ..Default::default()
        }),
        action: Some(route::route::Action::Route(action)),
        ..Default::default()
    };
    let host = |name: String, domain: String| route::VirtualHost {
        name,
        domains: vec![domain],
        routes: vec![one.clone()],
        ..Default::default()
    };
    let marks = (0..marks).map(|i| host(format!("mark-{i}"), format!("mark-{i}.invalid")));
    any(&route::RouteConfiguration {
        name: name.to_owned(),
        virtual_hosts: std::iter::once(host("all".into(), "*".into())).chain(marks).collect(),
        ..Default::default()
    })
}

/// An HTTP listener with its own socket, whose routes come from the stream, with these filters before the router.
pub fn http_listener(name: &str, at: SocketAddr, rds: &str, filters: Vec<HttpFilter>) -> Any {
    let router = HttpFilter {
        name: "envoy.filters.http.router".into(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(packed(&Router::default()))),
        ..Default::default()
    };
    let manager = hcm::HttpConnectionManager {
        stat_prefix: name.into(),
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
            config_source: Some(ads()),
            route_config_name: rds.into(),
        })),
        http_filters: filters.into_iter().chain([router]).collect(),
        upgrade_configs: vec![hcm::http_connection_manager::UpgradeConfig {
            upgrade_type: "websocket".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let filter = listener::Filter {
        name: "envoy.filters.network.http_connection_manager".into(),
        config_type: Some(listener::filter::ConfigType::TypedConfig(packed(&manager))),
    };
    one_chain(name, at, filter)
}

/// A TCP listener with its own socket.
pub fn tcp_listener(name: &str, at: SocketAddr, cluster: &str) -> Any {
    let proxy = tcp::TcpProxy {
        stat_prefix: name.into(),
        cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::Cluster(cluster.into())),
        ..Default::default()
    };
    let filter = listener::Filter {
        name: "envoy.filters.network.tcp_proxy".into(),
        config_type: Some(listener::filter::ConfigType::TypedConfig(packed(&proxy))),
    };
    one_chain(name, at, filter)
}

fn one_chain(name: &str, at: SocketAddr, filter: listener::Filter) -> Any {
    any(&listener::Listener {
        name: name.into(),
        address: Some(address(at)),
        filter_chains: vec![listener::FilterChain { filters: vec![filter], ..Default::default() }],
        ..Default::default()
    })
}

/// A filter whose configuration comes by extension discovery.
pub fn discovered(name: &str) -> HttpFilter {
    let source = core::ExtensionConfigSource { config_source: Some(ads()), ..Default::default() };
    HttpFilter {
        name: name.into(),
        config_type: Some(hcm::http_filter::ConfigType::ConfigDiscovery(source)),
        ..Default::default()
    }
}

/// A filter that decides who may pass and that nobody here knows.
pub fn unknown_guard() -> HttpFilter {
    let config = wkt::Any {
        type_url: "type.googleapis.com/envoy.extensions.filters.http.oauth2.v3.OAuth2".into(),
        value: Vec::new(),
    };
    HttpFilter {
        name: "envoy.filters.http.oauth2".into(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

/// A plug-in that is fetched, as an extension of this name; `open`: what it would guard may pass without it.
pub fn plugin_extension(name: &str, open: bool) -> Any {
    let plugin = envoy_types::pb::envoy::extensions::wasm::v3::PluginConfig {
        name: name.into(),
        failure_policy: if open { 3 } else { 2 },
        ..Default::default()
    };
    let wasm = envoy_types::pb::envoy::extensions::filters::http::wasm::v3::Wasm { config: Some(plugin) };
    any(&core::TypedExtensionConfig { name: name.into(), typed_config: Some(packed(&wasm)) })
}

/// A policy that denies paths on which this expression fits.
pub fn policy(path: &str) -> HttpFilter {
    let expression = matcher::RegexMatcher { regex: path.into(), ..Default::default() };
    let pattern = matcher::string_matcher::MatchPattern::SafeRegex(expression);
    let text = matcher::StringMatcher { match_pattern: Some(pattern), ..Default::default() };
    let rule =
        rbac::permission::Rule::UrlPath(matcher::PathMatcher { rule: Some(matcher::path_matcher::Rule::Path(text)) });
    let anybody = rbac::Principal { identifier: Some(rbac::principal::Identifier::Any(true)) };
    let policy = rbac::Policy {
        permissions: vec![rbac::Permission { rule: Some(rule) }],
        principals: vec![anybody],
        ..Default::default()
    };
    let rules = rbac::Rbac {
        action: rbac::rbac::Action::Deny.into(),
        policies: [("paths".to_owned(), policy)].into(),
        ..Default::default()
    };
    let filter = http_rbac::Rbac { rules: Some(rules), ..Default::default() };
    HttpFilter {
        name: "envoy.filters.http.rbac".into(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(packed(&filter))),
        ..Default::default()
    }
}

/// The same listener behind TLS, both sides with certificates; its own and its clients' roots come over the stream.
pub fn with_tls(listener: Any, certificate: &str, roots: &str) -> Any {
    behind_tls(listener, common_tls(certificate, roots))
}

/// The same with versions of TLS that nobody should speak.
pub fn with_old_tls(listener: Any, certificate: &str, roots: &str) -> Any {
    let version = tls::tls_parameters::TlsProtocol::TlSv11.into();
    let params = tls::TlsParameters {
        tls_minimum_protocol_version: version,
        tls_maximum_protocol_version: version,
        ..Default::default()
    };
    behind_tls(listener, tls::CommonTlsContext { tls_params: Some(params), ..common_tls(certificate, roots) })
}

fn behind_tls(listener: Any, common: tls::CommonTlsContext) -> Any {
    let mut message = listener::Listener::decode(&*listener.value).unwrap_or_default();
    let context = tls::DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(wkt::BoolValue { value: true }),
        ..Default::default()
    };
    for chain in &mut message.filter_chains {
        chain.transport_socket = Some(socket(&context));
    }
    any(&message)
}

/// The same cluster over TLS, both sides with certificates.
pub fn over_tls(cluster: Any, certificate: &str, roots: &str) -> Any {
    let mut message = cluster::Cluster::decode(&*cluster.value).unwrap_or_default();
    let context = tls::UpstreamTlsContext {
        common_tls_context: Some(common_tls(certificate, roots)),
        sni: "shop.example".into(),
        ..Default::default()
    };
    message.transport_socket = Some(socket(&context));
    any(&message)
}

fn common_tls(certificate: &str, roots: &str) -> tls::CommonTlsContext {
    use tls::common_tls_context::ValidationContextType;
    let secret = |name: &str| tls::SdsSecretConfig { name: name.into(), sds_config: Some(ads()) };
    let combined = tls::common_tls_context::CombinedCertificateValidationContext {
        default_validation_context: Some(tls::CertificateValidationContext::default()),
        validation_context_sds_secret_config: Some(secret(roots)),
        ..Default::default()
    };
    tls::CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![secret(certificate)],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
        ..Default::default()
    }
}

/// Settings of proxies that name further CAs, PEM.
pub fn trusting(certificates: &[&str]) -> Any {
    #[derive(Clone, PartialEq, Message)]
    struct ProxyConfig {
        #[prost(string, repeated, tag = "34")]
        ca_certificates_pem: Vec<String>,
    }
    let message = ProxyConfig { ca_certificates_pem: certificates.iter().map(|pem| (*pem).to_owned()).collect() };
    Any {
        type_url: "type.googleapis.com/istio.mesh.v1alpha1.ProxyConfig".into(),
        value: message.encode_to_vec().into(),
    }
}

/// The CORS filter, as an extension of this name.
pub fn cors_extension(name: &str) -> Any {
    let cors = envoy_types::pb::envoy::extensions::filters::http::cors::v3::Cors::default();
    any(&core::TypedExtensionConfig { name: name.into(), typed_config: Some(packed(&cors)) })
}

/// A name table without names.
pub fn no_names() -> Any {
    Any { type_url: "type.googleapis.com/istio.networking.nds.v1.NameTable".into(), value: bytes::Bytes::new() }
}

/// The message inside, as it was packed here.
fn unpacked<M: Message + Default>(of: &Any) -> M {
    M::decode(&*of.value).expect("a resource that was made here")
}

/// The cluster with another protocol than HTTP/1: the one that the client speaks, as istiod writes it for ports without a
/// name; and with istiod's limits, which are none.
pub fn like_client(cluster: &Any) -> Any {
    let mut cluster: cluster::Cluster = unpacked(cluster);
    let options = upstream::HttpProtocolOptions {
        upstream_protocol_options: Some(
            upstream::http_protocol_options::UpstreamProtocolOptions::UseDownstreamProtocolConfig(
                upstream::http_protocol_options::UseDownstreamHttpConfig {
                    http_protocol_options: Some(core::Http1ProtocolOptions::default()),
                    http2_protocol_options: Some(core::Http2ProtocolOptions::default()),
                    ..Default::default()
                },
            ),
        ),
        ..Default::default()
    };
    let key = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned();
    cluster.typed_extension_protocol_options.insert(key, packed(&options));
    let all = Some(wkt::UInt32Value { value: u32::MAX });
    let thresholds = cluster::circuit_breakers::Thresholds {
        max_connections: all,
        max_pending_requests: all,
        max_requests: all,
        max_retries: all,
        ..Default::default()
    };
    cluster.circuit_breakers = Some(cluster::CircuitBreakers { thresholds: vec![thresholds], ..Default::default() });
    any(&cluster)
}

/// Secrets of these names, from the agent's socket, as istiod writes it.
fn secret(name: &str) -> tls::SdsSecretConfig {
    let grpc = core::grpc_service::EnvoyGrpc { cluster_name: "sds-grpc".into(), ..Default::default() };
    let service = core::GrpcService {
        target_specifier: Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(grpc)),
        ..Default::default()
    };
    let api = core::ApiConfigSource { api_type: 2, grpc_services: vec![service], ..Default::default() };
    let source = core::config_source::ConfigSourceSpecifier::ApiConfigSource(api);
    let source = core::ConfigSource { config_source_specifier: Some(source), ..Default::default() };
    tls::SdsSecretConfig { name: name.into(), sds_config: Some(source) }
}

fn exactly(text: &str) -> matcher::StringMatcher {
    let pattern = Some(matcher::string_matcher::MatchPattern::Exact(text.into()));
    matcher::StringMatcher { match_pattern: pattern, ..Default::default() }
}

/// The workload's certificate and the mesh's roots; `peers` are the only names that are accepted, all when there are none.
fn workload(peers: &[&str]) -> tls::CommonTlsContext {
    #[expect(deprecated, reason = "istiod writes this field")]
    let names = tls::CertificateValidationContext {
        match_subject_alt_names: peers.iter().map(|peer| exactly(peer)).collect(),
        ..Default::default()
    };
    let combined = tls::common_tls_context::CombinedCertificateValidationContext {
        default_validation_context: Some(names),
        validation_context_sds_secret_config: Some(secret("ROOTCA")),
        ..Default::default()
    };
    tls::CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![secret("default")],
        validation_context_type: Some(tls::common_tls_context::ValidationContextType::CombinedValidationContext(
            combined,
        )),
        alpn_protocols: vec!["h2".into(), "http/1.1".into()],
        ..Default::default()
    }
}

fn socket<M: Message + Name>(context: &M) -> core::TransportSocket {
    core::TransportSocket {
        name: "envoy.transport_sockets.tls".into(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(packed(context))),
    }
}

/// The cluster, its hosts asked by mTLS and expected to be this SPIFFE id.
pub fn mutual(cluster: &Any, server: &str) -> Any {
    let mut cluster: cluster::Cluster = unpacked(cluster);
    let mut common = workload(&[server]);
    common.alpn_protocols.clear();
    let context =
        tls::UpstreamTlsContext { common_tls_context: Some(common), sni: "inside".into(), ..Default::default() };
    cluster.transport_socket = Some(socket(&context));
    any(&cluster)
}

/// Rules that allow these SPIFFE ids and nobody else.
fn allow(principals: &[&str]) -> rbac::Rbac {
    let anything = rbac::Permission { rule: Some(rbac::permission::Rule::Any(true)) };
    let principal = |id: &&str| rbac::Principal {
        identifier: Some(rbac::principal::Identifier::Authenticated(rbac::principal::Authenticated {
            principal_name: Some(exactly(id)),
        })),
    };
    let policy = rbac::Policy {
        permissions: vec![anything],
        principals: principals.iter().map(principal).collect(),
        ..Default::default()
    };
    rbac::Rbac { action: 0, policies: [("allowed".to_owned(), policy)].into(), ..Default::default() }
}

/// The listener as a workload's own: mTLS, and connections of these SPIFFE ids only.
pub fn inbound(listener: &Any, principals: &[&str]) -> Any {
    let mut listener: listener::Listener = unpacked(listener);
    listener.traffic_direction = core::TrafficDirection::Inbound.into();
    let filter =
        network_rbac::Rbac { rules: Some(allow(principals)), stat_prefix: "tcp.".into(), ..Default::default() };
    let filter = listener::Filter {
        name: "envoy.filters.network.rbac".into(),
        config_type: Some(listener::filter::ConfigType::TypedConfig(packed(&filter))),
    };
    let context = tls::DownstreamTlsContext {
        common_tls_context: Some(workload(&[])),
        require_client_certificate: Some(wkt::BoolValue { value: true }),
        ..Default::default()
    };
    for chain in &mut listener.filter_chains {
        chain.filters.insert(0, filter.clone());
        chain.transport_socket = Some(socket(&context));
    }
    any(&listener)
}

/// A filter of requests that denies paths with this prefix.
pub fn deny_path(prefix: &str) -> HttpFilter {
    let path = matcher::path_matcher::Rule::Path(matcher::StringMatcher {
        match_pattern: Some(matcher::string_matcher::MatchPattern::Prefix(prefix.into())),
        ..Default::default()
    });
    let permission =
        rbac::Permission { rule: Some(rbac::permission::Rule::UrlPath(matcher::PathMatcher { rule: Some(path) })) };
    let anybody = rbac::Principal { identifier: Some(rbac::principal::Identifier::Any(true)) };
    let policy = rbac::Policy { permissions: vec![permission], principals: vec![anybody], ..Default::default() };
    let rules = rbac::Rbac { action: 1, policies: [("denied".to_owned(), policy)].into(), ..Default::default() };
    let config = http_rbac::Rbac { rules: Some(rules), ..Default::default() };
    HttpFilter {
        name: "envoy.filters.http.rbac".into(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(packed(&config))),
        ..Default::default()
    }
}

/// The table, its responses marked with a header.
pub fn marked(table: &Any, header: &str, value: &str) -> Any {
    let mut table: route::RouteConfiguration = unpacked(table);
    let header = core::HeaderValue { key: header.into(), value: value.into(), ..Default::default() };
    let option = core::HeaderValueOption { header: Some(header), append_action: 2, ..Default::default() };
    for host in &mut table.virtual_hosts {
        for route in &mut host.routes {
            route.response_headers_to_add.push(option.clone());
        }
    }
    any(&table)
}
