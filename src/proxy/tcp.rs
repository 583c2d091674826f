//! Bytes: one connection here, one there, and what goes between them.

use std::hash::Hasher;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use twox_hash::XxHash64;

use super::conn::Conn;
use crate::drain::Phase;
use crate::net::{Stream, copy};
use crate::snapshot::TcpChain;
use crate::upstream::{self, TcpCall, Trace, View};

/// Tries until an upstream connection stands, as Envoy's default.
const CONNECT_ATTEMPTS: u32 = 1;

/// Relays a connection to its end.
pub(super) async fn serve(mut client: Stream, conn: &Arc<Conn>, chain: &TcpChain) {
    let view = conn.env.view();
    let mut trace = Trace::default();
    let Some(mut upstream) = connect(&view, conn, chain, &mut trace).await else { return };
    drop(view);
    let counters = copy::Counters::default();
    let relay = copy::both(&mut client, &mut upstream.stream, &counters, chain.idle_timeout);
    let mut drain = conn.env.drain.clone();
    tokio::select! {
        _ = relay => {}
        () = limit(chain.max_duration) => {}
        () = drain.reached(Phase::Gone) => {}
        () = denied(conn) => client.reset_on_drop(),
    }
}

async fn connect(view: &View, conn: &Conn, chain: &TcpChain, trace: &mut Trace) -> Option<upstream::TcpUpstream> {
    let cluster = chain.clusters.pick(fastrand::u64(..))?;
    let id = view.snap.resolve(cluster)?;
    let call = TcpCall {
        cluster: view.cluster(id),
        max_connect_attempts: CONNECT_ATTEMPTS,
        hash: chain.hash_source_ip.then(|| hash_ip(conn)),
        original_dst: Some(conn.destination),
        client: Some((conn.peer, conn.destination)),
    };
    upstream::connect_tcp(&call, trace).await.ok()
}

fn hash_ip(conn: &Conn) -> u64 {
    let mut hasher = XxHash64::with_seed(0);
    hasher.write(conn.peer.ip().to_string().as_bytes());
    hasher.finish()
}

async fn limit(duration: Option<Duration>) {
    match duration {
        Some(duration) => sleep(duration).await,
        None => std::future::pending().await,
    }
}

/// Ends when policy no longer lets this connection be.
async fn denied(conn: &Conn) {
    let mut views = conn.env.view.subscribe();
    while views.changed().await.is_ok() {}
    std::future::pending().await
}
