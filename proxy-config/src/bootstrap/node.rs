//! Who the proxy says it is: an Envoy Node, or pilot-agent's environment, as one [`Node`].
//!
//! Nothing is read from the process here: variables come in as a map.

use std::collections::BTreeMap;
use std::net::IpAddr;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::r#type::v3::SemanticVersion;
use envoy_types::pb::google::protobuf as wkt;
use prost::Message;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::variables::Variables;
use crate::load::WhoAmI;
use crate::model::Locality;

/// What the proxy was told about itself; what is missing the objects complete.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Node {
    /// Name before the namespace in the node id (`payment-v2-0`).
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Addresses, the main one first.
    pub ips: Vec<IpAddr>,
    /// Domain of the id (`payments.svc.cluster.local`).
    pub dns_domain: String,
    /// Envoy's service cluster (`payment-service.payments`).
    pub service_cluster: String,
    /// Locality, when told.
    pub locality: Locality,
    /// Metadata, names without `ISTIO_META_`.
    pub metadata: Map<String, Value>,
}

impl Node {
    /// A metadata value as text, empty when absent.
    pub fn text(&self, name: &str) -> String {
        match self.metadata.get(name) {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
        }
    }

    /// Labels that the proxy brought along.
    pub fn labels(&self) -> BTreeMap<String, String> {
        string_map(self.metadata.get("LABELS"))
    }

    /// Labels that hold whatever the platform says.
    pub fn static_labels(&self) -> BTreeMap<String, String> {
        string_map(self.metadata.get("STATIC_LABELS"))
    }

    /// `sidecar~IP~NAME.NAMESPACE~DOMAIN`.
    pub fn id(&self) -> String {
        let ip = self.ips.first().map(ToString::to_string).unwrap_or_default();
        format!("sidecar~{ip}~{}.{}~{}", self.name, self.namespace, self.dns_domain)
    }

    /// The Node in protojson, as [`WhoAmI::Node`] takes it.
    pub fn protojson(&self) -> Value {
        serde_json::json!({
            "id": self.id(),
            "cluster": self.service_cluster,
            "metadata": self.metadata,
            "locality": {
                "region": self.locality.region,
                "zone": self.locality.zone,
                "sub_zone": self.locality.sub_zone,
            },
        })
    }

    /// `envoy.config.core.v3.Node` as a control plane gets it with the first request of a stream.
    ///
    /// The client is called what istiod's own sidecars are called: nothing that istiod sends depends on it, and what
    /// people match on is `ISTIO_VERSION`.
    pub fn encode(&self) -> Vec<u8> {
        let place = &self.locality;
        let told = |text: &str| wkt::Value { kind: Some(wkt::value::Kind::StringValue(text.to_owned())) };
        let build = core::BuildVersion {
            version: Some(SemanticVersion { major_number: LIKE_ENVOY.0, minor_number: LIKE_ENVOY.1, patch: 0 }),
            metadata: Some(wkt::Struct {
                fields: [("istio-proxy".to_owned(), told(env!("CARGO_PKG_VERSION")))].into(),
            }),
        };
        let node = core::Node {
            id: self.id(),
            cluster: self.service_cluster.clone(),
            metadata: Some(structure(&self.metadata)),
            locality: Some(core::Locality {
                region: place.region.clone(),
                zone: place.zone.clone(),
                sub_zone: place.sub_zone.clone(),
            }),
            user_agent_name: "envoy".to_owned(),
            user_agent_version_type: Some(core::node::UserAgentVersionType::UserAgentBuildVersion(build)),
            ..core::Node::default()
        };
        node.encode_to_vec()
    }
}

/// The Envoy whose features istiod may count on.
const LIKE_ENVOY: (u32, u32) = (1, 40);

fn structure(fields: &Map<String, Value>) -> wkt::Struct {
    wkt::Struct { fields: fields.iter().map(|(name, value)| (name.clone(), untyped(value))).collect() }
}

fn untyped(value: &Value) -> wkt::Value {
    use wkt::value::Kind;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(said) => Kind::BoolValue(*said),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Value::String(text) => Kind::StringValue(text.clone()),
        Value::Array(items) => Kind::ListValue(wkt::ListValue { values: items.iter().map(untyped).collect() }),
        Value::Object(fields) => Kind::StructValue(structure(fields)),
    };
    wkt::Value { kind: Some(kind) }
}

/// Reads what the proxy was told.
///
/// # Errors
/// A text that is no Node.
pub fn node(who: &WhoAmI) -> Result<Node, String> {
    match who {
        WhoAmI::Node(text) => from_protojson(text),
        WhoAmI::Env(variables) => Ok(from_environment(variables)),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Written {
    id: String,
    cluster: String,
    metadata: Map<String, Value>,
    locality: WrittenLocality,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WrittenLocality {
    region: String,
    zone: String,
    #[serde(alias = "subZone")]
    sub_zone: String,
}

fn from_protojson(text: &str) -> Result<Node, String> {
    let written: Written = serde_json::from_str(text).map_err(|e| format!("no Envoy Node in protojson: {e}"))?;
    let parts: Vec<&str> = written.id.split('~').collect();
    let part = |index: usize| parts.get(index).copied().unwrap_or_default();
    if !matches!(part(0), "sidecar" | "") {
        return Err(format!("node id {}: only sidecars are supported, not {}", written.id, part(0)));
    }
    let (name, namespace) = part(2).rsplit_once('.').unwrap_or_else(|| (part(2), ""));
    let mut node = Node {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        dns_domain: part(3).to_owned(),
        service_cluster: written.cluster,
        locality: Locality {
            region: written.locality.region,
            zone: written.locality.zone,
            sub_zone: written.locality.sub_zone,
        },
        metadata: written.metadata,
        ips: Vec::new(),
    };
    let said = node.text("NAMESPACE");
    if !said.is_empty() {
        node.namespace = said;
    }
    node.ips = addresses(&node.text("INSTANCE_IPS"), part(1));
    Ok(node)
}

fn from_environment(variables: &BTreeMap<String, String>) -> Node {
    let variable = |name: &str| variables.get(name).map(String::as_str).filter(|v| !v.is_empty());
    let first = |names: &[&str]| names.iter().find_map(|n| variable(n)).unwrap_or_default().to_owned();
    let metadata = told(&Variables(variables.clone()));
    let name = first(&["POD_NAME"]);
    let namespace = first(&["POD_NAMESPACE", "ISTIO_NAMESPACE"]);
    let mut node = Node { metadata, name, namespace, ..Node::default() };
    if node.name.is_empty() {
        node.name = node.text("WORKLOAD_NAME");
    }
    node.ips = addresses(&node.text("INSTANCE_IPS"), &first(&["INSTANCE_IP", "ISTIO_SVC_IP"]));
    node.dns_domain = first(&["DNS_DOMAIN"]);
    node.service_cluster = first(&["ISTIO_SERVICE"]);
    let labels = node.labels();
    let locality = ["topology.istio.io/locality", "istio-locality"].into_iter().find_map(|l| labels.get(l));
    if let Some(text) = locality {
        node.locality = parse_locality(&text.replace('.', "/"));
    }
    node
}

/// Metadata as far as variables tell it.
fn told(variables: &Variables) -> Map<String, Value> {
    let mut out = super::metadata::raw(&Map::new(), variables, &mut Vec::new());
    let labels = super::metadata::static_labels(variables);
    if !labels.is_empty() {
        let labels: Map<String, Value> = labels.into_iter().map(|(name, value)| (name, value.into())).collect();
        out.insert("LABELS".to_owned(), labels.clone().into());
        out.insert("STATIC_LABELS".to_owned(), labels.into());
    }
    for (field, variable) in
        [("NAME", "POD_NAME"), ("NAMESPACE", "POD_NAMESPACE"), ("SERVICE_ACCOUNT", "SERVICE_ACCOUNT")]
    {
        if let Some(value) = variables.said(variable) {
            out.insert(field.to_owned(), value.into());
        }
    }
    if let Some(config) = variables.said("PROXY_CONFIG").and_then(yaml_object) {
        out.insert("PROXY_CONFIG".to_owned(), config);
    }
    out
}

fn yaml_object(text: &str) -> Option<Value> {
    let (documents, _) = crate::yaml::parse(text);
    let value: Value = crate::yaml::read(documents.first()?, "", &crate::yaml::Notes::default()).ok()?;
    value.is_object().then_some(value)
}

fn string_map(value: Option<&Value>) -> BTreeMap<String, String> {
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    entries.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned()))).collect()
}

fn addresses(list: &str, main: &str) -> Vec<IpAddr> {
    let mut out: Vec<IpAddr> = Vec::new();
    for address in list.split(',').chain([main]).filter_map(|a| a.trim().parse().ok()) {
        if !out.contains(&address) {
            out.push(address);
        }
    }
    out
}

/// `region/zone/subzone`, each part optional.
pub(crate) fn parse_locality(text: &str) -> Locality {
    let mut parts = text.split('/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    Locality { region: next(), zone: next(), sub_zone: next() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_in_protojson() {
        let text = r#"{"id": "sidecar~10.1.0.2~payment-v2-0.payments~payments.svc.cluster.local",
            "cluster": "payment-service.payments", "locality": {"region": "r", "subZone": "s"},
            "metadata": {"NAMESPACE": "payments", "INSTANCE_IPS": "10.1.0.2,fd00::2", "LABELS": {"app": "p"},
                         "ENVOY_STATUS_PORT": 15021}}"#;
        let node = node(&WhoAmI::Node(text.to_owned())).expect("valid");
        assert_eq!((node.name.as_str(), node.namespace.as_str()), ("payment-v2-0", "payments"));
        assert_eq!(node.ips.len(), 2);
        assert_eq!((node.locality.region.as_str(), node.locality.sub_zone.as_str()), ("r", "s"));
        assert_eq!((node.labels()["app"].as_str(), node.text("ENVOY_STATUS_PORT").as_str()), ("p", "15021"));
        assert_eq!(node.id(), "sidecar~10.1.0.2~payment-v2-0.payments~payments.svc.cluster.local");
    }

    #[test]
    fn the_agents_environment() {
        let variables = [
            ("POD_NAME", "vm1"),
            ("POD_NAMESPACE", "payments"),
            ("ISTIO_SVC_IP", "10.0.1.5"),
            ("SERVICE_ACCOUNT", "sa"),
            ("ISTIO_META_NETWORK", "vm-network"),
            ("ISTIO_METAJSON_LABELS", r#"{"app": "p", "istio-locality": "r.z.s"}"#),
            ("PROXY_CONFIG", "concurrency: 2\ndiscoveryAddress: x:1\n"),
        ];
        let variables = variables.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        let node = node(&WhoAmI::Env(variables)).expect("valid");
        assert_eq!(node.id(), "sidecar~10.0.1.5~vm1.payments~");
        assert_eq!(node.locality, Locality { region: "r".into(), zone: "z".into(), sub_zone: "s".into() });
        assert_eq!(node.metadata["PROXY_CONFIG"]["concurrency"], 2);
        assert_eq!((node.text("SERVICE_ACCOUNT").as_str(), node.text("app").as_str()), ("sa", "p"));
        assert_eq!(node.static_labels()["app"], "p");
    }

    #[test]
    fn other_roles_are_refused() {
        let gateway = WhoAmI::Node(r#"{"id": "router~1.1.1.1~a.b~c"}"#.to_owned());
        assert!(node(&gateway).expect_err("a gateway").contains("router"));
    }
}
