//! DestinationRule.

use super::at::At;
use super::selector::{self, Exported};
use super::{Findings, duration, locality, names, pool, tls};

/// Findings of a DestinationRule.
pub(super) fn check(found: &mut Findings, root: &At<'_>) {
    let spec = root.get("spec");
    let host = spec.get("host");
    found.expect(names::is_wildcard_host(host.text()), &host, "a host name is expected");
    policy(found, &spec.get("trafficPolicy"));
    let mut seen: Vec<&str> = Vec::new();
    for item in spec.get("subsets").items() {
        let name = item.get("name");
        found.expect(
            !seen.contains(&name.text()),
            &name,
            "the name was said before; the first subset of a name counts",
        );
        seen.push(name.text());
        subset(found, &item);
    }
    config_maps(found, root);
    let selects = spec.get("workloadSelector");
    let of = if selects.is_said() { Exported::Selecting } else { Exported::Plain };
    selector::export_to(found, root, of);
    selector::workload(found, &selects);
}

/// Config maps of other namespaces are not read.
fn config_maps(found: &mut Findings, root: &At<'_>) {
    let own = match root.at("metadata.namespace").text() {
        "" => "default",
        said => said,
    };
    let spec = root.get("spec");
    let subsets = spec.get("subsets").items();
    let policies = subsets.iter().map(|s| s.get("trafficPolicy")).chain([spec.get("trafficPolicy")]);
    let settings = policies.flat_map(|p| {
        let mut all = p.get("portLevelSettings").items();
        all.push(p);
        all
    });
    for credential in settings.map(|s| s.at("tls.credentialName")) {
        let named = credential.text().strip_prefix("configmap://").and_then(|n| n.split_once('/'));
        let other = named.is_some_and(|(namespace, name)| !name.is_empty() && (namespace != own || own.is_empty()));
        found.expect(!other, &credential, "a ConfigMap of the rule's own namespace is expected");
    }
}

/// One entry of `subsets`.
pub(super) fn subset(found: &mut Findings, at: &At<'_>) {
    let name = at.get("name");
    found.expect(names::is_label(name.text()), &name, "a name of letters, digits and dashes is expected");
    selector::labels(found, &at.get("labels"));
    policy(found, &at.get("trafficPolicy"));
}

/// `trafficPolicy`.
pub(super) fn policy(found: &mut Findings, at: &At<'_>) {
    const BLOCKS: [&str; 8] = [
        "outlierDetection",
        "connectionPool",
        "loadBalancer",
        "tls",
        "portLevelSettings",
        "tunnel",
        "proxyProtocol",
        "retryBudget",
    ];
    // A fragment is a policy even when nothing is in it.
    if !at.is_said() {
        return;
    }
    if !BLOCKS.iter().any(|b| at.get(b).is_said()) {
        found.add(at, "at least one of its fields is expected");
        return;
    }
    let (tunnel, proxy) = (at.get("tunnel"), at.get("proxyProtocol"));
    found.expect(!(tunnel.is_said() && proxy.is_said()), &proxy, "only one of tunnel and proxyProtocol may be set");
    blocks(found, at);
    port_levels(found, &at.get("portLevelSettings"));
    self::tunnel(found, &tunnel);
    proxy_protocol(found, &proxy);
}

fn blocks(found: &mut Findings, at: &At<'_>) {
    let bad = at.get("outlierDetection");
    outlier(found, &bad);
    pool::check(found, &at.get("connectionPool"));
    balancer(found, &at.get("loadBalancer"), bad.is_said());
    tls::check(found, &at.get("tls"));
}

/// `portLevelSettings`.
pub(super) fn port_levels(found: &mut Findings, list: &At<'_>) {
    for item in list.items() {
        let port = item.get("port");
        found.expect(port.is_said(), &port, "the port is missing");
        let blocks = ["outlierDetection", "connectionPool", "loadBalancer", "tls"];
        found.expect(blocks.iter().any(|b| item.get(b).is_said()), &item, "at least one of its fields is expected");
        self::blocks(found, &item);
    }
}

/// `proxyProtocol`.
pub(super) fn proxy_protocol(found: &mut Findings, at: &At<'_>) {
    let version = at.get("version");
    let known = matches!(version.text(), "" | "V1" | "V2" | "0" | "1");
    found.expect(known, &version, "V1 or V2 is expected");
}

/// `tunnel`.
pub(super) fn tunnel(found: &mut Findings, at: &At<'_>) {
    if !at.is_said() {
        return;
    }
    let (protocol, host) = (at.get("protocol"), at.get("targetHost"));
    found.expect(matches!(protocol.text(), "" | "CONNECT" | "POST"), &protocol, "CONNECT or POST is expected");
    let good = names::is_fqdn(host.text()) || names::is_address(host.text());
    found.expect(good, &host, "a host name or an IP address is expected");
    found.port(&at.get("targetPort"));
}

/// `outlierDetection`.
pub(super) fn outlier(found: &mut Findings, at: &At<'_>) {
    duration::check(found, &at.get("baseEjectionTime"));
    let old = at.get("consecutiveErrors");
    if old.whole_or_zero() != 0 {
        found.warn(&old, "has no effect since Istio 1.5; say consecutive5xxErrors or consecutiveGatewayErrors");
    }
    let local = at.get("consecutiveLocalOriginFailures");
    let split = at.get("splitExternalLocalOriginErrors").is_true();
    let reason = "local failures are told apart only with splitExternalLocalOriginErrors";
    found.expect(split || local.whole_or_zero() <= 0, &local, reason);
    duration::check(found, &at.get("interval"));
    for field in ["maxEjectionPercent", "minHealthPercent"].map(|f| at.get(f)) {
        let good = (0..=100).contains(&field.whole_or_zero());
        found.expect(good, &field, "a percentage from 0 to 100 is expected");
    }
}

/// `loadBalancer`; `outlier` says whether the same policy has `outlierDetection`.
pub(super) fn balancer(found: &mut Findings, at: &At<'_>, outlier: bool) {
    consistent_hash(found, &at.get("consistentHash"));
    let (local, zones) = (at.get("localityLbSetting"), at.get("zoneAwareLbSetting"));
    let both = local.is_said() && zones.is_said();
    found.expect(!both, &zones, "only one of localityLbSetting and zoneAwareLbSetting may be set");
    locality::check(found, &local, outlier);
    locality::zone_aware(found, &zones, outlier);
    let warmup = at.get("warmup");
    if !warmup.is_said() {
        return;
    }
    let duration = warmup.get("duration");
    found.expect(duration.is_said(), &duration, "a duration is missing");
    duration::check(found, &duration);
    let percent = warmup.get("minimumPercent");
    let good = percent.number().is_none_or(|p| p <= 100.0);
    found.expect(good, &percent, "a percentage from 0 to 100 is expected");
    let aggression = warmup.get("aggression");
    found.expect(aggression.number().is_none_or(|a| a > 0.0), &aggression, "a number greater than 0 is expected");
}

fn consistent_hash(found: &mut Findings, at: &At<'_>) {
    let cookie = at.get("httpCookie");
    found.expect(!cookie.is_said() || cookie.get("name").has_text(), &cookie.get("name"), "a name is missing");
    let mut seen: Vec<&str> = Vec::new();
    for attribute in cookie.get("attributes").items() {
        let name = attribute.get("name");
        found.expect(name.has_text(), &name, "a name is missing");
        found.expect(!seen.contains(&name.text()), &name, "the attribute stands here twice");
        seen.push(name.text());
    }
    let (old, maglev) = (at.get("minimumRingSize"), at.get("maglev"));
    if old.whole_or_zero() != 0 {
        found.warn(&old, "the field is outdated: say ringHash.minimumRingSize");
        let more = maglev.is_said() || at.get("ringHash").is_said();
        found.expect(!more, &old, "only one of minimumRingSize, ringHash and maglev may be set");
    }
    if maglev.is_said() {
        let size = maglev.get("tableSize");
        let good = u64::try_from(size.whole_or_zero()).is_ok_and(|s| s < MAGLEV && is_prime(s));
        found.expect(good, &size, "a prime number below 5000011 is expected");
    }
}

/// The size that Envoy's table stays below.
const MAGLEV: u64 = 5_000_011;

fn is_prime(n: u64) -> bool {
    n > 0 && (n < 4 || (n % 2 == 1 && (3..).step_by(2).take_while(|f| f * f <= n).all(|f| !n.is_multiple_of(f))))
}
