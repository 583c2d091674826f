//! `tls` of a DestinationRule.

use super::Findings;
use super::at::At;

/// Findings of the settings of a client.
pub(super) fn check(found: &mut Findings, tls: &At<'_>) {
    let mode = tls.get("mode").text();
    let credential = tls.get("credentialName");
    if let Some(name) = credential.text().strip_prefix("configmap://") {
        let whole =
            name.split_once('/').is_some_and(|(n, rest)| !n.is_empty() && !rest.is_empty() && !rest.starts_with('/'));
        found.expect(whole, &credential, "configmap://NAMESPACE/NAME is expected");
    }
    let mutual = mode == "MUTUAL";
    if !mutual && mode != "SIMPLE" {
        return;
    }
    if tls.get("insecureSkipVerify").is_true() {
        let mut reasons = vec![tls.get("caCertificates"), tls.get("subjectAltNames")];
        if !mutual {
            reasons.push(credential.clone());
        }
        for field in reasons {
            let said = field.has_text() || field.len() > 0;
            found.expect(!said, &field, "insecureSkipVerify leaves nothing to verify with it");
        }
    }
    if credential.has_text() {
        for field in ["clientCertificate", "caCertificates", "privateKey", "caCrl"].map(|f| tls.get(f)) {
            found.expect(!field.has_text(), &field, "credentialName brings the certificates: no files go with it");
        }
    } else if mutual {
        for field in ["clientCertificate", "privateKey"].map(|f| tls.get(f)) {
            found.expect(field.has_text(), &field, "MUTUAL needs a client's certificate and its key");
        }
    }
}
