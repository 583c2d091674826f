//! Istio's CA: a root, an intermediate, and a service that signs what it is asked to, or does as it is told.

use std::collections::VecDeque;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use proxy_config::ca::{CertificateRequest, CertificateResponse};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use time::OffsetDateTime;
use tonic::metadata::MetadataMap;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use super::{Call, Log, Peer, Reply, Service};

/// Full name of the service.
pub const SERVICE: &str = "istio.v1.auth.IstioCertificateService";

/// Clocks differ a little.
const SKEW: time::Duration = time::Duration::minutes(2);
const ROOT_LIFETIME: time::Duration = time::Duration::days(3650);

/// What the CA does with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Signs for as long as it is asked to.
    Sign,
    /// Signs for this time, from now on; the clock's skew is left out, so that lifetimes are exact.
    SignFor(Duration),
    /// Signs what has expired already.
    Expired,
    /// Signs with a key that no root leads to, and sends that CA's root.
    AnotherCa,
    /// Signs, and shows a root that the chain does not lead to.
    WrongRoot,
    /// A chain of one element.
    OneElement,
    /// An empty chain.
    Empty,
    /// Text that is no certificate.
    Garbage,
    /// A gRPC status.
    Status(Code),
    /// No answer at all.
    Hang,
}

/// A request that came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The message.
    pub request: CertificateRequest,
    /// Its metadata.
    pub metadata: MetadataMap,
    /// Its connection.
    pub peer: Arc<Peer>,
    /// What was done with it.
    pub answer: Answer,
}

/// A certificate authority.
pub struct Ca {
    state: Mutex<State>,
    calls: Log<Asked>,
    /// SPIFFE id that is signed for; the request's own when `None`.
    identity: Mutex<Option<String>>,
}

struct State {
    signer: Signer,
    /// What is sent as last element.
    bundle: String,
    script: VecDeque<Answer>,
    otherwise: Answer,
}

/// A root and the intermediate that signs.
struct Signer {
    root: String,
    intermediate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// A fresh one that signs.
    ///
    /// # Errors
    /// When keys cannot be made.
    pub fn new(organisation: &str) -> Result<Self> {
        let signer = Signer::new(organisation)?;
        let bundle = signer.root.clone();
        let state = State { signer, bundle, script: VecDeque::new(), otherwise: Answer::Sign };
        Ok(Self { state: Mutex::new(state), calls: Log::default(), identity: Mutex::default() })
    }

    /// The root certificate, PEM.
    pub fn root(&self) -> String {
        self.state().signer.root.clone()
    }

    /// Requests so far.
    pub fn calls(&self) -> &Log<Asked> {
        &self.calls
    }

    /// Does this with the next requests, one each, then what it does otherwise.
    pub fn then(&self, answers: impl IntoIterator<Item = Answer>) {
        self.state().script.extend(answers);
    }

    /// Does this from now on, whenever nothing else is ordered.
    pub fn otherwise(&self, answer: Answer) {
        self.state().otherwise = answer;
    }

    /// Sends these roots from now on, PEM; what signs stays.
    pub fn send_roots(&self, bundle: &str) {
        bundle.clone_into(&mut self.state().bundle);
    }

    /// Signs with another CA's key from now on; the roots that are sent stay.
    pub fn sign_as(&self, other: &Self) -> Result<()> {
        let signer = other.state().signer.copy()?;
        self.state().signer = signer;
        Ok(())
    }

    /// Signs for this SPIFFE id whatever is asked, as istiod does for the caller's.
    pub fn sign_for(&self, id: &str) {
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Some(id.to_owned());
    }

    /// A chain and its key, PEM, for a SPIFFE id; for files that are mounted.
    ///
    /// # Errors
    /// When keys cannot be made.
    pub fn issue(&self, id: &str, from: OffsetDateTime, until: OffsetDateTime) -> Result<(String, String)> {
        let key = KeyPair::generate()?;
        let mut params = leaf(from, until);
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        let state = self.state();
        let certificate = params.signed_by(&key, &state.signer.issuer)?;
        Ok((certificate.pem() + &state.signer.intermediate, key.serialize_pem()))
    }

    /// A server of these hosts that asks clients for certificates of `clients` and lets in those who have none. `expired`:
    /// its own is over.
    ///
    /// # Errors
    /// When keys cannot be made.
    pub fn server_config(&self, hosts: &[String], clients: &Self, expired: bool) -> Result<ServerConfig> {
        let key = KeyPair::generate()?;
        let now = OffsetDateTime::now_utc();
        let end = if expired { now - SKEW / 2 } else { now + ROOT_LIFETIME };
        let mut params = leaf(now - SKEW, end);
        params.subject_alt_names =
            hosts.iter().map(|host| Ok(SanType::DnsName(host.as_str().try_into()?))).collect::<Result<_>>()?;
        let state = self.state();
        let chain = params.signed_by(&key, &state.signer.issuer)?.pem() + &state.signer.intermediate;
        drop(state);
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes())?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(clients.root().as_bytes())?)?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Answer {
        let mut state = self.state();
        state.script.pop_front().unwrap_or_else(|| state.otherwise.clone())
    }

    fn respond(&self, request: &CertificateRequest, answer: &Answer) -> Result<Vec<String>> {
        let now = OffsetDateTime::now_utc();
        let wanted = time::Duration::seconds(request.validity_duration);
        let (from, until) = match answer {
            Answer::SignFor(ttl) => (now, now + *ttl),
            Answer::Expired => (now - wanted, now - time::Duration::seconds(1)),
            _ => (now - SKEW, now + wanted),
        };
        let other = Signer::new("somebody else")?;
        let state = self.state();
        let signer = if *answer == Answer::AnotherCa { &other } else { &state.signer };
        let identity = self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let leaf = signer.sign(&request.csr, identity.as_deref(), from, until)?;
        let root = match answer {
            Answer::AnotherCa | Answer::WrongRoot => other.root.clone(),
            _ => state.bundle.clone(),
        };
        let chain = vec![leaf, signer.intermediate.clone(), signer.root.clone(), root];
        Ok(match answer {
            Answer::OneElement => chain[..1].to_vec(),
            Answer::Empty => Vec::new(),
            Answer::Garbage => vec!["garbage".to_owned(); 2],
            _ => chain,
        })
    }
}

impl Signer {
    fn new(organisation: &str) -> Result<Self> {
        let (root_params, root_key) = (authority(organisation, "Root CA"), KeyPair::generate()?);
        let root = root_params.self_signed(&root_key)?.pem();
        let above = Issuer::new(root_params, root_key);
        let (params, key) = (authority(organisation, "Intermediate CA"), KeyPair::generate()?);
        let intermediate = params.signed_by(&key, &above)?.pem();
        Ok(Self { root, intermediate, issuer: Issuer::new(params, key) })
    }

    fn copy(&self) -> Result<Self> {
        let key = KeyPair::from_pem(&self.issuer.key().serialize_pem())?;
        let issuer = Issuer::from_ca_cert_pem(&self.intermediate, key)?;
        Ok(Self { root: self.root.clone(), intermediate: self.intermediate.clone(), issuer })
    }

    fn sign(&self, csr: &str, identity: Option<&str>, from: OffsetDateTime, until: OffsetDateTime) -> Result<String> {
        let mut csr = CertificateSigningRequestParams::from_pem(csr).context("the CSR cannot be read")?;
        let asked = std::mem::take(&mut csr.params.subject_alt_names);
        csr.params = leaf(from, until);
        csr.params.subject_alt_names = match identity {
            Some(id) => vec![SanType::URI(id.try_into()?)],
            None => asked,
        };
        Ok(csr.signed_by(&self.issuer)?.pem())
    }
}

fn authority(organisation: &str, name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, organisation);
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = OffsetDateTime::now_utc();
    params.not_before = now - SKEW;
    params.not_after = now + ROOT_LIFETIME;
    params
}

fn leaf(from: OffsetDateTime, until: OffsetDateTime) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    params.not_before = from;
    params.not_after = until;
    params
}

impl Service for Ca {
    fn answer(self: Arc<Self>, call: Call) -> Reply {
        Box::pin(async move {
            let create = Create { ca: self, peer: call.peer };
            tonic::server::Grpc::new(ProstCodec::default()).unary(create, call.request).await
        })
    }
}

/// `CreateCertificate` for one caller.
struct Create {
    ca: Arc<Ca>,
    peer: Arc<Peer>,
}

impl tonic::server::UnaryService<CertificateRequest> for Create {
    type Response = CertificateResponse;
    type Future = Pin<Box<dyn Future<Output = Result<tonic::Response<CertificateResponse>, Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<CertificateRequest>) -> Self::Future {
        let (ca, peer) = (Arc::clone(&self.ca), Arc::clone(&self.peer));
        Box::pin(async move {
            let answer = ca.next();
            let metadata = request.metadata().clone();
            let request = request.into_inner();
            ca.calls.push(Asked { request: request.clone(), metadata, peer, answer: answer.clone() });
            match answer {
                Answer::Hang => std::future::pending().await,
                Answer::Status(code) => Err(Status::new(code, "as ordered")),
                answer => {
                    let chain = ca.respond(&request, &answer);
                    let cert_chain = chain.map_err(|e| Status::invalid_argument(format!("{e:#}")))?;
                    Ok(tonic::Response::new(CertificateResponse { cert_chain }))
                }
            }
        })
    }
}

impl fmt::Debug for Ca {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ca").field("calls", &self.calls.len()).finish_non_exhaustive()
    }
}
