//! One compilation: objects of one moment, one proxy, one model.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::advice::advice;
use super::identity::{self, Identity};
use crate::bootstrap::Node;
use crate::compile::destination_rules::{self, DestinationRules};
use crate::compile::policies::TokenPolicy;
use crate::compile::view::{Egress, Interception, OutboundPolicy, Policies, Settings, View};
use crate::compile::virtual_services::{self, Routes};
use crate::compile::{assemble, authz, authz_provider, clusters, peer_auth, policies, settings, telemetry};
use crate::istio::mesh_config::OutboundMode;
use crate::istio::proxy_config::ProxyConfig;
use crate::istio::sidecar::{self, Sidecar};
use crate::model::{Model, Reject, Severity};
use crate::objects::{Object, Objects};
use crate::registry::catalog::{Catalog, DOMAIN};
use crate::registry::scope::{self, Scope};
use crate::registry::{
    Protocol, Proxy, Service, ServicePort, ServiceTarget, TargetPort, ingress, names, services, targets,
};

/// A compiled model and whom it is for.
pub(super) struct Compiled {
    pub(super) model: Model,
    pub(super) identity: Identity,
}

/// Compiles `objects` for the proxy that `node` describes.
///
/// # Errors
/// The proxy's identity cannot be found.
pub(super) fn compile(objects: &Objects, node: &Node, told_enough: bool) -> Result<Compiled, String> {
    let cluster = node.text("CLUSTER_ID");
    let cluster = if cluster.is_empty() { "Kubernetes" } else { &cluster };
    let catalog = Catalog::new(objects, trust_domain(objects), cluster, node.text("DNS_CAPTURE") == "true");
    let identity = identity::identify(node, objects, &catalog, told_enough)?;
    let mut model = Model::default();
    fill(objects, &catalog, &identity, &mut model);
    model.rejects.extend(advice(objects, &catalog));
    Ok(Compiled { model, identity })
}

/// The mesh's trust domain.
pub(super) fn trust_domain(objects: &Objects) -> &str {
    let said = objects.mesh.trust_domain.as_str();
    if said.is_empty() { DOMAIN } else { said }
}

fn fill(objects: &Objects, catalog: &Catalog<'_>, identity: &Identity, model: &mut Model) {
    let (mesh, proxy) = (&objects.mesh, &identity.proxy);
    let config = settings::proxy_config(mesh, proxy);
    let mut settings = settings::settings(mesh, &config, proxy, &mut model.rejects);
    telemetry_of(objects, proxy, (&config, &catalog.services), &mut settings, model);
    let own = targets::targets(catalog, &identity.me, proxy);
    let Seen { egress, targets, closed } = apply_sidecar(objects, proxy, own, &mut settings, &mut model.rejects);
    let (namespace, export) = (proxy.namespace.as_str(), mesh.default_service_export_to.as_slice());
    let exported = services::visible(&catalog.services, namespace, export, &Scope::default());
    let routes = routes(objects, proxy, &mut model.rejects);
    let egress =
        scoped(&egress, proxy, |scope| services::visible(&catalog.services, namespace, export, scope), &routes);
    let (visible, routes) = seen(&egress, &exported, routes);
    let dependencies = scope::dependencies(&exported, &visible, routes.iter().map(|r| &r.spec), namespace);
    let peers = peer_policies(objects);
    let mtls = peer_auth::effective(&peers, &settings.root_namespace, &proxy.namespace, &proxy.labels);
    let mut policies = policies_of(objects, proxy, &settings, &catalog.services, &mut model.rejects);
    policies.unusable = policies.unusable.or(closed);
    let sources: Vec<destination_rules::Source<'_>> = objects
        .destination_rules
        .iter()
        .map(|o| destination_rules::Source { namespace: &o.meta.namespace, name: &o.meta.name, spec: &o.spec })
        .collect();
    let reachable: Vec<Arc<Service>> = visible.iter().chain(&dependencies).cloned().collect();
    let rules = DestinationRules::new(&sources, &reachable, proxy, &settings, &mesh.default_destination_rule_export_to);
    let view = View {
        proxy,
        mesh: &settings,
        services: &visible,
        dependencies: &dependencies,
        egress: &egress,
        targets: &targets,
        virtual_services: &routes,
        mtls: &mtls,
        policies: &policies,
        rules: &|host, port, subset| destination_rules::rules_of(&rules, host, port, subset),
        endpoints: &|service, port| catalog.endpoints(service, port),
    };
    assemble::fill(&view, model);
    let inputs = clusters::Inputs { rules: &rules, mesh, peer_policies: &peers, networks: &objects.networks };
    clusters::fill(&view, inputs, model);
    model.names = names::names(catalog, &reachable, proxy).into();
}

/// What is told of the proxy's traffic, put into the settings.
fn telemetry_of(
    objects: &Objects,
    proxy: &Proxy,
    (config, services): (&ProxyConfig, &[Arc<Service>]),
    settings: &mut Settings,
    model: &mut Model,
) {
    let sources: Vec<telemetry::Source<'_>> = objects
        .telemetries
        .iter()
        .map(|o| telemetry::Source { namespace: &o.meta.namespace, name: &o.meta.name, spec: &o.spec })
        .collect();
    let knows = |host: &str, namespace: Option<&str>| {
        services.iter().any(|s| s.hostname == host && namespace.is_none_or(|n| n == s.namespace))
    };
    let root = settings.root_namespace.clone();
    let context = telemetry::Context { mesh: &objects.mesh, config, proxy, root: &root, knows: &knows };
    let both = telemetry::compile(&sources, context, &mut model.rejects);
    settings.inbound_told = both.inbound;
    settings.outbound_told = both.outbound;
    model.default_metrics = both.default_metrics;
}

fn routes(objects: &Objects, proxy: &Proxy, rejects: &mut Vec<Reject>) -> Vec<Routes> {
    let sources: Vec<virtual_services::Source<'_>> = objects
        .virtual_services
        .iter()
        .map(|o| virtual_services::Source { namespace: &o.meta.namespace, name: &o.meta.name, spec: &o.spec })
        .collect();
    let export = &objects.mesh.default_virtual_service_export_to;
    virtual_services::visible(&sources, &proxy.namespace, DOMAIN, export, rejects)
}

fn peer_policies(objects: &Objects) -> Vec<peer_auth::Policy<'_>> {
    objects
        .peer_authentications
        .iter()
        .map(|o| peer_auth::Policy { namespace: &o.meta.namespace, name: &o.meta.name, spec: &o.spec })
        .collect()
}

fn policies_of(
    objects: &Objects,
    proxy: &Proxy,
    settings: &Settings,
    services: &[Arc<Service>],
    rejects: &mut Vec<Reject>,
) -> Policies {
    let knows = |host: &str, namespace: Option<&str>| {
        services.iter().any(|s| s.hostname == host && namespace.is_none_or(|n| n == s.namespace))
    };
    let providers = authz_provider::valid(&objects.mesh.extension_providers, &knows);
    let workload = authz::Workload {
        namespace: &proxy.namespace,
        labels: &proxy.labels,
        root_namespace: &settings.root_namespace,
        domains: &settings.trust_domains,
        providers: &providers,
    };
    let tokens: Vec<TokenPolicy<'_>> = objects
        .request_authentications
        .iter()
        .map(|o| TokenPolicy { namespace: &o.meta.namespace, name: &o.meta.name, spec: &o.spec })
        .collect();
    let mut out = policies::compile(&authz_policies(objects), &tokens, &workload, rejects);
    let broken = |b: &&crate::objects::Broken| b.selects(&proxy.namespace, &settings.root_namespace, &proxy.labels);
    if let Some(broken) = objects.broken.iter().find(broken) {
        out.unusable.get_or_insert_with(|| broken.resource.clone());
    }
    out
}

/// AuthorizationPolicies with their dry-run mark.
fn authz_policies(objects: &Objects) -> Vec<authz::Policy<'_>> {
    objects
        .authorization_policies
        .iter()
        .map(|o| authz::Policy {
            namespace: &o.meta.namespace,
            name: &o.meta.name,
            dry_run: o.meta.annotations.get("istio.io/dry-run").is_some_and(|v| v == "true"),
            spec: &o.spec,
        })
        .collect()
}

/// The Sidecar that holds for the proxy: its own namespace's with a matching selector, then without, then the root's.
fn sidecar<'o>(objects: &'o Objects, proxy: &Proxy, root: &str) -> Option<&'o Object<Sidecar>> {
    let own = || objects.sidecars.iter().filter(|s| s.meta.namespace == proxy.namespace);
    let selector = |s: &Object<Sidecar>| s.spec.workload_selector.as_ref().filter(|s| !s.labels.is_empty()).cloned();
    own()
        .find(|s| selector(s).is_some_and(|l| l.selects(&proxy.labels)))
        .or_else(|| own().find(|s| selector(s).is_none()))
        .or_else(|| objects.sidecars.iter().find(|s| s.meta.namespace == root && selector(s).is_none()))
}

/// The egress listeners of a Sidecar with what each sees.
fn scoped(
    said: &[sidecar::Egress],
    proxy: &Proxy,
    visible: impl Fn(&Scope) -> Vec<Arc<Service>>,
    routes: &[Routes],
) -> Vec<Egress> {
    let one = |said: &sidecar::Egress| {
        let scope = Scope::new(std::slice::from_ref(said), &proxy.namespace);
        let mut services = visible(&scope);
        let port = said.port.as_ref().map(|p| ServicePort {
            name: p.name.clone(),
            number: p.number,
            protocol: services::named(&p.protocol),
            target: TargetPort::Number(p.number),
        });
        // A forward proxy is asked for every port.
        if let Some(port) = port.as_ref().filter(|p| p.protocol != Protocol::HttpProxy) {
            scope::only_port(&mut services, port.number);
        }
        let routes = routes.iter().filter(|r| scope.virtual_service(&r.namespace, &r.spec.hosts)).cloned().collect();
        Egress { port, bind: said.bind.clone(), bound: said.capture_mode == "NONE", services, routes }
    };
    said.iter().map(one).collect()
}

/// What is seen through any listener; everything without a Sidecar's own.
fn seen(egress: &[Egress], exported: &[Arc<Service>], mut routes: Vec<Routes>) -> (Vec<Arc<Service>>, Vec<Routes>) {
    if egress.is_empty() {
        return (exported.to_vec(), routes);
    }
    let known = egress.iter().flat_map(|e| &e.routes).map(|r| (r.namespace.as_str(), r.name.as_str()));
    let known: BTreeSet<(&str, &str)> = known.collect();
    routes.retain(|r| known.contains(&(r.namespace.as_str(), r.name.as_str())));
    (scope::union(egress.iter().flat_map(|e| &e.services)), routes)
}

/// What is left after the Sidecar has been heard.
struct Seen {
    egress: Vec<sidecar::Egress>,
    targets: Vec<ServiceTarget>,
    /// The Sidecar, when it asks for a protection that is not given.
    closed: Option<String>,
}

/// What a Sidecar lets the proxy see and serve, and its policy for unknown traffic; what is not served of it is told.
fn apply_sidecar(
    objects: &Objects,
    proxy: &Proxy,
    own: Vec<ServiceTarget>,
    settings: &mut Settings,
    rejects: &mut Vec<Reject>,
) -> Seen {
    let Some(object) = sidecar(objects, proxy, &settings.root_namespace) else {
        return Seen { egress: Vec::new(), targets: own, closed: None };
    };
    let (meta, spec) = (&object.meta, &object.spec);
    let resource = format!("Sidecar {}/{}", meta.namespace, meta.name);
    let mut closed = None;
    let mut tell = |field: String, reason: String, endangers: bool| {
        if endangers {
            closed = Some(resource.clone());
        }
        rejects.push(Reject {
            resource: resource.clone(),
            place: None,
            field,
            reason,
            severity: if endangers { Severity::Security } else { Severity::Error },
            code: None,
        });
    };
    if let Some(policy) = &spec.outbound_traffic_policy {
        settings.outbound = match (&policy.egress_proxy, policy.mode) {
            (Some(proxy), _) => OutboundPolicy::EgressProxy(proxy.clone()),
            (None, OutboundMode::RegistryOnly) => OutboundPolicy::RegistryOnly,
            (None, OutboundMode::AllowAny | OutboundMode::AllowAnyDynamicDns) => OutboundPolicy::AllowAny,
        };
    }
    settings.inbound_pool.clone_from(&spec.inbound_connection_pool);
    for (index, said) in spec.egress.iter().enumerate().filter(|(_, e)| e.bind.starts_with("unix://")) {
        let reason = format!("{}: Unix domain sockets are not listened on yet", said.bind);
        tell(format!("spec.egress[{index}].bind"), reason, false);
    }
    let uncaptured = settings.interception == Interception::None;
    let targets = if spec.ingress.is_empty() {
        own
    } else {
        ingress::targets(&spec.ingress, (&meta.namespace, &meta.name), &own, (proxy, uncaptured), &mut tell)
    };
    Seen { egress: spec.egress.clone(), targets, closed }
}

/// What is wrong with objects whatever proxy they are for: every rule, VirtualService and policy by itself.
pub(super) fn check(objects: &Objects) -> Vec<Reject> {
    let mut out = Vec::new();
    for Object { meta, spec } in &objects.destination_rules {
        let rule = destination_rules::Source { namespace: &meta.namespace, name: &meta.name, spec };
        out.extend(crate::compile::destination_rule_check::check_one(rule));
    }
    let mut namespaces: BTreeSet<&str> = BTreeSet::new();
    namespaces.extend(objects.virtual_services.iter().map(|o| o.meta.namespace.as_str()));
    let mut seen = Vec::new();
    for namespace in namespaces {
        let proxy = Proxy { namespace: namespace.to_owned(), ..Proxy::default() };
        for routes in routes(objects, &proxy, &mut out) {
            if !seen.contains(&(routes.namespace.clone(), routes.name.clone())) {
                seen.push((routes.namespace.clone(), routes.name.clone()));
                out.extend(crate::compile::virtual_service_check::check(&routes));
            }
        }
    }
    let catalog = Catalog::new(objects, trust_domain(objects), "Kubernetes", false);
    for policy in &objects.authorization_policies {
        let selector = policy.spec.selector.clone().unwrap_or_default();
        let proxy =
            Proxy { namespace: policy.meta.namespace.clone(), labels: selector.match_labels, ..Proxy::default() };
        let config = settings::proxy_config(&objects.mesh, &proxy);
        let settings = settings::settings(&objects.mesh, &config, &proxy, &mut Vec::new());
        policies_of(objects, &proxy, &settings, &catalog.services, &mut out);
    }
    let proxy = Proxy::default();
    settings::settings(&objects.mesh, &settings::proxy_config(&objects.mesh, &proxy), &proxy, &mut out);
    out.extend(advice(objects, &catalog));
    out
}
