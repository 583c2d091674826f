//! Who a peer is, as proxies tell each other: in headers, in a frame on TCP, in baggage, in an endpoint's metadata.
//!
//! Everything here is pure: bytes in, a [`Workload`] out, and back. What a peer says of itself is not authenticated;
//! it is for labels and logs, never for policy.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use prost::Message as _;
use serde_json::Value as Json;

use crate::model::Locality;

/// Peers send with and without padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// Key of a peer's metadata in a frame, and the header's name.
const METADATA: &str = "x-envoy-peer-metadata";
/// Key of a peer's id in a frame, and the header's name.
const METADATA_ID: &str = "x-envoy-peer-metadata-id";

const STRUCT_URL: &str = "type.googleapis.com/google.protobuf.Struct";
const OWNER: &str = "kubernetes://apis/apps/v1/namespaces/";

const CANONICAL_NAME: &str = "service.istio.io/canonical-name";
const CANONICAL_REVISION: &str = "service.istio.io/canonical-revision";

/// What begins a frame on TCP; a 32-bit big-endian length follows, then an `Any`.
pub const FRAME_MAGIC: u32 = 0x3D23_0467;

/// What a proxy knows of a workload. An empty text means: not told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Workload {
    /// Name of the instance (of the pod).
    pub instance: String,
    /// Namespace.
    pub namespace: String,
    /// Name of the workload (of the Deployment).
    pub workload: String,
    /// What kind of workload it is.
    pub kind: Option<Kind>,
    /// Cluster id.
    pub cluster: String,
    /// Canonical service.
    pub service: String,
    /// Canonical revision.
    pub revision: String,
    /// Label `app`.
    pub app: String,
    /// Label `version`.
    pub version: String,
    /// Identity (SPIFFE id).
    pub identity: String,
    /// Region.
    pub region: String,
    /// Availability zone.
    pub zone: String,
    /// Further labels that were asked for.
    pub labels: BTreeMap<String, String>,
}

/// Kinds of workloads that have names of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `pod`
    Pod,
    /// `deployment`
    Deployment,
    /// `job`
    Job,
    /// `cronjob`
    CronJob,
}

impl Kind {
    /// `pod`, `deployment`, `job`, `cronjob`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Deployment => "deployment",
            Self::Job => "job",
            Self::CronJob => "cronjob",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Pod, Self::Deployment, Self::Job, Self::CronJob].into_iter().find(|kind| kind.name() == name)
    }
}

impl Workload {
    /// From node metadata. `additional`: labels to keep besides the standard ones.
    pub fn from_node(metadata: &serde_json::Map<String, Json>, locality: &Locality, additional: &[String]) -> Self {
        let mut out = Self::default();
        for (key, value) in metadata {
            match value {
                Json::String(text) => out.field(key, text),
                Json::Object(labels) if key == "LABELS" => {
                    let texts = labels.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_str()?)));
                    out.read_labels(texts, additional);
                }
                _ => {}
            }
        }
        out.read_owner(metadata.get("OWNER").and_then(Json::as_str).unwrap_or_default());
        for (said, known) in [(&mut out.region, &locality.region), (&mut out.zone, &locality.zone)] {
            if said.is_empty() {
                said.clone_from(known);
            }
        }
        out
    }

    /// From the bytes of a `google.protobuf.Struct`; `None` when they are none.
    pub fn from_bytes(bytes: &[u8], additional: &[String]) -> Option<Self> {
        Struct::decode(bytes).ok().map(|said| Self::from_struct(&said, additional))
    }

    /// From the value of `x-envoy-peer-metadata`: base64, with or without padding.
    pub fn from_header(value: &[u8], additional: &[String]) -> Option<Self> {
        Self::from_bytes(&BASE64.decode(value).ok()?, additional)
    }

    /// From the `Any` in a frame on TCP: the peer's id and what it says of itself. `None` when it is no such message.
    pub fn from_frame(bytes: &[u8], additional: &[String]) -> Option<(String, Option<Self>)> {
        let any = Any::decode(bytes).ok().filter(|any| any.type_url == STRUCT_URL)?;
        let said = Struct::decode(any.value.as_slice()).ok()?;
        let id = said.text(METADATA_ID).to_owned();
        let peer = match said.fields.get(METADATA).and_then(|value| value.kind.as_ref()) {
            Some(ValueKind::Struct(inner)) => Some(Self::from_struct(inner, additional)),
            _ => None,
        };
        Some((id, peer))
    }

    /// From `istio.workload` of an endpoint: `workload;namespace;service;revision;cluster`; `None` with fewer parts.
    pub fn from_endpoint(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split(';').collect();
        let [workload, namespace, service, revision, cluster, ..] = parts[..] else { return None };
        Some(Self {
            workload: workload.to_owned(),
            namespace: namespace.to_owned(),
            service: service.to_owned(),
            revision: revision.to_owned(),
            cluster: cluster.to_owned(),
            ..Self::default()
        })
    }

    /// From a `baggage` header. The names of application and service stand for each other where one is missing, and so do
    /// their versions.
    pub fn from_baggage(text: &str) -> Self {
        let mut out = Self::default();
        for (key, value) in text.split(',').filter_map(|pair| pair.split_once('=')) {
            let value = value.to_owned();
            match key.trim() {
                "k8s.namespace.name" => out.namespace = value,
                "k8s.cluster.name" => out.cluster = value,
                "k8s.instance.name" => out.instance = value,
                "cloud.region" => out.region = value,
                "cloud.availability_zone" => out.zone = value,
                "service.name" => out.service = value,
                "service.version" => out.revision = value,
                "app.name" => out.app = value,
                "app.version" => out.version = value,
                other => {
                    let kind = other.strip_prefix("k8s.").and_then(|rest| rest.strip_suffix(".name"));
                    if let Some(kind) = kind.and_then(Kind::named) {
                        out.kind = Some(kind);
                        out.workload = value;
                    }
                }
            }
        }
        mirror(&mut out.service, &mut out.app);
        mirror(&mut out.revision, &mut out.version);
        out
    }

    /// As a `baggage` header tells it.
    pub fn baggage(&self) -> String {
        let kind = self.kind.unwrap_or(Kind::Pod).name();
        let pairs = [
            (format!("k8s.{kind}.name"), &self.workload),
            ("service.name".to_owned(), &self.service),
            ("app.name".to_owned(), &self.app),
            ("service.version".to_owned(), &self.revision),
            ("app.version".to_owned(), &self.version),
            ("k8s.namespace.name".to_owned(), &self.namespace),
            ("k8s.cluster.name".to_owned(), &self.cluster),
            ("k8s.instance.name".to_owned(), &self.instance),
            ("cloud.region".to_owned(), &self.region),
            ("cloud.availability_zone".to_owned(), &self.zone),
        ];
        let repeats = |key: &str| {
            (key == "app.name" && self.app == self.service) || (key == "app.version" && self.version == self.revision)
        };
        let told = pairs.iter().filter(|(key, value)| !value.is_empty() && !repeats(key));
        told.map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
    }

    /// As the bytes of a `google.protobuf.Struct`, the same for the same workload.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.to_struct().encode_to_vec()
    }

    /// As the value of `x-envoy-peer-metadata`.
    pub fn to_header(&self) -> String {
        base64::engine::general_purpose::STANDARD.encode(self.to_bytes())
    }

    /// As a whole frame on TCP, magic and length included.
    pub fn to_frame(&self, id: &str) -> Vec<u8> {
        let mut fields = BTreeMap::from([(METADATA.to_owned(), Value::of(ValueKind::Struct(self.to_struct())))]);
        if !id.is_empty() {
            fields.insert(METADATA_ID.to_owned(), Value::text(id));
        }
        let any = Any { type_url: STRUCT_URL.to_owned(), value: Struct { fields }.encode_to_vec() }.encode_to_vec();
        let length = u32::try_from(any.len()).unwrap_or(u32::MAX);
        [&FRAME_MAGIC.to_be_bytes()[..], &length.to_be_bytes(), &any].concat()
    }

    /// A field by the name that expressions use (`workload`, `namespace`, `service`, …); `None`: no such field.
    pub fn get(&self, field: &str) -> Option<&str> {
        Some(match field {
            "name" => &self.instance,
            "namespace" => &self.namespace,
            "workload" => &self.workload,
            "type" => self.kind.map_or("unknown", Kind::name),
            "cluster" => &self.cluster,
            "service" => &self.service,
            "revision" => &self.revision,
            "app" => &self.app,
            "version" => &self.version,
            "identity" => &self.identity,
            "region" => &self.region,
            "availability_zone" => &self.zone,
            _ => return None,
        })
    }

    fn from_struct(said: &Struct, additional: &[String]) -> Self {
        let mut out = Self::default();
        for (key, value) in &said.fields {
            match &value.kind {
                Some(ValueKind::Text(text)) => out.field(key, text),
                Some(ValueKind::Struct(labels)) if key == "LABELS" => {
                    out.read_labels(labels.texts(), additional);
                }
                _ => {}
            }
        }
        out.read_owner(said.text("OWNER"));
        out
    }

    fn field(&mut self, key: &str, text: &str) {
        let field = match key {
            "NAME" => &mut self.instance,
            "NAMESPACE" => &mut self.namespace,
            "WORKLOAD_NAME" => &mut self.workload,
            "CLUSTER_ID" => &mut self.cluster,
            "IDENTITY" => &mut self.identity,
            "REGION" => &mut self.region,
            "AVAILABILITY_ZONE" => &mut self.zone,
            _ => return,
        };
        text.clone_into(field);
    }

    fn read_labels<'a>(&mut self, labels: impl Iterator<Item = (&'a str, &'a str)>, additional: &[String]) {
        let (mut app, mut version) = (None, None);
        for (name, value) in labels {
            match name {
                CANONICAL_NAME => value.clone_into(&mut self.service),
                CANONICAL_REVISION => value.clone_into(&mut self.revision),
                "app.kubernetes.io/name" => app = Some(value),
                "app.kubernetes.io/version" => version = Some(value),
                "app" => value.clone_into(&mut self.app),
                "version" => value.clone_into(&mut self.version),
                _ if additional.iter().any(|wanted| wanted == name) => {
                    self.labels.insert(name.to_owned(), value.to_owned());
                }
                _ => {}
            }
        }
        for (said, field) in [(app, &mut self.app), (version, &mut self.version)] {
            if let Some(said) = said {
                said.clone_into(field);
            }
        }
    }

    /// `…/deployments/NAME` tells the kind.
    fn read_owner(&mut self, owner: &str) {
        let kind = owner.strip_suffix(&self.workload).and_then(|rest| rest.strip_suffix("s/"));
        self.kind = kind.and_then(|rest| Kind::named(rest.rsplit('/').next()?));
    }

    fn to_struct(&self) -> Struct {
        let mut fields = BTreeMap::new();
        for (key, value) in [
            ("NAME", &self.instance),
            ("NAMESPACE", &self.namespace),
            ("WORKLOAD_NAME", &self.workload),
            ("CLUSTER_ID", &self.cluster),
            ("IDENTITY", &self.identity),
            ("REGION", &self.region),
            ("AVAILABILITY_ZONE", &self.zone),
        ] {
            if !value.is_empty() {
                fields.insert(key.to_owned(), Value::text(value));
            }
        }
        let standard = [
            (CANONICAL_NAME, &self.service),
            (CANONICAL_REVISION, &self.revision),
            ("app", &self.app),
            ("version", &self.version),
        ];
        let standard = standard.into_iter().filter(|(_, value)| !value.is_empty());
        let labels = standard.chain(self.labels.iter().map(|(name, value)| (name.as_str(), value)));
        let labels = Struct { fields: labels.map(|(name, value)| (name.to_owned(), Value::text(value))).collect() };
        fields.insert("LABELS".to_owned(), Value::of(ValueKind::Struct(labels)));
        if let Some(kind) = self.kind {
            let owner = format!("{OWNER}{}/{}s/{}", self.namespace, kind.name(), self.workload);
            fields.insert("OWNER".to_owned(), Value::text(&owner));
        }
        Struct { fields }
    }
}

/// Fills the empty one of two texts with the other.
fn mirror(one: &mut String, other: &mut String) {
    if one.is_empty() {
        one.clone_from(other);
    } else if other.is_empty() {
        other.clone_from(one);
    }
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    value: Vec<u8>,
}

/// `google.protobuf.Struct` with ordered fields, so that its bytes are always the same.
#[derive(Clone, PartialEq, prost::Message)]
struct Struct {
    #[prost(btree_map = "string, message", tag = "1")]
    fields: BTreeMap<String, Value>,
}

/// `google.protobuf.Value`.
#[derive(Clone, PartialEq, prost::Message)]
struct Value {
    #[prost(oneof = "ValueKind", tags = "1, 2, 3, 4, 5, 6")]
    kind: Option<ValueKind>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum ValueKind {
    #[prost(int32, tag = "1")]
    Null(i32),
    #[prost(double, tag = "2")]
    Number(f64),
    #[prost(string, tag = "3")]
    Text(String),
    #[prost(bool, tag = "4")]
    Flag(bool),
    #[prost(message, tag = "5")]
    Struct(Struct),
    #[prost(message, tag = "6")]
    List(List),
}

/// `google.protobuf.ListValue`.
#[derive(Clone, PartialEq, prost::Message)]
struct List {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

impl Value {
    fn of(kind: ValueKind) -> Self {
        Self { kind: Some(kind) }
    }

    fn text(text: &str) -> Self {
        Self::of(ValueKind::Text(text.to_owned()))
    }
}

impl Struct {
    fn texts(&self) -> impl Iterator<Item = (&str, &str)> {
        self.fields.iter().filter_map(|(name, value)| match &value.kind {
            Some(ValueKind::Text(text)) => Some((name.as_str(), text.as_str())),
            _ => None,
        })
    }

    fn text(&self, key: &str) -> &str {
        match self.fields.get(key).and_then(|value| value.kind.as_ref()) {
            Some(ValueKind::Text(text)) => text,
            _ => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn node() -> Workload {
        let metadata = json!({
            "NAME": "reviews-1", "NAMESPACE": "shop", "WORKLOAD_NAME": "reviews", "CLUSTER_ID": "c1", "ISTIO_VERSION": "1",
            "OWNER": "kubernetes://apis/apps/v1/namespaces/shop/deployments/reviews",
            "LABELS": {"app": "reviews", "version": "v1", "service.istio.io/canonical-name": "reviews", "role": "r", "x": "y"},
        });
        let locality = Locality { region: "r1".to_owned(), zone: "z1".to_owned(), sub_zone: String::new() };
        Workload::from_node(metadata.as_object().expect("an object"), &locality, &["role".to_owned()])
    }

    #[test]
    fn a_node_is_told_and_understood() {
        let node = node();
        assert_eq!((node.kind, node.labels.get("x")), (Some(Kind::Deployment), None));
        let additional = ["role".to_owned()];
        assert_eq!(Workload::from_header(node.to_header().as_bytes(), &additional), Some(node.clone()));
        let unpadded = node.to_header().trim_end_matches('=').to_owned();
        assert_eq!(Workload::from_header(unpadded.as_bytes(), &additional), Some(node.clone()));
        let frame = node.to_frame("sidecar~1");
        assert_eq!(frame[..4], FRAME_MAGIC.to_be_bytes());
        assert_eq!(u32::from_be_bytes([frame[4], frame[5], frame[6], frame[7]]) as usize, frame.len() - 8);
        assert_eq!(Workload::from_frame(&frame[8..], &additional), Some(("sidecar~1".to_owned(), Some(node.clone()))));
        assert_eq!(node.to_bytes(), node.clone().to_bytes());
        assert!(Workload::from_header(b"!", &[]).is_none() && Workload::from_bytes(&[0x0a, 9], &[]).is_none());
    }

    #[test]
    fn baggage_says_each_thing_once() {
        let text = node().baggage();
        assert_eq!(
            text,
            "k8s.deployment.name=reviews,service.name=reviews,app.version=v1,k8s.namespace.name=shop,\
             k8s.cluster.name=c1,k8s.instance.name=reviews-1,cloud.region=r1,cloud.availability_zone=z1"
        );
        let back = Workload::from_baggage(&text);
        assert_eq!((back.app.as_str(), back.revision.as_str(), back.kind), ("reviews", "v1", Some(Kind::Deployment)));
        assert_eq!(Workload::from_baggage("k8s.workload.name=x,=,k8s.,a"), Workload::default());
    }

    #[test]
    fn an_endpoint_tells_five_things_or_nothing() {
        let all = Workload::from_endpoint("w;n;s;r;c").expect("five");
        assert_eq!((all.workload.as_str(), all.cluster.as_str(), all.app.as_str()), ("w", "c", ""));
        assert!(["", "a;b", "a;;;b", "a;b;c;d"].iter().all(|text| Workload::from_endpoint(text).is_none()));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            Workload::from_bytes(&bytes, &[]);
            Workload::from_frame(&bytes, &[]);
            Workload::from_header(&bytes, &[]);
            Workload::from_baggage(&String::from_utf8_lossy(&bytes));
        }
    }
}
