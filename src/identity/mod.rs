//! The workload's certificate: asked of a CA, or of a foreign socket, kept fresh, handed to `control` through a watch channel.
//!
//! It decides when to ask and what of an answer is good; it never decides who is trusted for what, and touches no
//! connection: a renewal is a new value in the channel, and connections that are open stay as they are.
//!
//! ```ignore
//! let news = identity::start(identity::Settings::of(&bootstrap)?);
//! // news.borrow().secrets holds `default` and `ROOTCA` as soon as there are any; .trouble says why there are none
//! ```
//!
//! What it had stays until it has something better: a CA that is away costs nothing before the certificate expires.
//! Files that somebody else mounts are `control`'s affair, which watches files anyway.

mod ca;
mod files;
mod key;
mod schedule;
mod sds;
mod serve;

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use proxy_config::bootstrap::{Bootstrap, Ca, Identity, PemFiles};
use tokio::sync::watch;

pub use files::Output;
pub use schedule::Rotation;
pub use serve::{Served, Socket};

use crate::tls::Secrets;

/// Mode of written files where nobody else has business with them.
const PRIVATE: u32 = 0o600;
/// Mode of written files in a pod.
const FOR_ALL: u32 = 0o644;

/// What is needed to get a certificate.
#[derive(Debug, Clone)]
pub struct Settings {
    /// From where.
    pub source: Source,
    /// Where issued certificates are written to.
    pub output: Option<Output>,
    /// Socket where programs beside us get the certificate too.
    pub serve: Option<PathBuf>,
    /// Further roots that the mesh trusts, PEM, as they are pushed (`caCertificates`); a change renews the certificate.
    pub anchors: Option<watch::Receiver<Vec<String>>>,
}

/// Where the certificate comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A CA that signs.
    Ca(Box<Ca>),
    /// A socket that serves it by SDS (SPIRE); `node` is an encoded `envoy.config.core.v3.Node` for the first request.
    Socket {
        /// The socket.
        path: PathBuf,
        /// Who asks.
        node: Bytes,
    },
}

impl Settings {
    /// What the environment asks for. `None`: the certificate is in files.
    /// `node` is an encoded Node.
    pub fn of(bootstrap: &Bootstrap, node: Bytes) -> Option<Self> {
        let socket = bootstrap.identity_socket.clone();
        let (source, serve) = match &bootstrap.identity {
            Identity::Ca(ca) => (Source::Ca(ca.clone()), Some(socket)),
            // Somebody else serves there.
            Identity::Socket => (Source::Socket { path: socket, node }, None),
            Identity::Files(_) => return None,
        };
        let mode = if bootstrap.output_for_all { FOR_ALL } else { PRIVATE };
        let output = bootstrap.output_certs.clone().map(|folder| Output { folder, mode });
        Some(Self { source, output, serve, anchors: None })
    }
}

/// What there is at the moment.
#[derive(Debug, Clone, Default)]
pub struct News {
    /// `default` and `ROOTCA`; empty before the first certificate.
    pub secrets: Secrets,
    /// The same as texts, for those who are served them.
    pub pem: Option<Arc<Pem>>,
    /// What keeps a newer certificate away, for people; `None`: all is well.
    pub trouble: Option<String>,
    /// Certificates that were taken so far.
    pub renewals: u64,
    /// Attempts that failed so far.
    pub failures: u64,
}

/// PEM texts.
pub struct Pem {
    chain: Bytes,
    key: Bytes,
    roots: Bytes,
}

impl std::fmt::Debug for Pem {
    /// Keys do not belong into logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pem").finish_non_exhaustive()
    }
}

/// Begins to ask, in a task that ends with the last receiver; one that serves others goes on as long as the process.
pub fn start(settings: Settings) -> watch::Receiver<News> {
    let (sender, receiver) = watch::channel(News::default());
    tokio::spawn(async move {
        let closed = sender.clone();
        let serve =
            settings.serve.as_deref().map(|path| (path, Socket::open(path, Served::Issued(sender.subscribe()))));
        if let Some((path, Err(e))) = &serve {
            // The proxy itself does not need it.
            tracing::error!("{}: certificates are not served: {e}", path.display());
        }
        tokio::select! {
            () = run(settings, sender) => {}
            () = closed.closed() => {}
        }
    });
    receiver
}

/// Serves mounted files to programs beside us, as long as the process runs. The proxy itself does not need it, so a socket
/// that cannot be made is only told.
pub fn serve_mounted(path: PathBuf, files: PemFiles) {
    tokio::spawn(async move {
        match Socket::open(&path, Served::Mounted(files)) {
            Ok(_open) => std::future::pending().await,
            Err(e) => tracing::error!("{}: certificates are not served: {e}", path.display()),
        }
    });
}

async fn run(settings: Settings, news: watch::Sender<News>) {
    match settings.source {
        Source::Ca(said) => ca::run(&said, settings.output.as_ref(), settings.anchors, &news).await,
        Source::Socket { path, node } => sds::run(&path, node, &news).await,
    }
}

/// Tells that an attempt failed; the log has it once for each reason.
fn failed(news: &watch::Sender<News>, why: String) {
    news.send_modify(|news| {
        if news.trouble.as_ref() != Some(&why) {
            tracing::warn!("workload certificate: {why}");
        }
        news.failures += 1;
        news.trouble = Some(why);
    });
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proxy_config::bootstrap::{ClientFiles, ControlPlane, KeyKind, Roots};

    use super::*;

    /// A CA at an address, P-256 keys; `roots` is the file of its roots, `None` is plaintext.
    pub(super) fn settings(address: &str, roots: Option<PathBuf>) -> Ca {
        let server = ControlPlane {
            address: address.to_owned(),
            name: None,
            roots: roots.map(Roots::File),
            client: None::<ClientFiles>,
            token: PathBuf::from("/nowhere/token"),
            headers: Vec::new(),
            keepalive: (Duration::from_secs(30), Duration::from_secs(10)),
        };
        Ca {
            server,
            trust_domain: "cluster.local".to_owned(),
            namespace: "a".to_owned(),
            service_account: "b".to_owned(),
            ttl: Duration::from_secs(86_400),
            rotation_ratio: 0.5,
            rotation_jitter: 0.01,
            key: KeyKind::P256,
            pkcs8: false,
            cert_signer: String::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_ca_that_is_not_there_is_asked_again_and_told() {
        let said = settings("127.0.0.1:1", Some("/nowhere/root-cert.pem".into()));
        let settings = Settings { source: Source::Ca(Box::new(said)), output: None, serve: None, anchors: None };
        let mut news = start(settings);
        let tried = news.wait_for(|news| news.failures >= 3).await.unwrap().clone();
        assert!(tried.secrets.identity("default").is_none() && tried.renewals == 0);
        let why = tried.trouble.unwrap();
        assert!(why.contains("127.0.0.1:1") && why.contains("/nowhere/root-cert.pem"), "{why}");
    }
}
