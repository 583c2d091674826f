//! Small resources as istiod would send them, and a server that speaks to [`super::Ads`] without a network.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::SystemTime;

use bytes::Bytes;
use envoy_types::pb::envoy::config::cluster::v3 as cluster;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::endpoint::v3 as endpoint;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::config::route::v3 as route;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::google::protobuf as wkt;
use prost::Message;
use proxy_config::xds::Any;
use tokio::time::Instant;

use super::*;

fn ads() -> core::ConfigSource {
    let ads = core::config_source::ConfigSourceSpecifier::Ads(core::AggregatedConfigSource::default());
    core::ConfigSource { config_source_specifier: Some(ads), ..Default::default() }
}

fn any(kind: Kind, message: &impl Message) -> Any {
    Any { type_url: kind.url().to_owned(), value: message.encode_to_vec().into() }
}

fn packed<M: Message + prost::Name>(message: &M) -> wkt::Any {
    wkt::Any { type_url: format!("type.googleapis.com/{}", M::full_name()), value: message.encode_to_vec() }
}

/// A cluster that gets its endpoints from the stream; `seconds` tells versions apart.
pub(super) fn eds_cluster(name: &str, seconds: i64) -> Any {
    let of = cluster::Cluster {
        name: name.to_owned(),
        connect_timeout: Some(wkt::Duration { seconds, nanos: 0 }),
        cluster_discovery_type: Some(cluster::cluster::ClusterDiscoveryType::Type(3)),
        eds_cluster_config: Some(cluster::cluster::EdsClusterConfig {
            eds_config: Some(ads()),
            service_name: name.to_owned(),
        }),
        ..Default::default()
    };
    any(Kind::Cluster, &of)
}

/// A load assignment with one endpoint.
pub(super) fn assignment(name: &str, address: &str) -> Any {
    let socket = core::SocketAddress {
        address: address.to_owned(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(80)),
        ..Default::default()
    };
    let address = core::Address { address: Some(core::address::Address::SocketAddress(socket)) };
    let host = endpoint::Endpoint { address: Some(address), ..Default::default() };
    let lb = endpoint::LbEndpoint {
        host_identifier: Some(endpoint::lb_endpoint::HostIdentifier::Endpoint(host)),
        ..Default::default()
    };
    let locality = endpoint::LocalityLbEndpoints { lb_endpoints: vec![lb], ..Default::default() };
    let of = endpoint::ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![locality],
        ..Default::default()
    };
    any(Kind::Endpoints, &of)
}

/// A table that sends everything to one cluster.
pub(super) fn table(name: &str, cluster: &str) -> Any {
    let action = route::RouteAction {
        cluster_specifier: Some(route::route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
        ..Default::default()
    };
    let prefix = route::RouteMatch {
        path_specifier: Some(route::route_match::PathSpecifier::Prefix("/".into())),
        ..Default::default()
    };
    let one =
        route::Route { r#match: Some(prefix), action: Some(route::route::Action::Route(action)), ..Default::default() };
    let host =
        route::VirtualHost { name: "all".into(), domains: vec!["*".into()], routes: vec![one], ..Default::default() };
    any(Kind::Routes, &route::RouteConfiguration { name: name.into(), virtual_hosts: vec![host], ..Default::default() })
}

/// An HTTP listener with these further filters before the router.
pub(super) fn http_listener(name: &str, rds: &str, filters: Vec<hcm::HttpFilter>) -> Any {
    let router = envoy_types::pb::envoy::extensions::filters::http::router::v3::Router::default();
    let router = hcm::HttpFilter {
        name: "envoy.filters.http.router".into(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(packed(&router))),
        ..Default::default()
    };
    let manager = hcm::HttpConnectionManager {
        stat_prefix: name.into(),
        route_specifier: Some(hcm::http_connection_manager::RouteSpecifier::Rds(hcm::Rds {
            config_source: Some(ads()),
            route_config_name: rds.into(),
        })),
        http_filters: filters.into_iter().chain([router]).collect(),
        ..Default::default()
    };
    let filter = listener::Filter {
        name: "envoy.filters.network.http_connection_manager".into(),
        config_type: Some(listener::filter::ConfigType::TypedConfig(packed(&manager))),
    };
    let socket = core::SocketAddress {
        address: "0.0.0.0".into(),
        port_specifier: Some(core::socket_address::PortSpecifier::PortValue(80)),
        ..Default::default()
    };
    let of = listener::Listener {
        name: name.into(),
        address: Some(core::Address { address: Some(core::address::Address::SocketAddress(socket)) }),
        filter_chains: vec![listener::FilterChain { filters: vec![filter], ..Default::default() }],
        ..Default::default()
    };
    any(Kind::Listener, &of)
}

/// A filter whose configuration comes by extension discovery.
pub(super) fn discovered(name: &str) -> hcm::HttpFilter {
    let source = core::ExtensionConfigSource { config_source: Some(ads()), ..Default::default() };
    hcm::HttpFilter {
        name: name.into(),
        config_type: Some(hcm::http_filter::ConfigType::ConfigDiscovery(source)),
        ..Default::default()
    }
}

/// A filter that decides who may pass and that we do not know.
pub(super) fn unknown_guard() -> hcm::HttpFilter {
    let config = wkt::Any {
        type_url: "type.googleapis.com/envoy.extensions.filters.http.oauth2.v3.OAuth2".into(),
        value: Vec::new(),
    };
    hcm::HttpFilter {
        name: "envoy.filters.http.oauth2".into(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(config)),
        ..Default::default()
    }
}

/// The CORS filter, as an extension of this name.
pub(super) fn cors_extension(name: &str) -> Any {
    let cors = envoy_types::pb::envoy::extensions::filters::http::cors::v3::Cors::default();
    any(Kind::Extension, &core::TypedExtensionConfig { name: name.into(), typed_config: Some(packed(&cors)) })
}

/// A name table without names.
pub(super) fn no_names() -> Any {
    Any { type_url: Kind::Names.url().to_owned(), value: Bytes::new() }
}

/// A delta response.
pub(super) fn delta(kind: Kind, nonce: &str, resources: &[(&str, Any)], removed: &[&str]) -> Response {
    let resource = |(name, any): &(&str, Any)| Resource {
        version: String::new(),
        resource: Some(any.clone()),
        name: (*name).to_owned(),
    };
    Response::Delta(DeltaDiscoveryResponse {
        system_version_info: format!("push of {nonce}"),
        resources: resources.iter().map(resource).collect(),
        type_url: kind.url().to_owned(),
        nonce: nonce.to_owned(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    })
}

/// A delta server: what it has, what it was asked for on its one stream, what it has said.
#[derive(Default)]
pub(super) struct Server {
    pub(super) has: BTreeMap<Kind, BTreeMap<String, Any>>,
    watched: BTreeMap<Kind, BTreeSet<String>>,
    pub(super) says: VecDeque<Response>,
    nonce: u32,
    pub(super) refusals: usize,
    open: BTreeMap<Kind, BTreeSet<String>>,
}

impl Server {
    /// Forgets the stream.
    pub(super) fn dropped(&mut self) {
        self.watched.clear();
        self.says.clear();
        self.open.clear();
    }

    /// Takes a request, as istiod does.
    pub(super) fn hears(&mut self, request: &Request) {
        let Request::Delta(request) = request else { panic!("a delta stream") };
        let Some(kind) = Kind::of(&request.type_url) else { return };
        if !request.response_nonce.is_empty() {
            assert!(
                self.open.entry(kind).or_default().remove(&request.response_nonce),
                "{} answers nothing that is open",
                request.response_nonce
            );
            assert!(request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty());
            self.refusals += usize::from(request.error_detail.is_some());
            return;
        }
        let first = !self.watched.contains_key(&kind);
        let watched = self.watched.entry(kind).or_default();
        watched.extend(request.resource_names_subscribe.iter().cloned());
        watched.extend(request.initial_resource_versions.keys().cloned());
        request.resource_names_unsubscribe.iter().for_each(|name| {
            watched.remove(name);
        });
        let has = self.has.get(&kind).cloned().unwrap_or_default();
        let stale: Vec<String> = watched.iter().filter(|n| !has.contains_key(*n)).cloned().collect();
        if kind.is_wildcard() {
            assert!(first, "{kind:?} was asked for twice");
            self.push(kind, |_| true, &stale);
        } else if !request.resource_names_subscribe.is_empty() {
            let asked: Vec<String> = request.resource_names_subscribe.clone();
            let missing: Vec<String> = asked.iter().filter(|n| stale.contains(n)).cloned().collect();
            self.push(kind, |name| asked.iter().any(|a| a == name), &missing);
        }
    }

    fn has(&self, kind: Kind) -> BTreeMap<String, Any> {
        self.has.get(&kind).cloned().unwrap_or_default()
    }

    /// Says what it has of a kind, if anybody watches.
    pub(super) fn push(&mut self, kind: Kind, which: impl Fn(&str) -> bool, removed: &[String]) {
        if !self.watched.contains_key(&kind) {
            return;
        }
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        let has = self.has(kind);
        let resources: Vec<(&str, Any)> =
            has.iter().filter(|(n, _)| which(n)).map(|(n, a)| (n.as_str(), a.clone())).collect();
        let removed: Vec<&str> = removed.iter().map(String::as_str).collect();
        self.says.push_back(delta(kind, &nonce, &resources, &removed));
        self.open.entry(kind).or_default().insert(nonce);
    }

    /// Sets a resource and pushes it the way istiod does: whole types, but for endpoints.
    pub(super) fn set(&mut self, kind: Kind, name: &str, any: Option<Any>) {
        let kinds = self.has.entry(kind).or_default();
        let removed = match any {
            Some(any) => {
                kinds.insert(name.to_owned(), any);
                Vec::new()
            }
            None => kinds.remove(name).map(|_| name.to_owned()).into_iter().collect(),
        };
        let only = name.to_owned();
        match kind {
            Kind::Endpoints => self.push(kind, |n| n == only, &removed),
            _ => self.push(kind, |_| true, &removed),
        }
    }
}

/// Carries messages to and fro until nobody has anything to say.
pub(super) fn settle(ads: &mut Ads, server: &mut Server, mut send: Vec<Request>, now: Instant) {
    for _ in 0..1000 {
        send.drain(..).for_each(|request| server.hears(&request));
        let Some(response) = server.says.pop_front() else { return };
        send = ads.received(response, now, SystemTime::UNIX_EPOCH).send;
    }
    panic!("they never end");
}
