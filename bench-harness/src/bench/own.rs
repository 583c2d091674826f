//! Istio YAML for the proxy under test: a caller `a` and a service `b`, twenty virtual hosts, five policies.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Result;

use super::case::{A, B, Case, HOSTS, PORT, PRINCIPAL, RULES, host, vip};

/// Writes the configuration of a case.
///
/// # Errors
/// When a file cannot be written.
pub(super) fn write(case: &Case, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mode = if case.mtls { "STRICT" } else { "PERMISSIVE" };
    let mut yaml = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: apps}}\n---\n\
         apiVersion: v1\nkind: Namespace\nmetadata: {{name: frontend}}\n---\n\
         apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: default, namespace: apps}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
    );
    pod(&mut yaml, "a", "frontend", "frontend-sa", A);
    pod(&mut yaml, "b", "apps", "payment-sa", B);
    for n in 0..HOSTS {
        service(&mut yaml, n);
    }
    policies(&mut yaml, case);
    if case.h2_inside {
        yaml.push_str(&format!(
            "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: h2, namespace: apps}}\n\
             spec: {{host: {}, trafficPolicy: {{connectionPool: {{http: {{h2UpgradePolicy: UPGRADE}}}}}}}}\n",
            host(0)
        ));
    }
    Ok(fs::write(folder.join("bench.yaml"), yaml)?)
}

/// A configuration that says who the caller is and nothing else.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn write_empty(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut yaml = "apiVersion: v1\nkind: Namespace\nmetadata: {name: frontend}\n".to_owned();
    pod(&mut yaml, "a", "frontend", "frontend-sa", A);
    Ok(fs::write(folder.join("bench.yaml"), yaml)?)
}

fn pod(yaml: &mut String, name: &str, namespace: &str, account: &str, address: &str) {
    write!(
        yaml,
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}, \
         security.istio.io/tlsMode: istio}}}}\nspec:\n  serviceAccountName: {account}\n  containers:\n    - {{name: app, \
         image: app, ports: [{{name: http, containerPort: {PORT}}}]}}\nstatus: {{phase: Running, podIP: {address}, \
         podIPs: [{{ip: {address}}}], conditions: [{{type: Ready, status: \"True\"}}]}}\n"
    )
    .expect("writing to a string");
}

/// Service, its endpoint and its VirtualService. All of them end at `b`.
fn service(yaml: &mut String, n: usize) {
    let host = host(n);
    let name = host.split('.').next().unwrap_or_default();
    let route = format!(
        "route: [{{destination: {{host: {host}, port: {{number: {PORT}}}}}}}], retries: {{attempts: 2, retryOn: \
         \"connect-failure,refused-stream,unavailable,503\"}}"
    );
    write!(
        yaml,
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: apps}}\nspec: {{clusterIP: {}, \
         selector: {{app: b}}, ports: [{{name: http, port: {PORT}, targetPort: {PORT}}}]}}\n---\n\
         apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-1, namespace: apps, labels: \
         {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: http, port: {PORT}, protocol: TCP}}]\n\
         endpoints: [{{addresses: [{B}], conditions: {{ready: true}}, targetRef: {{kind: Pod, name: b, namespace: apps}}}}]\n\
         ---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: {name}, namespace: apps}}\n\
         spec:\n  hosts: [{host}]\n  http:\n    - {{match: [{{uri: {{prefix: /api/}}}}], {route}}}\n    - {{{route}}}\n",
        vip(n)
    )
    .expect("writing to a string");
}

fn policies(yaml: &mut String, case: &Case) {
    for (n, rule) in RULES.iter().enumerate() {
        let mut source = Vec::new();
        if case.mtls {
            source.push(format!("principals: [{PRINCIPAL}]"));
        }
        if let Some(block) = rule.block {
            source.push(format!("ipBlocks: [{block}]"));
        }
        let from =
            if source.is_empty() { String::new() } else { format!("from: [{{source: {{{}}}}}], ", source.join(", ")) };
        let methods = rule.method.map(|m| format!("methods: [{m}], ")).unwrap_or_default();
        let when = rule
            .header
            .map(|(name, value)| format!(", when: [{{key: \"request.headers[{name}]\", values: [{value}]}}]"));
        let paths: Vec<String> = rule.paths.iter().map(|path| format!("\"{path}\"")).collect();
        write!(
            yaml,
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p{n}, namespace: apps}}\n\
             spec:\n  selector: {{matchLabels: {{app: b}}}}\n  action: ALLOW\n  rules:\n    - {{{from}to: [{{operation: \
             {{{methods}paths: [{}]}}}}]{}}}\n",
            paths.join(", "),
            when.unwrap_or_default()
        )
        .expect("writing to a string");
    }
}
