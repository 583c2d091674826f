//! Subcommands and their flags; what a failure is worth as an exit code.

mod probe;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand};
use proxy_config::WhoAmI;
use proxy_config::bootstrap::Refused;

use crate::app::{self, ProxyArgs};
use crate::ca::{self, CaArgs};
use crate::control::{Certs, Input, Settings, yaml};
use crate::error::Kind;
use crate::explain::{self, CallArgs};
use crate::iptables::{self, IptablesArgs};
use crate::validate::{self, ValidateArgs};

/// The version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// A command that could not do its work.
const FAILED: u8 = 1;
/// `proxy` that could not start, as pilot-agent says it.
const NOT_STARTED: u8 = 255;

/// A sidecar data-plane proxy for Istio.
#[derive(Debug, Parser)]
#[command(name = "istio-proxy", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve traffic.
    Proxy(Box<ProxyArgs>),
    /// Say what would happen to a call, and why.
    Explain(Box<ExplainArgs>),
    /// Check configuration and print what is wrong with it; exit code 1 when something is.
    Validate(ValidateArgs),
    /// Make a local root and sign workload certificates (demo and tests).
    Ca(CaArgs),
    /// Redirect this network namespace's traffic to the proxy.
    IstioIptables(Box<IptablesArgs>),
    /// Ask an application how it is, as the proxy of a WorkloadGroup does; exit code 1 when it is unhealthy.
    Probe(probe::ProbeArgs),
    /// Print every failure with its response flag, status and details.
    Errors,
    /// Print the version.
    Version {
        /// Only the number.
        #[arg(short, long)]
        short: bool,
    },
}

/// What the program is given; the same for `proxy` and `explain`.
#[derive(Debug, Clone, Default, Args)]
pub struct InputArgs {
    /// Istio and Kubernetes YAML: a file, or a folder with *.yaml and *.yml files. May be repeated.
    #[arg(long, value_name = "PATH", conflicts_with = "xds_dir")]
    pub config: Vec<PathBuf>,
    /// MeshConfig; wins over a mesh.yaml among the files.
    #[arg(long, value_name = "FILE")]
    pub mesh: Option<PathBuf>,
    /// MeshNetworks; wins over a networks.yaml among the files.
    #[arg(long, value_name = "FILE")]
    pub networks: Option<PathBuf>,
    /// Root certificates (PEM) by which https servers of token keys (jwksUri) are checked, instead of the system's.
    #[arg(long, value_name = "FILE")]
    pub jwks_roots: Option<PathBuf>,
    /// Recorded xDS resources instead of YAML: lds, cds, rds, eds, nds, ecds as .pb or .pb.gz.
    #[arg(long, value_name = "DIR")]
    pub xds_dir: Option<PathBuf>,
    /// Who this proxy is: an Envoy Node as JSON. Without it POD_NAME, POD_NAMESPACE, INSTANCE_IP, SERVICE_ACCOUNT and
    /// ISTIO_META_* say so.
    #[arg(long, value_name = "FILE")]
    pub node: Option<PathBuf>,
    /// Folder with cert-chain.pem, key.pem and root-cert.pem; watched.
    #[arg(long, value_name = "DIR")]
    pub certs: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ExplainArgs {
    #[command(flatten)]
    inputs: InputArgs,
    /// Ask a running proxy at its admin address, as in http://127.0.0.1:15000.
    #[arg(long, value_name = "URL", conflicts_with_all = ["config", "xds_dir"])]
    admin: Option<String>,
    /// Calls as JSON, one object a line or an array; - reads standard input.
    #[arg(long, value_name = "FILE|-")]
    calls: Option<PathBuf>,
    /// One JSON answer a line.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    call: CallArgs,
}

impl InputArgs {
    /// Whether configuration is given as files; without them a proxy asks istiod.
    pub fn are_given(&self) -> bool {
        !self.config.is_empty() || self.xds_dir.is_some()
    }

    /// What the control loop is told.
    pub fn settings(&self, variables: BTreeMap<String, String>, certs: Certs) -> Result<Settings> {
        let input = match &self.xds_dir {
            Some(folder) => Input::XdsDir(folder.clone()),
            None if self.config.is_empty() => bail!("nothing to serve: give --config PATH or --xds-dir DIR"),
            None => Input::Yaml(yaml::Paths {
                config: self.config.clone(),
                mesh: self.mesh.clone(),
                networks: self.networks.clone(),
                jwks_roots: self.jwks_roots.clone(),
            }),
        };
        let who = match &self.node {
            Some(file) => {
                WhoAmI::Node(std::fs::read_to_string(file).with_context(|| format!("--node {}", file.display()))?)
            }
            None => WhoAmI::Env(variables),
        };
        Ok(Settings { input, who, certs, publish_health: None })
    }
}

/// Runs the command that the arguments say; returns the exit code. Wrong arguments end the process with 2.
pub fn run(arguments: &[String], variables: BTreeMap<String, String>) -> u8 {
    let (result, failed) = match Cli::parse_from(arguments).command {
        Command::Proxy(args) => (app::run(&args, variables), NOT_STARTED),
        Command::Explain(args) => (explain_calls(&args, variables), FAILED),
        Command::Validate(args) => match validate::run(&args) {
            Ok(clean) => return if clean { 0 } else { FAILED },
            Err(e) => (Err(e), FAILED),
        },
        Command::Ca(args) => (sign(&args), FAILED),
        Command::IstioIptables(args) => (iptables::apply::run(&args, &|name| variables.get(name).cloned()), FAILED),
        Command::Probe(args) => match probe::run(&args) {
            Ok(healthy) => return if healthy { 0 } else { FAILED },
            Err(e) => (Err(e), FAILED),
        },
        Command::Errors => (print(&error_table()), FAILED),
        Command::Version { short } => (print(&version(short)), FAILED),
    };
    let Err(error) = result else { return 0 };
    eprintln!("istio-proxy: {error:#}");
    // The agent ends with 1 when it has nothing to trust the control plane by, and with 255 on any other start that fails.
    let no_roots = matches!(error.downcast_ref(), Some(Refused::NoRoots { .. }));
    if no_roots || error.is::<app::Died>() { FAILED } else { failed }
}

fn explain_calls(args: &ExplainArgs, variables: BTreeMap<String, String>) -> Result<()> {
    let calls = args.call.calls(args.calls.as_deref())?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if let Some(url) = &args.admin {
        return explain::ask_live(url, &calls, args.json, &mut out);
    }
    // Chains are judged by what they ask for, not by whether this machine holds the key: without --certs a certificate
    // is made up, so that an answer does not depend on it.
    let certs = args.inputs.certs.clone().map_or(Certs::MadeUp, Certs::Folder);
    let settings = args.inputs.settings(variables, certs)?;
    explain::run(settings, &calls, args.json, &mut out)
}

fn sign(args: &CaArgs) -> Result<()> {
    let written = ca::run(args)?;
    let lines: Vec<String> = written.iter().map(|folder| format!("{}\n", folder.display())).collect();
    print(&lines.concat())
}

fn version(short: bool) -> String {
    if short { format!("{VERSION}\n") } else { format!("istio-proxy {VERSION}\n") }
}

/// The table of `error.rs`, one line a kind.
fn error_table() -> String {
    let mut table = format!("{:<28} {:<6} {:>6} {:<6} {}\n", "KIND", "FLAG", "STATUS", "BLAMES", "DETAILS");
    for kind in Kind::ALL {
        let row = kind.row();
        let status = if row.status == 0 { "-".to_owned() } else { row.status.to_string() };
        let blames = if row.blames_host { "host" } else { "-" };
        let name = format!("{kind:?}");
        table.push_str(&format!("{name:<28} {:<6} {status:>6} {blames:<6} {}\n", row.flag.to_string(), row.details));
    }
    table
}

fn print(text: &str) -> Result<()> {
    std::io::stdout().lock().write_all(text.as_bytes()).context("standard output")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_table_has_every_kind_once() {
        let table = error_table();
        assert_eq!(table.lines().count(), Kind::ALL.len() + 1);
        assert!(table.contains("NoChain                      NR          - -      filter_chain_not_found"), "{table}");
    }
}
