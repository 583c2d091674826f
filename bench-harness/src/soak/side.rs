//! One proxy with its control plane.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};

use crate::child::Running;
use crate::istiod::ads::{Ads, SERVICE};
use crate::istiod::{Ca, Istiod, NAME, Setup};

/// How long anything may take on a busy machine.
pub(super) const LIMIT: Duration = Duration::from_secs(60);
/// The proxy writes down what it serves once in this time, at most.
const WRITES: Duration = Duration::from_secs(1);
/// Between two looks at what has no event.
const LOOK: Duration = Duration::from_millis(20);

/// A proxy and what it is told.
pub(super) struct Side {
    /// Its control plane.
    pub(super) istiod: Istiod,
    /// The discovery half of it.
    pub(super) ads: Arc<Ads>,
    folder: TempDir,
    account: &'static str,
    variables: BTreeMap<String, String>,
    metrics: SocketAddr,
    process: Option<Running>,
}

/// An address that nobody listens at now.
pub(super) async fn free() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await.context("no free port")?;
    Ok(listener.local_addr()?)
}

impl Side {
    /// A control plane of this CA, and a folder for the proxy; nothing runs yet. `account`: its namespace and service
    /// account.
    pub(super) async fn new(ca: &Arc<Ca>, account: &'static str) -> Result<Self> {
        let ads = Arc::new(Ads::default());
        let services = vec![(SERVICE, Arc::clone(&ads) as _)];
        let istiod = Istiod::start(Setup { services, ca: Some(Arc::clone(ca)), ..Setup::default() }).await?;
        let folder = tempfile::Builder::new().prefix("istio-soak-").tempdir()?;
        for (path, text) in [
            ("var/run/secrets/istio/root-cert.pem", istiod.roots()),
            ("var/run/secrets/tokens/istio-token", format!("tok:{account}:{account}\n")),
        ] {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().context("a file has a folder")?)?;
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        let set = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let variables = BTreeMap::from([
            set("POD_NAME", account),
            set("POD_NAMESPACE", account),
            set("SERVICE_ACCOUNT", account),
            set("TRUST_DOMAIN", "cluster.local"),
            set("INSTANCE_IP", "127.0.0.1"),
            set("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            set("ISTIOD_SAN", NAME),
            set("ECC_SIGNATURE_ALGORITHM", "ECDSA"),
            set("PROXY_CONFIG", &format!("{{\"discoveryAddress\": \"{}\"}}", istiod.address())),
        ]);
        Ok(Self { istiod, ads, folder, account, variables, metrics: free().await?, process: None })
    }

    /// Its SPIFFE id.
    pub(super) fn id(&self) -> String {
        format!("spiffe://cluster.local/ns/{0}/sa/{0}", self.account)
    }

    /// A variable for the next start.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_owned(), value.to_owned());
    }

    /// Starts the proxy.
    pub(super) fn start(&mut self, proxy: &Path) -> Result<()> {
        let mut command = Command::new(fs::canonicalize(proxy).with_context(|| proxy.display().to_string())?);
        command.args(["proxy", "sidecar", "--admin-port", "0", "--status-port", "0", "--concurrency", "2"]);
        command.args(["--metrics-port", &self.metrics.port().to_string()]);
        command.current_dir(self.folder.path()).env_clear().envs(&self.variables);
        self.process = Some(Running::start(command, &self.folder.path().join("proxy.log"))?);
        Ok(())
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) {
        self.process = None;
    }

    /// Resident memory of the process in bytes.
    pub(super) fn resident_bytes(&self) -> u64 {
        self.process.as_ref().map_or(0, Running::resident_bytes)
    }

    /// CPU time of the process since its last start.
    pub(super) fn cpu(&self) -> Duration {
        self.process.as_ref().map_or(Duration::ZERO, Running::cpu)
    }

    /// What it logged since its last start.
    pub(super) fn printed(&self) -> String {
        self.process.as_ref().map(Running::printed).unwrap_or_default()
    }

    /// Waits until the proxy has nothing more to write down of what it serves: it writes at most once a second.
    ///
    /// # Errors
    /// When it writes nothing, or without end.
    pub(super) async fn keeps(&self) -> Result<()> {
        let file = self.folder.path().join("etc/istio/proxy/last-good/last-good");
        let end = Instant::now() + LIMIT;
        loop {
            let written = fs::metadata(&file).and_then(|file| file.modified()).ok();
            if written.and_then(|at| at.elapsed().ok()).is_some_and(|age| age > WRITES * 2) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "{} does not come to rest", file.display());
            sleep(LOOK).await;
        }
    }

    /// Sum of a metric's series whose labels contain this.
    ///
    /// # Errors
    /// When the proxy does not tell.
    pub(super) async fn metric(&self, name: &str, labels: &str) -> Result<u64> {
        let text = timeout(LIMIT, scrape(self.metrics)).await.context("metrics took too long")??;
        let value = |line: &str| -> Option<f64> {
            let (series, value) = line.rsplit_once(' ')?;
            let (family, rest) = series.split_once('{').unwrap_or((series, ""));
            (family == name && rest.contains(labels)).then(|| value.parse().ok())?
        };
        Ok(text.lines().filter_map(value).sum::<f64>() as u64)
    }
}

async fn scrape(at: SocketAddr) -> Result<String> {
    let mut tcp = TcpStream::connect(at).await?;
    tcp.write_all(b"GET /stats/prometheus HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await?;
    let mut text = String::new();
    tcp.read_to_string(&mut text).await?;
    Ok(text)
}
