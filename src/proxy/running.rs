//! Requests that go on while policy changes, judged again by what is left of their heads: websockets at once, gRPC streams
//! with their next message. A policy that asks for headers or tokens has judged a request once and for all: nobody keeps
//! those. Ordinary answers are given to their end.

use std::net::IpAddr;
use std::sync::Arc;

use http::header::{HeaderMap, HeaderValue};
use http::uri::{PathAndQuery, Scheme};
use http::{HeaderName, Method};

use super::http::HttpConn;
use super::live::{Now, chain_now};
use crate::error::{Kind, grpc_status};
use crate::snapshot::{Attributes, HttpFilter, RequestView, Terminal};
use crate::upstream::View;

/// What is left of a head.
pub(super) struct Running {
    pub(super) http: Arc<HttpConn>,
    pub(super) method: Method,
    pub(super) scheme: Scheme,
    pub(super) authority: HeaderValue,
    /// As policy saw it.
    pub(super) path: PathAndQuery,
    /// The client after x-forwarded-for.
    pub(super) remote: IpAddr,
}

impl Running {
    /// Why policy would not let it pass now.
    pub(super) fn judge(&self, view: &View) -> Option<String> {
        let conn = &self.http.conn;
        if !conn.is_inbound() {
            return None;
        }
        let Now::Other(chain) = chain_now(view, conn, &self.http.whole) else { return None };
        let Terminal::Http(http) = &chain.terminal else { return None };
        let nothing = HeaderMap::new();
        let request = RequestView {
            method: &self.method,
            scheme: self.scheme.as_str(),
            authority: self.authority.to_str().unwrap_or_default(),
            path: self.path.as_str(),
            headers: &nothing,
        };
        let attributes = Attributes { remote_ip: self.remote, request: Some(&request), ..conn.attributes() };
        http.filters.iter().find_map(|filter| {
            let HttpFilter::Rbac(rbac) = filter else { return None };
            let verdict = Some(rbac).filter(|rbac| !rbac.asks_head())?.check(&attributes);
            (!verdict.allowed).then(|| verdict.details())
        })
    }
}

/// How a gRPC stream is told that it may not go on.
pub(super) fn farewell() -> HeaderMap {
    let row = Kind::RbacDenied.row();
    let status = HeaderValue::from(grpc_status(row.status));
    let mut trailers = HeaderMap::with_capacity(2);
    trailers.insert(HeaderName::from_static("grpc-status"), status);
    trailers.insert(HeaderName::from_static("grpc-message"), HeaderValue::from_static(row.body));
    trailers
}
