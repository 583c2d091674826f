//! Addresses for ServiceEntries that say none, while DNS is captured: names get an answer, and TCP services of one port
//! can be told apart.
//!
//! Nothing is stored: a host's address follows from its name, and moves only when another host already has it. A client
//! that remembers an answer is still understood after most changes of the folder.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use super::{Provider, Resolution, Service};

/// Where the addresses are taken from: 240.240.0.0/16, which nobody routes.
const PREFIX: [u8; 2] = [240, 240];

/// Set to `false` on a ServiceEntry that wants none.
const LABEL: &str = "networking.istio.io/enable-autoallocate-ip";

/// Gives every host that may have one an address; services of one host share it.
pub(crate) fn allocate(services: &mut [Service]) {
    let mut taken: BTreeMap<Ipv4Addr, String> = BTreeMap::new();
    for service in services.iter() {
        for address in service.addresses.iter().filter_map(|a| a.parse().ok()) {
            taken.insert(address, String::new());
        }
    }
    let mut hosts: Vec<String> = services.iter().filter(|s| wants(s)).map(|s| s.hostname.clone()).collect();
    hosts.sort();
    hosts.dedup();
    let mut given: BTreeMap<String, String> = BTreeMap::new();
    for host in hosts {
        let Some(address) = free(&host, &taken) else { break };
        given.insert(host.clone(), address.to_string());
        taken.insert(address, host);
    }
    for service in services.iter_mut().filter(|s| wants(s)) {
        service.addresses.extend(given.get(&service.hostname).cloned());
    }
}

fn wants(service: &Service) -> bool {
    service.provider == Provider::External
        && service.addresses.is_empty()
        && service.resolution != Resolution::Passthrough
        && service.labels.get(LABEL).is_none_or(|v| v != "false")
}

/// The first free address from the host's own place on; the ends of each /24 are left out.
fn free(host: &str, taken: &BTreeMap<Ipv4Addr, String>) -> Option<Ipv4Addr> {
    let start = hash(host);
    let at = |step: u16| {
        let [third, fourth] = start.wrapping_add(step).to_be_bytes();
        Ipv4Addr::new(PREFIX[0], PREFIX[1], third, fourth)
    };
    let usable = |a: &Ipv4Addr| !matches!(a.octets()[3], 0 | 255) && !taken.contains_key(a);
    (0..=u16::MAX).map(at).find(usable)
}

/// FNV-1a, folded: the same on every machine and in every version.
fn hash(text: &str) -> u16 {
    let full = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let [a, b, c, d, e, f, g, h] = full.to_be_bytes();
    u16::from_be_bytes([a ^ c ^ e ^ g, b ^ d ^ f ^ h])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::services::tests::named_service;

    fn addresses(hosts: &[&str]) -> BTreeMap<String, Vec<String>> {
        let mut services: Vec<Service> = hosts
            .iter()
            .map(|h| {
                let mut service = Service::clone(&named_service(h, "n", Provider::External, &[]));
                service.resolution = Resolution::DnsLb;
                service
            })
            .collect();
        allocate(&mut services);
        services.into_iter().map(|s| (s.hostname, s.addresses)).collect()
    }

    #[test]
    fn an_address_does_not_depend_on_the_others() {
        let one = addresses(&["a.example"]);
        let many = addresses(&["b.example", "a.example", "c.example"]);
        assert_eq!(one["a.example"], many["a.example"]);
        assert_eq!(one["a.example"].len(), 1);
        assert!(one["a.example"][0].starts_with("240.240."));
        let mut all: Vec<&Vec<String>> = many.values().collect();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn a_taken_address_is_passed_over() {
        let first = free("a", &BTreeMap::new()).expect("free");
        let second = free("a", &BTreeMap::from([(first, String::new())])).expect("free");
        assert_ne!(first, second);
        assert!(!matches!(second.octets()[3], 0 | 255));
    }
}
