//! External authorizers of the mesh: which of them are well-formed. A policy that names any other one denies.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::istio::mesh_config::ExtensionProvider;

/// Fields that list header patterns; a lone `*` is refused in each.
const HEADER_LISTS: [&str; 5] = [
    "includeRequestHeadersInCheck",
    "includeHeadersInCheck",
    "headersToDownstreamOnDeny",
    "headersToDownstreamOnAllow",
    "headersToUpstreamOnAllow",
];

/// Names of authorizers that could be asked. `knows` tells whether a service exists: host, and namespace when said.
pub fn valid(providers: &[ExtensionProvider], knows: &dyn Fn(&str, Option<&str>) -> bool) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut good = BTreeSet::new();
    for provider in providers {
        let http = provider.kind.get("envoyExtAuthzHttp");
        let Some(settings) = http.or_else(|| provider.kind.get("envoyExtAuthzGrpc")) else { continue };
        let unique = seen.insert(provider.name.clone());
        let fine = unique
            && is_label(&provider.name)
            && reachable(settings, knows)
            && status_is_valid(settings)
            && (http.is_none() || http_is_valid(settings));
        if fine {
            good.insert(provider.name.clone());
        } else {
            good.remove(&provider.name);
        }
    }
    good
}

/// A DNS label: the name becomes part of metadata keys.
fn is_label(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn reachable(settings: &Value, knows: &dyn Fn(&str, Option<&str>) -> bool) -> bool {
    let port = settings.get("port").and_then(Value::as_u64).unwrap_or(0);
    let service = settings.get("service").and_then(Value::as_str).unwrap_or("");
    let (namespace, host) = match service.split_once('/') {
        Some((namespace, host)) => (Some(namespace), host),
        None => (None, service),
    };
    (1..=65535).contains(&port) && knows(host, namespace)
}

fn status_is_valid(settings: &Value) -> bool {
    let status = settings.get("statusOnError").and_then(Value::as_str).unwrap_or("");
    status.is_empty() || status.parse().is_ok_and(|s: u16| (200..=511).contains(&s))
}

fn http_is_valid(settings: &Value) -> bool {
    let prefix = settings.get("pathPrefix").and_then(Value::as_str).unwrap_or("");
    let lists = HEADER_LISTS.iter().filter_map(|field| settings.get(field).and_then(Value::as_array));
    (prefix.is_empty() || prefix.starts_with('/')) && lists.flatten().all(|pattern| pattern.as_str() != Some("*"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(yaml: &str) -> Vec<String> {
        let providers: Vec<ExtensionProvider> = serde_saphyr::from_str(yaml).expect("valid test YAML");
        valid(&providers, &|host, namespace| host == "a.b" && namespace.is_none_or(|n| n == "n")).into_iter().collect()
    }

    #[test]
    fn malformed_ones_do_not_count() {
        assert_eq!(names("[{name: ok, envoyExtAuthzGrpc: {service: n/a.b, port: 1}}]"), ["ok"]);
        assert!(names("[{name: a, envoyExtAuthzGrpc: {service: m/a.b, port: 1}}]").is_empty(), "unknown service");
        assert!(names("[{name: a, envoyExtAuthzGrpc: {service: a.b, port: 99999}}]").is_empty(), "port");
        assert!(names("[{name: a, envoyExtAuthzHttp: {service: a.b, port: 1, pathPrefix: x}}]").is_empty(), "prefix");
        assert!(names("[{name: a, envoyExtAuthzHttp: {service: a.b, port: 1, statusOnError: '999'}}]").is_empty());
        assert!(names("[{name: a, prometheus: {}}]").is_empty(), "no authorizer");
    }
}
