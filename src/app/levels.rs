//! Log levels as the agent's two families of flags say them: one for what handles traffic, one for everything else.

use super::agent::AgentArgs;

/// Parts that handle traffic: Envoy's in a sidecar of two programs.
const TRAFFIC: [&str; 6] = ["net", "tls", "snapshot", "upstream", "proxy", "worker"];
/// Envoy's names of components, and ours.
const COMPONENTS: [(&str, &str); 12] = [
    ("admin", "admin"),
    ("client", "upstream"),
    ("connection", "net"),
    ("filter", "proxy"),
    ("http", "proxy"),
    ("http2", "proxy"),
    ("main", "app"),
    ("pool", "upstream"),
    ("rbac", "snapshot"),
    ("router", "proxy"),
    ("tcp_proxy", "proxy"),
    ("upstream", "upstream"),
];
/// The agent's scopes, and ours.
const SCOPES: [(&str, &str); 8] = [
    ("ads", "xds"),
    ("ca", "identity"),
    ("cache", "identity"),
    ("citadelclient", "identity"),
    ("dns", "dns"),
    ("healthcheck", "probe"),
    ("sds", "identity"),
    ("xdsproxy", "xds"),
];

/// Levels as `--log-level` takes them; `None` when none of the agent's flags is given. Scopes that nothing here has are
/// left out: templates name those of Envoy.
pub(super) fn said(args: &AgentArgs) -> Option<String> {
    let traffic = args.proxy_log_level.as_deref();
    let components = args.proxy_component_log_level.as_deref();
    let rest = args.log_output_level.as_deref();
    if traffic.is_none() && components.is_none() && rest.is_none() {
        return None;
    }
    let parts = |text: Option<&str>| -> Vec<(String, String)> {
        let split = |part: &str| {
            let (scope, level) = part.split_once(':').unwrap_or(("default", part));
            (scope.trim().to_owned(), level.trim().to_owned())
        };
        text.unwrap_or_default().split(',').filter(|part| !part.trim().is_empty()).map(split).collect()
    };
    let default = |said: &[(String, String)], or: &str| {
        said.iter().find(|(scope, _)| scope == "default").map_or_else(|| or.to_owned(), |(_, level)| level.clone())
    };
    let rest = parts(rest);
    let traffic = parts(traffic);
    // Components are for those that say none with the level itself.
    let own = traffic.iter().any(|(scope, _)| scope != "default");
    let components = if own { Vec::new() } else { parts(components) };
    let mut out = vec![default(&rest, "info")];
    let level = default(&traffic, "warning");
    out.extend(TRAFFIC.iter().map(|module| format!("istio_proxy::{module}={level}")));
    let of = |said: &[(String, String)], table: &[(&str, &str)]| -> Vec<String> {
        let ours = |scope: &str| table.iter().find(|(name, _)| *name == scope).map(|(_, module)| *module);
        said.iter().filter_map(|(scope, level)| Some(format!("istio_proxy::{}={level}", ours(scope)?))).collect()
    };
    out.extend(of(&components, &COMPONENTS));
    out.extend(of(&traffic, &COMPONENTS));
    out.extend(of(&rest, &SCOPES));
    Some(out.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_of_the_injection_template() {
        let args = AgentArgs {
            proxy_log_level: Some("warning".to_owned()),
            proxy_component_log_level: Some("misc:error".to_owned()),
            log_output_level: Some("default:info,xdsproxy:debug".to_owned()),
            ..AgentArgs::default()
        };
        let levels = said(&args).unwrap();
        assert!(levels.starts_with("info,istio_proxy::net=warning,"), "{levels}");
        assert!(levels.ends_with(",istio_proxy::worker=warning,istio_proxy::xds=debug"), "{levels}");
        assert_eq!(said(&AgentArgs::default()), None);
    }

    #[test]
    fn scopes_in_the_level_itself_win() {
        let args = AgentArgs {
            proxy_log_level: Some("error,upstream:trace".to_owned()),
            proxy_component_log_level: Some("http:debug".to_owned()),
            ..AgentArgs::default()
        };
        let levels = said(&args).unwrap();
        assert!(levels.ends_with("istio_proxy::worker=error,istio_proxy::upstream=trace"), "{levels}");
        assert!(!levels.contains("debug"));
    }
}
