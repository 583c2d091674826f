//! Which objects the texts hold, and where: kind, namespace and name, each once.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::load::Source;
use crate::model::{Reject, Severity};
use crate::yaml::{Data, Node, parse};

/// What tells one object from another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    /// API group without version, empty for Kubernetes' core.
    pub(crate) group: String,
    /// Kind.
    pub(crate) kind: String,
    /// Namespace, empty for kinds that have none.
    pub(crate) namespace: String,
    /// Name.
    pub(crate) name: String,
}

impl Key {
    /// `Kind namespace/name`, as messages name it.
    pub(crate) fn resource(&self) -> String {
        if self.namespace.is_empty() {
            return format!("{} {}", self.kind, self.name).trim_end().to_owned();
        }
        format!("{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// An object as written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Document {
    /// File it stands in.
    pub(crate) file: Arc<str>,
    /// Its text.
    pub(crate) node: Arc<Node>,
}

impl Document {
    /// `file:line:column` of a field, or of the deepest part of its path that is there.
    pub(crate) fn place(&self, field: &str) -> String {
        let node = self.node.at(field);
        format!("{}:{}:{}", self.file, node.line, node.column)
    }
}

/// Kind of the mesh's own configuration, which has no `kind` of its own.
pub(crate) const MESH_CONFIG: &str = "MeshConfig";
/// Kind of the networks file.
pub(crate) const MESH_NETWORKS: &str = "MeshNetworks";

/// Objects of all texts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Documents {
    /// By kind, namespace and name.
    pub(crate) objects: BTreeMap<Key, Document>,
    /// What is wrong with the texts themselves.
    pub(crate) rejects: Vec<Reject>,
    /// Files with a part that is no YAML: objects of theirs may be missing here.
    pub(crate) damaged: Vec<Arc<str>>,
    /// Kinds of damaged parts that look like security objects, with namespace when it can be seen.
    pub(crate) damaged_security: Vec<(String, Option<String>)>,
}

impl Documents {
    /// Finds the objects of `sources`; `mesh` and `networks` win over files of those names.
    pub(crate) fn new(sources: &[Source], mesh: Option<&Source>, networks: Option<&Source>) -> Self {
        let mut out = Self::default();
        for (source, kind) in [(mesh, MESH_CONFIG), (networks, MESH_NETWORKS)] {
            let Some(source) = source else { continue };
            for node in out.parse(source) {
                out.insert(bare(kind), &source.name, node);
            }
        }
        for source in sources {
            for node in out.parse(source) {
                out.add(source, node);
            }
        }
        out
    }

    fn parse(&mut self, source: &Source) -> Vec<Node> {
        let (nodes, errors) = parse(&source.text);
        for e in errors {
            let security = suspect(&source.text, e.line);
            self.rejects.push(Reject {
                resource: security.as_ref().map_or_else(|| "YAML document".to_owned(), |(kind, _)| kind.clone()),
                place: Some(format!("{}:{}:{}", source.name, e.line, e.column)),
                field: String::new(),
                reason: format!("no YAML: {}; the document is left out", e.reason),
                severity: if security.is_some() { Severity::Security } else { Severity::Error },
                code: Some("IST0106"),
            });
            self.damaged.push(Arc::from(source.name.as_str()));
            self.damaged_security.extend(security);
        }
        nodes
    }

    fn add(&mut self, source: &Source, node: Node) {
        let file = source.name.rsplit('/').next().unwrap_or_default();
        let kind = node.text("kind").unwrap_or_default().to_owned();
        if kind.is_empty() && node.get("apiVersion").is_none() && matches!(node.data, Data::Map(_)) {
            match file {
                "mesh.yaml" | "mesh.yml" => return self.insert_if_new(bare(MESH_CONFIG), &source.name, node),
                "networks.yaml" | "networks.yml" => return self.insert_if_new(bare(MESH_NETWORKS), &source.name, node),
                _ => {}
            }
        }
        if kind.is_empty() {
            return self.tell(&source.name, &node, "YAML document", "kind", "apiVersion and kind are missing");
        }
        if kind.ends_with("List") && node.get("items").is_some() {
            if let Some(Node { data: Data::List(items), .. }) = node.get("items") {
                for item in items {
                    self.add(source, item.clone());
                }
            }
            return;
        }
        let metadata = node.get("metadata");
        let name = metadata.and_then(|m| m.text("name")).unwrap_or_default();
        if name.is_empty() {
            return self.tell(&source.name, &node, &kind, "metadata.name", "a name is missing; the object is left out");
        }
        let group = node.text("apiVersion").and_then(|v| v.split_once('/')).map_or("", |(group, _)| group).to_owned();
        let namespaced = !matches!(kind.as_str(), "Namespace" | "Node");
        let said = metadata.and_then(|m| m.text("namespace")).unwrap_or_default();
        let namespace = match (namespaced, said) {
            (false, _) => "",
            (true, "") => "default",
            (true, said) => said,
        };
        let key = Key { group, kind, namespace: namespace.to_owned(), name: name.to_owned() };
        self.insert(key, &source.name, node);
    }

    fn tell(&mut self, file: &str, node: &Node, resource: &str, field: &str, reason: &str) {
        let at = node.at(field);
        self.rejects.push(Reject {
            resource: resource.to_owned(),
            place: Some(format!("{file}:{}:{}", at.line, at.column)),
            field: field.to_owned(),
            reason: reason.to_owned(),
            severity: Severity::Error,
            code: Some("IST0106"),
        });
    }

    /// The option beats the file, silently: that is what the option is for.
    fn insert_if_new(&mut self, key: Key, file: &str, node: Node) {
        if !self.objects.contains_key(&key) {
            self.insert(key, file, node);
        }
    }

    fn insert(&mut self, key: Key, file: &str, node: Node) {
        if let Some(first) = self.objects.get(&key) {
            let reason = format!("the same object stands at {}; that one stays", first.place(""));
            self.tell(file, &node, &key.resource(), "", &reason);
            return;
        }
        self.objects.insert(key, Document { file: Arc::from(file), node: Arc::new(node) });
    }
}

fn bare(kind: &str) -> Key {
    Key { group: String::new(), kind: kind.to_owned(), namespace: String::new(), name: String::new() }
}

/// Whether the broken part around `line` looks like a security object: its kind, and its namespace when it is seen.
fn suspect(text: &str, line: usize) -> Option<(String, Option<String>)> {
    let lines: Vec<&str> = text.lines().collect();
    let line = line.saturating_sub(1).min(lines.len().saturating_sub(1));
    let start = lines[..line].iter().rposition(|l| l.starts_with("---")).unwrap_or_default();
    let part = || lines[start..].iter().skip(1).take_while(|l| !l.starts_with("---")).chain(&lines[start..=start]);
    let value = |line: &str, key: &str| {
        let rest = line.trim().trim_start_matches(['{', ' ', '-']).strip_prefix(key)?;
        Some(rest.trim().trim_matches(['"', '\'']).to_owned())
    };
    let kind = part().find_map(|l| value(l, "kind:"))?;
    let security = matches!(kind.as_str(), "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication");
    security.then(|| (kind, part().find_map(|l| value(l, "namespace:"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(files: &[(&str, &str)]) -> Documents {
        let sources: Vec<Source> =
            files.iter().map(|(n, t)| Source { name: (*n).to_owned(), text: (*t).to_owned() }).collect();
        Documents::new(&sources, None, None)
    }

    #[test]
    fn lists_defaults_and_mesh_files() {
        let docs = of(&[
            ("c/mesh.yaml", "trustDomain: corp\n"),
            (
                "c/a.yaml",
                "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Service, metadata: {name: a}}\n",
            ),
        ]);
        assert!(docs.rejects.is_empty(), "{:?}", docs.rejects);
        let names: Vec<String> = docs.objects.keys().map(Key::resource).collect();
        assert_eq!(names, ["MeshConfig", "Service default/a"]);
    }

    #[test]
    fn the_second_of_a_name_is_refused_with_both_places() {
        let one = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n";
        let docs = of(&[("a.yaml", one), ("b.yaml", &format!("# c\n{one}"))]);
        assert_eq!(docs.rejects.len(), 1);
        let told = docs.rejects[0].to_string();
        assert!(told.starts_with("b.yaml:2:1: Pod default/a: ") && told.contains("a.yaml:1:1"), "{told}");
    }

    #[test]
    fn a_broken_part_that_looks_like_security_is_one() {
        let docs =
            of(&[("a.yaml", "kind: Service\n---\nkind: AuthorizationPolicy\nmetadata:\n  namespace: n\nspec: [\n")]);
        assert_eq!(docs.damaged_security, [("AuthorizationPolicy".to_owned(), Some("n".to_owned()))]);
        assert!(docs.rejects.iter().any(|r| r.severity == Severity::Security));
    }
}
