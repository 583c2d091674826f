//! Small resources as istiod would send them.

use std::net::SocketAddr;

use envoy_types::pb::envoy::config::cluster::v3 as cluster;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use envoy_types::pb::google::protobuf as wkt;
use prost::{Message, Name};
use proxy_config::xds::Any;

pub use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpFilter;

fn url<M: Name>() -> String {
    format!("type.googleapis.com/{}", M::full_name())
}

fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: url::<M>(), value: message.encode_to_vec().into() }
}

/// A message inside another.
pub fn packed<M: Message + Name>(message: &M) -> wkt::Any {
    wkt::Any { type_url: url::<M>(), value: message.encode_to_vec() }
}

fn ads() -> core::ConfigSource {
    let ads = core::config_source::ConfigSourceSpecifier::Ads(core::AggregatedConfigSource::default());
    core::ConfigSource { config_source_specifier: Some(ads), ..Default::default() }
}

fn address(of: SocketAddr) -> core::Address {
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

/// The CORS filter, as an extension of this name.
pub fn cors_extension(name: &str) -> Any {
    let cors = envoy_types::pb::envoy::extensions::filters::http::cors::v3::Cors::default();
    any(&core::TypedExtensionConfig { name: name.into(), typed_config: Some(packed(&cors)) })
}

/// A name table without names.
pub fn no_names() -> Any {
    Any { type_url: "type.googleapis.com/istio.networking.nds.v1.NameTable".into(), value: bytes::Bytes::new() }
}
