//! Whole responses: what they become, and that no bytes of whatever kind bring the decoder down.

use bytes::Bytes;
use envoy_types::pb::envoy::config::cluster::v3 as cluster;
use envoy_types::pb::envoy::config::core::v3::{self as core, address, socket_address, transport_socket};
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::rbac::v3 as rbac;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3 as tcp;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{CommonTlsContext, DownstreamTlsContext};
use envoy_types::pb::google::protobuf as wkt;
use envoy_types::util::pack_any;
use proptest::prelude::*;
use prost::Message;

use super::messages::{NameEntry, NameTable};
use super::{
    Any, CLUSTER, DiscoveryResponse, ENDPOINTS, EXTENSION, Extensions, LISTENER, NAMES, ROUTES, Reject, XdsBundle,
    decode, from_xds, listener as read_listener,
};
use crate::model::{HttpFilter, NetworkFilter, RouteSource, Severity};

fn socket(port: u32) -> Option<core::Address> {
    let socket = core::SocketAddress {
        address: "10.0.0.1".to_owned(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(port)),
        ..Default::default()
    };
    Some(core::Address { address: Some(address::Address::SocketAddress(socket)) })
}

fn table(name: &str) -> route::RouteConfiguration {
    let forward = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster("c".to_owned())),
        ..Default::default()
    };
    let path = route::route_match::PathSpecifier::Prefix("/".to_owned());
    let route = route::Route {
        name: "r".to_owned(),
        r#match: Some(route::RouteMatch { path_specifier: Some(path), ..Default::default() }),
        action: Some(route::route::Action::Route(forward)),
        ..Default::default()
    };
    let host = route::VirtualHost {
        name: "h".to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![route],
        ..Default::default()
    };
    route::RouteConfiguration { name: name.to_owned(), virtual_hosts: vec![host], ..Default::default() }
}

fn policy() -> Rbac {
    let any = rbac::Policy {
        permissions: vec![rbac::Permission { rule: Some(rbac::permission::Rule::Any(true)) }],
        principals: vec![rbac::Principal { identifier: Some(rbac::principal::Identifier::Any(true)) }],
        ..Default::default()
    };
    Rbac {
        rules: Some(rbac::Rbac { policies: [("p".to_owned(), any)].into(), ..Default::default() }),
        ..Default::default()
    }
}

fn manager() -> hcm::HttpConnectionManager {
    let filter = hcm::HttpFilter {
        name: "envoy.filters.http.rbac".to_owned(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(pack_any(policy()))),
        ..Default::default()
    };
    hcm::HttpConnectionManager {
        http_filters: vec![filter],
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::RouteConfig(table("inline"))),
        ..Default::default()
    }
}

fn sample_listener() -> listener::Listener {
    let chain = |any: wkt::Any, socket: Option<core::TransportSocket>| listener::FilterChain {
        filters: vec![listener::Filter {
            name: "f".to_owned(),
            config_type: Some(listener::filter::ConfigType::TypedConfig(any)),
        }],
        transport_socket: socket,
        ..Default::default()
    };
    let context = DownstreamTlsContext {
        common_tls_context: Some(CommonTlsContext { alpn_protocols: vec!["h2".to_owned()], ..Default::default() }),
        ..Default::default()
    };
    let tls = core::TransportSocket {
        name: "tls".to_owned(),
        config_type: Some(transport_socket::ConfigType::TypedConfig(pack_any(context))),
    };
    let relay = tcp::TcpProxy {
        cluster_specifier: Some(tcp::tcp_proxy::ClusterSpecifier::Cluster("c".to_owned())),
        ..Default::default()
    };
    listener::Listener {
        name: "l".to_owned(),
        address: socket(80),
        filter_chains: vec![chain(pack_any(manager()), Some(tls)), chain(pack_any(relay), None)],
        ..Default::default()
    }
}

fn packed<T: Message + prost::Name>(message: &T) -> Any {
    Any { type_url: T::type_url(), value: message.encode_to_vec().into() }
}

fn resources() -> Vec<Any> {
    let host = endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(endpoint::Endpoint {
            address: socket(8080),
            ..Default::default()
        })),
        ..Default::default()
    };
    let locality = endpoint::LocalityLbEndpoints { lb_endpoints: vec![host], ..Default::default() };
    let load = endpoint::ClusterLoadAssignment {
        cluster_name: "c".to_owned(),
        endpoints: vec![locality],
        ..Default::default()
    };
    let names = NameTable { table: [("h".to_owned(), NameEntry::default())].into() };
    vec![
        packed(&sample_listener()),
        packed(&table("80")),
        packed(&cluster::Cluster { name: "c".to_owned(), ..Default::default() }),
        packed(&load),
        Any { type_url: format!("type.googleapis.com/{NAMES}"), value: names.encode_to_vec().into() },
    ]
}

fn response(resources: Vec<Any>) -> Bytes {
    DiscoveryResponse { resources, ..DiscoveryResponse::default() }.encode_to_vec().into()
}

#[test]
fn a_bundle_becomes_a_model() {
    let decoded = decode(&XdsBundle { responses: vec![response(resources())] });
    let model = decoded.model;
    assert_eq!(model.rejects, []);
    assert!(decoded.unread.is_empty(), "{:?}", decoded.unread);
    let listener = &model.listeners["l"];
    let NetworkFilter::Http(manager) = &listener.filter_chains[0].filters[0] else { panic!("HTTP") };
    assert!(matches!(manager.filters[..], [HttpFilter::Rbac(_)]));
    assert!(matches!(&manager.routes, RouteSource::Inline(table) if &*table.name == "inline"));
    assert!(listener.filter_chains[0].tls.is_some());
    assert!(matches!(listener.filter_chains[1].filters[0], NetworkFilter::TcpProxy(_)));
    assert_eq!(model.routes.len() + model.clusters.len() + model.endpoints.len() + model.names.len(), 4);
}

#[test]
fn a_bad_resource_leaves_its_siblings() {
    let mut all = resources();
    let bad = listener::Listener { name: "bad".to_owned(), ..Default::default() };
    all.insert(0, packed(&bad));
    all.push(Any { type_url: "type.googleapis.com/a.B".to_owned(), value: Bytes::new() });
    let model = from_xds(&XdsBundle { responses: vec![response(all)] });
    assert_eq!(model.listeners.keys().map(|n| &**n).collect::<Vec<_>>(), ["l"]);
    let rejects: Vec<String> = model.rejects.iter().map(Reject::to_string).collect();
    assert_eq!(rejects, ["Listener bad: address: no address", "a.B: unknown resource type"]);
}

#[test]
fn a_security_filter_that_is_not_understood_is_noted() {
    let mut manager = manager();
    let mut changed = policy();
    changed.rules.as_mut().expect("rules").policies.get_mut("p").expect("policy").permissions[0].rule = None;
    manager.http_filters[0].config_type = Some(hcm::http_filter::ConfigType::TypedConfig(pack_any(changed)));
    let mut message = sample_listener();
    let config = listener::filter::ConfigType::TypedConfig(pack_any(manager));
    message.filter_chains[0].filters[0].config_type = Some(config);
    let read = read_listener(&packed(&message), &Extensions::new()).expect("the listener stays");
    assert_eq!(read.notes[0].severity, Severity::Security);
    assert_eq!(
        read.notes[0].to_string(),
        "Listener l: http_filters[envoy.filters.http.rbac].rules.policies[p].permissions[0]: permission without a rule"
    );
}

fn all_kinds(value: &Bytes) {
    for url in [LISTENER, ROUTES, CLUSTER, ENDPOINTS, NAMES, EXTENSION] {
        let any = Any { type_url: format!("type.googleapis.com/{url}"), value: Bytes::clone(value) };
        decode(&XdsBundle { responses: vec![response(vec![any])] });
    }
}

#[test]
fn a_truncated_resource_is_an_error_or_a_smaller_one() {
    for resource in resources() {
        for end in 0..resource.value.len() {
            let any = Any { type_url: resource.type_url.clone(), value: resource.value.slice(..end) };
            decode(&XdsBundle { responses: vec![response(vec![any])] });
        }
    }
    let whole = response(resources());
    for end in 0..whole.len() {
        decode(&XdsBundle { responses: vec![whole.slice(..end)] });
    }
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        all_kinds(&bytes.into());
    }

    #[test]
    fn changed_bytes_are_survived(which in 0usize..5, changes in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..6)) {
        let resource = resources().swap_remove(which);
        let mut bytes = resource.value.to_vec();
        for (at, byte) in changes {
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
        }
        all_kinds(&bytes.into());
    }
}
