//! Connections that switch protocols: from the 101 on, bytes are relayed.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;

use super::ctx::Ctx;
use super::tcp;
use super::watched::Watched;
use crate::drain::Phase;
use crate::error::Flags;
use crate::net::Stream;
use crate::net::copy::{self, End, First};
use crate::upstream::{AnswerBody, View};

/// Both sides of a switch.
pub(super) struct Switch {
    pub(super) client: OnUpgrade,
    pub(super) upstream: OnUpgrade,
    /// Holds the request's place at the upstream.
    pub(super) place: AnswerBody,
    /// Limit on silence.
    pub(super) idle: Option<Duration>,
}

/// Relays until both sides are done, in a task of its own: the codec has let go of the connection by then. The account
/// and the connection's drain guard live as long as the task. Policy is asked again when it changes.
pub(super) fn spawn(mut ctx: Box<Ctx>, switch: Switch) {
    tokio::spawn(async move {
        let conn = Arc::clone(&ctx.http.conn);
        let running = ctx.running();
        let judge = |view: &View| tcp::judge(view, &conn).or_else(|| running.judge(view));
        let mut drain = conn.env.drain().clone();
        let denied = tokio::select! {
            () = relay(&mut ctx, switch) => None,
            () = drain.reached(Phase::Gone) => None,
            details = tcp::denied(&conn, judge) => Some(details),
        };
        if let Some(details) = denied {
            ctx.http.metrics.cx_policy_close.inc();
            ctx.details = Cow::Owned(details);
            ctx.complete();
        }
    });
}

/// The client's stream without what watched its requests, with what the codec had read ahead in front. Always there: only
/// an HTTP/1 codec of ours switches.
fn unwatched(client: Upgraded) -> Option<Stream> {
    let parts = client.downcast::<TokioIo<Watched>>().ok()?;
    Some(parts.io.into_inner().into_inner().replay(parts.read_buf))
}

async fn relay(ctx: &mut Ctx, switch: Switch) {
    // Whoever does not come to the switch has gone; the account says so by itself.
    let (Ok(client), Ok(upstream)) = tokio::join!(switch.client, switch.upstream) else { return };
    let Some(mut client) = unwatched(client) else { return };
    let counters = copy::Counters::default();
    let mut upstream = TokioIo::new(upstream);
    let end = copy::both(&mut client, &mut upstream, &counters, switch.idle).await;
    ctx.sent = counters.received.into_inner();
    match end {
        End::Idle => {
            ctx.flags.insert(Flags::SI);
            ctx.details = Cow::Borrowed("stream_idle_timeout");
            ctx.complete();
        }
        End::Upstream(_) | End::Done(First::Upstream) => {
            ctx.flags.insert(Flags::UC);
            ctx.details = Cow::Borrowed("upstream_reset_after_response_started{connection_termination}");
            ctx.complete();
        }
        End::Done(First::Client) | End::Client(_) => {}
    }
    drop(switch.place);
}
