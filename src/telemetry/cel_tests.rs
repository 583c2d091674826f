use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::telemetry::peer::Peer;
use crate::telemetry::{Headers, NodeLabels, Record, RecordKind};
use proxy_config::peer::Workload;

fn shown(text: &str) -> Result<String, String> {
    let mut headers = HeaderMap::new();
    headers.insert("x-a", HeaderValue::from_static("1"));
    let labels = [("role".to_owned(), "r".to_owned())].into();
    let peer = Peer::new(Workload { app: "ratings".to_owned(), labels, ..Workload::default() });
    let record = Record {
        method: "GET",
        path: "/new",
        original_path: "/old?q=1",
        authority: "host:80",
        code: 503,
        outbound: true,
        mtls: true,
        peer: Some(&peer),
        request_headers: Headers::Map(&headers),
        downstream_local: "10.0.0.1:8080".parse().ok(),
        ..Record::new(RecordKind::Http, SystemTime::UNIX_EPOCH, Duration::ZERO)
    };
    let metadata = json!({"WORKLOAD_NAME": "web", "LABELS": {"app": "web", "a.b/c": "x"}, "N": 3});
    let node = NodeLabels { metadata, ..NodeLabels::default() };
    let expression = Expression::compile(text)?;
    let value = expression.value(&Facts { record: &record, node: &node }).map_err(|_| "undefined".to_owned())?;
    let mut out = String::new();
    value.print(&mut out);
    Ok(out)
}

#[test]
fn what_istio_documents_is_understood() {
    for (text, value) in [
        ("request.host", "host:80"),
        ("request.url_path", "/old"),
        ("request.headers['x-a'] + \"-\" + request.method", "1-GET"),
        ("string(destination.port)", "8080"),
        ("'_' + node.metadata['LABELS']['app']", "_web"),
        ("xds.node.metadata.LABELS['a.b/c']", "x"),
        ("node.metadata.N", "3"),
        ("has(node.metadata.LABELS.version) ? node.metadata.LABELS.version : 'unknown'", "unknown"),
        ("filter_state.upstream_peer.labels['role']", "r"),
        ("filter_state.upstream_peer.app", "ratings"),
        ("response.code >= 500 || connection.mtls == false", "true"),
        ("response.code >= 400 && response.code < 500", "false"),
        ("!(request.method in ['GET', 'HEAD'])", "false"),
        ("request.path.startsWith('/old') && request.path.matches('q=[0-9]+')", "true"),
        ("'x-a' in request.headers && !('x-b' in request.headers)", "true"),
        ("request.headers['x-b'] == 'y' || response.code == 503", "true"),
        ("size('abc') * 2 - -1", "7"),
        ("[1, 2][1] + 1 == 3", "true"),
        ("int('7') % 4", "3"),
        ("true ? 'a' : 'b'", "a"),
    ] {
        assert_eq!(shown(text).as_deref(), Ok(value), "{text}");
    }
}

#[test]
fn what_has_no_value_says_so() {
    for text in [
        "request.headers['x-b']",
        "cannot_evaluate",
        "filter_state.downstream_peer.app",
        "1 + 'a'",
        "'a' < 1",
        "request.headers['x-b'] == 'y' && true",
        "9223372036854775807 + 1",
        "1 % 0",
    ] {
        assert_eq!(shown(text), Err("undefined".to_owned()), "{text}");
    }
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    for (text, why) in [
        ("cannot _ parse | x", "not expected"),
        ("a.exists(x, x)", "exists"),
        ("timestamp('x')", "timestamp"),
        ("'a", "does not end"),
        ("1 +", "too early"),
        ("size('a', 'b')", "takes 1"),
        ("'a'.matches('(')", "pattern"),
        (&"(".repeat(500), "nested"),
    ] {
        let error = Expression::compile(text).expect_err(text);
        assert!(error.contains(why), "{text}: {error}");
    }
}

#[test]
fn headers_that_are_read_are_known_beforehand() {
    let both =
        Expression::compile("request.headers['X-A'] == response.headers['b'] || 'c' in request.headers").unwrap();
    let (request, response) = both.headers();
    assert_eq!((request[0].as_str(), request[1].as_str(), response[0].as_str()), ("x-a", "c", "b"));
}

proptest! {
    #[test]
    fn no_text_panics(text in "[a-z0-9 .'\"()\\[\\]!<>=&|?:+*%-]{0,60}") {
        let _ = shown(&text);
    }
}
