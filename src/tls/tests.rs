//! Handshakes over an in-memory pipe, with certificates made on the spot.
#![cfg(test)]

use std::time::Duration;

use proxy_config::model::{
    CommonTls, DownstreamTls, SanKind, SanMatcher, StringMatcher, TlsVersion, UpstreamTls, Validation,
};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::ca::Root;
use crate::net::Stream;

const CLIENT: &str = "spiffe://cluster.local/ns/frontend/sa/frontend-sa";
const SERVER: &str = "spiffe://cluster.local/ns/payments/sa/payment-service-sa";
const DAY: Duration = Duration::from_secs(86_400);

fn root() -> Root {
    Root::generate("test root").unwrap().0
}

fn secrets(root: &Root, uris: &[&str]) -> Secrets {
    let now = OffsetDateTime::now_utc();
    secrets_between(root, uris, now - DAY, now + DAY)
}

fn secrets_between(root: &Root, uris: &[&str], from: OffsetDateTime, until: OffsetDateTime) -> Secrets {
    let (chain, key) = root.sign_between(uris, from, until).unwrap();
    Secrets::new()
        .with_identity("default", Identity::from_pem(chain.as_bytes(), key.as_bytes()).unwrap())
        .with_roots("ROOTCA", Roots::from_pem(root.certificate().as_bytes()).unwrap())
}

fn common(san: Vec<SanMatcher>, alpn: &[&str]) -> CommonTls {
    CommonTls {
        certificates: vec!["default".into()],
        validation: Some(Validation { roots: Some("ROOTCA".into()), san, accept_untrusted: false }),
        alpn: names(alpn),
        ..CommonTls::default()
    }
}

fn names(of: &[&str]) -> Vec<String> {
    of.iter().map(|name| (*name).to_owned()).collect()
}

fn downstream(alpn: &[&str]) -> DownstreamTls {
    let mesh = SanMatcher { kind: SanKind::Any, value: StringMatcher::prefix("spiffe://cluster.local/") };
    DownstreamTls { common: common(vec![mesh], alpn), require_client_certificate: true }
}

fn upstream(expected: &str) -> UpstreamTls {
    let exact = SanMatcher { kind: SanKind::Any, value: StringMatcher::exact(expected) };
    UpstreamTls { common: common(vec![exact], &[]), sni: "outbound_.80_._.a.b".to_owned(), ..UpstreamTls::default() }
}

type Outcome = (Result<(Stream, std::sync::Arc<Peer>), TlsError>, Result<(Stream, std::sync::Arc<Peer>), TlsError>);

/// Both sides at once; server first in the result. The client reads once, so that it meets a late alert or a ticket.
async fn shake(server: &ServerTls, client: &ClientTls, alpn: &[&str]) -> Outcome {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let serve = async {
        let mut accepted = accept(Stream::from(near), server, HANDSHAKE_LIMIT).await;
        if let Ok((stream, _)) = &mut accepted {
            stream.write_all(b"hi").await.unwrap();
            stream.flush().await.unwrap();
        }
        accepted
    };
    let alpn = names(alpn);
    let ask = async {
        let (mut stream, peer) = connect(Stream::from(far), client, client.sni(), &alpn).await?;
        let mut hi = [0; 2];
        stream.read_exact(&mut hi).await?;
        Ok((stream, peer))
    };
    tokio::join!(serve, ask)
}

fn pair(root: &Root) -> (ServerTls, ClientTls) {
    let server = ServerTls::compile(&downstream(&["h2", "http/1.1"]), &secrets(root, &[SERVER]), "chain").unwrap();
    let client = ClientTls::compile(&upstream(SERVER), &secrets(root, &[CLIENT])).unwrap();
    (server, client)
}

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let (server, client) = pair(&root());
    let (served, asked) = shake(&server, &client, &["istio-http/1.1", "istio", "http/1.1"]).await;
    let (server_peer, client_peer) = (served.unwrap().1, asked.unwrap().1);
    assert_eq!(server_peer.uri_sans, [CLIENT]);
    assert_eq!(server_peer.spiffe.as_ref().and_then(SpiffeId::namespace), Some("frontend"));
    assert_eq!(server_peer.sni.as_deref(), Some("outbound_.80_._.a.b"));
    assert_eq!(server_peer.alpn.as_deref(), Some("http/1.1"));
    assert_eq!((server_peer.tls_version, &*server_peer.cipher), ("TLSv1.3", "TLS13_AES_256_GCM_SHA384"));
    assert_eq!(client_peer.uri_sans, [SERVER]);
    assert_eq!(client_peer.alpn.as_deref(), Some("http/1.1"));
}

#[tokio::test]
async fn the_servers_order_wins_and_unknown_names_select_nothing() {
    let (server, client) = pair(&root());
    for (offer, selected) in [
        (&["http/1.1", "h2"][..], Some("h2")),
        (&["istio-h2", "istio", "h2"], Some("h2")),
        (&["istio-http/1.1"], None),
        (&["foo"], None),
        (&[], None),
    ] {
        let (served, asked) = shake(&server, &client, offer).await;
        assert_eq!(served.unwrap().1.alpn.as_deref(), selected, "{offer:?}");
        assert_eq!(asked.unwrap().1.alpn.as_deref(), selected, "{offer:?}");
    }
}

#[tokio::test]
async fn clients_that_are_refused_and_their_alerts() {
    let ours = root();
    let now = OffsetDateTime::now_utc();
    let past = secrets_between(&ours, &[CLIENT], now - 3 * DAY, now - DAY);
    let future = secrets_between(&ours, &[CLIENT], now + DAY, now + 3 * DAY);
    let mut nobody = upstream(SERVER);
    nobody.common.certificates.clear();
    let (server, _) = pair(&ours);
    for (said, secrets, alert) in [
        (upstream(SERVER), secrets(&ours, &["spiffe://evil.local/ns/frontend/sa/frontend-sa"]), "CertificateUnknown"),
        (upstream(SERVER), secrets(&ours, &["spiffe://cluster.local.evil/ns/a/sa/b"]), "CertificateUnknown"),
        (upstream(SERVER), secrets(&ours, &[CLIENT, SERVER]), "CertificateUnknown"),
        (upstream(SERVER), secrets(&ours, &[]), "CertificateUnknown"),
        (upstream(SERVER), past, "CertificateExpired"),
        (upstream(SERVER), future, "CertificateExpired"),
        (nobody, secrets(&ours, &[CLIENT]), "CertificateRequired"),
    ] {
        let client = ClientTls::compile(&said, &secrets).unwrap();
        let (served, asked) = shake(&server, &client, &[]).await;
        assert!(served.is_err(), "{alert}");
        let told = asked.unwrap_err().to_string();
        assert!(told.contains(alert), "{alert}: {told}");
    }
}

#[tokio::test]
async fn a_client_of_another_authority_is_told_so() {
    let (ours, theirs) = (root(), root());
    let (server, _) = pair(&ours);
    let foreign = secrets(&theirs, &[CLIENT]).with_roots("ROOTCA", roots_of(&ours));
    let client = ClientTls::compile(&upstream(SERVER), &foreign).unwrap();
    let (served, asked) = shake(&server, &client, &[]).await;
    assert!(matches!(served.unwrap_err(), TlsError::Certificate(_)));
    assert!(asked.unwrap_err().to_string().contains("UnknownCA"));
}

fn roots_of(root: &Root) -> Roots {
    Roots::from_pem(root.certificate().as_bytes()).unwrap()
}

#[tokio::test]
async fn a_server_of_another_account_is_refused() {
    let ours = root();
    let (server, _) = pair(&ours);
    let client = ClientTls::compile(&upstream(CLIENT), &secrets(&ours, &[CLIENT])).unwrap();
    let (served, asked) = shake(&server, &client, &[]).await;
    assert!(matches!(asked.unwrap_err(), TlsError::Identity(_)));
    assert!(served.is_err());
}

#[tokio::test]
async fn sessions_resume_in_both_versions_and_keep_the_identity() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        let ours = root();
        let mut said = upstream(SERVER);
        said.common.max_version = Some(version);
        let (server, _) = pair(&ours);
        let client = ClientTls::compile(&said, &secrets(&ours, &[CLIENT])).unwrap();
        let (first, _asked) = shake(&server, &client, &["h2"]).await;
        assert!(!first.unwrap().1.resumed);
        // Another ALPN is another configuration of the same context: tickets are shared.
        let (second, _asked) = shake(&server, &client, &["istio"]).await;
        let peer = second.unwrap().1;
        assert!(peer.resumed, "{version:?}");
        assert_eq!(peer.uri_sans, [CLIENT]);
    }
}

#[tokio::test]
async fn a_ticket_of_one_chain_means_nothing_to_another() {
    let ours = root();
    let server_secrets = secrets(&ours, &[SERVER]);
    let chain = |name: &str| ServerTls::compile(&downstream(&["h2"]), &server_secrets, name).unwrap();
    let (one, other) = (chain("8080"), chain("9091"));
    let (_, client) = pair(&ours);
    let (_served, _asked) = shake(&one, &client, &[]).await;
    let (served, _asked) = shake(&other, &client, &[]).await;
    assert!(!served.unwrap().1.resumed);
}

#[tokio::test]
async fn a_resumed_session_is_checked_against_todays_rules() {
    use super::verify::Role;
    let ours = root();
    let (server, client) = pair(&ours);
    let (served, _asked) = shake(&server, &client, &[]).await;
    let peer = served.unwrap().1;
    // The check that a resumption runs, on the certificate that it would bring, at a later time.
    let leaf = rustls::pki_types::CertificateDer::from(pem_to_der(&peer.pem().unwrap()));
    let verifier = server.verifier().unwrap();
    let at = |later: Duration| rustls::pki_types::UnixTime::since_unix_epoch(unix_now() + later);
    assert!(verifier.check(&leaf, &[], Role::Client, at(Duration::ZERO)).is_ok());
    assert!(verifier.check(&leaf, &[], Role::Client, at(2 * DAY)).is_err());
}

fn unix_now() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap()
}

fn pem_to_der(pem: &str) -> Vec<u8> {
    use rustls::pki_types::pem::PemObject;
    rustls::pki_types::CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

#[tokio::test]
async fn renewal_keeps_open_connections_and_changes_new_ones() {
    let ours = root();
    let before = secrets(&ours, &[SERVER]);
    let server = ServerTls::compile(&downstream(&[]), &before, "chain").unwrap();
    let (_, client) = pair(&ours);
    let (served, asked) = shake(&server, &client, &[]).await;
    let ((mut near, _), (mut far, _)) = (served.unwrap(), asked.unwrap());
    assert_eq!(ServerTls::compile(&downstream(&[]), &before, "chain").unwrap(), server);
    let (chain, key) = ours.sign(&SERVER.parse().unwrap(), DAY).unwrap();
    let after = before.with_identity("default", Identity::from_pem(chain.as_bytes(), key.as_bytes()).unwrap());
    let renewed = ServerTls::compile(&downstream(&[]), &after, "chain").unwrap();
    assert_ne!(renewed, server);
    drop(server);
    far.write_all(b"still here").await.unwrap();
    far.flush().await.unwrap();
    let mut got = [0; 10];
    near.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"still here");
    let (served, asked) = shake(&renewed, &client, &[]).await;
    assert!(!served.unwrap().1.resumed);
    assert_eq!(asked.unwrap().1.hash, hash_of(&after));
}

#[test]
fn a_key_of_another_certificate_is_no_renewal() {
    let ours = root();
    let (chain, _) = ours.sign(&SERVER.parse().unwrap(), DAY).unwrap();
    let (_, key) = ours.sign(&SERVER.parse().unwrap(), DAY).unwrap();
    let why = Identity::from_pem(chain.as_bytes(), key.as_bytes()).unwrap_err();
    assert!(why.starts_with("certificate and key: "), "{why}");
}

fn hash_of(secrets: &Secrets) -> String {
    hex(peer::sha256(&secrets.identity("default").unwrap().chain[0]).as_ref())
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_not_waited_for() {
    let (server, _) = pair(&root());
    let (near, _far) = tokio::io::duplex(1024);
    let result = accept(Stream::from(near), &server, HANDSHAKE_LIMIT).await;
    assert!(matches!(result.unwrap_err(), TlsError::Timeout));
}

#[tokio::test]
async fn garbage_is_a_clean_error() {
    let (server, _) = pair(&root());
    let (near, mut far) = tokio::io::duplex(1024);
    far.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    far.shutdown().await.unwrap();
    assert!(accept(Stream::from(near), &server, HANDSHAKE_LIMIT).await.is_err());
}

#[test]
fn what_cannot_be_compiled_says_why() {
    let ours = root();
    let none = Secrets::new();
    let missing = ServerTls::compile(&downstream(&[]), &none, "x").unwrap_err();
    assert_eq!(missing, "secret default is missing");
    let mut old = upstream(SERVER);
    old.common.max_version = Some(TlsVersion::V1_1);
    old.common.min_version = Some(TlsVersion::V1_0);
    assert!(ClientTls::compile(&old, &secrets(&ours, &[CLIENT])).unwrap_err().contains("no TLS version"));
    let mut unchecked = downstream(&[]);
    unchecked.common.validation = None;
    assert!(ServerTls::compile(&unchecked, &secrets(&ours, &[SERVER]), "x").is_err());
}

/// A CA whose certificates have serial numbers, so that they can be revoked.
struct Revoker {
    pem: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Revoker {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, "revoker");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        Self { pem: params.self_signed(&key).unwrap().pem(), issuer: rcgen::Issuer::new(params, key) }
    }

    fn secrets(&self, id: &str, serial: u64) -> Secrets {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(id.try_into().unwrap())];
        params.serial_number = Some(serial.into());
        params.use_authority_key_identifier_extension = true;
        let chain = params.signed_by(&key, &self.issuer).unwrap().pem();
        Secrets::new()
            .with_identity("default", Identity::from_pem(chain.as_bytes(), key.serialize_pem().as_bytes()).unwrap())
            .with_roots("ROOTCA", Roots::from_pem(self.pem.as_bytes()).unwrap())
    }

    fn list(&self, serials: &[u64], until: OffsetDateTime) -> String {
        let revoked = |serial: &u64| rcgen::RevokedCertParams {
            serial_number: (*serial).into(),
            revocation_time: OffsetDateTime::now_utc() - DAY,
            reason_code: None,
            invalidity_date: None,
        };
        let params = rcgen::CertificateRevocationListParams {
            this_update: OffsetDateTime::now_utc() - DAY * 2,
            next_update: until,
            crl_number: 1_u64.into(),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

fn with_list(secrets: &Secrets, list: &str) -> Secrets {
    secrets.with_roots("ROOTCA", secrets.roots("ROOTCA").unwrap().with_revoked(list.as_bytes()).unwrap())
}

#[tokio::test]
async fn revoked_clients_are_refused_resumed_sessions_included() {
    let ca = Revoker::new();
    let tomorrow = OffsetDateTime::now_utc() + DAY;
    let server = ca.secrets(SERVER, 1);
    let client = ClientTls::compile(&upstream(SERVER), &ca.secrets(CLIENT, 2)).unwrap();
    let with = |list: &str| ServerTls::compile(&downstream(&["h2"]), &with_list(&server, list), "c").unwrap();
    let (served, _) = shake(&with(&ca.list(&[7], tomorrow)), &client, &["h2"]).await;
    assert_eq!(served.unwrap().1.uri_sans, [CLIENT]);
    let (refused, told) = shake(&with(&ca.list(&[7, 2], tomorrow)), &client, &["h2"]).await;
    assert!(matches!(&refused, Err(TlsError::Certificate(why)) if why.contains("evoked")), "{refused:?}");
    assert!(told.is_err());
    // A list that is out of date, or one of somebody else, says nothing about anybody.
    let yesterday = OffsetDateTime::now_utc() - DAY;
    let (refused, _) = shake(&with(&ca.list(&[], yesterday)), &client, &["h2"]).await;
    assert!(matches!(refused, Err(TlsError::Certificate(_))));
    let (refused, _) = shake(&with(&Revoker::new().list(&[], tomorrow)), &client, &["h2"]).await;
    assert!(matches!(refused, Err(TlsError::Certificate(_))));
    assert!(server.roots("ROOTCA").unwrap().with_revoked(b"").unwrap_err().contains("no revocation list"));
}

#[test]
fn lists_are_part_of_what_a_context_is_made_of() {
    let ca = Revoker::new();
    let plain = ca.secrets(SERVER, 1);
    let tomorrow = OffsetDateTime::now_utc() + DAY;
    let (one, two) = (with_list(&plain, &ca.list(&[1], tomorrow)), with_list(&plain, &ca.list(&[2], tomorrow)));
    assert!(plain != one && one != two);
    // Taken again from the same list it is the same, as on every look at the files.
    assert!(with_list(&one, &ca.list(&[2], tomorrow)) != one);
    let again = ca.list(&[1], tomorrow);
    assert!(with_list(&plain, &again) == with_list(&with_list(&plain, &again), &again));
}

/// One domain's CA must not speak for another domain.
#[tokio::test]
async fn trust_domains_have_their_own_roots() {
    let (here, there) = (root(), root());
    let stranger = "spiffe://there.test/ns/a/sa/b";
    let bundles = [("cluster.local", here.certificate().as_bytes()), ("there.test", there.certificate().as_bytes())];
    let server = secrets(&here, &[SERVER]).with_roots("ROOTCA", Roots::of_domains(bundles).unwrap());
    let anybody = DownstreamTls { common: common(Vec::new(), &["h2"]), require_client_certificate: true };
    let server = ServerTls::compile(&anybody, &server, "c").unwrap();
    let trusting = |root: &Root, id: &str| {
        let own = secrets(root, &[id]).with_roots("ROOTCA", Roots::from_pem(here.certificate().as_bytes()).unwrap());
        ClientTls::compile(&upstream(SERVER), &own).unwrap()
    };
    for (root, id, accepted) in
        [(&here, CLIENT, true), (&there, stranger, true), (&there, CLIENT, false), (&here, stranger, false)]
    {
        let (served, _) = shake(&server, &trusting(root, id), &["h2"]).await;
        assert_eq!(served.is_ok(), accepted, "{id}: {served:?}");
    }
    let (served, _) = shake(&server, &trusting(&here, "spiffe://elsewhere.test/x"), &["h2"]).await;
    assert!(matches!(served, Err(TlsError::Certificate(_))));
    assert!(Roots::of_domains([]).is_err());
}
