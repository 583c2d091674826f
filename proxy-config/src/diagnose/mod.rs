//! What the types alone do not refuse: values and combinations that Istio's own validation turns away.
//!
//! One function a kind, from an object to its findings; an object with a finding is not served, unless the finding says
//! that it is meant. What is only unwise is not found here.

mod networking;
mod security;

use std::collections::BTreeMap;

pub(crate) use networking::{service_entry, workload_entry, workload_group};
pub(crate) use security::{authorization_policy, peer_authentication, request_authentication};

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// Field path from the object's root.
    pub(crate) field: String,
    /// What was wrong and what was expected.
    pub(crate) reason: String,
    /// It has a meaning all the same: istiod would serve it if it came past the API server.
    pub(crate) meant: bool,
}

/// Findings of one object in the making.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Finding { field: field.into(), reason: reason.into(), meant: false });
    }

    /// Adds a finding unless the condition holds.
    fn expect(&mut self, holds: bool, field: impl Into<String>, reason: &str) {
        if !holds {
            self.add(field, reason);
        }
    }

    /// Adds a finding that leaves the object its meaning.
    fn tell(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Finding { field: field.into(), reason: reason.into(), meant: true });
    }

    /// Labels of a selector are compared as they stand: a wildcard would select nothing.
    fn selector(&mut self, labels: &BTreeMap<String, String>, field: &str) {
        for (key, value) in labels {
            self.expect(!key.is_empty(), field, "a label's name is empty");
            self.expect(
                !key.contains('*') && !value.contains('*'),
                format!("{field}.{key}"),
                "labels know no wildcard",
            );
        }
    }
}

/// A port number in text.
fn is_port(text: &str) -> bool {
    text.parse::<u16>().is_ok_and(|p| p > 0)
}

/// An address or a network in text.
fn is_network(text: &str) -> bool {
    text.parse::<std::net::IpAddr>().is_ok() || text.parse::<ipnet::IpNet>().is_ok()
}

/// Letters, digits and dashes, at most 63, alphanumeric at both ends.
fn is_label(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
        && ends(text.chars().next())
        && ends(text.chars().last())
}

/// Labels joined by dots, a last dot allowed; underscores as hosts in the wild have them.
fn is_fqdn(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    text.len() <= 255 && !text.is_empty() && text.split('.').all(|l| is_label(&l.replace('_', "x")))
}

/// The same, its beginning possibly a wildcard.
fn is_wildcard_fqdn(text: &str) -> bool {
    text.strip_prefix('*').map_or_else(|| is_fqdn(text), |rest| is_fqdn(rest.trim_start_matches(['.', '-'])))
}
