//! Route tables from what was said. What cannot be compiled is left out or answers 501, by name; its siblings serve.

use std::sync::Arc;

use http::header::HeaderValue;
use proxy_config::{model, re2};

use super::action::Action;
use super::action_compile::{action, cors, header_ops};
use super::cluster::Ids;
use super::compile::Sink;
use super::matcher::{HeaderMatch, QueryMatch};
use super::metadata::MetadataMatch;
use super::route::{Domains, PathRule, Route, RouteMatch, RouteTable, VirtualHost};
use super::{Name, template};

/// Compiles a table.
pub(super) fn table(said: &model::RouteTable, ids: &Ids<'_>, sink: &mut Sink<'_>) -> RouteTable {
    let virtual_hosts: Box<[VirtualHost]> = said.virtual_hosts.iter().map(|v| virtual_host(v, ids, sink)).collect();
    RouteTable {
        name: Arc::clone(&said.name),
        domains: domains(said, sink),
        asks_metadata: virtual_hosts.iter().flat_map(|v| &v.routes).any(|route| !route.matches.metadata.is_empty()),
        virtual_hosts,
        ignore_port: said.ignore_port_in_host_matching,
    }
}

fn virtual_host(said: &model::VirtualHost, ids: &Ids<'_>, sink: &mut Sink<'_>) -> VirtualHost {
    let routes = said.routes.iter().enumerate().filter_map(|(i, said_route)| {
        let at = format!("virtual_hosts[{}].routes[{i}]", said.name);
        route(said_route, ids, &mut sink.at(&at))
    });
    VirtualHost {
        name: Arc::clone(&said.name),
        routes: routes.collect(),
        include_attempt_count: said.include_request_attempt_count,
        domains: said.domains.iter().map(|domain| domain.as_str().into()).collect(),
    }
}

/// Sorts the domains by kind. A domain that two virtual hosts claim stays with the first.
fn domains(said: &model::RouteTable, sink: &mut Sink<'_>) -> Domains {
    let mut all = Domains::default();
    let (mut suffixes, mut prefixes) = (Vec::<(Box<str>, u32)>::new(), Vec::<(Box<str>, u32)>::new());
    for (index, vhost) in (0_u32..).zip(&said.virtual_hosts) {
        for domain in &vhost.domains {
            let name = domain.to_ascii_lowercase();
            let is_new = if name == "*" {
                all.any.replace(all.any.unwrap_or(index)).is_none()
            } else if let Some(suffix) = name.strip_prefix('*') {
                claim(&mut suffixes, suffix, index)
            } else if let Some(prefix) = name.strip_suffix('*') {
                claim(&mut prefixes, prefix, index)
            } else {
                let is_new = !all.exact.contains_key(name.as_str());
                if is_new {
                    all.exact.insert(name.as_str().into(), index);
                }
                is_new
            };
            if !is_new {
                let why = format!("domain {domain} is claimed twice; the first virtual host keeps it");
                sink.at(&format!("virtual_hosts[{}]", vhost.name)).error("domains", why);
            }
        }
    }
    for list in [&mut suffixes, &mut prefixes] {
        list.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
    }
    Domains { suffixes: suffixes.into(), prefixes: prefixes.into(), ..all }
}

fn claim(list: &mut Vec<(Box<str>, u32)>, text: &str, index: u32) -> bool {
    let is_new = list.iter().all(|(known, _)| &**known != text);
    if is_new {
        list.push((text.into(), index));
    }
    is_new
}

/// `None`: nobody knows which requests it takes, so it takes none.
fn route(said: &model::Route, ids: &Ids<'_>, sink: &mut Sink<'_>) -> Option<Route> {
    let matches = match matches(&said.matches) {
        Ok(matches) => matches,
        Err(why) => {
            sink.error("match", why);
            return None;
        }
    };
    let unsupported: Option<Name> = (!said.unsupported.is_empty()).then(|| said.unsupported.join(", ").into());
    if let Some(names) = &unsupported {
        sink.error("typed_per_filter_config", format!("{names} is not supported; requests get 501"));
    }
    let action = action(&said.action, ids, sink).unwrap_or_else(|why| {
        sink.error("action", format!("{why}; requests get 501"));
        Action::Unsupported(why.into())
    });
    Some(Route {
        name: Arc::clone(&said.name),
        matches,
        action,
        request_headers: header_ops(&said.request_headers, "request_headers", sink),
        response_headers: header_ops(&said.response_headers, "response_headers", sink),
        decorator: said.decorator.as_ref().and_then(|text| HeaderValue::from_str(text).ok()),
        fault: said.fault.clone().map(Arc::new),
        cors: said.cors.as_ref().and_then(|policy| cors(policy, sink)).map(Box::new),
        config: said.config.as_deref().map(Name::from),
        unsupported,
    })
}

fn matches(said: &model::RouteMatch) -> Result<RouteMatch, String> {
    Ok(RouteMatch {
        path: path(&said.path)?,
        case_sensitive: said.case_sensitive,
        headers: said.headers.iter().map(HeaderMatch::compile).collect::<Result<_, _>>()?,
        query: said.query.iter().map(QueryMatch::compile).collect::<Result<_, _>>()?,
        metadata: said.dynamic_metadata.iter().map(MetadataMatch::compile).collect::<Result<_, _>>()?,
        grpc: said.grpc,
    })
}

fn path(said: &model::PathMatch) -> Result<PathRule, String> {
    Ok(match said {
        model::PathMatch::Prefix(text) => PathRule::Prefix(text.as_str().into()),
        model::PathMatch::Exact(text) => PathRule::Exact(text.as_str().into()),
        model::PathMatch::Regex(text) => PathRule::Regex(Box::new(re2::full_match(text)?)),
        model::PathMatch::PathSeparatedPrefix(text) => PathRule::SegmentPrefix(text.as_str().into()),
        model::PathMatch::Template(text) => PathRule::Template(Box::new(template::compile(text)?)),
        model::PathMatch::Connect => PathRule::Connect,
    })
}
