//! The data path's own pure functions, asked in order and printed: what would happen to a call, and why.
//!
//! Nothing is decided here. Which listener, chain, route, cluster and policy is the snapshot's answer, so an explanation
//! cannot differ from what is served. What a client's first bytes would tell the inspectors is taken from the call.
//!
//! ```ignore
//! let answer = explain(&published.snapshot, &call);
//! println!("{}", answer.text(&call));
//! ```

mod answer;
mod call;
mod live;
mod target;

use std::borrow::Cow;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Result;
use http::HeaderMap;
use http::uri::PathAndQuery;
use proxy_config::Model;
use proxy_config::model::{self, Direction, TransportProtocol};

pub use answer::Answer;
pub use call::{Call, CallArgs, parse};
pub use live::ask_live;

use crate::control::{Control, Published, Settings};
use crate::error::Kind;
use crate::explain::answer::{ChainTls, Policy, Response, Shadow};
use crate::explain::call::{Mode, Protocol, Tls};
use crate::snapshot::path::Outcome;
use crate::snapshot::{
    Attributes, Chain, ChainInput, Filter, HttpChain, HttpFilter, HttpOptions, Jwt, JwtCache, Listener, Metadata,
    NoRoute, Rbac, RequestView, Snapshot, Terminal, metadata_of, route,
};
use crate::tls::Peer;

/// SDS name of the mesh's own certificate.
const MESH_CERTIFICATE: &str = "default";

// istiod's simulator has these words, and people search for them.
const NO_LISTENER: &str = "no listener matched";
const NO_CHAIN: &str = "no filter chains matched";
const NO_VIRTUAL_HOST: &str = "no virtual host matched";
const NO_ROUTE: &str = "no route matched";
const PROTOCOL: &str = "protocol error";
const TLS: &str = "invalid TLS";
const MTLS: &str = "invalid mTLS";

/// Takes configuration in once and answers every call.
pub fn run(settings: Settings, calls: &[Call], json: bool, out: &mut impl Write) -> Result<()> {
    let published = Control::start(settings)?.published();
    for reject in published.rejects.iter().filter(|_| !json) {
        writeln!(out, "warning: {reject}")?;
    }
    for call in calls {
        let (call, note) = named(&published.model, call);
        print(&with(explain(&published.snapshot, &call), note), &call, json, out)?;
    }
    Ok(())
}

/// Answers calls given as JSON, one JSON answer a line; what the admin server of a running proxy serves.
pub fn answer_lines(published: &Published, calls: &str) -> Result<String> {
    let mut out = Vec::new();
    for call in parse(calls)? {
        let (call, note) = named(&published.model, &call);
        print(&with(explain(&published.snapshot, &call), note), &call, true, &mut out)?;
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

fn print(answer: &Answer, call: &Call, json: bool, out: &mut impl Write) -> Result<()> {
    if json {
        serde_json::to_writer(&mut *out, answer)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", answer.text(call))?;
    }
    Ok(())
}

/// The call as a client would make it whose names the mesh answers: a host that the mesh's name table has goes to its
/// first address. With what to say about that.
fn named<'a>(model: &Model, call: &'a Call) -> (Cow<'a, Call>, Option<String>) {
    let known = || {
        let name = call.host.rsplit_once(':').map_or(&*call.host, |(name, _)| name).trim_end_matches('.');
        let info = model.names.get(name.to_ascii_lowercase().as_str())?;
        info.ips.iter().find_map(|ip| ip.parse::<IpAddr>().ok()).map(|ip| (name, ip))
    };
    if call.address.is_some() || call.mode != Mode::Outbound {
        return (Cow::Borrowed(call), None);
    }
    match known() {
        Some((name, ip)) => {
            let note = format!("{name} is {ip} in the mesh's name table");
            (Cow::Owned(Call { address: Some(ip), ..call.clone() }), Some(note))
        }
        None => (Cow::Borrowed(call), None),
    }
}

fn with(mut answer: Answer, note: Option<String>) -> Answer {
    answer.notes.extend(note);
    answer
}

/// What would happen to a call.
pub fn explain(snapshot: &Snapshot, call: &Call) -> Answer {
    let mut answer = Answer::default();
    match walk(snapshot, call, &mut answer) {
        Ok(()) => {}
        Err(error) => answer.error = Some(error.to_owned()),
    }
    answer
}

/// Everything that is asked about one call.
struct Asked<'a> {
    snapshot: &'a Snapshot,
    call: &'a Call,
    peer: Option<Peer>,
    headers: HeaderMap,
    method: http::Method,
    sni: String,
}

fn walk(snapshot: &Snapshot, call: &Call, answer: &mut Answer) -> Result<(), &'static str> {
    let listener = listener_of(snapshot, call).ok_or(NO_LISTENER)?;
    answer.listener = Some(listener.name.to_string());
    let Some(chain) = chain_of(listener, call) else {
        answer.response = Some(local(Kind::NoChain));
        return Err(NO_CHAIN);
    };
    answer.filter_chain = Some(chain.name.to_string());
    let tls = said_tls(listener, chain);
    answer.filter_chain_tls = tls.map(|tls| ChainTls {
        certificate: tls.common.certificates.first().map(ToString::to_string),
        require_client_certificate: tls.require_client_certificate,
        alpn: tls.common.alpn.clone(),
    });
    handshake(tls, call)?;
    if let Some(limit) = chain.handshake_timeout.filter(|_| tls.is_some()) {
        answer.timers.insert("handshake limit".to_owned(), format!("{limit:?}"));
    }
    // Calls were checked when they were read.
    let asked = Asked {
        snapshot,
        call,
        peer: call.tls_peer().ok().flatten().filter(|_| tls.is_some()),
        headers: call.header_map().unwrap_or_default(),
        method: call.method().unwrap_or_default(),
        sni: call.server_name(),
    };
    if asked.peer.as_ref().is_some_and(|peer| peer.uri_sans.is_empty()) && call.tls == Tls::Mtls {
        answer.notes.push("the client's identity is not given (peer): policies see none".to_owned());
    }
    if let Some(why) = &chain.unusable {
        answer.notes.push(format!("the chain is unusable: {why}"));
        answer.response = Some(local(Kind::PolicyUnusable));
    }
    policies_of_connection(&asked, chain, answer);
    match &chain.terminal {
        Terminal::Tcp(tcp) => target::tcp(&asked, tcp, answer),
        Terminal::Http(http) => return request(&asked, http, tls.is_some(), answer),
        Terminal::Refuse(why) => answer.notes.push(format!("connections are refused: {why}")),
    }
    Ok(())
}

/// As connections come: inbound ones to the listener that captures them, outbound ones to the one that hands them over,
/// and without capture to whoever listens there.
fn listener_of<'a>(snapshot: &'a Snapshot, call: &Call) -> Option<&'a Arc<Listener>> {
    let dst = call.destination();
    let capturing = |direction: Direction| {
        let mut bound = snapshot.bound().iter();
        bound.find(move |l| l.direction == direction && (l.use_original_dst || l.original_dst))
    };
    if call.mode == Mode::Inbound {
        return capturing(Direction::Inbound);
    }
    match capturing(Direction::Outbound) {
        Some(entry) => Some(snapshot.hand_off(entry, dst).unwrap_or(entry)),
        None => {
            let any = |a: &SocketAddr| a.ip().is_unspecified() && a.port() == dst.port();
            let at = |wanted: &dyn Fn(&SocketAddr) -> bool| {
                snapshot.bound().iter().find(|l| l.address.iter().chain(&l.additional).any(wanted))
            };
            at(&|a| *a == dst).or_else(|| at(&any))
        }
    }
}

fn chain_of<'a>(listener: &'a Listener, call: &Call) -> Option<&'a Arc<Chain>> {
    let inspect = listener.inspect(call.port);
    let is_tls = call.tls != Tls::Plaintext;
    let alpn = match (is_tls, inspect) {
        (true, inspect) if inspect.tls => call.offered(),
        (false, inspect) if inspect.http => call.sniffed(),
        _ => Vec::new(),
    };
    let sni = call.server_name();
    let seen = is_tls && inspect.tls;
    listener.chain(&ChainInput {
        dst: call.destination(),
        src: call.source(),
        // Plaintext with a server name is a question about chains, not about a client.
        sni: Some(&*sni).filter(|sni| (seen || !is_tls) && !sni.is_empty()),
        transport: if seen { TransportProtocol::Tls } else { TransportProtocol::RawBuffer },
        alpn: &alpn,
    })
}

/// What was said about a chain's TLS: whether it can be compiled on this machine is another question.
fn said_tls<'a>(listener: &'a Listener, chain: &Arc<Chain>) -> Option<&'a model::DownstreamTls> {
    let at = listener.all_chains().position(|c| Arc::ptr_eq(c, chain))?;
    let said = listener.config.filter_chains.get(at).or(listener.config.default_filter_chain.as_ref())?;
    said.tls.as_ref()
}

/// Whether client and chain agree about TLS.
fn handshake(tls: Option<&model::DownstreamTls>, call: &Call) -> Result<(), &'static str> {
    let Some(tls) = tls else { return Ok(()) };
    if call.tls == Tls::Plaintext {
        return Err(TLS);
    }
    let mesh = match &*call.mtls_secret_config_name {
        "" => MESH_CERTIFICATE,
        name => name,
    };
    let is_mesh = tls.common.certificates.first().is_some_and(|name| &**name == mesh) && tls.require_client_certificate;
    if is_mesh == (call.tls == Tls::Mtls) { Ok(()) } else { Err(MTLS) }
}

fn request(asked: &Asked<'_>, http: &HttpChain, terminated: bool, answer: &mut Answer) -> Result<(), &'static str> {
    let call = asked.call;
    if call.protocol == Protocol::Tcp || (call.tls != Tls::Plaintext && !terminated) {
        return Err(PROTOCOL);
    }
    answer.route_config = Some(http.route_config().to_string());
    let path = match normalised(call.request_path(), &http.options) {
        Ok(path) => path,
        Err(response) => {
            answer.response.get_or_insert(response);
            return Ok(());
        }
    };
    let request = RequestView {
        method: &asked.method,
        scheme: if terminated { "https" } else { "http" },
        authority: call.authority(),
        path: &path,
        headers: &asked.headers,
    };
    let metadata = policies_of_request(asked, http, &request, answer);
    let Some(table) = asked.snapshot.route_table(http) else {
        answer.notes.push("the route table is not there".to_owned());
        answer.response.get_or_insert_with(|| local(Kind::NoRoute));
        return Err(NO_VIRTUAL_HOST);
    };
    match route::find_knowing(table, &request, metadata.as_deref(), 0) {
        Ok(found) => {
            answer.virtual_host = Some(found.vhost.name.to_string());
            answer.route = Some(found.route.name.to_string());
            target::route(asked, &found, &request, http, answer);
            Ok(())
        }
        Err(why) => {
            answer.virtual_host = table.virtual_host(call.authority()).map(|vhost| vhost.name.to_string());
            answer.response.get_or_insert_with(|| local(Kind::NoRoute));
            Err(if why == NoRoute::VirtualHost { NO_VIRTUAL_HOST } else { NO_ROUTE })
        }
    }
}

/// The path as policies and routes see it; or the answer that the client gets instead. Other forms (`*`) stay.
fn normalised<'p>(said: &'p str, options: &HttpOptions) -> Result<Cow<'p, str>, Response> {
    let Ok(path) = PathAndQuery::try_from(said) else { return Ok(said.into()) };
    let (status, location) = match options.normalise(&path) {
        Outcome::Same => return Ok(said.into()),
        Outcome::Changed(path) => return Ok(path.as_str().to_owned().into()),
        Outcome::Redirect(path) => (307, Some(path.as_str().to_owned())),
        Outcome::Refused => (400, None),
    };
    Err(Response { status, flags: "-".to_owned(), details: "path_normalization_failed".to_owned(), location })
}

fn policies_of_connection(asked: &Asked<'_>, chain: &Chain, answer: &mut Answer) {
    for filter in &chain.l4 {
        match filter {
            Filter::Rbac(rbac) => judge(asked, (rbac, asked.call.source().ip()), (None, None), answer),
            Filter::MetadataExchange(_) => {}
            Filter::Unsupported(name) => {
                answer.notes.push(format!("connections are refused: {name} is not supported"));
                answer.response.get_or_insert_with(|| local(Kind::UnsupportedConfig));
            }
        }
    }
}

/// What the request's policies say, tokens included; what its tokens tell the routes.
fn policies_of_request(
    asked: &Asked<'_>,
    http: &HttpChain,
    request: &RequestView<'_>,
    answer: &mut Answer,
) -> Option<Arc<Metadata>> {
    let mut metadata = None;
    for filter in &http.filters {
        match filter {
            HttpFilter::Rbac(rbac) => {
                let client = http.options.client(request.headers, asked.call.source().ip());
                judge(asked, (rbac, client), (Some(request), metadata.as_deref()), answer);
            }
            HttpFilter::JwtAuthn(jwt) => metadata = tokens(jwt, request, answer),
            HttpFilter::Unsupported { name, security } => {
                answer.notes.push(format!("filter {name} is not supported"));
                let kind = if *security { Kind::PolicyUnusable } else { Kind::UnsupportedConfig };
                answer.response.get_or_insert_with(|| local(kind));
            }
            _ => {}
        }
    }
    metadata
}

/// What the request's tokens are worth now.
fn tokens(jwt: &Jwt, request: &RequestView<'_>, answer: &mut Answer) -> Option<Arc<Metadata>> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let policy = |allowed, policy, why| Policy { filter: "jwt".to_owned(), allowed, policy, why, shadow: None };
    match jwt.check(request, now, &mut JwtCache::default()) {
        Ok(grants) => {
            let names: Vec<&str> = grants.iter().map(|grant| &*grant.provider).collect();
            let why = if names.is_empty() { "no token is needed" } else { "a token is good" };
            let by = (!names.is_empty()).then(|| names.join(", "));
            answer.policies.push(policy(true, by, Some(why.to_owned())));
            metadata_of(&grants)
        }
        Err(denied) => {
            let missing = jwt.sources().filter(|source| !source.fetched).map(|source| &source.uri);
            answer.notes.extend(missing.map(|uri| format!("the keys at {uri} are not known here")));
            answer.policies.push(policy(false, None, Some(denied.text().into_owned())));
            answer.response.get_or_insert_with(|| Response {
                status: denied.status(),
                details: denied.details(),
                ..local(Kind::JwtDenied)
            });
            None
        }
    }
}

/// What one RBAC filter says; with a request it is the filter of HTTP.
fn judge(
    asked: &Asked<'_>,
    (rbac, remote_ip): (&Rbac, IpAddr),
    (request, metadata): (Option<&RequestView<'_>>, Option<&Metadata>),
    answer: &mut Answer,
) {
    let attributes = Attributes {
        peer: asked.peer.as_ref(),
        direct_remote: asked.call.source(),
        remote_ip,
        destination: asked.call.destination(),
        sni: Some(&*asked.sni).filter(|sni| !sni.is_empty() && asked.call.tls != Tls::Plaintext),
        request,
        metadata,
    };
    let verdict = rbac.check(&attributes);
    answer.policies.push(Policy {
        filter: if request.is_some() { "http" } else { "network" }.to_owned(),
        allowed: verdict.allowed,
        policy: verdict.policy.map(ToString::to_string),
        why: rbac.why(&attributes).map(|denial| denial.to_string()),
        shadow: verdict.shadow.map(|(allowed, policy)| Shadow { allowed, policy: policy.map(ToString::to_string) }),
    });
    if !verdict.allowed {
        let status = if request.is_some() { Kind::RbacDenied.row().status } else { 0 };
        answer.response.get_or_insert_with(|| Response {
            status,
            details: verdict.details(),
            ..local(Kind::RbacDenied)
        });
    }
}

/// What the error table says the proxy answers.
fn local(kind: Kind) -> Response {
    let row = kind.row();
    Response { status: row.status, flags: row.flag.to_string(), details: row.details.to_owned(), location: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_mesh_are_answered_as_its_dns_would() {
        let info = model::NameInfo { ips: vec!["240.240.0.7".to_owned()], ..model::NameInfo::default() };
        let mut model = Model::default();
        model.names.insert("db.example.com".into(), info);
        let to = |host: &str, mode: Mode| Call { host: host.to_owned(), port: 80, mode, ..Call::default() };
        for host in ["db.example.com", "DB.example.com:80", "db.example.com."] {
            let call = to(host, Mode::Outbound);
            let (asked, note) = named(&model, &call);
            assert_eq!(asked.destination().to_string(), "240.240.0.7:80");
            assert!(note.is_some_and(|note| note.ends_with("is 240.240.0.7 in the mesh's name table")));
        }
        let said = Call { address: Some(IpAddr::from([10, 0, 0, 1])), ..to("db.example.com", Mode::Outbound) };
        for call in [to("other", Mode::Outbound), to("db.example.com", Mode::Inbound), said] {
            let (asked, note) = named(&model, &call);
            assert!(*asked == call && note.is_none());
        }
    }
}
