//! Everything that analyzers look at: documents by kind.

use std::collections::BTreeMap;

use super::{Level, Message, level};
use crate::objects::{Document, Documents, Key};
use crate::validate::At;
use crate::yaml::Node;

/// Documents by kind.
#[derive(Debug, Default)]
pub(crate) struct World<'d> {
    by_kind: BTreeMap<&'d str, Vec<Item<'d>>>,
}

/// One object.
#[derive(Debug, Clone)]
pub(crate) struct Item<'d> {
    key: &'d Key,
    file: &'d str,
    /// The cluster that it is of, empty for the only one.
    pub(super) cluster: &'d str,
    /// The whole document.
    pub(super) root: At<'d>,
    /// What it says.
    pub(super) spec: At<'d>,
}

impl<'d> World<'d> {
    /// The documents of each cluster.
    pub(crate) fn new(clusters: impl IntoIterator<Item = (&'d str, &'d Documents)>) -> Self {
        let mut out = Self::default();
        for (cluster, documents) in clusters {
            for (key, document) in &documents.objects {
                out.by_kind.entry(&key.kind).or_default().push(Item::new(cluster, key, document));
            }
        }
        out
    }

    /// Objects of a kind; of a Gateway Istio's own.
    pub(super) fn of(&self, kind: &str) -> &[Item<'d>] {
        self.by_kind.get(kind).map_or(&[], Vec::as_slice)
    }

    /// Objects of a kind and API group.
    pub(super) fn of_group(&self, group: &str, kind: &str) -> impl Iterator<Item = &Item<'d>> {
        self.of(kind).iter().filter(move |i| i.key.group == group)
    }

    /// Istio's own Gateways.
    pub(super) fn gateways(&self) -> impl Iterator<Item = &Item<'d>> {
        self.of_group("networking.istio.io", "Gateway")
    }

    /// The mesh's configuration; nothing is said in it when it is not there.
    pub(super) fn mesh(&self) -> Option<At<'d>> {
        self.of("MeshConfig").first().map(|i| i.root.clone())
    }

    /// Labels of workloads outside of the cluster, with their namespaces.
    pub(super) fn machines(&self) -> Vec<(&'d str, At<'d>)> {
        let entries = self.of("WorkloadEntry").iter();
        let entries = entries.flat_map(|e| [e.spec.get("labels"), e.labels()].map(|l| (e.namespace(), l)));
        let groups = self.of("WorkloadGroup").iter();
        let groups = groups
            .flat_map(|g| [g.spec.at("template.labels"), g.spec.at("metadata.labels")].map(|l| (g.namespace(), l)));
        entries.chain(groups).collect()
    }

    /// The namespace whose policies are the mesh's.
    pub(super) fn root_namespace(&self) -> &'d str {
        match self.mesh().map(|m| m.get("rootNamespace").text()) {
            None | Some("") => "istio-system",
            Some(said) => said,
        }
    }
}

impl<'d> Item<'d> {
    fn new(cluster: &'d str, key: &'d Key, document: &'d Document) -> Self {
        let root = At::root(&document.node);
        Self { key, file: &document.file, cluster, spec: root.get("spec"), root }
    }

    pub(super) fn namespace(&self) -> &'d str {
        &self.key.namespace
    }

    pub(super) fn name(&self) -> &'d str {
        &self.key.name
    }

    /// `namespace/name`.
    pub(super) fn full_name(&self) -> String {
        format!("{}/{}", self.key.namespace, self.key.name)
    }

    pub(super) fn labels(&self) -> At<'d> {
        self.root.at("metadata.labels")
    }

    /// Text of a label, empty when it is not there.
    pub(super) fn label(&self, name: &str) -> &'d str {
        entry(&self.labels(), name)
    }

    /// Text of an annotation, empty when it is not there.
    pub(super) fn annotation(&self, name: &str) -> &'d str {
        entry(&self.root.at("metadata.annotations"), name)
    }

    /// The document.
    pub(super) fn document(&self) -> Option<&'d Node> {
        self.root.node()
    }

    /// A message about a part of the object.
    pub(super) fn message(&self, code: &'static str, at: &At<'_>, reason: impl Into<String>) -> Message {
        Message {
            code,
            level: level(code),
            kind: self.key.kind.clone(),
            namespace: self.key.namespace.clone(),
            name: self.key.name.clone(),
            field: at.path.clone(),
            place: format!("{}:{}:{}", self.file, at.place.0, at.place.1),
            reason: reason.into(),
            sure: true,
        }
    }
}

impl Message {
    /// The same, resting on something that files need not hold.
    pub(super) fn unsure(self) -> Self {
        Self { sure: false, ..self }
    }

    /// The level that a folder of files deserves: what rests on Pods and Namespaces that are not in it is a note.
    pub fn level_in_files(&self) -> Level {
        if self.sure { self.level } else { Level::Info }
    }
}

fn entry<'d>(map: &At<'d>, name: &str) -> &'d str {
    map.entries().iter().find(|(k, _)| *k == name).map_or("", |(_, v)| v.text())
}
