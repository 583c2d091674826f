//! Rules of which one word decides, and texts that nobody would write.

use proptest::prelude::*;

use super::*;
use crate::yaml::parse;

const KINDS: [&str; 17] = [
    "VirtualService",
    "DestinationRule",
    "ServiceEntry",
    "WorkloadEntry",
    "WorkloadGroup",
    "Sidecar",
    "Gateway",
    "AuthorizationPolicy",
    "PeerAuthentication",
    "RequestAuthentication",
    "Telemetry",
    "ProxyConfig",
    "EnvoyFilter",
    "WasmPlugin",
    "TrafficExtension",
    "Service",
    "Unknown",
];

/// Fields and weights of what is found in a spec.
fn found(kind: &str, spec: &str) -> Vec<(String, Weight)> {
    let text = format!("kind: {kind}\nmetadata: {{name: a, namespace: n}}\nspec: {spec}\n");
    let (documents, errors) = parse(&text);
    assert!(errors.is_empty(), "{errors:?}");
    object(kind, &documents[0]).into_iter().map(|f| (f.field, f.weight)).collect()
}

#[test]
fn what_is_wrong_is_named_once_with_its_weight() {
    use Weight::{Meant, Rule, Schema, Unknown, Warning};
    let route = "route: [{destination: {host: a}}]";
    for (kind, spec, field, weight) in [
        ("VirtualService", "{hosts: [a], http: [{rout: []}]}".to_owned(), "spec.http[0].rout", Unknown),
        ("VirtualService", format!("{{hosts: [a], http: [{{timeout: 0s, {route}}}]}}"), "spec.http[0].timeout", Meant),
        ("VirtualService", format!("{{hosts: ['*'], http: [{{{route}}}]}}"), "spec.hosts[0]", Rule),
        (
            "VirtualService",
            format!("{{hosts: [a], http: [{{match: [{{uri: {{exact: a, prefix: b}}}}], {route}}}]}}"),
            "spec.http[0].match[0].uri.prefix",
            Schema,
        ),
        ("VirtualService", format!("{{hosts: [a], http: [{{{route}}}, {{{route}}}]}}"), "spec.http[1]", Warning),
        ("DestinationRule", "{host: a, exportTo: [b, b]}".to_owned(), "spec.exportTo[1]", Rule),
        (
            "DestinationRule",
            "{host: a, trafficPolicy: {tls: {mode: SIMPEL}}}".to_owned(),
            "spec.trafficPolicy.tls.mode",
            Schema,
        ),
        ("AuthorizationPolicy", "{action: DENY}".to_owned(), "spec.rules", Meant),
        ("AuthorizationPolicy", "{rules: [null]}".to_owned(), "spec.rules[0]", Rule),
        ("PeerAuthentication", "{mtls: null}".to_owned(), "spec.mtls", Schema),
        ("Telemetry", "{tracing: [{}, {}]}".to_owned(), "spec.tracing", Warning),
        ("WasmPlugin", "null".to_owned(), "spec", Schema),
    ] {
        let all = found(kind, &spec);
        let here: Vec<Weight> = all.iter().filter(|(f, _)| f == field).map(|(_, w)| *w).collect();
        assert_eq!(here, [weight], "{kind} {spec}: {all:?}");
    }
    assert_eq!(found("VirtualService", &format!("{{hosts: [a], http: [{{{route}}}]}}")), []);
}

#[test]
fn alike_words_are_offered() {
    let (documents, _) = parse("kind: DestinationRule\nspec: {host: a, trafficPolcy: {}}\n");
    let told = object("DestinationRule", &documents[0]);
    assert!(told[0].reason.contains("is trafficPolicy meant?"), "{told:?}");
}

/// Words of the schemas.
const WORDS: &str = "\
    hosts http tls tcp match route destination host port number uri regex prefix headers rules from source \
    when key values selector matchLabels mode egress ingress bind template probe endpoints address \
    trafficPolicy loadBalancer distribute to jwtRules tracing";

/// YAML that is well formed and means anything: words of the schemas at any place, and texts that nobody expects.
fn yaml() -> impl Strategy<Value = String> {
    let scalar = prop_oneof![
        Just("null".to_owned()),
        any::<i64>().prop_map(|n| n.to_string()),
        any::<f64>().prop_map(|n| format!("{n:?}")),
        "[ -~äé漢]{0,12}".prop_map(|t| serde_json::Value::from(t).to_string()),
        prop::sample::select(vec![
            "true",
            "STRICT",
            "DENY",
            "*",
            "unix://",
            "::1",
            "~/",
            "[",
            "%",
            "@request.auth.claims.ä"
        ])
        .prop_map(|t| serde_json::Value::from(t).to_string()),
    ];
    scalar.prop_recursive(6, 60, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(|v| format!("[{}]", v.join(", "))),
            prop::collection::btree_map(
                prop::sample::select(WORDS.split_whitespace().collect::<Vec<_>>()),
                inner,
                0..6
            )
            .prop_map(|m| {
                let entries: Vec<String> = m.iter().map(|(k, v)| format!("{k}: {v}")).collect();
                format!("{{{}}}", entries.join(", "))
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_document_of_any_kind_panics(spec in yaml(), metadata in yaml()) {
        for kind in KINDS {
            let text = format!("apiVersion: networking.istio.io/v1\nkind: {kind}\nmetadata: {metadata}\nspec: {spec}\n");
            let (documents, _) = parse(&text);
            for document in &documents {
                for finding in object(kind, document) {
                    prop_assert!(finding.place.0 > 0 && finding.place.1 > 0 && !finding.reason.is_empty());
                }
            }
        }
    }

    #[test]
    fn no_folder_panics(spec in yaml(), group in prop::sample::select(vec!["networking", "security", "telemetry", "extensions"])) {
        for kind in KINDS {
            let meta = "{name: a, namespace: n, labels: {istio: x}}";
            let text =
                format!("apiVersion: {group}.istio.io/v1\nkind: {kind}\nmetadata: {meta}\nspec: {spec}\nstatus: {spec}\n");
            let source = crate::Source { name: "a.yaml".to_owned(), text };
            crate::validate(std::slice::from_ref(&source));
            let folder = crate::Folder { clusters: vec![(String::new(), vec![source])], ..crate::Folder::default() };
            prop_assert!(crate::analyze(&folder, None).is_some());
        }
    }

    #[test]
    fn no_part_of_an_object_panics(part in yaml()) {
        for message in ["HTTPRoute", "RouteDestination[]", "TrafficPolicy", "LoadBalancerSettings", "CorsPolicy", "ReadinessProbe"] {
            fragment_verdict(message, &part).ok();
        }
    }
}
