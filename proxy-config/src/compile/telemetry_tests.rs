use super::*;
use crate::model::{LogFilter, LogFormat, LogSink};

/// What holds for a proxy of namespace `app` with label `app: web`; each object is a namespace and a spec, oldest first.
fn told(mesh: &str, objects: &[(&str, &str)]) -> (Both, Vec<Reject>) {
    let mesh: MeshConfig = serde_saphyr::from_str(mesh).expect("valid test YAML");
    let specs: Vec<Telemetry> =
        objects.iter().map(|(_, spec)| serde_saphyr::from_str(spec).expect("valid test YAML")).collect();
    let sources: Vec<Source<'_>> =
        objects.iter().zip(&specs).map(|((namespace, _), spec)| Source { namespace, name: "t", spec }).collect();
    let proxy = Proxy {
        namespace: "app".to_owned(),
        labels: BTreeMap::from([("app".to_owned(), "web".to_owned())]),
        ..Proxy::default()
    };
    let config = super::super::settings::proxy_config(&mesh, &proxy);
    let knows = |host: &str, namespace: Option<&str>| host == "c.x" && namespace.is_none_or(|n| n == "n");
    let context = Context { mesh: &mesh, config: &config, proxy: &proxy, root: "istio-system", knows: &knows };
    let mut rejects = Vec::new();
    let both = compile(&sources, context, &mut rejects);
    (both, rejects)
}

fn paths(told: &Told) -> Vec<&str> {
    let path = |log: &'_ crate::model::AccessLog| match &log.sink {
        LogSink::File { path, .. } => path.clone(),
        LogSink::Grpc { log_name, .. } | LogSink::OpenTelemetry { log_name, .. } => log_name.clone(),
    };
    let known = ["/a", "/b", "/dev/stdout"];
    told.access_log.iter().map(path).map(|p| known.into_iter().find(|k| *k == p).expect("a known path")).collect()
}

const FILES: &str = "extensionProviders: [{name: a, envoyFileAccessLog: {path: /a}}, {name: b, envoyFileAccessLog: \
                     {path: /b}}, {name: z, zipkin: {service: c.x, port: 9411}}]";

#[test]
fn nothing_said_is_the_mesh_alone() {
    let (both, rejects) = told("{accessLogFile: /dev/stdout, accessLogEncoding: JSON}", &[]);
    assert!(rejects.is_empty() && both.default_metrics && both.inbound.stats.is_none());
    assert_eq!(paths(&both.outbound), ["/dev/stdout"]);
    assert_eq!(both.outbound.listener_access_log[0].filter, Some(LogFilter::ResponseFlags(vec!["NR".to_owned()])));
    assert!(both.inbound.tracing.as_ref().is_some_and(|t| t.provider.is_none() && t.random_sampling == Some(1.0)));
    let (quiet, _) = told("{enableTracing: false, disableEnvoyListenerLog: true, accessLogFile: /x}", &[]);
    assert!(quiet.outbound.tracing.is_none() && quiet.outbound.listener_access_log.is_empty());
}

#[test]
fn later_levels_replace_and_switch_off() {
    let root = ("istio-system", "{accessLogging: [{providers: [{name: a}]}]}");
    let own = ("app", "{accessLogging: [{match: {mode: CLIENT}, providers: [{name: b}]}]}");
    let (both, _) = told(FILES, &[root, own]);
    assert_eq!((paths(&both.outbound), paths(&both.inbound)), (vec!["/b"], vec!["/a"]));
    let off = ("app", "{selector: {matchLabels: {app: web}}, accessLogging: [{disabled: true}]}");
    assert!(paths(&told(FILES, &[root, off]).0.outbound).is_empty());
    let others = ("app", "{selector: {matchLabels: {app: other}}, accessLogging: [{disabled: true}]}");
    let elsewhere = ("shop", "{accessLogging: [{disabled: true}]}");
    let gateway = ("app", "{targetRef: {kind: Gateway, name: g}, accessLogging: [{disabled: true}]}");
    assert_eq!(paths(&told(FILES, &[root, others, elsewhere, gateway]).0.outbound), ["/a"]);
    let second = ("app", "{accessLogging: [{disabled: true}]}");
    assert_eq!(paths(&told(FILES, &[own, second]).0.outbound), ["/b"], "the oldest of a level decides");
}

#[test]
fn filters_go_with_their_providers() {
    let spec = "{accessLogging: [{providers: [{name: a}], filter: {expression: response.code >= 500}}]}";
    let (both, _) = told(FILES, &[("app", spec)]);
    assert_eq!(both.inbound.access_log[0].filter, Some(LogFilter::Cel("response.code >= 500".to_owned())));
    assert!(matches!(&both.inbound.listener_access_log[0].filter, Some(LogFilter::And(parts)) if parts.len() == 2));
}

#[test]
fn the_provider_that_is_always_there_follows_the_mesh() {
    let (both, _) = told("{accessLogFormat: hello, defaultProviders: {accessLogging: [envoy]}}", &[]);
    let LogSink::File { path, format, .. } = &both.inbound.access_log[0].sink else { panic!("a file") };
    assert_eq!((path.as_str(), format), ("/dev/stdout", &LogFormat::Text("hello\n".to_owned())));
}

#[test]
fn what_cannot_be_reached_is_told_once() {
    let mesh = "extensionProviders: [{name: als, envoyHttpAls: {service: m/c.x, port: 1}}]";
    let spec = "{accessLogging: [{providers: [{name: als}, {name: none}]}], tracing: [{providers: [{name: als}]}]}";
    let (both, rejects) = told(mesh, &[("app", spec)]);
    assert!(both.outbound.access_log.is_empty() && both.outbound.tracing.is_none());
    let told: Vec<String> = rejects.iter().map(ToString::to_string).collect();
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told[0].contains("extensionProviders[als]: there is no such service"), "{told:?}");
}

#[test]
fn metrics_are_merged_by_name_and_direction() {
    let root = ("istio-system", "{metrics: [{providers: [{name: prometheus}], reportingInterval: 10s}]}");
    let own = (
        "app",
        "{metrics: [{overrides: [{match: {metric: REQUEST_COUNT, mode: CLIENT}, tagOverrides: {b: {value: y}, a: \
         {operation: REMOVE}}}, {match: {mode: SERVER}, disabled: true}]}]}",
    );
    let (both, _) = told("{}", &[root, own]);
    assert!(both.inbound.stats.is_none() && !both.default_metrics);
    let config = json!({
        "tcp_reporting_duration": "10s",
        "metrics": [{"name": "requests_total", "dimensions": {"b": "y"}, "tags_to_remove": ["a"]}],
    });
    assert_eq!(both.outbound.stats.expect("client metrics").config, config);
    let (plain, _) = told("{defaultProviders: {metrics: [prometheus]}}", &[]);
    assert_eq!(plain.inbound.stats.expect("stats").config, json!({"disable_host_header_fallback": true}));
    assert!(!plain.default_metrics);
}

#[test]
fn tracing_takes_the_first_provider_and_the_lowest_levels_words() {
    let root = ("istio-system", "{tracing: [{providers: [{name: z}], randomSamplingPercentage: 5}]}");
    let own = (
        "app",
        "{tracing: [{match: {mode: SERVER}, randomSamplingPercentage: 0, customTags: {t: {literal: {value: v}}}}]}",
    );
    let (both, _) = told(FILES, &[root, own]);
    let (inbound, outbound) = (both.inbound.tracing.expect("tracing"), both.outbound.tracing.expect("tracing"));
    assert_eq!((inbound.random_sampling, outbound.random_sampling), (Some(0.0), Some(5.0)));
    assert!(inbound.custom_tags.contains_key("t") && !outbound.custom_tags.contains_key("t"));
    let config = &outbound.provider.expect("zipkin")["typed_config"];
    assert_eq!(config["collector_service"]["http_uri"]["cluster"], "outbound|9411||c.x");
    assert_eq!(config["trace_id_128bit"], true);
    let (off, _) = told(FILES, &[root, ("app", "{tracing: [{disableSpanReporting: true}]}")]);
    assert!(off.inbound.tracing.is_none() && off.outbound.tracing.is_none());
}
