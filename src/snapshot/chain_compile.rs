//! Filter chains from what was said, with Envoy's defaults filled in. What guards a chain and cannot be compiled closes it.

use std::sync::Arc;
use std::time::Duration;

use http::header::HeaderValue;
use proxy_config::model::{self, HttpConnectionManager, NetworkFilter};

use super::action_compile::off;
use super::chain::Routes;
use super::cluster::{Ids, WeightedClusters};
use super::compile::{Sink, missing_secret};
use super::logs::access_logs;
use super::{
    AlpnRewrite, ByName, Chain, Filter, HttpChain, HttpFilter, HttpOptions, Jwt, KeyBell, Name, PeerMetadata, Rbac,
    TcpChain, TcpExchange, Terminal, route_compile,
};
use crate::telemetry::{AccessLogs, Stats, Tracer};
use crate::tls::{Secrets, ServerTls};

/// Idle limit of TCP connections and of HTTP client connections.
const IDLE: Duration = Duration::from_secs(3600);
/// Idle limit of streams.
const STREAM_IDLE: Duration = Duration::from_secs(300);
/// Between the shutdown notice and the final GOAWAY.
const DRAIN: Duration = Duration::from_secs(5);
/// Largest request headers, KiB.
const MAX_HEADERS_KB: u32 = 60;
/// Value of `server`.
const SERVER: &str = "envoy";

/// Compiles a chain.
pub(super) fn chain(
    listener: &model::Listener,
    said: &model::FilterChain,
    (ids, secrets, bell): (&Ids<'_>, &Secrets, &Arc<KeyBell>),
    sink: &mut Sink<'_>,
) -> Chain {
    let mut build = Build { ids, bell, closed: said.unusable.iter().map(|why| why.as_str().into()).collect(), sink };
    let tls = said.tls.as_ref().and_then(|tls| build.tls(tls, &key(listener, said), secrets));
    let lost_tls = said.tls.is_some() && tls.is_none();
    let (l4, terminal) = build.filters(&said.filters);
    let unusable = (!build.closed.is_empty()).then(|| Name::from(build.closed.join("; ")));
    // Without its TLS context the chain would take plaintext for what the peer of a handshake said.
    let terminal = match &unusable {
        Some(why) if lost_tls => Terminal::Refuse(Arc::clone(why)),
        _ => terminal,
    };
    let handshake_timeout = said.transport_socket_connect_timeout.and_then(off);
    Chain { name: Arc::clone(&said.name), tls, l4, terminal, unusable, handshake_timeout }
}

/// The old chain of an equal configuration with the TLS context of other secrets (`tls`; `None`: they are the same).
/// `None`: it must be compiled anew, because the context could not be made then or cannot be made now.
pub(super) fn renewed(
    old: &Arc<Chain>,
    tls: Option<&model::DownstreamTls>,
    listener: &model::Listener,
    said: &model::FilterChain,
    secrets: &Secrets,
) -> Option<Arc<Chain>> {
    let Some(tls) = tls else { return Some(Arc::clone(old)) };
    let old_tls = old.tls.as_ref()?;
    let tls = ServerTls::compile(tls, secrets, &key(listener, said)).ok()?;
    if tls == *old_tls {
        return Some(Arc::clone(old));
    }
    Some(Arc::new(Chain { tls: Some(tls), ..(**old).clone() }))
}

/// Names a chain for its session tickets: names repeat inside a listener, matches do not.
fn key(listener: &model::Listener, said: &model::FilterChain) -> String {
    format!("{}/{} {:?}", listener.name, said.name, said.matches)
}

/// Compiles what guards, for its faults alone.
pub(super) fn guards(said: &[NetworkFilter], sink: &mut Sink<'_>) {
    for filter in said {
        match filter {
            NetworkFilter::Rbac(rbac) => drop(guard(sink, |build| build.rbac(rbac))),
            NetworkFilter::Http(manager) => manager.filters.iter().for_each(|filter| http_guard(filter, sink)),
            _ => {}
        }
    }
}

/// The same of an HTTP filter.
pub(super) fn http_guard(said: &model::HttpFilter, sink: &mut Sink<'_>) {
    match said {
        model::HttpFilter::Rbac(rbac) => drop(guard(sink, |build| build.rbac(rbac))),
        model::HttpFilter::JwtAuthn(jwt) => drop(guard(sink, |build| build.jwt(jwt))),
        _ => {}
    }
}

/// Guards name no clusters, and nobody waits for the keys of one that is thrown away.
fn guard<T>(sink: &mut Sink<'_>, compile: impl FnOnce(&mut Build<'_, '_>) -> T) -> T {
    let (none, bell) = (ByName::default(), Arc::default());
    compile(&mut Build { ids: &Ids(&none), bell: &bell, closed: Vec::new(), sink })
}

struct Build<'a, 's> {
    ids: &'a Ids<'a>,
    bell: &'a Arc<KeyBell>,
    /// Why nothing may pass.
    closed: Vec<Box<str>>,
    sink: &'a mut Sink<'s>,
}

impl Build<'_, '_> {
    fn tls(&mut self, said: &model::DownstreamTls, key: &str, secrets: &Secrets) -> Option<ServerTls> {
        let why = match ServerTls::compile(said, secrets, key) {
            Ok(tls) => return Some(tls),
            Err(why) => why,
        };
        // A certificate that has not come yet is no mistake of the configuration.
        match missing_secret(&said.common, secrets) {
            Some(name) => self.sink.warn("transport_socket", format!("secret {name} is missing")),
            None => self.sink.security("transport_socket", why.clone()),
        }
        self.closed.push(why.into());
        None
    }

    fn filters(&mut self, said: &[NetworkFilter]) -> (Box<[Filter]>, Terminal) {
        let mut l4 = Vec::new();
        let (mut terminal, mut stats) = (None, None);
        for filter in said {
            if terminal.is_some() {
                self.sink.error("filters", "filters behind the last one; connections are refused".to_owned());
                terminal = Some(Terminal::Refuse("filters behind the last one".into()));
                break;
            }
            match filter {
                NetworkFilter::MetadataExchange(said) => l4.push(Filter::MetadataExchange(TcpExchange::new(said))),
                NetworkFilter::Rbac(rbac) => l4.push(Filter::Rbac(self.rbac(rbac))),
                NetworkFilter::IstioStats(said) => stats = Some(self.stats(said)),
                NetworkFilter::Inert { .. } => {}
                NetworkFilter::TcpProxy(proxy) => terminal = Some(self.tcp(proxy, stats.take())),
                NetworkFilter::Http(manager) => terminal = Some(Terminal::Http(Arc::new(self.http(manager)))),
                NetworkFilter::Unsupported { name, type_url } => {
                    let why = format!("{name} ({type_url}) is not supported; connections are refused");
                    self.sink.error("filters", why);
                    l4.push(Filter::Unsupported(name.as_str().into()));
                }
            }
        }
        let terminal = terminal.unwrap_or_else(|| {
            self.sink.error("filters", "no filter ends the chain; connections are refused".to_owned());
            Terminal::Refuse("no filter ends the chain".into())
        });
        (l4.into(), terminal)
    }

    /// A policy that cannot be evaluated closes the chain, and denies by itself too.
    fn rbac(&mut self, said: &model::Rbac) -> Arc<Rbac> {
        match Rbac::compile(said) {
            Ok(rbac) => Arc::new(rbac),
            Err(why) => {
                self.sink.security("rbac", why.clone());
                self.closed.push(why.into());
                Arc::new(Rbac::closed())
            }
        }
    }

    /// A token filter that cannot be asked lets nobody in.
    fn jwt(&mut self, said: &model::JwtAuthn) -> HttpFilter {
        match Jwt::compile(said, self.bell) {
            Ok((jwt, warnings)) => {
                warnings.into_iter().for_each(|why| self.sink.warn("jwt_authn", why));
                HttpFilter::JwtAuthn(Arc::new(jwt))
            }
            Err(why) => {
                self.sink.security("jwt_authn", why.clone());
                self.closed.push(why.into());
                HttpFilter::Unsupported { name: "jwt_authn".into(), security: true }
            }
        }
    }

    /// Traffic does not depend on being traced.
    fn tracer(&mut self, said: Option<&model::Tracing>) -> Option<Arc<Tracer>> {
        match said.map(Tracer::compile)? {
            Ok(tracer) => tracer.map(Arc::new),
            Err(why) => {
                self.sink.error("tracing.provider", format!("{why} is not supported; nothing is reported"));
                None
            }
        }
    }

    fn stats(&mut self, said: &model::IstioStats) -> Arc<Stats> {
        let (stats, left_out) = Stats::compile(&said.config);
        for what in left_out {
            self.sink.warn("istio.stats", format!("{what} is left out"));
        }
        Arc::new(stats)
    }

    fn tcp(&mut self, said: &model::TcpProxy, stats: Option<Arc<Stats>>) -> Terminal {
        if said.tunneling.is_some() {
            self.sink.error("tcp_proxy.tunneling_config", "not supported; connections are refused".to_owned());
            return Terminal::Refuse("tunneling is not supported".into());
        }
        if said.clusters.len() > 1 && said.clusters.iter().all(|c| c.weight == 0) {
            self.sink.error("tcp_proxy.weighted_clusters", "no cluster has any weight".to_owned());
        }
        Terminal::Tcp(Arc::new(TcpChain {
            stat_prefix: said.stat_prefix.as_str().into(),
            clusters: WeightedClusters::new(said.clusters.iter().map(|c| (self.ids.refer(&c.cluster), c.weight))),
            idle_timeout: off(said.idle_timeout.unwrap_or(IDLE)),
            max_duration: said.max_downstream_connection_duration.and_then(off),
            hash_source_ip: said.hash_source_ip,
            access_log: Arc::new(access_logs(&said.access_log, self.sink)),
            stats,
        }))
    }

    fn http(&mut self, said: &HttpConnectionManager) -> HttpChain {
        let filters: Box<[HttpFilter]> = said.filters.iter().filter_map(|filter| self.http_filter(filter)).collect();
        let logs = access_logs(&said.access_log, self.sink);
        let read =
            filters.iter().filter_map(|filter| if let HttpFilter::Stats(stats) = filter { Some(stats) } else { None });
        let logs = read.fold(logs, |logs, stats| logs.reading(stats.headers()));
        let tracer = self.tracer(said.tracing.as_ref());
        let logs = tracer.iter().fold(logs, |logs, tracer| logs.reading((tracer.headers(), Vec::new())));
        let routes = match &said.routes {
            model::RouteSource::Rds(name) => Routes::Rds(Arc::clone(name)),
            model::RouteSource::Inline(table) => {
                Routes::Inline(Arc::new(route_compile::table(table, self.ids, &mut self.sink.at("route_config"))))
            }
        };
        HttpChain { filters, options: options(said, (Arc::new(logs), tracer), self.sink), routes }
    }

    /// `None`: nothing to do.
    fn http_filter(&mut self, said: &model::HttpFilter) -> Option<HttpFilter> {
        Some(match said {
            model::HttpFilter::PeerMetadata(said) => {
                let (compiled, unknown) = PeerMetadata::compile(said);
                for method in unknown {
                    self.sink.warn("istio.metadata_exchange", format!("method {method} is not supported"));
                }
                HttpFilter::PeerMetadata(Arc::new(compiled))
            }
            model::HttpFilter::Rbac(rbac) => HttpFilter::Rbac(self.rbac(rbac)),
            model::HttpFilter::JwtAuthn(jwt) => self.jwt(jwt),
            model::HttpFilter::Fault => HttpFilter::Fault,
            model::HttpFilter::Cors => HttpFilter::Cors,
            model::HttpFilter::Alpn(lists) => {
                let list = |protocol: &str| lists.get(protocol).cloned().unwrap_or_default();
                let rewrite = AlpnRewrite { http10: list("http/1.0"), http11: list("http/1.1"), http2: list("h2") };
                HttpFilter::Alpn(Arc::new(rewrite))
            }
            model::HttpFilter::IstioStats(said) => HttpFilter::Stats(self.stats(said)),
            model::HttpFilter::GrpcStats => HttpFilter::GrpcStats,
            model::HttpFilter::GrpcWeb => HttpFilter::GrpcWeb,
            model::HttpFilter::Inert { .. } => return None,
            model::HttpFilter::Unsupported { name, type_url, security } => {
                let answer = if *security { 503 } else { 501 };
                let why = format!("{name} ({type_url}) is not supported; requests get {answer}");
                if *security {
                    self.sink.security("http_filters", why);
                } else {
                    self.sink.error("http_filters", why);
                }
                HttpFilter::Unsupported { name: name.as_str().into(), security: *security }
            }
        })
    }
}

fn options(
    said: &HttpConnectionManager,
    (access_log, tracer): (Arc<AccessLogs>, Option<Arc<Tracer>>),
    sink: &mut Sink<'_>,
) -> HttpOptions {
    let server = if said.server_name.is_empty() { SERVER } else { &said.server_name };
    let server_name = HeaderValue::from_str(server).unwrap_or_else(|_| {
        sink.error("server_name", format!("{server:?} cannot be a header value"));
        HeaderValue::from_static(SERVER)
    });
    HttpOptions {
        stat_prefix: said.stat_prefix.as_str().into(),
        server_name,
        server_header: said.server_header_transformation,
        forward_client_cert: said.forward_client_cert,
        client_cert_details: said.set_current_client_cert,
        use_remote_address: said.use_remote_address,
        generate_request_id: said.generate_request_id,
        normalize_path: said.normalize_path,
        merge_slashes: said.merge_slashes,
        escaped_slashes: said.escaped_slashes,
        stream_idle_timeout: off(said.stream_idle_timeout.unwrap_or(STREAM_IDLE)),
        request_timeout: said.request_timeout.and_then(off),
        request_headers_timeout: said.request_headers_timeout.and_then(off),
        idle_timeout: off(said.idle_timeout.unwrap_or(IDLE)),
        max_connection_duration: said.max_connection_duration.and_then(off),
        max_stream_duration: said.max_stream_duration.and_then(off),
        max_requests_per_connection: said.max_requests_per_connection.filter(|max| *max > 0),
        drain_timeout: said.drain_timeout.unwrap_or(DRAIN),
        max_request_headers: said.max_request_headers_kb.unwrap_or(MAX_HEADERS_KB).saturating_mul(1024),
        headers_with_underscores: said.headers_with_underscores,
        upgrades: said.upgrades.iter().map(|name| name.to_ascii_lowercase().into()).collect(),
        accept_http_10: said.accept_http_10,
        preserve_header_case: said.preserve_header_case,
        append_x_forwarded_port: said.append_x_forwarded_port,
        suppress_envoy_headers: said.suppress_envoy_headers,
        http2: said.http2,
        internal_cidrs: said.internal_cidrs.as_slice().into(),
        access_log,
        tracing: said.tracing.clone(),
        tracer,
    }
}
