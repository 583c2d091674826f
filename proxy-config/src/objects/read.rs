//! Documents to typed objects, kind by kind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::documents::{MESH_CONFIG, MESH_NETWORKS};
use super::{Broken, Document, Entry, Key, Object, Objects};
use crate::istio::common::Selector;
use crate::istio::service_entry::LabelSelector;
use crate::istio::workload_entry::{WorkloadEntry, WorkloadEntryStatus};
use crate::k8s;
use crate::model::{Reject, Severity};
use crate::validate::{self, Finding, Weight};
use crate::yaml::{self, Failure, Node, Notes};

/// Objects with everything that came to light while they were read.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reading {
    pub(crate) objects: Objects,
    pub(crate) rejects: Vec<Reject>,
    /// Objects that have no effect here, `Kind namespace/name`.
    pub(crate) inert: BTreeSet<String>,
    /// `Kind.field[].path` of fields that no type asks for.
    pub(crate) unread: BTreeSet<String>,
}

/// Reads every document.
pub(crate) fn read(documents: &BTreeMap<Key, Document>) -> Reading {
    let mut out = Reading::default();
    for (key, document) in documents {
        let mut one = One { key, document, notes: Notes::default(), unknown: BTreeMap::new() };
        if let Err(failure) = one.read(&mut out) {
            one.refuse(&failure, &mut out);
        }
        one.tell_unread(&mut out);
    }
    out.objects.sort();
    out
}

struct One<'d> {
    key: &'d Key,
    document: &'d Document,
    notes: Notes,
    /// Fields that the kind does not have, with what is said about each.
    unknown: BTreeMap<String, Finding>,
}

impl One<'_> {
    fn read(&mut self, out: &mut Reading) -> Result<(), Failure> {
        let objects = &mut out.objects;
        match (self.key.group.as_str(), self.key.kind.as_str()) {
            ("", MESH_CONFIG) => objects.mesh = self.whole()?,
            ("", MESH_NETWORKS) => objects.networks = self.whole()?,
            ("", "Service") => objects.services.push(self.kubernetes()?),
            ("", "Pod") => objects.pods.push(self.kubernetes()?),
            ("", "Node") => objects.nodes.push(self.named()?),
            ("", "Namespace") => objects.namespaces.push(self.named()?),
            ("discovery.k8s.io", "EndpointSlice") => objects.slices.push(self.kubernetes()?),
            ("", "Endpoints") => self.endpoints(objects)?,
            ("", "ConfigMap") if self.key.name == "istio" => self.config_map(out)?,
            ("networking.istio.io", kind) => return self.networking(kind, out),
            ("security.istio.io", kind) => return self.security(kind, out),
            ("telemetry.istio.io", "Telemetry") => {
                self.judged(out)?;
                out.objects.telemetries.push(self.istio()?);
            }
            ("extensions.istio.io", "WasmPlugin" | "TrafficExtension") => {
                self.judged(out)?;
                self.left_out("extensions are not supported: it is left out", Severity::Error, out);
            }
            ("gateway.networking.k8s.io", kind) if kind.ends_with("Route") => {
                self.left_out("Gateway API routes are not supported yet: it is left out", Severity::Error, out);
            }
            (group, _) if is_inert(group) => {
                out.inert.insert(self.key.resource());
            }
            _ => self.left_out("the kind is not known: it is left out", Severity::Warning, out),
        }
        Ok(())
    }

    fn security(&mut self, kind: &str, out: &mut Reading) -> Result<(), Failure> {
        self.judged(out)?;
        match kind {
            "AuthorizationPolicy" => out.objects.authorization_policies.push(self.istio()?),
            "PeerAuthentication" => out.objects.peer_authentications.push(self.istio()?),
            "RequestAuthentication" => out.objects.request_authentications.push(self.istio()?),
            _ => self.left_out("the kind is not known: it is left out", Severity::Warning, out),
        }
        Ok(())
    }

    /// Tells what [`validate::object`] finds. Of a kind that is served whole or not at all the first finding that leaves
    /// no meaning refuses the object. Any other stays with what can be served of it: where it cannot, the compiler
    /// leaves out the smallest unit, and on a reload the last good version stays, because the finding is an error.
    fn judged(&mut self, out: &mut Reading) -> Result<(), Failure> {
        const WHOLE: [&str; 3] = ["ServiceEntry", "WorkloadEntry", "WorkloadGroup"];
        let whole = self.is_security() || WHOLE.contains(&self.key.kind.as_str());
        let refused = if self.is_security() { Severity::Security } else { Severity::Error };
        let mut first = None;
        for finding in validate::object(&self.key.kind, &self.document.node) {
            let severity = match finding.weight {
                Weight::Unknown => {
                    self.unknown.insert(finding.field.clone(), finding);
                    continue;
                }
                Weight::Warning => Severity::Warning,
                Weight::Meant => Severity::Error,
                Weight::Schema | Weight::Rule if whole && first.is_none() => {
                    first = Some(finding);
                    continue;
                }
                Weight::Schema | Weight::Rule => {
                    if whole {
                        refused
                    } else {
                        Severity::Error
                    }
                }
            };
            out.rejects.push(self.told(&finding, severity));
        }
        let Some(Finding { field, place: (line, column), reason, .. }) = first else { return Ok(()) };
        Err(Failure { field, line, column, reason })
    }

    fn told(&self, finding: &Finding, severity: Severity) -> Reject {
        let place = Some(format!("{}:{}:{}", self.document.file, finding.place.0, finding.place.1));
        let code = finding.code.or(match finding.weight {
            Weight::Warning => Some("IST0133"),
            _ => Some("IST0106"),
        });
        Reject { place, code, ..self.reject(&finding.field, &finding.reason, severity) }
    }

    fn networking(&mut self, kind: &str, out: &mut Reading) -> Result<(), Failure> {
        self.judged(out)?;
        let objects = &mut out.objects;
        match kind {
            "VirtualService" => objects.virtual_services.push(self.istio()?),
            "DestinationRule" => objects.destination_rules.push(self.istio()?),
            "ServiceEntry" => objects.service_entries.push(self.istio()?),
            "WorkloadGroup" => objects.workload_groups.push(self.istio()?),
            "WorkloadEntry" => self.workload_entry(out)?,
            "Sidecar" => objects.sidecars.push(self.istio()?),
            "EnvoyFilter" => self.envoy_filter(out),
            "ProxyConfig" | "Gateway" => {
                out.inert.insert(self.key.resource());
            }
            _ => self.left_out("the kind is not known: it is left out", Severity::Warning, out),
        }
        Ok(())
    }

    /// An Istio object: everything is in `spec`.
    fn istio<T: DeserializeOwned + Default>(&mut self) -> Result<Object<T>, Failure> {
        let meta = self.meta()?;
        let spec = match self.document.node.get("spec") {
            Some(node) => yaml::read(node, "spec", &self.notes)?,
            None => T::default(),
        };
        Ok(Object { meta, spec: Arc::new(spec) })
    }

    /// A Kubernetes object: what it says may stand at its root.
    fn kubernetes<T: DeserializeOwned>(&mut self) -> Result<Object<T>, Failure> {
        Ok(Object { meta: self.meta()?, spec: Arc::new(self.whole()?) })
    }

    /// An object of which only the labels count.
    fn named(&mut self) -> Result<Object<()>, Failure> {
        Ok(Object { meta: self.meta()?, spec: Arc::new(()) })
    }

    fn whole<T: DeserializeOwned>(&mut self) -> Result<T, Failure> {
        yaml::read(&self.document.node, "", &self.notes)
    }

    fn meta(&mut self) -> Result<k8s::Meta, Failure> {
        // Other fields of the metadata mean nothing to a mesh: they are not worth a note.
        let node = self.document.node.get("metadata");
        let mut meta: k8s::Meta =
            node.map(|n| yaml::read(n, "metadata", &Notes::default())).transpose()?.unwrap_or_default();
        meta.namespace.clone_from(&self.key.namespace);
        Ok(meta)
    }

    fn endpoints(&mut self, objects: &mut Objects) -> Result<(), Failure> {
        let object: Object<k8s::Endpoints> = self.kubernetes()?;
        for slice in object.spec.slices() {
            let mut meta = object.meta.clone();
            meta.labels.insert("kubernetes.io/service-name".to_owned(), object.meta.name.clone());
            objects.slices.push(Object { meta, spec: Arc::new(slice) });
        }
        Ok(())
    }

    fn workload_entry(&mut self, out: &mut Reading) -> Result<(), Failure> {
        let object: Object<WorkloadEntry> = self.istio()?;
        let status: WorkloadEntryStatus = match self.document.node.get("status") {
            Some(node) => yaml::read(node, "status", &Notes::default())?,
            None => WorkloadEntryStatus::default(),
        };
        let checked = object.meta.annotations.get("proxy.istio.io/health-checks-enabled").is_some_and(|v| v == "true");
        let good = status.conditions.iter().any(|c| c.kind == "Healthy" && c.status == "True");
        let spec = Entry { spec: Arc::unwrap_or_clone(object.spec), healthy: !checked || good };
        out.objects.workload_entries.push(Object { meta: object.meta, spec: Arc::new(spec) });
        Ok(())
    }

    /// The mesh's configuration inside a cluster; a file of its own wins.
    fn config_map(&mut self, out: &mut Reading) -> Result<(), Failure> {
        let data = self.document.node.get("data");
        let Some(text) = data.and_then(|d| d.text("mesh")).filter(|_| out.objects.mesh == Default::default()) else {
            return Ok(());
        };
        let (documents, errors) = yaml::parse(text);
        let at = self.document.node.at("data.mesh");
        let inside = |line: usize| (at.line + line, at.column);
        if let Some(e) = errors.first() {
            let (line, column) = inside(e.line);
            return Err(Failure { field: "data.mesh".to_owned(), line, column, reason: e.reason.clone() });
        }
        let Some(node) = documents.first() else { return Ok(()) };
        out.objects.mesh = yaml::read(node, "data.mesh", &self.notes).map_err(|f| {
            let (line, column) = inside(f.line);
            Failure { line, column, ..f }
        })?;
        Ok(())
    }

    /// Not supported: what it asks for is refused by name. One that touches security closes the workloads it is for.
    fn envoy_filter(&mut self, out: &mut Reading) {
        let spec = self.document.node.get("spec");
        let patches = spec.and_then(|s| s.get("configPatches"));
        let security = patches.is_some_and(touches_security);
        let reason = if security {
            "it changes authentication or authorization and EnvoyFilter is not supported: inbound chains must not serve"
        } else {
            "EnvoyFilter is not supported: it is left out"
        };
        let severity = if security { Severity::Security } else { Severity::Error };
        self.left_out(reason, severity, out);
        if security {
            out.objects.broken.push(self.broken());
        }
    }

    fn left_out(&self, reason: &str, severity: Severity, out: &mut Reading) {
        out.inert.insert(self.key.resource());
        out.rejects.push(self.reject("", reason, severity));
    }

    fn reject(&self, field: &str, reason: &str, severity: Severity) -> Reject {
        Reject {
            resource: self.key.resource(),
            place: Some(self.document.place(field)),
            field: field.to_owned(),
            reason: reason.to_owned(),
            severity,
            code: None,
        }
    }

    fn refuse(&self, failure: &Failure, out: &mut Reading) {
        let severity = if self.is_security() { Severity::Security } else { Severity::Error };
        let place = Some(format!("{}:{}:{}", self.document.file, failure.line, failure.column));
        let reject = self.reject(&failure.field, &failure.reason, severity);
        // The same value was found to be wrong before its type was asked.
        let twin = |r: &Reject| r.resource == reject.resource && r.place == place && r.severity == severity;
        if severity == Severity::Error && out.rejects.iter().any(twin) {
            return;
        }
        out.rejects.push(Reject { place, code: Some("IST0106"), ..reject });
        if severity == Severity::Security {
            out.objects.broken.push(self.broken());
        }
    }

    fn is_security(&self) -> bool {
        let ends_tls = || {
            let ingress = self.document.node.at("spec.ingress");
            matches!(&ingress.data, yaml::Data::List(items) if items.iter().any(|i| i.get("tls").is_some()))
        };
        match self.key.kind.as_str() {
            "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication" => true,
            "Sidecar" => ends_tls(),
            _ => false,
        }
    }

    /// The object as far as its selector can be read; what cannot be read selects everything.
    fn broken(&self) -> Broken {
        let spec = self.document.node.get("spec");
        let notes = Notes::default();
        let selector: Option<Selector> =
            spec.and_then(|s| s.get("selector")).and_then(|n| yaml::read(n, "", &notes).ok());
        let labels: Option<LabelSelector> =
            spec.and_then(|s| s.get("workloadSelector")).and_then(|n| yaml::read(n, "", &notes).ok());
        let selector = selector.map(|s| s.match_labels).or_else(|| labels.map(|l| l.labels)).unwrap_or_default();
        Broken { resource: self.key.resource(), namespace: Some(self.key.namespace.clone()), selector }
    }

    /// Unread fields go to the list; in Istio's own kinds each is told, and in a security kind it is an error: a
    /// misspelt `from` would open the door.
    fn tell_unread(&mut self, out: &mut Reading) {
        let istio = self.key.group.ends_with(".istio.io") || self.key.kind == MESH_CONFIG;
        let security = istio && self.is_security();
        for (path, line, column) in std::mem::take(&mut *self.notes.unread.borrow_mut()) {
            if matches!(path.as_str(), "apiVersion" | "kind" | "metadata" | "status") {
                continue;
            }
            out.unread.insert(format!("{}.{}", self.key.kind, without_indices(&path)));
            if !istio {
                continue;
            }
            let known = self.unknown.remove(&path).map(|finding| finding.reason);
            let what = known.unwrap_or_else(|| "the field is not supported".to_owned());
            self.tell_unknown(&path, (line, column), &what, security, out);
            if security {
                out.objects.broken.push(self.broken());
            }
        }
        // Of kinds that no type reads, and of objects that were refused before they were read to their end.
        for finding in std::mem::take(&mut self.unknown).into_values() {
            self.tell_unknown(&finding.field, finding.place, &finding.reason, security, out);
        }
    }

    fn tell_unknown(&self, field: &str, (line, column): (usize, usize), what: &str, security: bool, out: &mut Reading) {
        let (severity, follows) = if security {
            (Severity::Security, "a security object is served whole or not at all")
        } else {
            (Severity::Warning, "it has no effect")
        };
        let place = Some(format!("{}:{line}:{column}", self.document.file));
        let reject = self.reject(field, &format!("{what}: {follows}"), severity);
        out.rejects.push(Reject { place, code: Some("IST0106"), ..reject });
    }
}

/// Groups of objects that do not shape a sidecar's traffic.
fn is_inert(group: &str) -> bool {
    let known = [
        "",
        "apps",
        "batch",
        "policy",
        "autoscaling",
        "install.istio.io",
        "gateway.networking.k8s.io",
        "storage.k8s.io",
    ];
    known.contains(&group) || group.ends_with(".k8s.io") || group.ends_with("rbac.authorization.k8s.io")
}

/// Whether a patch names a filter or a socket that authenticates or authorizes.
fn touches_security(node: &Node) -> bool {
    const NAMES: [&str; 7] =
        ["rbac", "jwt_authn", "ext_authz", "transport_socket", "transportSocket", "tls_context", "authn"];
    let names = |text: &str| NAMES.iter().any(|n| text.contains(n));
    match &node.data {
        yaml::Data::Scalar { text, .. } => names(text),
        yaml::Data::List(items) => items.iter().any(touches_security),
        yaml::Data::Map(entries) => entries.iter().any(|(k, v)| names(k) || touches_security(v)),
    }
}

fn without_indices(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    let mut inside = false;
    for c in path.chars() {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            _ if inside => continue,
            _ => {}
        }
        out.push(c);
    }
    out
}
