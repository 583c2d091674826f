//! `/config_dump` in the shape of `envoy.admin.v3.ConfigDump`, which istioctl reads (pilot-agent.md §2.2): what came over
//! the stream is shown byte for byte, whether we read it or not. What is ours stands beside `configs`, under
//! `istio_proxy`: what is not served as said, what has no effect, and, where no stream says it, the model.

use std::collections::BTreeMap;
use std::time::SystemTime;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use proxy_config::describe::Descriptors;
use proxy_config::registry::Proxy;
use serde_json::{Map, Value, json};

use super::dump::rfc3339;
use crate::control::Published;
use crate::xds::{Kind, Received, Record, Version};

/// Stands for a private key.
const REDACTED: &str = "[redacted]";

/// What is asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Ask<'a> {
    /// Fields of sections, with commas; nothing: all of them.
    pub(super) mask: Option<&'a str>,
    /// Endpoints too.
    pub(super) include_eds: bool,
}

/// The dump. Costs some milliseconds for the descriptors and as many bytes as it shows.
pub(super) fn config_dump(published: &Published, ask: Ask<'_>) -> Value {
    let mut own = own(published);
    let mut sections = vec![bootstrap(&published.proxy)];
    let received = &*published.received;
    if received.is_empty() {
        own.insert("model".to_owned(), json!(*published.model));
    } else {
        let show = Show { received, descriptors: Descriptors::load() };
        if show.descriptors.is_none() {
            own.insert("descriptors".to_owned(), Value::from("built without: messages are shown as base64"));
        }
        sections.extend(show.sections(ask.include_eds));
        own.insert("names".to_owned(), json!(published.model.names));
    }
    sections.push(secrets(published));
    let configs: Vec<Value> = sections.into_iter().filter_map(|section| section.masked(ask.mask)).collect();
    json!({ "configs": configs, "istio_proxy": own })
}

/// One part of a dump: its type and its fields, all that it may have.
struct Section {
    kind: &'static str,
    fields: Vec<(&'static str, Value)>,
}

impl Section {
    /// With the fields of a mask only; `None` when the mask names none of them.
    fn masked(self, mask: Option<&str>) -> Option<Value> {
        let asked =
            |name: &str| mask.is_none_or(|mask| mask.split(',').any(|path| path.split('.').next() == Some(name)));
        let mut out = Map::new();
        out.insert("@type".to_owned(), Value::from(format!("type.googleapis.com/envoy.admin.v3.{}", self.kind)));
        let mut any = false;
        for (name, value) in self.fields.into_iter().filter(|(name, _)| asked(name)) {
            any = true;
            out.insert(name.to_owned(), value);
        }
        any.then_some(Value::Object(out))
    }
}

struct Show<'a> {
    received: &'a Received,
    descriptors: Option<Descriptors>,
}

impl Show<'_> {
    fn sections(&self, include_eds: bool) -> Vec<Section> {
        let none = || Value::Array(Vec::new());
        let mut sections = vec![
            Section {
                kind: "ClustersConfigDump",
                fields: vec![
                    ("static_clusters", none()),
                    ("dynamic_active_clusters", self.items(Kind::Cluster, "cluster")),
                    ("dynamic_warming_clusters", none()),
                ],
            },
            Section {
                kind: "ListenersConfigDump",
                fields: vec![("static_listeners", none()), ("dynamic_listeners", self.listeners())],
            },
            Section {
                kind: "RoutesConfigDump",
                fields: vec![
                    ("static_route_configs", none()),
                    ("dynamic_route_configs", self.items(Kind::Routes, "route_config")),
                ],
            },
        ];
        if include_eds {
            let endpoints = self.items(Kind::Endpoints, "endpoint_config");
            sections
                .push(Section { kind: "EndpointsConfigDump", fields: vec![("dynamic_endpoint_configs", endpoints)] });
        }
        let extensions = self.items(Kind::Extension, "ecds_filter");
        sections.push(Section { kind: "EcdsConfigDump", fields: vec![("ecds_filters", extensions)] });
        sections
    }

    /// The resources of a kind, each with what it is under `field`.
    fn items(&self, kind: Kind, field: &str) -> Value {
        let item = |record: &Record| {
            let mut item = record.accepted.as_ref().map_or_else(Map::new, |version| self.state(kind, field, version));
            self.add_refusal(kind, record, &mut item);
            Value::Object(item)
        };
        self.received.of(kind).values().map(item).collect()
    }

    fn listeners(&self) -> Value {
        let item = |(name, record): (&proxy_config::Name, &Record)| {
            let mut item = Map::new();
            item.insert("name".to_owned(), Value::from(&**name));
            if let Some(version) = &record.accepted {
                let state = self.state(Kind::Listener, "listener", version);
                item.insert("active_state".to_owned(), Value::Object(state));
            }
            self.add_refusal(Kind::Listener, record, &mut item);
            Value::Object(item)
        };
        self.received.of(Kind::Listener).iter().map(item).collect()
    }

    fn state(&self, kind: Kind, field: &str, version: &Version) -> Map<String, Value> {
        let mut state = Map::new();
        state.insert("version_info".to_owned(), Value::from(&*version.push));
        state.insert(field.to_owned(), self.message(kind, version));
        state.insert("last_updated".to_owned(), Value::from(when(version.at)));
        state
    }

    fn add_refusal(&self, kind: Kind, record: &Record, item: &mut Map<String, Value>) {
        let Some(refusal) = &record.refused else { return };
        let error = json!({
            "failed_configuration": self.message(kind, &refusal.version),
            "last_update_attempt": when(refusal.version.at),
            "details": refusal.why,
            "version_info": &*refusal.version.push,
        });
        item.insert("error_state".to_owned(), error);
    }

    fn message(&self, kind: Kind, version: &Version) -> Value {
        match &self.descriptors {
            Some(descriptors) => descriptors.json(kind.url(), &version.bytes.bytes()),
            None => json!({ "@type": kind.url(), "value": BASE64.encode(version.bytes.bytes()) }),
        }
    }
}

/// Who this proxy told istiod that it is.
fn bootstrap(proxy: &Proxy) -> Section {
    let locality = &proxy.locality;
    let ip = proxy.ips.first().map(ToString::to_string).unwrap_or_default();
    let node = json!({
        "id": format!("sidecar~{ip}~{}.{}~{}", proxy.name, proxy.namespace, proxy.dns_domain),
        "metadata": proxy.metadata,
        "locality": { "region": locality.region, "zone": locality.zone, "sub_zone": locality.sub_zone },
        "user_agent_name": "istio-proxy",
    });
    Section { kind: "BootstrapConfigDump", fields: vec![("bootstrap", json!({ "node": node }))] }
}

/// Certificates and roots; keys are not shown.
fn secrets(published: &Published) -> Section {
    let type_url = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    let inline = |pem: String| json!({ "inline_bytes": BASE64.encode(pem) });
    let secrets = published.snapshot.secrets();
    let item = |name: &str, field: &str, content: Value| json!({ "name": name, "secret": { "@type": type_url, "name": name, field: content } });
    let chains = secrets.identities().map(|(name, identity)| {
        let pair = json!({
            "certificate_chain": inline(identity.pem()),
            "private_key": inline(REDACTED.to_owned()),
        });
        item(name, "tls_certificate", pair)
    });
    let roots = secrets
        .all_roots()
        .map(|(name, roots)| item(name, "validation_context", json!({ "trusted_ca": inline(roots.pem()) })));
    Section {
        kind: "SecretsConfigDump",
        fields: vec![
            ("dynamic_active_secrets", chains.chain(roots).collect()),
            ("dynamic_warming_secrets", Value::Array(Vec::new())),
        ],
    }
}

/// What only this proxy has to say.
fn own(published: &Published) -> Map<String, Value> {
    let mut errors: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for reject in &*published.rejects {
        errors.entry(&reject.resource).or_default().push(reject.to_string());
    }
    let own = json!({
        "version": published.version,
        "rejects": &published.rejects[..],
        "errors": errors,
        "inert": published.model.inert,
    });
    match own {
        Value::Object(own) => own,
        _ => Map::new(),
    }
}

fn when(at: SystemTime) -> String {
    let seconds = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    rfc3339(i64::try_from(seconds).unwrap_or(0))
}
