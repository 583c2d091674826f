//! One request, from its head to the response's: the script of the proxy.

use std::borrow::Cow;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use http::header::{CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderValue, LOCATION, SET_COOKIE, TRANSFER_ENCODING};
use http::{Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use proxy_config::model::UpstreamProtocol;
use tokio::time::sleep;

use super::body::Body;
use super::ctx::Ctx;
use super::expiry::{Expiry, Life};
use super::filters::{self, Passed};
use super::hash;
use super::head::{Head, Malformed};
use super::headers::{self, Upgrade};
use super::http::HttpConn;
use super::limits::Limits;
use super::reply::Reply;
use super::respond::{Answered, write_reply};
use super::vars::{self, Facts};
use super::{mirror, ops, peer_metadata, trace};
use crate::error::{Error, Kind};
use crate::snapshot::action::{Action, Forward, HostRewrite};
use crate::snapshot::path::Outcome;
use crate::snapshot::{Found, Route, route};
use crate::upstream::{self, Call, ClusterLocal, View};

/// Answers a request. An error ends the connection (HTTP/2: the stream) without an answer.
pub(super) async fn handle(http: Arc<HttpConn>, request: Request<Incoming>) -> Result<Response<Body>, Error> {
    let (parts, incoming) = request.into_parts();
    let body = upstream::Body::from_client(incoming);
    let (mut head, checked) = Head::new(parts, http.accepts());
    let mut ctx = Ctx::begin(&http, &head, body.progress().cloned());
    let decorator = None;
    let mut script = Script { http: &http, ctx: &mut ctx, decorator };
    let outcome = match checked {
        Ok(()) => script.run(&mut head, body).await,
        Err(why) => Err(Box::new(Reply::of_malformed(why))),
    };
    let decorator = script.decorator;
    Ok(match outcome {
        Ok(answered) => answered.write(ctx, decorator),
        Err(reply) => write_reply(*reply, ctx, decorator),
    })
}

/// A request under way.
struct Script<'a> {
    http: &'a Arc<HttpConn>,
    ctx: &'a mut Ctx,
    /// `x-envoy-decorator-operation` of the response.
    decorator: Option<HeaderValue>,
}

/// What the request leaves for the response.
struct After<'a> {
    passed: Passed<'a>,
    /// The request, for header changes that ask for it.
    kept: Option<&'a Head>,
    cookie: Option<HeaderValue>,
    idle: Option<Duration>,
}

/// A route that forwards, with where to.
#[derive(Clone, Copy)]
struct Target<'a> {
    found: &'a Found<'a>,
    forward: &'a Forward,
    cluster: &'a Arc<ClusterLocal>,
    view: &'a View,
}

impl Script<'_> {
    async fn run(&mut self, head: &mut Head, body: upstream::Body) -> Result<Answered, Box<Reply>> {
        let options = &self.http.chain.options;
        normalise(head, self.http)?;
        let arrived = headers::on_request(head, options, self.http.origin(), || fastrand::u128(..))
            .map_err(|why| Box::new(Reply::of_malformed(why)))?;
        if let Some(tracer) = &options.tracer {
            self.ctx.span = Some(trace::begin(tracer, head));
        }
        self.ctx.arrived(head, arrived.remote);
        if arrived.upgrade == Upgrade::Refused {
            return Err(Box::new(Reply { close: true, ..Reply::new(403, "upgrade_failed", "") }));
        }
        if let Some(why) = &self.http.whole.unusable {
            return Err(Box::new(filters::unusable(self.http, why)));
        }
        if self.http.counts.is_barred() {
            return Err(Box::new(filters::unusable(self.http, "the connection's filter chain is gone")));
        }
        let view = self.http.conn.env.view();
        let table = view.snap.route_table(&self.http.chain);
        let mut found = table.and_then(|table| route::find(table, &head.view(), fastrand::u64(..)).ok());
        if let Some(found) = &found {
            self.note_route(found, head);
        }
        let first = found.map(|found| found.route);
        let decision = filters::run(self.http, head, table.map(|table| &**table), &mut found, self.ctx);
        if let Some(found) = found.as_ref().filter(|now| first.is_none_or(|first| !std::ptr::eq(first, now.route))) {
            self.note_route(found, head);
        }
        if let Some(delay) = decision.delay {
            Box::pin(sleep(delay)).await;
        }
        let passed = decision.outcome?;
        let Some(found) = found else {
            self.http.metrics.no_route.inc();
            return Err(Box::new(Reply::of(Kind::NoRoute)));
        };
        let Some(forward) = self.answer_or_forward(&found, head)? else {
            return Err(Box::new(Reply::of(Kind::Internal)));
        };
        if arrived.upgrade == Upgrade::Allowed && !headers::may_upgrade(&head.headers, &forward.upgrades) {
            return Err(Box::new(Reply { close: true, ..Reply::new(403, "upgrade_failed", "") }));
        }
        let cluster = self.cluster(&found, forward, &view)?;
        let target = Target { found: &found, forward, cluster: &cluster, view: &view };
        self.forward(head, body, target, passed, arrived.upgrade == Upgrade::Allowed).await
    }

    /// Names for the log; the operation for tracing goes with the request outbound, with the response inbound.
    fn note_route(&mut self, found: &Found<'_>, head: &mut Head) {
        self.ctx.route = Some(Arc::clone(&found.route.name));
        self.ctx.vhost = Some(Arc::clone(&found.vhost.name));
        self.ctx.operation.clone_from(&found.route.decorator);
        if !self.http.conn.is_inbound() {
            if let Some(decorator) = &found.route.decorator {
                head.headers.insert(headers::DECORATOR, decorator.clone());
            }
            return;
        }
        let said = head.headers.remove(headers::DECORATOR).filter(|name| !name.is_empty());
        let named = said.is_some();
        if named {
            self.ctx.operation = said;
        }
        self.decorator = found.route.decorator.clone().filter(|_| !named);
    }

    /// What the route says without an upstream.
    fn answer_or_forward<'t>(&self, found: &Found<'t>, head: &Head) -> Result<Option<&'t Forward>, Box<Reply>> {
        if let Some(name) = &found.route.unsupported {
            return Err(Box::new(filters::unsupported(self.http, name)));
        }
        match &found.route.action {
            Action::Forward(forward) => Ok(Some(forward)),
            Action::Unsupported(name) => Err(Box::new(filters::unsupported(self.http, name))),
            Action::Redirect(redirect) => {
                let request = head.view();
                let location = redirect.location(&request, found.route.matched(request.path));
                let mut reply = Reply::new(redirect.status(), "direct_response", "");
                reply.headers.extend(HeaderValue::try_from(location).ok().map(|location| (LOCATION, location)));
                reply.plain = true;
                Err(Box::new(self.decorated(reply, found.route, head)))
            }
            Action::Direct { status, body } => {
                let body = String::from_utf8_lossy(body).into_owned();
                let reply = Reply::new(*status, "direct_response", body);
                Err(Box::new(self.decorated(reply, found.route, head)))
            }
        }
    }

    /// A direct response with the route's header changes.
    fn decorated(&self, mut reply: Reply, route: &Route, head: &Head) -> Reply {
        if route.response_headers.is_empty() {
            return reply;
        }
        let mut map = HeaderMap::new();
        for (name, value) in reply.headers.drain(..) {
            map.append(name, value);
        }
        let status = StatusCode::from_u16(reply.status).unwrap_or(StatusCode::OK);
        ops::on_response(&route.response_headers, &mut map, status, self.facts(Some(head)));
        reply.headers = map.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        reply
    }

    fn cluster(&mut self, found: &Found<'_>, forward: &Forward, view: &View) -> Result<Arc<ClusterLocal>, Box<Reply>> {
        let wanted = found.cluster();
        let Some(id) = wanted.and_then(|cluster| view.snap.resolve(cluster)) else {
            self.ctx.missing_cluster = wanted.map(|cluster| Arc::clone(&cluster.name));
            self.http.metrics.no_cluster.inc();
            let mut reply = Reply::of(Kind::NoCluster);
            reply.status = forward.cluster_not_found_status;
            return Err(Box::new(reply));
        };
        let cluster = Arc::clone(view.cluster(id));
        self.ctx.cluster = Some(Arc::clone(&cluster));
        Ok(cluster)
    }

    async fn forward(
        &mut self,
        head: &mut Head,
        body: upstream::Body,
        target: Target<'_>,
        passed: Passed<'_>,
        upgrade: bool,
    ) -> Result<Answered, Box<Reply>> {
        let options = &self.http.chain.options;
        let limits = Limits::new(target.forward, options, &head.headers, self.ctx.grpc);
        let hashed = hash::of(&target.forward.hash, head, self.ctx.remote, || fastrand::u64(..));
        if let Some(said) = passed.exchange {
            peer_metadata::to_server(said, &self.http.conn, target.cluster, head);
        }
        self.rewrite(head, target, limits)?;
        self.ctx.sent_upstream(head);
        let keeps_head = asks_for_request(target.found);
        let kept = keeps_head.then(|| Box::new(copy_of(head)));
        let body = if upgrade { upstream::Body::empty() } else { body };
        mirror::send(self.http, target.view, target.forward, head, &body);
        tell_length(head, &body, target.cluster);
        let client = if upgrade { head.extensions.remove::<OnUpgrade>() } else { None };
        let call = Call {
            retry: target.forward.retry.as_ref(),
            timeout: limits.response,
            hash: hashed.hash,
            downstream_version: head.version,
            alpn: passed.alpn,
            upgrade,
            original_dst: self.http.conn.original_dst,
            scheme: head.scheme.clone(),
            client: Some((self.http.conn.peer, self.http.conn.destination)),
            ..Call::new(target.cluster)
        };
        let request = options.request_timeout.filter(|_| self.ctx.request_unfinished());
        let expiry = Expiry::new(Life { stream: limits.stream, request, idle: limits.idle }, self.ctx.start);
        let (answer, expiry) = self.send(call, head, body, expiry).await?;
        let after = After { passed, kept: kept.as_deref(), cookie: hashed.set_cookie, idle: limits.idle };
        let mut answered = self.answered(answer, target.found, after, client, upgrade)?;
        answered.expiry = expiry;
        Ok(answered)
    }

    /// The upstream's response as ours.
    fn answered(
        &mut self,
        answer: upstream::Answer,
        found: &Found<'_>,
        after: After<'_>,
        client: Option<OnUpgrade>,
        upgrade: bool,
    ) -> Result<Answered, Box<Reply>> {
        let mut response = answer.head;
        if upgrade && response.status == StatusCode::OK {
            return Err(Box::new(Reply {
                close: true,
                plain: true,
                ..Reply::new(200, "websocket_handshake_unsuccessful", "")
            }));
        }
        headers::on_response(&mut response.headers, response.status);
        let upgraded = response.status == StatusCode::SWITCHING_PROTOCOLS;
        if upgrade && !upgraded {
            response.headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if !self.http.chain.options.suppress_envoy_headers && !upgraded {
            response.headers.insert(headers::SERVICE_TIME, self.service_time());
        }
        if let Some(said) = after.passed.exchange {
            peer_metadata::from_server(said, self.http, &mut response.headers, self.ctx);
        }
        if let Some((cors, origin)) = after.passed.cors {
            super::cors::on_response(cors, origin, &mut response.headers);
        }
        self.response_ops(found, &mut response, after.kept);
        if let Some(cookie) = after.cookie {
            response.headers.append(SET_COOKIE, cookie);
        }
        let switch = match (upgraded, client, answer.upgrade) {
            (true, Some(client), Some(upstream)) => Some((client, upstream, after.idle)),
            (true, ..) => {
                let kind = Kind::UpstreamProtocol;
                return Err(Box::new(Reply::of_upstream(kind, kind.row().details, false, false)));
            }
            _ => None,
        };
        Ok(Answered { head: response, body: answer.body, expiry: None, switch })
    }

    /// Everything that changes between our filters and the wire.
    fn rewrite(&self, head: &mut Head, target: Target<'_>, limits: Limits) -> Result<(), Box<Reply>> {
        let options = &self.http.chain.options;
        let (found, forward) = (target.found, target.forward);
        if let Some(limit) = limits.response {
            let per_try = forward.retry.as_ref().and_then(|retry| retry.per_try_timeout).filter(|t| !t.is_zero());
            let expected = per_try.map_or(limit, |per_try| per_try.min(limit));
            let millis = u64::try_from(expected.as_millis()).unwrap_or(u64::MAX);
            head.headers.insert(headers::EXPECTED_TIMEOUT, HeaderValue::from(millis));
        }
        if found.vhost.include_attempt_count {
            head.headers.insert(headers::ATTEMPT_COUNT, HeaderValue::from_static("1"));
        }
        let matched = found.route.matched(head.path.as_str()).map_or(0, str::len);
        ops::on_request(&found.route.request_headers, head, self.facts(None));
        if let Some(weighted) = found.weighted {
            ops::on_request(&weighted.request_headers, head, self.facts(None));
        }
        let tell = !options.suppress_envoy_headers;
        match (found.weighted.and_then(|w| w.host_rewrite.as_ref()), &forward.host_rewrite) {
            (Some(host), _) | (None, Some(HostRewrite::Literal(host))) => {
                ops::rewrite_host(head, host, forward.append_x_forwarded_host, tell);
            }
            (None, Some(HostRewrite::Auto)) => {
                return Err(Box::new(filters::unsupported(self.http, "automatic host rewrite")));
            }
            (None, None) => {}
        }
        ops::rewrite_path(head, &forward.rewrite, matched, tell);
        Ok(())
    }

    async fn send(
        &mut self,
        call: Call<'_>,
        head: &mut Head,
        body: upstream::Body,
        mut expiry: Option<Box<Expiry>>,
    ) -> Result<(upstream::Answer, Option<Box<Expiry>>), Box<Reply>> {
        let parts = parts_of(head);
        let call = Call { host: Some(without_port(head.authority())), ..call };
        let sent = match &mut expiry {
            None => upstream::send(&call, parts, body, &mut self.ctx.trace).await,
            Some(expiry) => {
                let progress = self.ctx.progress.clone();
                let mut send = Box::pin(upstream::send(&call, parts, body, &mut self.ctx.trace));
                poll_fn(|cx| {
                    if let Poll::Ready(sent) = send.as_mut().poll(cx) {
                        return Poll::Ready(sent);
                    }
                    expiry.poll(cx, progress.as_deref()).map(Err)
                })
                .await
            }
        };
        match sent {
            Ok(answer) => {
                self.ctx.details = Cow::Borrowed("via_upstream");
                Ok((answer, expiry))
            }
            Err(error) => Err(Box::new(self.failure(&error))),
        }
    }

    fn failure(&self, error: &Error) -> Reply {
        if self.ctx.progress.as_ref().is_some_and(|progress| progress.failed()) {
            // The upstream is not to blame for a body that broke on the client's side.
            return Reply::of_malformed(Malformed::Codec);
        }
        tracing::debug!(cluster = self.ctx.cluster_name(), %error, "upstream request failed");
        let retried = self.ctx.trace.attempts > 1;
        let suppress = self.http.chain.options.suppress_envoy_headers;
        let mut reply = Reply::of_upstream(error.kind, error.details(), retried, suppress);
        match error.kind {
            Kind::MaxStreamDuration => reply.grpc = Some(DEADLINE_EXCEEDED),
            Kind::StreamIdle if !self.ctx.request_unfinished() => reply.status = 504,
            _ => {}
        }
        reply
    }

    /// Time that the upstream took, milliseconds.
    fn service_time(&self) -> HeaderValue {
        let trace = &self.ctx.trace;
        let took = trace.first_byte.zip(trace.ready).map(|(end, start)| end.saturating_duration_since(start));
        HeaderValue::from(u64::try_from(took.unwrap_or_default().as_millis()).unwrap_or(u64::MAX))
    }

    fn response_ops(&self, found: &Found<'_>, response: &mut http::response::Parts, kept: Option<&Head>) {
        let facts = self.facts(kept);
        if let Some(weighted) = found.weighted {
            ops::on_response(&weighted.response_headers, &mut response.headers, response.status, facts);
        }
        ops::on_response(&found.route.response_headers, &mut response.headers, response.status, facts);
    }

    fn facts<'h>(&'h self, request: Option<&'h Head>) -> Facts<'h> {
        Facts {
            conn: &self.http.conn,
            local_uris: &self.http.local_uris,
            remote: self.ctx.remote,
            request,
            response: None,
            route: self.ctx.route.as_deref().unwrap_or_default(),
            cluster: self.ctx.cluster_name(),
            host: self.ctx.trace.host.as_ref().map(|host| host.address),
        }
    }
}

/// gRPC's status for a stream that lived too long.
const DEADLINE_EXCEEDED: u32 = 4;

fn normalise(head: &mut Head, http: &HttpConn) -> Result<(), Box<Reply>> {
    let refused = || Reply::new(400, "path_normalization_failed", "");
    match http.chain.options.normalise(&head.path) {
        Outcome::Same => Ok(()),
        Outcome::Changed(path) => {
            head.path = path;
            Ok(())
        }
        Outcome::Refused => Err(Box::new(Reply { close: true, ..refused() })),
        Outcome::Redirect(path) => {
            let location = HeaderValue::from_str(path.as_str()).expect("a path is visible ASCII");
            Err(Box::new(Reply { status: 307, headers: vec![(LOCATION, location)], plain: true, ..refused() }))
        }
    }
}

/// An HTTP/1 application is told that a request has no body, unless its method says so, and that it has one of unknown
/// length, if its method says otherwise. (The codec does it for the usual methods, and would leave out that body.)
fn tell_length(head: &mut Head, body: &upstream::Body, cluster: &ClusterLocal) {
    let to_http2 = match cluster.shared.config.http.protocol {
        UpstreamProtocol::Http1 => false,
        UpstreamProtocol::Http2 => true,
        UpstreamProtocol::Downstream => head.version == Version::HTTP_2,
    };
    let is_bodiless = matches!(head.method, Method::GET | Method::HEAD | Method::DELETE | Method::TRACE);
    let has_body = !http_body::Body::is_end_stream(body);
    if !to_http2 && !is_bodiless && !has_body {
        head.headers.entry(CONTENT_LENGTH).or_insert(HeaderValue::from_static("0"));
    }
    if !to_http2 && is_bodiless && has_body && http_body::Body::size_hint(body).exact().is_none() {
        head.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
}

fn without_port(host: &str) -> &str {
    match host.rfind(':') {
        Some(at) if !host[at..].contains(']') => &host[..at],
        _ => host,
    }
}

/// Whether header changes of the response ask for the request.
fn asks_for_request(found: &Found<'_>) -> bool {
    let weighted = found.weighted.iter().flat_map(|w| &w.response_headers.set);
    found.route.response_headers.set.iter().chain(weighted).any(|set| vars::asks_for_request(&set.value))
}

/// A copy for later, without extensions: those belong to the request on the wire.
pub(super) fn copy_of(head: &Head) -> Head {
    Head {
        method: head.method.clone(),
        version: head.version,
        scheme: head.scheme.clone(),
        authority: head.authority.clone(),
        path: head.path.clone(),
        headers: head.headers.clone(),
        extensions: http::Extensions::new(),
    }
}

/// The head for the upstream, which takes the headers: origin form with a `host` header, which it turns into what its version needs.
pub(super) fn parts_of(head: &mut Head) -> http::request::Parts {
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = head.method.clone();
    parts.uri = head.path.clone().into();
    parts.headers = std::mem::take(&mut head.headers);
    parts.headers.insert(HOST, head.authority.clone());
    parts.extensions = std::mem::take(&mut head.extensions);
    parts
}
