//! Recorded discovery responses from a folder; a testing and debugging input.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use proxy_config::registry::Proxy;
use proxy_config::xds::{XdsBundle, decode};
use proxy_config::{Model, WhoAmI, bootstrap};

/// One file for each kind of resource.
const KINDS: [&str; 6] = ["cds", "eds", "lds", "rds", "ecds", "nds"];
/// A thousand services unpack to some megabytes; a gzip bomb to more than this.
const MAX_UNPACKED: u64 = 1 << 30;

/// The files that are there.
pub(super) fn files(folder: &Path) -> Vec<PathBuf> {
    let both = KINDS.iter().flat_map(|kind| [format!("{kind}.pb"), format!("{kind}.pb.gz")]);
    both.map(|name| folder.join(name)).filter(|file| file.is_file()).collect()
}

/// Reads them.
pub(super) fn read(folder: &Path) -> Result<Vec<Bytes>> {
    let files = files(folder);
    if files.is_empty() {
        bail!("{}: none of {}, as .pb or .pb.gz", folder.display(), KINDS.join(", "));
    }
    files.iter().map(|file| read_file(file).with_context(|| file.display().to_string())).collect()
}

fn read_file(file: &Path) -> Result<Bytes> {
    let bytes = std::fs::read(file)?;
    if file.extension().is_none_or(|e| e != "gz") {
        return Ok(bytes.into());
    }
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(&bytes[..]).take(MAX_UNPACKED).read_to_end(&mut unpacked)?;
    ensure!((unpacked.len() as u64) < MAX_UNPACKED, "unpacks to more than {MAX_UNPACKED} bytes");
    Ok(unpacked.into())
}

/// Their model.
pub(super) fn load(responses: &[Bytes], who: &WhoAmI) -> Result<(Model, Proxy)> {
    let decoded = decode(&XdsBundle { responses: responses.to_vec() });
    for field in &decoded.unread {
        tracing::info!("{field} has no effect here");
    }
    Ok((decoded.model, proxy(who)?))
}

/// Whose resources they are. They are complete without that; it is for addresses, logs and metrics, so what is not said
/// stays empty.
pub(super) fn proxy(who: &WhoAmI) -> Result<Proxy> {
    let node = bootstrap::node(who).map_err(|e| anyhow!(e))?;
    Ok(Proxy {
        service_account: node.text("SERVICE_ACCOUNT"),
        network: node.text("NETWORK"),
        cluster_id: node.text("CLUSTER_ID"),
        node_name: node.text("NODE_NAME"),
        labels: node.labels(),
        name: node.name,
        namespace: node.namespace,
        ips: node.ips,
        dns_domain: node.dns_domain,
        locality: node.locality,
        metadata: node.metadata,
        auto_registered: false,
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn packed_and_plain_files_are_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("lds.pb"), b"one").unwrap();
        let file = std::fs::File::create(dir.path().join("cds.pb.gz")).unwrap();
        flate2::write::GzEncoder::new(file, flate2::Compression::fast()).write_all(b"two").unwrap();
        assert_eq!(read(dir.path()).unwrap(), [Bytes::from("two"), Bytes::from("one")]);
    }

    #[test]
    fn nothing_to_read_is_an_error_that_says_what_was_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with("none of cds, eds, lds, rds, ecds, nds, as .pb or .pb.gz"), "{error}");
    }

    #[test]
    fn a_node_says_who_it_is() {
        let node = r#"{"id": "sidecar~10.1.0.9~web-1.shop~shop.svc.cluster.local",
            "metadata": {"INSTANCE_IPS": "10.1.0.9,fd00::9", "LABELS": {"app": "web"}, "SERVICE_ACCOUNT": "w"}}"#;
        let proxy = proxy(&WhoAmI::Node(node.to_owned())).unwrap();
        assert_eq!((&*proxy.name, &*proxy.namespace, &*proxy.service_account), ("web-1", "shop", "w"));
        assert_eq!(proxy.ips, ["10.1.0.9".parse::<std::net::IpAddr>().unwrap(), "fd00::9".parse().unwrap()]);
        assert_eq!(proxy.labels["app"], "web");
        assert!(super::proxy(&WhoAmI::Node("[".to_owned())).is_err());
    }
}
