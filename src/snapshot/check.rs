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
