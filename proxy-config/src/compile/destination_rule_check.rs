//! What a DestinationRule, the mesh or its networks ask of clusters and is not done, told by name.

use super::cluster_tls;
use super::clusters::Inputs;
use super::destination_rules::{DestinationRules, Source};
use crate::istio::destination_rule::{ClientTls, LoadBalancer, TlsMode, TrafficPolicy};
use crate::model::{Reject, Severity};

/// Everything that the rules in force say and that is not served as said.
pub(super) fn check(rules: &DestinationRules) -> Vec<Reject> {
    let applied = rules.all().into_iter();
    applied.flat_map(|r| check_one(Source { namespace: &r.namespace, name: &r.name, spec: &r.spec })).collect()
}

/// The same for one rule as it was written, whatever proxy it is for.
pub fn check_one(rule: Source<'_>) -> Vec<Reject> {
    let mut out = Vec::new();
    let mut told = Told { resource: format!("DestinationRule {}/{}", rule.namespace, rule.name), out: &mut out };
    let selector = rule.spec.workload_selector.is_some();
    if let Some(policy) = &rule.spec.traffic_policy {
        told.policy("spec.trafficPolicy", policy, selector);
    }
    for (i, subset) in rule.spec.subsets.iter().enumerate() {
        if rule.spec.subsets[..i].iter().any(|s| s.name == subset.name) {
            told.warning(&format!("spec.subsets[{i}].name"), "was said before; the first subset of a name counts");
        }
        if let Some(policy) = &subset.traffic_policy {
            told.policy(&format!("spec.subsets[{i}].trafficPolicy"), policy, selector);
        }
    }
    out
}

/// The same for what the mesh says to every cluster.
pub(super) fn check_mesh(inputs: Inputs<'_>) -> Vec<Reject> {
    let mut out = Vec::new();
    let mut told = Told { resource: "MeshConfig".to_owned(), out: &mut out };
    if inputs.mesh.zone_aware_lb_setting.is_some() {
        told.error("zoneAwareLbSetting", "zone-aware routing is not supported yet; localities are not told apart");
    }
    let mut told = Told { resource: "MeshNetworks".to_owned(), out: &mut out };
    for (name, network) in &inputs.networks.networks {
        for (i, gateway) in network.gateways.iter().enumerate() {
            let field = format!("networks.{name}.gateways[{i}]");
            if !gateway.registry_service_name.is_empty() {
                told.error(&format!("{field}.registryServiceName"), "gateways by service name are not supported yet");
            } else if gateway.address.parse::<std::net::IpAddr>().is_err() {
                told.error(&format!("{field}.address"), "a gateway needs an IP address; this one is left out");
            }
        }
    }
    out
}

struct Told<'a> {
    resource: String,
    out: &'a mut Vec<Reject>,
}

impl Told<'_> {
    fn tell(&mut self, field: &str, reason: &str, severity: Severity) {
        self.out.push(Reject {
            resource: self.resource.clone(),
            place: None,
            field: field.to_owned(),
            reason: reason.to_owned(),
            severity,
            code: None,
        });
    }

    fn error(&mut self, field: &str, reason: &str) {
        self.tell(field, reason, Severity::Error);
    }

    fn warning(&mut self, field: &str, reason: &str) {
        self.tell(field, reason, Severity::Warning);
    }

    fn policy(&mut self, at: &str, policy: &TrafficPolicy, selector: bool) {
        let ports = policy.port_level_settings.iter().enumerate();
        let ports = ports.map(|(i, p)| (format!("{at}.portLevelSettings[{i}]"), &p.load_balancer, &p.tls));
        let whole = (at.to_owned(), &policy.load_balancer, &policy.tls);
        for (at, lb, tls) in std::iter::once(whole).chain(ports) {
            if let Some(lb) = lb {
                self.balancer(&format!("{at}.loadBalancer"), lb);
            }
            if let Some(tls) = tls {
                self.tls(&format!("{at}.tls"), tls, selector);
            }
        }
        if policy.retry_budget.is_some_and(|b| b.budget_interval.is_some()) {
            let reason = "the budget counts active requests only; requests of the past do not widen it";
            self.warning(&format!("{at}.retryBudget.budgetInterval"), reason);
        }
        if policy.outlier_detection.as_ref().is_some_and(|o| o.consecutive_errors.is_some()) {
            let reason = "has no effect since Istio 1.5; say consecutive5xxErrors or consecutiveGatewayErrors";
            self.warning(&format!("{at}.outlierDetection.consecutiveErrors"), reason);
        }
    }

    fn balancer(&mut self, at: &str, lb: &LoadBalancer) {
        if lb.zone_aware_lb_setting.is_some() {
            let reason = "zone-aware routing is not supported yet; localities are not told apart";
            self.error(&format!("{at}.zoneAwareLbSetting"), reason);
        }
        if let Some(warmup) = &lb.warmup {
            let reason = "the ramp is linear from 10 percent; other shapes are not supported yet";
            if warmup.aggression.is_some_and(|a| a != 1.0) {
                self.warning(&format!("{at}.warmup.aggression"), reason);
            }
            if warmup.minimum_percent.is_some_and(|p| p != 10.0) {
                self.warning(&format!("{at}.warmup.minimumPercent"), reason);
            }
        }
        let cookie = lb.consistent_hash.as_ref().and_then(|h| h.http_cookie.as_ref());
        if cookie.is_some_and(|c| !c.attributes.is_empty()) {
            let reason = "attributes are not supported yet; the cookie is made without them";
            self.warning(&format!("{at}.consistentHash.httpCookie.attributes"), reason);
        }
    }

    fn tls(&mut self, at: &str, tls: &ClientTls, selector: bool) {
        if !matches!(tls.mode, TlsMode::Simple | TlsMode::Mutual) {
            return;
        }
        if !tls.credential_name.is_empty() && !selector {
            let reason = "is ignored without workloadSelector, as Istio does: connections are plaintext";
            self.warning(&format!("{at}.credentialName"), reason);
        } else if let Some(what) = cluster_tls::unusable(tls) {
            self.error(at, &format!("{what} cannot be served: connections to the host fail"));
        }
        if tls.insecure_skip_verify == Some(true) {
            self.warning(&format!("{at}.insecureSkipVerify"), "the server's certificate is not verified");
        }
    }
}
