//! Who the other proxy's workload is, in HTTP headers: learned and taken off on one side, told on the other.
//!
//! It is for labels and logs. What a peer says of itself decides nothing.

use std::sync::Arc;

use http::header::{HeaderMap, HeaderName, HeaderValue};
use proxy_config::peer::Workload;

use super::Node;
use super::conn::Conn;
use super::ctx::Ctx;
use super::head::Head;
use super::http::HttpConn;
use crate::snapshot::{Discovery, OwnMetadata, PeerMetadata, Propagation};
use crate::telemetry::{Peer, Peers};
use crate::upstream::ClusterLocal;

const METADATA: HeaderName = HeaderName::from_static("x-envoy-peer-metadata");
const METADATA_ID: HeaderName = HeaderName::from_static("x-envoy-peer-metadata-id");
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// What the client asked for by telling us its own.
#[derive(Debug, Default)]
pub(super) struct Asked {
    id: bool,
    metadata: bool,
    said: Option<Arc<PeerMetadata>>,
}

/// Learns of the client from its request.
pub(super) fn from_client(said: &Arc<PeerMetadata>, http: &HttpConn, head: &mut Head, ctx: &mut Ctx) {
    let headers = &mut head.headers;
    ctx.asked.said = Some(Arc::clone(said));
    if said.discover_client.contains(&Discovery::Headers) {
        (ctx.asked.id, ctx.asked.metadata) = (headers.contains_key(METADATA_ID), headers.contains_key(METADATA));
    }
    if let Some(peer) = learn(&said.discover_client, said, &http.conn.env.peers, headers) {
        ctx.peer = Some(peer);
    }
    take_off(&said.discover_client, headers);
}

/// Tells the server of us.
pub(super) fn to_server(said: &PeerMetadata, conn: &Conn, cluster: &ClusterLocal, head: &mut Head) {
    let node = &conn.env.node;
    let own = own(said, node);
    for method in &said.tell_server {
        match method {
            Propagation::Headers { skip_external } if !is_skipped(cluster, *skip_external) => {
                tell(&mut head.headers, METADATA_ID, node.id.as_ref());
                tell(&mut head.headers, METADATA, own.metadata.as_ref());
            }
            Propagation::Headers { .. } => {}
            Propagation::Baggage => tell(&mut head.headers, BAGGAGE, own.baggage.as_ref()),
        }
    }
}

/// Learns of the server from its response.
pub(super) fn from_server(said: &PeerMetadata, http: &HttpConn, headers: &mut HeaderMap, ctx: &mut Ctx) {
    if let Some(peer) = learn(&said.discover_server, said, &http.conn.env.peers, headers) {
        ctx.peer = Some(peer);
    }
    take_off(&said.discover_server, headers);
}

/// Tells the client of us, as far as it told us of itself.
pub(super) fn to_client(ctx: &Ctx, headers: &mut HeaderMap) {
    let Some(said) = &ctx.asked.said else { return };
    if said.tell_client.is_empty() {
        return;
    }
    let node = &ctx.http.conn.env.node;
    let own = own(said, node);
    for method in &said.tell_client {
        match method {
            Propagation::Headers { skip_external } => {
                if ctx.cluster.as_ref().is_some_and(|cluster| is_skipped(cluster, *skip_external)) {
                    continue;
                }
                tell(headers, METADATA_ID, node.id.as_ref().filter(|_| ctx.asked.id));
                tell(headers, METADATA, own.metadata.as_ref().filter(|_| ctx.asked.metadata));
            }
            Propagation::Baggage => tell(headers, BAGGAGE, own.baggage.as_ref()),
        }
    }
}

fn tell(headers: &mut HeaderMap, name: HeaderName, value: Option<&HeaderValue>) {
    if let Some(value) = value {
        headers.insert(name, value.clone());
    }
}

fn learn(methods: &[Discovery], said: &PeerMetadata, peers: &Peers, headers: &HeaderMap) -> Option<Arc<Peer>> {
    methods.iter().find_map(|method| match method {
        Discovery::Headers => {
            let value = headers.get(METADATA).filter(|value| !value.is_empty())?;
            let id = headers.get(METADATA_ID).map_or(&[][..], HeaderValue::as_bytes);
            peers.of_headers(id, value.as_bytes(), &said.additional)
        }
        Discovery::Baggage => {
            let value = headers.get(BAGGAGE)?;
            Some(Peer::new(Workload::from_baggage(&String::from_utf8_lossy(value.as_bytes()))))
        }
        Discovery::Address => None,
    })
}

/// What was for us ends here.
fn take_off(methods: &[Discovery], headers: &mut HeaderMap) {
    if methods.contains(&Discovery::Headers) {
        headers.remove(METADATA_ID);
        headers.remove(METADATA);
    }
}

fn is_skipped(cluster: &ClusterLocal, skip_external: bool) -> bool {
    let istio = &cluster.shared.config.istio;
    istio.disable_mx || skip_external && (istio.external || &*cluster.shared.name == "PassthroughCluster")
}

fn own<'a>(said: &'a PeerMetadata, node: &Node) -> &'a OwnMetadata {
    said.own.get_or_init(|| {
        if node.id.is_none() {
            return OwnMetadata { metadata: None, baggage: None };
        }
        let text = |text: String| HeaderValue::try_from(text).ok().filter(|value| !value.is_empty());
        OwnMetadata { metadata: text(node.told(&said.additional).to_header()), baggage: text(node.told(&[]).baggage()) }
    })
}
