//! Load assignments.

use std::collections::BTreeMap;
use std::mem::take;

use envoy_types::pb::envoy::config::core::v3::{HealthStatus as PbHealth, Metadata};
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, LbEndpoint, LocalityLbEndpoints, lb_endpoint,
};
use serde_json::Value;

use super::context::{At, Fault, Read, Reader, each};
use super::value;
use crate::model::{Endpoint, Endpoints, HealthStatus, Locality, LocalityEndpoints, Name, Shared};

/// `ClusterLoadAssignment`; also the inline one of a cluster.
pub(super) fn endpoints(mut of: ClusterLoadAssignment, reader: &mut Reader) -> Read<Endpoints> {
    let policy = of.policy.take().map(|mut p| {
        let factor = value::number(&mut p.overprovisioning_factor);
        reader.done(&p);
        factor
    });
    let out = Endpoints {
        name: Name::from(take(&mut of.cluster_name)),
        localities: each("endpoints", take(&mut of.endpoints), |l| locality(l, reader))?,
        overprovisioning_factor: policy.flatten(),
    };
    reader.done(&of);
    Ok(out)
}

fn locality(mut of: LocalityLbEndpoints, reader: &mut Reader) -> Read<LocalityEndpoints> {
    let place = of.locality.take().unwrap_or_default();
    let mut endpoints = each("lb_endpoints", take(&mut of.lb_endpoints), |e| endpoint(e, reader))?;
    share(&mut endpoints);
    let out = LocalityEndpoints {
        locality: Locality { region: place.region, zone: place.zone, sub_zone: place.sub_zone },
        priority: take(&mut of.priority),
        weight: value::number(&mut of.load_balancing_weight),
        endpoints,
    };
    reader.done(&of);
    Ok(out)
}

/// What an endpoint says like the one before it is kept once: a mesh has a hundred thousand of them.
fn share(all: &mut [Endpoint]) {
    for at in 1..all.len() {
        let (before, rest) = all.split_at_mut(at);
        let (like, endpoint) = (&before[at - 1], &mut rest[0]);
        if endpoint.transport_labels == like.transport_labels {
            endpoint.transport_labels = like.transport_labels.clone();
        }
        if endpoint.workload == like.workload {
            endpoint.workload = Name::clone(&like.workload);
        }
        if endpoint.metadata == like.metadata {
            endpoint.metadata = like.metadata.clone();
        }
    }
}

fn endpoint(mut of: LbEndpoint, reader: &mut Reader) -> Read<Endpoint> {
    let health = match PbHealth::try_from(take(&mut of.health_status)) {
        Ok(PbHealth::Unknown) => HealthStatus::Unknown,
        Ok(PbHealth::Healthy) => HealthStatus::Healthy,
        Ok(PbHealth::Unhealthy | PbHealth::Timeout) => HealthStatus::Unhealthy,
        Ok(PbHealth::Draining) => HealthStatus::Draining,
        Ok(PbHealth::Degraded) => HealthStatus::Degraded,
        Err(_) => return Err(Fault::new("unknown health_status")),
    };
    let Some(lb_endpoint::HostIdentifier::Endpoint(mut host)) = of.host_identifier.take() else {
        return Err(Fault::new("no endpoint"));
    };
    let address = host.address.take().ok_or_else(|| Fault::new("no address"));
    let mut out = Endpoint {
        address: address.and_then(|a| value::address(a, reader)).at("endpoint.address")?,
        health,
        weight: value::number(&mut of.load_balancing_weight).unwrap_or(1).max(1),
        transport_labels: Shared::default(),
        workload: Name::default(),
        hostname: take(&mut host.hostname),
        metadata: Shared::default(),
    };
    reader.done(&host);
    metadata(of.metadata.take().unwrap_or_default(), &mut out, reader);
    reader.done(&of);
    Ok(out)
}

fn metadata(mut of: Metadata, out: &mut Endpoint, reader: &mut Reader) {
    for (namespace, fields) in take(&mut of.filter_metadata) {
        let Value::Object(mut fields) = value::json(fields) else { continue };
        match namespace.as_str() {
            "envoy.transport_socket_match" => out.transport_labels = labels(fields).into(),
            "istio" => {
                if let Some(Value::String(workload)) = fields.remove("workload") {
                    out.workload = workload.into();
                }
                if !fields.is_empty() {
                    out.metadata.insert(namespace, Value::Object(fields));
                }
            }
            _ => {
                out.metadata.insert(namespace, Value::Object(fields));
            }
        }
    }
    reader.done(&of);
}

/// Labels of transport socket matching: texts, other values as their JSON.
pub(super) fn labels(fields: serde_json::Map<String, Value>) -> BTreeMap<String, String> {
    let text = |value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    fields.into_iter().map(|(key, value)| (key, text(value))).collect()
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::{Address, SocketAddress, address, socket_address};
    use envoy_types::pb::envoy::config::endpoint::v3::Endpoint as PbEndpoint;
    use envoy_types::pb::google::protobuf::{self as wkt, value::Kind};

    use super::*;

    fn at(ip: &str) -> LbEndpoint {
        let socket = SocketAddress {
            address: ip.to_owned(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(80)),
            ..Default::default()
        };
        let address = Some(Address { address: Some(address::Address::SocketAddress(socket)) });
        let host = PbEndpoint { address, ..Default::default() };
        LbEndpoint { host_identifier: Some(lb_endpoint::HostIdentifier::Endpoint(host)), ..Default::default() }
    }

    fn fields(of: &[(&str, &str)]) -> wkt::Struct {
        let value = |v: &str| wkt::Value { kind: Some(Kind::StringValue(v.to_owned())) };
        wkt::Struct { fields: of.iter().map(|(k, v)| ((*k).to_owned(), value(v))).collect() }
    }

    #[test]
    fn metadata_goes_where_it_is_used() {
        let filter_metadata = [
            ("envoy.transport_socket_match".to_owned(), fields(&[("tlsMode", "istio")])),
            ("istio".to_owned(), fields(&[("workload", "w;n;c;r;k"), ("more", "x")])),
            ("other".to_owned(), fields(&[("a", "b")])),
        ];
        let metadata = Metadata { filter_metadata: filter_metadata.into(), ..Default::default() };
        let read = endpoint(LbEndpoint { metadata: Some(metadata), ..at("10.0.0.1") }, &mut Reader::default());
        let read = read.expect("valid");
        assert_eq!((read.transport_labels["tlsMode"].as_str(), &*read.workload), ("istio", "w;n;c;r;k"));
        assert_eq!(read.metadata.keys().collect::<Vec<_>>(), ["istio", "other"]);
        assert_eq!(read.weight, 1);
    }

    #[test]
    fn endpoints_of_one_workload_share_what_is_said_of_it() {
        let filter_metadata = [
            ("envoy.transport_socket_match".to_owned(), fields(&[("tlsMode", "istio")])),
            ("istio".to_owned(), fields(&[("workload", "w;n;c;r;k")])),
        ];
        let metadata = Metadata { filter_metadata: filter_metadata.into(), ..Default::default() };
        let one = |ip| LbEndpoint { metadata: Some(metadata.clone()), ..at(ip) };
        let said = LocalityLbEndpoints { lb_endpoints: vec![one("10.0.0.1"), one("10.0.0.2")], ..Default::default() };
        let read = locality(said, &mut Reader::default()).expect("valid").endpoints;
        assert!(read[0].transport_labels.same(&read[1].transport_labels) && read[0].metadata.same(&read[1].metadata));
        assert!(Name::ptr_eq(&read[0].workload, &read[1].workload) && read[0].address != read[1].address);
        assert_eq!(read.capacity(), 2, "no room is kept for more");
    }

    #[test]
    fn an_endpoint_without_address_is_refused() {
        assert!(endpoint(LbEndpoint::default(), &mut Reader::default()).is_err());
        let unknown = LbEndpoint { health_status: 77, ..at("10.0.0.1") };
        assert!(endpoint(unknown, &mut Reader::default()).is_err());
    }
}
