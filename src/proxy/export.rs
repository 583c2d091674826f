//! Sends what waits for collectors: one task for each worker, through the same clusters as everything else.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue, TE};
use http::{Method, Request, Version};
use http_body::Body as _;

use super::Env;
use crate::telemetry::{Outbox, Parcel};
use crate::upstream::{self, Body, Call, Trace};

/// How long entries are gathered, as Envoy's default of access logs.
const GATHER: Duration = Duration::from_secs(1);
/// Limit on one request to a collector.
const LIMIT: Duration = Duration::from_secs(5);

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Sends for ever. While nothing is there, nothing happens.
pub async fn run(env: Arc<Env>) {
    let Some(outbox) = env.log().map(|sink| Arc::clone(sink.outbox())) else { return };
    loop {
        outbox.arrived().await;
        tokio::select! {
            () = tokio::time::sleep(GATHER) => {}
            () = outbox.enough() => {}
        }
        deliver(&env, &outbox).await;
    }
}

/// Sends what is there now; collectors do not wait for each other.
pub(super) async fn deliver(env: &Env, outbox: &Outbox) {
    let parcels = outbox.take();
    futures_util::future::join_all(parcels.into_iter().map(|parcel| async {
        let (cluster, entries) = (Arc::clone(&parcel.target.cluster), parcel.entries);
        if let Err(why) = send(env, parcel).await {
            outbox.lost(entries);
            tracing::debug!(cluster = &*cluster, entries, "telemetry is lost: {why}");
        }
    }))
    .await;
}

async fn send(env: &Env, parcel: Parcel) -> Result<(), String> {
    let view = env.view();
    let id = view.snap.cluster_id(&parcel.target.cluster).ok_or("there is no such cluster")?;
    let cluster = view.cluster(id);
    let grpc = parcel.content_type == "application/grpc";
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = Method::POST;
    parts.uri = parcel.path.parse().map_err(|e| format!("{e}"))?;
    let host = HeaderValue::try_from(&parcel.target.authority).map_err(|e| e.to_string())?;
    parts.headers.insert(HOST, host);
    parts.headers.insert(CONTENT_TYPE, HeaderValue::from_static(parcel.content_type));
    if grpc {
        parts.headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    let version = if grpc { Version::HTTP_2 } else { Version::HTTP_11 };
    let authority = parcel.target.authority.split(':').next();
    let call = Call { timeout: Some(LIMIT), downstream_version: version, host: authority, ..Call::new(cluster) };
    let body = Body::full(parcel.body.into());
    let answer = upstream::send(&call, parts, body, &mut Trace::default()).await.map_err(|e| e.to_string())?;
    if !answer.head.status.is_success() {
        return Err(format!("status {}", answer.head.status));
    }
    let mut status = answer.head.headers.get(GRPC_STATUS).cloned();
    let mut body = answer.body;
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|e| e.to_string())?;
        status = frame.trailers_ref().and_then(|trailers| trailers.get(GRPC_STATUS).cloned()).or(status);
    }
    match status {
        Some(status) if grpc && status != "0" => Err(format!("gRPC status {status:?}")),
        _ => Ok(()),
    }
}
