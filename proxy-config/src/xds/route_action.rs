//! What routes do: forward, redirect, answer. An action that asks for more than we do is unsupported as a whole.

use std::mem::take;

use envoy_types::pb::envoy::config::core::v3::data_source;
use envoy_types::pb::envoy::config::route::v3::redirect_action::{
    PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier,
};
use envoy_types::pb::envoy::config::route::v3::retry_policy::{RetryPriority, retry_priority};
use envoy_types::pb::envoy::config::route::v3::route_action::{
    self as action, ClusterNotFoundResponseCode, ClusterSpecifier, HostRewriteSpecifier, hash_policy::PolicySpecifier,
};
use envoy_types::pb::envoy::config::route::v3::{self as pb, weighted_cluster};
use envoy_types::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;

use super::context::{At, Fault, Read, Reader, each, type_name};
use super::{matcher, route, value};
use crate::model::{
    Forward, HashKind, HashPolicy, HostRewrite, Mirror, Name, Redirect, RetryPolicy, RouteAction, WeightedCluster,
};

/// Retries when a policy does not say how many.
const DEFAULT_RETRIES: u32 = 1;

/// `RouteAction`.
pub(super) fn forward(mut of: pb::RouteAction, reader: &mut Reader) -> Read<RouteAction> {
    let clusters = match clusters(&mut of, reader)? {
        Ok(clusters) => clusters,
        Err(what) => return Ok(RouteAction::Unsupported(what)),
    };
    let host_rewrite = match host_rewrite(&mut of) {
        Ok(rewrite) => rewrite,
        Err(what) => return Ok(RouteAction::Unsupported(what.to_owned())),
    };
    let limits = of.max_stream_duration.take();
    let mut out = Forward {
        clusters,
        host_rewrite,
        timeout: value::duration(&mut of.timeout),
        idle_timeout: value::duration(&mut of.idle_timeout),
        max_grpc_timeout: max_grpc_timeout(&mut of),
        retry: of.retry_policy.take().map(|p| retry(p, reader)).transpose().at("retry_policy")?,
        prefix_rewrite: value::text(&mut of.prefix_rewrite),
        regex_rewrite: of.regex_rewrite.take().map(|r| {
            let pattern = r.pattern.map(|p| matcher::regex(p, reader)).unwrap_or_default();
            (pattern, r.substitution)
        }),
        append_x_forwarded_host: take(&mut of.append_x_forwarded_host),
        mirrors: each("request_mirror_policies", take(&mut of.request_mirror_policies), |m| mirror(m, reader))?,
        cluster_not_found_status: not_found_status(&mut of)?,
        upgrades: take(&mut of.upgrade_configs).into_iter().map(|u| upgrade(u, reader)).collect(),
        ..Forward::default()
    };
    if let Some(mut limits) = limits {
        out.max_stream_duration = value::duration(&mut limits.max_stream_duration);
        out.grpc_timeout_header_max = value::duration(&mut limits.grpc_timeout_header_max);
        reader.done(&limits);
    }
    for policy in take(&mut of.hash_policy) {
        match hash_policy(policy, reader) {
            Ok(policy) => out.hash_policy.push(policy),
            Err(what) => return Ok(RouteAction::Unsupported(what.to_owned())),
        }
    }
    Ok(match reader.unknown(&of) {
        Some(fields) => RouteAction::Unsupported(fields),
        None => RouteAction::Forward(Box::new(out)),
    })
}

#[expect(deprecated, reason = "istiod sends it beside max_stream_duration")]
fn max_grpc_timeout(of: &mut pb::RouteAction) -> Option<std::time::Duration> {
    value::duration(&mut of.max_grpc_timeout)
}

fn clusters(of: &mut pb::RouteAction, reader: &mut Reader) -> Read<Result<Vec<WeightedCluster>, String>> {
    match of.cluster_specifier.take().ok_or_else(|| Fault::new("no cluster"))? {
        ClusterSpecifier::Cluster(name) => {
            Ok(Ok(vec![WeightedCluster { name: Name::from(name), weight: 1, ..WeightedCluster::default() }]))
        }
        ClusterSpecifier::WeightedClusters(mut list) => {
            let clusters = take(&mut list.clusters).into_iter().map(|c| weighted(c, reader)).collect();
            reader.done(&list);
            Ok(Ok(clusters))
        }
        ClusterSpecifier::ClusterHeader(_) => Ok(Err("cluster_header".to_owned())),
        ClusterSpecifier::ClusterSpecifierPlugin(_) | ClusterSpecifier::InlineClusterSpecifierPlugin(_) => {
            Ok(Err("cluster_specifier_plugin".to_owned()))
        }
    }
}

fn weighted(mut of: weighted_cluster::ClusterWeight, reader: &mut Reader) -> WeightedCluster {
    let out = WeightedCluster {
        name: Name::from(take(&mut of.name)),
        weight: value::number(&mut of.weight).unwrap_or(0),
        request_headers: route::headers(&mut of.request_headers_to_add, &mut of.request_headers_to_remove, reader),
        response_headers: route::headers(&mut of.response_headers_to_add, &mut of.response_headers_to_remove, reader),
        host_rewrite: of.host_rewrite_specifier.take().map(|rewrite| {
            let weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral(host) = rewrite;
            host
        }),
    };
    reader.done(&of);
    out
}

fn host_rewrite(of: &mut pb::RouteAction) -> Result<Option<HostRewrite>, &'static str> {
    Ok(match of.host_rewrite_specifier.take() {
        None => None,
        Some(HostRewriteSpecifier::HostRewriteLiteral(host)) => Some(HostRewrite::Literal(host)),
        Some(HostRewriteSpecifier::AutoHostRewrite(auto)) => auto.value.then_some(HostRewrite::Auto),
        Some(HostRewriteSpecifier::HostRewriteHeader(_)) => return Err("host_rewrite_header"),
        Some(HostRewriteSpecifier::HostRewritePathRegex(_)) => return Err("host_rewrite_path_regex"),
        Some(HostRewriteSpecifier::HostRewrite(_)) => return Err("host_rewrite"),
    })
}

fn not_found_status(of: &mut pb::RouteAction) -> Read<Option<u16>> {
    match ClusterNotFoundResponseCode::try_from(take(&mut of.cluster_not_found_response_code)) {
        Ok(ClusterNotFoundResponseCode::ServiceUnavailable) => Ok(None),
        Ok(ClusterNotFoundResponseCode::NotFound) => Ok(Some(404)),
        Ok(ClusterNotFoundResponseCode::InternalServerError) => Ok(Some(500)),
        Err(_) => Err(Fault::new("unknown cluster_not_found_response_code")),
    }
}

fn upgrade(mut of: action::UpgradeConfig, reader: &mut Reader) -> (String, bool) {
    let out = (take(&mut of.upgrade_type).to_ascii_lowercase(), value::flag(&mut of.enabled).unwrap_or(true));
    // That CONNECT is terminated follows from its being allowed.
    let connect = of.connect_config.take().unwrap_or_default();
    reader.done(&connect);
    reader.done(&of);
    out
}

fn mirror(mut of: action::RequestMirrorPolicy, reader: &mut Reader) -> Read<Mirror> {
    if !of.cluster_header.is_empty() {
        return Err(Fault::new("cluster_header is not supported"));
    }
    let out = Mirror {
        cluster: Name::from(take(&mut of.cluster)),
        millionths: value::fraction(&mut of.runtime_fraction, reader).unwrap_or(1_000_000),
        shadow_suffix: !take(&mut of.disable_shadow_host_suffix_append),
    };
    reader.done(&of);
    Ok(out)
}

fn hash_policy(of: action::HashPolicy, reader: &mut Reader) -> Result<HashPolicy, &'static str> {
    let kind = match of.policy_specifier {
        Some(PolicySpecifier::Header(mut header)) => {
            let name = take(&mut header.header_name).to_ascii_lowercase();
            reader.done(&header);
            HashKind::Header(name)
        }
        Some(PolicySpecifier::Cookie(mut cookie)) => {
            let ttl = value::duration(&mut cookie.ttl);
            let kind = HashKind::Cookie { name: take(&mut cookie.name), path: take(&mut cookie.path), ttl };
            reader.done(&cookie);
            kind
        }
        Some(PolicySpecifier::ConnectionProperties(properties)) if properties.source_ip => HashKind::SourceIp,
        Some(PolicySpecifier::QueryParameter(parameter)) => HashKind::Query(parameter.name),
        Some(PolicySpecifier::ConnectionProperties(_) | PolicySpecifier::FilterState(_)) | None => {
            return Err("this hash policy");
        }
    };
    Ok(HashPolicy { kind, terminal: of.terminal })
}

fn retry(mut of: pb::RetryPolicy, reader: &mut Reader) -> Read<RetryPolicy> {
    let mut backoff = of.retry_back_off.take().unwrap_or_default();
    let hosts = take(&mut of.retry_host_predicate);
    let (previous, others): (Vec<_>, Vec<_>) = hosts.into_iter().partition(|p| p.name.ends_with("previous_hosts"));
    reader.unread.extend(others.into_iter().map(|p| format!("RetryPolicy.retry_host_predicate {}", p.name)));
    let words = take(&mut of.retry_on);
    let out = RetryPolicy {
        retry_on: words.split(',').map(str::trim).filter(|w| !w.is_empty()).map(str::to_owned).collect(),
        num_retries: value::number(&mut of.num_retries).unwrap_or(DEFAULT_RETRIES),
        per_try_timeout: value::duration(&mut of.per_try_timeout),
        per_try_idle_timeout: value::duration(&mut of.per_try_idle_timeout),
        retriable_status_codes: each("retriable_status_codes", take(&mut of.retriable_status_codes), |code| {
            u16::try_from(code).map_err(|_| Fault::new(format!("{code} is no status")))
        })?,
        avoid_previous_hosts: !previous.is_empty(),
        host_selection_attempts: u32::try_from(take(&mut of.host_selection_retry_max_attempts)).unwrap_or(0),
        previous_priorities: of
            .retry_priority
            .take()
            .map(|p| priorities(p, reader))
            .transpose()
            .at("retry_priority")?,
        backoff_base: value::duration(&mut backoff.base_interval),
        backoff_max: value::duration(&mut backoff.max_interval),
    };
    reader.done(&of);
    Ok(out)
}

fn priorities(of: RetryPriority, reader: &mut Reader) -> Read<u32> {
    let Some(retry_priority::ConfigType::TypedConfig(any)) = of.config_type else {
        return Err(Fault::new("no typed_config"));
    };
    let previous = "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig";
    if type_name(&any.type_url) != previous {
        return Err(Fault::new(format!("{} is not supported", any.type_url)));
    }
    let config: PreviousPrioritiesConfig = reader.unpack(&any)?;
    u32::try_from(config.update_frequency).map_err(|_| Fault::new("negative update_frequency"))
}

/// `RedirectAction`.
pub(super) fn redirect(mut of: pb::RedirectAction, reader: &mut Reader) -> Read<RouteAction> {
    let status = match RedirectResponseCode::try_from(take(&mut of.response_code)) {
        Ok(RedirectResponseCode::MovedPermanently) => 301,
        Ok(RedirectResponseCode::Found) => 302,
        Ok(RedirectResponseCode::SeeOther) => 303,
        Ok(RedirectResponseCode::TemporaryRedirect) => 307,
        Ok(RedirectResponseCode::PermanentRedirect) => 308,
        Err(_) => return Err(Fault::new("unknown response_code")),
    };
    let mut out = Redirect {
        status,
        host: value::text(&mut of.host_redirect),
        port: Some(value::port(take(&mut of.port_redirect)).at("port_redirect")?).filter(|p| *p != 0),
        strip_query: take(&mut of.strip_query),
        ..Redirect::default()
    };
    match of.path_rewrite_specifier.take() {
        None => {}
        Some(PathRewriteSpecifier::PathRedirect(mut path)) => out.path = value::text(&mut path),
        Some(PathRewriteSpecifier::PrefixRewrite(mut prefix)) => out.prefix = value::text(&mut prefix),
        Some(_) => return Ok(RouteAction::Unsupported("this path rewrite of a redirect".to_owned())),
    }
    match of.scheme_rewrite_specifier.take() {
        None => {}
        Some(SchemeRewriteSpecifier::HttpsRedirect(https)) => out.https = https,
        Some(SchemeRewriteSpecifier::SchemeRedirect(mut scheme)) => out.scheme = value::text(&mut scheme),
    }
    reader.done(&of);
    Ok(RouteAction::Redirect(out))
}

/// `DirectResponseAction`.
pub(super) fn direct(mut of: pb::DirectResponseAction, reader: &mut Reader) -> Read<RouteAction> {
    let status = take(&mut of.status);
    let status = u16::try_from(status).map_err(|_| Fault::new(format!("{status} is no status"))).at("status")?;
    let body = match of.body.take().and_then(|b| b.specifier) {
        None => Vec::new(),
        Some(data_source::Specifier::InlineBytes(bytes)) => bytes,
        Some(data_source::Specifier::InlineString(text)) => text.into_bytes(),
        Some(_) => return Ok(RouteAction::Unsupported("direct response body from outside".to_owned())),
    };
    reader.done(&of);
    Ok(RouteAction::Direct { status, body })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use envoy_types::pb::google::protobuf as wkt;

    use super::*;

    fn to(cluster: ClusterSpecifier) -> pb::RouteAction {
        pb::RouteAction { cluster_specifier: Some(cluster), ..Default::default() }
    }

    #[test]
    fn actions_that_ask_for_more_are_unsupported() {
        let cluster = || ClusterSpecifier::Cluster("c".to_owned());
        let header = HostRewriteSpecifier::HostRewriteHeader("x".to_owned());
        for (message, what) in [
            (to(ClusterSpecifier::ClusterHeader("x".to_owned())), "cluster_header"),
            (pb::RouteAction { host_rewrite_specifier: Some(header), ..to(cluster()) }, "host_rewrite_header"),
            (pb::RouteAction { hedge_policy: Some(Default::default()), ..to(cluster()) }, "hedge_policy"),
        ] {
            let read = forward(message, &mut Reader::default());
            assert_eq!(read, Ok(RouteAction::Unsupported(what.to_owned())));
        }
        assert!(forward(pb::RouteAction::default(), &mut Reader::default()).is_err());
    }

    #[test]
    fn timeouts_keep_unset_and_zero_apart() {
        let action = pb::RouteAction {
            timeout: Some(wkt::Duration::default()),
            ..to(ClusterSpecifier::Cluster("c".to_owned()))
        };
        let Ok(RouteAction::Forward(forward)) = forward(action, &mut Reader::default()) else { panic!("forward") };
        assert_eq!((forward.timeout, forward.idle_timeout), (Some(Duration::ZERO), None));
    }

    #[test]
    fn retries_are_read() {
        let policy = pb::RetryPolicy {
            retry_on: "5xx, reset".to_owned(),
            retriable_status_codes: vec![503],
            retry_host_predicate: vec![pb::retry_policy::RetryHostPredicate {
                name: "envoy.retry_host_predicates.previous_hosts".to_owned(),
                config_type: None,
            }],
            ..Default::default()
        };
        let read = retry(policy, &mut Reader::default()).expect("valid");
        assert_eq!((read.retry_on, read.num_retries), (vec!["5xx".to_owned(), "reset".to_owned()], 1));
        assert!(read.avoid_previous_hosts);
        assert!(
            retry(
                pb::RetryPolicy { retriable_status_codes: vec![70_000], ..Default::default() },
                &mut Reader::default()
            )
            .is_err()
        );
    }

    #[test]
    fn redirects_say_nothing_with_empty_text() {
        let message = pb::RedirectAction {
            path_rewrite_specifier: Some(PathRewriteSpecifier::PathRedirect(String::new())),
            response_code: RedirectResponseCode::SeeOther as i32,
            ..Default::default()
        };
        let expected = Redirect { status: 303, ..Redirect::default() };
        assert_eq!(redirect(message, &mut Reader::default()), Ok(RouteAction::Redirect(expected)));
    }

    #[test]
    fn a_hash_policy_is_one_of_four() {
        let of = |specifier| {
            hash_policy(action::HashPolicy { policy_specifier: specifier, terminal: true }, &mut Reader::default())
        };
        let header = action::hash_policy::Header { header_name: "X-U".to_owned(), ..Default::default() };
        let expected = HashPolicy { kind: HashKind::Header("x-u".to_owned()), terminal: true };
        assert_eq!(of(Some(PolicySpecifier::Header(header))), Ok(expected));
        assert!(of(None).is_err());
        assert!(of(Some(PolicySpecifier::FilterState(Default::default()))).is_err());
    }
}
