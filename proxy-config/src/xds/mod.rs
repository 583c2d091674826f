//! Envoy resources → [`Model`]: the mouth that istiod feeds.
//!
//! One resource becomes one entry or one [`Reject`]; a rejected one never takes its siblings with it. Parts of a
//! resource that we do not do stay in it under their name (`Unsupported`), so that the data path refuses what
//! passes them; a security part is noted with [`Severity::Security`], for which a stream answers NACK. What was
//! set and not read is listed by `Message.field`, see [`Decoded::unread`].
//!
//! ```
//! use proxy_config::xds::{XdsBundle, decode};
//!
//! let decoded = decode(&XdsBundle { responses: vec![bytes::Bytes::from_static(b"\xff")] });
//! assert_eq!(decoded.model.rejects.len(), 1);
//! ```

mod access_log;
mod alike;
mod cluster;
mod cluster_http;
mod context;
mod endpoint;
mod http;
mod http_filter;
mod jwt;
mod listener;
mod matcher;
mod messages;
mod names;
mod network_filter;
mod rbac;
#[cfg(test)]
mod robustness;
mod route;
mod route_action;
pub(crate) mod secret;
mod tls;
mod tracing;
mod value;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

pub use self::alike::Alike;
use self::context::{Fault, Read, Reader, type_name};
pub use self::messages::{Any, DiscoveryRequest, DiscoveryResponse, Status};
pub use self::secret::{Material, Secret};
pub(crate) use self::value::duration_text;
#[cfg(doc)]
use crate::model::Severity;
use crate::model::{Cluster, Endpoints, HttpFilter, Listener, Model, Name, NameInfo, Reject, RouteTable};

/// Recorded responses, in any order and of any type.
#[derive(Debug, Clone, Default)]
pub struct XdsBundle {
    /// Binary `DiscoveryResponse`s.
    pub responses: Vec<Bytes>,
}

/// A model with the account of what its resources said besides.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Decoded {
    /// What was read.
    pub model: Model,
    /// Fields that were set and not read, as `Message.field`; `Message.12` when the message's type does not know it.
    pub unread: BTreeSet<String>,
}

/// One resource, read.
#[derive(Debug, Clone, PartialEq)]
pub struct Resource<T> {
    /// What it says.
    pub value: T,
    /// Parts that are not served as said. One of [`Severity::Security`] means that a stream must refuse the resource.
    pub notes: Vec<Reject>,
    /// Parts that are known and have no effect here.
    pub inert: BTreeSet<String>,
    /// Fields that were set and not read, see [`Decoded::unread`].
    pub unread: BTreeSet<String>,
    /// Filters of a listener that come by extension discovery, by the name to subscribe to.
    pub extensions: BTreeSet<String>,
}

/// HTTP filters that came by extension discovery (ECDS), by name.
pub type Extensions = BTreeMap<String, HttpFilter>;

/// The model that recorded responses make together. See [`decode`].
pub fn from_xds(bundle: &XdsBundle) -> Model {
    decode(bundle).model
}

/// Reads recorded responses; what cannot be read is among the model's rejects. Of two resources with one name the
/// later stays.
pub fn decode(bundle: &XdsBundle) -> Decoded {
    let mut out = Decoded::default();
    let mut resources = Vec::new();
    for (i, bytes) in bundle.responses.iter().enumerate() {
        match DiscoveryResponse::decode(Bytes::clone(bytes)) {
            Ok(response) => resources.extend(response.resources),
            Err(e) => out.model.rejects.push(Fault::new(e.to_string()).into_reject(format!("DiscoveryResponse {i}"))),
        }
    }
    // Listeners refer to extensions by name.
    let mut extensions = Extensions::new();
    resources.retain(|any| {
        if type_name(&any.type_url) != EXTENSION {
            return true;
        }
        out.keep(extension(any), |_, (name, filter)| {
            extensions.insert(name, filter);
        });
        false
    });
    let mut alike = Alike::default();
    for any in &resources {
        out.add(any, &extensions, &mut alike);
    }
    out
}

impl Decoded {
    fn add(&mut self, any: &Any, extensions: &Extensions, alike: &mut Alike) {
        match type_name(&any.type_url) {
            LISTENER => self.keep(listener(any, extensions), |m, v| {
                m.listeners.insert(Name::clone(&v.name), Arc::new(v));
            }),
            ROUTES => self.keep(route_table(any), |m, v| {
                m.routes.insert(Name::clone(&v.name), Arc::new(v));
            }),
            CLUSTER => self.keep(cluster(any), |m, mut v| {
                alike.cluster(&mut v);
                m.clusters.insert(Name::clone(&v.name), Arc::new(v));
            }),
            ENDPOINTS => self.keep(endpoints(any), |m, mut v| {
                alike.endpoints(&mut v);
                m.endpoints.insert(Name::clone(&v.name), Arc::new(v));
            }),
            NAMES => self.keep(names(any), |m, v| m.names = v.into()),
            other => {
                let fault = Fault::new("unknown resource type");
                self.model.rejects.push(fault.into_reject(other.to_owned()));
            }
        }
    }

    fn keep<T>(&mut self, read: Result<Resource<T>, Reject>, put: impl FnOnce(&mut Model, T)) {
        match read {
            Ok(resource) => {
                self.model.rejects.extend(resource.notes);
                self.model.inert.extend(resource.inert);
                self.unread.extend(resource.unread);
                put(&mut self.model, resource.value);
            }
            Err(reject) => self.model.rejects.push(reject),
        }
    }
}

const LISTENER: &str = "envoy.config.listener.v3.Listener";
const ROUTES: &str = "envoy.config.route.v3.RouteConfiguration";
const CLUSTER: &str = "envoy.config.cluster.v3.Cluster";
const ENDPOINTS: &str = "envoy.config.endpoint.v3.ClusterLoadAssignment";
const EXTENSION: &str = "envoy.config.core.v3.TypedExtensionConfig";
const NAMES: &str = "istio.networking.nds.v1.NameTable";

/// Reads a listener; `extensions` are the filters that it may refer to by name.
///
/// # Errors
/// A [`Reject`] with the field that cannot be read.
pub fn listener(any: &Any, extensions: &Extensions) -> Result<Resource<Listener>, Reject> {
    read(any, |message, reader| listener::listener(message, extensions, reader))
}

/// Reads a route table.
///
/// # Errors
/// A [`Reject`] with the field that cannot be read.
pub fn route_table(any: &Any) -> Result<Resource<RouteTable>, Reject> {
    read(any, route::table)
}

/// Reads a cluster.
///
/// # Errors
/// A [`Reject`] with the field that cannot be read.
pub fn cluster(any: &Any) -> Result<Resource<Cluster>, Reject> {
    read(any, cluster::cluster)
}

/// Reads a load assignment.
///
/// # Errors
/// A [`Reject`] with the field that cannot be read.
pub fn endpoints(any: &Any) -> Result<Resource<Endpoints>, Reject> {
    read(any, endpoint::endpoints)
}

/// Reads the mesh's name table.
///
/// # Errors
/// A [`Reject`] when the message is malformed.
pub fn names(any: &Any) -> Result<Resource<BTreeMap<Name, NameInfo>>, Reject> {
    let mut reader = Reader { resource: "NameTable".to_owned(), ..Reader::default() };
    let result = reader.open(&any.value).and_then(|table| names::table(table, &mut reader));
    reader.close(result)
}

/// Reads the settings of a running proxy (PCDS): the certificates of further CAs that the mesh trusts, PEM, each as it was
/// said.
///
/// # Errors
/// A [`Reject`] when the message is malformed.
pub fn proxy_config(any: &Any) -> Result<Resource<Vec<String>>, Reject> {
    let mut reader = Reader { resource: "ProxyConfig".to_owned(), ..Reader::default() };
    let result = reader.open::<messages::ProxyConfig>(&any.value).map(|said| said.ca_certificates_pem);
    reader.close(result)
}

/// Reads key material, of a control plane's stream (`kubernetes://…`) or of a socket on this machine.
///
/// # Errors
/// A [`Reject`] when it is malformed or of a kind that is not used.
pub fn secret(any: &Any) -> Result<Resource<Secret>, Reject> {
    let mut reader = Reader { resource: "Secret".to_owned(), ..Reader::default() };
    let result = match reader.open(&any.value) {
        Ok(message) => secret::secret(message, &mut reader),
        Err(fault) => Err(fault),
    };
    reader.close(result)
}

/// Reads an HTTP filter with the name by which listeners ask for it.
///
/// # Errors
/// A [`Reject`] when the message is malformed.
pub fn extension(any: &Any) -> Result<Resource<(String, HttpFilter)>, Reject> {
    read(any, http_filter::extension)
}

fn read<M, T>(any: &Any, decode: impl FnOnce(M, &mut Reader) -> Read<T>) -> Result<Resource<T>, Reject>
where
    M: Message + prost::Name + Default + Named,
{
    let mut reader = Reader { resource: M::NAME.to_owned(), ..Reader::default() };
    let result = match reader.open::<M>(&any.value) {
        Ok(message) => {
            reader.resource = format!("{} {}", M::NAME, message.resource_name());
            decode(message, &mut reader)
        }
        Err(fault) => Err(fault),
    };
    reader.close(result)
}

impl Reader {
    fn close<T>(self, result: Read<T>) -> Result<Resource<T>, Reject> {
        let Self { resource, notes, inert, unread, extensions } = self;
        let value = result.map_err(|fault| fault.into_reject(resource))?;
        Ok(Resource { value, notes, inert, unread, extensions })
    }
}

/// Where a resource has its name.
trait Named {
    fn resource_name(&self) -> &str;
}

macro_rules! named {
    ($($module:ident :: $message:ident . $field:ident),* $(,)?) => {$(
        impl Named for envoy_types::pb::envoy::config::$module::v3::$message {
            fn resource_name(&self) -> &str {
                &self.$field
            }
        }
    )*};
}

named! {
    listener::Listener.name,
    route::RouteConfiguration.name,
    cluster::Cluster.name,
    endpoint::ClusterLoadAssignment.cluster_name,
    core::TypedExtensionConfig.name,
}
