//! Network filters, by the type of their configuration.

use std::mem::take;

use envoy_types::pb::envoy::config::listener::v3::{Filter, filter};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy as Pb, tcp_proxy};
use envoy_types::pb::envoy::r#type::v3::hash_policy;
use envoy_types::pb::google::protobuf::Any;
use serde_json::Value;

use super::context::{At, Fault, Read, Reader, type_name};
use super::messages::TypedStruct;
use super::{Extensions, access_log, http, http_filter, messages, rbac, value};
use crate::model::{IstioStats, MetadataExchange, Name, NetworkFilter, Severity, TcpProxy, WeightedName};

/// Filters that only count what passes.
const INERT: [&str; 2] = [
    "envoy.extensions.filters.network.mongo_proxy.v3.MongoProxy",
    "envoy.extensions.filters.network.mysql_proxy.v3.MySQLProxy",
];

/// Reads a filter. A fault in a connection manager or TCP proxy is the listener's, any other one refuses what
/// passes the filter.
pub(super) fn filter(of: Filter, extensions: &Extensions, reader: &mut Reader) -> Read<NetworkFilter> {
    let name = of.name;
    let any = match of.config_type {
        Some(filter::ConfigType::TypedConfig(any)) => any,
        Some(filter::ConfigType::ConfigDiscovery(_)) => {
            return Ok(refused(&name, "", Fault::new("extension discovery is not supported"), reader));
        }
        None => return Ok(refused(&name, "", Fault::new("no configuration"), reader)),
    };
    match type_name(&any.type_url) {
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager" => {
            let manager = reader.unpack(&any).and_then(|m| http::manager(m, extensions, reader));
            Ok(NetworkFilter::Http(Box::new(manager.at("typed_config")?)))
        }
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy" => {
            let proxy = reader.unpack(&any).and_then(|m| tcp_proxy(m, reader));
            Ok(NetworkFilter::TcpProxy(proxy.at("typed_config")?))
        }
        _ => Ok(other(&name, &any, reader).unwrap_or_else(|fault| refused(&name, &any.type_url, fault, reader))),
    }
}

fn other(name: &str, any: &Any, reader: &mut Reader) -> Read<NetworkFilter> {
    Ok(match type_name(&any.type_url) {
        "udpa.type.v1.TypedStruct" | "xds.type.v3.TypedStruct" => untyped(name, reader.unpack(any)?, reader),
        "envoy.extensions.filters.network.rbac.v3.RBAC" => {
            NetworkFilter::Rbac(rbac::network(reader.unpack(any)?, reader)?)
        }
        "envoy.tcp.metadataexchange.config.MetadataExchange" => {
            NetworkFilter::MetadataExchange(exchange(reader.unpack(any)?, reader))
        }
        "stats.PluginConfig" => NetworkFilter::IstioStats(http_filter::stats(reader.unpack(any)?)),
        known if INERT.contains(&known) => {
            reader.inert.insert(format!("network filter {name}"));
            NetworkFilter::Inert { name: name.to_owned(), type_url: any.type_url.clone() }
        }
        _ => refused(name, &any.type_url, Fault::new("this filter is not supported"), reader),
    })
}

fn untyped(name: &str, of: TypedStruct, reader: &mut Reader) -> NetworkFilter {
    let config = value::json(of.value.unwrap_or_default());
    match type_name(&of.type_url) {
        "envoy.tcp.metadataexchange.config.MetadataExchange" => {
            NetworkFilter::MetadataExchange(exchange_json(&config, reader))
        }
        "stats.PluginConfig" => NetworkFilter::IstioStats(IstioStats { config }),
        _ => refused(name, &of.type_url, Fault::new("this filter is not supported"), reader),
    }
}

fn exchange(mut of: messages::MetadataExchange, reader: &mut Reader) -> MetadataExchange {
    let out = MetadataExchange {
        protocol: take(&mut of.protocol),
        enable_discovery: take(&mut of.enable_discovery),
        additional_labels: take(&mut of.additional_labels),
    };
    reader.done(&of);
    out
}

/// A metadata exchange from its JSON.
pub(super) fn exchange_json(config: &Value, reader: &mut Reader) -> MetadataExchange {
    let fields = config.as_object().into_iter().flatten().map(|(name, _)| name.as_str());
    let unread = fields.filter(|f| !matches!(*f, "protocol" | "enable_discovery" | "additional_labels"));
    reader.unread.extend(unread.map(|field| format!("MetadataExchange.{field}")));
    let labels = config["additional_labels"].as_array().into_iter().flatten();
    MetadataExchange {
        protocol: config["protocol"].as_str().unwrap_or_default().to_owned(),
        enable_discovery: config["enable_discovery"] == true,
        additional_labels: labels.filter_map(|label| label.as_str().map(str::to_owned)).collect(),
    }
}

fn refused(name: &str, type_url: &str, fault: Fault, reader: &mut Reader) -> NetworkFilter {
    // Somebody's code may keep people out.
    let guards = |name: &&str| name.split('.').any(|part| matches!(part, "rbac" | "ext_authz" | "wasm"));
    let security = [name, type_name(type_url)].iter().any(guards);
    let severity = if security { Severity::Security } else { Severity::Error };
    let reject = fault.into_reject(String::new());
    reader.note(&format!("filters[{name}]{}", reject.field), reject.reason, severity);
    NetworkFilter::Unsupported { name: name.to_owned(), type_url: type_url.to_owned() }
}

fn tcp_proxy(mut of: Pb, reader: &mut Reader) -> Read<TcpProxy> {
    let hashes: Vec<_> = take(&mut of.hash_policy).into_iter().filter_map(|p| p.policy_specifier).collect();
    if hashes.iter().any(|h| !matches!(h, hash_policy::PolicySpecifier::SourceIp(_))) {
        return Err(Fault::new("only source_ip is supported")).at("hash_policy");
    }
    let out = TcpProxy {
        stat_prefix: take(&mut of.stat_prefix),
        clusters: clusters(of.cluster_specifier.take(), reader)?,
        idle_timeout: value::duration(&mut of.idle_timeout),
        max_downstream_connection_duration: value::duration(&mut of.max_downstream_connection_duration),
        hash_source_ip: !hashes.is_empty(),
        tunneling: of.tunneling_config.take().map(|mut t| {
            let out = (take(&mut t.hostname), take(&mut t.use_post));
            reader.done(&t);
            out
        }),
        access_log: access_log::logs(take(&mut of.access_log), reader),
    };
    reader.done(&of);
    Ok(out)
}

fn clusters(of: Option<tcp_proxy::ClusterSpecifier>, reader: &mut Reader) -> Read<Vec<WeightedName>> {
    match of.ok_or_else(|| Fault::new("no cluster"))? {
        tcp_proxy::ClusterSpecifier::Cluster(name) => Ok(vec![WeightedName { cluster: Name::from(name), weight: 1 }]),
        tcp_proxy::ClusterSpecifier::WeightedClusters(list) => {
            let one = |mut c: tcp_proxy::weighted_cluster::ClusterWeight| {
                let out = WeightedName { cluster: Name::from(take(&mut c.name)), weight: take(&mut c.weight) };
                reader.done(&c);
                out
            };
            Ok(list.clusters.into_iter().map(one).collect())
        }
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac;
    use envoy_types::util::pack_any;

    use super::*;

    fn read(name: &str, any: Any, reader: &mut Reader) -> Read<NetworkFilter> {
        let config_type = Some(filter::ConfigType::TypedConfig(any));
        filter(Filter { name: name.to_owned(), config_type }, &Extensions::new(), reader)
    }

    #[test]
    fn a_proxy_needs_a_cluster() {
        let mut reader = Reader::default();
        assert!(read("tcp", pack_any(Pb::default()), &mut reader).is_err());
        let specifier = tcp_proxy::ClusterSpecifier::Cluster("c".to_owned());
        let message = Pb { cluster_specifier: Some(specifier), ..Default::default() };
        let Ok(NetworkFilter::TcpProxy(proxy)) = read("tcp", pack_any(message), &mut reader) else { panic!("proxy") };
        assert_eq!(proxy.clusters, [WeightedName { cluster: Name::from("c"), weight: 1 }]);
    }

    #[test]
    fn what_is_not_known_refuses_connections() {
        let mut reader = Reader::default();
        let any =
            Any { type_url: "t/envoy.extensions.filters.network.ext_authz.v3.ExtAuthz".to_owned(), value: vec![] };
        assert!(matches!(read("e", any, &mut reader), Ok(NetworkFilter::Unsupported { .. })));
        let message = Rbac { delay_deny: Some(Default::default()), ..Default::default() };
        assert!(matches!(read("r", pack_any(message), &mut reader), Ok(NetworkFilter::Unsupported { .. })));
        assert!(reader.notes.iter().all(|n| n.severity == Severity::Security));
        assert_eq!(reader.notes.len(), 2);
    }
}
