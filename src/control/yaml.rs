//! YAML from files and folders: which ones, in which order.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use proxy_config::{Inputs, Source, WhoAmI};

/// Where YAML comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// Files and folders.
    pub config: Vec<PathBuf>,
    /// MeshConfig.
    pub mesh: Option<PathBuf>,
    /// MeshNetworks.
    pub networks: Option<PathBuf>,
    /// Roots (PEM) that https servers of token keys are checked by; the operating system's when absent.
    pub jwks_roots: Option<PathBuf>,
}

impl Paths {
    /// Everything that is to be loaded, as it is now.
    pub fn read(&self, who: &WhoAmI) -> Result<Inputs> {
        let one = |path: &Option<PathBuf>| path.as_deref().map(source).transpose();
        Ok(Inputs {
            sources: read_sources(&self.config)?,
            mesh: one(&self.mesh)?,
            networks: one(&self.networks)?,
            who: who.clone(),
        })
    }

    /// Every file that would be read now; for the question whether something changed.
    pub fn files(&self) -> Vec<PathBuf> {
        let folders = self.config.iter().flat_map(|path| files_of(path).unwrap_or_default());
        folders.chain(self.mesh.clone()).chain(self.networks.clone()).collect()
    }

    /// What has to be watched to learn of changes: folders, and the folders of files.
    pub fn folders(&self) -> Vec<PathBuf> {
        let all = self.config.iter().chain(&self.mesh).chain(&self.networks);
        all.map(|path| if path.is_dir() { path.clone() } else { folder_of(path) }).collect()
    }
}

/// The folder that a file lies in.
pub(super) fn folder_of(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Reads files, and the top level of folders, in the order given; inside a folder by name.
pub fn read_sources(paths: &[PathBuf]) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for path in paths {
        for file in files_of(path)? {
            sources.push(source(&file)?);
        }
    }
    Ok(sources)
}

fn source(file: &Path) -> Result<Source> {
    let bytes = std::fs::read(file).with_context(|| file.display().to_string())?;
    let text = String::from_utf8(bytes).map_err(|e| {
        let line = e.as_bytes()[..e.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        anyhow::anyhow!("{}:{line}: not UTF-8", file.display())
    })?;
    Ok(Source { name: file.display().to_string(), text })
}

fn files_of(path: &Path) -> Result<Vec<PathBuf>> {
    let meta = std::fs::metadata(path).with_context(|| path.display().to_string())?;
    if !meta.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).with_context(|| path.display().to_string())? {
        let file = entry.with_context(|| path.display().to_string())?.path();
        // Hidden ones are the versions behind a mounted ConfigMap's links, and editors' swap files.
        let hidden = file.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let yaml = file.extension().is_some_and(|e| e == "yaml" || e == "yml");
        if yaml && !hidden && file.is_file() {
            files.push(file);
        }
    }
    if files.is_empty() {
        bail!("{}: no *.yaml or *.yml in it", path.display());
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_give_their_top_level_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.yaml", "a.yml", ".hidden.yaml", "notes.txt"] {
            std::fs::write(dir.path().join(name), "a: b\n").unwrap();
        }
        std::fs::create_dir(dir.path().join("deeper.yaml")).unwrap();
        let read = read_sources(&[dir.path().to_owned()]).unwrap();
        let names: Vec<&str> = read.iter().map(|s| s.name.rsplit('/').next().unwrap()).collect();
        assert_eq!(names, ["a.yml", "b.yaml"]);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no.yaml");
        assert!(format!("{:#}", read_sources(&[missing]).unwrap_err()).contains("no.yaml: No such file"));
        let empty = read_sources(&[dir.path().to_owned()]).unwrap_err().to_string();
        assert!(empty.contains("no *.yaml"), "{empty}");
        let file = dir.path().join("latin.yaml");
        std::fs::write(&file, b"a: b\nc: \xe4\n").unwrap();
        assert!(read_sources(&[file]).unwrap_err().to_string().ends_with("latin.yaml:2: not UTF-8"));
    }
}
