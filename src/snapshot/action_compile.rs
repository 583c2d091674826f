//! Actions of routes from what was said, with Envoy's defaults filled in.

use std::time::Duration;

use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use proxy_config::{model, re2};

use super::StringMatch;
use super::action::{
    Action, Cors, Forward, HashPolicy, HashSource, HeaderOps, HeaderSet, HostRewrite, Redirect, RetryOn, RetryPolicy,
    Rewrite, Target, WeightedCluster,
};
use super::cluster::Ids;
use super::compile::Sink;
use crate::telemetry::Format;

/// Route timeout.
const TIMEOUT: Duration = Duration::from_secs(15);
/// First back-off of retries; the longest is ten times that.
const BACKOFF: Duration = Duration::from_millis(25);
/// Status when the cluster is not there.
const CLUSTER_NOT_FOUND: u16 = 503;

/// Compiles an action. The error says what is not done: the route answers 501.
pub(super) fn action(said: &model::RouteAction, ids: &Ids<'_>, sink: &mut Sink<'_>) -> Result<Action, String> {
    Ok(match said {
        model::RouteAction::Forward(said) => Action::Forward(Box::new(forward(said, ids, sink)?)),
        model::RouteAction::Redirect(said) => Action::Redirect(Redirect { said: said.clone() }),
        model::RouteAction::Direct { status, body } => {
            Action::Direct { status: *status, body: Bytes::copy_from_slice(body) }
        }
        model::RouteAction::Unsupported(name) => return Err(format!("{name} is not supported")),
    })
}

fn forward(said: &model::Forward, ids: &Ids<'_>, sink: &mut Sink<'_>) -> Result<Forward, String> {
    if said.retry.as_ref().and_then(|retry| retry.per_try_idle_timeout).is_some_and(|limit| !limit.is_zero()) {
        return Err("retry_policy.per_try_idle_timeout is not supported".to_owned());
    }
    // What the connection manager does not offer is refused before there is a route.
    if let Some((name, _)) = said.upgrades.iter().find(|(name, on)| *on && !name.eq_ignore_ascii_case("websocket")) {
        return Err(format!("upgrade_configs: the upgrade to {name} is not supported"));
    }
    Ok(Forward {
        clusters: clusters(&said.clusters, ids, sink)?,
        timeout: off(said.timeout.unwrap_or(TIMEOUT)),
        idle_timeout: said.idle_timeout.map(off),
        max_grpc_timeout: said.max_grpc_timeout,
        max_stream_duration: said.max_stream_duration.map(off),
        grpc_timeout_header_max: said.grpc_timeout_header_max,
        retry: said.retry.as_ref().map(|policy| retry(policy, sink)),
        rewrite: rewrite(said)?,
        host_rewrite: said.host_rewrite.as_ref().map(host_rewrite).transpose()?,
        append_x_forwarded_host: said.append_x_forwarded_host,
        mirrors: said.mirrors.iter().map(|mirror| (ids.refer(&mirror.cluster), mirror.clone())).collect(),
        hash: said.hash_policy.iter().map(hash_policy).collect::<Result<_, _>>()?,
        cluster_not_found_status: said.cluster_not_found_status.unwrap_or(CLUSTER_NOT_FOUND),
        upgrades: said.upgrades.iter().map(|(name, on)| (name.to_ascii_lowercase().into(), *on)).collect(),
    })
}

/// Zero switches a limit off.
pub(super) fn off(limit: Duration) -> Option<Duration> {
    (!limit.is_zero()).then_some(limit)
}

fn clusters(
    said: &[model::WeightedCluster],
    ids: &Ids<'_>,
    sink: &mut Sink<'_>,
) -> Result<Box<[WeightedCluster]>, String> {
    let mut sum = 0_u64;
    let mut all = Vec::with_capacity(said.len());
    for cluster in said {
        sum += u64::from(cluster.weight);
        all.push(WeightedCluster {
            cluster: ids.refer(&cluster.name),
            weight: cluster.weight,
            sum,
            request_headers: header_ops(&cluster.request_headers, "cluster.request_headers", sink),
            response_headers: header_ops(&cluster.response_headers, "cluster.response_headers", sink),
            host_rewrite: cluster.host_rewrite.as_deref().map(host).transpose()?,
        });
    }
    if all.is_empty() || (all.len() > 1 && sum == 0) {
        return Err("no cluster has any weight".to_owned());
    }
    Ok(all.into())
}

fn retry(said: &model::RetryPolicy, sink: &mut Sink<'_>) -> RetryPolicy {
    let mut on = RetryOn::default();
    for word in &said.retry_on {
        match RetryOn::word(word) {
            Some(condition) => on = on.and(condition),
            None => sink.warn("retry_policy.retry_on", format!("{word:?} means nothing here")),
        }
    }
    let base = said.backoff_base.unwrap_or(BACKOFF);
    RetryPolicy {
        on,
        retries: said.num_retries,
        per_try_timeout: said.per_try_timeout.and_then(off),
        statuses: said.retriable_status_codes.as_slice().into(),
        avoid_previous_hosts: said.avoid_previous_hosts,
        host_selection_attempts: said.host_selection_attempts,
        previous_priorities: said.previous_priorities,
        backoff_base: base,
        backoff_max: said.backoff_max.unwrap_or(base * 10).max(base),
    }
}

fn rewrite(said: &model::Forward) -> Result<Rewrite, String> {
    if let Some((expression, substitution)) = &said.regex_rewrite {
        return Ok(Rewrite::Regex(Box::new(re2::search(expression)?), re2::substitution(substitution)?.into()));
    }
    Ok(said.prefix_rewrite.as_deref().map_or(Rewrite::None, |prefix| Rewrite::Prefix(prefix.into())))
}

fn host_rewrite(said: &model::HostRewrite) -> Result<HostRewrite, String> {
    Ok(match said {
        model::HostRewrite::Literal(text) => HostRewrite::Literal(host(text)?),
        model::HostRewrite::Auto => HostRewrite::Auto,
    })
}

fn host(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text).map_err(|_| format!("{text:?} cannot be a host"))
}

fn hash_policy(said: &model::HashPolicy) -> Result<HashPolicy, String> {
    let source = match &said.kind {
        model::HashKind::Header(name) => HashSource::Header(
            HeaderName::from_bytes(name.as_bytes()).map_err(|_| format!("{name:?} cannot be a header name"))?,
        ),
        model::HashKind::Cookie { name, path, ttl } => {
            HashSource::Cookie { name: name.as_str().into(), path: path.as_str().into(), ttl: *ttl }
        }
        model::HashKind::SourceIp => HashSource::SourceIp,
        model::HashKind::Query(name) => HashSource::Query(name.as_str().into()),
    };
    Ok(HashPolicy { source, terminal: said.terminal })
}

/// Compiles header changes; one that cannot be made is left out.
pub(super) fn header_ops(said: &model::HeaderOps, field: &str, sink: &mut Sink<'_>) -> HeaderOps {
    let mut set = Vec::with_capacity(said.set.len());
    for one in &said.set {
        let Some(name) = target(&one.name) else {
            sink.error(field, format!("{:?} cannot be a header name", one.name));
            continue;
        };
        if Format::has_stray_percent(&one.value) {
            sink.warn(field, format!("{}: a lone % in {:?} is taken literally", one.name, one.value));
        }
        let value = Format::compile(&one.value);
        if let ([super::Segment::Literal(_)], None) = (value.segments(), value.constant()) {
            sink.error(field, format!("{}: {:?} cannot be a header value", one.name, one.value));
            continue;
        }
        set.push(HeaderSet { name, value, action: one.action });
    }
    let mut remove = Vec::with_capacity(said.remove.len());
    for name in &said.remove {
        match HeaderName::from_bytes(name.as_bytes()) {
            Ok(name) => remove.push(name),
            Err(_) => sink.error(field, format!("{name:?} cannot be removed")),
        }
    }
    HeaderOps { set: set.into(), remove: remove.into() }
}

fn target(name: &str) -> Option<Target> {
    match name.to_ascii_lowercase().as_str() {
        ":authority" | "host" => Some(Target::Authority),
        ":path" => Some(Target::Path),
        ":method" => Some(Target::Method),
        ":scheme" => Some(Target::Scheme),
        other => HeaderName::from_bytes(other.as_bytes()).ok().map(Target::Header),
    }
}

/// Compiles CORS; without it preflights go to the upstream, which decides.
pub(super) fn cors(said: &model::CorsPolicy, sink: &mut Sink<'_>) -> Option<Cors> {
    let origins: Result<_, _> = said.allow_origins.iter().map(StringMatch::compile).collect();
    let origins = origins.map_err(|why| sink.error("cors.allow_origins", why)).ok()?;
    let mut value = |field: &str, text: &str| {
        if text.is_empty() {
            return None;
        }
        HeaderValue::from_str(text).map_err(|_| sink.error(field, format!("{text:?} cannot be a header value"))).ok()
    };
    Some(Cors {
        origins,
        allow_methods: value("cors.allow_methods", &said.allow_methods),
        allow_headers: value("cors.allow_headers", &said.allow_headers),
        expose_headers: value("cors.expose_headers", &said.expose_headers),
        max_age: value("cors.max_age", &said.max_age),
        allow_credentials: said.allow_credentials.unwrap_or(false),
        forward_not_matching_preflights: said.forward_not_matching_preflights.unwrap_or(true),
    })
}
