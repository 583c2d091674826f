//! Key material from files: the workload's certificate, and whatever `file-…` names configuration speaks of.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use proxy_config::bootstrap::PemFiles;
use proxy_config::model::{ClusterKind, CommonTls, Transport};
use proxy_config::xds::Secret;
use proxy_config::{Model, Name, Reject, Severity};
use tokio::sync::watch;

use crate::ca::Root;
use crate::identity::News;
use crate::tls::{Identity, Roots, Secrets, SpiffeId};

/// SDS names of the workload's own material.
const WORKLOAD: &str = "default";
const MESH_ROOTS: &str = "ROOTCA";
const DAY: Duration = Duration::from_secs(86_400);

/// Where the workload's certificate comes from.
#[derive(Debug, Clone)]
pub enum Certs {
    /// There is none: chains and clusters that need one cannot serve.
    None,
    /// `cert-chain.pem`, `key.pem`, `root-cert.pem`.
    Folder(PathBuf),
    /// Files that somebody mounts and replaces.
    Mounted {
        /// The files.
        files: PemFiles,
        /// Revocation lists of the mesh's CAs; none while the file is not there.
        revoked: Option<PathBuf>,
        /// Further CAs that the mesh trusts, PEM, as the control plane says them.
        anchors: Option<watch::Receiver<Vec<String>>>,
    },
    /// Asked for while we run; until it comes, what needs it cannot serve.
    Issued {
        /// What there is.
        news: watch::Receiver<News>,
        /// Revocation lists of the mesh's CAs; none while the file is not there.
        revoked: Option<PathBuf>,
    },
    /// Made up on the spot, for questions that no peer will ever see.
    MadeUp,
}

impl Certs {
    /// What is there now. Material that did not change keeps its contexts.
    pub(super) fn renewed(&self, old: &Secrets) -> Result<Secrets> {
        match self {
            Self::None => Ok(old.clone()),
            Self::Folder(folder) => old.renewed(folder).map_err(|e| anyhow!(e)),
            Self::Mounted { files, revoked, anchors } => {
                let identity = Identity::from_files(&files.chain, &files.key).map_err(|e| anyhow!(e))?;
                let more = anchors.as_ref().map(|anchors| anchors.borrow().clone()).unwrap_or_default();
                let roots = Roots::from_file_and(&files.root, &more).map_err(|e| anyhow!(e))?;
                with_revoked(old.with_identity(WORKLOAD, identity).with_roots(MESH_ROOTS, roots), revoked.as_deref())
            }
            Self::Issued { news, revoked } => with_revoked(old.updated(&news.borrow().secrets), revoked.as_deref()),
            Self::MadeUp if old.identity(WORKLOAD).is_some() => Ok(old.clone()),
            Self::MadeUp => {
                let id: SpiffeId =
                    "spiffe://cluster.local/ns/default/sa/default".parse().map_err(|e| anyhow!("{e}"))?;
                let (root, _) = Root::generate("made up")?;
                let (chain, key) = root.sign(&id, DAY)?;
                let identity = Identity::from_pem(chain.as_bytes(), key.as_bytes()).map_err(|e| anyhow!(e))?;
                let roots = Roots::from_pem(root.certificate().as_bytes()).map_err(|e| anyhow!(e))?;
                Ok(old.with_identity(WORKLOAD, identity).with_roots(MESH_ROOTS, roots))
            }
        }
    }

    /// What keeps a newer certificate away.
    pub(super) fn trouble(&self) -> Option<String> {
        let Self::Issued { news, .. } = self else { return None };
        news.borrow().trouble.clone()
    }

    /// What this proxy must have before it gets traffic and does not have yet.
    pub(super) fn awaited(&self, secrets: &Secrets) -> Option<String> {
        let Self::Issued { .. } = self else { return None };
        if secrets.identity(WORKLOAD).is_some() && secrets.roots(MESH_ROOTS).is_some() {
            return None;
        }
        let why = self.trouble().map_or_else(String::new, |why| format!(": {why}"));
        Some(format!("no workload certificate yet{why}"))
    }

    /// Waits for news of the certificate; for ever, where files tell.
    pub(super) fn changes(&self) -> Option<watch::Receiver<News>> {
        let Self::Issued { news, .. } = self else { return None };
        Some(news.clone())
    }

    /// Waits for other CAs that the mesh trusts, where files hold the rest; for ever, where nobody says them.
    pub(super) fn anchors(&self) -> Option<watch::Receiver<Vec<String>>> {
        let Self::Mounted { anchors, .. } = self else { return None };
        anchors.clone()
    }

    /// The files that are read.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        match self {
            Self::Mounted { files, revoked, .. } => {
                [&files.chain, &files.key, &files.root].into_iter().chain(revoked).cloned().collect()
            }
            Self::Issued { revoked, .. } => revoked.iter().cloned().collect(),
            Self::Folder(folder) => {
                ["cert-chain.pem", "key.pem", "root-cert.pem"].iter().map(|name| folder.join(name)).collect()
            }
            Self::None | Self::MadeUp => Vec::new(),
        }
    }
}

/// Adds the revocation lists, while there are any. A list that cannot be read lets nothing new in: revoked peers would be
/// among it.
fn with_revoked(secrets: Secrets, path: Option<&Path>) -> Result<Secrets> {
    let (Some(path), Some(roots)) = (path, secrets.roots(MESH_ROOTS)) else { return Ok(secrets) };
    let lists = match std::fs::read(path) {
        Ok(lists) => lists,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(secrets),
        Err(e) => bail!("{}: {e}", path.display()),
    };
    let roots = roots.with_revoked(&lists).map_err(|e| anyhow!("{}: {e}", path.display()))?;
    Ok(secrets.with_roots(MESH_ROOTS, roots))
}

/// The files that the model names.
pub(super) fn files(model: &Model) -> Vec<PathBuf> {
    let of = |name: &Name| -> Vec<PathBuf> {
        let paths = name.strip_prefix("file-cert:").or_else(|| name.strip_prefix("file-root:"));
        paths.into_iter().flat_map(|paths| paths.split('~')).map(PathBuf::from).collect()
    };
    let names = names(model);
    names.certificates.iter().chain(&names.roots).flat_map(of).collect()
}

/// Adds the files that the model names; a file that cannot be read leaves what it had. With `made_up` whatever is
/// missing gets the mesh's own, so that no answer depends on whose machine asks.
pub(super) fn with_files(mut secrets: Secrets, model: &Model, made_up: bool) -> (Secrets, Vec<Reject>) {
    let mut rejects = Vec::new();
    let names = names(model);
    if made_up {
        return (secrets.with_own_for(&names.certificates, &names.roots), rejects);
    }
    for name in names.certificates.union(&names.roots) {
        match secrets.with_files(name) {
            Ok(next) => secrets = next,
            Err(reason) => rejects.push(Reject {
                resource: format!("Secret {name}"),
                place: None,
                field: String::new(),
                reason,
                severity: Severity::Error,
                code: None,
            }),
        }
    }
    (secrets, rejects)
}

/// Adds what came over the stream; what cannot be used leaves what it had.
pub(super) fn with_streamed(mut secrets: Secrets, streamed: &BTreeMap<Name, Arc<Secret>>) -> (Secrets, Vec<Reject>) {
    let mut rejects = Vec::new();
    for (name, secret) in streamed {
        match secrets.with_material(name, &secret.material) {
            Ok(next) => secrets = next,
            Err(reason) => rejects.push(Reject {
                resource: format!("Secret {name}"),
                place: None,
                field: String::new(),
                reason,
                severity: Severity::Error,
                code: None,
            }),
        }
    }
    (secrets, rejects)
}

/// SDS names.
#[derive(Default)]
struct Names {
    certificates: BTreeSet<Name>,
    roots: BTreeSet<Name>,
}

/// Every SDS name in the model.
fn names(model: &Model) -> Names {
    let mut names = Names::default();
    for listener in model.listeners.values() {
        let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
        chains.filter_map(|chain| chain.tls.as_ref()).for_each(|tls| names.of(&tls.common));
    }
    for cluster in model.clusters.values().filter(|c| !matches!(c.kind, ClusterKind::DynamicForwardProxy)) {
        let sockets = cluster.transport_matches.iter().map(|m| &m.transport).chain([&cluster.transport]);
        sockets.filter_map(upstream_tls).for_each(|tls| names.of(tls));
    }
    names
}

impl Names {
    fn of(&mut self, tls: &CommonTls) {
        self.certificates.extend(tls.certificates.iter().cloned());
        self.roots.extend(tls.validation.iter().filter_map(|v| v.roots.clone()));
    }
}

fn upstream_tls(transport: &Transport) -> Option<&CommonTls> {
    match transport {
        Transport::Tls(tls) => Some(&tls.common),
        Transport::ProxyProtocol(_, inner) => upstream_tls(inner),
        Transport::Raw | Transport::Unsupported(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proxy_config::model::{Address, Direction, DownstreamTls, FilterChain, Listener, Validation};

    use super::*;

    fn listener(certificate: &str, roots: &str) -> Listener {
        let validation = Some(Validation { roots: Some(roots.into()), ..Validation::default() });
        let common = CommonTls { certificates: vec![certificate.into()], validation, ..CommonTls::default() };
        let tls = Some(DownstreamTls { common, require_client_certificate: true });
        Listener {
            name: "in".into(),
            address: Address::Pipe(String::new()),
            additional_addresses: Vec::new(),
            direction: Direction::Inbound,
            bind_to_port: true,
            use_original_dst: false,
            transparent: false,
            listener_filters: Vec::new(),
            listener_filters_timeout: None,
            continue_on_listener_filters_timeout: false,
            filter_chains: vec![FilterChain { tls, ..FilterChain::default() }],
            default_filter_chain: None,
            access_log: Vec::new(),
            exact_balance: false,
            max_accepts_per_event: None,
        }
    }

    #[test]
    fn files_are_read_and_missing_ones_are_told_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let (root, _) = Root::generate("test").unwrap();
        root.sign_into(dir.path(), &"spiffe://td/ns/a/sa/b".parse().unwrap(), DAY).unwrap();
        let at = |file: &str| dir.path().join(file).display().to_string();
        let cert = format!("file-cert:{}~{}", at("cert-chain.pem"), at("key.pem"));
        let mut model = Model::default();
        model.listeners.insert("in".into(), Arc::new(listener(&cert, "file-root:/nowhere.pem")));
        let (secrets, rejects) = with_files(Secrets::new(), &model, false);
        assert!(secrets.identity(&cert).is_some());
        let told: Vec<String> = rejects.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 1, "{told:?}");
        assert!(told[0].starts_with("Secret file-root:/nowhere.pem: /nowhere.pem: No such file"), "{}", told[0]);
    }

    #[test]
    fn made_up_material_stands_in_for_every_name() {
        let mut model = Model::default();
        model.listeners.insert("in".into(), Arc::new(listener("file-cert:a.pem~b.pem", "kubernetes://x-cacert")));
        let mesh = Certs::MadeUp.renewed(&Secrets::new()).unwrap();
        let (secrets, rejects) = with_files(mesh, &model, true);
        assert!(rejects.is_empty());
        assert!(
            secrets.identity("file-cert:a.pem~b.pem").is_some() && secrets.roots("kubernetes://x-cacert").is_some()
        );
    }

    #[test]
    fn a_made_up_certificate_stays_the_same() {
        let first = Certs::MadeUp.renewed(&Secrets::new()).unwrap();
        assert!(first.roots("ROOTCA").is_some());
        assert!(Certs::MadeUp.renewed(&first).unwrap() == first);
    }
}
