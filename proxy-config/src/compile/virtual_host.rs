//! Under which names a service can be called: the domains of its virtual host.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::hosts;
use crate::registry::{Provider, Proxy, Resolution, Service};

/// Domains of one virtual host, and which of them are only other spellings of a service's name.
pub(super) struct Domains {
    /// In istiod's order.
    pub(super) all: Vec<String>,
    /// Short and absolute spellings.
    alternatives: Vec<String>,
}

/// Domains of a host that no service stands behind.
pub(super) fn of_host(host: &str) -> Domains {
    Domains { all: vec![bracketed(host)], alternatives: Vec::new() }
}

/// Domains of a service and of its aliases. Ports play no part: the table ignores them in matching.
pub(super) fn of_service(service: &Service, aliases: &[&str], proxy: &Proxy) -> Domains {
    let mut all = Vec::new();
    let mut alternatives = Vec::new();
    for host in std::iter::once(service.hostname.to_ascii_lowercase().as_str()).chain(aliases.iter().copied()) {
        let alternative = alternative_names(host, &proxy.dns_domain);
        all.push(bracketed(host));
        all.extend(alternative.iter().cloned());
        alternatives.extend(alternative);
    }
    if service.resolution == Resolution::Passthrough && service.provider == Provider::Kubernetes {
        let pods: Vec<String> = all.iter().map(|d| format!("*.{d}")).collect();
        all.extend(pods);
    }
    all.extend(service.addresses.iter().filter(|a| *a != "0.0.0.0" && !a.is_empty()).map(|a| bracketed(a)));
    Domains { all, alternatives }
}

/// What earlier virtual hosts of a table have taken, and the full names that no short spelling may shadow.
#[derive(Default)]
pub(super) struct Taken {
    domains: BTreeSet<String>,
    full_names: BTreeSet<String>,
}

impl Taken {
    /// Notes a service's full name.
    pub(super) fn reserve(&mut self, host: &str, port: u16) {
        self.full_names.insert(host.to_owned());
        self.full_names.insert(hosts::with_port(host, port));
    }

    /// The domains that are still free; they are taken from now on.
    pub(super) fn claim(&mut self, domains: Domains) -> Vec<String> {
        let Domains { all, alternatives } = domains;
        let mut free = Vec::new();
        for domain in all {
            let shadows = alternatives.contains(&domain) && self.full_names.contains(&domain);
            if !shadows && self.domains.insert(domain.to_ascii_lowercase()) {
                free.push(domain);
            }
        }
        free
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

/// `host.` and, as far as the proxy's own domain makes them unambiguous, the short names of the service.
pub(super) fn alternative_names(host: &str, proxy_domain: &str) -> Vec<String> {
    let mut out = Vec::new();
    if host.parse::<IpAddr>().is_err() {
        out.push(format!("{host}."));
    }
    if let Some((namespace, _)) = proxy_domain.split_once(".svc.") {
        if host.ends_with(&proxy_domain[namespace.len()..]) {
            out.extend(kubernetes_names(host, namespace));
        }
        return out;
    }
    let (unique, shared) = split_shared(host, proxy_domain);
    if let Some(first_shared) = shared.first() {
        out.push(unique.join("."));
        if unique.len() == 2 {
            out.push(format!("{}.{first_shared}", unique.join(".")));
        }
    }
    out
}

/// `svc`, `svc.ns.svc`, `svc.ns` for a client of the namespace; `svc.ns`, `svc.ns.svc` for others.
fn kubernetes_names(host: &str, proxy_namespace: &str) -> Vec<String> {
    let Some(end) = host.find(".svc.").filter(|i| *i > 0) else { return Vec::new() };
    let short = &host[..end];
    let Some((name, namespace)) = short.split_once('.') else { return Vec::new() };
    if namespace == proxy_namespace {
        return vec![name.to_owned(), format!("{short}.svc"), short.to_owned()];
    }
    vec![short.to_owned(), format!("{short}.svc")]
}

/// Labels of `host` before and inside the suffix that it shares with the proxy's domain.
fn split_shared<'h>(host: &'h str, proxy_domain: &str) -> (Vec<&'h str>, Vec<&'h str>) {
    let labels: Vec<&str> = host.split('.').collect();
    let shared = labels.iter().rev().zip(proxy_domain.split('.').rev()).take_while(|(a, b)| *a == b).count();
    let (unique, shared) = labels.split_at(labels.len() - shared);
    (unique.to_vec(), shared.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_depend_on_the_client() {
        let host = "web.app.svc.cluster.local";
        assert_eq!(
            alternative_names(host, "app.svc.cluster.local"),
            ["web.app.svc.cluster.local.", "web", "web.app.svc", "web.app"]
        );
        assert_eq!(
            alternative_names(host, "other.svc.cluster.local"),
            ["web.app.svc.cluster.local.", "web.app", "web.app.svc"]
        );
        assert_eq!(alternative_names("foo.com", "app.svc.cluster.local"), ["foo.com."]);
        assert_eq!(
            alternative_names("foo.local.campus.net", "remote.campus.net"),
            ["foo.local.campus.net.", "foo.local", "foo.local.campus"]
        );
        assert_eq!(alternative_names("10.0.0.1", "app.svc.cluster.local"), Vec::<String>::new());
    }

    #[test]
    fn first_come_first_served() {
        let mut taken = Taken::default();
        assert_eq!(taken.claim(of_host("a.com")), ["a.com"]);
        assert!(taken.claim(of_host("A.com")).is_empty());
    }
}
