//! HTTP connection managers, the same for every listener but for direction, routes and policies.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use super::view::View;
use crate::model::{
    ClientCertDetails, Direction, ForwardClientCert, Http2Options, HttpConnectionManager, HttpFilter, RouteSource,
    UnderscoreHeaders,
};
use crate::registry::Protocol;

/// A connection manager in front of the application.
pub(super) fn inbound(
    view: &View<'_>,
    stat_prefix: String,
    routes: RouteSource,
    protocol: Protocol,
) -> HttpConnectionManager {
    let headers = &view.mesh.headers;
    let mut hcm = base(view, Direction::Inbound, stat_prefix, routes);
    hcm.filters = inbound_filters(view, protocol);
    hcm.server_name.clone_from(&headers.inbound_server);
    hcm.forward_client_cert = headers.forward_client_cert;
    hcm.set_current_client_cert = headers.client_cert;
    hcm.http2 = protocol.is_http2().then(Http2Options::default);
    hcm
}

/// A connection manager in front of services.
pub(super) fn outbound(
    view: &View<'_>,
    stat_prefix: String,
    routes: RouteSource,
    protocol: Protocol,
) -> HttpConnectionManager {
    let mut hcm = base(view, Direction::Outbound, stat_prefix, routes);
    hcm.filters = outbound_filters(view, protocol);
    hcm.server_name.clone_from(&view.mesh.headers.outbound_server);
    hcm
}

fn inbound_filters(view: &View<'_>, protocol: Protocol) -> Vec<HttpFilter> {
    let policies = view.policies;
    let mut filters = vec![HttpFilter::PeerMetadata(json!({
        "downstream_discovery": [{"istio_headers": {}}, {"workload_discovery": {}}],
        "downstream_propagation": [{"istio_headers": {}}],
    }))];
    filters.extend(policies.http_custom.iter().cloned().map(HttpFilter::Rbac));
    filters.extend(policies.jwt.clone());
    filters.extend(policies.http.iter().cloned().map(HttpFilter::Rbac));
    filters.extend((protocol == Protocol::GrpcWeb).then_some(HttpFilter::GrpcWeb));
    filters.extend([HttpFilter::GrpcStats, HttpFilter::Fault, HttpFilter::Cors]);
    filters.extend(view.mesh.inbound_told.stats.clone().map(HttpFilter::IstioStats));
    filters
}

fn outbound_filters(view: &View<'_>, protocol: Protocol) -> Vec<HttpFilter> {
    let mut metadata = json!({
        "upstream_discovery": [{"istio_headers": {}}, {"workload_discovery": {}}],
        "upstream_propagation": [{"istio_headers": {}}],
    });
    if view.mesh.headers.metadata_in_mesh {
        metadata["upstream_propagation"] = json!([{"istio_headers": {"skip_external_clusters": true}}]);
    }
    let mut filters = vec![HttpFilter::PeerMetadata(metadata)];
    filters.extend((protocol == Protocol::GrpcWeb).then_some(HttpFilter::GrpcWeb));
    filters.extend([HttpFilter::GrpcStats, alpn(), HttpFilter::Fault, HttpFilter::Cors]);
    filters.extend(view.mesh.outbound_told.stats.clone().map(HttpFilter::IstioStats));
    filters
}

/// Tells a peer by ALPN that what comes is HTTP, so that its chain for HTTP takes it.
fn alpn() -> HttpFilter {
    let row = |upstream: &str, istio: &str| {
        let offered = [istio, "istio", upstream].map(str::to_owned).to_vec();
        (upstream.to_owned(), offered)
    };
    HttpFilter::Alpn(BTreeMap::from([
        row("http/1.0", "istio-http/1.0"),
        row("http/1.1", "istio-http/1.1"),
        row("h2", "istio-h2"),
    ]))
}

fn base(view: &View<'_>, direction: Direction, stat_prefix: String, routes: RouteSource) -> HttpConnectionManager {
    let mesh = view.mesh;
    let headers = &mesh.headers;
    let told = mesh.told(direction);
    HttpConnectionManager {
        stat_prefix,
        routes,
        filters: Vec::new(),
        server_name: String::new(),
        server_header_transformation: headers.server_transformation,
        forward_client_cert: ForwardClientCert::Sanitize,
        set_current_client_cert: ClientCertDetails::default(),
        use_remote_address: false,
        generate_request_id: headers.request_id,
        request_id_for_trace_sampling: told.trace_by_request_id,
        normalize_path: mesh.normalize_path,
        merge_slashes: mesh.merge_slashes,
        escaped_slashes: mesh.escaped_slashes,
        stream_idle_timeout: Some(Duration::ZERO),
        request_timeout: None,
        request_headers_timeout: None,
        idle_timeout: mesh.idle_timeout,
        max_connection_duration: None,
        max_stream_duration: None,
        max_requests_per_connection: None,
        drain_timeout: None,
        max_request_headers_kb: None,
        headers_with_underscores: UnderscoreHeaders::Allow,
        upgrades: vec!["websocket".to_owned()],
        accept_http_10: mesh.http10,
        allow_absolute_url: false,
        preserve_header_case: headers.preserve_case,
        proxy_100_continue: true,
        append_x_forwarded_port: headers.forwarded_port,
        suppress_envoy_headers: headers.suppress_debug,
        http2: None,
        internal_cidrs: Vec::new(),
        access_log: told.access_log.clone(),
        tracing: told.tracing.clone(),
    }
}
