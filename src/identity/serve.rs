//! The workload's certificate for programs beside us: SDS at `./var/run/secrets/workload-spiffe-uds/socket`, as the agent
//! serves it. Whoever may open the socket gets the key; its folder is for the proxy's user and group.
//!
//! A stream is answered when it asks for names that it did not have, and again when one of them changes. Names that are not
//! ours end the stream: the agent hands out the workload's certificate under any name, which is not repeated here.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use proxy_config::bootstrap::PemFiles;
use proxy_config::sds::{self, SECRET, STREAM_SECRETS};
use proxy_config::xds::{Any, DiscoveryRequest, DiscoveryResponse, Material, Secret};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

use super::News;

/// Mode of the socket: the proxy runs as another user than the programs beside it.
const SOCKET_MODE: u32 = 0o666;
const FOLDER_MODE: u32 = 0o750;
/// How long files are waited for that do not belong together yet, or are not there yet.
const FILE_PATIENCE: Duration = Duration::from_secs(10);
/// First wait between looks at files; doubles.
const FILE_WAIT: Duration = Duration::from_millis(100);
/// How often files that are served are looked at again.
const FILE_LOOK: Duration = Duration::from_secs(1);
const SYSTEM_ROOTS: &str = "/etc/ssl/certs/ca-certificates.crt";

/// What is served as `default` and `ROOTCA`.
#[derive(Debug, Clone)]
pub enum Served {
    /// What is issued.
    Issued(watch::Receiver<News>),
    /// Files that somebody mounts and replaces.
    Mounted(PemFiles),
}

/// A socket that is open; removed when dropped.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    accepting: tokio::task::JoinHandle<()>,
}

impl Socket {
    /// Listens. What lies at the path is removed; that nobody listens there has been found out before.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(path: &Path, served: Served) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)?;
        }
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))?;
        tracing::info!("certificates are served at {}", path.display());
        let accepting = tokio::spawn(accept(listener, Arc::new(Server { served, count: AtomicU64::new(0) })));
        Ok(Self { path: path.to_owned(), accepting })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = fs::remove_file(&self.path);
    }
}

struct Server {
    served: Served,
    /// Responses so far, for their versions.
    count: AtomicU64,
}

async fn accept(listener: UnixListener, server: Arc<Server>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(talk(stream, Arc::clone(&server)))),
                // Out of descriptors: those that are open must close first.
                Err(_) => sleep(FILE_WAIT).await,
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn talk(stream: UnixStream, server: Arc<Server>) {
    let answer = service_fn(move |request: http::Request<Incoming>| {
        let server = Arc::clone(&server);
        async move {
            if request.uri().path() != STREAM_SECRETS {
                let method = request.uri().path().rsplit('/').next().unwrap_or_default();
                return Ok(Status::unimplemented(format!("{method} not implemented")).into_http());
            }
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<DiscoveryResponse, DiscoveryRequest>::default());
            Ok::<_, Infallible>(grpc.streaming(Stream(server), request).await)
        }
    });
    // How a client leaves is its own affair.
    let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let _ = builder.serve_connection(TokioIo::new(stream), answer).await;
}

/// One `StreamSecrets`.
struct Stream(Arc<Server>);

impl tonic::server::StreamingService<DiscoveryRequest> for Stream {
    type Response = DiscoveryResponse;
    type ResponseStream = ReceiverStream<Result<DiscoveryResponse, Status>>;
    type Future = Pin<Box<dyn Future<Output = Result<tonic::Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<Streaming<DiscoveryRequest>>) -> Self::Future {
        let (send, responses) = mpsc::channel(1);
        tokio::spawn(converse(Arc::clone(&self.0), request.into_inner(), send));
        Box::pin(std::future::ready(Ok(tonic::Response::new(ReceiverStream::new(responses)))))
    }
}

/// What a stream asked for and has.
#[derive(Default)]
struct Asked {
    begun: bool,
    names: BTreeSet<String>,
    nonce: String,
    sent: BTreeMap<String, Material>,
}

impl Asked {
    /// Takes a request in; the names to answer, none for an acknowledgement.
    fn on_request(&mut self, request: &DiscoveryRequest) -> Result<Vec<String>, Status> {
        if !self.begun && request.node.is_none() {
            return Err(Status::invalid_argument("missing node information"));
        }
        self.begun = true;
        // Answers to what has been overtaken, and refusals: the next change is the next answer.
        let stale = !request.response_nonce.is_empty() && request.response_nonce != self.nonce;
        if stale || request.error_detail.is_some() {
            return Ok(Vec::new());
        }
        let names: BTreeSet<String> = request.resource_names.iter().cloned().collect();
        let more = names.iter().any(|name| !self.names.contains(name));
        self.names = names;
        self.sent.retain(|name, _| self.names.contains(name));
        Ok(if more { request.resource_names.clone() } else { Vec::new() })
    }

    /// What of this is news.
    fn news(&mut self, secrets: Vec<Secret>) -> Vec<Secret> {
        secrets.into_iter().filter(|s| self.sent.get(&*s.name) != Some(&s.material)).collect()
    }
}

async fn converse(
    server: Arc<Server>,
    mut requests: Streaming<DiscoveryRequest>,
    send: mpsc::Sender<Result<DiscoveryResponse, Status>>,
) {
    let mut asked = Asked::default();
    let mut changes = server.served.changes();
    loop {
        let wanted = tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => asked.on_request(&request),
                _ => return,
            },
            () = changes.next() => Ok(asked.sent.keys().cloned().collect()),
            () = send.closed() => return,
        };
        let answer = match wanted {
            Ok(names) if names.is_empty() => continue,
            Ok(names) => server.answer(&names, &mut asked).await,
            Err(status) => Err(status),
        };
        let ended = answer.is_err();
        let Some(answer) = answer.transpose() else { continue };
        if send.send(answer).await.is_err() || ended {
            return;
        }
    }
}

impl Server {
    /// A response with these names; none when all of it is known already.
    async fn answer(&self, names: &[String], asked: &mut Asked) -> Result<Option<DiscoveryResponse>, Status> {
        let mut secrets = Vec::new();
        for name in names {
            let told = |why: String| Status::unknown(format!("failed to generate secret for {name}: {why}"));
            let material = match name.as_str() {
                "default" | "ROOTCA" => self.served.own(name).await.map_err(told)?,
                _ if name.starts_with("file-") => from_files(name).await.map_err(told)?,
                _ => return Err(Status::not_found(format!("{name} is not served here"))),
            };
            secrets.push(Secret { name: name.as_str().into(), material });
        }
        let secrets = asked.news(secrets);
        if secrets.is_empty() {
            return Ok(None);
        }
        asked.sent.extend(secrets.iter().map(|s| (s.name.to_string(), s.material.clone())));
        let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let now = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        asked.nonce = format!("{:032x}", fastrand::u128(..));
        Ok(Some(DiscoveryResponse {
            version_info: format!("{}/{count}", now.format(&Rfc3339).unwrap_or_default()),
            resources: secrets.iter().map(sds::write).collect::<Vec<Any>>(),
            type_url: SECRET.to_owned(),
            nonce: asked.nonce.clone(),
        }))
    }
}

/// Waits for a reason to look again.
enum Changes {
    Issued(watch::Receiver<News>),
    Files,
}

impl Changes {
    async fn next(&mut self) {
        match self {
            Self::Issued(news) => {
                if news.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Self::Files => sleep(FILE_LOOK).await,
        }
    }
}

impl Served {
    fn changes(&self) -> Changes {
        match self {
            Self::Issued(news) => Changes::Issued(news.clone()),
            Self::Mounted(_) => Changes::Files,
        }
    }

    /// Our own, as soon as it is there; an error when the next attempt to get it fails.
    async fn own(&self, name: &str) -> Result<Material, String> {
        let news = match self {
            Self::Mounted(files) if name == "default" => return certificate(&files.chain, &files.key).await,
            Self::Mounted(files) => return roots(&files.root).await,
            Self::Issued(news) => news,
        };
        let mut news = news.clone();
        let failures = news.borrow().failures;
        let there =
            news.wait_for(|now| now.pem.is_some() || now.failures > failures).await.map_err(|e| e.to_string())?;
        match (&there.pem, name) {
            (None, _) => Err(there.trouble.clone().unwrap_or_default()),
            (Some(pem), "default") => Ok(Material::Certificate { chain: pem.chain.clone(), key: pem.key.clone() }),
            (Some(pem), _) => Ok(Material::Roots { pem: pem.roots.clone(), revoked: None }),
        }
    }
}

/// `file-cert:CHAIN~KEY`, `file-root:PATH`, `file-root:system`.
async fn from_files(name: &str) -> Result<Material, String> {
    if let Some(path) = name.strip_prefix("file-root:") {
        return roots(Path::new(if path == "system" { SYSTEM_ROOTS } else { path })).await;
    }
    let paths = name.strip_prefix("file-cert:").and_then(|paths| paths.split_once('~'));
    let (chain, key) = paths.ok_or("expected file-cert:CERT~KEY or file-root:PATH")?;
    certificate(Path::new(chain), Path::new(key)).await
}

async fn certificate(chain: &Path, key: &Path) -> Result<Material, String> {
    patiently(|| {
        let (chain, key) = (read(chain)?, read(key)?);
        crate::tls::Identity::from_pem(&chain, &key)?;
        Ok(Material::Certificate { chain, key })
    })
    .await
}

async fn roots(path: &Path) -> Result<Material, String> {
    patiently(|| Ok(Material::Roots { pem: read(path)?, revoked: None })).await
}

fn read(path: &Path) -> Result<Bytes, String> {
    fs::read(path).map(Bytes::from).map_err(|e| format!("{}: {e}", path.display()))
}

/// Looks until it is good, for as long as files may take that are written one by one.
async fn patiently(look: impl Fn() -> Result<Material, String>) -> Result<Material, String> {
    let end = Instant::now() + FILE_PATIENCE;
    let mut wait = FILE_WAIT;
    loop {
        match look() {
            Err(_) if Instant::now() + wait < end => {}
            done => return done,
        }
        sleep(wait).await;
        wait *= 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(names: &[&str], nonce: &str) -> DiscoveryRequest {
        DiscoveryRequest {
            node: Some(Bytes::from_static(b"\x0a\x01x")),
            resource_names: names.iter().map(|name| (*name).to_owned()).collect(),
            response_nonce: nonce.to_owned(),
            ..DiscoveryRequest::default()
        }
    }

    #[test]
    fn only_new_names_are_answered() {
        let mut asked = Asked::default();
        assert_eq!(asked.on_request(&request(&["default"], "")).unwrap(), ["default"]);
        asked.nonce = "1".to_owned();
        assert!(asked.on_request(&request(&["default"], "1")).unwrap().is_empty());
        assert_eq!(asked.on_request(&request(&["ROOTCA"], "1")).unwrap(), ["ROOTCA"]);
        assert_eq!(asked.on_request(&request(&["default", "ROOTCA"], "1")).unwrap(), ["default", "ROOTCA"]);
        assert!(asked.on_request(&request(&["default"], "1")).unwrap().is_empty(), "fewer names are no question");
        assert!(asked.on_request(&request(&["x"], "0")).unwrap().is_empty(), "overtaken");
        let refused =
            DiscoveryRequest { error_detail: Some(proxy_config::xds::Status::default()), ..request(&["y"], "1") };
        assert!(asked.on_request(&refused).unwrap().is_empty());
    }

    #[test]
    fn a_first_request_says_who_asks() {
        let mut asked = Asked::default();
        let status = asked.on_request(&DiscoveryRequest { node: None, ..request(&["default"], "") }).unwrap_err();
        assert_eq!((status.code(), status.message()), (tonic::Code::InvalidArgument, "missing node information"));
    }

    #[test]
    fn what_is_known_is_no_news() {
        let secret = |name: &str, pem: &'static str| Secret {
            name: name.into(),
            material: Material::Roots { pem: pem.into(), revoked: None },
        };
        let mut asked = Asked::default();
        asked.sent.insert("ROOTCA".to_owned(), secret("ROOTCA", "a").material);
        assert!(asked.news(vec![secret("ROOTCA", "a")]).is_empty());
        assert_eq!(asked.news(vec![secret("ROOTCA", "b")]).len(), 1);
    }
}
