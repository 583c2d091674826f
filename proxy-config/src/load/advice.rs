//! What is allowed and rarely meant: objects that together do less than each of them says. Warnings only; everything is
//! served as said.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::compile::hosts;
use crate::model::{Reject, Severity};
use crate::objects::{Object, Objects};
use crate::registry::catalog::{Catalog, DOMAIN, selects};
use crate::registry::{Protocol, Provider, Resolution, Service};

/// Istio's analyzers: a destination without port where the Service has several.
const PORT_OPEN: &str = "IST0112";
/// A port whose name says no protocol.
const PORT_NAME: &str = "IST0118";
/// A subset that selects nothing.
const EMPTY_SUBSET: &str = "IST0173";

/// Everything that deserves a second look.
pub(super) fn advice(objects: &Objects, catalog: &Catalog<'_>) -> Vec<Reject> {
    let mut by_host: BTreeMap<&str, &Arc<Service>> = BTreeMap::new();
    for service in &catalog.services {
        by_host.entry(&service.hostname).or_insert(service);
    }
    let mut out = policies_without_effect(objects);
    out.extend(empty_subsets(objects, catalog, &by_host));
    out.extend(open_ports(objects, &by_host));
    out.extend(unnamed_protocols(catalog));
    out.extend(idle_entries(catalog));
    out
}

fn warning(resource: String, field: String, reason: String, code: Option<&'static str>) -> Reject {
    Reject { resource, place: None, field, reason, severity: Severity::Warning, code }
}

fn name<T>(kind: &str, object: &Object<T>) -> String {
    format!("{kind} {}/{}", object.meta.namespace, object.meta.name)
}

/// Of rules for one host only the first that has a traffic policy gives it. Objects come in the order in which conflicts
/// are decided.
fn policies_without_effect(objects: &Objects) -> Vec<Reject> {
    let mut first = BTreeMap::new();
    let mut out = Vec::new();
    let plain = objects.destination_rules.iter().filter(|o| o.spec.workload_selector.is_none());
    for object in plain.filter(|o| o.spec.traffic_policy.is_some()) {
        let (namespace, spec) = (&object.meta.namespace, &object.spec);
        let own = name("DestinationRule", object);
        let exported: BTreeSet<&String> = spec.export_to.iter().collect();
        let key = (namespace, hosts::resolve(&spec.host, namespace, DOMAIN), exported);
        if let Some(winner) = first.get(&key) {
            let reason = format!(
                "has no effect: {winner} is for the same host and comes first (by age, then by name); its policy holds \
                 as a whole"
            );
            out.push(warning(own, "spec.trafficPolicy".to_owned(), reason, None));
        } else {
            first.insert(key, own);
        }
    }
    out
}

fn empty_subsets(objects: &Objects, catalog: &Catalog<'_>, by_host: &BTreeMap<&str, &Arc<Service>>) -> Vec<Reject> {
    let mut out = Vec::new();
    for object in objects.destination_rules.iter().filter(|o| !o.spec.subsets.is_empty()) {
        let host = hosts::resolve(&object.spec.host, &object.meta.namespace, DOMAIN);
        let found = by_host.get(host.as_str()).filter(|s| s.resolution == Resolution::ClientSideLb);
        let Some((service, port)) = found.and_then(|s| Some((s, s.ports.first()?))) else { continue };
        let endpoints = catalog.endpoints(service, port.number);
        for (index, subset) in object.spec.subsets.iter().enumerate() {
            if endpoints.iter().any(|e| selects(&subset.labels, &e.labels)) || subset.labels.is_empty() {
                continue;
            }
            let reason = format!("subset {} selects no endpoint of {host}: calls to it get 503", subset.name);
            let field = format!("spec.subsets[{index}].labels");
            out.push(warning(name("DestinationRule", object), field, reason, Some(EMPTY_SUBSET)));
        }
    }
    out
}

/// Once for each host of a VirtualService.
fn open_ports(objects: &Objects, by_host: &BTreeMap<&str, &Arc<Service>>) -> Vec<Reject> {
    let mut out = Vec::new();
    for object in &objects.virtual_services {
        let mut told = BTreeSet::new();
        for (i, route) in object.spec.http.iter().enumerate() {
            for (j, to) in route.route.iter().enumerate().filter(|(_, to)| to.destination.port.is_none()) {
                let host = hosts::resolve(&to.destination.host, &object.meta.namespace, DOMAIN);
                let several = by_host.get(host.as_str()).is_some_and(|s| s.ports.len() > 1);
                if several && told.insert(host.clone()) {
                    let reason = format!("{host} has several ports: without one the request's own is taken");
                    let field = format!("spec.http[{i}].route[{j}].destination");
                    out.push(warning(name("VirtualService", object), field, reason, Some(PORT_OPEN)));
                }
            }
        }
    }
    out
}

fn unnamed_protocols(catalog: &Catalog<'_>) -> Vec<Reject> {
    let mut out = Vec::new();
    for service in catalog.services.iter().filter(|s| s.provider == Provider::Kubernetes) {
        for port in service.ports.iter().filter(|p| p.protocol == Protocol::Auto) {
            let resource = format!("Service {}/{}", service.namespace, service.name);
            let reason = format!(
                "port {} ({:?}) says no protocol by its name or appProtocol: it is detected for each connection",
                port.number, port.name
            );
            out.push(warning(resource, "spec.ports".to_owned(), reason, Some(PORT_NAME)));
        }
    }
    out
}

/// Entries that nothing sends to.
fn idle_entries(catalog: &Catalog<'_>) -> Vec<Reject> {
    let mut selectors: BTreeMap<&str, Vec<&BTreeMap<String, String>>> = BTreeMap::new();
    for service in catalog.services.iter().filter(|s| !s.selector.is_empty()) {
        selectors.entry(&service.namespace).or_default().push(&service.selector);
    }
    let served = |namespace: &str, labels: &BTreeMap<String, String>| {
        selectors.get(namespace).is_some_and(|all| all.iter().any(|selector| selects(selector, labels)))
    };
    let idle = catalog.entries().iter().filter(|e| !served(&e.namespace, &e.labels));
    let tell = |resource: String| {
        let reason = "is selected by no Service or ServiceEntry of its namespace: nothing is sent to it";
        warning(resource, "spec.labels".to_owned(), reason.to_owned(), None)
    };
    idle.map(|e| tell(format!("WorkloadEntry {}/{}", e.namespace, e.object))).collect()
}
