//! What the API server and istiod's webhook would say to one object by itself.
//!
//! A file comes past neither, so both are asked here: [`shape`] knows what the schemas of the kinds know (fields, types,
//! words, ranges), the other modules know the rules that Istio's own validation adds, one module a kind. All of them
//! are pure functions from the document, in which an empty value differs from none, to findings with their places.
//! `validate` prints them; the loader refuses what has one (see `objects::read`).

mod at;
mod authentication;
mod authorization;
mod cors;
mod destination_rule;
mod duration;
mod extension;
mod header;
mod http_match;
mod http_route;
mod locality;
pub(crate) mod names;
mod pool;
mod reach;
mod selector;
mod server_tls;
mod service_entry;
mod shape;
mod sidecar;
mod telemetry;
mod tls;
mod verdict;
mod virtual_service;
mod workload;

pub(crate) use at::At;
pub use verdict::{Verdict, fragment_verdict, verdict};

use crate::re2;
use crate::yaml::Node;

/// How much a finding means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weight {
    /// Allowed; worth a line.
    Warning,
    /// A field that the kind does not have: the API server refuses or drops it.
    Unknown,
    /// The kind's schema refuses it; istiod's own validation would not.
    Schema,
    /// Istio's validation refuses it.
    Rule,
    /// Istio's validation refuses it; it has one meaning all the same, which istiod would serve if it came past the API
    /// server.
    Meant,
}

/// One thing that is wrong, or worth a second look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Field path from the object's root.
    pub(crate) field: String,
    /// Line and column, both from 1.
    pub(crate) place: (usize, usize),
    /// What was wrong and what was expected.
    pub(crate) reason: String,
    /// What follows.
    pub(crate) weight: Weight,
    /// Istio's code, where the finding has one of its own.
    pub(crate) code: Option<&'static str>,
}

/// Findings of one object in the making.
#[derive(Debug, Default)]
pub(crate) struct Findings(Vec<Finding>);

impl Findings {
    fn push(&mut self, at: &At<'_>, reason: impl Into<String>, weight: Weight) {
        self.0.push(Finding { field: at.path.clone(), place: at.place, reason: reason.into(), weight, code: None });
    }

    /// A rule is broken.
    fn add(&mut self, at: &At<'_>, reason: impl Into<String>) {
        self.push(at, reason, Weight::Rule);
    }

    /// A rule is broken unless the condition holds.
    fn expect(&mut self, holds: bool, at: &At<'_>, reason: &str) {
        if !holds {
            self.add(at, reason);
        }
    }

    /// A rule is broken that leaves the object its meaning.
    fn tell(&mut self, at: &At<'_>, reason: impl Into<String>) {
        self.push(at, reason, Weight::Meant);
    }

    fn warn(&mut self, at: &At<'_>, reason: impl Into<String>) {
        self.push(at, reason, Weight::Warning);
    }

    fn schema(&mut self, at: &At<'_>, reason: impl Into<String>) {
        self.push(at, reason, Weight::Schema);
    }

    /// The last finding gets a code.
    fn coded(&mut self, code: &'static str) {
        if let Some(last) = self.0.last_mut() {
            last.code = Some(code);
        }
    }

    /// Each value of a list is good, or it is told.
    fn each(&mut self, list: &At<'_>, wrong: &str, good: impl Fn(&str) -> bool) {
        for item in list.items() {
            if !good(item.text()) {
                self.add(&item, format!("{:?} {wrong}", item.text()));
            }
        }
    }

    /// A number from 1 to 65535.
    fn port(&mut self, at: &At<'_>) {
        self.expect(names::is_port(at.whole_or_zero()), at, "a port from 1 to 65535 is expected");
    }

    /// A regular expression after RE2, at most 1024 characters.
    fn regex(&mut self, at: &At<'_>) {
        let text = at.text();
        if text.len() > MAX_REGEX {
            self.add(at, format!("a regular expression of at most {MAX_REGEX} characters is expected"));
        } else if let Err(reason) = re2::full_match(text) {
            // The library draws a picture over several lines; its last one says what is wrong.
            let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ");
            self.add(at, format!("no regular expression after RE2: {reason}"));
        }
    }
}

/// What Istio takes for the largest expression.
const MAX_REGEX: usize = 1024;

/// Findings of a whole object: what its schema says, then what Istio's rules say. Kinds that nobody validates have none.
pub(crate) fn object(kind: &str, document: &Node) -> Vec<Finding> {
    let mut found = Findings::default();
    let root = At::root(document);
    shape::check(&mut found, kind, &root);
    metadata(&mut found, kind, &root);
    rules(&mut found, kind, &root);
    once(found.0)
}

/// Each mistake once: what the schema and a rule say about the same value is one, and the rule says more. Of rules the
/// first counts, which is the one about the value's type.
fn once(found: Vec<Finding>) -> Vec<Finding> {
    let mut seen: Vec<Finding> = Vec::new();
    for finding in found {
        let refuses = |f: &Finding| matches!(f.weight, Weight::Schema | Weight::Rule | Weight::Meant);
        let twin = |f: &Finding| refuses(f) && f.field == finding.field && f.place == finding.place;
        match seen.iter().position(twin).filter(|_| refuses(&finding)) {
            Some(at) if seen[at].weight == Weight::Schema => seen[at] = finding,
            Some(_) => {}
            None => seen.push(finding),
        }
    }
    seen
}

fn rules(found: &mut Findings, kind: &str, root: &At<'_>) {
    let spec = root.get("spec");
    match kind {
        "VirtualService" => virtual_service::check(found, root),
        "DestinationRule" => destination_rule::check(found, root),
        "ServiceEntry" => service_entry::check(found, root),
        "WorkloadEntry" => workload::entry(found, &spec, None, true),
        "WorkloadGroup" => workload::group(found, &spec),
        "Sidecar" => sidecar::check(found, root),
        "Gateway" => server_tls::gateway(found, root),
        "AuthorizationPolicy" => authorization::check(found, &spec),
        "PeerAuthentication" => authentication::peer(found, &spec),
        "RequestAuthentication" => authentication::request(found, &spec),
        "Telemetry" => telemetry::check(found, &spec),
        "ProxyConfig" => telemetry::proxy_config(found, &spec),
        "EnvoyFilter" => extension::envoy_filter(found, &spec),
        "WasmPlugin" => extension::wasm_plugin(found, &spec),
        "TrafficExtension" => extension::traffic_extension(found, &spec),
        _ => {}
    }
}

/// Annotations that change what a policy means.
fn metadata(found: &mut Findings, kind: &str, root: &At<'_>) {
    const DRY_RUN: &str = "istio.io/dry-run";
    let annotations = root.at("metadata.annotations");
    let Some((_, value)) = annotations.entries().into_iter().find(|(k, _)| *k == DRY_RUN) else { return };
    if kind != "AuthorizationPolicy" {
        found.tell(&value, format!("{DRY_RUN} is for AuthorizationPolicies only"));
        return;
    }
    let action = root.at("spec.action");
    let truth = ["1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"];
    if !matches!(action.text(), "" | "ALLOW" | "DENY") {
        found.tell(&value, format!("{DRY_RUN} is for ALLOW and DENY only"));
    } else if !truth.contains(&value.text()) {
        found.tell(&value, "true or false is expected");
    }
}

/// Findings of a part of a VirtualService or DestinationRule, named by its message; `None` for an unknown message.
pub(crate) fn fragment(message: &str, node: &Node) -> Option<Vec<Finding>> {
    let mut found = Findings::default();
    let at = At::root(node);
    match message {
        "HTTPRoute" => http_route::check(&mut found, &at, false),
        "RouteDestination[]" | "HTTPRouteDestination[]" => http_route::destinations(&mut found, &at),
        "CorsPolicy" => cors::check(&mut found, &at),
        "HTTPFaultInjection" => http_route::fault(&mut found, &at),
        "HTTPFaultInjection.Abort" => http_route::abort(&mut found, &at),
        "HTTPFaultInjection.Delay" => http_route::delay(&mut found, &at),
        "HTTPRetry" => http_route::retries(&mut found, &at),
        "HTTPRewrite" => http_route::rewrite(&mut found, &at),
        "RegexRewrite" => http_route::regex_rewrite(&mut found, &at),
        "HTTPRedirect" => http_route::redirect(&mut found, &at, &[]),
        "HTTPDirectResponse" => http_route::direct_response(&mut found, &at),
        "HTTPMirrorPolicy[]" => http_route::mirrors(&mut found, &at),
        "Destination" => http_route::destination(&mut found, &at),
        "HTTPMatchRequest" => http_match::request(&mut found, &at),
        "StringMatch" => http_match::string(&mut found, &at, false),
        "L4MatchAttributes" => virtual_service::tcp_match(&mut found, &at),
        "TCPRoute" => virtual_service::tcp_route(&mut found, &at),
        "PortSelector" => found.port(&at.get("number")),
        "TrafficPolicy" => destination_rule::policy(&mut found, &at),
        "ConnectionPoolSettings" => pool::check(&mut found, &at),
        "LoadBalancerSettings" => destination_rule::balancer(&mut found, &at, true),
        "LocalityLoadBalancerSetting" => locality::check(&mut found, &at, true),
        "ZoneAwareLoadBalancerSetting" => locality::zone_aware(&mut found, &at, true),
        "OutlierDetection" => destination_rule::outlier(&mut found, &at),
        "ClientTLSSettings" => tls::check(&mut found, &at),
        "Subset" => destination_rule::subset(&mut found, &at),
        "TrafficPolicy.TunnelSettings" => destination_rule::tunnel(&mut found, &at),
        "TrafficPolicy.ProxyProtocol" => destination_rule::proxy_protocol(&mut found, &at),
        "PortTrafficPolicy[]" | "TrafficPolicy.PortTrafficPolicy[]" => destination_rule::port_levels(&mut found, &at),
        "ServerTLSSettings" => server_tls::check(&mut found, &at),
        "WorkloadEntry" => workload::entry(&mut found, &at, None, true),
        "ReadinessProbe" => workload::probe(&mut found, &at),
        _ => return None,
    }
    Some(found.0)
}

#[cfg(test)]
mod tests;
