//! TLS from the proxy to endpoints: what a rule says, else automatic mTLS.

use super::cluster_outbound::Site;
use super::cluster_policy::Draft;
use crate::istio::destination_rule::{ClientTls, ProxyProtocol, ProxyVersion, TlsMode};
use crate::model::{
    ClusterKind, CommonTls, Name, SanKind, SanMatcher, StringMatcher, TlsVersion, Transport, TransportMatch,
    UpstreamTls, Validation,
};
use crate::registry::{Provider, Proxy};

/// Says what TLS a cluster speaks. `automatic` is true where servers of the service take mTLS without being asked.
pub(super) fn apply(draft: &mut Draft, site: &Site<'_>, said: Option<&ClientTls>, sni: &str, automatic: bool) {
    let Some(said) = said else {
        if automatic {
            auto(draft, site, sni);
        }
        return;
    };
    draft.cluster.istio.no_alpn_override = matches!(said.mode, TlsMode::Simple | TlsMode::Mutual);
    if let Some(files) = metadata_certs(site.view.proxy).filter(|_| client_certificate(said.mode)) {
        // The node's own client certificate goes before what the rule names, but not into the world.
        if !site.service.mesh_external {
            let own = ClientTls { subject_alt_names: said.subject_alt_names.clone(), sni: said.sni.clone(), ..files };
            draft.cluster.transport = explicit(draft, site, &own);
            return;
        }
    }
    draft.cluster.transport = match said.mode {
        TlsMode::Disable => Transport::Raw,
        TlsMode::Simple | TlsMode::Mutual => explicit(draft, site, said),
        TlsMode::IstioMutual => {
            let sni = if said.sni.is_empty() { sni } else { said.sni.as_str() };
            let sans = if said.subject_alt_names.is_empty() { &site.accounts } else { &said.subject_alt_names };
            Transport::Tls(Box::new(mesh_tls(draft, sans, sni)))
        }
    };
}

fn client_certificate(mode: TlsMode) -> bool {
    matches!(mode, TlsMode::Mutual | TlsMode::IstioMutual)
}

/// mTLS to the endpoints that are labelled for it; an original destination has no labels, so it is all or nothing.
fn auto(draft: &mut Draft, site: &Site<'_>, sni: &str) {
    if let Some(files) = metadata_certs(site.view.proxy) {
        let own = ClientTls { subject_alt_names: site.accounts.clone(), sni: sni.to_owned(), ..files };
        draft.cluster.transport = explicit(draft, site, &own);
        return;
    }
    let mtls = Transport::Tls(Box::new(mesh_tls(draft, &site.accounts, sni)));
    if draft.cluster.kind == ClusterKind::OriginalDst {
        draft.cluster.transport = mtls;
        return;
    }
    let istio = TransportMatch {
        name: "tlsMode-istio".to_owned(),
        labels: [("tlsMode".to_owned(), "istio".to_owned())].into_iter().collect(),
        transport: mtls,
    };
    let disabled =
        TransportMatch { name: "tlsMode-disabled".to_owned(), labels: Default::default(), transport: Transport::Raw };
    draft.cluster.transport_matches = vec![istio, disabled];
}

/// TLS with the workload's certificate.
fn mesh_tls(draft: &Draft, sans: &[String], sni: &str) -> UpstreamTls {
    let alpn: &[&str] =
        if draft.is_http2() { &["istio-peer-exchange", "istio", "h2"] } else { &["istio-peer-exchange", "istio"] };
    UpstreamTls {
        common: CommonTls {
            certificates: vec![Name::from("default")],
            validation: Some(validation("ROOTCA", sans)),
            alpn: alpn.iter().map(|a| (*a).to_owned()).collect(),
            ..versions()
        },
        sni: sni.to_owned(),
        ..UpstreamTls::default()
    }
}

fn versions() -> CommonTls {
    CommonTls { min_version: Some(TlsVersion::V1_2), max_version: Some(TlsVersion::V1_3), ..CommonTls::default() }
}

fn validation(roots: &str, sans: &[String]) -> Validation {
    let exact = |san: &String| SanMatcher { kind: SanKind::Any, value: StringMatcher::exact(san.clone()) };
    Validation { roots: Some(Name::from(roots)), san: sans.iter().map(exact).collect(), accept_untrusted: false }
}

/// `SIMPLE` and `MUTUAL`: files or a Secret.
fn explicit(draft: &mut Draft, site: &Site<'_>, said: &ClientTls) -> Transport {
    if !said.credential_name.is_empty() && !site.has_selector() {
        // Every client of the host would wait for a Secret that most may not read: the rule must choose its clients.
        return Transport::Raw;
    }
    if let Some(reason) = unusable(said) {
        return Transport::Unsupported(reason.to_owned());
    }
    let skip = said.insecure_skip_verify == Some(true);
    draft.cluster.http.auto_sni = said.sni.is_empty();
    draft.cluster.http.auto_san_validation = said.sni.is_empty() && said.subject_alt_names.is_empty() && !skip;
    draft.cluster.http.configured |= draft.cluster.http.auto_sni;
    let entry = site.service.provider == Provider::External && said.subject_alt_names.is_empty();
    let sans = if entry { &site.accounts } else { &said.subject_alt_names };
    let (certificate, roots) = names(said);
    let mut common = CommonTls {
        certificates: certificate.filter(|_| said.mode == TlsMode::Mutual).map(Name::from).into_iter().collect(),
        validation: match (skip, said.credential_name.is_empty()) {
            (false, _) => Some(validation(&roots, sans)),
            // Both forms check nothing; they are istiod's for files and for Secrets.
            (true, true) => Some(Validation::default()),
            (true, false) => None,
        },
        ..versions()
    };
    if let Some(defaults) = &site.inputs.mesh.tls_defaults {
        common.ecdh_curves.clone_from(&defaults.ecdh_curves);
        common.cipher_suites.clone_from(&defaults.cipher_suites);
    }
    if draft.is_http2() {
        common.alpn = vec!["h2".to_owned()];
    }
    Transport::Tls(Box::new(UpstreamTls { common, sni: said.sni.clone(), ..UpstreamTls::default() }))
}

/// Why a setting can be served by no handshake; plaintext would be worse than a refused connection.
pub(super) fn unusable(said: &ClientTls) -> Option<&'static str> {
    let files = !said.client_certificate.is_empty() && !said.private_key.is_empty();
    if said.mode == TlsMode::Mutual && said.credential_name.is_empty() && !files {
        return Some("tls.mode MUTUAL without clientCertificate and privateKey");
    }
    (!said.ca_crl.is_empty()).then_some("tls.caCrl")
}

/// SDS names of the certificate and of the roots.
fn names(said: &ClientTls) -> (Option<String>, String) {
    if !said.credential_name.is_empty() {
        let name = &said.credential_name;
        let full = if name.contains("://") { name.clone() } else { format!("kubernetes://{name}") };
        return (Some(full.clone()), format!("{full}-cacert"));
    }
    let roots = if said.ca_certificates.is_empty() { "system" } else { &said.ca_certificates };
    let certificate = format!("file-cert:{}~{}", said.client_certificate, said.private_key);
    (Some(certificate), format!("file-root:{roots}"))
}

/// The client certificate that the node itself names.
fn metadata_certs(proxy: &Proxy) -> Option<ClientTls> {
    let file = |name: &str| proxy.metadata.get(name).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    let client_certificate = file("TLS_CLIENT_CERT_CHAIN");
    (!client_certificate.is_empty()).then(|| ClientTls {
        mode: TlsMode::Mutual,
        client_certificate,
        private_key: file("TLS_CLIENT_KEY"),
        ca_certificates: file("TLS_CLIENT_ROOT_CERT"),
        ..ClientTls::default()
    })
}

/// Puts the PROXY protocol in front of every socket of the cluster.
pub(super) fn proxy_protocol(draft: &mut Draft, said: Option<ProxyProtocol>) {
    let Some(said) = said else { return };
    let version = match said.version {
        ProxyVersion::V1 => 1,
        ProxyVersion::V2 => 2,
    };
    let wrap = |t: &mut Transport| *t = Transport::ProxyProtocol(version, Box::new(std::mem::take(t)));
    if draft.cluster.transport_matches.is_empty() {
        wrap(&mut draft.cluster.transport);
    } else {
        draft.cluster.transport_matches.iter_mut().for_each(|m| wrap(&mut m.transport));
    }
}
