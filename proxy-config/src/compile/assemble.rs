//! Listeners and routes of one proxy, put into its model; what cannot be served as said is told by name.

use std::sync::Arc;

use super::view::View;
use super::{inbound, listener, route, virtual_service_check};
use crate::istio::peer_authentication::Mode;
use crate::model::{Model, Name, Reject, Severity};
use crate::registry::{Provider, Resolution};

/// Adds every listener and every route table that a listener asks for.
pub fn fill(view: &View<'_>, model: &mut Model) {
    let mut listeners = listener::listeners(view);
    for name in listener::route_names(&listeners) {
        if let Some(table) = route::table(view, &name) {
            model.routes.insert(name, Arc::new(table));
        }
    }
    listeners.extend(inbound::listeners(view));
    model.listeners.extend(listeners.into_iter().map(|l| (Name::clone(&l.name), Arc::new(l))));
    model.rejects.extend(view.virtual_services.iter().flat_map(virtual_service_check::check));
    unsupported(view, &mut model.rejects);
}

fn unsupported(view: &View<'_>, rejects: &mut Vec<Reject>) {
    let mut tell = |resource: String, field: &str, reason: &str, severity| {
        rejects.push(Reject {
            resource,
            place: None,
            field: field.to_owned(),
            reason: reason.to_owned(),
            severity,
            code: None,
        });
    };
    for target in view.targets {
        let Some(ingress) = target.ingress.as_ref().filter(|i| i.tls.is_some()) else { continue };
        if view.mtls.port(target.target_port) != Mode::Disable {
            let reason =
                format!("port {}: has no effect unless a PeerAuthentication DISABLEs mTLS there", target.target_port);
            tell(format!("Sidecar {}", ingress.object), "spec.ingress.tls", &reason, Severity::Warning);
        }
    }
    for service in view.services.iter().filter(|s| s.resolution == Resolution::DynamicDns) {
        let reason = "DYNAMIC_DNS is not supported yet: requests have no healthy upstream";
        let name = format!("ServiceEntry {}/{}", service.namespace, service.name);
        tell(name, "spec.resolution", reason, Severity::Error);
    }
    for service in view.services.iter().filter(|s| s.provider == Provider::Kubernetes && s.addresses.is_empty()) {
        let opaque = service.ports.iter().filter(|p| !p.protocol.is_http());
        let ports: Vec<String> = opaque.map(|p| p.number.to_string()).collect();
        if service.resolution == Resolution::ClientSideLb && !ports.is_empty() {
            let reason =
                format!("without clusterIP TCP ports {} are one listener per port for all services", ports.join(", "));
            let name = format!("Service {}/{}", service.namespace, service.name);
            tell(name, "spec.clusterIP", &reason, Severity::Warning);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Mesh, port, service, web};
    use super::*;
    use crate::registry::Protocol;

    #[test]
    fn everything_has_its_place() {
        let mut mesh = Mesh::new(vec![web(), service("bare", None, vec![port("tcp", 5000, Protocol::Tcp)])]);
        mesh.route("r", "{hosts: [web], http: [{redirect: {redirectCode: 306}}]}");
        let mut model = Model::default();
        mesh.with_view(|v| fill(v, &mut model));
        assert_eq!(model.listeners.len(), 7);
        assert_eq!(model.routes.len(), 3);
        let told: Vec<String> = model.rejects.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 2, "{told:?}");
        assert!(told[0].starts_with("VirtualService app/r: spec.http[0].redirect"));
    }
}
