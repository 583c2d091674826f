//! Which VirtualServices a proxy sees, with short names made long and delegates merged in.

use std::collections::BTreeMap;

use super::hosts;
use crate::istio::virtual_service::{Destination, HttpMatch, HttpRoute, RouteDestination, StringMatch, VirtualService};
use crate::model::{Reject, Severity};

/// A VirtualService with its name, as it was written.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Namespace of the object.
    pub namespace: &'a str,
    /// Name of the object.
    pub name: &'a str,
    /// What it says.
    pub spec: &'a VirtualService,
}

/// A VirtualService that a proxy sees, ready for translation.
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// Namespace of the object.
    pub namespace: String,
    /// Name of the object.
    pub name: String,
    /// Full names, delegates merged.
    pub spec: VirtualService,
}

impl Routes {
    /// Path of the object as istiod writes it into metadata.
    pub(super) fn config_path(&self) -> String {
        format!("/apis/networking.istio.io/v1/namespaces/{}/virtual-service/{}", self.namespace, self.name)
    }
}

/// How far an object is seen.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Private,
    Exported,
    Public,
}

/// VirtualServices of the mesh gateway that a namespace sees: private ones first, then those exported to it, then
/// public ones, each in the given (conflict) order.
pub fn visible(
    all: &[Source<'_>],
    namespace: &str,
    domain: &str,
    default_export: &[String],
    rejects: &mut Vec<Reject>,
) -> Vec<Routes> {
    let resolved: Vec<Routes> = all.iter().map(|s| resolve_names(s, domain)).collect();
    let delegates: BTreeMap<(&str, &str), &Routes> = resolved
        .iter()
        .filter(|r| r.spec.hosts.is_empty())
        .map(|r| ((r.namespace.as_str(), r.name.as_str()), r))
        .collect();
    let mut out = Vec::new();
    for wanted in [Reach::Private, Reach::Exported, Reach::Public] {
        for root in resolved.iter().filter(|r| !r.spec.hosts.is_empty() && in_mesh(&r.spec)) {
            if reach(root, namespace, default_export) == Some(wanted) {
                out.push(merge_delegates(root, &delegates, default_export, rejects));
            }
        }
    }
    out
}

fn in_mesh(spec: &VirtualService) -> bool {
    spec.gateways.is_empty() || spec.gateways.iter().any(|g| g == "mesh")
}

/// How a namespace comes to see an object; `None` if it does not.
fn reach(routes: &Routes, namespace: &str, default_export: &[String]) -> Option<Reach> {
    let own = routes.namespace == namespace;
    let said = &routes.spec.export_to;
    let list: &[String] = if said.is_empty() { default_export } else { said };
    let has = |what: &str| list.iter().any(|e| e == what);
    if list.is_empty() || has("*") {
        return Some(Reach::Public);
    }
    if has("~") {
        return None;
    }
    if own && (has(".") || has(namespace)) {
        return Some(Reach::Private);
    }
    (!own && has(namespace)).then_some(Reach::Exported)
}

fn resolve_names(source: &Source<'_>, domain: &str) -> Routes {
    let mut spec = source.spec.clone();
    let full = |host: &mut String| *host = hosts::resolve(host, source.namespace, domain);
    spec.hosts.iter_mut().for_each(full);
    let destination = |d: &mut Destination| full(&mut d.host);
    for route in &mut spec.http {
        route.route.iter_mut().for_each(|r| destination(&mut r.destination));
        route.mirror.iter_mut().for_each(destination);
        route.mirrors.iter_mut().filter_map(|m| m.destination.as_mut()).for_each(destination);
    }
    let each = |r: &mut RouteDestination| destination(&mut r.destination);
    spec.tcp.iter_mut().for_each(|t| t.route.iter_mut().for_each(each));
    spec.tls.iter_mut().for_each(|t| t.route.iter_mut().for_each(each));
    Routes { namespace: source.namespace.to_owned(), name: source.name.to_owned(), spec }
}

fn merge_delegates(
    root: &Routes,
    delegates: &BTreeMap<(&str, &str), &Routes>,
    default_export: &[String],
    rejects: &mut Vec<Reject>,
) -> Routes {
    if root.spec.http.iter().all(|r| r.delegate.is_none()) {
        return root.clone();
    }
    let mut out = root.clone();
    out.spec.http = Vec::new();
    for (index, route) in root.spec.http.iter().enumerate() {
        let Some(delegate) = &route.delegate else {
            out.spec.http.push(route.clone());
            continue;
        };
        let namespace = if delegate.namespace.is_empty() { &root.namespace } else { &delegate.namespace };
        let child = delegates.get(&(namespace.as_str(), delegate.name.as_str()));
        match child.filter(|c| reach(c, &root.namespace, default_export).is_some()) {
            Some(child) => out.spec.http.extend(child.spec.http.iter().filter_map(|c| merge_route(route, c))),
            None => rejects.push(missing_delegate(root, index, &format!("{namespace}/{}", delegate.name))),
        }
    }
    out
}

fn missing_delegate(root: &Routes, index: usize, child: &str) -> Reject {
    Reject {
        resource: format!("VirtualService {}/{}", root.namespace, root.name),
        place: None,
        field: format!("spec.http[{index}].delegate"),
        reason: format!("VirtualService {child} does not exist here or is not exported; the route is left out"),
        severity: Severity::Warning,
        code: Some("IST0101"),
    }
}

/// The child's route with everything that it leaves open taken from the root's; `None` when their matches conflict.
fn merge_route(root: &HttpRoute, child: &HttpRoute) -> Option<HttpRoute> {
    let mut out = child.clone();
    out.matches = merge_matches(&root.matches, &child.matches)?;
    out.name = join_names(&root.name, &child.name);
    out.rewrite = out.rewrite.or_else(|| root.rewrite.clone());
    out.direct_response = out.direct_response.or_else(|| root.direct_response.clone());
    out.timeout = out.timeout.or(root.timeout);
    out.retries = out.retries.or_else(|| root.retries.clone());
    out.fault = out.fault.or_else(|| root.fault.clone());
    out.mirror = out.mirror.or_else(|| root.mirror.clone());
    out.mirror_percent = out.mirror_percent.or(root.mirror_percent);
    out.mirror_percentage = out.mirror_percentage.or(root.mirror_percentage);
    out.cors_policy = out.cors_policy.or_else(|| root.cors_policy.clone());
    if out.mirrors.is_empty() {
        out.mirrors.clone_from(&root.mirrors);
    }
    out.headers = out.headers.or_else(|| root.headers.clone());
    Some(out)
}

fn join_names(root: &str, child: &str) -> String {
    match (root.is_empty(), child.is_empty()) {
        (_, true) => root.to_owned(),
        (true, false) => child.to_owned(),
        (false, false) => format!("{root}-{child}"),
    }
}

/// Every match of the child must refine at least one of the root's.
fn merge_matches(root: &[HttpMatch], child: &[HttpMatch]) -> Option<Vec<HttpMatch>> {
    if root.is_empty() {
        return Some(child.to_vec());
    }
    if child.is_empty() {
        return Some(root.to_vec());
    }
    let mut out = Vec::new();
    for c in child {
        let before = out.len();
        out.extend(root.iter().filter(|r| !conflict(r, c)).map(|r| merge_match(r, c)));
        if out.len() == before {
            return None;
        }
    }
    Some(out)
}

fn merge_match(root: &HttpMatch, child: &HttpMatch) -> HttpMatch {
    fn merged<V: Clone>(root: &BTreeMap<String, V>, child: &BTreeMap<String, V>) -> BTreeMap<String, V> {
        root.iter().chain(child).map(|(k, v)| (k.clone(), v.clone())).collect()
    }
    let first = |child: &String, root: &String| if child.is_empty() { root.clone() } else { child.clone() };
    HttpMatch {
        name: join_names(&root.name, &child.name),
        uri: child.uri.clone().or_else(|| root.uri.clone()),
        scheme: child.scheme.clone().or_else(|| root.scheme.clone()),
        method: child.method.clone().or_else(|| root.method.clone()),
        authority: child.authority.clone().or_else(|| root.authority.clone()),
        headers: merged(&root.headers, &child.headers),
        without_headers: merged(&root.without_headers, &child.without_headers),
        port: if child.port == 0 { root.port } else { child.port },
        source_labels: merged(&root.source_labels, &child.source_labels),
        gateways: if child.gateways.is_empty() { root.gateways.clone() } else { child.gateways.clone() },
        query_params: merged(&root.query_params, &child.query_params),
        ignore_uri_case: child.ignore_uri_case,
        source_namespace: first(&child.source_namespace, &root.source_namespace),
        stat_prefix: first(&child.stat_prefix, &root.stat_prefix),
    }
}

fn conflict(root: &HttpMatch, leaf: &HttpMatch) -> bool {
    let pairs = [
        (&root.uri, &leaf.uri),
        (&root.scheme, &leaf.scheme),
        (&root.method, &leaf.method),
        (&root.authority, &leaf.authority),
    ];
    let in_map = |root: &BTreeMap<String, Option<StringMatch>>, leaf: &BTreeMap<String, Option<StringMatch>>| {
        leaf.iter().any(|(k, v)| string_conflict(root.get(k).and_then(Option::as_ref), v.as_ref()))
    };
    let labels = leaf.source_labels.iter().any(|(k, v)| root.source_labels.get(k).is_some_and(|r| r != v));
    let gateways = !root.gateways.is_empty() && leaf.gateways.iter().any(|g| !root.gateways.contains(g));
    pairs.into_iter().any(|(r, l)| string_conflict(r.as_ref(), l.as_ref()))
        || in_map(&root.headers, &leaf.headers)
        || in_map(&root.without_headers, &leaf.without_headers)
        || in_map(&root.query_params, &leaf.query_params)
        || root.ignore_uri_case != leaf.ignore_uri_case
        || (root.port > 0 && leaf.port > 0 && root.port != leaf.port)
        || (!root.source_namespace.is_empty() && root.source_namespace != leaf.source_namespace)
        || labels
        || gateways
}

/// Whether the leaf asks for something that the root's match does not include.
fn string_conflict(root: Option<&StringMatch>, leaf: Option<&StringMatch>) -> bool {
    let (Some(root), Some(leaf)) = (root, leaf) else { return false };
    let set = |v: &Option<String>| v.as_deref().filter(|v| !v.is_empty()).map(str::to_owned);
    let parts = |m: &StringMatch| (set(&m.exact), set(&m.prefix), set(&m.regex));
    match (parts(root), parts(leaf)) {
        ((Some(r), ..), (Some(l), None, None)) => r != l,
        ((None, Some(r), None), (Some(l), None, None) | (None, Some(l), None)) => !l.starts_with(&r),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::istio::virtual_service::{Delegate, HttpDestination};

    fn matching(prefix: &str) -> HttpMatch {
        HttpMatch {
            uri: Some(StringMatch { prefix: Some(prefix.to_owned()), ..StringMatch::default() }),
            ..HttpMatch::default()
        }
    }

    fn root(export_to: &[&str]) -> VirtualService {
        VirtualService {
            hosts: vec!["a".to_owned()],
            export_to: export_to.iter().map(|e| (*e).to_owned()).collect(),
            ..VirtualService::default()
        }
    }

    #[test]
    fn order_and_visibility() {
        let (public, private, exported, hidden) = (root(&[]), root(&["."]), root(&["n"]), root(&["~"]));
        let source = |namespace, name, spec| Source { namespace, name, spec };
        let all = [
            source("m", "public", &public),
            source("m", "exported", &exported),
            source("n", "private", &private),
            source("m", "other", &private),
            source("n", "hidden", &hidden),
        ];
        let seen = visible(&all, "n", "cluster.local", &[], &mut Vec::new());
        let names: Vec<&str> = seen.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["private", "exported", "public"]);
        assert_eq!(seen[2].spec.hosts, ["a.m.svc.cluster.local"]);
    }

    #[test]
    fn a_delegate_refines_or_is_dropped() {
        let route = |m: &str, host: &str| HttpRoute {
            matches: vec![matching(m)],
            route: vec![HttpDestination {
                destination: Destination { host: host.to_owned(), ..Destination::default() },
                ..HttpDestination::default()
            }],
            ..HttpRoute::default()
        };
        let child = VirtualService { http: vec![route("/a/b", "x"), route("/c", "y")], ..VirtualService::default() };
        let mut parent = root(&[]);
        let to = |name: &str| Some(Delegate { name: name.to_owned(), namespace: String::new() });
        parent.http = vec![
            HttpRoute { matches: vec![matching("/a")], delegate: to("child"), ..HttpRoute::default() },
            HttpRoute { delegate: to("missing"), ..HttpRoute::default() },
        ];
        let all = [
            Source { namespace: "n", name: "parent", spec: &parent },
            Source { namespace: "n", name: "child", spec: &child },
        ];
        let mut rejects = Vec::new();
        let seen = visible(&all, "n", "cluster.local", &[], &mut rejects);
        assert_eq!(seen.len(), 1);
        assert_eq!(seen[0].spec.http.len(), 1);
        assert_eq!(seen[0].spec.http[0].route[0].destination.host, "x.n.svc.cluster.local");
        assert_eq!(rejects.len(), 1);
    }
}
