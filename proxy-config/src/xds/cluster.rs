//! Clusters.

use std::collections::HashMap;
use std::mem::take;
use std::net::IpAddr;

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    self as pb, ClusterDiscoveryType, CommonLbConfig, DiscoveryType, LbConfig, LbPolicy as PbLb,
    common_lb_config::LocalityConfigSpecifier,
};
use envoy_types::pb::envoy::config::cluster::v3::{
    CircuitBreakers as PbBreakers, Cluster as Pb, Filter, OutlierDetection as PbOutlier, UpstreamConnectionOptions,
};
use envoy_types::pb::envoy::config::core::v3::{BindConfig, Metadata};
use envoy_types::pb::google::protobuf::Any;
use serde_json::Value;

use super::context::{At, Fault, Read, Reader, each, type_name};
use super::messages::TypedStruct;
use super::{cluster_http, endpoint, network_filter, tls, value};
use crate::model::{
    Address, CircuitBreakers, Cluster, ClusterKind, DnsOptions, IstioClusterMetadata, LbPolicy, MetadataExchange, Name,
    OutlierDetection, Severity, TcpKeepalive, TransportMatch,
};

/// `envoy.config.cluster.v3.Cluster`.
pub(super) fn cluster(mut of: Pb, reader: &mut Reader) -> Read<Cluster> {
    let name = Name::from(take(&mut of.name));
    let mut common = of.common_lb_config.take().unwrap_or_default();
    let close =
        take(&mut of.close_connections_on_host_health_failure) | take(&mut common.close_connections_on_host_set_change);
    let kind = kind(&mut of, &name, reader)?;
    let is_dns = matches!(kind, ClusterKind::StrictDns(_) | ClusterKind::LogicalDns(_));
    let (lb, upstream_port_override) = lb(&mut of, &mut common, reader)?;
    let mut out = Cluster {
        name,
        kind,
        lb,
        connect_timeout: value::duration(&mut of.connect_timeout),
        limits: of.circuit_breakers.take().map(|b| breakers(b, reader)).unwrap_or_default(),
        outlier: of.outlier_detection.take().map(|o| outlier(o, reader)),
        healthy_panic_threshold: common.healthy_panic_threshold.take().map(|p| p.value),
        locality_weighted: locality_weighted(&mut common, reader),
        http: Default::default(),
        transport_matches: each("transport_socket_matches", take(&mut of.transport_socket_matches), |m| {
            transport_match(m, reader)
        })?,
        transport: tls::upstream(of.transport_socket.take(), reader).at("transport_socket")?,
        source_address: of.upstream_bind_config.take().map(|b| source(b, reader)).transpose()?.flatten(),
        tcp_keepalive: of.upstream_connection_options.take().and_then(|o| keepalive(o, reader)),
        upstream_port_override,
        istio: of.metadata.take().map(|m| metadata(m, reader)).unwrap_or_default(),
        metadata_exchange: None,
        dns: is_dns.then(|| dns(&mut of, reader)),
        close_on_host_failure: close,
        alt_stat_name: take(&mut of.alt_stat_name),
        tcp_idle_timeout: None,
        unsupported: Vec::new(),
    };
    reader.done(&common);
    filters(take(&mut of.filters), &mut out, reader)?;
    protocol_options(take(&mut of.typed_extension_protocol_options), &mut out, reader)?;
    reader.done(&of);
    Ok(out)
}

fn kind(of: &mut Pb, name: &Name, reader: &mut Reader) -> Read<ClusterKind> {
    let kind = match of.cluster_discovery_type.take() {
        None => DiscoveryType::Static,
        Some(ClusterDiscoveryType::Type(kind)) => {
            DiscoveryType::try_from(kind).map_err(|_| Fault::new("unknown type"))?
        }
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            let any = custom.typed_config.unwrap_or_default();
            if type_name(&any.type_url) == "envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig" {
                reader.note("cluster_type", "dynamic forward proxies are not supported", Severity::Error);
                return Ok(ClusterKind::DynamicForwardProxy);
            }
            return Err(Fault::new(format!("cluster_type {} is not supported", custom.name)));
        }
    };
    let mut inline = || {
        let assignment = of.load_assignment.take().unwrap_or_default();
        endpoint::endpoints(assignment, reader).at("load_assignment")
    };
    Ok(match kind {
        DiscoveryType::Static => ClusterKind::Static(inline()?),
        DiscoveryType::StrictDns => ClusterKind::StrictDns(inline()?),
        DiscoveryType::LogicalDns => ClusterKind::LogicalDns(inline()?),
        DiscoveryType::OriginalDst => ClusterKind::OriginalDst,
        DiscoveryType::Eds => {
            let mut eds = of.eds_cluster_config.take().unwrap_or_default();
            let service = value::text(&mut eds.service_name).map_or_else(|| Name::clone(name), Name::from);
            reader.done(&eds);
            ClusterKind::Eds(service)
        }
    })
}

/// The balancer, and the port that replaces the original destination's.
fn lb(of: &mut Pb, common: &mut CommonLbConfig, reader: &mut Reader) -> Read<(LbPolicy, Option<u16>)> {
    if of.load_balancing_policy.is_some() {
        return Err(Fault::new("load_balancing_policy is not supported"));
    }
    let config = of.lb_config.take();
    let policy = PbLb::try_from(take(&mut of.lb_policy)).map_err(|_| Fault::new("unknown lb_policy"))?;
    let lb = match (policy, config) {
        (PbLb::RoundRobin, Some(LbConfig::RoundRobinLbConfig(c))) => {
            LbPolicy::RoundRobin { slow_start: c.slow_start_config.and_then(|s| slow_start(s, reader)) }
        }
        (PbLb::RoundRobin, None) => LbPolicy::RoundRobin { slow_start: None },
        (PbLb::LeastRequest, Some(LbConfig::LeastRequestLbConfig(mut c))) => {
            let slow_start = c.slow_start_config.take().and_then(|s| slow_start(s, reader));
            let choice_count = value::number(&mut c.choice_count);
            reader.done(&c);
            LbPolicy::LeastRequest { slow_start, choice_count }
        }
        (PbLb::LeastRequest, None) => LbPolicy::LeastRequest { slow_start: None, choice_count: None },
        (PbLb::Random, None) => LbPolicy::Random,
        (PbLb::RingHash, config) => ring_hash(config, common, reader)?,
        (PbLb::Maglev, Some(LbConfig::MaglevLbConfig(mut c))) => {
            LbPolicy::Maglev { table_size: c.table_size.take().map(|v| v.value) }
        }
        (PbLb::Maglev, None) => LbPolicy::Maglev { table_size: None },
        (PbLb::ClusterProvided, None) => LbPolicy::ClusterProvided,
        (PbLb::ClusterProvided, Some(LbConfig::OriginalDstLbConfig(mut c))) => {
            let port = value::number(&mut c.upstream_port_override).map(value::port).transpose();
            reader.done(&c);
            return Ok((LbPolicy::ClusterProvided, port.at("original_dst_lb_config.upstream_port_override")?));
        }
        (PbLb::LoadBalancingPolicyConfig, _) => return Err(Fault::new("no load_balancing_policy")),
        (_, Some(_)) => return Err(Fault::new("lb_config does not fit lb_policy")),
    };
    Ok((lb, None))
}

fn ring_hash(config: Option<LbConfig>, common: &mut CommonLbConfig, reader: &mut Reader) -> Read<LbPolicy> {
    let mut ring = match config {
        None => pb::RingHashLbConfig::default(),
        Some(LbConfig::RingHashLbConfig(ring)) => ring,
        Some(_) => return Err(Fault::new("lb_config does not fit lb_policy")),
    };
    let mut hashing = common.consistent_hashing_lb_config.take().unwrap_or_default();
    let use_hostname = take(&mut hashing.use_hostname_for_hashing);
    reader.done(&hashing);
    let size = |field: &mut Option<envoy_types::pb::google::protobuf::UInt64Value>| field.take().map(|v| v.value);
    let (minimum, maximum) = (size(&mut ring.minimum_ring_size), size(&mut ring.maximum_ring_size));
    reader.done(&ring);
    Ok(LbPolicy::RingHash { minimum, maximum, use_hostname })
}

fn slow_start(mut of: pb::SlowStartConfig, reader: &mut Reader) -> Option<std::time::Duration> {
    let window = value::duration(&mut of.slow_start_window);
    reader.done(&of);
    window
}

fn locality_weighted(of: &mut CommonLbConfig, reader: &mut Reader) -> bool {
    match of.locality_config_specifier.take() {
        Some(LocalityConfigSpecifier::LocalityWeightedLbConfig(_)) => true,
        Some(LocalityConfigSpecifier::ZoneAwareLbConfig(_)) => {
            reader.unread.insert("CommonLbConfig.zone_aware_lb_config".to_owned());
            false
        }
        None => false,
    }
}

/// Thresholds of the default priority; no route asks for the other one.
fn breakers(mut of: PbBreakers, reader: &mut Reader) -> CircuitBreakers {
    let defaults = CircuitBreakers::default();
    let mut out = defaults;
    for mut t in take(&mut of.thresholds) {
        if t.priority != 0 {
            reader.unread.insert("CircuitBreakers.thresholds of another priority".to_owned());
            continue;
        }
        out = CircuitBreakers {
            max_connections: value::number(&mut t.max_connections).unwrap_or(defaults.max_connections),
            max_pending_requests: value::number(&mut t.max_pending_requests).unwrap_or(defaults.max_pending_requests),
            max_requests: value::number(&mut t.max_requests).unwrap_or(defaults.max_requests),
            max_retries: value::number(&mut t.max_retries).unwrap_or(defaults.max_retries),
            retry_budget: retry_budget(&mut t, reader),
        };
        reader.done(&t);
    }
    reader.done(&of);
    out
}

/// Envoy's budget is 20 % and three retries at least where it says nothing else.
fn retry_budget(of: &mut Thresholds, reader: &mut Reader) -> Option<(f64, u32)> {
    let mut budget = of.retry_budget.take()?;
    let percent = budget.budget_percent.take().map_or(20.0, |p| p.value);
    let least = value::number(&mut budget.min_retry_concurrency).unwrap_or(3);
    reader.done(&budget);
    Some((percent, least))
}

fn outlier(mut of: PbOutlier, reader: &mut Reader) -> OutlierDetection {
    let out = OutlierDetection {
        consecutive_5xx: value::number(&mut of.consecutive_5xx),
        consecutive_gateway_failure: value::number(&mut of.consecutive_gateway_failure),
        consecutive_local_origin_failure: value::number(&mut of.consecutive_local_origin_failure),
        interval: value::duration(&mut of.interval),
        base_ejection_time: value::duration(&mut of.base_ejection_time),
        max_ejection_time: value::duration(&mut of.max_ejection_time),
        max_ejection_percent: value::number(&mut of.max_ejection_percent),
        enforcing_consecutive_5xx: value::number(&mut of.enforcing_consecutive_5xx),
        enforcing_consecutive_gateway_failure: value::number(&mut of.enforcing_consecutive_gateway_failure),
        enforcing_consecutive_local_origin_failure: value::number(&mut of.enforcing_consecutive_local_origin_failure),
        enforcing_success_rate: value::number(&mut of.enforcing_success_rate),
        split_external_local_origin_errors: take(&mut of.split_external_local_origin_errors),
        error_statuses: Vec::new(),
    };
    reader.done(&of);
    out
}

fn transport_match(of: pb::TransportSocketMatch, reader: &mut Reader) -> Read<TransportMatch> {
    let Value::Object(fields) = value::json(of.r#match.unwrap_or_default()) else {
        return Err(Fault::new("no match"));
    };
    Ok(TransportMatch {
        name: of.name,
        labels: endpoint::labels(fields).into(),
        transport: tls::upstream(of.transport_socket, reader).at("transport_socket")?,
    })
}

fn source(mut of: BindConfig, reader: &mut Reader) -> Read<Option<IpAddr>> {
    let address = of.source_address.take().map(|a| value::socket(a, reader)).transpose();
    reader.done(&of);
    match address.at("upstream_bind_config.source_address")? {
        None => Ok(None),
        Some(Address::Socket(socket)) => Ok(Some(socket.ip())),
        Some(_) => Err(Fault::new("an IP address is expected")).at("upstream_bind_config.source_address"),
    }
}

fn keepalive(mut of: UpstreamConnectionOptions, reader: &mut Reader) -> Option<TcpKeepalive> {
    let keepalive = of.tcp_keepalive.take().map(|k| TcpKeepalive {
        probes: k.keepalive_probes.map(|v| v.value),
        time: k.keepalive_time.map(|v| v.value),
        interval: k.keepalive_interval.map(|v| v.value),
    });
    reader.done(&of);
    keepalive
}

fn metadata(mut of: Metadata, reader: &mut Reader) -> IstioClusterMetadata {
    let mut out = IstioClusterMetadata::default();
    for (namespace, fields) in take(&mut of.filter_metadata) {
        if namespace != "istio" {
            reader.unread.insert(format!("Metadata.{namespace}"));
            continue;
        }
        let fields = value::json(fields);
        for (key, value) in fields.as_object().into_iter().flatten() {
            let text = value.as_str().map(str::to_owned);
            match key.as_str() {
                "config" => out.config = text,
                "subset" => out.subset = text,
                "external" => out.external = value.as_bool() == Some(true),
                "disable_mx" => out.disable_mx = value.as_bool() == Some(true),
                "alpn_override" => out.no_alpn_override = text.as_deref() == Some("false"),
                "services" => out.services = value.as_array().into_iter().flatten().map(service).collect(),
                _ => {
                    reader.unread.insert(format!("Metadata.istio.{key}"));
                }
            }
        }
    }
    reader.done(&of);
    out
}

fn service(of: &Value) -> (String, String, String) {
    let text = |key: &str| of.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    (text("host"), text("name"), text("namespace"))
}

#[expect(deprecated, reason = "istiod sends the fields that a resolver's own configuration replaces")]
fn dns(of: &mut Pb, reader: &mut Reader) -> DnsOptions {
    let out = DnsOptions {
        family: of.dns_lookup_family().as_str_name().to_owned(),
        refresh_rate: value::duration(&mut of.dns_refresh_rate),
        respect_ttl: take(&mut of.respect_dns_ttl),
        failure_refresh: of.dns_failure_refresh_rate.take().and_then(|mut r| {
            let base = value::duration(&mut r.base_interval)?;
            // Ten times the base is Envoy's maximum when none is said.
            let maximum = value::duration(&mut r.max_interval).unwrap_or(base * 10);
            reader.done(&r);
            Some((base, maximum))
        }),
        jitter: value::duration(&mut of.dns_jitter),
    };
    take(&mut of.dns_lookup_family);
    out
}

fn filters(of: Vec<Filter>, out: &mut Cluster, reader: &mut Reader) -> Read<()> {
    for mut filter in of {
        let name = take(&mut filter.name);
        let exchange = filter.typed_config.take().map(|any| exchange(&any, reader)).transpose();
        reader.done(&filter);
        match exchange.at(&format!("filters[{name}]"))?.flatten() {
            Some(said) => out.metadata_exchange = Some(said),
            None => {
                reader.note(&format!("filters[{name}]"), "this upstream filter is not supported", Severity::Error);
                out.unsupported.push(name);
            }
        }
    }
    Ok(())
}

/// A metadata exchange; `None` is another filter.
fn exchange(any: &Any, reader: &mut Reader) -> Read<Option<MetadataExchange>> {
    if !matches!(type_name(&any.type_url), "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct") {
        return Ok(None);
    }
    let wrapped: TypedStruct = reader.unpack(any)?;
    if type_name(&wrapped.type_url) != "envoy.tcp.metadataexchange.config.MetadataExchange" {
        return Ok(None);
    }
    Ok(Some(network_filter::exchange_json(&value::json(wrapped.value.unwrap_or_default()), reader)))
}

fn protocol_options(of: HashMap<String, Any>, out: &mut Cluster, reader: &mut Reader) -> Read<()> {
    for (name, any) in of {
        let path = format!("typed_extension_protocol_options[{name}]");
        match type_name(&any.type_url) {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions" => {
                let options = reader.unpack(&any).at(&path)?;
                cluster_http::options(options, out, reader).at(&path)?;
            }
            "envoy.extensions.upstreams.tcp.v3.TcpProtocolOptions" => {
                let mut options: envoy_types::pb::envoy::extensions::upstreams::tcp::v3::TcpProtocolOptions =
                    reader.unpack(&any).at(&path)?;
                out.tcp_idle_timeout = value::duration(&mut options.idle_timeout);
            }
            other => {
                reader.unread.insert(format!("Cluster.typed_extension_protocol_options {other}"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::r#type::v3::Percent;
    use envoy_types::pb::google::protobuf::UInt32Value;

    use super::*;

    fn read(of: Pb) -> (Read<Cluster>, Reader) {
        let mut reader = Reader::default();
        (cluster(of, &mut reader), reader)
    }

    #[test]
    fn defaults_are_envoys() {
        let (read, reader) = read(Pb { name: "c".to_owned(), ..Default::default() });
        let read = read.expect("valid");
        assert_eq!(read.lb, LbPolicy::RoundRobin { slow_start: None });
        assert!(matches!(read.kind, ClusterKind::Static(_)));
        assert_eq!((read.limits, read.connect_timeout), (CircuitBreakers::default(), None));
        assert_eq!(reader.unread.len(), 0);
    }

    #[test]
    fn limits_of_other_priorities_are_not_the_defaults() {
        let threshold = |priority, n| Thresholds {
            priority,
            max_connections: Some(UInt32Value { value: n }),
            ..Default::default()
        };
        let breakers = PbBreakers { thresholds: vec![threshold(0, 7), threshold(1, 9)], ..Default::default() };
        let (read, reader) = read(Pb { circuit_breakers: Some(breakers), ..Default::default() });
        let limits = read.expect("valid").limits;
        assert_eq!((limits.max_connections, limits.max_pending_requests), (7, 1024));
        assert_eq!(reader.unread.len(), 1);
    }

    #[test]
    fn eds_names_default_to_the_cluster() {
        let of = |service: &str| Pb {
            name: "c".to_owned(),
            cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)),
            eds_cluster_config: Some(pb::EdsClusterConfig { service_name: service.to_owned(), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(read(of("")).0.expect("valid").kind, ClusterKind::Eds(Name::from("c")));
        assert_eq!(read(of("s")).0.expect("valid").kind, ClusterKind::Eds(Name::from("s")));
    }

    #[test]
    fn panic_threshold_zero_is_said() {
        let common = CommonLbConfig { healthy_panic_threshold: Some(Percent { value: 0.0 }), ..Default::default() };
        let (cluster, _) = read(Pb { common_lb_config: Some(common), ..Default::default() });
        assert_eq!(cluster.expect("valid").healthy_panic_threshold, Some(0.0));
        assert_eq!(read(Pb::default()).0.expect("valid").healthy_panic_threshold, None);
    }

    #[test]
    fn balancers_that_we_do_not_know_are_refused() {
        for of in [
            Pb { load_balancing_policy: Some(Default::default()), ..Default::default() },
            Pb { lb_policy: 99, ..Default::default() },
            Pb { lb_config: Some(LbConfig::MaglevLbConfig(Default::default())), ..Default::default() },
        ] {
            assert!(read(of).0.is_err());
        }
    }
}
