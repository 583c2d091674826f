//! What a recorded case gives the program: nodes, YAML, mesh files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use proxy_config::{Inputs, Source, WhoAmI};
use serde_json::{Value, json};

/// YAML of one proxy on disk.
pub(super) struct Input {
    pub(super) files: Vec<PathBuf>,
    pub(super) mesh: Option<PathBuf>,
    pub(super) networks: Option<PathBuf>,
    pub(super) node: PathBuf,
}

impl Input {
    /// The same, for the library.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(super) fn load(&self) -> Result<Inputs> {
        let sources = self.files.iter().map(|f| source(f)).collect::<Result<_>>()?;
        let mesh = self.mesh.as_deref().map(source).transpose()?;
        let networks = self.networks.as_deref().map(source).transpose()?;
        let who = WhoAmI::Node(source(&self.node)?.text);
        Ok(Inputs { sources, mesh, networks, who })
    }

    /// What rules may look at: the objects' kinds, the node, the mesh.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(super) fn content(&self) -> Result<Value> {
        let mut kinds: Vec<String> = Vec::new();
        let mut yaml = String::new();
        for file in &self.files {
            let text = source(file)?.text;
            kinds.extend(text.lines().filter_map(|l| l.strip_prefix("kind:")).map(|k| k.trim().to_owned()));
            yaml.push_str(&text);
        }
        kinds.sort();
        kinds.dedup();
        let node: Value = serde_json::from_str(&source(&self.node)?.text).context("the node is no JSON")?;
        let mesh = self.mesh.as_deref().map(source).transpose()?.map(|s| s.text);
        Ok(json!({"kinds": kinds, "node": node, "mesh": mesh, "yaml": yaml}))
    }
}

fn source(path: &Path) -> Result<Source> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Source { name: path.display().to_string(), text })
}

/// A node as the stream's first message would name it, from a proxy of the simulation tables.
pub(super) fn node_of(proxy: &Value) -> Value {
    let text = |key: &str| proxy[key].as_str().unwrap_or_default();
    let ips: Vec<&str> = proxy["ipAddresses"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let mut metadata = proxy["metadata"].clone();
    if let Value::Object(map) = &mut metadata {
        map.insert("INSTANCE_IPS".to_owned(), json!(ips.join(",")));
        map.entry("LABELS").or_insert_with(|| proxy["labels"].clone());
        map.entry("ISTIO_VERSION").or_insert_with(|| proxy["istioVersion"].clone());
    }
    let kind = proxy["type"].as_str().unwrap_or("sidecar");
    let id = format!("{kind}~{}~{}~{}", ips.first().unwrap_or(&"127.0.0.1"), text("id"), text("dnsDomain"));
    json!({"id": id, "metadata": metadata})
}
