//! Tracing of a request, decided when it comes: what its id says, what its client asks for, what a draw says.

use http::header::{HeaderName, HeaderValue};

use super::head::Head;
use super::headers::REQUEST_ID;
use crate::telemetry::{SpanContext, Tracer};

const CLIENT_TRACE_ID: HeaderName = HeaderName::from_static("x-client-trace-id");

/// Where the decision is in a request id.
const DECISION: usize = 14;

/// Begins or continues the trace of a request; its headers then tell whoever is next.
pub(super) fn begin(tracer: &Tracer, head: &mut Head) -> SpanContext {
    let id = head.headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(|id| is_uuid(id)).map(str::to_owned);
    let decided = id.as_ref().is_some_and(|id| matches!(id.as_bytes()[DECISION], b'9' | b'a' | b'b'));
    let forced = head.headers.contains_key(CLIENT_TRACE_ID);
    // Every hop draws the same for the same id.
    let draw = id.as_ref().and_then(|id| u64::from_str_radix(&id[..8], 16).ok()).unwrap_or_else(|| fastrand::u64(..));
    let random = (fastrand::u128(..), fastrand::u64(..));
    let context = tracer.begin(&mut head.headers, decided || forced, draw % 10_000, random);
    if let Some(mut id) = id.filter(|_| context.sampled && !decided) {
        id.replace_range(DECISION..=DECISION, if forced { "b" } else { "9" });
        head.headers.insert(REQUEST_ID, HeaderValue::try_from(id).expect("a request id"));
    }
    context
}

/// An id in Envoy's form, which has a place for the decision.
fn is_uuid(id: &str) -> bool {
    let dashes = [8, 13, 18, 23];
    id.len() == 36
        && id.bytes().enumerate().all(|(at, b)| if dashes.contains(&at) { b == b'-' } else { b.is_ascii_hexdigit() })
}

#[cfg(test)]
mod tests {
    use proxy_config::model::Tracing;
    use serde_json::json;

    use super::super::head::tests::head;
    use super::*;

    fn tracer(random: f64) -> Tracer {
        let typed = json!({"@type": "t/envoy.config.trace.v3.ZipkinConfig", "collector_cluster": "c"});
        let provider = Some(json!({"name": "envoy.tracers.zipkin", "typed_config": typed}));
        let said = Tracing { random_sampling: Some(random), provider, ..Tracing::default() };
        Tracer::compile(&said).expect("supported").expect("a tracer")
    }

    #[test]
    fn a_request_id_carries_the_decision() {
        let id = |decision: &str| format!("00000000-0000-{decision}000-8000-000000000000");
        for (decision, share, forced, sampled, after) in [
            ("9", 0.0, false, true, "9"),
            ("4", 0.0, false, false, "4"),
            ("4", 100.0, false, true, "9"),
            ("4", 0.0, true, true, "b"),
        ] {
            let said = id(decision);
            let mut pairs = vec![("host", "a"), ("x-request-id", said.as_str())];
            if forced {
                pairs.push(("x-client-trace-id", "x"));
            }
            let mut head = head("GET", "/", &pairs);
            assert_eq!(begin(&tracer(share), &mut head).sampled, sampled, "{decision} {share}");
            assert_eq!(head.headers["x-request-id"], id(after).as_str());
        }
        let mut odd = head("GET", "/", &[("host", "a"), ("x-request-id", "mine")]);
        begin(&tracer(100.0), &mut odd);
        assert_eq!(odd.headers["x-request-id"], "mine");
    }
}
