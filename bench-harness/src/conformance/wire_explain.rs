//! What `explain` says of a wire case beside what the recorded access log shows: cluster, route, policy.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::explain::{self, From};
use super::stage::Side;
use super::tally::Difference;

/// Details of answers that a proxy decides on before anything is sent; `explain` must foresee them.
const FORESEEN: [&str; 6] = [
    "rbac_access_denied",
    "jwt_authn_access_denied",
    "direct_response",
    "route_not_found",
    "cluster_not_found",
    "path_normalization_failed",
];

/// The call that a case makes, when it makes one whose line in the log says where it went.
pub(super) fn call(case: &Value, side: Side) -> Option<Value> {
    let line = line(case)?;
    let [step] = list(&case["steps"]) else { return None };
    // Who does not finish the handshake asks for nothing.
    let refused = step["expect"]["handshake"].as_str().is_some_and(|result| result != "ok");
    if refused || !list(&step["more"]).is_empty() || !list(&step["sequence"]).is_empty() {
        return None;
    }
    let (address, port) = step["connect"].as_str()?.rsplit_once(':')?;
    let source = match (step["from"].as_str(), side) {
        (Some(from), _) => from,
        (None, Side::Outbound) => "10.1.0.9",
        (None, Side::Inbound) if address == "10.0.2.20" => "10.0.2.9",
        (None, Side::Inbound) => "10.0.1.9",
    };
    let tls = &step["tls"];
    let offered: Vec<&str> = list(&tls["alpn"]).iter().filter_map(Value::as_str).collect();
    let mut call = json!({
        "mode": if side == Side::Inbound { "inbound" } else { "outbound" },
        "address": address,
        "port": port.parse::<u16>().ok()?,
        "sourceIp": source,
        "tls": if tls.is_null() { "plaintext" } else if tls["cert"].is_null() { "tls" } else { "mtls" },
        // A comma alone: nothing is offered, which is something else than not said.
        "alpn": if tls.is_null() { String::new() } else { format!("{},", offered.join(",")) },
        "sni": tls["sni"].as_str().unwrap_or_default(),
        "protocol": "tcp",
    });
    if line["kind"] == "http" {
        let (protocol, request) = request(step)?;
        call["protocol"] = json!(protocol);
        call.as_object_mut()?.extend(request);
    }
    if let Some(peer) = line["peerUri"].as_str().and_then(|uris| uris.split(',').next()).filter(|uri| !uri.is_empty()) {
        call["peer"] = json!(peer);
    }
    Some(call)
}

/// The one line of a case's requests or connections.
fn line(case: &Value) -> Option<&Value> {
    let mut lines = list(&case["log"]).iter().filter(|line| line["kind"] != "conn");
    let first = lines.next().filter(|_| lines.next().is_none())?;
    let told = !cluster(first).is_empty() || foreseen(first);
    told.then_some(first)
}

/// What a step asks for: protocol, host, method, path, headers; `None` when that is no plain request.
fn request(step: &Value) -> Option<(&'static str, Map<String, Value>)> {
    let first = if step["h2"].is_array() { &step["h2"][0] } else { &step["h2"] };
    let mut out = Map::new();
    let mut headers: Map<String, Value> = Map::new();
    let mut header = |name: &str, value: &str| {
        let values = headers.entry(name.to_ascii_lowercase()).or_insert_with(|| json!([]));
        values.as_array_mut().expect("made as a list").push(json!(value));
    };
    let protocol = if first.is_object() {
        for pair in list(&first["headers"]) {
            let (name, value) = (pair[0].as_str()?, pair[1].as_str()?);
            match name {
                ":authority" => out.insert("host".to_owned(), json!(value)),
                ":method" => out.insert("method".to_owned(), json!(value)),
                ":path" => out.insert("path".to_owned(), json!(value)),
                name if name.starts_with(':') => None,
                name => {
                    header(name, value);
                    None
                }
            };
        }
        "http2"
    } else {
        let (head, _) = step["send"].as_str()?.split_once("\r\n\r\n")?;
        let mut lines = head.split("\r\n");
        let mut words = lines.next()?.splitn(3, ' ');
        let (method, target) = (words.next()?, words.next()?);
        out.insert("method".to_owned(), json!(method));
        // A target with a scheme and host names what the host header else would.
        let rest = target.split_once("://").map(|(_, rest)| rest.split_at(rest.find('/').unwrap_or(rest.len())));
        let path = rest.map_or(target, |(_, path)| if path.is_empty() { "/" } else { path });
        out.insert("path".to_owned(), json!(path));
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            // What a server has to refuse (RFC 9112 §2.2, §3.2) goes nowhere.
            if value.contains(['\r', '\n', '\0']) {
                return None;
            }
            if !name.eq_ignore_ascii_case("host") {
                header(name, value.trim());
            } else if out.insert("host".to_owned(), json!(value.trim())).is_some() {
                return None;
            }
        }
        if let Some((host, _)) = rest {
            out.insert("host".to_owned(), json!(host));
        }
        "http"
    };
    out.insert("headers".to_owned(), Value::Object(headers));
    Some((protocol, out))
}

/// Asks about all calls at once; about each alone when one of them cannot be asked.
pub(super) fn ask(proxy: &Path, from: &From<'_>, node: &Path, calls: &[Value]) -> Vec<Result<Value>> {
    match explain::ask(proxy, from, node, calls) {
        Ok(answers) => answers.into_iter().map(Ok).collect(),
        Err(_) => {
            let one = |call| explain::ask(proxy, from, node, std::slice::from_ref(call)).map(|mut all| all.remove(0));
            calls.iter().map(one).collect()
        }
    }
}

/// Where the answer and the recorded line differ.
pub(super) fn differences(case: &Value, answer: &Result<Value>) -> Vec<Difference> {
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => return vec![Difference::new("explain", "an answer", format!("{error:#}"))],
    };
    let Some(line) = line(case) else { return Vec::new() };
    let mut out = Vec::new();
    let mut check = |field: &str, expected: &str, seen: Vec<&str>| {
        if !seen.contains(&expected) {
            out.push(Difference::new(format!("explain.{field}"), expected, seen.join(", ")));
        }
    };
    let name = |of: &Value| of["name"].as_str().unwrap_or_default().to_owned();
    if !cluster(line).is_empty() {
        let clusters: Vec<String> = list(&answer["clusters"]).iter().map(name).collect();
        check("cluster", cluster(line), clusters.iter().map(String::as_str).collect());
    }
    if let Some(route) = line["route"].as_str() {
        check("route", route, vec![answer["route"].as_str().unwrap_or_default()]);
    }
    if foreseen(line) {
        check("details", details(line), vec![answer["response"]["details"].as_str().unwrap_or_default()]);
    }
    // The filter's own words about who decided; the last filter that has an opinion writes them.
    let rbac = &line["rbac"];
    for (shadow, prefix) in [(false, "enforced"), (true, "shadow")] {
        let Some(result) = rbac[format!("{prefix}_engine_result")].as_str() else { continue };
        let judged = |policy: &Value| {
            let of = if shadow { &policy["shadow"] } else { policy };
            let word = if of["allowed"] == true { "allowed" } else { "denied" };
            of.is_object().then(|| format!("{word} {}", of["policy"].as_str().unwrap_or_default()))
        };
        let http = |policy: &&Value| policy["filter"] == "http";
        let seen: Vec<String> = list(&answer["policies"]).iter().filter(http).filter_map(judged).collect();
        let policy = rbac[format!("{prefix}_effective_policy_id")].as_str().unwrap_or_default();
        check(&format!("{prefix} policy"), &format!("{result} {policy}"), seen.iter().map(String::as_str).collect());
    }
    out
}

fn cluster(line: &Value) -> &str {
    let named = |field: &str| line[field].as_str().filter(|name| *name != "-");
    named("cluster").or_else(|| named("upstreamCluster")).unwrap_or_default()
}

fn details(line: &Value) -> &str {
    line["details"].as_str().unwrap_or_default()
}

fn foreseen(line: &Value) -> bool {
    FORESEEN.iter().any(|known| details(line).starts_with(known))
}

fn list(of: &Value) -> &[Value] {
    of.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> Value {
        json!({
            "steps": [{
                "connect": "10.0.1.5:8080",
                "tls": {"cert": "FE", "alpn": ["istio-http/1.1"], "sni": "a"},
                "send": "GET /x?y=1 HTTP/1.1\r\nHost: payment\r\nx-a: 1\r\nX-A: 2\r\n\r\n",
            }],
            "log": [
                {"kind": "conn"},
                {
                    "kind": "http", "details": "via_upstream", "cluster": "inbound|8080||", "peerUri": "spiffe://a/b",
                    "rbac": {"enforced_engine_result": "allowed", "enforced_effective_policy_id": "p"},
                },
            ],
        })
    }

    #[test]
    fn the_call_is_what_the_client_sent() {
        let expected = json!({
            "mode": "inbound", "address": "10.0.1.5", "port": 8080, "sourceIp": "10.0.1.9", "tls": "mtls",
            "alpn": "istio-http/1.1,", "sni": "a", "protocol": "http", "method": "GET", "path": "/x?y=1",
            "host": "payment", "headers": {"x-a": ["1", "2"]}, "peer": "spiffe://a/b",
        });
        assert_eq!(call(&case(), Side::Inbound), Some(expected));
    }

    #[test]
    fn an_answer_that_names_another_cluster_or_policy_differs() {
        let answer = |cluster: &str, policy: &str| {
            Ok(json!({
                "clusters": [{"name": cluster, "weight": 1}],
                "policies": [{"filter": "http", "allowed": true, "policy": policy}],
            }))
        };
        let fields = |answer| differences(&case(), &answer).into_iter().map(|d| d.field).collect::<Vec<_>>();
        assert!(fields(answer("inbound|8080||", "p")).is_empty());
        assert_eq!(fields(answer("other", "p")), ["explain.cluster"]);
        assert_eq!(fields(answer("inbound|8080||", "q")), ["explain.enforced policy"]);
        assert_eq!(fields(Err(anyhow::anyhow!("no"))), ["explain"]);
    }
}
