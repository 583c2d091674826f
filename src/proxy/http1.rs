//! One HTTP/1 connection: the codec serves it while it speaks, and is taken away while it is silent.
//!
//! Most connections of a mesh are kept open and say nothing. The library's codec holds two buffers of 8 KiB for each of
//! them, which is more than everything else together; after some silence, when nothing is half read or half written,
//! only the stream is kept and its next byte awaited. The price is a codec made anew for the next request, and one more
//! read of one byte.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::http::{Driven, Goodbye, MAX_BUFFER, MAX_HEADERS, Served, drive, until_goodbye};
use super::live::Live;
use super::watched::Watched;
use super::{late, request};
use crate::net::Stream;
use crate::net::sniff::Codec;
use crate::snapshot::HttpOptions;

/// How long the last word to a client may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Serves the connection to its end.
pub(super) async fn serve(mut stream: Stream, live: &Arc<Live>) -> Served {
    // Each state apart, so that silence has no room for what only speech needs.
    while let Some(silent) = Box::pin(speaking(stream, live)).await? {
        let Some(speaks) = Box::pin(silence(silent, live)).await else { break };
        stream = speaks;
    }
    Ok(())
}

/// Serves requests; the stream if there is a pause.
async fn speaking(stream: Stream, live: &Arc<Live>) -> hyper::Result<Option<Stream>> {
    let http = live.first();
    let service = {
        let live = Arc::clone(live);
        service_fn(move |request| request::handle(live.now(), request))
    };
    let options = &http.chain.options;
    let io = TokioIo::new(Watched::new(stream, Codec::Http1, options.request_headers_timeout, &http.counts));
    let mut connection = Box::pin(builder(options, http.conn.eof).serve_connection(io, service).with_upgrades());
    match drive(&mut connection, |connection| connection.graceful_shutdown(), live, Codec::Http1).await {
        Driven::Ended(Err(error)) if late::is_late(&error) => {
            if let Some(parts) = std::pin::Pin::into_inner(connection).into_parts() {
                Box::pin(late::answer(parts.io.into_inner(), http, FAREWELL)).await;
            }
            Err(error)
        }
        Driven::Ended(served) => served.map(|()| None),
        // What the codec has read and not understood is nothing: no head has begun.
        Driven::Silent => {
            let parts = std::pin::Pin::into_inner(connection).into_parts();
            Ok(parts.map(|parts| parts.io.into_inner().into_inner().replay(parts.read_buf)))
        }
    }
}

/// Waits for the next byte; `None`: the connection is over.
pub(super) async fn silence(mut stream: Stream, live: &Live) -> Option<Stream> {
    let mut drain = live.first().conn.env.drain().clone();
    let mut byte = [0];
    let goodbye: Goodbye = tokio::select! {
        biased;
        read = stream.read(&mut byte) => {
            return matches!(read, Ok(1)).then(|| stream.replay(Bytes::copy_from_slice(&byte)));
        }
        goodbye = until_goodbye(live, &mut drain, Codec::Http1, None) => goodbye,
    };
    goodbye.count(&live.first().metrics);
    // A client that does not listen any more is not waited for.
    let _ = timeout(FAREWELL, stream.shutdown()).await;
    None
}

/// `eof`: the client had said everything before we looked.
fn builder(options: &HttpOptions, eof: bool) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        // Otherwise a client that closes its side has gone.
        .half_close(eof)
        .preserve_header_case(options.preserve_header_case)
        .allow_multiple_spaces_in_request_line_delimiters(true)
        .max_headers(MAX_HEADERS)
        .max_header_size(options.max_request_headers as usize)
        .max_buf_size(MAX_BUFFER.max(options.max_request_headers as usize))
        // The library's limit would also run while a kept connection is idle; ours begins with the first byte.
        .header_read_timeout(None);
    builder
}
