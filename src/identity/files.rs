//! What is left on disk (`OUTPUT_CERTS`), for the next start of this machine and for programs beside us.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Where issued certificates are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Folder for `key.pem`, `cert-chain.pem`, `root-cert.pem`.
    pub folder: PathBuf,
    /// Mode of the files: 0600; 0644 in a pod, where another container reads them as another user.
    pub mode: u32,
}

impl Output {
    /// Writes what changed, key first, each file replaced whole, so that nobody reads half of one.
    ///
    /// # Errors
    /// The first file that cannot be written.
    pub(super) fn write(&self, key: &str, chain: &str, roots: &str) -> Result<(), String> {
        fs::create_dir_all(&self.folder).map_err(|e| format!("{}: {e}", self.folder.display()))?;
        for (name, text) in [("key.pem", key), ("cert-chain.pem", chain), ("root-cert.pem", roots)] {
            let path = self.folder.join(name);
            replace(&path, text, self.mode).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(())
    }
}

fn replace(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(());
    }
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    // A left-over of a crash may have another mode, and a mode is only given to new files.
    let _ = fs::remove_file(&new);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn files_have_their_mode_and_only_change_with_their_content() {
        let dir = tempfile::tempdir().unwrap();
        let output = Output { folder: dir.path().join("etc/certs"), mode: 0o600 };
        output.write("key", "chain", "roots").unwrap();
        let at = |name: &str| output.folder.join(name);
        for name in ["key.pem", "cert-chain.pem", "root-cert.pem"] {
            assert_eq!(fs::metadata(at(name)).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
        let inode = |name: &str| fs::metadata(at(name)).unwrap().ino();
        let (key, roots) = (inode("key.pem"), inode("root-cert.pem"));
        fs::write(at("key.pem.new"), "left over").unwrap();
        output.write("another", "chain", "roots").unwrap();
        assert!(inode("key.pem") != key && inode("root-cert.pem") == roots);
        assert_eq!(fs::read_to_string(at("key.pem")).unwrap(), "another");
        assert_eq!(fs::read_dir(&output.folder).unwrap().count(), 3);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let output = Output { folder: "/proc/nowhere".into(), mode: 0o600 };
        assert!(output.write("k", "c", "r").unwrap_err().contains("/proc/nowhere"));
    }
}
