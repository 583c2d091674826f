//! Documents to typed objects, kind by kind.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::documents::{MESH_CONFIG, MESH_NETWORKS};
use super::{Broken, Document, Entry, Key, Object, Objects};
use crate::diagnose::{self, Finding};
use crate::istio::common::Selector;
use crate::istio::service_entry::LabelSelector;
use crate::istio::workload_entry::{WorkloadEntry, WorkloadEntryStatus};
use crate::k8s;
use crate::model::{Reject, Severity};
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
        let mut one = One { key, document, notes: Notes::default() };
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
            ("telemetry.istio.io", "Telemetry") => objects.telemetries.push(self.istio()?),
            ("extensions.istio.io", "WasmPlugin" | "TrafficExtension") => {
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
        let spec = self.document.node.get("spec");
        match kind {
            "AuthorizationPolicy" => {
                let object = self.istio()?;
                self.checked(diagnose::authorization_policy(&object.spec, spec), out)?;
                out.objects.authorization_policies.push(object);
            }
            "PeerAuthentication" => {
                let object = self.istio()?;
                self.checked(diagnose::peer_authentication(&object.spec, spec), out)?;
                out.objects.peer_authentications.push(object);
            }
            "RequestAuthentication" => {
                let object = self.istio()?;
                self.checked(diagnose::request_authentication(&object.spec), out)?;
                out.objects.request_authentications.push(object);
            }
            _ => self.left_out("the kind is not known: it is left out", Severity::Warning, out),
        }
        Ok(())
    }

    /// The first finding that leaves no meaning refuses the object, the others are told beside it.
    fn checked(&self, found: Vec<Finding>, out: &mut Reading) -> Result<(), Failure> {
        let refused = if self.is_security() { Severity::Security } else { Severity::Error };
        let mut first = None;
        for finding in found {
            if first.is_none() && !finding.meant {
                first = Some(finding);
                continue;
            }
            let severity = if finding.meant { Severity::Error } else { refused };
            out.rejects.push(self.reject(&finding.field, &finding.reason, severity));
        }
        let Some(first) = first else { return Ok(()) };
        let at = self.document.node.at(&first.field);
        Err(Failure { field: first.field, line: at.line, column: at.column, reason: first.reason })
    }

    fn networking(&mut self, kind: &str, out: &mut Reading) -> Result<(), Failure> {
        let objects = &mut out.objects;
        match kind {
            "VirtualService" => objects.virtual_services.push(self.istio()?),
            "DestinationRule" => objects.destination_rules.push(self.istio()?),
            "ServiceEntry" => {
                let object = self.istio()?;
                self.checked(diagnose::service_entry(&object.spec), out)?;
                out.objects.service_entries.push(object);
            }
            "WorkloadGroup" => {
                let object = self.istio()?;
                self.checked(diagnose::workload_group(&object.spec, self.document.node.get("spec")), out)?;
                out.objects.workload_groups.push(object);
            }
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
        self.checked(diagnose::workload_entry(&object.spec), out)?;
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
            let place = Some(format!("{}:{line}:{column}", self.document.file));
            let severity = if security { Severity::Security } else { Severity::Warning };
            let reason = if security {
                "the field is not known; a security object is served whole or not at all"
            } else {
                "the field is not known and has no effect"
            };
            let reject = self.reject(&path, reason, severity);
            out.rejects.push(Reject { place, code: Some("IST0106"), ..reject });
            if security {
                out.objects.broken.push(self.broken());
            }
        }
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
