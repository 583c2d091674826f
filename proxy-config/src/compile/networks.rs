//! Endpoints on other networks are reached through the gateways of their network.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::cluster_outbound::Site;
use super::locality::{Group, Labelled};
use crate::model::{Address, Endpoint, HealthStatus};
use crate::registry::ServiceEndpoint;

/// A gateway: network, address, port.
type Gateway<'a> = (&'a str, IpAddr, u16);

/// Gateways that have an address; names of services as gateways are refused elsewhere.
fn gateways<'a>(site: &Site<'a>) -> Vec<Gateway<'a>> {
    let networks = site.inputs.networks.networks.iter();
    networks
        .flat_map(|(name, n)| n.gateways.iter().map(move |g| (name.as_str(), g)))
        .filter_map(|(name, g)| Some((name, g.address.parse().ok()?, g.port)))
        .collect()
}

/// Endpoints of one locality as the proxy reaches them: directly, or through gateways, which get their weight. Weights
/// are multiplied so that they can be shared evenly among the gateways of any network.
pub(super) fn reachable(
    site: &Site<'_>,
    members: &[&ServiceEndpoint],
    endpoint: impl Fn(&ServiceEndpoint) -> Endpoint,
) -> Group {
    let gateways = gateways(site);
    let labels = |e: &ServiceEndpoint| e.labels.clone();
    if gateways.is_empty() {
        let endpoints = members.iter().map(|e| (endpoint(e), labels(e))).collect();
        return Group { endpoints, ..Group::default() };
    }
    let scale = scale(&gateways);
    let own = site.view.proxy.network.as_str();
    let mut out = Group::default();
    let mut shares: BTreeMap<Gateway<'_>, u32> = BTreeMap::new();
    for member in members {
        let mut made = endpoint(member);
        made.weight = made.weight.saturating_mul(scale);
        let there = gateways.iter().filter(|(network, ..)| *network == member.network);
        let reached: Vec<Gateway<'_>> = there.clone().filter(|(_, ip, _)| speaks(site, *ip)).copied().collect();
        let same = own.is_empty() || member.network.is_empty() || own == member.network;
        let forced = own.is_empty() && !member.network.is_empty() && there.clone().count() > 0;
        if !forced && (same || there.count() == 0) {
            out.endpoints.push((made, labels(member)));
            continue;
        }
        // The gateway tells connections apart by SNI, which plaintext does not have.
        if made.transport_labels.is_empty() || reached.is_empty() {
            continue;
        }
        let share = made.weight / u32::try_from(reached.len()).unwrap_or(u32::MAX);
        for gateway in reached {
            let sum = shares.entry(gateway).or_default();
            *sum = sum.saturating_add(share);
        }
    }
    out.endpoints.extend(shares.into_iter().map(|(gateway, weight)| through(gateway, weight)));
    out
}

fn speaks(site: &Site<'_>, gateway: IpAddr) -> bool {
    let ips = &site.view.proxy.ips;
    ips.is_empty() || ips.iter().any(|ip| ip.is_ipv4() == gateway.is_ipv4())
}

/// Least common multiple of the numbers of gateways.
fn scale(gateways: &[Gateway<'_>]) -> u32 {
    let mut counts: BTreeMap<&str, u32> = BTreeMap::new();
    for (network, ..) in gateways {
        *counts.entry(network).or_default() += 1;
    }
    let gcd = |mut a: u32, mut b: u32| {
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    counts.into_values().fold(1, |lcm, n| lcm / gcd(lcm, n) * n)
}

fn through((network, ip, port): Gateway<'_>, weight: u32) -> Labelled {
    let endpoint = Endpoint {
        address: Address::Socket((ip, port).into()),
        health: HealthStatus::Unknown,
        weight: weight.max(1),
        transport_labels: [("tlsMode".to_owned(), "istio".to_owned())].into_iter().collect(),
        workload: ";;;;".into(),
        hostname: String::new(),
        metadata: Default::default(),
    };
    (endpoint, BTreeMap::from([("topology.istio.io/network".to_owned(), network.to_owned())]))
}
