//! Copies of requests for another cluster; nobody waits for their answers.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::HeaderValue;
use http_body::Body as _;

use super::head::Head;
use super::headers;
use super::http::HttpConn;
use super::request::{copy_of, parts_of};
use crate::snapshot::action::Forward;
use crate::upstream::{self, AnswerBody, Body, Call, Trace, View};

/// Copies under way on one worker. Nobody waits for them, so nothing else slows the client down when they are answered
/// late or never; Envoy's default for requests of a cluster.
const MOST: usize = 1024;

/// How many are under way.
#[derive(Debug, Default, Clone)]
pub(super) struct Mirrors(Arc<AtomicUsize>);

/// One copy's place; dropping it leaves.
#[derive(Debug)]
struct Place(Mirrors);

impl Mirrors {
    /// A place for one more; `None` when there are too many.
    fn take(&self) -> Option<Place> {
        // Only this worker's thread counts.
        let full = self.0.load(Ordering::Relaxed) >= MOST;
        (!full).then(|| {
            self.0.fetch_add(1, Ordering::Relaxed);
            Place(self.clone())
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Sends what the route mirrors, as long as there is room for it.
pub(super) fn send(http: &HttpConn, view: &View, forward: &Forward, head: &Head, body: &Body) {
    for (cluster, mirror) in &forward.mirrors {
        if fastrand::u32(..1_000_000) >= mirror.millionths {
            continue;
        }
        let Some(id) = view.snap.resolve(cluster) else { continue };
        let Some(place) = http.conn.env.mirrors.take() else {
            tracing::debug!(cluster = %cluster.name, "not mirrored: {MOST} copies are under way");
            return;
        };
        let mut copy = copy_of(head);
        if mirror.shadow_suffix {
            add_suffix(&mut copy);
        }
        copy.headers.insert(headers::INTERNAL, HeaderValue::from_static("true"));
        headers::append_forwarded_for(&mut copy.headers, http.conn.local.ip());
        let cluster = view.cluster(id).clone();
        let (scheme, version, timeout) = (copy.scheme.clone(), copy.version, forward.timeout);
        let (original_dst, body) = (http.conn.original_dst, body.copy());
        // Nothing of the request waits for it: it ends by its own limits, or with the worker.
        tokio::spawn(async move {
            let call = Call { timeout, scheme, downstream_version: version, original_dst, ..Call::new(&cluster) };
            let sent = upstream::send(&call, parts_of(&mut copy), body, &mut Trace::default()).await;
            match sent {
                Ok(answer) => drain(answer.body).await,
                Err(error) => tracing::debug!(cluster = %call.cluster.shared.name, %error, "mirrored request failed"),
            }
            drop(place);
        });
    }
}

/// Reads an answer to its end, so that its connection can be used again.
async fn drain(mut body: AnswerBody) {
    while let Some(Ok(_)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {}
}

/// The host with `-shadow`, in front of its port.
fn add_suffix(head: &mut Head) {
    let text = head.authority();
    let (host, port) = match text.rfind(':') {
        Some(at) if !text[at..].contains(']') => text.split_at(at),
        _ => (text, ""),
    };
    if let Ok(shadow) = HeaderValue::try_from(format!("{host}-shadow{port}")) {
        head.authority = shadow;
    }
}

#[cfg(test)]
mod tests {
    use super::super::head::tests::head;
    use super::*;

    #[test]
    fn copies_are_bounded_and_give_their_place_back() {
        let mirrors = Mirrors::default();
        let mut places: Vec<Place> = (0..MOST).map(|_| mirrors.take().unwrap()).collect();
        assert!(mirrors.take().is_none());
        places.pop();
        assert!(mirrors.take().is_some());
    }

    #[test]
    fn shadow_hosts() {
        for (host, expected) in [("a", "a-shadow"), ("a:80", "a-shadow:80"), ("[::1]", "[::1]-shadow")] {
            let mut head = head("GET", "/", &[("host", host)]);
            add_suffix(&mut head);
            assert_eq!(head.authority, expected);
        }
    }
}
