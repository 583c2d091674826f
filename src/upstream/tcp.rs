//! A connection for a TCP proxy: permit, host, transport.

use std::sync::Arc;

use tokio::time::Instant;

use super::breaker::{Active, Connected, Permit};
use super::conn::Hello;
use super::lb::Wish;
use super::outlier::Signal;
use super::{TcpCall, TcpUpstream, Trace};
use crate::error::{Error, Flags, Kind, Limit};

/// What an open relayed connection holds.
#[derive(Debug)]
pub(super) struct TcpHold {
    _connected: Connected,
    _active: Active,
    _request: Permit,
}

/// See [`super::connect_tcp`].
pub(super) async fn connect(call: &TcpCall<'_>, trace: &mut Trace) -> Result<TcpUpstream, Error> {
    let most = call.max_connect_attempts.max(1);
    loop {
        trace.attempts += 1;
        let error = match one(call, trace).await {
            Ok(upstream) => return Ok(upstream),
            Err(error) => error,
        };
        let again =
            matches!(error.kind, Kind::ConnectRefused | Kind::ConnectTimeout | Kind::TlsHandshake | Kind::PeerIdentity);
        if again && trace.attempts < most {
            continue;
        }
        trace.flags.insert(error.kind.row().flag);
        if again {
            // With one attempt allowed, one is all there is: Envoy says so too.
            trace.flags.insert(Flags::URX);
        }
        return Err(error);
    }
}

async fn one(call: &TcpCall<'_>, trace: &mut Trace) -> Result<TcpUpstream, Error> {
    let cluster = call.cluster;
    let shared = &cluster.shared;
    trace.started = Some(Instant::now());
    let connection =
        Permit::take(&shared.breakers, Limit::Connections).inspect_err(|_| cluster.metrics.cx_overflow.inc())?;
    let wish = Wish { hash: call.hash, avoid: &[], attempts: 0, pass_over: 0 };
    let Some(picked) = cluster.pick(wish, call.original_dst) else {
        cluster.metrics.cx_none_healthy.inc();
        return Err(Error::local(Kind::NoHealthyHost));
    };
    trace.host = Some(Arc::clone(&picked.host));
    let stats = &picked.host.stats;
    let pending = Permit::take(&shared.breakers, Limit::Pending)?;
    let connected = Connected::new(connection, stats, &cluster.metrics);
    let hello = Hello { alpn: None, host: None, client: call.client };
    let opened = match picked.pools.place.open(hello).await {
        Ok(opened) => opened,
        Err(failure) => {
            let error = failure.error();
            if error.source == crate::error::Source::Upstream {
                cluster.record(stats, Signal::Broken);
            }
            trace.transport_failure = Some((*failure.text).to_owned());
            return Err(error);
        }
    };
    drop(pending);
    let request = Permit::take(&shared.breakers, Limit::Requests)?;
    cluster.record(stats, Signal::Connected);
    trace.ready = Some(Instant::now());
    trace.upstream_local = opened.local;
    trace.peer.clone_from(&opened.peer);
    let hold = TcpHold { _connected: connected, _active: Active::enter(stats, &cluster.metrics), _request: request };
    Ok(TcpUpstream { stream: opened.stream, host: picked.host, local: opened.local, peer: opened.peer, _hold: hold })
}
