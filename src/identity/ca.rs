//! Certificates signed on request: `CreateCertificate`, again and again for as long as the workload lives.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use proxy_config::bootstrap::Ca;
use proxy_config::ca::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse};
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::client::Grpc;
use tonic::{Code, Status};
use tonic_prost::ProstCodec;

use super::files::Output;
use super::key::{KeyForm, Request};
use super::schedule::{self, Rotation};
use super::{News, Pem, failed};
use crate::grpc::{Channel, Credentials, Server};
use crate::tls::{Identity, Roots, unix_now};

/// How long a connection may take.
const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// How long an answer may take; a CA that accepts and is silent must not end renewal for good.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Who asks, with what it keeps between calls.
struct Client<'a> {
    said: &'a Ca,
    server: Server,
    credentials: Credentials,
    /// Stays open from renewal to renewal; a failed attempt drops it.
    channel: Option<Channel>,
    /// Connections that failed, so that the next one begins with another address.
    tried: usize,
}

/// An answer that is good.
struct Issued {
    identity: Identity,
    roots: Roots,
    /// As they go into files and to those who are served.
    key: String,
    chain: String,
    /// The CA's own roots.
    bundle: String,
    /// Pushed ones among them.
    all: String,
}

/// Asks, publishes, waits, asks again. Does not end.
pub(super) async fn run(
    said: &Ca,
    output: Option<&Output>,
    mut anchors: Option<watch::Receiver<Vec<String>>>,
    news: &watch::Sender<News>,
) {
    let rotation = Rotation { ratio: said.rotation_ratio, jitter: said.rotation_jitter };
    let mut client = Client::new(said);
    let mut wanted: Option<Request> = None;
    let mut failures = 0;
    let mut expiry = None;
    loop {
        let more = anchors.as_mut().map(|anchors| anchors.borrow_and_update().clone()).unwrap_or_default();
        match client.attempt(&mut wanted, &more).await {
            Ok(issued) => {
                (wanted, failures) = (None, 0);
                let life = life(&issued.identity);
                expiry = Some(Instant::now() + life);
                take(issued, output, news);
                let renewal = Instant::now() + rotation.delay(life, fastrand::f64());
                tokio::select! {
                    () = sleep_until(renewal) => {}
                    () = changed(&mut anchors) => tracing::info!("the mesh's roots have changed"),
                }
            }
            Err(e) => {
                failures += 1;
                client.channel = None;
                failed(news, format!("{e:#}"));
                let left = expiry.map(|end: Instant| end.saturating_duration_since(Instant::now()));
                sleep(schedule::after_attempt(failures, left, fastrand::f64())).await;
            }
        }
    }
}

/// Publishes, and writes what is to be written. A disk that is full does not keep a good certificate from being used.
fn take(issued: Issued, output: Option<&Output>, news: &watch::Sender<News>) {
    let written = output.map(|output| output.write(&issued.key, &issued.chain, &issued.bundle));
    let trouble = written.and_then(Result::err).map(|e| format!("OUTPUT_CERTS: {e}"));
    if let Some(trouble) = &trouble {
        tracing::error!("{trouble}");
    }
    let until = issued.identity.info.first().map_or(0, |leaf| leaf.not_after);
    tracing::info!("workload certificate until {until} (seconds since 1970)");
    let pem = Pem { chain: issued.chain.into(), key: issued.key.into(), roots: issued.all.into() };
    news.send_modify(|news| {
        news.secrets = news.secrets.with_identity("default", issued.identity).with_roots("ROOTCA", issued.roots);
        news.pem = Some(Arc::new(pem));
        news.trouble = trouble;
        news.renewals += 1;
    });
}

/// What is left of a certificate.
fn life(identity: &Identity) -> Duration {
    let until = identity.info.first().map_or(0, |leaf| leaf.not_after);
    Duration::from_secs(u64::try_from(until - unix_now()).unwrap_or(0))
}

/// The next change of the anchors; never, where there are none.
async fn changed(anchors: &mut Option<watch::Receiver<Vec<String>>>) {
    let told = match anchors {
        Some(anchors) => anchors.changed().await.is_ok(),
        None => false,
    };
    if !told {
        // Whoever pushed them is gone; what was pushed holds.
        std::future::pending::<()>().await;
    }
}

impl<'a> Client<'a> {
    fn new(said: &'a Ca) -> Self {
        let (server, credentials) = (Server::from(&said.server), Credentials::from(&said.server));
        Self { said, server, credentials, channel: None, tried: 0 }
    }

    /// One key, calls that are repeated while that may help. The key of a failed attempt is used again: it has not left.
    async fn attempt(&mut self, wanted: &mut Option<Request>, anchors: &[String]) -> Result<Issued> {
        if wanted.is_none() {
            *wanted = Some(make_key(self.said).await?);
        }
        let request = wanted.as_ref().context("a request was made")?;
        let mut failed_calls = 0;
        let response = loop {
            match self.call(&request.csr, failed_calls).await {
                Ok(response) => break response,
                Err(status) => {
                    failed_calls += 1;
                    if !schedule::again(status.code()) || failed_calls >= schedule::CALLS {
                        bail!("CA {}: {:?}: {}", self.server.address, status.code(), status.message());
                    }
                    sleep(schedule::after_call(failed_calls, fastrand::f64())).await;
                }
            }
        };
        read(&response, &request.key, anchors, unix_now()).with_context(|| format!("CA {}", self.server.address))
    }

    /// `before` counts the calls of this attempt that have failed; the agent tells the CA.
    async fn call(&mut self, csr: &str, before: u32) -> Result<CertificateResponse, Status> {
        let channel = self.connected().await.map_err(Status::unavailable)?;
        let seconds = i64::try_from(self.said.ttl.as_secs()).unwrap_or(i64::MAX);
        let message = CertificateRequest::new(csr.to_owned(), seconds, &self.said.cert_signer);
        let mut request = self.credentials.sign(tonic::Request::new(message));
        if before > 0 {
            request.metadata_mut().insert("x-retry-attempt", before.into());
        }
        let mut grpc = Grpc::new(channel);
        let path = http::uri::PathAndQuery::from_static(CREATE_CERTIFICATE);
        let answer = async {
            grpc.ready().await.map_err(|e| Status::unavailable(e.to_string()))?;
            grpc.unary(request, path, ProstCodec::default()).await
        };
        let answer = tokio::time::timeout(CALL_LIMIT, Box::pin(answer)).await;
        let answer = answer.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("no answer in {CALL_LIMIT:?}"))));
        // Whoever hangs is left, whoever broke the connection is met on another one.
        if answer.as_ref().is_err_and(|s| s.code() == Code::DeadlineExceeded) {
            self.channel = None;
            self.tried += 1;
        }
        answer.map(tonic::Response::into_inner)
    }

    async fn connected(&mut self) -> Result<Channel, String> {
        if let Some(open) = self.channel.as_ref().filter(|channel| !channel.is_closed()) {
            return Ok(open.clone());
        }
        let mut endpoint = self.server.endpoint(unix_now())?;
        endpoint.attempt = self.tried;
        match Channel::connect(&endpoint, DIAL_LIMIT).await {
            Ok(channel) => {
                self.channel = Some(channel.clone());
                Ok(channel)
            }
            Err(e) => {
                self.tried += 1;
                Err(e.to_string())
            }
        }
    }
}

/// Keys take their time (RSA 4096 up to seconds), and the control thread has other things to do.
async fn make_key(said: &Ca) -> Result<Request> {
    let id = format!("spiffe://{}/ns/{}/sa/{}", said.trust_domain, said.namespace, said.service_account);
    let (kind, form) = (said.key, if said.pkcs8 { KeyForm::Pkcs8 } else { KeyForm::Traditional });
    let (done, made) = oneshot::channel();
    let make = move || {
        // Nobody waits any more when we are leaving.
        let _ = done.send(Request::make(kind, form, &id));
    };
    std::thread::Builder::new().name("key".to_owned()).spawn(make).context("a thread for the key")?;
    made.await.context("the key was not made")?
}

/// What of a response can be used: leaf first, roots last, which may be several and are kept whole.
fn read(response: &CertificateResponse, key: &str, anchors: &[String], now: i64) -> Result<Issued> {
    let [_, .., roots] = &*response.cert_chain else {
        bail!("a chain of {} certificates; leaf and root are expected", response.cert_chain.len());
    };
    let chain = join(&response.cert_chain);
    let identity = Identity::from_pem(chain.as_bytes(), key.as_bytes()).map_err(|e| anyhow!(e))?;
    let own = Roots::from_pem(roots.as_bytes()).map_err(|e| anyhow!("root: {e}"))?;
    // What no peer would accept is not put in the place of what they do.
    identity.leads_to(&own, now).map_err(|e| anyhow!("the certificate does not lead to the root beside it: {e}"))?;
    let all = join(&[std::slice::from_ref(roots), anchors].concat());
    let trusted = Roots::from_pem(all.as_bytes()).map_err(|e| anyhow!("roots: {e}"))?;
    Ok(Issued { identity, roots: trusted, key: key.to_owned(), chain, bundle: roots.clone(), all })
}

/// PEM texts after one another, whether or not they end their last line.
fn join(texts: &[String]) -> String {
    texts.iter().map(|text| if text.ends_with('\n') { text.clone() } else { format!("{text}\n") }).collect()
}

#[cfg(test)]
mod tests {
    use proxy_config::bootstrap::KeyKind;
    use time::OffsetDateTime;

    use super::*;
    use crate::ca::Root;

    const ID: &str = "spiffe://cluster.local/ns/a/sa/b";

    fn signed(seconds: i64) -> (Root, String, String) {
        let (root, _) = Root::generate("test").unwrap();
        let (from, until) = (OffsetDateTime::now_utc() - time::Duration::hours(1), time::Duration::seconds(seconds));
        let (chain, key) = root.sign_between(&[ID], from, OffsetDateTime::now_utc() + until).unwrap();
        (root, chain, key)
    }

    fn response(chain: &[&str]) -> CertificateResponse {
        CertificateResponse { cert_chain: chain.iter().map(|text| (*text).to_owned()).collect() }
    }

    fn refusal(response: &CertificateResponse, key: &str) -> String {
        format!("{:#}", read(response, key, &[], unix_now()).map(|_| ()).unwrap_err())
    }

    #[test]
    fn the_last_element_is_the_root_and_the_whole_chain_is_shown() {
        let (root, chain, key) = signed(600);
        let ca = root.certificate().trim_end();
        let issued = read(&response(&[&chain, ca, ca]), &key, &[], unix_now()).unwrap();
        assert_eq!((issued.identity.info.len(), issued.roots.info.len()), (3, 1));
        assert_eq!((&*issued.bundle, issued.chain.matches("BEGIN").count()), (ca, 3));
        assert!(life(&issued.identity) > Duration::from_secs(590));
        // A bundle of several roots in one element stays whole.
        let (other, _) = Root::generate("other").unwrap();
        let bundle = format!("{}{}", other.certificate(), root.certificate());
        assert_eq!(read(&response(&[&chain, &bundle]), &key, &[], unix_now()).unwrap().roots.info.len(), 2);
        // Pushed anchors are trusted too, and are not written to the file of the CA's own.
        let anchors = [other.certificate().to_owned(), other.certificate().to_owned()];
        let issued = read(&response(&[&chain, ca]), &key, &anchors, unix_now()).unwrap();
        assert_eq!((issued.roots.info.len(), issued.bundle.matches("BEGIN").count()), (2, 1));
    }

    #[test]
    fn what_peers_would_refuse_is_refused() {
        let (root, chain, key) = signed(600);
        let ca = root.certificate();
        assert!(refusal(&response(&[]), &key).contains("chain of 0"));
        assert!(refusal(&response(&[&chain]), &key).contains("chain of 1"));
        assert!(refusal(&response(&["garbage", ca]), &key).contains("certificate"));
        let (another, _, another_key) = signed(600);
        assert!(refusal(&response(&[&chain, another.certificate()]), &key).contains("does not lead"));
        assert!(refusal(&response(&[&chain, ca]), &another_key).contains("certificate and key"));
        let (root, expired, key) = signed(-1);
        assert!(refusal(&response(&[&expired, root.certificate()]), &key).contains("xpired"));
    }

    /// Real time would be ten seconds; the paused clock jumps when everybody waits.
    #[tokio::test(start_paused = true)]
    async fn a_ca_that_never_answers_is_left() {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let never = hyper::service::service_fn(|_: http::Request<hyper::body::Incoming>| {
            std::future::pending::<Result<http::Response<tonic::body::Body>, std::convert::Infallible>>()
        });
        let server = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
        let serving = server.serve_connection(hyper_util::rt::TokioIo::new(far), never);
        let _serving = tokio::spawn(serving);
        let said = crate::identity::tests::settings("127.0.0.1:1", None);
        let mut client = Client::new(&said);
        client.channel = Some(Channel::over(near, "ca.test").await.unwrap());
        let begun = Instant::now();
        let status = client.call("csr", 0).await.unwrap_err();
        assert_eq!((status.code(), begun.elapsed()), (Code::DeadlineExceeded, CALL_LIMIT));
        assert!(client.channel.is_none() && client.tried == 1, "the next call is made elsewhere");
    }

    #[tokio::test]
    async fn a_key_that_cannot_be_made_is_told_by_its_setting() {
        let said = Ca { key: KeyKind::Rsa(1000), ..crate::identity::tests::settings("127.0.0.1:1", None) };
        assert!(make_key(&said).await.unwrap_err().to_string().contains("WORKLOAD_RSA_KEY_SIZE=1000"));
    }
}
