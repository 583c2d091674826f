//! Key material that comes over the stream (`kubernetes://NAME`, `kubernetes://NAME-cacert`): PEM texts, not parsed here.

use std::fmt;
use std::mem::take;

use bytes::Bytes;
use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3 as pb;

use super::context::{At, Fault, Read, Reader};
use crate::model::Name;

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
    /// Certificate authorities.
    Roots(Bytes),
}

impl fmt::Debug for Material {
    /// Without the key, wherever it is printed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Certificate { .. } => "Certificate(..)",
            Self::Roots(_) => "Roots(..)",
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
        Some(pb::secret::Type::ValidationContext(mut context)) => {
            let roots = inline(context.trusted_ca.take()).at("trusted_ca").at("validation_context")?;
            // A revocation list that is not looked at would let revoked peers in.
            reader.done_strict(&context).at("validation_context")?;
            Material::Roots(roots)
        }
        _ => return Err(Fault::new("neither a certificate nor certificate authorities")),
    };
    reader.done(&of);
    Ok(Secret { name, material })
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
    use prost::Message;

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
        assert_eq!(read(&any(&of)).expect("valid").value.material, Material::Roots("r".into()));
    }

    #[test]
    fn what_cannot_be_used_is_refused_by_name() {
        let reject = read(&any(&pb::Secret { name: "x".into(), r#type: None })).expect_err("empty");
        assert_eq!(reject.to_string(), "Secret x: neither a certificate nor certificate authorities");
        let context = pb::CertificateValidationContext { trusted_ca: text("r"), crl: text("l"), ..Default::default() };
        let kind = Some(pb::secret::Type::ValidationContext(context));
        let reject = read(&any(&pb::Secret { name: "x".into(), r#type: kind })).expect_err("revocation list");
        assert_eq!(reject.to_string(), "Secret x: validation_context: crl is not supported");
    }
}
