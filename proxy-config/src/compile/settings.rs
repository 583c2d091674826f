//! Mesh-wide settings from `MeshConfig`, the proxy's `ProxyConfig` and its node metadata.

use serde_json::{Value, json};

use super::trust_domain::TrustDomains;
use super::view::{Interception, OutboundPolicy, ProxyHeaders, Settings};
use crate::istio::common::{IstioDuration, parse_duration};
use crate::istio::mesh_config::{AccessLogEncoding, MeshConfig, Normalization, OutboundMode, TlsConfig, TlsProtocol};
use crate::istio::proxy_config::{ForwardedClientCert, ProxyConfig, Switch};
use crate::model::{
    AccessLog, ClientCertDetails, EscapedSlashes, ForwardClientCert, LogFormat, LogSink, Reject, ServerHeader,
    Severity, TlsVersion,
};
use crate::registry::Proxy;

/// Istio's text access log.
pub const TEXT_FORMAT: &str = concat!(
    "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" %RESPONSE_CODE% ",
    "%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% ",
    "\"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% ",
    "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" ",
    "\"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% ",
    "%UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% ",
    "%REQUESTED_SERVER_NAME% %ROUTE_NAME%\n"
);

/// The settings of one proxy. `config` is the proxy's own, already chosen over the mesh default.
pub fn settings(mesh: &MeshConfig, config: &ProxyConfig, proxy: &Proxy, rejects: &mut Vec<Reject>) -> Settings {
    let base = Settings::default();
    let or = |text: &String, default: String| if text.is_empty() { default } else { text.clone() };
    let trust_domain = or(&mesh.trust_domain, "cluster.local".to_owned());
    let metadata = |name: &str| proxy.metadata.get(name).map(text).unwrap_or_default();
    let flag = |name: &str| matches!(metadata(name).as_str(), "true" | "1");
    let (normalize_path, merge_slashes, escaped_slashes) = normalization(mesh);
    unsupported(mesh, rejects);
    Settings {
        root_namespace: or(&mesh.root_namespace, base.root_namespace.clone()),
        trust_domains: TrustDomains::new(&trust_domain, &mesh.trust_domain_aliases),
        peer_domains: peer_domains(mesh, &trust_domain),
        outbound_port: mesh.proxy_listen_port.unwrap_or(base.outbound_port),
        inbound_port: mesh.proxy_inbound_listen_port.unwrap_or(base.inbound_port),
        interception: interception(&metadata("INTERCEPTION_MODE")),
        outbound: outbound(mesh),
        normalize_path,
        merge_slashes,
        escaped_slashes,
        detection_timeout: mesh.protocol_detection_timeout.map(|IstioDuration(d)| d).filter(|d| !d.is_zero()),
        retries: mesh.default_http_retry_policy.clone(),
        inbound_retries: mesh.default_inbound_http_retry_policy.clone(),
        min_tls: min_tls(mesh.mesh_mtls.as_ref()),
        cipher_suites: cipher_suites(mesh.mesh_mtls.as_ref()).unwrap_or_else(|| base.cipher_suites.clone()),
        idle_timeout: parse_duration(&metadata("IDLE_TIMEOUT")),
        http10: flag("HTTP10"),
        inbound_exact_balance: flag("INBOUND_LISTENER_EXACT_BALANCE"),
        outbound_exact_balance: flag("OUTBOUND_LISTENER_EXACT_BALANCE"),
        headers: headers(config),
        reserved_ports: reserved_ports(proxy),
        ..base
    }
}

/// The proxy's own configuration: what its agent sent replaces the mesh default as a whole.
pub fn proxy_config(mesh: &MeshConfig, proxy: &Proxy) -> ProxyConfig {
    let sent = proxy.metadata.get("PROXY_CONFIG").and_then(|v| serde_json::from_value(v.clone()).ok());
    sent.or_else(|| mesh.default_config.clone()).unwrap_or_default()
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn peer_domains(mesh: &MeshConfig, own: &str) -> Vec<String> {
    let all = std::iter::once(own)
        .chain(mesh.trust_domain_aliases.iter().map(String::as_str))
        .chain(mesh.ca_certificates.iter().flat_map(|c| &c.trust_domains).map(String::as_str));
    let mut out: Vec<String> = Vec::new();
    for domain in all.filter(|d| !d.is_empty()) {
        if !out.iter().any(|known| known == domain) {
            out.push(domain.to_owned());
        }
    }
    out
}

fn interception(mode: &str) -> Interception {
    match mode {
        "TPROXY" => Interception::Tproxy,
        "NONE" => Interception::None,
        _ => Interception::Redirect,
    }
}

/// A mesh-wide egress proxy does not exist: that field is the Sidecar's alone.
fn outbound(mesh: &MeshConfig) -> OutboundPolicy {
    match mesh.outbound_traffic_policy.as_ref().map(|p| p.mode) {
        Some(OutboundMode::RegistryOnly) => OutboundPolicy::RegistryOnly,
        Some(OutboundMode::AllowAny | OutboundMode::AllowAnyDynamicDns) | None => OutboundPolicy::AllowAny,
    }
}

fn normalization(mesh: &MeshConfig) -> (bool, bool, EscapedSlashes) {
    match mesh.path_normalization.unwrap_or_default().normalization {
        Normalization::Default | Normalization::Base => (true, false, EscapedSlashes::KeepUnchanged),
        Normalization::None => (false, false, EscapedSlashes::KeepUnchanged),
        Normalization::MergeSlashes => (true, true, EscapedSlashes::KeepUnchanged),
        Normalization::DecodeAndMergeSlashes => (true, true, EscapedSlashes::UnescapeAndForward),
    }
}

fn min_tls(mtls: Option<&TlsConfig>) -> TlsVersion {
    match mtls.map(|m| m.min_protocol_version) {
        Some(TlsProtocol::V1_3) => TlsVersion::V1_3,
        Some(TlsProtocol::Auto | TlsProtocol::V1_2) | None => TlsVersion::V1_2,
    }
}

fn cipher_suites(mtls: Option<&TlsConfig>) -> Option<Vec<String>> {
    mtls.map(|m| m.cipher_suites.clone()).filter(|c| !c.is_empty())
}

/// The mesh's file log.
pub(super) fn mesh_log(mesh: &MeshConfig) -> Option<AccessLog> {
    let path = Some(&mesh.access_log_file).filter(|path| !path.is_empty())?.clone();
    Some(AccessLog { sink: LogSink::File { path, format: file_format(mesh), omit_empty: false }, filter: None })
}

/// The format of the mesh's file log.
pub(super) fn file_format(mesh: &MeshConfig) -> LogFormat {
    let said = mesh.access_log_format.as_str();
    match mesh.access_log_encoding {
        AccessLogEncoding::Text if said.is_empty() => LogFormat::Text(TEXT_FORMAT.to_owned()),
        AccessLogEncoding::Text if said.ends_with('\n') => LogFormat::Text(said.to_owned()),
        AccessLogEncoding::Text => LogFormat::Text(format!("{said}\n")),
        AccessLogEncoding::Json => {
            LogFormat::Json(serde_json::from_str(said).ok().filter(Value::is_object).unwrap_or_else(json_format))
        }
    }
}

/// The text format's operators by name.
pub fn json_format() -> Value {
    json!({
        "start_time": "%START_TIME%",
        "route_name": "%ROUTE_NAME%",
        "method": "%REQ(:METHOD)%",
        "path": "%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%",
        "protocol": "%PROTOCOL%",
        "response_code": "%RESPONSE_CODE%",
        "response_flags": "%RESPONSE_FLAGS%",
        "response_code_details": "%RESPONSE_CODE_DETAILS%",
        "connection_termination_details": "%CONNECTION_TERMINATION_DETAILS%",
        "bytes_received": "%BYTES_RECEIVED%",
        "bytes_sent": "%BYTES_SENT%",
        "duration": "%DURATION%",
        "upstream_service_time": "%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)%",
        "x_forwarded_for": "%REQ(X-FORWARDED-FOR)%",
        "user_agent": "%REQ(USER-AGENT)%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "authority": "%REQ(:AUTHORITY)%",
        "upstream_host": "%UPSTREAM_HOST%",
        "upstream_cluster": "%UPSTREAM_CLUSTER_RAW%",
        "upstream_local_address": "%UPSTREAM_LOCAL_ADDRESS%",
        "downstream_local_address": "%DOWNSTREAM_LOCAL_ADDRESS%",
        "downstream_remote_address": "%DOWNSTREAM_REMOTE_ADDRESS%",
        "requested_server_name": "%REQUESTED_SERVER_NAME%",
        "upstream_transport_failure_reason": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    })
}

fn headers(config: &ProxyConfig) -> ProxyHeaders {
    let mut out = ProxyHeaders::default();
    let Some(said) = &config.proxy_headers else { return out };
    let disabled = |s: Option<Switch>| s.and_then(|s| s.disabled) == Some(true);
    let enabled = |s: Option<Switch>| s.and_then(|s| s.enabled) == Some(true);
    out.forward_client_cert = match said.forwarded_client_cert {
        ForwardedClientCert::Undefined | ForwardedClientCert::AppendForward => ForwardClientCert::AppendForward,
        ForwardedClientCert::Sanitize => ForwardClientCert::Sanitize,
        ForwardedClientCert::ForwardOnly => ForwardClientCert::ForwardOnly,
        ForwardedClientCert::SanitizeSet => ForwardClientCert::SanitizeSet,
        ForwardedClientCert::AlwaysForwardOnly => ForwardClientCert::AlwaysForwardOnly,
    };
    let cert = said.set_current_client_cert_details.unwrap_or_default();
    out.client_cert = ClientCertDetails {
        subject: cert.subject != Some(false),
        cert: cert.cert == Some(true),
        chain: cert.chain == Some(true),
        dns: cert.dns != Some(false),
        uri: cert.uri != Some(false),
    };
    if let Some(server) = &said.server {
        if server.disabled == Some(true) {
            out.inbound_server = String::new();
            out.outbound_server = String::new();
            out.server_transformation = ServerHeader::PassThrough;
        } else if !server.value.is_empty() {
            out.inbound_server.clone_from(&server.value);
            out.outbound_server.clone_from(&server.value);
        }
    }
    out.attempt_count = !disabled(said.attempt_count);
    out.request_id = !disabled(said.request_id);
    out.suppress_debug = disabled(said.envoy_debug_headers);
    out.forwarded_host = enabled(said.x_forwarded_host);
    out.forwarded_port = enabled(said.x_forwarded_port);
    out.preserve_case = said.preserve_http1_header_case == Some(true);
    out.metadata_in_mesh = said.metadata_exchange_headers.as_ref().is_some_and(|m| m.mode == "IN_MESH");
    out
}

/// Ports of the agent that the node names; without names the defaults.
fn reserved_ports(proxy: &Proxy) -> Vec<u16> {
    let port = |name: &str| {
        let value = proxy.metadata.get(name)?;
        text(value).parse().ok().filter(|p: &u16| *p != 0)
    };
    let named =
        ["ENVOY_STATUS_PORT", "ENVOY_PROMETHEUS_PORT", "ENVOY_SECURE_METRICS_PORT", "ENVOY_SECURE_MERGED_METRICS_PORT"];
    named.into_iter().filter_map(port).collect()
}

/// Mesh settings that are read by nobody here yet and change traffic.
fn unsupported(mesh: &MeshConfig, rejects: &mut Vec<Reject>) {
    let mut tell = |field: &str, reason: &str| {
        rejects.push(Reject {
            resource: "MeshConfig".to_owned(),
            place: None,
            field: field.to_owned(),
            reason: reason.to_owned(),
            severity: Severity::Error,
            code: None,
        });
    };
    if mesh.outbound_traffic_policy.as_ref().map(|p| p.mode) == Some(OutboundMode::AllowAnyDynamicDns) {
        tell("outboundTrafficPolicy.mode", "ALLOW_ANY_DYNAMIC_DNS is not supported yet; it acts as ALLOW_ANY");
    }
    if mesh.proxy_http_port != 0 {
        tell("proxyHttpPort", "the explicit HTTP proxy listener is not supported yet; it is left out");
    }
    if mesh.enable_envoy_access_log_service {
        tell("enableEnvoyAccessLogService", "the access log service is not supported yet; it is left out");
    }
    if mesh.default_config.as_ref().is_some_and(|c| c.connection_settings.is_some()) {
        tell("defaultConfig.connectionSettings", "connection settings are not supported yet; they are left out");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn of(yaml: &str, metadata: Value) -> (Settings, Vec<Reject>) {
        let mesh: MeshConfig = serde_saphyr::from_str(yaml).expect("valid test YAML");
        let metadata = metadata.as_object().cloned().unwrap_or_default();
        let proxy = Proxy { metadata, ..Proxy::default() };
        let mut rejects = Vec::new();
        let out = settings(&mesh, &proxy_config(&mesh, &proxy), &proxy, &mut rejects);
        (out, rejects)
    }

    #[test]
    fn nothing_said_is_the_built_in_mesh() {
        let (s, rejects) = of("{}", json!({}));
        assert!(rejects.is_empty());
        assert_eq!(
            (s.peer_domains.as_slice(), s.outbound),
            (&["cluster.local".to_owned()][..], OutboundPolicy::AllowAny)
        );
        assert!(s.normalize_path);
    }

    #[test]
    fn the_mesh_says() {
        let (s, rejects) = of(
            "{trustDomain: corp, trustDomainAliases: [old], caCertificates: [{trustDomains: [old, far]}], \
             outboundTrafficPolicy: {mode: REGISTRY_ONLY}, pathNormalization: {normalization: MERGE_SLASHES}, \
             meshMTLS: {minProtocolVersion: TLSV1_3}, protocolDetectionTimeout: 0.4s, \
             defaultConfig: {proxyHeaders: {server: {disabled: true}}}, proxyHttpPort: 80}",
            json!({"INTERCEPTION_MODE": "TPROXY", "ENVOY_STATUS_PORT": 15021, "ENVOY_PROMETHEUS_PORT": "15090"}),
        );
        assert_eq!(s.peer_domains, ["corp", "old", "far"]);
        assert_eq!((s.outbound, s.merge_slashes, s.min_tls), (OutboundPolicy::RegistryOnly, true, TlsVersion::V1_3));
        assert_eq!((s.interception, s.reserved_ports), (Interception::Tproxy, vec![15021, 15090]));
        assert_eq!(s.headers.inbound_server, "");
        assert_eq!(s.detection_timeout, Some(Duration::from_millis(400)));
        assert_eq!(rejects.len(), 1, "the HTTP proxy port");
    }

    #[test]
    fn the_nodes_own_proxy_config_replaces_the_default() {
        let (s, _) = of(
            "{defaultConfig: {proxyHeaders: {requestId: {disabled: true}}}}",
            json!({"PROXY_CONFIG": {"tracing": {"sampling": 50}}}),
        );
        assert!(s.headers.request_id);
    }
}
