//! A server that speaks to [`super::Ads`] without a network, and small resources as istiod would send them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::SystemTime;

use bench_harness::istiod::resources;
pub(super) use bench_harness::istiod::resources::{
    cors_extension, discovered, eds_cluster, no_names, policy, trusting, unknown_guard, with_old_tls, with_tls,
};
use proxy_config::xds::Any;
use tokio::time::Instant;

use super::*;

/// A load assignment with one endpoint.
pub(super) fn assignment(name: &str, ip: &str) -> Any {
    resources::assignment(name, &[(ip.parse::<std::net::IpAddr>().expect("an address"), 80).into()])
}

/// A table that sends everything to one cluster.
pub(super) fn table(name: &str, cluster: &str) -> Any {
    resources::table(name, cluster, 0)
}

/// An HTTP listener with these filters before the router.
pub(super) fn http_listener(name: &str, rds: &str, filters: Vec<resources::HttpFilter>) -> Any {
    resources::http_listener(name, ([0, 0, 0, 0], 80).into(), rds, filters)
}

/// A delta response.
pub(super) fn delta(kind: Kind, nonce: &str, resources: &[(&str, Any)], removed: &[&str]) -> Response {
    let resource = |(name, any): &(&str, Any)| Resource {
        version: String::new(),
        resource: Some(any.clone()),
        name: (*name).to_owned(),
    };
    Response::Delta(DeltaDiscoveryResponse {
        system_version_info: format!("push of {nonce}"),
        resources: resources.iter().map(resource).collect(),
        type_url: kind.url().to_owned(),
        nonce: nonce.to_owned(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
    })
}

/// A delta server: what it has, what it was asked for on its one stream, what it has said.
#[derive(Default)]
pub(super) struct Server {
    pub(super) has: BTreeMap<Kind, BTreeMap<String, Any>>,
    watched: BTreeMap<Kind, BTreeSet<String>>,
    pub(super) says: VecDeque<Response>,
    nonce: u32,
    pub(super) refusals: usize,
    open: BTreeMap<Kind, BTreeSet<String>>,
}

impl Server {
    /// Forgets the stream.
    pub(super) fn dropped(&mut self) {
        self.watched.clear();
        self.says.clear();
        self.open.clear();
    }

    /// Takes a request, as istiod does.
    pub(super) fn hears(&mut self, request: &Request) {
        let Request::Delta(request) = request else { panic!("a delta stream") };
        let Some(kind) = Kind::of(&request.type_url) else { return };
        if !request.response_nonce.is_empty() {
            assert!(
                self.open.entry(kind).or_default().remove(&request.response_nonce),
                "{} answers nothing that is open",
                request.response_nonce
            );
            assert!(request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty());
            self.refusals += usize::from(request.error_detail.is_some());
            return;
        }
        let first = !self.watched.contains_key(&kind);
        let watched = self.watched.entry(kind).or_default();
        watched.extend(request.resource_names_subscribe.iter().cloned());
        watched.extend(request.initial_resource_versions.keys().cloned());
        request.resource_names_unsubscribe.iter().for_each(|name| {
            watched.remove(name);
        });
        let has = self.has.get(&kind).cloned().unwrap_or_default();
        let stale: Vec<String> = watched.iter().filter(|n| !has.contains_key(*n)).cloned().collect();
        if kind.is_wildcard() {
            assert!(first, "{kind:?} was asked for twice");
            self.push(kind, |_| true, &stale);
        } else if !request.resource_names_subscribe.is_empty() {
            let asked: Vec<String> = request.resource_names_subscribe.clone();
            let missing: Vec<String> = asked.iter().filter(|n| stale.contains(n)).cloned().collect();
            self.push(kind, |name| asked.iter().any(|a| a == name), &missing);
        }
    }

    fn has(&self, kind: Kind) -> BTreeMap<String, Any> {
        self.has.get(&kind).cloned().unwrap_or_default()
    }

    /// Says what it has of a kind, if anybody watches.
    pub(super) fn push(&mut self, kind: Kind, which: impl Fn(&str) -> bool, removed: &[String]) {
        if !self.watched.contains_key(&kind) {
            return;
        }
        self.nonce += 1;
        let nonce = self.nonce.to_string();
        let has = self.has(kind);
        let resources: Vec<(&str, Any)> =
            has.iter().filter(|(n, _)| which(n)).map(|(n, a)| (n.as_str(), a.clone())).collect();
        let removed: Vec<&str> = removed.iter().map(String::as_str).collect();
        self.says.push_back(delta(kind, &nonce, &resources, &removed));
        self.open.entry(kind).or_default().insert(nonce);
    }

    /// Sets a resource and pushes it the way istiod does: whole types, but for endpoints.
    pub(super) fn set(&mut self, kind: Kind, name: &str, any: Option<Any>) {
        let kinds = self.has.entry(kind).or_default();
        let removed = match any {
            Some(any) => {
                kinds.insert(name.to_owned(), any);
                Vec::new()
            }
            None => kinds.remove(name).map(|_| name.to_owned()).into_iter().collect(),
        };
        let only = name.to_owned();
        match kind {
            Kind::Endpoints => self.push(kind, |n| n == only, &removed),
            _ => self.push(kind, |_| true, &removed),
        }
    }
}

/// Carries messages to and fro until nobody has anything to say.
pub(super) fn settle(ads: &mut Ads, server: &mut Server, mut send: Vec<Request>, now: Instant) {
    for _ in 0..1000 {
        send.drain(..).for_each(|request| server.hears(&request));
        let Some(response) = server.says.pop_front() else { return };
        send = ads.received(response, now, SystemTime::UNIX_EPOCH).send;
    }
    panic!("they never end");
}
