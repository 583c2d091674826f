//! The command line: what is asked for in the wrong way is told clearly, and exit codes say what happened.

mod support;

use support::{folder, istio_proxy, istio_proxy_in};

const SERVICE: &str = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {serviceAccountName: web}
status: {phase: Running, podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}
";

#[test]
fn wrong_arguments_are_named_and_exit_with_2() {
    for (args, expected) in [
        (&["explain", "--tls", "ssl"][..], "ssl"),
        (&["validate"], "--config"),
        (&["prxy"], "prxy"),
        (&["proxy", "--concurrency", "many"], "--concurrency"),
        (&["proxy", "router"], "router"),
        (&["explain", "--config", "a", "--xds-dir", "b"], "cannot be used with"),
    ] {
        let run = istio_proxy(args);
        assert_eq!(run.code, 2, "{args:?}: {}", run.err);
        assert!(run.err.contains(expected), "{args:?}: {}", run.err);
    }
}

#[test]
fn what_cannot_be_read_is_named() {
    let empty = folder(&[]);
    let empty_path = empty.path().to_str().expect("UTF-8");
    for (args, code, expected) in [
        (
            &["proxy"][..],
            1,
            "neither --config nor --xds-dir is given: root certificate for discovery: ./var/run/secrets",
        ),
        (&["proxy", "--config", "/no/such"], 255, "/no/such: No such file"),
        (&["proxy", "--config", "/no/such", "--node", "/no/node"], 255, "--node /no/node: No such file"),
        (&["explain", "--xds-dir", empty_path, "--port", "80"], 1, "none of cds, eds, lds"),
        (&["explain", "--config", empty_path, "--port", "80"], 1, "no *.yaml"),
        (&["explain", "--config", empty_path], 1, "which call?"),
        (&["validate", "--config", "/no/such"], 1, "/no/such: No such file"),
        (&["explain", "--admin", "https://x", "--port", "80"], 1, "http://127.0.0.1:15000"),
    ] {
        let run = istio_proxy(args);
        assert_eq!(run.code, code, "{args:?}: {}", run.err);
        assert!(run.err.contains(expected), "{args:?}: {}", run.err);
    }
}

#[test]
fn a_proxy_that_nobody_knows_says_what_was_tried() {
    let dir = folder(&[("a.yaml", SERVICE)]);
    let path = dir.path().to_str().expect("UTF-8");
    let run =
        istio_proxy_in(&["proxy", "--config", path], &[("POD_NAMESPACE", "shop"), ("INSTANCE_IP", "10.0.0.99")], "");
    assert_eq!(run.code, 255);
    assert!(run.err.contains("10.0.0.99"), "{}", run.err);
}

#[test]
fn validate_reads_like_a_compiler() {
    let good = folder(&[("a.yaml", SERVICE)]);
    let run = istio_proxy(&["validate", "--config", good.path().to_str().expect("UTF-8")]);
    assert_eq!((run.code, &*run.out), (0, "1 files, 0 errors, 0 warnings\n"), "{}", run.err);

    let bad = folder(&[("a.yaml", &SERVICE.replace("port: 80,", "port: eighty,"))]);
    let run = istio_proxy(&["validate", "--config", bad.path().to_str().expect("UTF-8")]);
    assert_eq!(run.code, 1, "{}", run.out);
    let line = run.out.lines().next().expect("a finding");
    let place = format!("{}/a.yaml:7:", bad.path().display());
    assert!(line.starts_with(&place) && line.contains(": error: Service shop/web: "), "{}", run.out);
    assert!(run.out.ends_with("1 files, 1 errors, 0 warnings\n"), "{}", run.out);
}

#[test]
fn explain_answers_in_text_and_in_json() {
    let dir = folder(&[("a.yaml", SERVICE)]);
    let path = dir.path().to_str().expect("UTF-8");
    let me = [("POD_NAMESPACE", "shop"), ("INSTANCE_IP", "10.0.0.1"), ("POD_NAME", "web-1")];
    let call = ["--port", "80", "--host", "web.shop", "--address", "10.96.0.1"];
    let text = istio_proxy_in(&[&["explain", "--config", path][..], &call].concat(), &me, "");
    assert_eq!(text.code, 0, "{}", text.err);
    for part in
        ["0.0.0.0_80", "web.shop.svc.cluster.local:80", "outbound|80||web.shop.svc.cluster.local", "10.0.0.1:8080"]
    {
        assert!(text.out.contains(part), "{part}:\n{}", text.out);
    }
    let calls = r#"[{"call": {"mode": "inbound", "port": 8080, "address": "10.0.0.1", "host": "web"}}, {"port": 1}]"#;
    let json = istio_proxy_in(&["explain", "--config", path, "--calls", "-", "--json"], &me, calls);
    let answers: Vec<serde_json::Value> =
        json.out.lines().map(|line| serde_json::from_str(line).expect("one answer a line")).collect();
    assert_eq!(answers.len(), 2, "{}", json.err);
    assert_eq!(answers[0]["listener"], "virtualInbound");
    assert_eq!(answers[0]["cluster"], "inbound|8080||");
    assert_eq!(answers[1]["cluster"], "PassthroughCluster");
    for key in ["listener", "filterChain", "routeConfig", "virtualHost", "route", "cluster", "error"] {
        assert!(answers.iter().all(|a| a.get(key).is_some()), "{key}");
    }
}

#[test]
fn tables_and_versions() {
    let errors = istio_proxy(&["errors"]);
    assert!(errors.code == 0 && errors.out.contains("rbac_access_denied_matched_policy[none]"));
    assert_eq!(istio_proxy(&["version", "--short"]).out, format!("{}\n", env!("CARGO_PKG_VERSION")));
    assert_eq!(istio_proxy(&["--version"]).out, format!("istio-proxy {}\n", env!("CARGO_PKG_VERSION")));
}

/// An object of a kind with this spec, in flow style, on line 4.
fn object(kind: &str, version: &str, spec: &str) -> String {
    format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x, namespace: shop}}\nspec: {spec}\n")
}

/// Each mistake is told with its place, its field and what was expected; none ends the program in another way.
#[test]
fn mistakes_of_many_kinds_are_told_with_their_place() {
    const NET: &str = "networking.istio.io/v1";
    const SEC: &str = "security.istio.io/v1";
    let virtual_service = |http: &str| object("VirtualService", NET, &format!("{{hosts: [a], http: [{http}]}}"));
    let rule = |policy: &str| object("DestinationRule", NET, &format!("{{host: a, trafficPolicy: {policy}}}"));
    let to = "route: [{destination: {host: a}}]";
    let rows: Vec<(String, u32, &str)> = vec![
        ("a: [1, 2\nb: }\n".to_owned(), 2, ""),
        ("\tkind: Service\n".to_owned(), 1, ""),
        ("just a text\n".to_owned(), 1, ""),
        ("- a\n- list\n".to_owned(), 1, ""),
        ("apiVersion: v1\nkind: Service\nkind: Pod\n".to_owned(), 3, "kind"),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: 7\n".to_owned(), 4, "spec"),
        ("apiVersion: v1\nkind: Service\nmetadata: {namespace: a}\nspec: {}\n".to_owned(), 3, "metadata.name"),
        (object("Service", "v1", "{ports: [{port: 70000}]}"), 4, "spec.ports[0].port"),
        (object("Service", "v1", "{ports: [{port: -1}]}"), 4, "spec.ports[0].port"),
        (object("Service", "v1", "{ports: {port: 80}}"), 4, "spec.ports"),
        (virtual_service(&format!("{{timeout: fast, {to}}}")), 4, "\"fast\" is no duration"),
        (virtual_service(&format!("{{timeout: 5, {to}}}")), 4, "spec.http[0].timeout"),
        (virtual_service("{}"), 4, "spec.http[0]"),
        (rule("{connectionPool: {tcp: {maxConnections: many}}}"), 4, "maxConnections"),
        (rule("{tls: {mode: MAYBE}}"), 4, "spec.trafficPolicy.tls.mode"),
        (object("AuthorizationPolicy", SEC, "{action: PERHAPS}"), 4, "spec.action"),
        (object("AuthorizationPolicy", SEC, "{rules: [{to: [{operation: {ports: [http]}}]}]}"), 4, "ports"),
        (object("AuthorizationPolicy", SEC, "{rules: [{from: [{source: {ipBlocks: [1.2.3]}}]}]}"), 4, "ipBlocks"),
        (object("AuthorizationPolicy", SEC, "{rules: [{when: [{key: colour, values: [red]}]}]}"), 4, "key"),
        (object("PeerAuthentication", SEC, "{mtls: {mode: SOMETIMES}}"), 4, "spec.mtls.mode"),
        (object("PeerAuthentication", SEC, "{portLevelMtls: {0: {mode: STRICT}}}"), 4, "portLevelMtls"),
        (object("RequestAuthentication", SEC, "{jwtRules: [{issuer: ''}]}"), 4, "spec.jwtRules[0]"),
        (object("WorkloadGroup", NET, "{template: {}, probe: {tcpSocket: {port: 0}}}"), 4, "spec.probe"),
        (object("WorkloadEntry", NET, "{address: ''}"), 4, "spec.address"),
        (object("ServiceEntry", NET, "{hosts: []}"), 4, "spec.hosts"),
        ("apiVersion: v1\nkind: Service\nmetadata: &a {x: *a}\n".to_owned(), 3, ""),
    ];
    let names: Vec<String> = (0..rows.len()).map(|n| format!("{n:02}.yaml")).collect();
    // Each object has a name of its own.
    let text = |(n, row): (usize, &(String, u32, &str))| row.0.replace("name: x,", &format!("name: x{n},"));
    let texts: Vec<String> = rows.iter().enumerate().map(text).collect();
    let files: Vec<(&str, &str)> =
        names.iter().zip(&texts).map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let dir = folder(&files);
    let run = istio_proxy(&["validate", "--config", dir.path().to_str().expect("UTF-8")]);
    assert_eq!(run.code, 1, "{} {}", run.out, run.err);
    assert!(!run.err.contains("panicked"), "{}", run.err);
    let mut silent = String::new();
    for ((name, text), (_, line, field)) in files.iter().zip(&rows) {
        let place = format!("{}/{name}:{line}:", dir.path().display());
        let told = |l: &str| l.starts_with(&place) && l.contains(": error: ") && l.contains(field);
        if !run.out.lines().any(told) {
            let said: Vec<&str> = run.out.lines().filter(|l| l.contains(&format!("/{name}"))).collect();
            silent.push_str(&format!("{text}expected line {line}, {field:?}; said {said:?}\n\n"));
        }
    }
    assert!(silent.is_empty(), "{silent}");
}

#[test]
fn explain_believes_the_nearest_proxy_about_the_client() {
    let policy = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: office, namespace: shop}
spec:
  action: ALLOW
  rules: [{from: [{source: {remoteIpBlocks: [192.0.2.0/24]}}]}]
";
    let dir = folder(&[("a.yaml", &format!("{SERVICE}{policy}"))]);
    let path = dir.path().to_str().expect("UTF-8");
    let who = [("POD_NAMESPACE", "shop"), ("POD_NAME", "web-1"), ("INSTANCE_IP", "10.0.0.1")];
    for (forwarded, word) in [("192.0.2.7, 10.0.0.9", "denies"), ("10.0.0.9, 192.0.2.7", "allows")] {
        let header = format!("x-forwarded-for: {forwarded}");
        let call = ["--mode", "inbound", "--address", "10.0.0.1", "--port", "8080", "--source-ip", "10.0.0.9"];
        let args: Vec<&str> =
            ["explain", "--config", path].into_iter().chain(call).chain(["--header", &header]).collect();
        let run = istio_proxy_in(&args, &who, "");
        assert_eq!(run.code, 0, "{}", run.err);
        assert!(run.out.contains(&format!("http {word}")), "{forwarded}: {}", run.out);
    }
}
