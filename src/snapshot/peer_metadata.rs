//! Peer metadata in headers: how we learn of a peer, and how we tell it of ourselves.

use std::sync::{Arc, OnceLock};

use http::HeaderValue;
use proxy_config::model;
use serde_json::Value;

use super::Name;
use crate::telemetry::Additional;

/// `istio.metadata_exchange` on HTTP, compiled.
#[derive(Debug, Default)]
pub struct PeerMetadata {
    /// How to learn of the client.
    pub discover_client: Box<[Discovery]>,
    /// How to learn of the server.
    pub discover_server: Box<[Discovery]>,
    /// How to tell the client of us.
    pub tell_client: Box<[Propagation]>,
    /// How to tell the server of us.
    pub tell_server: Box<[Propagation]>,
    /// Labels that are told and kept besides the standard ones.
    pub additional: Additional,
    /// What we say; made when it is first needed, as it is the node's.
    pub own: OnceLock<OwnMetadata>,
}

/// What we say of ourselves.
#[derive(Debug)]
pub struct OwnMetadata {
    /// `x-envoy-peer-metadata`
    pub metadata: Option<HeaderValue>,
    /// `baggage`
    pub baggage: Option<HeaderValue>,
}

/// A way to learn of a peer; the first that tells anything wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discovery {
    /// `x-envoy-peer-metadata` and `-id`, which are taken off.
    Headers,
    /// `baggage` of a request.
    Baggage,
    /// By address; nobody tells us addresses, so it finds nothing.
    Address,
}

/// A way to tell a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// `x-envoy-peer-metadata` and `-id`.
    Headers {
        /// Not to what is outside the mesh.
        skip_external: bool,
    },
    /// `baggage`
    Baggage,
}

impl PeerMetadata {
    /// Compiles `io.istio.http.peer_metadata.Config` (its JSON). The second value names methods that we do not know.
    pub fn compile(said: &Value) -> (Self, Vec<String>) {
        let mut unknown = Vec::new();
        let mut each = |key: &str| -> Vec<(String, Value)> {
            let methods = said[key].as_array().into_iter().flatten().filter_map(Value::as_object);
            let named = methods.flat_map(|method| method.iter().map(|(name, value)| (name.clone(), value.clone())));
            named.filter(|(name, _)| is_known(key, name, &mut unknown)).collect()
        };
        let out = Self {
            discover_client: each("downstream_discovery").iter().map(discovery).collect(),
            discover_server: each("upstream_discovery").iter().map(discovery).collect(),
            tell_client: each("downstream_propagation").iter().map(propagation).collect(),
            tell_server: each("upstream_propagation").iter().map(propagation).collect(),
            additional: texts(&said["additional_labels"]).collect(),
            own: OnceLock::new(),
        };
        (out, unknown)
    }
}

fn texts(list: &Value) -> impl Iterator<Item = String> {
    list.as_array().into_iter().flatten().filter_map(|text| text.as_str().map(str::to_owned))
}

fn is_known(key: &str, name: &str, unknown: &mut Vec<String>) -> bool {
    let known = match key {
        "downstream_discovery" => matches!(name, "istio_headers" | "workload_discovery" | "baggage"),
        "upstream_discovery" => matches!(name, "istio_headers" | "workload_discovery"),
        _ => matches!(name, "istio_headers" | "baggage"),
    };
    if !known {
        unknown.push(format!("{key}.{name}"));
    }
    known
}

fn discovery((name, _): &(String, Value)) -> Discovery {
    match name.as_str() {
        "istio_headers" => Discovery::Headers,
        "baggage" => Discovery::Baggage,
        _ => Discovery::Address,
    }
}

fn propagation((name, value): &(String, Value)) -> Propagation {
    match name.as_str() {
        "baggage" => Propagation::Baggage,
        _ => Propagation::Headers { skip_external: value["skip_external_clusters"] == true },
    }
}

/// `istio.metadata_exchange` on TCP, compiled.
#[derive(Debug)]
pub struct TcpExchange {
    /// The ALPN name that switches it on.
    pub protocol: Name,
    /// Labels that are told and kept besides the standard ones.
    pub additional: Additional,
    /// The frame that we send; made when it is first needed, as it is the node's. Empty: we send none.
    pub frame: OnceLock<bytes::Bytes>,
}

impl TcpExchange {
    /// Compiles.
    pub fn new(said: &model::MetadataExchange) -> Arc<Self> {
        Arc::new(Self {
            protocol: said.protocol.as_str().into(),
            additional: said.additional_labels.as_slice().into(),
            frame: OnceLock::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn methods_keep_their_order() {
        let (said, unknown) = PeerMetadata::compile(&json!({
            "downstream_discovery": [{"baggage": {}}, {"istio_headers": {}}, {"workload_discovery": {}}],
            "upstream_discovery": [{"baggage": {}}],
            "upstream_propagation": [{"istio_headers": {"skip_external_clusters": true}}],
            "additional_labels": ["role"],
        }));
        assert_eq!(*said.discover_client, [Discovery::Baggage, Discovery::Headers, Discovery::Address]);
        assert_eq!(*said.tell_server, [Propagation::Headers { skip_external: true }]);
        assert_eq!(
            (&*said.additional, unknown),
            (&["role".to_owned()][..], vec!["upstream_discovery.baggage".to_owned()])
        );
        assert!(said.discover_server.is_empty() && said.tell_client.is_empty());
    }
}
