//! Protocols in which the server speaks first, on ports whose protocol is found out from the client's bytes.
//!
//! A client that says nothing may be waiting for a greeting. After a moment the upstream connection is opened; if the
//! server speaks, these are bytes and no HTTP. If the client speaks after all, inspection goes on as if nothing had been.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;

use super::conn::{Arrival, Refusal, say_something};
use super::tcp;
use crate::net::Stream;
use crate::net::sniff::Sniffer;
use crate::snapshot::TcpChain;
use crate::upstream::{ClusterLocal, TcpUpstream, Trace};

/// Silence of a client that looks like waiting: longer than a slow client's first segment takes, short for a person.
pub(super) const QUIET: Duration = Duration::from_millis(300);

/// Enough for a greeting.
const GREETING: usize = 1024;

/// An upstream connection that was opened before the chain was certain.
pub(super) struct Early {
    pub(super) upstream: TcpUpstream,
    pub(super) cluster: Arc<ClusterLocal>,
    pub(super) trace: Trace,
}

/// Waits for whoever speaks first. Afterwards the sniffer knows enough, unless the server spoke.
pub(super) async fn race(
    client: &mut Stream,
    sniffer: &mut Sniffer,
    arrival: &Arrival,
    chain: &TcpChain,
) -> Result<Option<Early>, Refusal> {
    let view = arrival.env.view();
    let mut trace = Trace::default();
    let dialled = tokio::select! {
        run = say_something(client, sniffer) => return run.map(|()| None),
        dialled = tcp::dial(&view, chain, arrival.ends(), &mut trace) => dialled,
    };
    let Ok((mut upstream, cluster)) = dialled else {
        say_something(client, sniffer).await?;
        return Ok(None);
    };
    let mut greeting = BytesMut::with_capacity(GREETING);
    tokio::select! {
        run = say_something(client, sniffer) => run?,
        _ = upstream.stream.read_buf(&mut greeting) => {
            // A client that has begun to speak is looked at to the end; an upstream that left is noticed when it is used.
            if sniffer.seen() > 0 {
                say_something(client, sniffer).await?;
            }
        }
    }
    let TcpUpstream { stream, .. } = &mut upstream;
    replay(stream, greeting);
    Ok(Some(Early { upstream, cluster, trace }))
}

/// Puts what was read back in front.
fn replay(stream: &mut Stream, read: BytesMut) {
    if !read.is_empty() {
        let (placeholder, _) = tokio::io::duplex(1);
        let inner = std::mem::replace(stream, Stream::Mem(placeholder));
        *stream = inner.replay(read.freeze());
    }
}
