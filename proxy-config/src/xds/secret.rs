//! Key material of a control plane's stream (`kubernetes://NAME`, `kubernetes://NAME-cacert`) or of a socket on this machine
//! (`default`, `ROOTCA`): PEM texts, not parsed here.

use std::fmt;
use std::mem::take;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;
use prost::Message;

use super::context::{At, Fault, Read, Reader};
use crate::model::Name;

/// Name of the validator that keeps trust domains apart.
pub(crate) const SPIFFE: &str = "envoy.tls.cert_validator.spiffe";

/// `envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SpiffeValidator {
    #[prost(message, repeated, tag = "1")]
    pub(crate) trust_domains: Vec<TrustDomain>,
}

/// A trust domain with its roots.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct TrustDomain {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(message, optional, tag = "2")]
    pub(crate) trust_bundle: Option<DataSource>,
}

/// A named secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// SDS name.
    pub name: Name,
    /// What it holds.
    pub material: Material,
}

/// PEM texts.
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

impl fmt::Debug for Material {
    /// Without the key, wherever it is printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Certificate { .. } => "Certificate(..)",
            Self::Roots { .. } => "Roots(..)",
            Self::Domains(_) => "Domains(..)",
        })
    }
}

/// `envoy.extensions.transport_sockets.tls.v3.Secret`.
pub(super) fn secret(mut of: pb::Secret, reader: &mut Reader) -> Read<Secret> {
    reader.resource = format!("Secret {}", of.name);
    let name = Name::from(take(&mut of.name));
    let material = match of.r#type.take() {
        Some(pb::secret::Type::TlsCertificate(mut pair)) => {
            let chain = inline(pair.certificate_chain.take()).at("certificate_chain").at("tls_certificate")?;
            let key = inline(pair.private_key.take()).at("private_key").at("tls_certificate")?;
            reader.done(&pair);
            Material::Certificate { chain, key }
        }
        Some(pb::secret::Type::ValidationContext(context)) => validation(context, reader).at("validation_context")?,
        _ => return Err(Fault::new("neither a certificate nor certificate authorities")),
    };
    reader.done(&of);
    Ok(Secret { name, material })
}

/// A check that is not understood and not made would let peers in: it refuses the whole.
fn validation(mut of: pb::CertificateValidationContext, reader: &Reader) -> Read<Material> {
    let (roots, revoked) = (of.trusted_ca.take(), of.crl.take());
    let validator = of.custom_validator_config.take();
    reader.done_strict(&of)?;
    let Some(validator) = validator else {
        let revoked = revoked.map(|lists| inline(Some(lists)).at("crl")).transpose()?;
        return Ok(Material::Roots { pem: inline(roots).at("trusted_ca")?, revoked });
    };
    if validator.name != SPIFFE {
        return Err(Fault::new(format!("{} is not supported", validator.name))).at("custom_validator_config");
    }
    if revoked.is_some() {
        return Err(Fault::new("revocation lists beside trust domains are not supported")).at("crl");
    }
    let bytes = validator.typed_config.map(|any| any.value).unwrap_or_default();
    domains(&bytes).at("custom_validator_config")
}

fn domains(bytes: &[u8]) -> Read<Material> {
    let said = SpiffeValidator::decode(bytes).map_err(|e| Fault::new(e.to_string()))?;
    let of = |domain: TrustDomain| {
        let bundle = inline(domain.trust_bundle).at(&format!("trust_domains[{}].trust_bundle", domain.name))?;
        Ok((domain.name, bundle))
    };
    Ok(Material::Domains(said.trust_domains.into_iter().map(of).collect::<Read<_>>()?))
}

fn inline(source: Option<DataSource>) -> Read<Bytes> {
    match source.and_then(|source| source.specifier) {
        Some(data_source::Specifier::InlineBytes(bytes)) => Ok(bytes.into()),
        Some(data_source::Specifier::InlineString(text)) => Ok(text.into()),
        _ => Err(Fault::new("no inline text")),
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;

    use super::super::{Any, secret as read};
    use super::*;

    fn any(of: &pb::Secret) -> Any {
        Any { type_url: String::new(), value: of.encode_to_vec().into() }
    }

    fn text(text: &str) -> Option<DataSource> {
        let specifier = Some(data_source::Specifier::InlineString(text.to_owned()));
        Some(DataSource { specifier, ..DataSource::default() })
    }

    #[test]
    fn certificates_and_authorities_are_read_and_keys_are_not_printed() {
        let pair =
            pb::TlsCertificate { certificate_chain: text("c"), private_key: text("secret key"), ..Default::default() };
        let kind = Some(pb::secret::Type::TlsCertificate(pair));
        let read_back = read(&any(&pb::Secret { name: "kubernetes://a".into(), r#type: kind })).expect("valid").value;
        assert_eq!(read_back.material, Material::Certificate { chain: "c".into(), key: "secret key".into() });
        assert!(!format!("{read_back:?}").contains("secret key"));
        let context = pb::CertificateValidationContext { trusted_ca: text("r"), ..Default::default() };
        let kind = Some(pb::secret::Type::ValidationContext(context));
        let of = pb::Secret { name: "kubernetes://a-cacert".into(), r#type: kind };
        assert_eq!(read(&any(&of)).expect("valid").value.material, Material::Roots { pem: "r".into(), revoked: None });
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let reject = read(&any(&pb::Secret { name: "x".into(), r#type: None })).expect_err("empty");
        assert_eq!(reject.to_string(), "Secret x: neither a certificate nor certificate authorities");
        let refused = |context: pb::CertificateValidationContext| {
            let kind = Some(pb::secret::Type::ValidationContext(context));
            read(&any(&pb::Secret { name: "x".into(), r#type: kind })).expect_err("not understood").to_string()
        };
        let roots = pb::CertificateValidationContext { trusted_ca: text("r"), ..Default::default() };
        let hashes = pb::CertificateValidationContext { verify_certificate_hash: vec!["h".into()], ..roots.clone() };
        assert_eq!(refused(hashes), "Secret x: validation_context: verify_certificate_hash is not supported");
        let other = TypedExtensionConfig { name: "other".into(), typed_config: None };
        let other = pb::CertificateValidationContext { custom_validator_config: Some(other), ..roots };
        assert_eq!(refused(other), "Secret x: validation_context.custom_validator_config: other is not supported");
    }
}
