//! A small local certificate authority, for demos and tests: one root, workload certificates signed by it.
//!
//! Not a replacement for istiod's CA: the root's key lies beside the certificates it signs.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

use crate::tls::SpiffeId;

const ROOT_CERT: &str = "root-cert.pem";
const ROOT_KEY: &str = "root-key.pem";
const CHAIN: &str = "cert-chain.pem";
const KEY: &str = "key.pem";
/// Clocks of a mesh differ a little; a certificate that is valid from "now" fails on the slow ones.
const CLOCK_SKEW: time::Duration = time::Duration::minutes(2);
const ROOT_LIFETIME: time::Duration = time::Duration::days(3650);

/// Arguments of `istio-proxy ca`.
#[derive(Debug, Clone, Args)]
pub struct CaArgs {
    /// Folder for cert-chain.pem, key.pem and root-cert.pem; with several identities NAMESPACE/ACCOUNT below it.
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    /// Identity to sign for, as in spiffe://cluster.local/ns/default/sa/web. None makes the root only.
    #[arg(long = "id", value_name = "SPIFFE_ID")]
    pub ids: Vec<SpiffeId>,
    /// Folder of the root's root-cert.pem and root-key.pem, made when missing [default: --dir].
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Lifetime of the certificates, as in 90s, 45m, 24h or 30d.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = lifetime)]
    pub ttl: Duration,
}

/// Makes or reuses the root and signs every identity; returns the folders that were written.
pub fn run(args: &CaArgs) -> Result<Vec<PathBuf>> {
    let root = Root::open(args.root.as_deref().unwrap_or(&args.dir))?;
    let mut written = Vec::new();
    for id in &args.ids {
        let folder = folder_of(&args.dir, id, args.ids.len());
        root.sign_into(&folder, id, args.ttl)?;
        written.push(folder);
    }
    Ok(written)
}

fn folder_of(dir: &Path, id: &SpiffeId, count: usize) -> PathBuf {
    if count == 1 {
        return dir.to_owned();
    }
    match (id.namespace(), id.service_account()) {
        (Some(namespace), Some(account)) => dir.join(namespace).join(account),
        _ => dir.join(id.trust_domain()).join(id.path().trim_start_matches('/')),
    }
}

/// A root certificate with its key.
#[derive(Debug)]
pub struct Root {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Root {
    /// Reads the root of a folder, or makes one there.
    pub fn open(folder: &Path) -> Result<Self> {
        let (cert_path, key_path) = (folder.join(ROOT_CERT), folder.join(ROOT_KEY));
        if key_path.exists() {
            let key = KeyPair::from_pem(&read(&key_path)?).with_context(|| key_path.display().to_string())?;
            let certificate = read(&cert_path)?;
            let issuer =
                Issuer::from_ca_cert_pem(&certificate, key).with_context(|| cert_path.display().to_string())?;
            return Ok(Self { certificate, issuer });
        }
        let (root, key) = Self::generate("istio-proxy local root")?;
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        write(&key_path, &key, 0o600)?;
        write(&cert_path, &root.certificate, 0o644)?;
        Ok(root)
    }

    /// A fresh root and its key as PEM.
    pub fn generate(name: &str) -> Result<(Self, String)> {
        let key = KeyPair::generate()?;
        let key_pem = key.serialize_pem();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "istio-proxy");
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let now = OffsetDateTime::now_utc();
        params.not_before = now - CLOCK_SKEW;
        params.not_after = now + ROOT_LIFETIME;
        let certificate = params.self_signed(&key)?.pem();
        Ok((Self { certificate, issuer: Issuer::new(params, key) }, key_pem))
    }

    /// The root certificate, PEM.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    /// Signs a new key for an identity; the chain (leaf only, the root signs directly) and the key, both PEM.
    pub fn sign(&self, id: &SpiffeId, ttl: Duration) -> Result<(String, String)> {
        let now = OffsetDateTime::now_utc();
        self.sign_between(&[id.as_str()], now - CLOCK_SKEW, now + ttl)
    }

    /// Signs any list of URI names for any period; what tests need to be refused with.
    pub fn sign_between(&self, uris: &[&str], from: OffsetDateTime, until: OffsetDateTime) -> Result<(String, String)> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        // Like istiod: no subject, the identity is the one URI name.
        params.distinguished_name = DistinguishedName::new();
        for uri in uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into()?));
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = from;
        params.not_after = until;
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(&key, &self.issuer)?;
        Ok((leaf.pem(), key.serialize_pem()))
    }

    /// Signs and writes a folder. Files are replaced whole and the chain comes last, because a proxy may be watching.
    pub fn sign_into(&self, folder: &Path, id: &SpiffeId, ttl: Duration) -> Result<()> {
        let (chain, key) = self.sign(id, ttl)?;
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        write(&folder.join(ROOT_CERT), &self.certificate, 0o644)?;
        write(&folder.join(KEY), &key, 0o600)?;
        write(&folder.join(CHAIN), &chain, 0o644)
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

fn write(path: &Path, text: &str, mode: u32) -> Result<()> {
    let new = path.with_extension("pem.new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&new)
        .with_context(|| new.display().to_string())?;
    file.write_all(text.as_bytes())?;
    fs::rename(&new, path).with_context(|| path.display().to_string())
}

/// `90s`, `45m`, `24h`, `30d`.
fn lifetime(text: &str) -> Result<Duration> {
    let expected = || anyhow!("{text:?}: expected a number with s, m, h or d, as in 24h");
    let unit = text.chars().next_back().ok_or_else(expected)?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(expected()),
    };
    let count: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| expected())?;
    count.checked_mul(seconds).map(Duration::from_secs).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::tls::Secrets;

    fn args(dir: &Path, ids: &[&str]) -> CaArgs {
        CaArgs {
            dir: dir.to_owned(),
            ids: ids.iter().map(|id| id.parse().unwrap()).collect(),
            root: None,
            ttl: Duration::from_secs(3600),
        }
    }

    #[test]
    fn a_signed_folder_loads_and_keys_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let written = run(&args(dir.path(), &["spiffe://cluster.local/ns/a/sa/b"])).unwrap();
        assert_eq!(written, [dir.path()]);
        let secrets = Secrets::load(dir.path()).unwrap();
        let info = &secrets.identity("default").unwrap().info[0];
        assert_eq!(info.sans, ["spiffe://cluster.local/ns/a/sa/b"]);
        assert_eq!(info.subject, "");
        for key in [KEY, ROOT_KEY] {
            let mode = fs::metadata(dir.path().join(key)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{key}");
        }
    }

    #[test]
    fn the_root_is_kept_and_several_identities_get_folders() {
        let dir = tempfile::tempdir().unwrap();
        run(&args(dir.path(), &[])).unwrap();
        let root = read(&dir.path().join(ROOT_CERT)).unwrap();
        let written = run(&args(dir.path(), &["spiffe://td/ns/a/sa/b", "spiffe://td/other"])).unwrap();
        assert_eq!(written, [dir.path().join("a/b"), dir.path().join("td/other")]);
        for folder in written {
            assert_eq!(read(&folder.join(ROOT_CERT)).unwrap(), root);
            Secrets::load(&folder).unwrap();
        }
    }

    #[test]
    fn lifetimes() {
        assert_eq!(lifetime("90s").unwrap(), Duration::from_secs(90));
        assert_eq!(lifetime("30d").unwrap(), Duration::from_secs(30 * 86_400));
        for bad in ["", "h", "12", "1.5h", "-1h", "99999999999999999999d", "\u{e4}"] {
            assert!(lifetime(bad).is_err(), "{bad}");
        }
    }
}
