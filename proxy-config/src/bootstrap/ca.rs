//! How the control plane is reached and trusted, and where the workload's certificate comes from.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::proxy_config::ProxyConfig;
use super::{ClientFiles, ControlPlane, POD_ROOT, Refused, Roots, TOKEN, Told, VM_CERTS};

/// Certificates that a CSI driver or an operator puts into a pod.
const CREDENTIALS: &str = "./var/run/secrets/workload-spiffe-credentials";

/// Where the workload's certificate comes from.
#[derive(Debug, Clone, PartialEq)]
pub enum Identity {
    /// Signed on request.
    Ca(Box<Ca>),
    /// Files, watched.
    Files(PemFiles),
    /// A foreign socket that serves it (SPIRE).
    Socket,
}

/// A certificate as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PemFiles {
    /// Chain, leaf first.
    pub chain: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Roots that peers must lead to.
    pub root: PathBuf,
}

/// The certificate authority and what it is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ca {
    /// Where it is.
    pub server: ControlPlane,
    /// Trust domain of the name that is asked for; may be empty, the authority decides.
    pub trust_domain: String,
    /// Namespace of that name.
    pub namespace: String,
    /// Service account of that name.
    pub service_account: String,
    /// Lifetime that is asked for.
    pub ttl: Duration,
    /// Share of the lifetime after which it is renewed, less or more a random part of `rotation_jitter`.
    pub rotation_ratio: f64,
    /// See there.
    pub rotation_jitter: f64,
    /// The key.
    pub key: KeyKind,
    /// Keys are written as PKCS #8.
    pub pkcs8: bool,
    /// Signer that the authority shall use; told even when empty.
    pub cert_signer: String,
}

/// A key to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// RSA of so many bits.
    Rsa(u16),
    /// ECDSA on P-256.
    P256,
    /// ECDSA on P-384.
    P384,
}

impl PemFiles {
    fn in_folder(folder: &str) -> Self {
        let file = |name: &str| Path::new(folder).join(name);
        Self { chain: file("cert-chain.pem"), key: file("key.pem"), root: file("root-cert.pem") }
    }

    fn exist(&self, told: &Told<'_>) -> bool {
        [&self.chain, &self.key, &self.root].into_iter().all(|file| (told.exists)(file))
    }
}

/// istiod's discovery service.
///
/// # Errors
/// Roots that are not there.
pub(super) fn control_plane(
    told: &Told<'_>,
    config: &ProxyConfig,
    warnings: &mut Vec<String>,
) -> Result<ControlPlane, Refused> {
    let variables = &told.variables;
    let text = |name: &str| config.get(name).and_then(Value::as_str).unwrap_or_default();
    let mounted = mounted(told, warnings).is_some();
    let plain = matches!(text("controlPlaneAuthPolicy"), "" | "NONE");
    let roots = if plain { None } else { Some(xds_roots(told, config, mounted)?) };
    Ok(ControlPlane {
        address: text("discoveryAddress").to_owned(),
        name: variables.said("ISTIOD_SAN").map(str::to_owned),
        roots,
        client: client(told, mounted.then_some(config)),
        token: PathBuf::from(TOKEN),
        headers: headers(told, "XDS_HEADER_"),
        keepalive: keepalive(told, warnings),
    })
}

/// `ClusterID` and what the variables with this prefix say.
fn headers(told: &Told<'_>, prefix: &str) -> Vec<(String, String)> {
    let cluster = ("ClusterID".to_owned(), told.variables.or("ISTIO_META_CLUSTER_ID", "").to_owned());
    let more = told.variables.with_prefix(prefix).map(|(name, value)| (name.to_owned(), value.to_owned()));
    std::iter::once(cluster).chain(more).collect()
}

fn keepalive(told: &Told<'_>, warnings: &mut Vec<String>) -> (Duration, Duration) {
    let interval = told.variables.duration("GRPC_KEEPALIVE_INTERVAL", Duration::from_secs(30), warnings);
    (interval, told.variables.duration("GRPC_KEEPALIVE_TIMEOUT", Duration::from_secs(10), warnings))
}

/// The first rule that applies, in the agent's order.
fn xds_roots(told: &Told<'_>, config: &ProxyConfig, mounted: bool) -> Result<Roots, Refused> {
    let variables = &told.variables;
    let vm = Path::new(VM_CERTS).join("root-cert.pem");
    let file = match variables.said("XDS_ROOT_CA") {
        Some("SYSTEM") => return Ok(Roots::System),
        Some(path) => PathBuf::from(path),
        None if (told.exists)(&vm) => vm,
        None => match variables.said("PROV_CERT") {
            Some(folder) => Path::new(folder).join("root-cert.pem"),
            None if mounted => proxy_metadata(config, "ISTIO_META_TLS_CLIENT_ROOT_CERT"),
            None => provided(told, "discovery")?,
        },
    };
    present(told, "discovery", file)
}

fn ca_roots(told: &Told<'_>) -> Result<Roots, Refused> {
    let variables = &told.variables;
    let file = match variables.said("CA_ROOT_CA") {
        Some("SYSTEM") => return Ok(Roots::System),
        Some(path) => PathBuf::from(path),
        None if variables.get("PILOT_CERT_PROVIDER") == Some("custom") => Path::new(VM_CERTS).join("root-cert.pem"),
        None => match variables.said("PROV_CERT") {
            Some(folder) => Path::new(folder).join("root-cert.pem"),
            None => provided(told, "certificates")?,
        },
    };
    present(told, "certificates", file)
}

fn provided(told: &Told<'_>, server: &'static str) -> Result<PathBuf, Refused> {
    match told.variables.get("PILOT_CERT_PROVIDER") {
        Some("none") => Err(Refused::Wrong(format!(
            "root certificate for {server}: PILOT_CERT_PROVIDER none names no file, and neither XDS_ROOT_CA nor CA_ROOT_CA does"
        ))),
        _ => Ok(PathBuf::from(POD_ROOT)),
    }
}

fn present(told: &Told<'_>, server: &'static str, path: PathBuf) -> Result<Roots, Refused> {
    if (told.exists)(&path) { Ok(Roots::File(path)) } else { Err(Refused::NoRoots { server, path }) }
}

fn proxy_metadata(config: &ProxyConfig, name: &str) -> PathBuf {
    let said = config.get("proxyMetadata").and_then(|m| m.get(name)).and_then(Value::as_str);
    PathBuf::from(said.unwrap_or_default())
}

/// Our certificate for the control plane: of `PROV_CERT`, or, `mounted`, the one that the metadata names.
fn client(told: &Told<'_>, mounted: Option<&ProxyConfig>) -> Option<ClientFiles> {
    if let Some(folder) = told.variables.said("PROV_CERT") {
        let files = PemFiles::in_folder(folder);
        return Some(ClientFiles { chain: files.chain, key: files.key });
    }
    let file = |name: &str| Some(proxy_metadata(mounted?, name)).filter(|path| !path.as_os_str().is_empty());
    Some(ClientFiles { chain: file("ISTIO_META_TLS_CLIENT_CERT_CHAIN")?, key: file("ISTIO_META_TLS_CLIENT_KEY")? })
}

/// Files that are the workload's certificate, so that none is asked for.
fn mounted(told: &Told<'_>, warnings: &mut Vec<String>) -> Option<PemFiles> {
    let credentials = PemFiles::in_folder(CREDENTIALS);
    if credentials.exist(told) {
        return Some(credentials);
    }
    told.variables.bool("FILE_MOUNTED_CERTS", false, warnings).then(|| PemFiles::in_folder(VM_CERTS))
}

/// Where the certificate comes from: a foreign socket, mounted files, files on a VM that nobody writes, the authority.
///
/// # Errors
/// Settings that contradict each other, and what is not done here.
pub(super) fn identity(told: &Told<'_>, config: &ProxyConfig, warnings: &mut Vec<String>) -> Result<Identity, Refused> {
    let variables = &told.variables;
    let socket = variables.or("WORKLOAD_IDENTITY_SOCKET_FILE", "socket");
    if socket.is_empty() || socket.contains('/') || socket == ".." {
        return Err(Refused::Wrong(format!("WORKLOAD_IDENTITY_SOCKET_FILE: expected a file's name, not {socket:?}")));
    }
    if variables.said("PROV_CERT").is_some() && variables.bool("FILE_MOUNTED_CERTS", false, &mut Vec::new()) {
        return Err(Refused::Wrong("PROV_CERT and FILE_MOUNTED_CERTS exclude each other".to_owned()));
    }
    if told.identity_socket {
        return Ok(Identity::Socket);
    }
    if socket != "socket" {
        let reason = format!("WORKLOAD_IDENTITY_SOCKET_FILE: nothing answers at the socket {socket}");
        return Err(Refused::Wrong(reason));
    }
    if let Some(files) = mounted(told, &mut Vec::new()) {
        return Ok(Identity::Files(files));
    }
    let on_disk = PemFiles::in_folder(VM_CERTS);
    let written_by_us = variables.said("OUTPUT_CERTS").is_some_and(|folder| same_folder(folder, VM_CERTS));
    if on_disk.exist(told) && !written_by_us {
        return Ok(Identity::Files(on_disk));
    }
    authority(told, config, warnings).map(|ca| Identity::Ca(Box::new(ca)))
}

fn same_folder(one: &str, other: &str) -> bool {
    let plain = |folder: &str| Path::new(folder).components().filter(|c| c.as_os_str() != ".").collect::<PathBuf>();
    plain(one) == plain(other)
}

fn authority(told: &Told<'_>, config: &ProxyConfig, warnings: &mut Vec<String>) -> Result<Ca, Refused> {
    let variables = &told.variables;
    let provider = variables.or("CA_PROVIDER", "Citadel");
    if provider != "Citadel" {
        return Err(Refused::Wrong(format!("CA_PROVIDER: only Citadel is supported, not {provider}")));
    }
    let fetcher = variables.or("CREDENTIAL_FETCHER_TYPE", "JWT");
    if fetcher != "JWT" {
        return Err(Refused::Wrong(format!("CREDENTIAL_FETCHER_TYPE: only JWT is supported, not {fetcher}")));
    }
    let discovery = config.get("discoveryAddress").and_then(Value::as_str).unwrap_or_default();
    let (address, name) = match variables.said("CA_ADDR") {
        Some(address) => (address, None),
        None => (discovery, variables.said("ISTIOD_SAN")),
    };
    let roots = if address.ends_with(":15010") { None } else { Some(ca_roots(told)?) };
    let server = ControlPlane {
        address: address.to_owned(),
        name: name.map(str::to_owned),
        roots,
        client: client(told, None),
        token: PathBuf::from(TOKEN),
        headers: headers(told, "CA_HEADER_"),
        keepalive: keepalive(told, warnings),
    };
    Ok(Ca {
        server,
        trust_domain: variables.or("TRUST_DOMAIN", "cluster.local").to_owned(),
        namespace: variables.or("POD_NAMESPACE", "").to_owned(),
        service_account: variables.or("SERVICE_ACCOUNT", "").to_owned(),
        ttl: variables.duration("SECRET_TTL", Duration::from_secs(86_400), warnings),
        rotation_ratio: variables.fraction("SECRET_GRACE_PERIOD_RATIO", 0.5, warnings),
        rotation_jitter: variables.fraction("SECRET_GRACE_PERIOD_RATIO_JITTER", 0.01, warnings),
        key: key(told, warnings)?,
        pkcs8: variables.bool("PKCS8_KEY", false, warnings),
        cert_signer: variables.or("ISTIO_META_CERT_SIGNER", "").to_owned(),
    })
}

fn key(told: &Told<'_>, warnings: &mut Vec<String>) -> Result<KeyKind, Refused> {
    match (told.variables.or("ECC_SIGNATURE_ALGORITHM", ""), told.variables.or("ECC_CURVE", "P256")) {
        ("", _) => Ok(KeyKind::Rsa(told.variables.number("WORKLOAD_RSA_KEY_SIZE", 2048, warnings))),
        ("ECDSA", "P384") => Ok(KeyKind::P384),
        ("ECDSA", _) => Ok(KeyKind::P256),
        (other, _) => Err(Refused::Wrong(format!("ECC_SIGNATURE_ALGORITHM: only ECDSA is supported, not {other}"))),
    }
}
