//! What of a resource could not be enforced, found before the resource is accepted: a control plane is told then, and the
//! version before stays. Compiles what guards, and throws it away; secrets that have not come yet are no fault of it.

use proxy_config::model::{self, CommonTls};
use proxy_config::{Reject, Severity};

use super::chain_compile;
use super::compile::Sink;
use crate::tls::{ClientTls, ServerTls};

/// Policies, token filters and TLS settings of a listener's chains.
pub fn listener(said: &model::Listener) -> Vec<Reject> {
    let resource = format!("Listener {}", said.name);
    let mut rejects = Vec::new();
    for chain in said.filter_chains.iter().chain(&said.default_filter_chain) {
        let mut sink = Sink::new(&mut rejects, &resource);
        let mut sink = sink.at(&format!("filter_chains[{}]", chain.name));
        if let Some(Err(why)) = chain.tls.as_ref().map(ServerTls::check) {
            sink.security("transport_socket", why);
        }
        chain_compile::guards(&chain.filters, &mut sink);
    }
    only_security(rejects)
}

/// TLS settings of a cluster.
pub fn cluster(said: &model::Cluster) -> Vec<Reject> {
    let resource = format!("Cluster {}", said.name);
    let mut rejects = Vec::new();
    let named = said.transport_matches.iter().map(|m| (format!("transport_socket_matches[{}]", m.name), &m.transport));
    for (field, transport) in named.chain([("transport_socket".to_owned(), &said.transport)]) {
        if let Some(Err(why)) = tls(transport).map(ClientTls::check) {
            Sink::new(&mut rejects, &resource).security(&field, why);
        }
    }
    rejects
}

/// A filter that comes by discovery, with its name.
pub fn http_filter(name: &str, said: &model::HttpFilter) -> Vec<Reject> {
    let resource = format!("TypedExtensionConfig {name}");
    let mut rejects = Vec::new();
    chain_compile::http_guard(said, &mut Sink::new(&mut rejects, &resource));
    only_security(rejects)
}

fn only_security(mut rejects: Vec<Reject>) -> Vec<Reject> {
    rejects.retain(|reject| reject.severity == Severity::Security);
    rejects
}

fn tls(of: &model::Transport) -> Option<&CommonTls> {
    match of {
        model::Transport::Tls(tls) => Some(&tls.common),
        model::Transport::ProxyProtocol(_, inner) => tls(inner),
        model::Transport::Raw | model::Transport::Unsupported(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use bench_harness::istiod::resources;
    use proxy_config::xds;

    use super::*;

    fn told(rejects: &[Reject]) -> Vec<String> {
        rejects.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_clusters_settings_are_told_by_field_and_secrets_that_have_not_come_are_no_fault() {
        let any = resources::over_tls(resources::eds_cluster("c", 1), "kubernetes://a", "kubernetes://b");
        let mut said = xds::cluster(&any).unwrap().value;
        assert!(cluster(&said).is_empty());
        let model::Transport::Tls(tls) = &mut said.transport else { panic!("TLS") };
        tls.common.ecdh_curves = vec!["P-0".to_owned()];
        let told = told(&cluster(&said));
        assert!(told.len() == 1 && told[0].starts_with("Cluster c: transport_socket: key exchange group"), "{told:?}");
    }

    #[test]
    fn a_discovered_policy_is_told_by_the_name_of_its_discovery() {
        for (path, faults) in [("/a.*", 0), ("(", 1)] {
            let at = ([10, 0, 0, 1], 80).into();
            let any = resources::http_listener("l", at, "80", vec![resources::policy(path)]);
            let said = xds::listener(&any, &xds::Extensions::new()).unwrap().value;
            let model::NetworkFilter::Http(manager) = &said.filter_chains[0].filters[0] else { panic!("HTTP") };
            let told = told(&http_filter("x", &manager.filters[0]));
            assert_eq!(told.len(), faults, "{told:?}");
            assert!(told.iter().all(|line| line.starts_with("TypedExtensionConfig x: rbac: paths: ")), "{told:?}");
            assert_eq!(listener(&said).len(), faults);
        }
    }
}
