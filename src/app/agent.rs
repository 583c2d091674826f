//! The start under a control plane: what pilot-agent is given, from where it lies on this machine.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use proxy_config::Source;
use proxy_config::bootstrap::{self, Bootstrap, Flags, Told, Variables};

use crate::net::interfaces;

/// Labels and annotations that the platform writes.
const POD_FILES: &str = "./etc/istio/pod";
/// Socket of a provider of gateway credentials.
const CREDENTIALS: &str = "./var/run/secrets/credential-uds/socket";

/// Flags of `pilot-agent proxy`, by their names there.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Under istiod")]
pub(super) struct AgentArgs {
    /// DNS suffix of the workload's services [default: NAMESPACE.svc.cluster.local].
    #[arg(long, value_name = "SUFFIX", default_value = "", hide_default_value = true)]
    pub(super) domain: String,
    /// Mesh configuration, of which defaultConfig is read.
    #[arg(long = "meshConfig", value_name = "FILE", default_value = "./etc/istio/config/mesh")]
    pub(super) mesh_config: PathBuf,
    /// Service cluster when ProxyConfig has an empty one.
    #[arg(long = "serviceCluster", value_name = "NAME", default_value = "istio-proxy")]
    pub(super) service_cluster: String,
    /// Level of what handles traffic: trace, debug, info, warning, error, critical or off, also `warning,upstream:debug`.
    #[arg(long = "proxyLogLevel", value_name = "LEVEL")]
    pub(super) proxy_log_level: Option<String>,
    /// Levels of parts of it, as in `misc:error`.
    #[arg(long = "proxyComponentLogLevel", value_name = "LEVELS")]
    pub(super) proxy_component_log_level: Option<String>,
    /// Level of everything else, by scope, as in `default:info,xdsproxy:debug`.
    #[arg(long = "log_output_level", value_name = "LEVELS")]
    pub(super) log_output_level: Option<String>,
    /// Told to istiod.
    #[arg(long = "outlierLogPath", value_name = "PATH", default_value = "", hide_default_value = true)]
    pub(super) outlier_log_path: String,
    /// Told to istiod; nothing listens.
    #[arg(long = "stsPort", value_name = "PORT", default_value_t = 0, hide_default_value = true)]
    pub(super) sts_port: u16,
    /// Without effect, for templates that pass them.
    #[command(flatten)]
    pub(super) ignored: Ignored,
}

/// Flags of the agent that mean nothing here.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct Ignored {
    #[arg(long = "tokenManagerPlugin", hide = true)]
    token_manager_plugin: Option<String>,
    #[arg(long, hide = true, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    profiling: Option<bool>,
    #[arg(long = "log_caller", hide = true)]
    log_caller: Option<String>,
    #[arg(long = "log_stacktrace_level", hide = true)]
    log_stacktrace_level: Option<String>,
    #[arg(long = "log_target", hide = true)]
    log_target: Option<String>,
    #[arg(long, hide = true)]
    vklog: Option<String>,
}

/// Reads everything and puts it together. `concurrency` is the flag's, 0 when it is not given.
///
/// # Errors
/// What keeps the agent from starting too; a [`bootstrap::Refused`] is its cause where it is what was said.
pub(super) fn bootstrap(
    args: &AgentArgs,
    variables: &BTreeMap<String, String>,
    concurrency: usize,
) -> Result<Bootstrap> {
    let mesh = read(&args.mesh_config)?;
    let identity = Path::new(bootstrap::IDENTITY_FOLDER);
    let socket = variables.get("WORKLOAD_IDENTITY_SOCKET_FILE").map_or("socket", String::as_str);
    let told = Told {
        variables: Variables(variables.clone()),
        flags: Flags {
            domain: args.domain.clone(),
            service_cluster: args.service_cluster.clone(),
            concurrency: u32::try_from(concurrency).unwrap_or(u32::MAX),
            outlier_log_path: args.outlier_log_path.clone(),
            sts_port: args.sts_port,
        },
        mesh: mesh.map(|text| Source { name: args.mesh_config.display().to_string(), text }),
        labels: read(&Path::new(POD_FILES).join("labels"))?,
        annotations: read(&Path::new(POD_FILES).join("annotations"))?,
        addresses: interfaces::addresses().context("this machine's addresses")?,
        exists: &|path| path.exists(),
        credential_socket: alive(Path::new(CREDENTIALS))?,
        identity_socket: alive(&identity.join(socket))?,
    };
    let made = bootstrap::bootstrap(told)?;
    for warning in &made.warnings {
        tracing::warn!("{warning}");
    }
    tracing::info!("node {}, service cluster {}", made.node.id(), made.node.service_cluster);
    Ok(made)
}

/// A file's text; `None` when it is not there.
fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| path.display().to_string()),
    }
}

/// Whether somebody listens at a socket. A socket that nobody listens at is left from a crash and is removed.
fn alive(path: &Path) -> Result<bool> {
    let there = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket() || m.file_type().is_symlink());
    if !there {
        return Ok(false);
    }
    if UnixStream::connect(path).is_ok() {
        return Ok(true);
    }
    fs::remove_file(path).with_context(|| format!("{}: nobody listens, and it cannot be removed", path.display()))?;
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_nobody_listens_at_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        assert!(!alive(&path).unwrap());
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(alive(&path).unwrap());
        drop(listener);
        assert!(!alive(&path).unwrap() && !path.exists());
    }

    #[test]
    fn a_file_may_be_absent_but_not_unreadable() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(&dir.path().join("none")).unwrap(), None);
        assert!(read(dir.path()).unwrap_err().to_string().contains("tmp"));
    }
}
