//! EnvoyFilter, WasmPlugin and TrafficExtension: not served, and judged all the same.

use super::at::At;
use super::{Findings, names, selector};

/// Findings of an EnvoyFilter; what its patches say in Envoy's words is not looked at.
pub(super) fn envoy_filter(found: &mut Findings, spec: &At<'_>) {
    selector::alpha(found, spec);
    let both = spec.get("workloadSelector").is_said() && spec.get("targetRefs").len() > 0;
    found.expect(!both, &spec.get("targetRefs"), "only one of workloadSelector and targetRefs may be set");
    for item in spec.get("configPatches").items() {
        if item.is_null() {
            found.add(&item, "a patch is expected");
        } else {
            patch(found, &item);
        }
    }
}

fn patch(found: &mut Findings, at: &At<'_>) {
    let (wanted, to, patch) = (at.get("match"), at.get("applyTo"), at.get("patch"));
    let waypoint = wanted.get("context").text() == "WAYPOINT";
    if waypoint != wanted.get("waypoint").is_said() {
        found.schema(&wanted, "a match of a waypoint goes with context WAYPOINT, and the other way round");
    }
    if waypoint {
        let port = wanted.at("waypoint.portNumber");
        if port.is_said() && !names::is_port(port.whole_or_zero()) {
            found.schema(&port, "a port from 1 to 65535 is expected");
        }
        return;
    }
    found.expect(!matches!(to.text(), "" | "INVALID"), &to, "what the patch applies to is missing");
    let operation = patch.get("operation");
    found.expect(!matches!(operation.text(), "" | "INVALID"), &operation, "an operation is missing");
    let bare = operation.text() != "REMOVE" && !patch.get("value").is_said();
    found.expect(!bare, &patch.get("value"), "a value is missing");
    let version = wanted.at("proxy.proxyVersion");
    if version.has_text() {
        found.regex(&version);
    }
    let fits = match to.text() {
        "LISTENER" | "FILTER_CHAIN" | "NETWORK_FILTER" | "HTTP_FILTER" => "listener",
        "ROUTE_CONFIGURATION" | "VIRTUAL_HOST" | "HTTP_ROUTE" => "routeConfiguration",
        "CLUSTER" => "cluster",
        _ => return,
    };
    for other in ["listener", "routeConfiguration", "cluster"].into_iter().filter(|o| *o != fits) {
        let other = wanted.get(other);
        found.expect(!other.is_said(), &other, &format!("the patch applies to what only a {fits} match finds"));
    }
    filter(found, &wanted.at("listener.filterChain.filter"), to.text());
}

fn filter(found: &mut Findings, at: &At<'_>, to: &str) {
    const MANAGER: &str = "envoy.filters.network.http_connection_manager";
    if !at.is_said() {
        return;
    }
    let (name, inner) = (at.get("name"), at.get("subFilter"));
    if matches!(to, "LISTENER" | "FILTER_CHAIN") {
        found.warn(at, "a match of a filter has no effect here");
    }
    found.expect(name.has_text(), &name, "a name is missing");
    if inner.is_said() {
        found.expect(to == "HTTP_FILTER", &inner, "only HTTP_FILTER looks at filters inside a filter");
        let manager = matches!(name.text(), MANAGER | "envoy.http_connection_manager");
        found.expect(manager, &name, &format!("{MANAGER} is expected around HTTP filters"));
        found.expect(inner.get("name").has_text(), &inner.get("name"), "a name is missing");
    }
}

/// Findings of a WasmPlugin.
pub(super) fn wasm_plugin(found: &mut Findings, spec: &At<'_>) {
    selector::policy(found, spec);
    module(found, spec);
    traffic(found, &spec.get("match"));
}

/// Findings of a TrafficExtension.
pub(super) fn traffic_extension(found: &mut Findings, spec: &At<'_>) {
    selector::policy(found, spec);
    let (wasm, lua) = (spec.get("wasm"), spec.get("lua"));
    found.expect(wasm.is_said() != lua.is_said(), spec, "exactly one of wasm and lua is expected");
    if lua.is_said() {
        let code = lua.get("inlineCode");
        let good = (1..=65536).contains(&code.text().len());
        found.expect(good, &code, "code of at most 64 KiB is expected");
    }
    if wasm.is_said() {
        module(found, &wasm);
    }
    traffic(found, &spec.get("match"));
}

fn module(found: &mut Findings, at: &At<'_>) {
    let (url, sum) = (at.get("url"), at.get("sha256"));
    found.expect(is_module_url(url.text()), &url, "a URL of http, https, oci or file is expected");
    let hex = |t: &str| t.len() == 64 && t.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    found.expect(!sum.has_text() || hex(sum.text()), &sum, "64 hexadecimal digits are expected");
    for (field, most) in [("imagePullSecret", 253), ("pluginName", 256)] {
        let field = at.get(field);
        found.expect(field.text().len() <= most, &field, &format!("at most {most} characters are expected"));
    }
    let mut seen: Vec<&str> = Vec::new();
    for variable in at.at("vmConfig.env").items().iter().filter(|v| !v.is_null()) {
        let (name, value) = (variable.get("name"), variable.get("value"));
        found.expect((1..=256).contains(&name.text().len()), &name, "a name of at most 256 characters is expected");
        found.expect(!seen.contains(&name.text()), &name, "the name stands here twice");
        seen.push(name.text());
        let host = variable.get("valueFrom").text() == "HOST";
        found.expect(!(host && value.has_text()), &value, "the value comes from the host");
        if host && value.is_said() && !value.has_text() {
            found.schema(&value, "the value comes from the host");
        }
    }
}

/// A URL of a scheme that modules are fetched by; without one it is an image.
fn is_module_url(text: &str) -> bool {
    let escapes = text.split('%').skip(1).all(|e| e.len() > 1 && e.bytes().take(2).all(|b| b.is_ascii_hexdigit()));
    let plain = !text.is_empty() && escapes && !text.chars().any(|c| c.is_whitespace() || c.is_control());
    let scheme = text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase());
    plain && scheme.is_none_or(|s| matches!(s.as_str(), "http" | "https" | "oci" | "file"))
}

fn traffic(found: &mut Findings, list: &At<'_>) {
    for one in list.items() {
        found.expect(!one.is_null(), &one, "a match is expected");
        for port in one.get("ports").items() {
            found.port(&port.get("number"));
        }
    }
}
