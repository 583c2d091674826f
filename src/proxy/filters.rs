//! The HTTP filters of a chain, in configured order: a loop over a closed enum.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::HeaderValue;
use proxy_config::model::Fault;

use super::cors;
use super::ctx::Ctx;
use super::head::Head;
use super::http::HttpConn;
use super::reply::Reply;
use super::{jwt, peer_metadata};
use crate::error::{Flags, Kind};
use crate::snapshot::action::Cors;
use crate::snapshot::{AlpnRewrite, Attributes, Found, HttpFilter, Metadata, PeerMetadata, Rbac, RouteTable, route};

/// Denials that each worker explains in a second; who is denied must not be able to fill a disk.
const EXPLAINED: u64 = 10;

/// What filters leave for later.
#[derive(Default)]
pub(super) struct Passed<'a> {
    pub(super) alpn: Option<&'a Arc<AlpnRewrite>>,
    /// The response is marked for this origin.
    pub(super) cors: Option<(&'a Cors, HeaderValue)>,
    /// Peer metadata travels in headers.
    pub(super) exchange: Option<&'a Arc<PeerMetadata>>,
}

/// What filters say: after `delay`, go on or answer.
pub(super) struct Decision<'a> {
    pub(super) delay: Option<Duration>,
    pub(super) outcome: Result<Passed<'a>, Box<Reply>>,
}

/// Runs the filters. `found` is the route; a token may lead to another one of the table.
pub(super) fn run<'a>(
    http: &'a HttpConn,
    head: &mut Head,
    table: Option<&'a RouteTable>,
    found: &mut Option<Found<'a>>,
    ctx: &mut Ctx,
) -> Decision<'a> {
    let mut delay = None;
    let mut passed = Passed::default();
    let mut metadata: Option<Arc<Metadata>> = None;
    for filter in &http.chain.filters {
        let route = found.as_ref().map(|found| found.route);
        let stop = match filter {
            HttpFilter::Rbac(rbac) => authorize(http, rbac, head, (metadata.as_deref(), &mut *ctx)),
            HttpFilter::Fault => match route.and_then(|route| route.fault.as_deref()) {
                Some(fault) => inject(fault, http, ctx, &mut delay),
                None => None,
            },
            HttpFilter::Cors => match route.and_then(|route| route.cors.as_deref()) {
                Some(cors) => match cors::on_request(cors, head) {
                    cors::Outcome::Pass => None,
                    cors::Outcome::Mark(origin) => {
                        passed.cors = Some((cors, origin));
                        None
                    }
                    cors::Outcome::Answer(reply) => Some(reply),
                },
                None => None,
            },
            HttpFilter::Alpn(rewrite) => {
                passed.alpn = Some(rewrite);
                None
            }
            HttpFilter::PeerMetadata(said) => {
                peer_metadata::from_client(said, http, head, ctx);
                passed.exchange = Some(said);
                None
            }
            HttpFilter::Stats(_) | HttpFilter::GrpcStats => None,
            HttpFilter::JwtAuthn(said) => match jwt::check(said, head, &http.conn.env) {
                Ok(said) => {
                    metadata = said;
                    if let Some(table) = table.filter(|table| metadata.is_some() && table.asks_metadata()) {
                        *found = route::find_knowing(table, &head.view(), metadata.as_deref(), fastrand::u64(..)).ok();
                    }
                    None
                }
                Err(reply) => {
                    http.metrics.jwt_denied.inc();
                    Some(reply)
                }
            },
            HttpFilter::GrpcWeb if !is_grpc_web(head) => None,
            HttpFilter::GrpcWeb => Some(unsupported(http, "gRPC-Web")),
            HttpFilter::Unsupported { name, security: true } => Some(unusable(http, name)),
            HttpFilter::Unsupported { name, security: false } => Some(unsupported(http, name)),
        };
        if let Some(reply) = stop {
            return Decision { delay, outcome: Err(Box::new(reply)) };
        }
    }
    Decision { delay, outcome: Ok(passed) }
}

fn authorize(
    http: &HttpConn,
    rbac: &Rbac,
    head: &Head,
    (metadata, ctx): (Option<&Metadata>, &mut Ctx),
) -> Option<Reply> {
    let request = head.view();
    let attributes = Attributes { remote_ip: ctx.remote, request: Some(&request), metadata, ..http.conn.attributes() };
    let verdict = rbac.check(&attributes);
    if verdict.shadow.is_some_and(|(allowed, _)| !allowed) {
        http.metrics.rbac_shadow_denied.inc();
    }
    if verdict.allowed {
        http.metrics.rbac_allowed.inc();
        return None;
    }
    http.metrics.rbac_denied.inc();
    ctx.policy = verdict.policy.cloned();
    if http.conn.env.denials.may() {
        explain(http, rbac, head, &attributes);
    }
    Some(Reply { details: Cow::Owned(verdict.details()), ..Reply::of(Kind::RbacDenied) })
}

/// A denial in words, for whoever wonders.
fn explain(http: &HttpConn, rbac: &Rbac, head: &Head, attributes: &Attributes<'_>) {
    let Some(denial) = rbac.why(attributes) else { return };
    tracing::info!(
        peer = %http.conn.peer,
        principal = http.conn.tls.as_deref().map_or("none (plaintext)", |peer| peer.principal()),
        method = %head.method,
        path = head.path.path(),
        "RBAC: access denied: {denial}"
    );
}

fn inject(fault: &Fault, http: &HttpConn, ctx: &mut Ctx, delay: &mut Option<Duration>) -> Option<Reply> {
    if let Some((duration, share)) = fault.delay
        && drawn(share)
    {
        *delay = Some(duration);
        ctx.flags.insert(Flags::DI);
        http.metrics.fault_delays.inc();
    }
    let reply = abort(fault, drawn)?;
    http.metrics.fault_aborts.inc();
    Some(reply)
}

/// Whether something with a share in millionths happens this time.
fn drawn(millionths: u32) -> bool {
    fastrand::u32(..1_000_000) < millionths
}

/// The injected answer. A gRPC status given to a plain client is 200 with the text.
fn abort(fault: &Fault, drawn: impl Fn(u32) -> bool) -> Option<Reply> {
    let mut reply = Reply::of(Kind::FaultAbort);
    match (fault.abort_http, fault.abort_grpc) {
        (Some((status, share)), _) if drawn(share) => reply.status = status,
        (None, Some((status, share))) if drawn(share) => {
            reply.status = 200;
            reply.grpc = Some(status);
        }
        _ => return None,
    }
    Some(reply)
}

fn is_grpc_web(head: &Head) -> bool {
    let kind = head.headers.get(http::header::CONTENT_TYPE);
    kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc-web"))
}

pub(super) fn unusable(http: &HttpConn, what: &str) -> Reply {
    tracing::warn!(chain = %http.whole.name, "refused: policy cannot be enforced: {what}");
    Reply::of(Kind::PolicyUnusable)
}

pub(super) fn unsupported(http: &HttpConn, what: &str) -> Reply {
    http.metrics.unsupported.inc();
    let reply = Reply::of(Kind::UnsupportedConfig);
    Reply { body: format!("unsupported configuration: {what}").into(), ..reply }
}

/// Lets so many things happen in a second.
#[derive(Default)]
pub(super) struct Throttle(AtomicU64);

impl Throttle {
    pub(super) fn may(&self) -> bool {
        let second = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
        self.may_at(second)
    }

    /// The second above, the count in the low 16 bits.
    fn may_at(&self, second: u64) -> bool {
        let before = self.0.load(Ordering::Relaxed);
        let count = if before >> 16 == second { before & 0xffff } else { 0 };
        let may = count < EXPLAINED;
        if may {
            self.0.store(second << 16 | (count + 1), Ordering::Relaxed);
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aborts() {
        let fault = |http, grpc| Fault { delay: None, abort_http: http, abort_grpc: grpc };
        let shown = |fault: Fault| abort(&fault, |share| share > 500_000).map(|reply| (reply.status, reply.grpc));
        assert_eq!(shown(fault(Some((555, 1_000_000)), None)), Some((555, None)));
        assert_eq!(shown(fault(None, Some((14, 1_000_000)))), Some((200, Some(14))));
        assert_eq!(shown(fault(Some((555, 1)), None)), None);
        assert_eq!(shown(fault(None, None)), None);
    }

    #[test]
    fn a_throttle_opens_every_second() {
        let throttle = Throttle::default();
        assert_eq!((0..99).filter(|_| throttle.may_at(7)).count() as u64, EXPLAINED);
        assert!(throttle.may_at(8));
    }
}
