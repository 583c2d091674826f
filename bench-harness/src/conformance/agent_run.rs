//! Starts the real binary as `pilot-agent proxy sidecar` is started: variables, a working folder with the agent's files, and a
//! control plane of our own on loopback.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use super::Bench;
use crate::child::Running;
use crate::istiod::{Istiod, NAME};

/// Between two looks at what has no event: files, the end of a process.
const LOOK: Duration = Duration::from_millis(20);

/// A SPIFFE id's parts, as an agent is told them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Workload {
    /// May be empty.
    pub(super) trust_domain: String,
    /// Namespace.
    pub(super) namespace: String,
    /// Service account.
    pub(super) account: String,
}

impl Workload {
    /// From `spiffe://TD/ns/NS/sa/SA`.
    pub(super) fn of(id: &str) -> Option<Self> {
        let parts: Vec<&str> = id.strip_prefix("spiffe://")?.split('/').collect();
        let [trust_domain, "ns", namespace, "sa", account] = parts[..] else { return None };
        let own = str::to_owned;
        Some(Self { trust_domain: own(trust_domain), namespace: own(namespace), account: own(account) })
    }
}

/// A working folder, and later the process in it.
pub(super) struct Agent {
    dir: TempDir,
    variables: BTreeMap<String, String>,
    arguments: Vec<String>,
    process: Option<Running>,
    /// Files that were there before it began, by their inodes: what it writes is another file.
    written: BTreeMap<String, u64>,
}

impl Agent {
    /// A folder with what every agent has: the control plane's root, its address, who it is.
    pub(super) fn new(istiod: &Istiod, who: &Workload) -> Result<Self> {
        let dir = tempfile::tempdir().context("a folder for the agent")?;
        let set = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let discovery = format!("{{\"discoveryAddress\": \"{}\"}}", istiod.address());
        let variables = BTreeMap::from([
            set("POD_NAME", "workload"),
            set("POD_NAMESPACE", &who.namespace),
            set("SERVICE_ACCOUNT", &who.account),
            set("TRUST_DOMAIN", &who.trust_domain),
            set("INSTANCE_IP", "127.0.0.1"),
            set("ISTIO_META_CLUSTER_ID", "Kubernetes"),
            set("ISTIOD_SAN", NAME),
            set("PROXY_CONFIG", &discovery),
        ]);
        Ok(Self { dir, variables, arguments: Vec::new(), process: None, written: BTreeMap::new() })
    }

    /// A path below the working folder.
    pub(super) fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// Writes a file with its folders.
    pub(super) fn write(&mut self, name: &str, text: &str) -> Result<()> {
        let path = self.at(name);
        fs::create_dir_all(path.parent().context("a file has a folder")?)?;
        fs::write(&path, text).with_context(|| path.display().to_string())?;
        // As a user copies it; what the agent writes itself has another mode.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).with_context(|| path.display().to_string())?;
        self.written.insert(name.to_owned(), fs::metadata(&path)?.ino());
        Ok(())
    }

    /// Adds variables.
    pub(super) fn set(&mut self, name: &str, value: &str) {
        self.variables.insert(name.to_owned(), value.to_owned());
    }

    /// Adds many.
    pub(super) fn variables(&mut self, more: BTreeMap<String, String>) {
        self.variables.extend(more);
    }

    /// Adds arguments.
    pub(super) fn arguments(&mut self, more: &[&str]) {
        self.arguments.extend(more.iter().map(|text| (*text).to_owned()));
    }

    /// Adds the variables of a case.
    pub(super) fn set_all(&mut self, env: &Value) {
        for (name, value) in env.as_object().into_iter().flatten() {
            self.set(name, value.as_str().unwrap_or_default());
        }
    }

    /// Starts it. No port is opened: cases of other sets are about those.
    pub(super) fn start(&mut self, bench: &Bench<'_>) -> Result<()> {
        let mut command = Command::new(fs::canonicalize(bench.proxy)?);
        command.args(["proxy", "sidecar", "--admin-port", "0", "--status-port", "0", "--metrics-port", "0"]);
        command.args(&self.arguments);
        command.current_dir(self.dir.path()).env_clear().envs(&self.variables);
        self.process = Some(Running::start(command, &self.at("agent.log"))?);
        Ok(())
    }

    /// Ends it; its folder stays.
    pub(super) fn stop(&mut self) {
        self.process = None;
    }

    /// Its exit code, if it ends in time.
    pub(super) async fn ended(&mut self, within: Duration) -> Option<i32> {
        let end = Instant::now() + within;
        loop {
            if let Some(code) = self.process.as_mut().and_then(Running::code) {
                return Some(code);
            }
            if Instant::now() >= end {
                return None;
            }
            sleep(LOOK).await;
        }
    }

    /// Whether it has ended.
    pub(super) fn is_over(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| !process.is_alive())
    }

    /// Last line that it printed.
    pub(super) fn last_line(&self) -> String {
        let log = self.process.as_ref().map(Running::printed).unwrap_or_default();
        log.lines().last().unwrap_or_default().to_owned()
    }

    /// Waits until a file is there that [`Self::write`] did not write.
    pub(super) async fn sees_new(&self, path: &str, within: Duration) -> bool {
        let end = Instant::now() + within;
        let file = || fs::metadata(self.at(path)).ok().map(|m| m.ino());
        while file().is_none() || file() == self.written.get(path).copied() {
            if Instant::now() >= end {
                return false;
            }
            sleep(LOOK).await;
        }
        true
    }
}

/// Mode of a path as the recordings write it.
pub(super) fn mode(path: &Path) -> Option<String> {
    fs::metadata(path).ok().map(|m| format!("0o{:o}", m.permissions().mode()))
}
