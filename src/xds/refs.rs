//! What resources refer to: subscriptions follow from it, and so does what must be there before something is served.

use proxy_config::Name;
use proxy_config::model::{
    Cluster, ClusterKind, CommonTls, FilterChain, Listener, NetworkFilter, RouteAction, RouteSource, RouteTable,
    Transport,
};

/// The EDS service name of a cluster.
pub(super) fn endpoints(cluster: &Cluster) -> Option<&Name> {
    match &cluster.kind {
        ClusterKind::Eds(name) => Some(name),
        _ => None,
    }
}

/// RDS tables of a listener.
pub(super) fn routes(listener: &Listener) -> impl Iterator<Item = &Name> {
    filters(listener).filter_map(|filter| match filter {
        NetworkFilter::Http(manager) => match &manager.routes {
            RouteSource::Rds(name) => Some(name),
            RouteSource::Inline(_) => None,
        },
        _ => None,
    })
}

/// Secrets of a listener that come over the stream.
pub(super) fn listener_secrets(listener: &Listener) -> impl Iterator<Item = &Name> {
    chains(listener).filter_map(|chain| chain.tls.as_ref()).flat_map(|tls| secrets(&tls.common))
}

/// Secrets of a cluster that come over the stream.
pub(super) fn cluster_secrets(cluster: &Cluster) -> impl Iterator<Item = &Name> {
    let sockets = cluster.transport_matches.iter().map(|m| &m.transport).chain([&cluster.transport]);
    sockets.filter_map(tls).flat_map(secrets)
}

/// Whether a listener itself sends to a cluster of which `is` holds: TCP, or by routes that it carries.
pub(super) fn listener_uses(listener: &Listener, is: &dyn Fn(&Name) -> bool) -> bool {
    filters(listener).any(|filter| match filter {
        NetworkFilter::TcpProxy(tcp) => tcp.clusters.iter().any(|c| is(&c.cluster)),
        NetworkFilter::Http(manager) => match &manager.routes {
            RouteSource::Inline(table) => table_uses(table, is),
            RouteSource::Rds(_) => false,
        },
        _ => false,
    })
}

/// Whether a table sends to a cluster of which `is` holds. A mirror may come later.
pub(super) fn table_uses(table: &RouteTable, is: &dyn Fn(&Name) -> bool) -> bool {
    let routes = table.virtual_hosts.iter().flat_map(|host| &host.routes);
    routes.filter_map(forward).any(|forward| forward.clusters.iter().any(|c| is(&c.name)))
}

fn forward(route: &proxy_config::model::Route) -> Option<&proxy_config::model::Forward> {
    match &route.action {
        RouteAction::Forward(forward) => Some(forward),
        _ => None,
    }
}

fn chains(listener: &Listener) -> impl Iterator<Item = &FilterChain> {
    listener.filter_chains.iter().chain(&listener.default_filter_chain)
}

fn filters(listener: &Listener) -> impl Iterator<Item = &NetworkFilter> {
    chains(listener).flat_map(|chain| &chain.filters)
}

fn tls(transport: &Transport) -> Option<&CommonTls> {
    match transport {
        Transport::Tls(tls) => Some(&tls.common),
        Transport::ProxyProtocol(_, inner) => tls(inner),
        Transport::Raw | Transport::Unsupported(_) => None,
    }
}

/// `default`, `ROOTCA` and files are the agent's; the rest is asked of istiod.
fn secrets(of: &CommonTls) -> impl Iterator<Item = &Name> {
    let roots = of.validation.as_ref().and_then(|v| v.roots.as_ref());
    of.certificates.iter().chain(roots).filter(|name| name.contains("://"))
}
