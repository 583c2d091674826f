//! Secrets of a socket on this machine (SPIRE, an agent): what the stream is called, and secrets as an agent writes them.
//! They are read as those of a control plane are, [`crate::xds::secret`].

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use envoy_types::pb::google::protobuf as wkt;
use prost::Message;

use crate::xds::secret::{SPIFFE, SpiffeValidator, TrustDomain};
use crate::xds::{Any, Material, Secret};

/// Path of the stream.
pub const STREAM_SECRETS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
/// Type of the resources.
pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
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
            let any = wkt::Any {
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
    let message = pb::Secret { name: secret.name.to_string(), r#type: Some(r#type) };
    Any { type_url: SECRET.to_owned(), value: message.encode_to_vec().into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xds::secret;

    #[test]
    fn what_is_written_is_read() {
        let roots =
            |revoked: Option<&'static str>| Material::Roots { pem: "r".into(), revoked: revoked.map(Into::into) };
        for (name, material) in [
            ("default", Material::Certificate { chain: "c".into(), key: "k".into() }),
            ("ROOTCA", roots(None)),
            ("ROOTCA", roots(Some("l"))),
            ("ROOTCA", Material::Domains(vec![("a".to_owned(), "r".into()), ("b".to_owned(), "s".into())])),
        ] {
            let written = Secret { name: name.into(), material };
            assert_eq!(secret(&write(&written)).expect("understood").value, written);
        }
    }
}
