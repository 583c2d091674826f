//! Localities: which endpoints come first, and how much each locality gets.

use std::collections::{BTreeMap, BTreeSet};

use crate::istio::destination_rule::{Distribute, Failover, LoadBalancer, LocalityLbSetting};
use crate::istio::mesh_config::MeshConfig;
use crate::model::{Endpoint, Locality};
use crate::registry::{Proxy, Service};

const NETWORK: &str = "topology.istio.io/network";
const REGION: &str = "topology.kubernetes.io/region";
const ZONE: &str = "topology.kubernetes.io/zone";
const SUBZONE: &str = "topology.istio.io/subzone";
const NODE: &str = "kubernetes.io/hostname";
const CLUSTER: &str = "topology.istio.io/cluster";

/// The locality setting in force for a cluster.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Effective {
    setting: LocalityLbSetting,
    /// Failover needs no outlier detection.
    force: bool,
}

impl Effective {
    /// Whether localities are balanced by weight before endpoints are.
    pub(super) fn is_weighted(&self, outlier: bool) -> bool {
        let failover = !self.setting.failover.is_empty() || !self.setting.failover_priority.is_empty();
        ((self.force || outlier) && failover) || !self.setting.distribute.is_empty()
    }
}

/// The rule's setting, else what the service's traffic distribution stands for, else the mesh's, which is on unless
/// it says otherwise. Zone-aware settings are refused elsewhere and stand for none here.
pub(super) fn effective(mesh: &MeshConfig, said: Option<&LoadBalancer>, service: &Service) -> Option<Effective> {
    if said.is_some_and(|lb| lb.zone_aware_lb_setting.is_some()) {
        return None;
    }
    let enabled = |s: &LocalityLbSetting| s.enabled != Some(false);
    if let Some(setting) = said.and_then(|lb| lb.locality_lb_setting.as_ref()) {
        return enabled(setting).then(|| Effective { setting: setting.clone(), force: false });
    }
    if let Some(labels) = distribution(&service.traffic_distribution) {
        let failover_priority = labels.iter().map(|l| (*l).to_owned()).collect();
        return Some(Effective {
            setting: LocalityLbSetting { failover_priority, ..LocalityLbSetting::default() },
            force: true,
        });
    }
    if mesh.zone_aware_lb_setting.is_some() {
        return None;
    }
    let setting = mesh.locality_lb_setting.clone().unwrap_or_default();
    enabled(&setting).then_some(Effective { setting, force: false })
}

/// Whether the service's traffic distribution orders localities: health alone then decides when they are left.
pub(super) fn is_spread(service: &Service) -> bool {
    distribution(&service.traffic_distribution).is_some()
}

fn distribution(said: &str) -> Option<&'static [&'static str]> {
    match said {
        "PreferClose" | "PreferSameZone" => Some(&[NETWORK, REGION, ZONE]),
        "PreferSameNode" => Some(&[NETWORK, REGION, ZONE, SUBZONE, NODE]),
        _ => None,
    }
}

/// Endpoints of one locality on their way into a load assignment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Group {
    pub(super) locality: Locality,
    pub(super) priority: u32,
    pub(super) weight: Option<u32>,
    pub(super) endpoints: Vec<Labelled>,
}

/// An endpoint with the labels of its workload.
pub(super) type Labelled = (Endpoint, BTreeMap<String, String>);

impl Group {
    /// The weight of the locality is that of its endpoints.
    pub(super) fn weigh(&mut self) {
        let sum = self.endpoints.iter().fold(0_u32, |sum, (e, _)| sum.saturating_add(e.weight));
        self.weight = (!self.endpoints.is_empty()).then_some(sum);
    }
}

/// Gives localities their weights or priorities as the proxy sees them. `outlier` says that endpoints can be ejected:
/// without that nothing would ever leave the first priority.
pub(super) fn apply(groups: Vec<Group>, effective: Option<&Effective>, proxy: &Proxy, outlier: bool) -> Vec<Group> {
    let Some(Effective { setting, force }) = effective else { return groups };
    if !setting.distribute.is_empty() {
        return distribute(groups, &setting.distribute, &proxy.locality);
    }
    if !outlier && !force {
        return groups;
    }
    if setting.failover_priority.is_empty() {
        return failover(groups, &setting.failover, &proxy.locality);
    }
    let groups = by_labels(groups, &setting.failover_priority, &proxy_labels(proxy));
    if setting.failover.is_empty() { groups } else { failover(groups, &setting.failover, &proxy.locality) }
}

/// Whether a rule's `region/zone/subzone`, each possibly `*` or absent, names the locality.
fn names(rule: &str, locality: &Locality) -> bool {
    let parts: Vec<&str> = rule.split('/').collect();
    let part =
        |i: usize, actual: &str| parts.get(i).is_none_or(|said| said.is_empty() || *said == "*" || *said == actual);
    let region = parts[0];
    (region == "*" || region == locality.region) && part(1, &locality.zone) && part(2, &locality.sub_zone)
}

/// Shares of the first rule that names the proxy's locality; what it does not mention gets nothing.
fn distribute(mut groups: Vec<Group>, rules: &[Distribute], own: &Locality) -> Vec<Group> {
    let Some(rule) = rules.iter().find(|r| names(&r.from, own)) else { return groups };
    let mut open: BTreeSet<usize> = (0..groups.len()).collect();
    for (to, share) in &rule.to {
        let hit: Vec<usize> = open.iter().copied().filter(|i| names(to, &groups[*i].locality)).collect();
        let total: u32 = hit.iter().map(|i| groups[*i].weight.unwrap_or(1)).sum();
        for i in hit {
            open.remove(&i);
            let part = f64::from(groups[i].weight.unwrap_or(1)) * f64::from(*share) / f64::from(total);
            if part > 0.0 {
                groups[i].weight = Some(part.ceil() as u32);
            }
        }
    }
    for i in open {
        groups[i].endpoints.clear();
    }
    groups
}

/// Same sub-zone, same zone, same region, the named region, the rest.
fn failover(mut groups: Vec<Group>, rules: &[Failover], own: &Locality) -> Vec<Group> {
    let rule = rules.iter().find(|r| r.from == own.region);
    for group in &mut groups {
        let there = &group.locality;
        let distance = if there.region != own.region {
            if rule.is_some_and(|r| r.to != there.region) { 4 } else { 3 }
        } else if there.zone != own.zone {
            2
        } else {
            u32::from(there.sub_zone != own.sub_zone)
        };
        group.priority = group.priority * 5 + distance;
    }
    close_gaps(&mut groups);
    groups
}

/// Splits localities by how many labels, in order, an endpoint shares with the proxy (or with a value that is said).
fn by_labels(groups: Vec<Group>, labels: &[String], own: &BTreeMap<String, String>) -> Vec<Group> {
    if own.is_empty() {
        return groups;
    }
    let wanted: Vec<(&str, &str)> = labels
        .iter()
        .map(|label| match label.split_once('=') {
            Some((key, value)) if !value.contains('=') => (key, value),
            _ => {
                let key = label.split('=').next().unwrap_or_default();
                (key, own.get(key).map_or("", String::as_str))
            }
        })
        .collect();
    let mut out = Vec::new();
    for group in groups {
        let mut split: BTreeMap<usize, Vec<Labelled>> = BTreeMap::new();
        for endpoint in group.endpoints {
            let differs = |(key, value): &(&str, &str)| endpoint.1.get(*key).map_or("", String::as_str) != *value;
            let priority = wanted.iter().position(differs).map_or(0, |at| wanted.len() - at);
            split.entry(priority).or_default().push(endpoint);
        }
        for (priority, endpoints) in split {
            let mut part = Group {
                locality: group.locality.clone(),
                priority: u32::try_from(priority).unwrap_or(u32::MAX),
                weight: None,
                endpoints,
            };
            part.weigh();
            out.push(part);
        }
    }
    close_gaps(&mut out);
    out
}

/// Priorities count from zero without gaps.
fn close_gaps(groups: &mut [Group]) {
    let used: BTreeSet<u32> = groups.iter().map(|g| g.priority).collect();
    let rank: BTreeMap<u32, u32> = used.into_iter().zip(0..).collect();
    for group in groups {
        group.priority = rank[&group.priority];
    }
}

/// The proxy's labels with what istiod knows of its place.
fn proxy_labels(proxy: &Proxy) -> BTreeMap<String, String> {
    let mut out = proxy.labels.clone();
    let place = [
        (REGION, &proxy.locality.region),
        (ZONE, &proxy.locality.zone),
        (SUBZONE, &proxy.locality.sub_zone),
        (CLUSTER, &proxy.cluster_id),
        (NETWORK, &proxy.network),
        (NODE, &proxy.node_name),
    ];
    for (key, value) in place {
        if !value.is_empty() {
            out.entry(key.to_owned()).or_insert_with(|| value.clone());
        }
    }
    out
}
