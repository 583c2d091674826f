//! The answer to a head that does not come to its end in time. The codec has no request yet that it could answer, so it is
//! written past it, as Envoy's is worded.

use std::error::Error;
use std::fmt::Write;
use std::io;
use std::time::Duration;

use http::header::HeaderMap;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

use super::headers;
use super::http::HttpConn;
use super::watched::Watched;
use crate::error::Kind;
use crate::telemetry::RecordKind;

/// Whether a connection ended because of such a head. An error that the kernel tells has a number; nobody hears us then.
pub(super) fn is_late(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>());
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut && cause.raw_os_error().is_none())
}

/// Answers, if nothing else is being said, and closes; both together take no longer than `limit`.
pub(super) async fn answer(watched: Watched, http: &HttpConn, limit: Duration) {
    if !http.counts.is_idle() || !watched.is_flushed() {
        return;
    }
    http.metrics.rq_timeout.inc();
    let row = Kind::HeadTimeout.row();
    let head = head(http, row.status, row.body);
    let mut stream = watched.into_inner();
    // A client that does not listen any more is not waited for.
    let _ = timeout(limit, async {
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(row.body.as_bytes()).await?;
        stream.shutdown().await
    })
    .await;
    let Some(sink) = http.conn.env.log().filter(|sink| sink.wants(&http.logs)) else { return };
    let mut record = http.conn.record(RecordKind::Http, http.conn.started, http.conn.start.elapsed());
    (record.code, record.details, record.flags) = (row.status, row.details, row.flag);
    record.protocol = "HTTP/1.1";
    record.bytes_sent = row.body.len() as u64;
    sink.log(&record, &http.logs);
}

fn head(http: &HttpConn, status: u16, body: &str) -> String {
    let date = OffsetDateTime::now_utc().format(&Rfc2822).unwrap_or_default().replace("+0000", "GMT");
    let mut out = format!(
        "HTTP/1.1 {status} Request Timeout\r\ncontent-length: {}\r\ncontent-type: text/plain\r\ndate: {date}\r\n",
        body.len()
    );
    let mut own = HeaderMap::new();
    headers::server(&mut own, &http.chain.options);
    for (name, value) in &own {
        // Writing to a string cannot fail.
        let _ = write!(out, "{name}: {}\r\n", String::from_utf8_lossy(value.as_bytes()));
    }
    out + "connection: close\r\n\r\n"
}
