use serde_json::json;

use super::*;
use crate::telemetry::{Headers, NodeLabels, Record, RecordKind};

fn zipkin(config: Value) -> Tracer {
    let mut typed = json!({
        "@type": "type.googleapis.com/envoy.config.trace.v3.ZipkinConfig",
        "collector_service": {"http_uri": {"uri": "http://c.x/api/v2/spans", "cluster": "c"}},
    });
    for (key, value) in config.as_object().into_iter().flatten() {
        typed[key] = value.clone();
    }
    tracer("envoy.tracers.zipkin", typed)
}

fn tracer(name: &str, typed: Value) -> Tracer {
    let said = model::Tracing {
        random_sampling: Some(1.0),
        provider: Some(json!({"name": name, "typed_config": typed})),
        custom_tags: [
            ("lit".to_owned(), json!({"literal": {"value": "v"}})),
            ("hdr".to_owned(), json!({"request_header": {"name": "x-h", "default_value": "none"}})),
        ]
        .into(),
        ..model::Tracing::default()
    };
    Tracer::compile(&said).expect("supported").expect("a tracer")
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
}

const IDS: (u128, u64) = (0xAAAA_0000_0000_0000_BBBB, 0xCC);

#[test]
fn a_new_trace_is_a_draw_and_is_handed_on_either_way() {
    let tracer = zipkin(json!({}));
    for (draw, forced, sampled) in [(99, false, "1"), (100, false, "0"), (9_999, true, "1")] {
        let mut map = headers(&[]);
        let context = tracer.begin(&mut map, forced, draw, IDS);
        assert_eq!((map["x-b3-sampled"].to_str().unwrap(), context.sampled), (sampled, sampled == "1"));
        assert_eq!(map["x-b3-spanid"], "00000000000000cc");
        assert_eq!(map["x-b3-traceid"], format!("{:016x}", IDS.0 as u64).as_str(), "64 bits unless configured");
        assert!(!map.contains_key("x-b3-parentspanid") && !map.contains_key("traceparent"));
    }
    let wide = zipkin(json!({"trace_id_128bit": true}));
    let mut map = headers(&[]);
    wide.begin(&mut map, false, 0, IDS);
    assert_eq!(map["x-b3-traceid"], format!("{:032x}", IDS.0).as_str());
}

#[test]
fn a_parents_word_is_law() {
    let tracer = zipkin(json!({}));
    for (pairs, sampled) in [
        (&[("x-b3-traceid", "00000000000000aa"), ("x-b3-spanid", "00000000000000bb"), ("x-b3-sampled", "1")][..], true),
        (&[("x-b3-traceid", "00000000000000aa"), ("x-b3-spanid", "00000000000000bb"), ("x-b3-flags", "1")], true),
        (&[("b3", "00000000000000aa-00000000000000bb-1")], true),
        (&[("b3", "00000000000000aa-00000000000000bb-0-00000000000000cc")], false),
    ] {
        let mut map = headers(pairs);
        let context = tracer.begin(&mut map, false, if sampled { 9_999 } else { 0 }, IDS);
        assert_eq!((context.trace, context.parent, context.sampled), (0xaa, Some(0xbb), sampled), "{pairs:?}");
        assert_eq!(map["x-b3-traceid"], "00000000000000aa");
        assert_eq!(map["x-b3-parentspanid"], "00000000000000bb");
    }
    let mut garbage = headers(&[("x-b3-traceid", "zz"), ("x-b3-spanid", "1"), ("b3", "0")]);
    assert_eq!(tracer.begin(&mut garbage, false, 0, IDS).parent, None);
}

#[test]
fn w3c_contexts_are_continued() {
    let config = json!({
        "@type": "t/envoy.config.trace.v3.OpenTelemetryConfig",
        "grpc_service": {"cluster": "c", "authority": "c.x"},
        "service_name": "web.app",
    });
    let tracer = tracer("envoy.tracers.opentelemetry", config);
    let said = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut map = headers(&[("traceparent", said), ("tracestate", "a=b")]);
    let context = tracer.begin(&mut map, false, 9_999, IDS);
    assert!(context.sampled && context.parent == Some(0xb7ad_6b71_6920_3331));
    assert_eq!(map["traceparent"], "00-0af7651916cd43dd8448eb211c80319c-00000000000000cc-01");
    assert!(map["tracestate"] == "a=b" && !map.contains_key("x-b3-traceid"));
    for bad in [
        "00-0-0-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
    ] {
        let mut map = HeaderMap::new();
        map.insert("traceparent", HeaderValue::from_str(bad).unwrap());
        assert_eq!(tracer.begin(&mut map, false, 0, IDS).parent, None, "{bad}");
    }
}

#[test]
fn a_span_in_zipkins_words() {
    let tracer = zipkin(json!({}));
    let map = headers(&[("x-request-id", "r"), ("user-agent", "curl"), ("x-h", "there")]);
    let record = Record {
        method: "GET",
        path: "/a",
        scheme: "http",
        authority: "web",
        protocol: "HTTP/1.1",
        code: 503,
        outbound: true,
        request_headers: Headers::Map(&map),
        ..Record::new(RecordKind::Http, UNIX_EPOCH + Duration::from_secs(1), Duration::from_millis(2))
    };
    let node = NodeLabels { id: "sidecar~1".to_owned(), ..NodeLabels::default() };
    let context = SpanContext { trace: 0xaa, span: 0xbb, parent: Some(0xcc), sampled: true };
    let names = SpanNames { operation: "web.app:80/*", service: "client.app" };
    let (target, bytes) = tracer.encode(&context, &Facts { record: &record, node: &node }, names);
    assert_eq!((&*target.cluster, target.authority.as_str()), ("c", "c.x"));
    let span: Value = serde_json::from_slice(&bytes).expect("JSON");
    for (pointer, value) in [
        ("/traceId", json!("00000000000000aa")),
        ("/id", json!("00000000000000bb")),
        ("/parentId", json!("00000000000000cc")),
        ("/name", json!("web.app:80/*")),
        ("/kind", json!("CLIENT")),
        ("/timestamp", json!(1_000_000)),
        ("/duration", json!(2_000)),
        ("/localEndpoint/serviceName", json!("client.app")),
        ("/tags/http.url", json!("http://web/a")),
        ("/tags/http.status_code", json!("503")),
        ("/tags/error", json!("true")),
        ("/tags/component", json!("proxy")),
        ("/tags/guid:x-request-id", json!("r")),
        ("/tags/lit", json!("v")),
        ("/tags/hdr", json!("there")),
    ] {
        assert_eq!(span.pointer(pointer), Some(&value), "{pointer}");
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let said = |name: &str, typed: Value| model::Tracing {
        provider: Some(json!({"name": name, "typed_config": typed})),
        ..model::Tracing::default()
    };
    let datadog = said("envoy.tracers.datadog", json!({"@type": "t/envoy.config.trace.v3.DatadogConfig"}));
    assert_eq!(Tracer::compile(&datadog).unwrap_err(), "tracing by envoy.tracers.datadog");
    assert!(Tracer::compile(&model::Tracing::default()).unwrap().is_none());
}
