//! Inbound ports that a Sidecar declares: they replace those of the Services.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::services::named;
use super::{Ingress, Protocol, Provider, Proxy, Resolution, Service, ServicePort, ServiceTarget, TargetPort};
use crate::istio::sidecar::{self, ServerTls};
use crate::model::Address;

/// Targets of the ingress listeners of the Sidecar `namespace/name`; `own` are the Services' targets, `uncaptured` a proxy
/// that must listen for all it serves. What cannot be served is told by its field and reason, and whether it endangers.
pub(crate) fn targets(
    listeners: &[sidecar::Ingress],
    (namespace, name): (&str, &str),
    own: &[ServiceTarget],
    (proxy, uncaptured): (&Proxy, bool),
    tell: &mut dyn FnMut(String, String, bool),
) -> Vec<ServiceTarget> {
    let host = format!("{name}.{namespace}");
    let mut out = Vec::new();
    for (index, said) in listeners.iter().enumerate() {
        let field = format!("spec.ingress[{index}]");
        if let Some(reason) = said.tls.as_ref().and_then(unusable) {
            tell(format!("{field}.tls"), reason.to_owned(), true);
        }
        let endpoint = match endpoint(&said.default_endpoint, proxy) {
            Ok(endpoint) => endpoint,
            Err(reason) => {
                tell(format!("{field}.defaultEndpoint"), reason, false);
                continue;
            }
        };
        let number = said.port.number;
        let serving = own.iter().find(|t| t.target_port == number).map(|t| Arc::clone(&t.service));
        let bind = match said.bind.as_str() {
            "" => proxy.ips.first().map(IpAddr::to_string).unwrap_or_default(),
            bind => bind.to_owned(),
        };
        let ingress = Ingress {
            bind,
            host: host.clone(),
            object: format!("{namespace}/{name}"),
            endpoint,
            pool: said.connection_pool.clone(),
            served: serving.is_some(),
            bound: uncaptured || said.capture_mode == "NONE",
            tls: said.tls.clone(),
        };
        let protocol = named(&said.port.protocol);
        out.push(ServiceTarget {
            service: serving.unwrap_or_else(|| Arc::new(stand_in(&host, namespace, name))),
            port: ServicePort { name: said.port.name.clone(), number, protocol, target: TargetPort::Number(number) },
            target_port: number,
            ingress: Some(Arc::new(ingress)),
        });
    }
    out.retain(|t| t.port.protocol != Protocol::Udp);
    out
}

/// Why no handshake could be what was asked for; plaintext in its place would be worse than nothing.
fn unusable(said: &ServerTls) -> Option<&'static str> {
    if !said.credential_name.is_empty() {
        return Some("credentialName is not supported: name files, as serverCertificate and privateKey");
    }
    if !said.ca_crl.is_empty() {
        return Some("caCrl is not supported");
    }
    match said.mode.as_str() {
        "SIMPLE" | "MUTUAL" if said.server_certificate.is_empty() || said.private_key.is_empty() => {
            Some("needs serverCertificate and privateKey")
        }
        "MUTUAL" if said.ca_certificates.is_empty() => Some("mode MUTUAL needs caCertificates"),
        "SIMPLE" | "MUTUAL" => None,
        _ => Some("a Sidecar's mode is SIMPLE or MUTUAL"),
    }
}

/// Where the application listens: loopback or the proxy's own address with a port, or a socket's path. Nothing said
/// is where the caller dialled.
fn endpoint(said: &str, proxy: &Proxy) -> Result<Option<Address>, String> {
    if said.is_empty() {
        return Ok(None);
    }
    if let Some(path) = said.strip_prefix("unix://") {
        return Ok(Some(Address::Pipe(path.to_owned())));
    }
    let wrong = || format!("{said} is none of 127.0.0.1:PORT, [::1]:PORT, 0.0.0.0:PORT, [::]:PORT, unix://PATH");
    let address: SocketAddr = said.parse().map_err(|_| wrong())?;
    let ip = address.ip();
    if ip.is_unspecified() {
        let own = proxy.ips.iter().find(|own| own.is_ipv4() == ip.is_ipv4());
        return own.map(|own| Some(Address::Socket(SocketAddr::new(*own, address.port())))).ok_or_else(wrong);
    }
    if ip.is_loopback() { Ok(Some(Address::Socket(address))) } else { Err(wrong()) }
}

/// A port that no Service explains belongs to the Sidecar itself.
fn stand_in(host: &str, namespace: &str, name: &str) -> Service {
    Service {
        hostname: host.to_owned(),
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        addresses: Vec::new(),
        ports: Vec::new(),
        resolution: Resolution::ClientSideLb,
        mesh_external: false,
        headless: false,
        provider: Provider::External,
        selector: BTreeMap::new(),
        labels: BTreeMap::new(),
        export_to: Vec::new(),
        service_accounts: Vec::new(),
        external_name: None,
        node_local: false,
        traffic_distribution: String::new(),
        publish_not_ready: false,
        created: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        let proxy = Proxy { ips: vec![IpAddr::from([10, 0, 0, 1])], ..Proxy::default() };
        let of = |said| endpoint(said, &proxy);
        assert_eq!(of(""), Ok(None));
        assert_eq!(of("127.0.0.1:80"), Ok(Some(Address::Socket(([127, 0, 0, 1], 80).into()))));
        assert_eq!(of("0.0.0.0:80"), Ok(Some(Address::Socket(([10, 0, 0, 1], 80).into()))));
        assert_eq!(of("unix:///a/b"), Ok(Some(Address::Pipe("/a/b".to_owned()))));
        for wrong in ["[::]:80", "1.2.3.4:80", "localhost:80", "80"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
