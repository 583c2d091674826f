use std::collections::BTreeMap;

use super::*;
use crate::model::{HealthStatus, Listener};
use crate::registry::catalog::Catalog;

const VM: &str = r#"{"id": "sidecar~10.0.1.5~legacy-payment-service.payments~payments.svc.cluster.local",
    "metadata": {"SERVICE_ACCOUNT": "payment-service-sa", "AUTO_REGISTER_GROUP": "legacy-payment-service",
                 "NETWORK": "vm-network", "CLUSTER_ID": "Kubernetes", "LABELS": {"app": "payment-service"}}}"#;

const CLIENT: &str = r#"{"id": "sidecar~10.1.0.9~frontend-1.frontend~frontend.svc.cluster.local",
    "metadata": {"CLUSTER_ID": "Kubernetes", "LABELS": {"app": "frontend"}}}"#;

/// The examples without the entries and groups named.
fn seed(without: &[&str]) -> Vec<Source> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/seed");
    let mut files: Vec<_> =
        std::fs::read_dir(folder).expect("the examples").map(|f| f.expect("readable").path()).collect();
    files.sort();
    let named = |p: &std::path::PathBuf| p.file_name().expect("a file").to_string_lossy().into_owned();
    files
        .iter()
        .filter(|p| !without.iter().any(|w| named(p).starts_with(w)))
        .map(|p| Source { name: named(p), text: std::fs::read_to_string(p).expect("text") })
        .collect()
}

fn inputs(sources: Vec<Source>, node: &str) -> Inputs {
    Inputs { sources, mesh: None, networks: None, who: WhoAmI::Node(node.to_owned()) }
}

fn file(name: &str, text: &str) -> Source {
    Source { name: name.to_owned(), text: text.to_owned() }
}

fn load(sources: Vec<Source>, node: &str) -> Loaded {
    from_yaml(&inputs(sources, node), None).expect("an identity")
}

fn told(loaded: &Loaded, severity: Severity) -> Vec<String> {
    loaded.model.rejects.iter().filter(|r| r.severity == severity).map(ToString::to_string).collect()
}

fn inbound(loaded: &Loaded) -> &Listener {
    &loaded.model.listeners["virtualInbound"]
}

#[test]
fn every_seed_example_loads() {
    let all = load(seed(&[]), VM);
    assert_eq!((told(&all, Severity::Error), told(&all, Severity::Security)), (Vec::new(), Vec::new()));
    assert!(all.unread.is_empty(), "{:?}", all.unread);
    assert!(all.model.inert.contains("IstioOperator istio-system/istio"));
    assert!(!all.proxy.auto_registered, "the entry of y03 is the proxy's own");
    for source in seed(&[]) {
        assert_eq!(
            validate(std::slice::from_ref(&source)).iter().filter(|r| r.severity != Severity::Warning).count(),
            0
        );
        load(vec![source], CLIENT);
    }
}

#[test]
fn a_virtual_machine_registers_itself() {
    let loaded = load(seed(&["y03"]), VM);
    assert!(loaded.proxy.auto_registered);
    let ports: Vec<u16> = inbound(&loaded).filter_chains.iter().filter_map(|c| c.matches.destination_port).collect();
    assert!(ports.contains(&8080) && ports.contains(&9090) && !ports.contains(&9091), "{ports:?}");
    assert_eq!(loaded.probe.as_ref().expect("a probe")["httpGet"]["path"], "/health");
    let entry = loaded.auto_entry.expect("an entry");
    assert_eq!(entry.name, "legacy-payment-service-10.0.1.5-vm-network");
    assert_eq!(entry.object["spec"]["ports"]["http"], 8080);
    // What it publishes is read back: first unhealthy, then an endpoint.
    for (healthy, hosts) in [(false, 0), (true, 1)] {
        let mut sources = seed(&["y03"]);
        sources.push(file("own.yaml", &entry.document(healthy, "", "2026-01-01T00:00:00Z")));
        let objects = objects::read(&Documents::new(&sources, None, None).objects).objects;
        let catalog = Catalog::new(&objects, "cluster.local", "Kubernetes", false);
        let service = catalog.services.iter().find(|s| s.name == "payment-service").expect("the service");
        let endpoints = catalog.endpoints(service, 8080);
        let usable: Vec<&str> =
            endpoints.iter().filter(|e| e.health != HealthStatus::Unhealthy).map(|e| &*e.workload).collect();
        assert_eq!(usable.len(), hosts, "healthy: {healthy}");
        assert!(!load(sources, VM).proxy.auto_registered);
    }
}

#[test]
fn what_the_client_is_given() {
    let loaded = load(seed(&[]), CLIENT);
    let listeners: Vec<&str> = loaded.model.listeners.keys().map(|n| &**n).collect();
    assert_eq!(listeners, ["0.0.0.0_5432", "0.0.0.0_8080", "0.0.0.0_9090", "virtualInbound", "virtualOutbound"]);
    let routes: Vec<&str> = loaded.model.routes.keys().map(|n| &**n).collect();
    assert_eq!(routes, ["5432", "8080", "9090"]);
    let warned = told(&loaded, Severity::Warning).join("\n");
    assert!(warned.contains("without clusterIP TCP ports 5432"), "{warned}");
}

#[test]
fn mistakes_have_places() {
    let loaded = load(
        vec![
            file(
                "a.yaml",
                "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: v}\nspec:\n  \
                            hosts: [a]\n  http:\n  - timeout: off\n    route: [{destination: {host: a}}]\n",
            ),
            file(
                "b.yaml",
                "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {name: w}\nspec:\n  \
                            hosts: [a]\n  htp: []\n  http: [{route: [{destination: {host: a}}]}]\n",
            ),
        ],
        CLIENT,
    );
    let errors = told(&loaded, Severity::Error);
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].starts_with("a.yaml:7:14: VirtualService default/v: spec.http[0].timeout: "), "{errors:?}");
    assert!(errors[0].ends_with("takes for the boolean false: quote it"), "{errors:?}");
    assert!(told(&loaded, Severity::Warning)[0].starts_with("b.yaml:6:8: VirtualService default/w: spec.htp: "));
    assert!(loaded.unread.contains("VirtualService.spec.htp"));
}

/// An AuthorizationPolicy of the VM's namespace with this spec.
fn policy(spec: &str) -> Source {
    file(
        "p.yaml",
        &format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: payments}}\nspec: {spec}\n"
        ),
    )
}

#[test]
fn a_broken_security_object_closes_the_workloads_it_selects() {
    for (spec, closed) in [
        ("{action: ALOW}", true),
        ("{action: DENY, rules: [{form: []}]}", true),
        ("{selector: {matchLabels: {app: other}}, action: ALOW}", false),
        ("{selector: {matchLabels: {app: payment-service}}, action: ALOW}", true),
        ("{selector: 1, action: DENY, rules: [{}]}", true),
        ("{action: DENY, rules: [{when: [{key: nonsense, values: [a]}]}]}", true),
    ] {
        let mut sources = seed(&["y09", "y10"]);
        sources.push(policy(spec));
        let vm = load(sources.clone(), VM);
        let unusable = inbound(&vm).filter_chains.iter().filter(|c| c.unusable.is_some()).count();
        assert_eq!(unusable > 0, closed, "{spec}");
        let client = load(sources, CLIENT);
        assert!(inbound(&client).filter_chains.iter().all(|c| c.unusable.is_none()), "{spec}: elsewhere");
    }
}

#[test]
fn on_reload_the_last_good_version_stays() {
    let with = |p: Source| inputs(vec![seed(&[])[4].clone(), p], VM);
    let good = from_yaml(&with(policy("{action: DENY, rules: [{}]}")), None).expect("an identity");
    for broken in ["{action: DENI}", "{action: DENY, rules: [{when: [{key: nonsense, values: [a]}]}]}", "["] {
        let next = from_yaml(&with(policy(broken)), Some(&good)).expect("an identity");
        assert!(next.model.listeners == good.model.listeners, "{broken}");
        assert_eq!(told(&next, Severity::Security).len(), usize::from(broken == "["), "{broken}");
        assert!(!next.model.rejects.is_empty(), "{broken}");
        // It stays through the next reload too, and a repaired one replaces it.
        let again = from_yaml(&with(policy(broken)), Some(&next)).expect("an identity");
        assert!(again.model.listeners == good.model.listeners, "{broken}");
        let repaired = from_yaml(&with(policy("{}")), Some(&again)).expect("an identity");
        assert!(repaired.model.listeners != good.model.listeners, "{broken}");
    }
}

#[test]
fn an_unknown_proxy_is_told_what_was_tried() {
    let variables = [("POD_NAME", "vm"), ("POD_NAMESPACE", "payments"), ("ISTIO_META_AUTO_REGISTER_GROUP", "none")];
    let mut variables: BTreeMap<String, String> =
        variables.map(|(k, v)| (k.to_owned(), v.to_owned())).into_iter().collect();
    let ask = |variables: &BTreeMap<String, String>| {
        let inputs = Inputs { sources: seed(&[]), mesh: None, networks: None, who: WhoAmI::Env(variables.clone()) };
        from_yaml(&inputs, None).map_err(|e| e[0].reason.clone())
    };
    let reason = ask(&variables).expect_err("no address");
    assert!(reason.contains("INSTANCE_IP") && reason.contains("Pod payments/vm"), "{reason}");
    variables.insert("INSTANCE_IP".to_owned(), "10.9.9.9".to_owned());
    let reason = ask(&variables).expect_err("no group");
    for tried in ["WorkloadEntry with address 10.9.9.9", "Pod with address", "WorkloadGroup payments/none"] {
        assert!(reason.contains(tried), "{reason}");
    }
    variables.insert("ISTIO_META_AUTO_REGISTER_GROUP".to_owned(), "legacy-payment-service".to_owned());
    assert_eq!(ask(&variables).expect("a group").proxy.service_account, "payment-service-sa");
}

/// A Sidecar of the VM's namespace with this spec.
fn sidecar(spec: &str) -> Source {
    file(
        "s.yaml",
        &format!(
            "apiVersion: networking.istio.io/v1\nkind: Sidecar\nmetadata: {{name: s, namespace: payments}}\nspec: {spec}\n"
        ),
    )
}

#[test]
fn a_sidecar_decides_what_is_seen_and_served() {
    let with = |spec: &str| {
        let mut sources = seed(&[]);
        sources.push(sidecar(spec));
        load(sources, VM)
    };
    let seen = with("{egress: [{hosts: ['hybrid-app/*']}]}");
    let listeners: Vec<&str> = seen.model.listeners.keys().map(|n| &**n).collect();
    assert_eq!(listeners, ["0.0.0.0_5432", "virtualInbound", "virtualOutbound"]);
    let ports = |loaded: &Loaded| -> Vec<u16> {
        let mut out: Vec<u16> =
            inbound(loaded).filter_chains.iter().filter_map(|c| c.matches.destination_port).collect();
        out.dedup();
        out
    };
    let served = with("{ingress: [{port: {number: 9999, protocol: HTTP, name: h}, defaultEndpoint: '127.0.0.1:80'}]}");
    assert_eq!(ports(&served), [15006, 9999]);
    assert!(served.model.clusters.contains_key("inbound|9999||"));
    assert!(inbound(&served).filter_chains.iter().all(|c| c.unusable.is_none()));
    let tls = with("{ingress: [{port: {number: 9999, protocol: TLS, name: h}, tls: {mode: SIMPLE}}]}");
    assert!(inbound(&tls).filter_chains[1..].iter().all(|c| c.unusable.is_some()), "its TLS is not served");
}

fn with_sidecar(spec: &str, node: &str) -> Loaded {
    let mut sources = seed(&[]);
    sources.push(sidecar(spec));
    load(sources, node)
}

fn names<T>(of: &BTreeMap<crate::model::Name, T>, part: &str) -> Vec<String> {
    of.keys().filter(|n| n.contains(part)).map(|n| n.to_string()).collect()
}

#[test]
fn egress_listeners_see_their_own_hosts() {
    let own =
        "{egress: [{port: {number: 8080, protocol: HTTP, name: p}, hosts: ['payments/*']}, {hosts: ['hybrid-app/*']}]}";
    let loaded = with_sidecar(own, VM);
    assert_eq!(names(&loaded.model.listeners, "_"), ["0.0.0.0_5432", "0.0.0.0_8080"]);
    assert_eq!(names(&loaded.model.clusters, "outbound|9090"), [""; 0], "the other port of the service is not seen");
    let hosts: Vec<&str> = loaded.model.routes["8080"].virtual_hosts.iter().map(|v| &*v.name).collect();
    assert_eq!(hosts, ["payment-service.payments.svc.cluster.local:8080", "allow_any"]);
}

#[test]
fn a_forward_proxy_is_asked_for_every_port() {
    let proxy = "{egress: [{port: {number: 3128, protocol: HTTP_PROXY, name: p}, bind: 127.0.0.1, captureMode: NONE, \
                 hosts: ['payments/*']}]}";
    let loaded = with_sidecar(proxy, VM);
    assert!(loaded.model.listeners["127.0.0.1_3128"].bind_to_port);
    let table = &loaded.model.routes["3128"];
    let domains: Vec<&String> = table.virtual_hosts.iter().flat_map(|v| &v.domains).collect();
    for known in ["payment-service:8080", "payment-service.payments:9090"] {
        assert!(domains.iter().any(|d| *d == known), "{known} in {domains:?}");
    }
    assert!(!table.ignore_port_in_host_matching);
}

#[test]
fn without_capture_everything_listens() {
    let node = VM.replace("\"NETWORK\"", "\"INTERCEPTION_MODE\": \"NONE\", \"NETWORK\"");
    let ingress = "{ingress: [{port: {number: 9999, protocol: HTTP, name: h}, defaultEndpoint: '127.0.0.1:80'}]}";
    let loaded = with_sidecar(ingress, &node);
    let listeners = &loaded.model.listeners;
    assert!(listeners.values().all(|l| l.bind_to_port && !l.use_original_dst), "{:?}", listeners.keys());
    assert!(listeners.contains_key("10.0.1.5_9999") && listeners.contains_key("127.0.0.1_5432"));
    assert!(names(listeners, "virtual").is_empty());
    assert_eq!(names(&loaded.model.clusters, "inbound|"), ["inbound|9999||"]);
}

#[test]
fn a_sidecars_own_tls_takes_the_place_of_no_mtls() {
    let mode = |mode: &str| {
        let policy = format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: p, namespace: payments}}\n\
             spec: {{selector: {{matchLabels: {{app: payment-service}}}}, portLevelMtls: {{9999: {{mode: {mode}}}}}}}\n"
        );
        let own = "{ingress: [{port: {number: 9999, protocol: HTTPS, name: h}, defaultEndpoint: '127.0.0.1:80', \
                   tls: {mode: MUTUAL, serverCertificate: /c, privateKey: /k, caCertificates: /r}}]}";
        let mut sources = seed(&["y11"]);
        sources.extend([sidecar(own), file("p.yaml", &policy)]);
        let loaded = load(sources, VM);
        let chains = inbound(&loaded).filter_chains.iter().filter(|c| c.matches.destination_port == Some(9999));
        let tls = |c: &crate::model::FilterChain| {
            c.tls.as_ref().map(|t| (t.common.certificates[0].to_string(), t.require_client_certificate))
        };
        chains.map(tls).collect::<Vec<_>>()
    };
    assert_eq!(mode("DISABLE"), [Some(("file-cert:/c~/k".to_owned(), true))]);
    assert!(mode("STRICT").iter().flatten().all(|(certificate, _)| certificate == "default"));
    for broken in [
        "{mode: SIMPLE}",
        "{mode: ISTIO_MUTUAL}",
        "{mode: SIMPLE, credentialName: c}",
        "{mode: MUTUAL, serverCertificate: c, privateKey: k}",
    ] {
        let own = format!("{{ingress: [{{port: {{number: 9999, protocol: TLS, name: h}}, tls: {broken}}}]}}");
        let loaded = with_sidecar(&own, VM);
        assert!(inbound(&loaded).filter_chains[1..].iter().all(|c| c.unusable.is_some()), "{broken}");
    }
}

#[test]
fn istios_own_validation_holds() {
    let of = |kind: &str, spec: &str| {
        let group =
            if kind.ends_with("Policy") || kind.ends_with("Authentication") { "security" } else { "networking" };
        let text = format!("apiVersion: {group}.istio.io/v1\nkind: {kind}\nmetadata: {{name: x}}\nspec: {spec}\n");
        let found = validate(&[file("x.yaml", &text)]);
        let first = found.iter().find(|r| r.severity != Severity::Warning);
        first.map(|r| r.field.clone()).unwrap_or_default()
    };
    for (kind, spec, wrong) in [
        (
            "AuthorizationPolicy",
            "{rules: [{from: [{source: {ipBlocks: [x]}}]}]}",
            "spec.rules[0].from[0].source.ipBlocks[0]",
        ),
        ("AuthorizationPolicy", "{rules: [{from: []}]}", "spec.rules[0].from"),
        ("AuthorizationPolicy", "{action: CUSTOM, rules: [{}]}", "spec.provider.name"),
        (
            "AuthorizationPolicy",
            "{rules: [{to: [{operation: {ports: ['70000']}}]}]}",
            "spec.rules[0].to[0].operation.ports[0]",
        ),
        ("AuthorizationPolicy", "{rules: [{to: [{operation: {paths: ['/a/{*}', '/b*', '/{**}']}}]}]}", ""),
        ("PeerAuthentication", "{mtls: {mode: STRICT}, portLevelMtls: {80: {mode: STRICT}}}", "spec.portLevelMtls"),
        ("PeerAuthentication", "{selector: {matchLabels: {a: b}}, portLevelMtls: {80: {mode: STRICT}}}", ""),
        ("RequestAuthentication", "{jwtRules: [{issuer: i, jwks: x}]}", "spec.jwtRules[0].jwks"),
        ("WorkloadEntry", "{network: far}", ""),
        ("WorkloadEntry", "{labels: {a: b}}", "spec.address"),
        ("WorkloadGroup", "{template: {}, probe: {exec: {}}}", "spec.probe.exec.command"),
        ("ServiceEntry", "{hosts: ['*'], ports: [{number: 80, name: a}]}", "spec.hosts[0]"),
        ("ServiceEntry", "{hosts: ['*.a.b'], resolution: DNS, ports: [{number: 80, name: a}]}", "spec.hosts[0]"),
        ("ServiceEntry", "{hosts: [a.b], resolution: DNS, ports: [{number: 80, name: a}]}", ""),
    ] {
        assert_eq!(of(kind, spec), wrong, "{kind} {spec}");
    }
}

#[test]
fn captured_dns_gives_service_entries_addresses() {
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {name: e, namespace: frontend}\n\
                 spec: {hosts: [e.example], ports: [{number: 5432, name: tcp, protocol: TCP}], resolution: DNS}\n";
    let plain = load(vec![file("e.yaml", entry)], CLIENT);
    assert!(plain.model.names.is_empty() && plain.model.listeners.contains_key("0.0.0.0_5432"));
    let captured =
        load(vec![file("e.yaml", entry)], &CLIENT.replace("\"LABELS\"", "\"DNS_CAPTURE\": \"true\", \"LABELS\""));
    let ip = captured.model.names["e.example"].ips[0].clone();
    assert!(ip.starts_with("240.240."), "{ip}");
    assert!(captured.model.listeners.contains_key(format!("{ip}_5432").as_str()));
}
