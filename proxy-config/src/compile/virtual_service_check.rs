//! What a VirtualService asks for that cannot be served as said; everything found here is told, nothing is dropped
//! silently.

use super::route_action;
use super::virtual_services::Routes;
use crate::istio::virtual_service::{HttpFault, HttpRoute, RouteDestination};
use crate::model::{Reject, RouteAction, Severity};

/// Findings of one VirtualService, with field paths.
pub fn check(routes: &Routes) -> Vec<Reject> {
    let mut found = Vec::new();
    let mut tell = |field: String, reason: String, severity: Severity| {
        found.push(Reject {
            resource: format!("VirtualService {}/{}", routes.namespace, routes.name),
            place: None,
            field,
            reason,
            severity,
            code: None,
        });
    };
    for (index, route) in routes.spec.http.iter().enumerate() {
        http(route, &mut |field, reason, severity| tell(format!("spec.http[{index}]{field}"), reason, severity));
    }
    for (index, route) in routes.spec.tcp.iter().enumerate() {
        if let Some(reason) = weights(&route.route) {
            tell(format!("spec.tcp[{index}].route"), reason, Severity::Error);
        }
    }
    for (index, route) in routes.spec.tls.iter().enumerate() {
        if let Some(reason) = weights(&route.route) {
            tell(format!("spec.tls[{index}].route"), reason, Severity::Error);
        }
    }
    found
}

fn http(route: &HttpRoute, tell: &mut dyn FnMut(&str, String, Severity)) {
    if let Some(redirect) = &route.redirect
        && let RouteAction::Unsupported(what) = route_action::redirect(redirect, 0)
    {
        tell(".redirect", format!("{what} is none of 301, 302, 303, 307, 308: requests get 501"), Severity::Error);
    }
    if let Some(response) = &route.direct_response
        && let RouteAction::Unsupported(what) = route_action::direct(response)
    {
        tell(".directResponse", format!("{what}: requests get 501"), Severity::Error);
    }
    let forwards = route.redirect.is_none() && route.direct_response.is_none();
    let weight: u32 = route.route.iter().map(|r| r.weight).sum();
    if forwards && route.route.is_empty() {
        tell(".route", "no destination, redirect or direct response: requests get 501".to_owned(), Severity::Error);
    } else if forwards && route.route.len() > 1 && weight == 0 {
        tell(".route", "several destinations whose weights are all zero".to_owned(), Severity::Error);
    }
    if let Some(f) = &route.fault {
        fault(f, tell);
    }
}

fn fault(f: &HttpFault, tell: &mut dyn FnMut(&str, String, Severity)) {
    if let Some(delay) = &f.delay {
        if delay.exponential_delay.is_some() {
            tell(".fault.delay", "exponentialDelay was never supported by Istio".to_owned(), Severity::Error);
        } else if delay.percentage.is_none() && delay.percent == 0 {
            tell(".fault.delay", "without percentage no request is delayed".to_owned(), Severity::Warning);
        }
    }
    let Some(abort) = &f.abort else { return };
    if abort.http2_error.is_some() {
        tell(".fault.abort", "http2Error was never supported by Istio".to_owned(), Severity::Error);
    } else if let Some(status) = abort.grpc_status.as_deref().filter(|s| route_action::grpc_code(s).is_none()) {
        tell(".fault.abort.grpcStatus", format!("{status} is no gRPC status"), Severity::Error);
    } else if abort.percentage.is_none() {
        tell(".fault.abort", "without percentage no request is aborted".to_owned(), Severity::Warning);
    }
}

fn weights(routes: &[RouteDestination]) -> Option<String> {
    let weight: u32 = routes.iter().map(|r| r.weight).sum();
    if routes.is_empty() {
        return Some("no destination: the route is left out".to_owned());
    }
    (routes.len() > 1 && weight == 0).then(|| "several destinations whose weights are all zero".to_owned())
}
