//! A server of the control plane as operators describe it: files and names. Files are read when they are needed and not
//! before, because others replace them: tokens by kubelet, certificates by ourselves, roots by the mesh's owner.

use std::path::{Path, PathBuf};

use proxy_config::bootstrap::{ClientFiles, ControlPlane, Roots as RootsFrom};
use tonic::metadata::{MetadataKey, MetadataValue};

use super::channel::{Endpoint, Keepalive};
use super::names;
use crate::tls::{ClientTls, Identity, Roots};

/// Server name of a control plane that is reached through a tunnel on this machine (the agent's rule).
const BEHIND_LOCALHOST: &str = "istiod.istio-system.svc";

/// Where a server is and how it is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// `host:port` or `unix:/path`.
    pub address: String,
    /// Name its certificate must carry, and SNI (`ISTIOD_SAN`); `None`: the host of the address, and
    /// `istiod.istio-system.svc` for `localhost`.
    pub name: Option<String>,
    /// What its certificate must lead to. `None`: plaintext.
    pub roots: Option<RootsFrom>,
    /// Our certificate, presented if it is there and has not expired.
    pub client: Option<ClientFiles>,
    /// PINGs.
    pub keepalive: Option<Keepalive>,
}

impl From<&ControlPlane> for Server {
    fn from(said: &ControlPlane) -> Self {
        let (interval, timeout) = said.keepalive;
        Self {
            address: said.address.clone(),
            name: said.name.clone(),
            roots: said.roots.clone(),
            client: said.client.clone(),
            keepalive: Some(Keepalive { interval, timeout }),
        }
    }
}

impl Server {
    /// Reads the files as they are now. A certificate of ours that cannot be read, or has expired, is left out: a
    /// control plane refuses the handshake of an expired one, and a token may do. `now` is seconds since 1970.
    ///
    /// # Errors
    /// When the roots cannot be used: nobody is asked whose answer cannot be trusted.
    pub fn endpoint(&self, now: i64) -> Result<Endpoint, String> {
        let unix = self.address.starts_with("unix:");
        let host = if unix { "localhost" } else { names::split(&self.address)?.0 };
        let name = match self.name.as_deref().unwrap_or(host) {
            "localhost" if !unix => BEHIND_LOCALHOST,
            name => name,
        };
        let tls = self.roots.as_ref().map(|roots| self.context(roots, name, now)).transpose()?;
        // As the agent has it: the name without the port.
        let authority = if name.contains(':') { format!("[{name}]") } else { name.to_owned() };
        Ok(Endpoint { address: self.address.clone(), authority, tls, keepalive: self.keepalive, attempt: 0 })
    }

    fn context(&self, roots: &RootsFrom, name: &str, now: i64) -> Result<ClientTls, String> {
        let roots = match roots {
            RootsFrom::File(path) => Roots::from_file(path)?,
            RootsFrom::System => Roots::system()?,
        };
        ClientTls::to_server(name, roots, self.client.as_ref().and_then(|files| usable(files, now)))
    }
}

/// The certificate, if it may be presented at `now` (seconds since 1970).
fn usable(files: &ClientFiles, now: i64) -> Option<Identity> {
    let told = |e: &String| tracing::debug!("no client certificate for the control plane: {e}");
    let identity = Identity::from_files(&files.chain, &files.key).inspect_err(told).ok()?;
    let expired = identity.info.first().is_none_or(|leaf| leaf.not_after <= now);
    if expired {
        tracing::warn!("{}: expired, not presented to the control plane", files.chain.display());
        return None;
    }
    Some(identity)
}

/// What goes along with every call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// File of the token; a missing or empty one sends none.
    pub token: Option<PathBuf>,
    /// Further metadata, as `ClusterID` and those of `XDS_HEADER_` and `CA_HEADER_`; names are sent in lower case.
    pub headers: Vec<(String, String)>,
}

impl From<&ControlPlane> for Credentials {
    fn from(said: &ControlPlane) -> Self {
        Self { token: Some(said.token.clone()), headers: said.headers.clone() }
    }
}

impl Credentials {
    /// Adds the metadata of this call. What cannot be a header is left out and told.
    #[must_use]
    pub fn sign<T>(&self, mut request: tonic::Request<T>) -> tonic::Request<T> {
        let token =
            self.token.as_deref().and_then(read_token).map(|t| ("authorization".to_owned(), format!("Bearer {t}")));
        for (name, value) in self.headers.iter().cloned().chain(token) {
            let key = MetadataKey::from_bytes(name.to_ascii_lowercase().as_bytes());
            let (Ok(key), Ok(value)) = (key, MetadataValue::try_from(value)) else {
                tracing::warn!("{name}: cannot be sent as gRPC metadata");
                continue;
            };
            request.metadata_mut().append(key, value);
        }
        request
    }
}

fn read_token(path: &Path) -> Option<String> {
    let told = |e: &std::io::Error| tracing::debug!("{}: {e}; no token is sent", path.display());
    let text = std::fs::read_to_string(path).inspect_err(told).ok()?;
    let token = text.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_for_each_call_and_trimmed() {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        let headers = vec![("ClusterID".to_owned(), "Kubernetes".to_owned()), ("bad name".to_owned(), "x".to_owned())];
        let credentials = Credentials { token: Some(token.clone()), headers };
        let sent = || credentials.sign(tonic::Request::new(())).metadata().clone().into_headers();
        assert_eq!(sent().len(), 1);
        assert_eq!(sent()["clusterid"], "Kubernetes");
        std::fs::write(&token, " first\n").unwrap();
        assert_eq!(sent()["authorization"], "Bearer first");
        std::fs::write(&token, "second").unwrap();
        assert_eq!(sent()["authorization"], "Bearer second");
        std::fs::write(&token, "\n").unwrap();
        assert!(!sent().contains_key("authorization"));
    }

    #[test]
    fn roots_are_needed_and_client_certificates_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root-cert.pem");
        let server = Server {
            address: "localhost:15012".to_owned(),
            name: None,
            roots: Some(RootsFrom::File(root.clone())),
            client: Some(ClientFiles { chain: dir.path().join("cert-chain.pem"), key: dir.path().join("key.pem") }),
            keepalive: None,
        };
        assert!(server.endpoint(0).unwrap_err().contains("root-cert.pem"));
        let (ca, _) = crate::ca::Root::generate("test").unwrap();
        std::fs::write(&root, ca.certificate()).unwrap();
        let endpoint = server.endpoint(0).unwrap();
        assert_eq!((&*endpoint.authority, endpoint.tls.unwrap().sni()), (BEHIND_LOCALHOST, BEHIND_LOCALHOST));
        let unix = Server { address: "unix:/tmp/x".to_owned(), roots: None, ..server };
        assert_eq!(unix.endpoint(0).unwrap().authority, "localhost");
    }
}
