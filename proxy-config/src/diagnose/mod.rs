//! Istio's analyzers: objects that are each good by themselves and together mean something else than they seem to.
//!
//! One file a family of analyzers, each analyzer a pure function from the [`World`] to messages. They never refuse
//! anything: what they say is printed by `validate`. Codes and levels are Istio's.

mod conditions;
mod deprecation;
mod destination_rule;
mod destinations;
mod policy;
mod service;
mod service_entry;
mod sidecar;
mod telemetry;
mod virtual_service;
mod world;

pub(crate) use world::{Item, World};

use crate::validate::{self, At, Weight};

/// How much a message means, in Istio's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Worth knowing.
    Info,
    /// Probably not what was meant.
    Warning,
    /// Traffic will not do what was said.
    Error,
}

/// What an analyzer says about one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Istio's code, `IST0101`.
    pub code: &'static str,
    /// Istio's level for the code.
    pub level: Level,
    /// Kind of the object.
    pub kind: String,
    /// Its namespace; empty for kinds without one.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Field path inside the object.
    pub field: String,
    /// `file:line:column`.
    pub place: String,
    /// What was found and what would be expected.
    pub reason: String,
    /// False when the message rests on something not being among the objects that need not be there: files hold
    /// configuration and rarely the Pods and Namespaces of a cluster.
    pub sure: bool,
}

/// An analyzer under Istio's name.
type Analyzer = (&'static str, fn(&World<'_>, &mut Vec<Message>));

/// Every analyzer; `schema` stands for the ones of the kinds' own validation.
const ANALYZERS: [Analyzer; 20] = [
    ("authn.BlockedCIDRsAnalyzer", policy::unrestricted_key_fetches),
    ("authz.AuthorizationPoliciesAnalyzer", policy::authorization),
    ("conditions.ConditionAnalyzer", conditions::check),
    ("deprecation.FieldAnalyzer", deprecation::check),
    ("destinationrule.CaCertificateAnalyzer", destination_rule::unverified),
    ("destinationrule.PodNotSelectedAnalyzer", destination_rule::subsets),
    ("k8sgateway.SelectorAnalyzer", policy::gateway_selectors),
    ("multicluster.MeshNetworksAnalyzer", service::networks),
    ("multicluster.ServiceAnalyzer", service::clusters),
    ("service.PortNameAnalyzer", service::port_names),
    ("serviceentry.ConflictingServiceEntryProtocolAnalyzer", service_entry::protocols),
    ("serviceentry.ProtocolAddressesAnalyzer", service_entry::addresses),
    ("sidecar.SelectorAnalyzer", sidecar::selectors),
    ("telemetry.DefaultSelectorAnalyzer", telemetry::defaults),
    ("telemetry.LightstepAnalyzer", telemetry::lightstep),
    ("telemetry.ProviderAnalyzer", telemetry::providers),
    ("telemetry.SelectorAnalyzer", telemetry::selectors),
    ("virtualservice.ConflictingMeshGatewayHostsAnalyzer", virtual_service::hosts),
    ("virtualservice.GatewayAnalyzer", virtual_service::gateways),
    ("virtualservice.JWTClaimRouteAnalyzer", virtual_service::claims),
];

/// Those that follow destinations.
const MORE: [Analyzer; 2] = [
    ("virtualservice.DestinationHostAnalyzer", destinations::hosts),
    ("virtualservice.DestinationRuleAnalyzer", destinations::subsets),
];

/// What every analyzer says, or only the one with Istio's name for it; `None` when there is none of that name.
pub(crate) fn run(world: &World<'_>, only: Option<&str>) -> Option<Vec<Message>> {
    let mut out = Vec::new();
    let Some(only) = only else {
        for (_, analyze) in ANALYZERS.iter().chain(&MORE) {
            analyze(world, &mut out);
        }
        return Some(out);
    };
    if let Some(kind) = only.strip_prefix("schema.") {
        own_validation(world, kind, &mut out);
        return Some(out);
    }
    let (_, analyze) = ANALYZERS.iter().chain(&MORE).find(|(name, _)| *name == only)?;
    analyze(world, &mut out);
    Some(out)
}

/// The kinds' own validation in the words of an analyzer; `name` ends with the kind.
fn own_validation(world: &World<'_>, name: &str, out: &mut Vec<Message>) {
    let kind = name.trim_end_matches(')').rsplit(['.', '(']).next().unwrap_or_default();
    for item in world.of(kind) {
        for finding in item.document().map(|n| validate::object(kind, n)).unwrap_or_default() {
            let code = finding.code.unwrap_or(match finding.weight {
                Weight::Warning => "IST0133",
                _ => "IST0106",
            });
            // What the schema refuses never reaches Istio's validation.
            if !matches!(finding.weight, Weight::Unknown | Weight::Schema) {
                let mut message = item.message(code, &item.root, finding.reason);
                message.field = finding.field;
                out.push(message);
            }
        }
    }
}

/// Istio's level of a code.
fn level(code: &str) -> Level {
    match code {
        "IST0118" | "IST0131" => Level::Info,
        "IST0101" | "IST0106" | "IST0109" | "IST0110" | "IST0111" | "IST0112" | "IST0126" | "IST0149" | "IST0159"
        | "IST0160" | "IST0173" => Level::Error,
        _ => Level::Warning,
    }
}

/// Whether labels have everything that a selector asks for.
fn selects(selector: &At<'_>, labels: &At<'_>) -> bool {
    let labels = labels.entries();
    selector.entries().iter().all(|(k, v)| labels.iter().any(|(l, w)| l == k && w.text() == v.text()))
}
