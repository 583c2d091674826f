//! What goes over the stream, as far as istiod and we use it. Messages of `envoy.service.discovery.v3`.

use std::collections::BTreeMap;

use bytes::Bytes;
use proxy_config::xds::{Any, DiscoveryResponse};
pub use proxy_config::xds::{DiscoveryRequest, Status};

/// `DeltaDiscoveryRequest`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeltaDiscoveryRequest {
    /// An encoded `envoy.config.core.v3.Node`; on the first message of a stream.
    #[prost(bytes = "bytes", optional, tag = "1")]
    pub node: Option<Bytes>,
    /// Type.
    #[prost(string, tag = "2")]
    pub type_url: String,
    /// Names that are wanted from now on.
    #[prost(string, repeated, tag = "3")]
    pub resource_names_subscribe: Vec<String>,
    /// Names that are not wanted any more.
    #[prost(string, repeated, tag = "4")]
    pub resource_names_unsubscribe: Vec<String>,
    /// Names that are held already; istiod's resources have no versions, so the values are empty.
    #[prost(btree_map = "string, string", tag = "5")]
    pub initial_resource_versions: BTreeMap<String, String>,
    /// Which response this answers.
    #[prost(string, tag = "6")]
    pub response_nonce: String,
    /// Why it was not accepted.
    #[prost(message, optional, tag = "7")]
    pub error_detail: Option<Status>,
}

/// `Resource`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Resource {
    /// Version; istiod leaves it empty.
    #[prost(string, tag = "1")]
    pub version: String,
    /// The resource.
    #[prost(message, optional, tag = "2")]
    pub resource: Option<Any>,
    /// Name; empty for the name table.
    #[prost(string, tag = "3")]
    pub name: String,
}

/// `DeltaDiscoveryResponse`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeltaDiscoveryResponse {
    /// The push.
    #[prost(string, tag = "1")]
    pub system_version_info: String,
    /// New and changed ones.
    #[prost(message, repeated, tag = "2")]
    pub resources: Vec<Resource>,
    /// Type.
    #[prost(string, tag = "4")]
    pub type_url: String,
    /// What an acknowledgement names.
    #[prost(string, tag = "5")]
    pub nonce: String,
    /// Names that are gone.
    #[prost(string, repeated, tag = "6")]
    pub removed_resources: Vec<String>,
}

/// Something to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// On a delta stream.
    Delta(DeltaDiscoveryRequest),
    /// On a state-of-the-world stream.
    Sotw(DiscoveryRequest),
}

/// Something that came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// On a delta stream.
    Delta(DeltaDiscoveryResponse),
    /// On a state-of-the-world stream.
    Sotw(DiscoveryResponse),
}

impl From<DeltaDiscoveryResponse> for Response {
    fn from(response: DeltaDiscoveryResponse) -> Self {
        Self::Delta(response)
    }
}

impl From<DiscoveryResponse> for Response {
    fn from(response: DiscoveryResponse) -> Self {
        Self::Sotw(response)
    }
}

impl Request {
    /// Its type URL.
    pub fn type_url(&self) -> &str {
        match self {
            Self::Delta(request) => &request.type_url,
            Self::Sotw(request) => &request.type_url,
        }
    }

    /// The response that it answers; empty: none.
    pub fn nonce(&self) -> &str {
        match self {
            Self::Delta(request) => &request.response_nonce,
            Self::Sotw(request) => &request.response_nonce,
        }
    }

    /// Why that response was not accepted.
    pub fn error(&self) -> Option<&Status> {
        match self {
            Self::Delta(request) => request.error_detail.as_ref(),
            Self::Sotw(request) => request.error_detail.as_ref(),
        }
    }
}
