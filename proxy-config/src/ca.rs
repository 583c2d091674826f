//! Messages of Istio's CA (`istio.v1.auth`), by their wire facts.

use std::collections::HashMap;

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

/// Path of the one call.
pub const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// `istio.v1.auth.IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CertificateRequest {
    /// PKCS#10, PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// Wanted lifetime, seconds.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// `{CertSigner}`, there even when it is empty.
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// `istio.v1.auth.IstioCertificateResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CertificateResponse {
    /// PEM: leaf, intermediates, and at the end the roots, which may be several in one.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

impl CertificateRequest {
    /// A request as the agent writes it. `signer` is `ISTIO_META_CERT_SIGNER`.
    pub fn new(csr: String, validity_seconds: i64, signer: &str) -> Self {
        let signer = Value { kind: Some(Kind::StringValue(signer.to_owned())) };
        let fields = HashMap::from([("CertSigner".to_owned(), signer)]);
        Self { csr, validity_duration: validity_seconds, metadata: Some(Struct { fields }) }
    }

    /// The signer asked for; `None` when the field is not there at all.
    pub fn signer(&self) -> Option<&str> {
        match &self.metadata.as_ref()?.fields.get("CertSigner")?.kind {
            Some(Kind::StringValue(signer)) => Some(signer),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    #[test]
    fn a_request_has_istiods_field_numbers() {
        let bytes = CertificateRequest::new("csr".to_owned(), 86_400, "").encode_to_vec();
        // 1: csr; 3: 86400; 4: {1: {1: "CertSigner", 2: {3: ""}}}
        assert_eq!(bytes, b"\x0a\x03csr\x18\x80\xa3\x05\x22\x12\x0a\x10\x0a\x0aCertSigner\x12\x02\x1a\x00");
        assert_eq!(CertificateRequest::decode(&*bytes).unwrap().signer(), Some(""));
    }
}
