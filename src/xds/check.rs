//! What is refused although it can be read: parts that decide who may pass and that could not be enforced. Found before the
//! resource is accepted, so that the control plane hears of it and the version before stays.

use proxy_config::model::{Cluster, HttpFilter, Listener};
use proxy_config::xds::{self, Any, Material, Secret};
use proxy_config::{Reject, Severity};

use crate::tls::{Roots, Secrets};

/// What whoever serves says of a resource before it is accepted. This module does not know the data path, which compiles
/// policies and TLS contexts; each of these names what of a resource it could not enforce.
#[derive(Debug, Clone, Copy)]
pub struct Checks {
    /// Of a listener: policies, token filters, TLS settings of its chains.
    pub listener: fn(&Listener) -> Vec<Reject>,
    /// Of a cluster: TLS settings.
    pub cluster: fn(&Cluster) -> Vec<Reject>,
    /// Of a discovered filter with its name.
    pub filter: fn(&str, &HttpFilter) -> Vec<Reject>,
}

impl Checks {
    /// Nothing is found.
    pub const NONE: Self = Self { listener: |_| Vec::new(), cluster: |_| Vec::new(), filter: |_, _| Vec::new() };
}

/// Passes on what nothing speaks against.
pub(super) fn checked<T>(
    read: Result<xds::Resource<T>, Reject>,
    check: impl FnOnce(&T) -> Vec<Reject>,
) -> Result<xds::Resource<T>, Reject> {
    let resource = read?;
    match check(&resource.value).into_iter().next() {
        Some(reject) => Err(reject),
        None => Ok(resource),
    }
}

/// Key material that could not be used later is not accepted now.
pub(super) fn secret(any: &Any) -> Result<xds::Resource<Secret>, Reject> {
    checked(xds::secret(any), |secret| {
        let field = match secret.material {
            Material::Certificate { .. } => "tls_certificate",
            Material::Roots { .. } | Material::Domains(_) => "validation_context",
        };
        let used = Secrets::new().with_material(&secret.name, &secret.material);
        used.err().map(|why| reject(&format!("Secret {}", secret.name), field, why)).into_iter().collect()
    })
}

/// Certificates of CAs; one that cannot be read refuses all, so that nobody takes a part of a mesh's roots for the whole.
pub(super) fn anchors(any: &Any) -> Result<xds::Resource<Vec<String>>, Reject> {
    checked(xds::proxy_config(any), |said| {
        let wrong = |(at, pem): (usize, &String)| {
            let why = Roots::from_pem(pem.as_bytes()).err()?;
            Some(reject("ProxyConfig", &format!("ca_certificates_pem[{at}]"), why))
        };
        said.iter().enumerate().filter_map(wrong).collect()
    })
}

fn reject(resource: &str, field: &str, reason: String) -> Reject {
    let (resource, field) = (resource.to_owned(), field.to_owned());
    Reject { resource, place: None, field, reason, severity: Severity::Security, code: None }
}
