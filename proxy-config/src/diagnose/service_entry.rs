//! ServiceEntries: TCP without an address, one port with two protocols.

use std::collections::{BTreeMap, BTreeSet};

use super::destinations::scopes;
use super::{Item, Message, World};

const NEEDS_ADDRESS: &str = "IST0134";
const TWO_PROTOCOLS: &str = "IST0177";

/// TCP ports that only an address tells from others.
pub(super) fn addresses(world: &World<'_>, out: &mut Vec<Message>) {
    let metadata = world.mesh().map(|m| m.at("defaultConfig.proxyMetadata"));
    let is = |name: &str| {
        let entries = metadata.as_ref().map(|m| m.entries()).unwrap_or_default();
        entries.iter().any(|(k, v)| *k == name && v.text() == "true")
    };
    let allocates =
        is("ISTIO_META_DNS_CAPTURE") && (is("ISTIO_META_DNS_AUTO_ALLOCATE") || is("PILOT_ENABLE_IP_AUTOALLOCATE"));
    for item in world.of("ServiceEntry") {
        let given = item.spec.get("addresses").is_said() || item.root.at("status.addresses").len() > 0;
        if given || allocates {
            continue;
        }
        for port in item.spec.get("ports").items() {
            let protocol = port.get("protocol").text();
            if protocol.is_empty() || protocol.eq_ignore_ascii_case("tcp") {
                out.push(item.message(
                    NEEDS_ADDRESS,
                    &port,
                    "TCP is told from other services by its address: addresses are missing",
                ));
            }
        }
    }
}

/// Scope, host and port number.
type Reach<'a> = (String, &'a str, i64);

/// The same host and port with different protocols.
pub(super) fn protocols(world: &World<'_>, out: &mut Vec<Message>) {
    let mut index: BTreeMap<Reach<'_>, Vec<(String, &Item<'_>)>> = BTreeMap::new();
    for item in world.of("ServiceEntry") {
        let reach: BTreeSet<String> =
            scopes(&item.spec.get("exportTo").texts(), item.namespace()).into_iter().collect();
        for scope in reach {
            for host in item.spec.get("hosts").texts() {
                for port in item.spec.get("ports").items() {
                    let key = (scope.clone(), host, port.get("number").whole_or_zero());
                    index.entry(key).or_default().push((port.get("protocol").text().to_ascii_uppercase(), item));
                }
            }
        }
    }
    let mut told: BTreeSet<String> = BTreeSet::new();
    for ((scope, host, port), own) in &index {
        let everyone = index.get(&("*".to_owned(), *host, *port)).filter(|_| scope != "*");
        let entries: Vec<&(String, &Item<'_>)> = own.iter().chain(everyone.into_iter().flatten()).collect();
        let protocols: BTreeSet<&str> = entries.iter().map(|(p, _)| p.as_str()).collect();
        if protocols.len() < 2 {
            continue;
        }
        for (_, item) in entries {
            if told.insert(item.full_name()) {
                let list: Vec<&str> = protocols.iter().copied().collect();
                let reason =
                    format!("port {port} of {host:?} is said to be {} by several ServiceEntries", list.join(" and "));
                out.push(item.message(TWO_PROTOCOLS, &item.spec.get("ports"), reason));
            }
        }
    }
}
