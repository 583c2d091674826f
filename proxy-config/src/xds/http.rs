//! HTTP connection managers.

use std::mem::take;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::http_protocol_options::HeadersWithUnderscoresAction;
use envoy_types::pb::envoy::config::core::v3::http1_protocol_options::{HeaderKeyFormat, header_key_format};
use envoy_types::pb::envoy::config::core::v3::{Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    ForwardClientCertDetails, InternalAddressConfig, PathWithEscapedSlashesAction, RouteSpecifier,
    ServerHeaderTransformation, SetCurrentClientCertDetails, UpgradeConfig,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager as Pb, RequestIdExtension,
};
use envoy_types::pb::envoy::extensions::request_id::uuid::v3::UuidRequestIdConfig;

use super::context::{At, Fault, Read, Reader, each, type_name};
use super::{Extensions, access_log, http_filter, route, tracing, value};
use crate::model::{
    ClientCertDetails, EscapedSlashes, ForwardClientCert, Http2Options, HttpConnectionManager, Name, RouteSource,
    ServerHeader, UnderscoreHeaders,
};

/// `envoy.filters.network.http_connection_manager`.
pub(super) fn manager(mut of: Pb, extensions: &Extensions, reader: &mut Reader) -> Read<HttpConnectionManager> {
    trusted_hops(&of)?;
    let routes = routes(of.route_specifier.take(), reader)?;
    let (filters, suppress_envoy_headers) =
        http_filter::filters(take(&mut of.http_filters), extensions, reader).at("http_filters")?;
    let mut out = HttpConnectionManager {
        stat_prefix: take(&mut of.stat_prefix),
        routes,
        filters,
        suppress_envoy_headers,
        server_name: take(&mut of.server_name),
        server_header_transformation: server_header(&mut of)?,
        forward_client_cert: forward_client_cert(&mut of)?,
        set_current_client_cert: client_cert(of.set_current_client_cert_details.take(), reader),
        use_remote_address: value::flag(&mut of.use_remote_address).unwrap_or(false),
        generate_request_id: value::flag(&mut of.generate_request_id).unwrap_or(true),
        request_id_for_trace_sampling: request_id(of.request_id_extension.take(), reader)?,
        normalize_path: value::flag(&mut of.normalize_path).unwrap_or(false),
        merge_slashes: take(&mut of.merge_slashes),
        escaped_slashes: escaped_slashes(&mut of)?,
        stream_idle_timeout: value::duration(&mut of.stream_idle_timeout),
        request_timeout: value::duration(&mut of.request_timeout),
        request_headers_timeout: value::duration(&mut of.request_headers_timeout),
        idle_timeout: None,
        max_connection_duration: None,
        max_stream_duration: None,
        max_requests_per_connection: None,
        drain_timeout: value::duration(&mut of.drain_timeout),
        max_request_headers_kb: value::number(&mut of.max_request_headers_kb),
        headers_with_underscores: UnderscoreHeaders::Allow,
        upgrades: take(&mut of.upgrade_configs).into_iter().filter_map(|u| upgrade(u, reader)).collect(),
        accept_http_10: false,
        allow_absolute_url: false,
        preserve_header_case: false,
        proxy_100_continue: take(&mut of.proxy_100_continue),
        append_x_forwarded_port: take(&mut of.append_x_forwarded_port),
        http2: of.http2_protocol_options.take().map(|o| http2(o, reader)),
        internal_cidrs: internal(of.internal_address_config.take(), reader).at("internal_address_config")?,
        access_log: access_log::logs(take(&mut of.access_log), reader),
        tracing: of.tracing.take().map(|t| tracing::settings(t, reader)).transpose().at("tracing")?,
    };
    if let Some(options) = of.http_protocol_options.take() {
        http1(options, &mut out, reader);
    }
    if let Some(options) = of.common_http_protocol_options.take() {
        common(options, &mut out, reader);
    }
    reader.done(&of);
    Ok(out)
}

/// Policies about the client's address would read another one than was meant.
fn trusted_hops(of: &Pb) -> Read<()> {
    if of.xff_num_trusted_hops == 0 {
        return Ok(());
    }
    Err(Fault::new("hops to be trusted are not counted; 0 is expected")).at("xff_num_trusted_hops")
}

fn routes(of: Option<RouteSpecifier>, reader: &mut Reader) -> Read<RouteSource> {
    match of {
        Some(RouteSpecifier::Rds(mut rds)) => {
            let name = Name::from(take(&mut rds.route_config_name));
            reader.done(&rds);
            Ok(RouteSource::Rds(name))
        }
        Some(RouteSpecifier::RouteConfig(config)) => {
            let table = route::table(config, reader).at("route_config")?;
            Ok(RouteSource::Inline(Arc::new(table)))
        }
        Some(RouteSpecifier::ScopedRoutes(_)) => Err(Fault::new("scoped_routes is not supported")),
        None => Err(Fault::new("no routes")),
    }
}

fn server_header(of: &mut Pb) -> Read<ServerHeader> {
    match ServerHeaderTransformation::try_from(take(&mut of.server_header_transformation)) {
        Ok(ServerHeaderTransformation::Overwrite) => Ok(ServerHeader::Overwrite),
        Ok(ServerHeaderTransformation::AppendIfAbsent) => Ok(ServerHeader::AppendIfAbsent),
        Ok(ServerHeaderTransformation::PassThrough) => Ok(ServerHeader::PassThrough),
        Err(_) => Err(Fault::new("unknown server_header_transformation")),
    }
}

fn forward_client_cert(of: &mut Pb) -> Read<ForwardClientCert> {
    match ForwardClientCertDetails::try_from(take(&mut of.forward_client_cert_details)) {
        Ok(ForwardClientCertDetails::Sanitize) => Ok(ForwardClientCert::Sanitize),
        Ok(ForwardClientCertDetails::ForwardOnly) => Ok(ForwardClientCert::ForwardOnly),
        Ok(ForwardClientCertDetails::AppendForward) => Ok(ForwardClientCert::AppendForward),
        Ok(ForwardClientCertDetails::SanitizeSet) => Ok(ForwardClientCert::SanitizeSet),
        Ok(ForwardClientCertDetails::AlwaysForwardOnly) => Ok(ForwardClientCert::AlwaysForwardOnly),
        Err(_) => Err(Fault::new("unknown forward_client_cert_details")),
    }
}

fn client_cert(of: Option<SetCurrentClientCertDetails>, reader: &mut Reader) -> ClientCertDetails {
    let mut of = of.unwrap_or_default();
    let out = ClientCertDetails {
        subject: value::flag(&mut of.subject).unwrap_or(false),
        cert: take(&mut of.cert),
        chain: take(&mut of.chain),
        dns: take(&mut of.dns),
        uri: take(&mut of.uri),
    };
    reader.done(&of);
    out
}

/// Whether the trace decision is packed into x-request-id; Envoy does so unless told otherwise.
fn request_id(of: Option<RequestIdExtension>, reader: &mut Reader) -> Read<bool> {
    let Some(any) = of.and_then(|e| e.typed_config) else { return Ok(true) };
    if type_name(&any.type_url) != "envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig" {
        return Err(Fault::new(format!("{} is not supported", any.type_url))).at("request_id_extension");
    }
    let mut config: UuidRequestIdConfig = reader.unpack(&any).at("request_id_extension.typed_config")?;
    let out = value::flag(&mut config.use_request_id_for_trace_sampling).unwrap_or(true);
    reader.done(&config);
    Ok(out)
}

fn escaped_slashes(of: &mut Pb) -> Read<EscapedSlashes> {
    match PathWithEscapedSlashesAction::try_from(take(&mut of.path_with_escaped_slashes_action)) {
        Ok(
            PathWithEscapedSlashesAction::ImplementationSpecificDefault | PathWithEscapedSlashesAction::KeepUnchanged,
        ) => Ok(EscapedSlashes::KeepUnchanged),
        Ok(PathWithEscapedSlashesAction::RejectRequest) => Ok(EscapedSlashes::Reject),
        Ok(PathWithEscapedSlashesAction::UnescapeAndRedirect) => Ok(EscapedSlashes::UnescapeAndRedirect),
        Ok(PathWithEscapedSlashesAction::UnescapeAndForward) => Ok(EscapedSlashes::UnescapeAndForward),
        Err(_) => Err(Fault::new("unknown path_with_escaped_slashes_action")),
    }
}

fn upgrade(mut of: UpgradeConfig, reader: &mut Reader) -> Option<String> {
    let kind = take(&mut of.upgrade_type).to_ascii_lowercase();
    let enabled = value::flag(&mut of.enabled).unwrap_or(true);
    reader.done(&of);
    enabled.then_some(kind)
}

fn internal(of: Option<InternalAddressConfig>, reader: &mut Reader) -> Read<Vec<ipnet::IpNet>> {
    let mut of = of.unwrap_or_default();
    let out = each("cidr_ranges", take(&mut of.cidr_ranges), value::network)?;
    reader.done(&of);
    Ok(out)
}

fn http1(mut of: Http1ProtocolOptions, out: &mut HttpConnectionManager, reader: &mut Reader) {
    out.accept_http_10 = take(&mut of.accept_http_10);
    out.allow_absolute_url = value::flag(&mut of.allow_absolute_url).unwrap_or(false);
    out.preserve_header_case = preserves_case(of.header_key_format.take(), reader);
    reader.done(&of);
}

/// Whether header names keep their spelling.
pub(super) fn preserves_case(of: Option<HeaderKeyFormat>, reader: &mut Reader) -> bool {
    match of.and_then(|f| f.header_format) {
        Some(header_key_format::HeaderFormat::StatefulFormatter(formatter)) if formatter.name == "preserve_case" => {
            true
        }
        Some(header_key_format::HeaderFormat::StatefulFormatter(formatter)) => {
            reader.unread.insert(format!("HeaderKeyFormat.stateful_formatter {}", formatter.name));
            false
        }
        Some(header_key_format::HeaderFormat::ProperCaseWords(_)) => {
            reader.unread.insert("HeaderKeyFormat.proper_case_words".to_owned());
            false
        }
        None => false,
    }
}

/// HTTP/2 settings of a connection manager or a cluster.
pub(super) fn http2(mut of: Http2ProtocolOptions, reader: &mut Reader) -> Http2Options {
    let mut keepalive = of.connection_keepalive.take().unwrap_or_default();
    let out = Http2Options {
        max_concurrent_streams: value::number(&mut of.max_concurrent_streams),
        initial_stream_window_size: value::number(&mut of.initial_stream_window_size),
        initial_connection_window_size: value::number(&mut of.initial_connection_window_size),
        allow_connect: take(&mut of.allow_connect),
        keepalive_interval: value::duration(&mut keepalive.interval),
        keepalive_timeout: value::duration(&mut keepalive.timeout),
    };
    reader.done(&keepalive);
    reader.done(&of);
    out
}

fn common(mut of: HttpProtocolOptions, out: &mut HttpConnectionManager, reader: &mut Reader) {
    out.idle_timeout = value::duration(&mut of.idle_timeout);
    out.max_connection_duration = value::duration(&mut of.max_connection_duration);
    out.max_stream_duration = value::duration(&mut of.max_stream_duration);
    out.max_requests_per_connection = value::number(&mut of.max_requests_per_connection);
    out.headers_with_underscores = match of.headers_with_underscores_action() {
        HeadersWithUnderscoresAction::Allow => UnderscoreHeaders::Allow,
        HeadersWithUnderscoresAction::RejectRequest => UnderscoreHeaders::RejectRequest,
        HeadersWithUnderscoresAction::DropHeader => UnderscoreHeaders::DropHeader,
    };
    take(&mut of.headers_with_underscores_action);
    reader.done(&of);
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::Rds;
    use envoy_types::pb::google::protobuf as wkt;

    use super::*;

    fn with_rds() -> Pb {
        let rds = Rds { route_config_name: "80".to_owned(), ..Default::default() };
        Pb { route_specifier: Some(RouteSpecifier::Rds(rds)), ..Default::default() }
    }

    #[test]
    fn what_is_not_said_is_envoys_default() {
        let mut reader = Reader::default();
        let hcm = manager(with_rds(), &Extensions::new(), &mut reader).expect("valid");
        assert_eq!(hcm.routes, RouteSource::Rds(Name::from("80")));
        assert!(hcm.generate_request_id && hcm.request_id_for_trace_sampling);
        assert!(!hcm.normalize_path && !hcm.use_remote_address);
        assert_eq!(hcm.forward_client_cert, ForwardClientCert::Sanitize);
        assert!(reader.unread.is_empty(), "{:?}", reader.unread);
    }

    #[test]
    fn what_is_said_is_read_or_reported() {
        let message = Pb {
            merge_slashes: true,
            via: "hop".to_owned(),
            path_with_escaped_slashes_action: PathWithEscapedSlashesAction::UnescapeAndForward as i32,
            stream_idle_timeout: Some(wkt::Duration::default()),
            upgrade_configs: vec![
                UpgradeConfig { upgrade_type: "WebSocket".to_owned(), ..Default::default() },
                UpgradeConfig {
                    upgrade_type: "CONNECT".to_owned(),
                    enabled: Some(wkt::BoolValue { value: false }),
                    ..Default::default()
                },
            ],
            ..with_rds()
        };
        let mut reader = Reader::default();
        let hcm = manager(message, &Extensions::new(), &mut reader).expect("valid");
        assert!(hcm.merge_slashes);
        assert_eq!(hcm.escaped_slashes, EscapedSlashes::UnescapeAndForward);
        assert_eq!(hcm.stream_idle_timeout, Some(std::time::Duration::ZERO));
        assert_eq!(hcm.upgrades, ["websocket"]);
        assert_eq!(reader.unread.iter().collect::<Vec<_>>(), ["HttpConnectionManager.via"]);
    }

    #[test]
    fn trusted_hops_are_refused() {
        let mut reader = Reader::default();
        let of = Pb { xff_num_trusted_hops: 1, ..with_rds() };
        let refused = manager(of, &Extensions::new(), &mut reader).expect_err("policy would read a wrong address");
        assert_eq!(refused.into_reject(String::new()).field, "xff_num_trusted_hops");
    }

    #[test]
    fn a_manager_without_routes_is_refused() {
        assert!(manager(Pb::default(), &Extensions::new(), &mut Reader::default()).is_err());
    }
}
