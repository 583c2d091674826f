use std::time::{Duration, SystemTime};

use serde_json::json;

use super::*;
use crate::telemetry::labels::tests::{node, outbound};
use crate::telemetry::{Labels, Record, RecordKind, Sizes, Telemetry};

/// The families after one request under a configuration.
fn families(config: &Value) -> (String, Vec<String>) {
    let (stats, left_out) = Stats::compile(config);
    let overrides = stats.overrides.expect("overrides");
    let (node, telemetry) = (node(), Telemetry::new(node()));
    let record = Record { authority: "shop", ..Record::new(RecordKind::Http, SystemTime::UNIX_EPOCH, Duration::ZERO) };
    let values = overrides.evaluate(&Facts { record: &record, node: &node });
    let labels = Labels { changed: Some((&overrides, &values)), ..outbound() };
    telemetry.shard().record_request(&labels, Sizes::default());
    let mut out = String::new();
    telemetry.istio_families(&mut out);
    (out, left_out)
}

fn line<'a>(families: &'a str, family: &str) -> &'a str {
    families.lines().find(|line| line.starts_with(&format!("{family}{{"))).unwrap_or_default()
}

#[test]
fn labels_go_change_and_come() {
    let (families, left_out) = families(&json!({"metrics": [
        {"name": "requests_total", "dimensions": {"request_host": "request.host", "source_app": "'_'"},
         "tags_to_remove": ["response_flags", "odd"]},
        {"dimensions": {"source_principal": "nothing.there"}},
        {"name": "request_bytes", "drop": true},
    ]}));
    let total = line(&families, "istio_requests_total");
    assert!(total.contains("request_host=\"shop\"") && total.contains("source_app=\"_\""), "{total}");
    assert!(!total.contains("response_flags") && total.contains("source_principal=\"unknown\""), "{total}");
    assert!(!families.contains("istio_request_bytes") && families.contains("istio_response_bytes_count{reporter="));
    let duration = line(&families, "istio_request_duration_milliseconds_count");
    assert!(duration.contains("response_flags") && !duration.contains("request_host"), "{duration}");
    assert_eq!(left_out.len(), 1, "{left_out:?}");
}

#[test]
fn a_standard_label_whose_expression_is_not_understood_goes() {
    let (families, left_out) = families(&json!({"metrics": [
        {"name": "requests_total", "dimensions": {"destination_app": "cannot _ parse", "more": "cannot _ parse"}},
    ]}));
    let total = line(&families, "istio_requests_total");
    assert!(!total.contains("destination_app") && !total.contains("more="), "{total}");
    assert!(left_out[0].contains("cannot _ parse"));
}

#[test]
fn metrics_of_ones_own() {
    let (families, left_out) = families(&json!({
        "definitions": [
            {"name": "custom", "value": "3", "type": "COUNTER"},
            {"name": "sizes", "value": "7", "type": "HISTOGRAM"},
            {"name": "requests_total", "value": "10", "type": "COUNTER"},
        ],
        "metrics": [{"name": "custom", "dimensions": {"reporter": "'proxy'", "x": "'y'"}}],
    }));
    assert!(
        families.contains("# TYPE istio_custom counter\nistio_custom{reporter=\"proxy\",x=\"y\"} 3\n"),
        "{families}"
    );
    assert!(families.contains("istio_sizes_sum 7\n"), "{families}");
    assert!(line(&families, "istio_requests_total").ends_with(" 1"));
    assert_eq!(left_out.len(), 1);
}

#[test]
fn equal_configurations_are_one_series() {
    let config = json!({"metrics": [{"dimensions": {"a": "'b'"}}]});
    let (one, other) = (Stats::compile(&config).0, Stats::compile(&config).0);
    assert_eq!(one, other);
    assert_ne!(one, Stats::compile(&json!({"metrics": [{"dimensions": {"a": "'c'"}}]})).0);
    assert!(Stats::compile(&json!({"disable_host_header_fallback": true})).0.overrides.is_none());
    assert_eq!(Stats::compile(&json!({"rotation_interval": "0.5s"})).0.rotation, Some(Duration::from_millis(500)));
}
