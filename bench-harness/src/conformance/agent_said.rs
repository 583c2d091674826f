//! What a client says on a discovery stream, in a shape that can be compared.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::google::protobuf as wkt;
use istio_proxy::xds::{HEALTH, Request, Status};
use prost::Message;
use serde_json::{Map, Value, json};

/// Metadata that the library says by itself: who speaks and how is its affair.
const OWN: [&str; 5] = [":authority", "content-type", "user-agent", "te", "grpc-accept-encoding"];

/// What was said on a stream so far.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// Which stream, counted from 1; 0: none.
    pub(super) stream: usize,
    /// Whether a certificate is expected; taken when it was looked at.
    pub(super) certified: Option<bool>,
    counts: BTreeMap<String, usize>,
    order: Vec<String>,
}

impl Said {
    /// Nothing yet.
    pub(super) fn new(stream: usize) -> Self {
        Self { stream, ..Self::default() }
    }

    /// Messages like this one so far: questions of a type, or answers.
    pub(super) fn count(&self, request: &Request) -> usize {
        self.counts.get(&like(request)).copied().unwrap_or(0)
    }

    /// One more.
    pub(super) fn add(&mut self, request: &Request) {
        let url = request.type_url();
        if request.nonce().is_empty() && self.count(request) == 0 && url != HEALTH {
            self.order.push(short(url).to_owned());
        }
        *self.counts.entry(like(request)).or_default() += 1;
    }

    /// Types in the order in which they were asked for.
    pub(super) fn order(&self) -> &[String] {
        &self.order
    }

    /// Nothing was said.
    pub(super) fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Messages beyond those that were said.
    pub(super) fn extra<'a>(&self, heard: &[&'a Request]) -> Vec<&'a Request> {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        let more = heard.iter().copied().filter(|request| {
            let count = counts.entry(like(request)).or_default();
            *count += 1;
            *count > self.count(request)
        });
        more.collect()
    }

    /// Where the next message like this one stands.
    pub(super) fn field(&self, request: &Request) -> String {
        self.name(&format!("{}[{}]", like(request), self.count(request)))
    }

    /// Something about this stream.
    pub(super) fn name(&self, field: &str) -> String {
        format!("stream[{}].{field}", self.stream)
    }
}

/// Questions and answers of a type, apart: how they interleave is nobody's rule.
fn like(request: &Request) -> String {
    let kind = if request.nonce().is_empty() { "asks" } else { "answers" };
    format!("{}.{kind}", short(request.type_url()))
}

fn short(url: &str) -> &str {
    url.rsplit('.').next().unwrap_or(url)
}

/// A message but its node; names in their order.
pub(super) fn request(of: &Request) -> Value {
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort();
        json!(names)
    };
    let status = |status: &Option<Status>| {
        status.as_ref().map_or(Value::Null, |status| json!({"code": status.code, "message": status.message}))
    };
    match of {
        Request::Delta(of) => json!({
            "subscribe": sorted(&of.resource_names_subscribe),
            "unsubscribe": sorted(&of.resource_names_unsubscribe),
            "held": of.initial_resource_versions,
            "nonce": of.response_nonce,
            "error_detail": status(&of.error_detail),
        }),
        Request::Sotw(of) => json!({
            "version_info": of.version_info,
            "resource_names": sorted(&of.resource_names),
            "nonce": of.response_nonce,
            "error_detail": status(&of.error_detail),
        }),
    }
}

/// The node of a message, if it has one.
pub(super) fn node(of: &Request) -> Option<Value> {
    let bytes = match of {
        Request::Delta(of) => of.node.clone()?,
        Request::Sotw(of) => of.node.clone()?,
    };
    let node = core::Node::decode(bytes).ok()?;
    let build = match &node.user_agent_version_type {
        Some(core::node::UserAgentVersionType::UserAgentBuildVersion(build)) => {
            let version = build.version.as_ref().map(|v| format!("{}.{}.{}", v.major_number, v.minor_number, v.patch));
            json!({"version": version, "metadata": build.metadata.as_ref().map(fields)})
        }
        Some(core::node::UserAgentVersionType::UserAgentVersion(version)) => json!(version),
        None => Value::Null,
    };
    let place = node.locality.unwrap_or_default();
    Some(json!({
        "id": node.id,
        "cluster": node.cluster,
        "metadata": node.metadata.as_ref().map(fields),
        "locality": {"region": place.region, "zone": place.zone, "sub_zone": place.sub_zone},
        "user_agent_name": node.user_agent_name,
        "user_agent_build_version": build,
        "extensions": node.extensions.len(),
        "client_features": node.client_features,
    }))
}

fn fields(of: &wkt::Struct) -> Value {
    Value::Object(of.fields.iter().map(|(name, value)| (name.clone(), plain(value))).collect())
}

fn plain(of: &wkt::Value) -> Value {
    use wkt::value::Kind;
    match of.kind.as_ref() {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(said)) => json!(said),
        Some(Kind::NumberValue(number)) => json!(number),
        Some(Kind::StringValue(text)) => json!(text),
        Some(Kind::ListValue(list)) => list.values.iter().map(plain).collect(),
        Some(Kind::StructValue(of)) => fields(of),
    }
}

/// Metadata that was received.
pub(super) fn metadata(headers: &http::HeaderMap) -> Value {
    let mut out = Map::new();
    for (name, value) in headers.iter().filter(|(name, _)| !OWN.contains(&name.as_str())) {
        let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
        let all = out.entry(name.as_str()).or_insert_with(|| json!([]));
        all.as_array_mut().expect("made as one").push(json!(text));
    }
    Value::Object(out)
}

/// Metadata that was recorded.
pub(super) fn recorded_metadata(of: &Value) -> Value {
    let all = of.as_object().into_iter().flatten().filter(|(name, _)| !OWN.contains(&name.as_str()));
    all.map(|(name, value)| (name.clone(), value.clone())).collect()
}
