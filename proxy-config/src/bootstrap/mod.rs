//! Everything that a proxy under a control plane is started with, from what pilot-agent is given: variables, a mesh file,
//! flags, the files of the downward API, the machine's addresses.
//!
//! Texts and facts go in, a [`Bootstrap`] comes out; nothing is read from the process or the disk here. Names of
//! variables, files and defaults are the agent's, so that its images, units and start scripts stay as they are.
//!
//! [`node`] reads less of it: who a proxy is that is given its configuration as files.

mod ca;
pub mod downward;
pub mod metadata;
mod node;
pub mod proxy_config;
mod schema;
mod variables;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

pub use ca::{Ca, Identity, KeyKind, PemFiles};
pub(crate) use node::parse_locality;
pub use node::{Node, node};
pub use proxy_config::ProxyConfig;
pub use variables::Variables;

use crate::Source;
use crate::istio::common::parse_duration;

/// Where a service account's token is, whatever `JWT_POLICY` says (the agent's rule).
pub const TOKEN: &str = "./var/run/secrets/tokens/istio-token";
/// Root of the control plane in a pod.
pub const POD_ROOT: &str = "./var/run/secrets/istio/root-cert.pem";
/// Folder of certificates on a VM.
pub const VM_CERTS: &str = "./etc/certs";
/// Folder of the socket that serves certificates.
pub const IDENTITY_FOLDER: &str = "./var/run/secrets/workload-spiffe-uds";
/// The version of Istio whose sidecars this program behaves as; istiod leaves out what older ones do not know.
pub const ISTIO_VERSION: &str = "1.31.0";

/// What the agent is given.
pub struct Told<'a> {
    /// The environment.
    pub variables: Variables,
    /// Flags of `proxy`.
    pub flags: Flags,
    /// The mesh file (`--meshConfig`), if it is there.
    pub mesh: Option<Source>,
    /// `./etc/istio/pod/labels`, if it is there.
    pub labels: Option<String>,
    /// `./etc/istio/pod/annotations`, if it is there.
    pub annotations: Option<String>,
    /// Interfaces that are up and not loopback, with their addresses that are not link-local, as the kernel lists them.
    pub addresses: Vec<(String, IpAddr)>,
    /// Whether a file is there.
    pub exists: &'a dyn Fn(&Path) -> bool,
    /// A socket that serves credentials to gateways is there and answers.
    pub credential_socket: bool,
    /// A foreign socket that serves this workload's certificate is there and answers.
    pub identity_socket: bool,
}

/// Flags of `proxy` that shape the node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flags {
    /// `--domain`; empty is `NAMESPACE.svc.cluster.local`.
    pub domain: String,
    /// `--serviceCluster`; empty is `istio-proxy`.
    pub service_cluster: String,
    /// `--concurrency`; 0 is what ProxyConfig says.
    pub concurrency: u32,
    /// `--outlierLogPath`.
    pub outlier_log_path: String,
    /// `--stsPort`; nothing listens, it is only told.
    pub sts_port: u16,
}

/// What the proxy is started with.
#[derive(Debug, Clone, PartialEq)]
pub struct Bootstrap {
    /// Who it says it is.
    pub node: Node,
    /// The effective ProxyConfig, in protojson.
    pub proxy_config: ProxyConfig,
    /// The control plane.
    pub xds: ControlPlane,
    /// Incremental discovery (`ISTIO_DELTA_XDS`).
    pub delta: bool,
    /// Settings may be pushed too (`PROXY_CONFIG_XDS_AGENT`).
    pub pushed_proxy_config: bool,
    /// Where the workload's certificate comes from.
    pub identity: Identity,
    /// Folder that gets the certificate as files (`OUTPUT_CERTS`).
    pub output_certs: Option<PathBuf>,
    /// Written certificates are for everybody to read: in a pod their folder is its own.
    pub output_for_all: bool,
    /// Socket that serves certificates to others, or, with [`Identity::Socket`], to us.
    pub identity_socket: PathBuf,
    /// How long a file must be quiet before it is read again, and the first delay of a retry.
    pub file_debounce: Duration,
    /// Ports of the proxy itself.
    pub ports: Ports,
    /// Worker threads, when somebody says.
    pub concurrency: Option<usize>,
    /// Limit on connections of all listeners, when somebody says.
    pub connection_limit: Option<u64>,
    /// The goodbye.
    pub drain: Drain,
    /// DNS proxy, when it runs.
    pub dns: Option<Dns>,
    /// How the application is asked whether it serves: `readinessProbe`, in protojson.
    pub readiness_probe: Option<Value>,
    /// Probes go to `localhost` where they name no host, instead of the proxy's own address.
    pub probe_localhost: bool,
    /// Metrics are for this machine alone.
    pub metrics_local: bool,
    /// What was said and is not followed.
    pub warnings: Vec<String>,
}

impl Bootstrap {
    /// The proxy's own folder, which it may write to (ProxyConfig's `configPath`).
    pub fn config_path(&self) -> PathBuf {
        self.proxy_config.get("configPath").and_then(Value::as_str).unwrap_or("./etc/istio/proxy").into()
    }
}

/// A server of the control plane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlPlane {
    /// `host:port`.
    pub address: String,
    /// Name of its certificate; `None` is the host of the address.
    pub name: Option<String>,
    /// What its certificate must lead to; `None` is plaintext.
    pub roots: Option<Roots>,
    /// Our certificate for it, when there is one to be had.
    pub client: Option<ClientFiles>,
    /// Token that goes along.
    pub token: PathBuf,
    /// Metadata that goes along, names as the variables have them.
    pub headers: Vec<(String, String)>,
    /// Silence before a PING, and how long its answer may take.
    pub keepalive: (Duration, Duration),
}

/// Where roots are read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Roots {
    /// Those of the operating system (`SYSTEM`).
    System,
    /// A PEM file.
    File(PathBuf),
}

/// A certificate for the control plane, as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientFiles {
    /// Chain, leaf first.
    pub chain: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Ports; 0 is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Admin (`proxyAdminPort`), on loopback.
    pub admin: u16,
    /// Readiness and probes of the application (`statusPort`).
    pub status: u16,
    /// Readiness alone (`ENVOY_STATUS_PORT`).
    pub ready: u16,
    /// Metrics (`ENVOY_PROMETHEUS_PORT`).
    pub metrics: u16,
}

/// A goodbye.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Over this time peers are told to leave (`drainDuration`).
    pub drain: Duration,
    /// After this time it is over (`terminationDrainDuration`).
    pub termination: Duration,
    /// It takes at least this long, when it waits for connections (`MINIMUM_DRAIN_DURATION`).
    pub minimum: Duration,
    /// It waits for connections (`EXIT_ON_ZERO_ACTIVE_CONNECTIONS`).
    pub exit_on_zero: bool,
}

/// The DNS proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dns {
    /// `host:port` it listens on; `localhost` is one of both families or both.
    pub listen: String,
    /// All servers are asked at once.
    pub parallel: bool,
    /// How long a server may take.
    pub timeout: Duration,
}

/// Why a proxy cannot be started with what it was told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Something that cannot be meant, named with its place.
    #[error("{0}")]
    Wrong(String),
    /// The file that the control plane is trusted by is not there.
    #[error("root certificate for {server}: {} is not there", path.display())]
    NoRoots {
        /// Whose.
        server: &'static str,
        /// The file.
        path: PathBuf,
    },
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Self::Wrong(reason)
    }
}

/// Puts together what the agent would.
///
/// # Errors
/// What the agent would not start with either, and what is asked for and not done here, both by name.
pub fn bootstrap(told: Told<'_>) -> Result<Bootstrap, Refused> {
    let mut warnings = Vec::new();
    let annotations = downward_file("annotations", told.annotations.as_deref(), &mut warnings);
    let labels = downward_file("labels", told.labels.as_deref(), &mut warnings);
    let config = effective(&told, annotations.as_ref(), &mut warnings)?;
    let variables = &told.variables;
    let node = who(&told, &config, labels, annotations, &mut warnings)?;
    let xds = ca::control_plane(&told, &config, &mut warnings)?;
    let identity = ca::identity(&told, &config, &mut warnings)?;
    let number = |name: &str| config.get(name).and_then(Value::as_i64).and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
    let duration = |name: &str| config.get(name).and_then(Value::as_str).and_then(parse_duration).unwrap_or_default();
    let ports = Ports {
        admin: number("proxyAdminPort"),
        status: number("statusPort"),
        ready: variables.number("ENVOY_STATUS_PORT", 15021, &mut Vec::new()),
        metrics: variables.number("ENVOY_PROMETHEUS_PORT", 15090, &mut Vec::new()),
    };
    let drain = Drain {
        drain: duration("drainDuration"),
        termination: duration("terminationDrainDuration"),
        minimum: variables.duration("MINIMUM_DRAIN_DURATION", Duration::from_secs(5), &mut warnings),
        exit_on_zero: variables.bool("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", false, &mut Vec::new()),
    };
    let metadata = config.get("proxyMetadata");
    let metadata = |name: &str| metadata.and_then(|m| m.get(name)).and_then(Value::as_str);
    let socket = variables.or("WORKLOAD_IDENTITY_SOCKET_FILE", "socket");
    Ok(Bootstrap {
        xds,
        delta: variables.bool("ISTIO_DELTA_XDS", true, &mut warnings),
        pushed_proxy_config: variables.bool("PROXY_CONFIG_XDS_AGENT", false, &mut warnings),
        identity,
        output_certs: variables.said("OUTPUT_CERTS").map(PathBuf::from),
        output_for_all: variables.said("KUBERNETES_SERVICE_HOST").is_some(),
        identity_socket: Path::new(IDENTITY_FOLDER).join(socket),
        file_debounce: variables.duration("FILE_DEBOUNCE_DURATION", Duration::from_millis(100), &mut warnings),
        ports,
        concurrency: config
            .get("concurrency")
            .and_then(Value::as_u64)
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| *n > 0),
        connection_limit: metadata::connection_limit(&config),
        drain,
        dns: dns(variables, &mut warnings),
        readiness_probe: config.get("readinessProbe").cloned(),
        probe_localhost: variables.bool("REWRITE_PROBE_LEGACY_LOCALHOST_DESTINATION", false, &mut warnings),
        metrics_local: metadata("METRICS_LOCALHOST_ACCESS_ONLY")
            .or_else(|| variables.get("METRICS_LOCALHOST_ACCESS_ONLY"))
            == Some("true"),
        node,
        proxy_config: config,
        warnings,
    })
}

/// A file of the downward API; a broken one counts as absent.
fn downward_file(name: &str, text: Option<&str>, warnings: &mut Vec<String>) -> Option<BTreeMap<String, String>> {
    match downward::parse(text?) {
        Ok(read) => Some(read),
        Err(e) => {
            warnings.push(format!("./etc/istio/pod/{name}:{e}"));
            None
        }
    }
}

/// Defaults, the mesh file, `PROXY_CONFIG`, the annotation, what flags and limits add; later ones win.
fn effective(
    told: &Told<'_>,
    annotations: Option<&BTreeMap<String, String>>,
    warnings: &mut Vec<String>,
) -> Result<ProxyConfig, String> {
    let annotation = |name: &str| annotations.and_then(|a| a.get(name)).filter(|text| !text.is_empty());
    let mut config = proxy_config::defaults();
    if let Some(mesh) = &told.mesh {
        proxy_config::overlay_text(&mut config, mesh, Some("defaultConfig"), warnings)?;
    }
    let env = told.variables.said("PROXY_CONFIG").map(|text| ("PROXY_CONFIG", text.to_owned()));
    let annotated = annotation("proxy.istio.io/config").map(|text| ("annotation proxy.istio.io/config", text.clone()));
    for (name, text) in env.into_iter().chain(annotated) {
        let source = Source { name: name.to_owned(), text };
        proxy_config::overlay_text(&mut config, &source, None, warnings)?;
    }
    let limit = told.variables.number("ISTIO_CPU_LIMIT", 0, warnings);
    if limit != 0 && !config.contains_key("concurrency") {
        config.insert("concurrency".to_owned(), limit.into());
    }
    if told.flags.concurrency != 0 {
        config.insert("concurrency".to_owned(), told.flags.concurrency.into());
    }
    if config.get("serviceCluster").and_then(Value::as_str) == Some("") {
        let flag = Some(told.flags.service_cluster.as_str()).filter(|flag| !flag.is_empty());
        config.insert("serviceCluster".to_owned(), flag.unwrap_or("istio-proxy").into());
    }
    if let Some(address) = annotation("sidecar.istio.io/discoveryAddress") {
        config.insert("discoveryAddress".to_owned(), address.as_str().into());
    }
    if let Some(text) = annotation("status.sidecar.istio.io/port") {
        let port: u16 = text
            .parse()
            .map_err(|_| format!("annotation status.sidecar.istio.io/port: expected a port, not {text}"))?;
        match port {
            0 => config.remove("statusPort"),
            port => config.insert("statusPort".to_owned(), port.into()),
        };
    }
    checked(&config)?;
    Ok(config)
}

/// What the agent checks before it starts, as far as it matters here.
fn checked(config: &ProxyConfig) -> Result<(), String> {
    let address = config.get("discoveryAddress").and_then(Value::as_str).unwrap_or_default();
    let port =
        address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    if port.is_none_or(|port| port == 0) {
        return Err(format!("discoveryAddress: expected host:port, not {address:?}"));
    }
    for name in ["proxyAdminPort", "statusPort"] {
        if let Some(port) = config.get(name).filter(|n| n.as_u64().is_none_or(|n| n > 65_535)) {
            return Err(format!("{name}: expected a port, not {port}"));
        }
    }
    Ok(())
}

/// Addresses of the proxy: the one that it is told, then those of the machine's interfaces.
fn addresses(told: &Told<'_>, annotations: Option<&BTreeMap<String, String>>) -> Vec<IpAddr> {
    let mut out: Vec<IpAddr> = told.variables.said("INSTANCE_IP").and_then(|ip| ip.parse().ok()).into_iter().collect();
    let excluded = annotations.and_then(|a| a.get("traffic.sidecar.istio.io/excludeInterfaces"));
    let excluded: Vec<&str> = excluded.map(|names| names.split(',').collect()).unwrap_or_default();
    let is_excluded = |ip: &IpAddr| told.addresses.iter().any(|(name, a)| a == ip && excluded.contains(&name.as_str()));
    let own: Vec<IpAddr> = match told.addresses.is_empty() {
        true => vec![IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])],
        false => told.addresses.iter().map(|(_, ip)| *ip).collect(),
    };
    for ip in own {
        if !out.contains(&ip) && !is_excluded(&ip) {
            out.push(ip);
        }
    }
    out
}

fn who(
    told: &Told<'_>,
    config: &ProxyConfig,
    labels: Option<BTreeMap<String, String>>,
    annotations: Option<BTreeMap<String, String>>,
    warnings: &mut Vec<String>,
) -> Result<Node, String> {
    let variables = &told.variables;
    let ips = addresses(told, annotations.as_ref());
    let policy = config.get("controlPlaneAuthPolicy").and_then(Value::as_str);
    let pilot_sans = match policy {
        Some("MUTUAL_TLS") => vec![pilot_san(config)],
        _ => Vec::new(),
    };
    let parts = metadata::Parts {
        proxy_config: config.clone(),
        labels,
        annotations,
        ips: &ips,
        pilot_sans,
        version: ISTIO_VERSION,
        outlier_log_path: &told.flags.outlier_log_path,
        sts_port: told.flags.sts_port,
        credential_socket: told.credential_socket,
        file_credentials: told.identity_socket,
    };
    let built = metadata::build(parts, variables, warnings)?;
    let namespace = variables.or("POD_NAMESPACE", "").to_owned();
    let dns_domain = match told.flags.domain.as_str() {
        "" => format!("{namespace}.svc.cluster.local"),
        domain => domain.to_owned(),
    };
    Ok(Node {
        name: variables.or("POD_NAME", "").to_owned(),
        namespace,
        ips,
        dns_domain,
        service_cluster: metadata::service_cluster(config, &built.metadata),
        locality: built.locality,
        metadata: built.metadata,
    })
}

/// The host that istiod's certificate is expected to name.
fn pilot_san(config: &ProxyConfig) -> String {
    let address = config.get("discoveryAddress").and_then(Value::as_str).unwrap_or_default();
    match address.split(':').next().unwrap_or_default() {
        "localhost" => "istiod.istio-system.svc".to_owned(),
        host => host.to_owned(),
    }
}

fn dns(variables: &Variables, warnings: &mut Vec<String>) -> Option<Dns> {
    let listen = variables.or("DNS_PROXY_ADDR", "localhost:15053").to_owned();
    let parallel = variables.bool("DNS_FORWARD_PARALLEL", false, warnings);
    let timeout = variables.duration("DNS_FORWARD_TIMEOUT", Duration::from_secs(5), warnings);
    let runs = ["ISTIO_META_DNS_CAPTURE", "ISTIO_META_ENABLE_DNS_SERVER"];
    let runs = runs.into_iter().any(|name| variables.bool(name, false, warnings));
    runs.then_some(Dns { listen, parallel, timeout })
}

#[cfg(test)]
mod tests;
