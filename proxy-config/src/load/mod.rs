//! Texts in, one proxy's [`Model`] out: what `proxy`, `explain` and `validate` ask of a folder of YAML.

mod advice;
mod attempt;
mod identity;

use std::collections::{BTreeMap, BTreeSet};

use crate::bootstrap::{self, Node};
use crate::diagnose::{self, Message, World};
use crate::model::{Model, Reject, Severity};
use crate::objects::{self, Broken, Document, Documents, Key, Reading};
use crate::registry::Proxy;
use crate::yaml::Data;

/// One text of configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// Path, for messages; its last part tells `mesh.yaml` and `networks.yaml`.
    pub name: String,
    /// YAML, several documents allowed.
    pub text: String,
}

/// Everything that a proxy is told without a control plane.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Istio and Kubernetes objects, in the order in which they were given.
    pub sources: Vec<Source>,
    /// `MeshConfig`; wins over a `mesh.yaml` among the sources.
    pub mesh: Option<Source>,
    /// `MeshNetworks`; wins over a `networks.yaml` among the sources.
    pub networks: Option<Source>,
    /// The proxy.
    pub who: WhoAmI,
}

/// How the proxy says who it is.
#[derive(Debug, Clone)]
pub enum WhoAmI {
    /// An Envoy `Node` in protojson.
    Node(String),
    /// pilot-agent's environment.
    Env(BTreeMap<String, String>),
}

/// What was understood.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What the proxy serves, with everything that was refused.
    pub model: Model,
    /// Who it is, completed from the objects.
    pub proxy: Proxy,
    /// `spec.probe` of the WorkloadGroup that the proxy belongs to.
    pub probe: Option<serde_json::Value>,
    /// The WorkloadEntry that `--publish-health` writes.
    pub auto_entry: Option<AutoEntry>,
    /// Fields that nothing reads: `VirtualService.spec.http[].foo`.
    pub unread: BTreeSet<String>,
    /// The objects as last understood, for the next reload.
    pub objects: Store,
}

/// Objects by kind, namespace and name, as they were last understood.
#[derive(Debug, Clone, Default)]
pub struct Store {
    /// Objects as they stood in the files.
    current: BTreeMap<Key, Document>,
    /// The last version of each that was served as said.
    good: BTreeMap<Key, Document>,
}

/// The WorkloadEntry of an auto-registered proxy.
#[derive(Debug, Clone, PartialEq)]
pub struct AutoEntry {
    /// Namespace of the entry.
    pub namespace: String,
    /// Name of the entry: `GROUP-IP[-NETWORK]`.
    pub name: String,
    /// The whole object without `status`.
    pub object: serde_json::Value,
}

impl AutoEntry {
    /// The object with its `Healthy` condition, as one YAML (JSON) document. `now` is RFC 3339.
    pub fn document(&self, healthy: bool, message: &str, now: &str) -> String {
        let mut object = self.object.clone();
        object["status"] = serde_json::json!({"conditions": [{
            "type": "Healthy",
            "status": if healthy { "True" } else { "False" },
            "lastProbeTime": now,
            "lastTransitionTime": now,
            "message": message,
        }]});
        format!("{object}\n")
    }
}

/// Compiles what `inputs` say for the proxy that they name.
///
/// # Errors
/// Only when nothing can be served: the proxy's identity is unknown. What is wrong with single objects is in
/// `model.rejects`; with `previous` their last good version stays.
pub fn from_yaml(inputs: &Inputs, previous: Option<&Loaded>) -> Result<Loaded, Vec<Reject>> {
    let node = bootstrap::node(&inputs.who).map_err(|reason| vec![no_identity(reason)])?;
    let told_enough = matches!(inputs.who, WhoAmI::Node(_));
    let mut documents = Documents::new(&inputs.sources, inputs.mesh.as_ref(), inputs.networks.as_ref());
    let mut rejects = std::mem::take(&mut documents.rejects);
    let before = previous.map(|p| &p.objects);
    if let Some(before) = before {
        keep_lost(&mut documents, before);
    }
    let current = documents.objects;
    // A damaged part may have been the object that closed a door; once seen well, its last version is still there.
    let damaged = if before.is_some() { Vec::new() } else { damaged(&documents.damaged_security) };
    let first = attempt(&current, damaged.clone(), &node, told_enough, &rejects)?;
    let bad: BTreeSet<&Key> = current.keys().filter(|k| is_bad(&first.model.rejects, k)).collect();
    let substitutes: BTreeMap<&Key, &Document> = before
        .into_iter()
        .flat_map(|b| &b.good)
        .filter(|(key, document)| bad.contains(key) && current.get(key) != Some(document))
        .collect();
    let good = good(&current, &bad, before);
    let mut out = first;
    if !substitutes.is_empty() {
        let mut patched = current.clone();
        for (key, document) in &substitutes {
            patched.insert((*key).clone(), (*document).clone());
        }
        let stays = |r: &Reject| substitutes.keys().any(|k| k.resource() == r.resource);
        rejects.extend(out.model.rejects.into_iter().filter(stays).map(demote));
        out = attempt(&patched, damaged, &node, told_enough, &rejects)?;
    }
    out.objects = Store { current, good };
    Ok(out)
}

/// Everything that is wrong with the objects, whatever proxy they are for.
pub fn validate(sources: &[Source]) -> Vec<Reject> {
    let documents = Documents::new(sources, None, None);
    let mut reading = objects::read(&documents.objects);
    let mut rejects = documents.rejects;
    rejects.append(&mut reading.rejects);
    rejects.extend(attempt::check(&reading.objects));
    finish(rejects, &documents.objects)
}

/// What the analyzers look at.
#[derive(Debug, Clone, Default)]
pub struct Folder {
    /// Objects of each cluster by its name, which is empty where there is only one.
    pub clusters: Vec<(String, Vec<Source>)>,
    /// `MeshConfig`; wins over a `mesh.yaml` among the sources.
    pub mesh: Option<Source>,
    /// `MeshNetworks`; wins over a `networks.yaml` among the sources.
    pub networks: Option<Source>,
}

/// What Istio's analyzers say about the objects together; with `only` just the one of that name
/// (`virtualservice.GatewayAnalyzer`), and `None` when there is none. What the texts' own mistakes are is told by
/// [`validate`].
pub fn analyze(folder: &Folder, only: Option<&str>) -> Option<Vec<Message>> {
    let documents = |sources: &[Source]| Documents::new(sources, folder.mesh.as_ref(), folder.networks.as_ref());
    let clusters: Vec<(&str, Documents)> = folder.clusters.iter().map(|(n, s)| (n.as_str(), documents(s))).collect();
    let world = World::new(clusters.iter().map(|(name, documents)| (*name, documents)));
    diagnose::run(&world, only)
}

fn no_identity(reason: String) -> Reject {
    Reject {
        resource: "Node".to_owned(),
        place: None,
        field: String::new(),
        reason,
        severity: Severity::Error,
        code: None,
    }
}

/// Reads and compiles one set of documents.
fn attempt(
    documents: &BTreeMap<Key, Document>,
    damaged: Vec<Broken>,
    node: &Node,
    told_enough: bool,
    rejects: &[Reject],
) -> Result<Loaded, Vec<Reject>> {
    let Reading { mut objects, rejects: found, inert, unread } = objects::read(documents);
    objects.broken.extend(damaged);
    let mut all: Vec<Reject> = rejects.to_vec();
    all.extend(found);
    let compiled = attempt::compile(&objects, node, told_enough).map_err(|reason| {
        let mut all = finish(all.clone(), documents);
        all.insert(0, no_identity(reason));
        all
    })?;
    let mut model = compiled.model;
    all.append(&mut model.rejects);
    model.rejects = finish(all, documents);
    model.inert = inert;
    Ok(Loaded {
        model,
        proxy: compiled.identity.proxy,
        probe: compiled.identity.probe,
        auto_entry: compiled.identity.auto_entry,
        unread,
        objects: Store::default(),
    })
}

/// Objects that stood in a file of which a part is now unreadable stay.
fn keep_lost(documents: &mut Documents, before: &Store) {
    for (key, document) in &before.current {
        if documents.damaged.contains(&document.file) && !documents.objects.contains_key(key) {
            documents.objects.insert(key.clone(), document.clone());
        }
    }
}

fn damaged(parts: &[(String, Option<String>)]) -> Vec<Broken> {
    let broken = |(kind, namespace): &(String, Option<String>)| Broken {
        resource: kind.clone(),
        namespace: namespace.clone(),
        selector: BTreeMap::new(),
    };
    parts.iter().map(broken).collect()
}

fn is_bad(rejects: &[Reject], key: &Key) -> bool {
    let resource = key.resource();
    rejects.iter().any(|r| r.severity != Severity::Warning && r.resource == resource)
}

/// The newest version of each object that was served as said.
fn good(current: &BTreeMap<Key, Document>, bad: &BTreeSet<&Key>, before: Option<&Store>) -> BTreeMap<Key, Document> {
    let version = |(key, document): (&Key, &Document)| {
        let old = || before.and_then(|b| b.good.get(key)).cloned();
        let document = if bad.contains(key) { old()? } else { document.clone() };
        Some((key.clone(), document))
    };
    current.iter().filter_map(version).collect()
}

/// The door stays as it was: the mistake is told, and closes nothing.
fn demote(mut reject: Reject) -> Reject {
    if reject.severity == Severity::Security {
        reject.severity = Severity::Error;
    }
    if reject.severity != Severity::Warning {
        reject.reason.push_str("; the last good version stays");
    }
    reject
}

/// Services of ServiceEntries bear their host's name; what is told of one is told of the object.
fn entry_of_host(resource: &str, documents: &BTreeMap<Key, Document>) -> Option<String> {
    let (namespace, host) = resource.strip_prefix("ServiceEntry ")?.split_once('/')?;
    let lists = |d: &Document| match d.node.at("spec.hosts").data {
        Data::List(ref hosts) => hosts.iter().any(|h| matches!(&h.data, Data::Scalar { text, .. } if text == host)),
        Data::Map(_) | Data::Scalar { .. } => false,
    };
    let of_host = |(key, d): &(&Key, &Document)| key.kind == "ServiceEntry" && key.namespace == namespace && lists(d);
    documents.iter().find(of_host).map(|(key, _)| key.resource())
}

/// Each finding once, with its place.
fn finish(rejects: Vec<Reject>, documents: &BTreeMap<Key, Document>) -> Vec<Reject> {
    let by_resource: BTreeMap<String, &Document> = documents.iter().map(|(k, d)| (k.resource(), d)).collect();
    let mut out: Vec<Reject> = Vec::new();
    for mut reject in rejects {
        if reject.place.is_none() {
            if let Some(named) = entry_of_host(&reject.resource, documents) {
                reject.resource = named;
            }
            reject.place = by_resource.get(&reject.resource).map(|d| d.place(&reject.field));
        }
        if !out.contains(&reject) {
            out.push(reject);
        }
    }
    out
}

#[cfg(test)]
mod tests;
