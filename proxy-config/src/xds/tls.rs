//! TLS contexts and transport sockets. Key material is named: where a secret comes from (`sds_config`) follows from
//! its name, so that part is not read.

use std::mem::take;

use envoy_types::pb::envoy::config::core::v3::{TransportSocket, proxy_protocol_config, transport_socket};
use envoy_types::pb::envoy::extensions::transport_sockets::proxy_protocol::v3::ProxyProtocolUpstreamTransport;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::certificate_validation_context::TrustChainVerification;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::ValidationContextType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::tls_parameters::TlsProtocol;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, SubjectAltNameMatcher,
    TlsParameters, UpstreamTlsContext,
};

use super::context::{At, Fault, Read, Reader, each, type_name};
use super::{matcher, value};
use crate::model::{
    CommonTls, DownstreamTls, Name, SanKind, SanMatcher, TlsVersion, Transport, UpstreamTls, Validation,
};

/// TLS termination of a chain; `None` is plaintext.
pub(super) fn downstream(socket: Option<TransportSocket>, reader: &mut Reader) -> Read<Option<DownstreamTls>> {
    let Some(socket) = socket else { return Ok(None) };
    let Some(transport_socket::ConfigType::TypedConfig(any)) = socket.config_type else {
        return if is_raw(&socket.name) { Ok(None) } else { Err(unsupported(&socket.name)) };
    };
    match type_name(&any.type_url) {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(None),
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext" => {
            let mut context: DownstreamTlsContext = reader.unpack(&any)?;
            let out = DownstreamTls {
                common: common(context.common_tls_context.take(), reader).at("common_tls_context")?,
                require_client_certificate: value::flag(&mut context.require_client_certificate).unwrap_or(false),
            };
            reader.done(&context);
            Ok(Some(out))
        }
        other => Err(unsupported(other)),
    }
}

/// Socket of a cluster; what we do not do stays by name.
pub(super) fn upstream(socket: Option<TransportSocket>, reader: &mut Reader) -> Read<Transport> {
    let Some(socket) = socket else { return Ok(Transport::Raw) };
    let Some(transport_socket::ConfigType::TypedConfig(any)) = socket.config_type else {
        return Ok(if is_raw(&socket.name) { Transport::Raw } else { Transport::Unsupported(socket.name) });
    };
    match type_name(&any.type_url) {
        "envoy.extensions.transport_sockets.proxy_protocol.v3.ProxyProtocolUpstreamTransport" => {
            let mut outer: ProxyProtocolUpstreamTransport = reader.unpack(&any)?;
            let mut config = outer.config.take().unwrap_or_default();
            let version = match config.version() {
                proxy_protocol_config::Version::V1 => 1,
                proxy_protocol_config::Version::V2 => 2,
            };
            take(&mut config.version);
            reader.done(&config);
            let inner = plain(outer.transport_socket.take(), reader).at("transport_socket")?;
            reader.done(&outer);
            Ok(Transport::ProxyProtocol(version, Box::new(inner)))
        }
        _ => plain(
            Some(TransportSocket {
                name: socket.name,
                config_type: Some(transport_socket::ConfigType::TypedConfig(any)),
            }),
            reader,
        ),
    }
}

/// A socket that wraps no other: nesting ends here, whatever a peer sends.
fn plain(socket: Option<TransportSocket>, reader: &mut Reader) -> Read<Transport> {
    let Some(socket) = socket else { return Ok(Transport::Raw) };
    let Some(transport_socket::ConfigType::TypedConfig(any)) = socket.config_type else {
        return Ok(if is_raw(&socket.name) { Transport::Raw } else { Transport::Unsupported(socket.name) });
    };
    match type_name(&any.type_url) {
        "envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer" => Ok(Transport::Raw),
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext" => {
            let mut context: UpstreamTlsContext = reader.unpack(&any)?;
            let out = UpstreamTls {
                common: common(context.common_tls_context.take(), reader).at("common_tls_context")?,
                sni: take(&mut context.sni),
                auto_host_sni: take(&mut context.auto_host_sni),
                auto_sni_san_validation: take(&mut context.auto_sni_san_validation),
            };
            reader.done(&context);
            Ok(Transport::Tls(Box::new(out)))
        }
        other => Ok(Transport::Unsupported(other.to_owned())),
    }
}

fn is_raw(name: &str) -> bool {
    name.is_empty() || name == "raw_buffer" || name == "envoy.transport_sockets.raw_buffer"
}

fn unsupported(name: &str) -> Fault {
    Fault::new(format!("transport socket {name} is not supported"))
}

fn common(context: Option<CommonTlsContext>, reader: &mut Reader) -> Read<CommonTls> {
    let mut of = context.unwrap_or_default();
    let mut out = CommonTls {
        certificates: take(&mut of.tls_certificate_sds_secret_configs)
            .into_iter()
            .map(|secret| secret_name(secret, reader))
            .collect(),
        alpn: take(&mut of.alpn_protocols),
        validation: of.validation_context_type.take().map(|v| validation(v, reader)).transpose()?,
        ..CommonTls::default()
    };
    if let Some(params) = of.tls_params.take() {
        parameters(params, &mut out, reader).at("tls_params")?;
    }
    reader.done_strict(&of)?;
    Ok(out)
}

fn secret_name(mut secret: SdsSecretConfig, reader: &mut Reader) -> Name {
    let name = Name::from(take(&mut secret.name));
    reader.done(&secret);
    name
}

fn parameters(mut of: TlsParameters, out: &mut CommonTls, reader: &mut Reader) -> Read<()> {
    let version = |field: &mut i32| match TlsProtocol::try_from(take(field)) {
        Ok(TlsProtocol::TlsAuto) => Ok(None),
        Ok(TlsProtocol::TlSv10) => Ok(Some(TlsVersion::V1_0)),
        Ok(TlsProtocol::TlSv11) => Ok(Some(TlsVersion::V1_1)),
        Ok(TlsProtocol::TlSv12) => Ok(Some(TlsVersion::V1_2)),
        Ok(TlsProtocol::TlSv13) => Ok(Some(TlsVersion::V1_3)),
        Err(_) => Err(Fault::new("unknown TLS version")),
    };
    out.min_version = version(&mut of.tls_minimum_protocol_version)?;
    out.max_version = version(&mut of.tls_maximum_protocol_version)?;
    out.cipher_suites = take(&mut of.cipher_suites);
    out.ecdh_curves = take(&mut of.ecdh_curves);
    reader.done_strict(&of)
}

fn validation(of: ValidationContextType, reader: &mut Reader) -> Read<Validation> {
    match of {
        ValidationContextType::ValidationContext(context) => inline(context, reader).at("validation_context"),
        ValidationContextType::ValidationContextSdsSecretConfig(secret) => {
            Ok(Validation { roots: Some(secret_name(secret, reader)), ..Validation::default() })
        }
        ValidationContextType::CombinedValidationContext(mut combined) => {
            let context = combined.default_validation_context.take().unwrap_or_default();
            let mut out = inline(context, reader).at("combined_validation_context.default_validation_context")?;
            out.roots = combined.validation_context_sds_secret_config.take().map(|s| secret_name(s, reader));
            reader.done_strict(&combined).at("combined_validation_context")?;
            Ok(out)
        }
        _ => Err(Fault::new("certificate providers are not supported")),
    }
}

#[expect(deprecated, reason = "istiod sends the untyped form")]
fn inline(mut of: CertificateValidationContext, reader: &mut Reader) -> Read<Validation> {
    let verification = TrustChainVerification::try_from(take(&mut of.trust_chain_verification));
    let mut out = Validation {
        accept_untrusted: verification == Ok(TrustChainVerification::AcceptUntrusted),
        ..Validation::default()
    };
    let untyped = take(&mut of.match_subject_alt_names);
    out.san = each("match_subject_alt_names", untyped, |m| {
        Ok(SanMatcher { kind: SanKind::Any, value: matcher::string(m, reader)? })
    })?;
    let typed = take(&mut of.match_typed_subject_alt_names);
    out.san.extend(each("match_typed_subject_alt_names", typed, |m| typed_san(m, reader))?);
    reader.done_strict(&of)?;
    Ok(out)
}

fn typed_san(of: SubjectAltNameMatcher, reader: &mut Reader) -> Read<SanMatcher> {
    let kind = match of.san_type() {
        SanType::Uri => SanKind::Uri,
        SanType::Dns => SanKind::Dns,
        SanType::IpAddress => SanKind::Ip,
        SanType::Email => SanKind::Email,
        SanType::Unspecified | SanType::OtherName => return Err(Fault::new("this kind of SAN is not supported")),
    };
    let value = of.matcher.ok_or_else(|| Fault::new("no matcher")).and_then(|m| matcher::string(m, reader));
    Ok(SanMatcher { kind, value: value.at("matcher")? })
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::CombinedCertificateValidationContext;
    use envoy_types::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
    use envoy_types::pb::google::protobuf::BoolValue;
    use envoy_types::util::pack_any;

    use super::*;

    fn socket(name: &str, any: envoy_types::pb::google::protobuf::Any) -> Option<TransportSocket> {
        Some(TransportSocket {
            name: name.to_owned(),
            config_type: Some(transport_socket::ConfigType::TypedConfig(any)),
        })
    }

    fn secret(name: &str) -> SdsSecretConfig {
        SdsSecretConfig { name: name.to_owned(), sds_config: None }
    }

    fn mesh_tls(context: CertificateValidationContext) -> CommonTlsContext {
        let combined = CombinedCertificateValidationContext {
            default_validation_context: Some(context),
            validation_context_sds_secret_config: Some(secret("ROOTCA")),
            ..Default::default()
        };
        CommonTlsContext {
            tls_certificate_sds_secret_configs: vec![secret("default")],
            alpn_protocols: vec!["h2".to_owned()],
            validation_context_type: Some(ValidationContextType::CombinedValidationContext(combined)),
            ..Default::default()
        }
    }

    #[test]
    fn roots_and_names_are_merged() {
        let prefix = MatchPattern::Prefix("spiffe://td/".to_owned());
        #[expect(deprecated, reason = "istiod sends the untyped form")]
        let context = CertificateValidationContext {
            match_subject_alt_names: vec![StringMatcher { match_pattern: Some(prefix), ..Default::default() }],
            ..Default::default()
        };
        let message = DownstreamTlsContext {
            common_tls_context: Some(mesh_tls(context)),
            require_client_certificate: Some(BoolValue { value: true }),
            ..Default::default()
        };
        let tls = downstream(socket("tls", pack_any(message)), &mut Reader::default()).expect("valid").expect("TLS");
        assert!(tls.require_client_certificate);
        let validation = tls.common.validation.expect("validation");
        assert_eq!(validation.roots.as_deref(), Some("ROOTCA"));
        assert_eq!(validation.san.len(), 1);
        assert_eq!(&*tls.common.certificates[0], "default");
    }

    #[test]
    fn a_check_that_we_do_not_make_is_refused() {
        let context =
            CertificateValidationContext { verify_certificate_hash: vec!["x".to_owned()], ..Default::default() };
        let message = UpstreamTlsContext { common_tls_context: Some(mesh_tls(context)), ..Default::default() };
        assert!(upstream(socket("tls", pack_any(message)), &mut Reader::default()).is_err());
    }

    #[test]
    fn proxy_protocol_wraps_once() {
        let wrap = |inner| {
            let outer = ProxyProtocolUpstreamTransport { transport_socket: inner, ..Default::default() };
            socket("pp", pack_any(outer))
        };
        let raw = || Some(TransportSocket { name: "envoy.transport_sockets.raw_buffer".to_owned(), config_type: None });
        let mut reader = Reader::default();
        assert_eq!(upstream(wrap(raw()), &mut reader), Ok(Transport::ProxyProtocol(1, Box::new(Transport::Raw))));
        let twice = upstream(wrap(wrap(raw())), &mut reader).expect("read");
        assert!(matches!(twice, Transport::ProxyProtocol(1, inner) if matches!(*inner, Transport::Unsupported(_))));
    }
}
