//! One request: tries until an answer or the end.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use http::header::{CONTENT_LENGTH, HOST, HeaderValue, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery};
use http::{Request, StatusCode, Uri, Version};
use hyper::body::Incoming;
use proxy_config::model::UpstreamProtocol;
use tokio::time::Instant;

use super::answer::{Answer, AnswerBody, Hold, Timer};
use super::body::{Body, Repeat};
use super::breaker::{Active, Permit};
use super::judge::{self, Facts, Judgement, Outcome};
use super::lease::Lease;
use super::pool::{Key, Refusal};
use super::retry::Retries;
use super::view::Picked;
use super::{Call, Trace, failure, idle};
use crate::error::{Error, Flags, Kind, Limit};

/// Everything that lasts longer than one try.
pub(super) struct Exchange<'a> {
    call: &'a Call<'a>,
    parts: http::request::Parts,
    body: Repeat,
    retries: Retries<'a>,
    /// Held from the decision to retry until the next try is judged.
    retry_permit: Option<Permit>,
    /// The next try wants a connection that cannot be stale.
    fresh: bool,
    /// The silent repeat has been used.
    repeated: bool,
    /// The route's limit, for telling the upstream.
    told: Timer,
    request: Option<Arc<super::Progress>>,
}

/// A try that ended.
enum Tried {
    Answered(http::Response<Incoming>, Box<Hold>),
    Failed(Failed),
}

impl Tried {
    /// Makes room for the next try. A response that has no body leaves its connection usable, any other closes it.
    fn discard(self) {
        if let Self::Answered(response, hold) = self
            && http_body::Body::is_end_stream(response.body())
        {
            hold.finish();
        }
    }
}

struct Failed {
    error: Error,
    reused: bool,
    unsent: bool,
    answered: bool,
}

impl Failed {
    /// It ended before anything was written.
    fn before(error: Error) -> Tried {
        Tried::Failed(Self { error, reused: false, unsent: true, answered: false })
    }
}

/// See [`super::send`].
pub(super) async fn send(
    call: &Call<'_>,
    parts: http::request::Parts,
    body: Body,
    trace: &mut Trace,
) -> Result<Answer, Error> {
    let request = body.progress().cloned();
    let mut timer = Timer::new(call.timeout, request.clone());
    let can_retry = call.retry.is_some_and(|policy| policy.retries > 0) && !call.upgrade;
    let mut whole = Exchange {
        call,
        parts,
        body: body.for_tries(can_retry.then_some(call.replay_limit)),
        retries: Retries::new(call.retry.filter(|_| !call.upgrade)),
        retry_permit: None,
        fresh: false,
        repeated: false,
        told: timer.snapshot(),
        request,
    };
    let started = Instant::now();
    let result = tokio::select! {
        biased;
        result = whole.run(trace) => Some(result),
        () = timer.over() => None,
    };
    let result = result.unwrap_or_else(|| Err(timed_out(call, trace)));
    count(call, &result, trace, started);
    result.map(|(response, hold)| answer(call, response, *hold, timer))
}

type Reply = (http::Response<Incoming>, Box<Hold>);

/// Counts the request as a whole.
fn count(call: &Call<'_>, result: &Result<Reply, Error>, trace: &Trace, started: Instant) {
    let metrics = &call.cluster.metrics;
    let status = match result {
        Ok((response, _)) => response.status().as_u16(),
        Err(error) => error.kind.row().status,
    };
    metrics.count_status(status);
    if trace.attempts > 1 && status < 500 {
        metrics.rq_retry_success.inc();
    }
    match result {
        Ok(_) => metrics.rq_time.record(u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX)),
        Err(error) => match error.kind {
            Kind::ResponseTimeout => metrics.rq_timeout.inc(),
            Kind::NoHealthyHost => metrics.cx_none_healthy.inc(),
            Kind::UpstreamProtocol => metrics.cx_protocol_error.inc(),
            _ => {}
        },
    }
}

fn timed_out(call: &Call<'_>, trace: &mut Trace) -> Error {
    let error = Error::upstream(Kind::ResponseTimeout);
    trace.flags.insert(Flags::UT);
    // Only a host that had the request and did not answer is to blame.
    if let (Some(host), Some(_), None) = (&trace.host, trace.ready, trace.first_byte) {
        call.cluster.record(&host.stats, super::outlier::Signal::Timeout);
        host.stats.totals.errors.fetch_add(1, Relaxed);
    }
    error
}

fn answer(call: &Call<'_>, mut response: http::Response<Incoming>, hold: Hold, timer: Timer) -> Answer {
    let switched = call.upgrade && response.status() == StatusCode::SWITCHING_PROTOCOLS;
    let upgrade = switched.then(|| hyper::upgrade::on(&mut response));
    let (head, incoming) = response.into_parts();
    let body = if switched { AnswerBody::upgraded(incoming, hold) } else { AnswerBody::new(incoming, hold, timer) };
    Answer { head, body, upgrade }
}

impl Exchange<'_> {
    async fn run(&mut self, trace: &mut Trace) -> Result<Reply, Error> {
        trace.attempts = 1;
        loop {
            let tried = self.one(trace).await;
            let judgement = self.judge(&tried);
            // Whatever the retry before it held is free, for it has been judged.
            self.retry_permit = None;
            self.settle(&judgement, trace);
            if judgement.repeat && !self.repeated && self.body.is_left() {
                self.repeated = true;
                self.fresh = true;
                continue;
            }
            if judgement.retry && self.may_retry(trace) {
                tried.discard();
                tokio::time::sleep(self.retries.pause(self.call.cluster.draw())).await;
                trace.attempts += 1;
                self.recount(trace.attempts);
                self.tell_timeout();
                continue;
            }
            return match tried {
                Tried::Answered(response, hold) => Ok((response, hold)),
                Tried::Failed(failed) => {
                    trace.flags.insert(judgement.flags);
                    Err(failed.error)
                }
            };
        }
    }

    fn judge(&self, tried: &Tried) -> Judgement {
        let facts = match tried {
            Tried::Answered(response, _) => Facts {
                outcome: Outcome::Head(response.status().as_u16(), response.headers()),
                method: &self.parts.method,
                reused: false,
                unsent: false,
                answered: true,
            },
            Tried::Failed(failed) => Facts {
                outcome: Outcome::Failed(failed.error.kind, failed.error.source),
                method: &self.parts.method,
                reused: failed.reused,
                unsent: failed.unsent,
                answered: failed.answered,
            },
        };
        judge::judge(&facts, self.call.retry.filter(|_| !self.call.upgrade))
    }

    /// The host's account. A stale connection says nothing about the host.
    fn settle(&self, judgement: &Judgement, trace: &Trace) {
        let Some(host) = &trace.host else { return };
        if let Some(signal) = judgement.signal.filter(|_| !judgement.repeat) {
            self.call.cluster.record(&host.stats, signal);
        }
        let metrics = &self.call.cluster.metrics;
        match judgement.why {
            Some(Kind::PerTryTimeout) => metrics.rq_per_try_timeout.inc(),
            Some(Kind::UpstreamReset | Kind::UpstreamRefused) => metrics.rq_rx_reset.inc(),
            _ => {}
        }
        if judgement.error {
            host.stats.totals.errors.fetch_add(1, Relaxed);
        }
    }

    /// Whether the retry that the policy wants can be had: one is left, the body is there, the breaker allows.
    fn may_retry(&mut self, trace: &mut Trace) -> bool {
        if !self.retries.take() {
            trace.flags.insert(Flags::URX);
            self.call.cluster.metrics.rq_retry_limit_exceeded.inc();
            return false;
        }
        if !self.body.is_left() {
            return false;
        }
        let shared = &self.call.cluster.shared;
        match Permit::retry(&shared.breakers, &shared.config.limits) {
            Ok(permit) => {
                self.call.cluster.metrics.rq_retry.inc();
                self.retry_permit = Some(permit);
                true
            }
            Err(_) => {
                self.call.cluster.metrics.rq_retry_overflow.inc();
                trace.flags.insert(Flags::UO);
                false
            }
        }
    }

    /// The headers that count tries, where the first try had them.
    fn recount(&mut self, attempts: u32) {
        if let Some(count) = self.parts.headers.get_mut("x-envoy-attempt-count") {
            *count = attempts.into();
        }
    }

    async fn one(&mut self, trace: &mut Trace) -> Tried {
        trace.started = Some(Instant::now());
        trace.ready = None;
        trace.first_byte = None;
        let wish = self.retries.wish(self.call.hash);
        let Some(picked) = self.call.cluster.pick(wish, self.call.original_dst) else {
            return Failed::before(Error::local(Kind::NoHealthyHost));
        };
        if let Some(at) = picked.at {
            self.retries.tries(at, picked.host.priority);
        }
        trace.host = Some(Arc::clone(&picked.host));
        let key = self.key(&picked);
        if key.h2 && self.call.upgrade {
            let why = "upgrades towards an HTTP/2 upstream (extended CONNECT) are not supported";
            return Failed::before(Error::local(Kind::UnsupportedConfig).because(why));
        }
        let pool = picked.pools.pool(&key);
        let lease = match pool.checkout(std::mem::take(&mut self.fresh)).await {
            Ok(lease) => lease,
            Err(Refusal::Overflow(error)) => return Failed::before(error),
            Err(Refusal::Failed(failure)) => {
                trace.transport_failure = Some((*failure.text).to_owned());
                return Failed::before(failure.error());
            }
        };
        trace.ready = Some(Instant::now());
        trace.upstream_local = lease.line.local;
        trace.peer.clone_from(&lease.line.peer);
        let permit = match Permit::take(&self.call.cluster.shared.breakers, Limit::Requests) {
            Ok(permit) => permit,
            Err(error) => return Failed::before(error),
        };
        self.exchange(trace, lease, permit).await
    }

    fn key(&self, picked: &Picked) -> Key {
        let place = &picked.pools.place;
        let config = &place.config;
        let h2 = match config.http.protocol {
            UpstreamProtocol::Http1 => false,
            UpstreamProtocol::Http2 => true,
            UpstreamProtocol::Downstream => self.call.downstream_version == Version::HTTP_2,
        };
        let tls = place.sni(None).is_some();
        let automatic = tls && place.sni(Some("?")) == Some("?");
        Key {
            h2,
            http10: tls
                && self.call.downstream_version == Version::HTTP_10
                && config.http.protocol == UpstreamProtocol::Downstream,
            alpn: self.call.alpn.filter(|_| tls && !config.istio.no_alpn_override).cloned(),
            sni: self.call.host.filter(|_| automatic).map(Into::into),
            client: self.call.client.filter(|_| place.speaks_proxy_protocol()),
        }
    }

    async fn exchange(&mut self, trace: &mut Trace, mut lease: Lease, permit: Permit) -> Tried {
        let reused = lease.reused;
        let read_before = lease.line.read.load(Relaxed);
        let written_before = lease.line.written.load(Relaxed);
        let Some(body) = self.body.next() else {
            return Failed::before(Error::local(Kind::Internal));
        };
        // Over HTTP/1 trailers end here, whichever side speaks it.
        let trailers = lease.is_h2() && self.call.downstream_version == Version::HTTP_2;
        let request = match self.head(lease.is_h2()) {
            Ok(head) => Request::from_parts(head, body.with_trailers(trailers)),
            Err(error) => return Failed::before(error),
        };
        let active = Active::enter(&lease.pool.place.host.stats, &self.call.cluster.metrics);
        let mut limit = Timer::new(self.call.retry.and_then(|p| p.per_try_timeout), self.request.clone());
        let sent = tokio::select! {
            biased;
            sent = lease.send(request) => Some(sent),
            () = limit.over() => None,
        };
        match sent {
            Some(Ok(response)) if !lease.is_h2() && !is_sound(&response) => {
                let error = Error::upstream(Kind::UpstreamProtocol);
                Tried::Failed(Failed { error, reused, unsent: false, answered: true })
            }
            Some(Ok(response)) => {
                trace.first_byte = Some(Instant::now());
                note_keep_alive(&lease, &response);
                let hold = Hold { lease, request: self.request.clone(), _active: active, _permit: permit };
                Tried::Answered(response, Box::new(hold))
            }
            Some(Err((error, unsent))) => {
                // HTTP/2 shares its connection: bytes of others say nothing there.
                let alone = !lease.is_h2();
                let answered = alone && lease.line.read.load(Relaxed) != read_before;
                let written = !alone || lease.line.written.load(Relaxed) != written_before;
                let client_failed = self.request.as_ref().is_some_and(|request| request.failed());
                let is_unsent = unsent.is_some() || !written;
                if let Some(unsent) = unsent {
                    // A connection that takes no requests takes none later either.
                    lease.line.closing.store(true, Relaxed);
                    self.body.give_back(unsent.into_body());
                }
                let error = failure::classify(error, client_failed, answered);
                Tried::Failed(Failed { error, reused, unsent: is_unsent, answered })
            }
            None => Tried::Failed(Failed {
                error: Error::upstream(Kind::PerTryTimeout),
                reused,
                unsent: false,
                answered: false,
            }),
        }
    }

    /// The head for one try, in the words of the connection's version.
    fn head(&mut self, h2: bool) -> Result<http::request::Parts, Error> {
        // Copied for each try: hyper takes it. The last try could have it whole, if it were known to be the last.
        let mut head = self.parts.clone();
        let path = head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        if !h2 {
            head.version = Version::HTTP_11;
            if let Some(authority) = head.uri.authority().filter(|_| !head.headers.contains_key(HOST)) {
                let host = HeaderValue::try_from(authority.as_str()).map_err(|_| Error::local(Kind::Internal))?;
                head.headers.insert(HOST, host);
            }
            if head.uri.authority().is_some() && head.method != http::Method::CONNECT {
                head.uri = Uri::from(path);
            }
            return Ok(head);
        }
        head.version = Version::HTTP_2;
        let host = head.headers.remove(HOST);
        let authority = match (host, head.uri.authority()) {
            (Some(host), _) => Authority::try_from(host.as_bytes())
                .map_err(|e| Error::downstream(Kind::DownstreamProtocol).because(e))?,
            (None, Some(authority)) => authority.clone(),
            (None, None) => return Err(Error::downstream(Kind::DownstreamProtocol)),
        };
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(self.call.scheme.clone());
        uri.authority = Some(authority);
        uri.path_and_query = Some(path);
        head.uri = Uri::from_parts(uri).map_err(|e| Error::local(Kind::Internal).because(e))?;
        Ok(head)
    }

    /// `x-envoy-expected-rq-timeout-ms` of a later try: the limit of a try or what is left, whichever is less.
    fn tell_timeout(&mut self) {
        const EXPECTED: &str = "x-envoy-expected-rq-timeout-ms";
        let per_try = self.call.retry.and_then(|p| p.per_try_timeout);
        let Some(limit) = [per_try, self.told.left()].into_iter().flatten().min() else { return };
        if let Some(expected) = self.parts.headers.get_mut(EXPECTED) {
            *expected = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).into();
        }
    }
}

/// Whether the codec and everybody after it agree where the response ends (RFC 9112 §6.3): two ways to tell its length, or a
/// length where there can be no body, are how a response is smuggled.
fn is_sound(response: &http::Response<Incoming>) -> bool {
    let headers = response.headers();
    let Some(length) = headers.get(CONTENT_LENGTH) else { return true };
    !headers.contains_key(TRANSFER_ENCODING) && (response.status() != StatusCode::NO_CONTENT || length == "0")
}

/// A peer may say how long it keeps an idle connection.
fn note_keep_alive(lease: &Lease, response: &http::Response<Incoming>) {
    if lease.is_h2() {
        return;
    }
    if let Some(millis) = response.headers().get("keep-alive").and_then(|v| idle::announced(v.to_str().ok()?)) {
        lease.line.keep_alive.store(millis, Relaxed);
    }
}
