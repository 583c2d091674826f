//! Secrets of a socket on this machine (SPIRE, an agent): the envelope, and what of a secret is used.

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use prost::Message;

use crate::xds::Any;

/// Path of the stream.
pub const STREAM_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
/// Type of the resources.
pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// Name of the validator that keeps trust domains apart.
const SPIFFE: &str = "envoy.tls.cert_validator.spiffe";

/// `google.rpc.Status`, as an `error_detail`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Status {
    /// gRPC code.
    #[prost(int32, tag = "1")]
    pub code: i32,
    /// For people.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// `envoy.service.discovery.v3.DiscoveryRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Request {
    /// Version that was accepted last.
    #[prost(string, tag = "1")]
    pub version_info: String,
    /// An encoded `envoy.config.core.v3.Node`; on the first message of a stream.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub node: Option<Bytes>,
    /// Secrets that are wanted.
    #[prost(string, repeated, tag = "3")]
    pub resource_names: Vec<String>,
    /// Type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// Which response this answers.
    #[prost(string, tag = "5")]
    pub response_nonce: String,
    /// Why it was not accepted.
    #[prost(message, optional, tag = "6")]
    pub error_detail: Option<Status>,
}

/// A secret, PEM; not parsed here.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub material: Material,
}

/// What a secret holds.
#[derive(Clone, PartialEq, Eq)]
pub enum Material {
    /// A certificate with its key.
    Certificate {
        /// Leaf first.
        chain: Bytes,
        /// Private key.
        key: Bytes,
    },
    /// Roots for everybody.
    Roots {
        /// The roots.
        pem: Bytes,
        /// Revocation lists.
        revoked: Option<Bytes>,
    },
    /// Roots for each trust domain.
    Domains(Vec<(String, Bytes)>),
}

impl std::fmt::Debug for Secret {
    /// Without what it holds, wherever it is printed.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secret").field("name", &self.name).finish_non_exhaustive()
    }
}

/// `envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig`.
#[derive(Clone, PartialEq, prost::Message)]
struct SpiffeValidator {
    #[prost(message, repeated, tag = "1")]
    trust_domains: Vec<TrustDomain>,
}

/// A trust domain with its roots.
#[derive(Clone, PartialEq, prost::Message)]
struct TrustDomain {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    trust_bundle: Option<DataSource>,
}

/// Reads a secret. What is set and not understood is refused: it would be a check that is not made.
///
/// # Errors
/// Names the field.
pub fn read(any: &Any) -> Result<Secret, String> {
    let message = pb::Secret::decode(&*any.value).map_err(|e| format!("secret: {e}"))?;
    let name = message.name.clone();
    let told = |field: &str, why: &str| format!("secret {name}: {field}: {why}");
    let inline = |source: Option<DataSource>, field: &str| inline(source).ok_or_else(|| told(field, "no inline text"));
    let material = match message.r#type {
        Some(pb::secret::Type::TlsCertificate(mut pair)) => {
            let chain = inline(pair.certificate_chain.take(), "tls_certificate.certificate_chain")?;
            let key = inline(pair.private_key.take(), "tls_certificate.private_key")?;
            if pair != pb::TlsCertificate::default() {
                return Err(told("tls_certificate", "more than a chain and a key is not supported"));
            }
            Material::Certificate { chain, key }
        }
        Some(pb::secret::Type::ValidationContext(context)) => validation(context).map_err(|(f, why)| told(f, &why))?,
        _ => return Err(told("type", "neither a certificate nor roots")),
    };
    Ok(Secret { name: message.name, material })
}

fn validation(mut context: pb::CertificateValidationContext) -> Result<Material, (&'static str, String)> {
    let (roots, revoked) = (inline(context.trusted_ca.take()), inline(context.crl.take()));
    let validator = context.custom_validator_config.take();
    if context != pb::CertificateValidationContext::default() {
        return Err(("validation_context", "more than roots and revocation lists is not supported".to_owned()));
    }
    let Some(validator) = validator else {
        let pem = roots.ok_or_else(|| ("validation_context.trusted_ca", "no inline text".to_owned()))?;
        return Ok(Material::Roots { pem, revoked });
    };
    if validator.name != SPIFFE {
        return Err(("validation_context.custom_validator_config", format!("{} is not supported", validator.name)));
    }
    let domains = "validation_context.custom_validator_config.trust_domains";
    let bytes = validator.typed_config.map(|any| any.value).unwrap_or_default();
    let read = SpiffeValidator::decode(&*bytes).map_err(|e| (domains, e.to_string()))?;
    let of = |domain: TrustDomain| {
        let bundle =
            inline(domain.trust_bundle).ok_or_else(|| (domains, format!("{}: no inline text", domain.name)))?;
        Ok((domain.name, bundle))
    };
    Ok(Material::Domains(read.trust_domains.into_iter().map(of).collect::<Result<_, _>>()?))
}

fn inline(source: Option<DataSource>) -> Option<Bytes> {
    match source?.specifier? {
        data_source::Specifier::InlineBytes(bytes) => Some(bytes.into()),
        data_source::Specifier::InlineString(text) => Some(text.into()),
        _ => None,
    }
}

/// A secret as an agent writes it; for servers, and for tests of what reads it.
pub fn write(secret: &Secret) -> Any {
    let text = |pem: &Bytes| {
        let specifier = Some(data_source::Specifier::InlineBytes(pem.to_vec()));
        Some(DataSource { specifier, ..DataSource::default() })
    };
    let r#type = match &secret.material {
        Material::Certificate { chain, key } => pb::secret::Type::TlsCertificate(pb::TlsCertificate {
            certificate_chain: text(chain),
            private_key: text(key),
            ..Default::default()
        }),
        Material::Roots { pem, revoked } => pb::secret::Type::ValidationContext(pb::CertificateValidationContext {
            trusted_ca: text(pem),
            crl: revoked.as_ref().and_then(text),
            ..Default::default()
        }),
        Material::Domains(domains) => {
            let trust_domains =
                domains.iter().map(|(name, pem)| TrustDomain { name: name.clone(), trust_bundle: text(pem) }).collect();
            let any = envoy_types::pb::google::protobuf::Any {
                type_url: "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig"
                    .to_owned(),
                value: SpiffeValidator { trust_domains }.encode_to_vec(),
            };
            let config = envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig {
                name: SPIFFE.to_owned(),
                typed_config: Some(any),
            };
            let custom_validator_config = Some(config);
            let context = pb::CertificateValidationContext { custom_validator_config, ..Default::default() };
            pb::secret::Type::ValidationContext(context)
        }
    };
    let message = pb::Secret { name: secret.name.clone(), r#type: Some(r#type) };
    Any { type_url: SECRET.to_owned(), value: message.encode_to_vec().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(name: &str, material: Material) -> Secret {
        Secret { name: name.to_owned(), material }
    }

    #[test]
    fn what_is_written_is_read() {
        for written in [
            secret("default", Material::Certificate { chain: "c".into(), key: "k".into() }),
            secret("ROOTCA", Material::Roots { pem: "r".into(), revoked: None }),
            secret("ROOTCA", Material::Roots { pem: "r".into(), revoked: Some("l".into()) }),
            secret("ROOTCA", Material::Domains(vec![("a".to_owned(), "r".into()), ("b".to_owned(), "s".into())])),
        ] {
            assert_eq!(read(&write(&written)), Ok(written));
        }
    }

    #[test]
    fn checks_that_are_not_made_are_refused_by_name_and_keys_are_not_printed() {
        let context = pb::CertificateValidationContext {
            trusted_ca: Some(DataSource {
                specifier: Some(data_source::Specifier::InlineString("r".to_owned())),
                ..Default::default()
            }),
            verify_certificate_hash: vec!["x".to_owned()],
            ..Default::default()
        };
        let message =
            pb::Secret { name: "ROOTCA".to_owned(), r#type: Some(pb::secret::Type::ValidationContext(context)) };
        let any = Any { type_url: SECRET.to_owned(), value: message.encode_to_vec().into() };
        assert!(read(&any).unwrap_err().starts_with("secret ROOTCA: validation_context: more than"));
        let empty = pb::Secret { name: "x".to_owned(), r#type: None };
        let any = Any { type_url: SECRET.to_owned(), value: empty.encode_to_vec().into() };
        assert_eq!(read(&any).unwrap_err(), "secret x: type: neither a certificate nor roots");
        let pair = secret("default", Material::Certificate { chain: "c".into(), key: "secret".into() });
        assert!(!format!("{pair:?}").contains("secret\""));
    }
}
