//! What is known about a call once the data path's functions have been asked, and how it is printed.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::call::{Call, Mode};

/// The answer to one call. The first seven are always present, `null` where the call did not get that far.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Listener that takes the connection.
    pub listener: Option<String>,
    /// Its filter chain.
    pub filter_chain: Option<String>,
    /// Route table.
    pub route_config: Option<String>,
    /// Virtual host.
    pub virtual_host: Option<String>,
    /// Route name.
    pub route: Option<String>,
    /// Cluster, when there is only one.
    pub cluster: Option<String>,
    /// Why the call fails before it is routed, in istiod's words.
    pub error: Option<String>,
    /// TLS of the chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter_chain_tls: Option<ChainTls>,
    /// Clusters with their weights.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clusters: Vec<Weighted>,
    /// Policies in the order in which they are asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<Policy>,
    /// Answered by the proxy itself instead of an upstream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub response: Option<Response>,
    /// Hosts of the clusters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<Endpoint>,
    /// Limits and retries.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub timers: BTreeMap<String, String>,
    /// What else is worth knowing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// TLS termination of a chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChainTls {
    /// SDS name of the certificate.
    pub certificate: Option<String>,
    /// Clients need one too.
    pub require_client_certificate: bool,
    /// Protocols that can be selected.
    pub alpn: Vec<String>,
}

/// A cluster with its weight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Weighted {
    /// Name.
    pub name: String,
    /// Weight, relative to the sum.
    pub weight: u64,
}

/// What one RBAC filter says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    /// `network` or `http`.
    pub filter: String,
    /// May it pass.
    pub allowed: bool,
    /// The policy that decided; `None` when none matched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Why it is denied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// What the dry-run rules say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Shadow>,
}

/// What dry-run rules say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shadow {
    /// Would it pass.
    pub allowed: bool,
    /// The policy that decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
}

/// What the proxy answers by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// HTTP status; 0 closes the connection.
    pub status: u16,
    /// Response flags.
    pub flags: String,
    /// Details.
    pub details: String,
    /// Where a redirect leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
}

/// One host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Cluster.
    pub cluster: String,
    /// Address.
    pub address: String,
    /// Weight inside its locality.
    pub weight: u32,
    /// 0 is tried first.
    pub priority: u32,
    /// `region/zone/subzone`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub locality: String,
    /// What the control plane says of it.
    pub health: String,
    /// `raw`, `tls`, ...
    pub transport: String,
}

impl Answer {
    /// For people.
    pub fn text<'a>(&'a self, call: &'a Call) -> impl fmt::Display + 'a {
        Text(self, call)
    }
}

struct Text<'a>(&'a Answer, &'a Call);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(answer, call) = self;
        headline(call, f)?;
        for (what, value) in [
            ("listener", &answer.listener),
            ("filter chain", &answer.filter_chain),
            ("route table", &answer.route_config),
            ("virtual host", &answer.virtual_host),
            ("route", &answer.route),
        ] {
            if let Some(value) = value {
                line(f, what, if value.is_empty() { "(no name)" } else { value })?;
            }
        }
        if let Some(tls) = &answer.filter_chain_tls {
            let wants = if tls.require_client_certificate { ", client certificate required" } else { "" };
            line(f, "chain TLS", &format!("{}{wants}", tls.certificate.as_deref().unwrap_or("-")))?;
        }
        for policy in &answer.policies {
            line(f, "policy", &policy.to_string())?;
        }
        match &answer.clusters[..] {
            [only] => line(f, "cluster", &only.name)?,
            many => many.iter().try_for_each(|w| line(f, "cluster", &format!("{:>6} {}", w.weight, w.name)))?,
        }
        for e in &answer.endpoints {
            let locality = if e.locality.is_empty() { String::new() } else { format!(" {}", e.locality) };
            let rest = format!("{} weight {} priority {}{locality}", e.transport, e.weight, e.priority);
            line(f, "endpoint", &format!("{} {} {rest}", e.address, e.health))?;
        }
        for (name, value) in &answer.timers {
            line(f, name, value)?;
        }
        for note in &answer.notes {
            line(f, "note", note)?;
        }
        if let Some(error) = &answer.error {
            line(f, "error", error)?;
        }
        answer.response.iter().try_for_each(|response| line(f, "answer", &response.to_string()))
    }
}

fn headline(call: &Call, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mode = if call.mode == Mode::Inbound { "inbound" } else { "outbound" };
    write!(f, "{mode} {} {:?} {:?}", call.destination(), call.tls, call.protocol)?;
    if !call.authority().is_empty() {
        write!(f, " {}{}", call.authority(), call.request_path())?;
    }
    writeln!(f)
}

fn line(f: &mut fmt::Formatter<'_>, what: &str, value: &str) -> fmt::Result {
    writeln!(f, "  {what:<22} {value}")
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |allowed: bool| if allowed { "allows" } else { "denies" };
        let by = |policy: &Option<String>| policy.clone().unwrap_or_else(|| "no policy matched".to_owned());
        let said = self.why.clone().unwrap_or_else(|| by(&self.policy));
        write!(f, "{} {}: {said}", self.filter, word(self.allowed))?;
        match &self.shadow {
            Some(shadow) => write!(f, " (dry run {}: {})", word(shadow.allowed), by(&shadow.policy)),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.status {
            0 => write!(f, "connection closed")?,
            status => write!(f, "{status}")?,
        }
        write!(f, " {} {}", self.flags, self.details)?;
        self.location.iter().try_for_each(|location| write!(f, " {location}"))
    }
}
