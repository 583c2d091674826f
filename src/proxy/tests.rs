//! The whole proxy over memory: a client on a pipe, a real application on the loopback.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use ::http::Request;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use proxy_config::Model;
use proxy_config::model::{
    self, Address, ChainMatch, CircuitBreakers, Cluster, ClusterKind, Direction, Endpoint, Endpoints, FilterChain,
    Forward, HealthStatus, HttpConnectionManager, HttpFilter, IstioClusterMetadata, LbPolicy, LocalityEndpoints,
    NetworkFilter, PathMatch, Permission, Principal, RbacPolicy, RbacRules, RouteAction, RouteMatch, RouteSource,
    StringMatcher, TcpProxy, UpstreamHttp, UpstreamProtocol, WeightedName,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpListener;

use super::*;
use crate::drain::{Drain, Phase};
use crate::snapshot;
use crate::tls::Secrets;

mod export;
mod sizes;

const LIMIT: Duration = Duration::from_secs(5);

/// An application that answers every request head with the same bytes and remembers the heads.
struct App {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<String>>>,
}

impl App {
    /// `answer` follows the head; `echo`: everything behind it comes back.
    async fn start(answer: &'static str, echo: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let heads = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                let heads = Arc::clone(&heads);
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    loop {
                        let mut buffer = [0; 4096];
                        let n = socket.read(&mut buffer).await.unwrap_or(0);
                        if n == 0 {
                            return;
                        }
                        bytes.extend_from_slice(&buffer[..n]);
                        if echo && answer.is_empty() {
                            socket.write_all(&buffer[..n]).await.unwrap();
                            continue;
                        }
                        while let Some(end) = bytes.windows(4).position(|w| w == b"\r\n\r\n") {
                            let head: Vec<u8> = bytes.drain(..end + 4).collect();
                            heads.lock().unwrap().push(String::from_utf8(head).unwrap());
                            socket.write_all(answer.as_bytes()).await.unwrap();
                            if echo {
                                let (mut read, mut write) = socket.split();
                                write.write_all(&bytes).await.unwrap();
                                let _ = tokio::io::copy(&mut read, &mut write).await;
                                return;
                            }
                        }
                    }
                });
            }
        });
        Self { address, seen }
    }

    fn heads(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nx-app: 1\r\n\r\nok\n";

fn cluster(name: &str, address: SocketAddr, protocol: UpstreamProtocol) -> Cluster {
    let endpoint = Endpoint {
        address: Address::Socket(address),
        health: HealthStatus::Healthy,
        weight: 1,
        transport_labels: Default::default(),
        workload: Default::default(),
        hostname: String::new(),
        metadata: Default::default(),
    };
    let group = LocalityEndpoints { endpoints: vec![endpoint], ..LocalityEndpoints::default() };
    Cluster {
        name: name.into(),
        kind: ClusterKind::Static(Endpoints { localities: vec![group], ..Endpoints::default() }),
        lb: LbPolicy::RoundRobin { slow_start: None },
        connect_timeout: None,
        limits: CircuitBreakers::default(),
        outlier: None,
        healthy_panic_threshold: None,
        locality_weighted: false,
        http: UpstreamHttp { protocol, ..UpstreamHttp::default() },
        transport_matches: Vec::new(),
        transport: model::Transport::Raw,
        source_address: None,
        tcp_keepalive: None,
        upstream_port_override: None,
        istio: IstioClusterMetadata::default(),
        metadata_exchange: None,
        dns: None,
        close_on_host_failure: false,
        alt_stat_name: String::new(),
        tcp_idle_timeout: None,
        unsupported: Vec::new(),
    }
}

fn manager(routes: Vec<model::Route>, filters: Vec<HttpFilter>) -> HttpConnectionManager {
    let vhost =
        model::VirtualHost { name: "v".into(), domains: vec!["*".into()], routes, include_request_attempt_count: true };
    let table = model::RouteTable { name: "80".into(), virtual_hosts: vec![vhost], ..model::RouteTable::default() };
    HttpConnectionManager {
        stat_prefix: "s".into(),
        routes: RouteSource::Inline(Arc::new(table)),
        filters,
        server_name: "istio-envoy".into(),
        server_header_transformation: model::ServerHeader::default(),
        forward_client_cert: model::ForwardClientCert::default(),
        set_current_client_cert: model::ClientCertDetails::default(),
        use_remote_address: false,
        generate_request_id: true,
        request_id_for_trace_sampling: true,
        normalize_path: true,
        merge_slashes: false,
        escaped_slashes: model::EscapedSlashes::default(),
        stream_idle_timeout: Some(Duration::ZERO),
        request_timeout: None,
        request_headers_timeout: None,
        idle_timeout: None,
        max_connection_duration: None,
        max_stream_duration: None,
        max_requests_per_connection: None,
        drain_timeout: None,
        max_request_headers_kb: None,
        headers_with_underscores: model::UnderscoreHeaders::default(),
        upgrades: vec!["websocket".into()],
        accept_http_10: false,
        allow_absolute_url: false,
        preserve_header_case: false,
        proxy_100_continue: true,
        append_x_forwarded_port: false,
        suppress_envoy_headers: false,
        http2: None,
        internal_cidrs: Vec::new(),
        access_log: Vec::new(),
        tracing: None,
    }
}

fn route(prefix: &str, action: RouteAction) -> model::Route {
    model::Route {
        name: "r".into(),
        matches: RouteMatch {
            path: PathMatch::Prefix(prefix.into()),
            case_sensitive: true,
            headers: Vec::new(),
            query: Vec::new(),
            dynamic_metadata: Vec::new(),
            grpc: false,
        },
        action,
        request_headers: model::HeaderOps::default(),
        response_headers: model::HeaderOps::default(),
        decorator: Some("op".into()),
        fault: None,
        cors: None,
        config: None,
        stat_prefix: String::new(),
        unsupported: Vec::new(),
    }
}

fn to(cluster: &str) -> Forward {
    let one = model::WeightedCluster { name: cluster.into(), weight: 1, ..model::WeightedCluster::default() };
    Forward { clusters: vec![one], timeout: Some(Duration::ZERO), ..Forward::default() }
}

fn forward(prefix: &str) -> model::Route {
    route(prefix, RouteAction::Forward(Box::new(to("app"))))
}

fn tcp_proxy() -> NetworkFilter {
    NetworkFilter::TcpProxy(TcpProxy {
        stat_prefix: String::new(),
        clusters: vec![WeightedName { cluster: "app".into(), weight: 1 }],
        idle_timeout: None,
        max_downstream_connection_duration: None,
        hash_source_ip: false,
        tunneling: None,
        access_log: Vec::new(),
    })
}

/// A policy that lets only this path prefix pass.
fn allow_only(prefix: &str) -> model::Rbac {
    let path = StringMatcher { pattern: model::StringPattern::Prefix(prefix.into()), ignore_case: false };
    let policy = RbacPolicy { permissions: vec![Permission::UrlPath(path)], principals: vec![Principal::Any] };
    let rules = RbacRules { action: model::RbacAction::Allow, policies: BTreeMap::from([("p".into(), policy)]) };
    model::Rbac { rules: Some(rules), ..model::Rbac::default() }
}

/// Who the proxy of these tests is.
fn node() -> Node {
    let workload = Workload { workload: "web".to_owned(), ..Workload::default() };
    Node { id: Some(HeaderValue::from_static("us")), workload: Arc::new(workload), ..Node::default() }
}

struct Mesh {
    env: Arc<Env>,
    listener: Arc<Listener>,
    drain: Drain,
}

impl Mesh {
    fn new(filters: Vec<NetworkFilter>, clusters: Vec<Cluster>) -> Self {
        Self::serving(Self::compile(filters, clusters))
    }

    fn serving(snapshot: snapshot::Snapshot) -> Self {
        let listener = Arc::clone(&snapshot.listeners()[0]);
        let (drain, watch) = Drain::new();
        let env = Env::new(Settings {
            worker: 0,
            view: Arc::new(View::new(Arc::new(snapshot), None)),
            drain: watch,
            node: node(),
        });
        Self { env: Arc::new(env), listener, drain }
    }

    /// With a listener that tells HTTP from other bytes.
    fn sniffing(filters: Vec<NetworkFilter>, clusters: Vec<Cluster>) -> Self {
        let inspect = model::ListenerFilter { kind: model::ListenerFilterKind::HttpInspector, disabled: None };
        Self::serving(Self::compile_with(filters, clusters, vec![inspect]))
    }

    fn compile(filters: Vec<NetworkFilter>, clusters: Vec<Cluster>) -> snapshot::Snapshot {
        Self::compile_with(filters, clusters, Vec::new())
    }

    fn compile_with(
        filters: Vec<NetworkFilter>,
        clusters: Vec<Cluster>,
        listener_filters: Vec<model::ListenerFilter>,
    ) -> snapshot::Snapshot {
        Self::compile_for(ChainMatch::default(), filters, clusters, listener_filters)
    }

    fn compile_for(
        matches: ChainMatch,
        filters: Vec<NetworkFilter>,
        clusters: Vec<Cluster>,
        listener_filters: Vec<model::ListenerFilter>,
    ) -> snapshot::Snapshot {
        let chain = FilterChain { name: "c".into(), filters, matches, ..FilterChain::default() };
        Self::compile_chain(chain, clusters, listener_filters)
    }

    fn compile_chain(
        chain: FilterChain,
        clusters: Vec<Cluster>,
        listener_filters: Vec<model::ListenerFilter>,
    ) -> snapshot::Snapshot {
        let mut model = Model::default();
        for cluster in clusters {
            model.clusters.insert(Arc::clone(&cluster.name), Arc::new(cluster));
        }
        let listener = model::Listener {
            name: "in".into(),
            address: Address::Socket("0.0.0.0:15006".parse().unwrap()),
            additional_addresses: Vec::new(),
            direction: Direction::Inbound,
            bind_to_port: true,
            use_original_dst: false,
            transparent: false,
            listener_filters,
            listener_filters_timeout: None,
            continue_on_listener_filters_timeout: true,
            filter_chains: vec![chain],
            default_filter_chain: None,
            access_log: Vec::new(),
            exact_balance: false,
            max_accepts_per_event: None,
        };
        model.listeners.insert("in".into(), Arc::new(listener));
        let (snapshot, rejects) = snapshot::compile(None, &model, &Secrets::new());
        assert!(rejects.is_empty(), "{rejects:?}");
        snapshot
    }

    fn http(app: &App, routes: Vec<model::Route>, filters: Vec<HttpFilter>) -> Self {
        Self::managed(app, manager(routes, filters))
    }

    fn managed(app: &App, manager: HttpConnectionManager) -> Self {
        let to_app = cluster("app", app.address, UpstreamProtocol::Http1);
        Self::new(vec![NetworkFilter::Http(Box::new(manager))], vec![to_app])
    }

    /// Makes another configuration current.
    fn swap(&self, snapshot: snapshot::Snapshot) {
        self.env.swap(Arc::new(View::new(Arc::new(snapshot), None)));
    }

    fn connect(&self) -> Client {
        let (far, near) = tokio::io::duplex(64 * 1024);
        let at = |text: &str| text.parse().unwrap();
        let serving = serve(
            near.into(),
            at("10.0.0.9:1000"),
            (at("10.0.0.1:15006"), at("10.0.0.1:8080")),
            Arc::clone(&self.listener),
            Arc::clone(&self.env),
            (),
        );
        Client { stream: far, task: tokio::spawn(serving) }
    }
}

struct Client {
    stream: DuplexStream,
    task: tokio::task::JoinHandle<()>,
}

impl Client {
    async fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).await.unwrap();
    }

    /// Reads until the text ends so.
    async fn until(&mut self, end: &str) -> String {
        let mut got = Vec::new();
        let read = async {
            while !got.ends_with(end.as_bytes()) {
                let mut byte = [0];
                if self.stream.read(&mut byte).await.unwrap() == 0 {
                    panic!("closed after {:?}", String::from_utf8_lossy(&got));
                }
                got.push(byte[0]);
            }
        };
        if tokio::time::timeout(LIMIT, read).await.is_err() {
            panic!("only {:?}", String::from_utf8_lossy(&got));
        }
        String::from_utf8(got).unwrap()
    }

    async fn rest(&mut self) -> String {
        let mut rest = String::new();
        tokio::time::timeout(LIMIT, self.stream.read_to_string(&mut rest)).await.expect("it ends").unwrap();
        rest
    }

    async fn get(&mut self, path: &str, end: &str) -> String {
        self.send(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        self.until(end).await
    }
}

/// A filter whose provider has one secret; claims go to a header, and everything is asked of policies and routes.
fn tokens() -> model::JwtAuthn {
    let provider = model::JwtProvider {
        issuer: "i".into(),
        jwks: model::JwksSource::Inline(r#"{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}"#.into()),
        claim_to_headers: vec![("x-sub".into(), "sub".into())],
        payload_in_metadata: "payload".into(),
        ..model::JwtProvider::default()
    };
    let any = vec![model::JwtRequirement::Provider("p".into()), model::JwtRequirement::AllowMissing];
    model::JwtAuthn {
        providers: [("p".to_owned(), provider)].into(),
        rules: vec![("/".into(), model::JwtRequirement::Any(any))],
        bypass_cors_preflight: true,
    }
}

fn token(claims: &serde_json::Value) -> String {
    let key = jsonwebtoken::EncodingKey::from_secret(b"secret");
    jsonwebtoken::encode(&jsonwebtoken::Header::default(), claims, &key).unwrap()
}

fn claim(name: &str, value: &str) -> model::MetadataMatcher {
    model::MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: vec!["payload".into(), name.into()],
        value: model::ValueMatcher::String(StringMatcher::exact(value)),
        invert: false,
    }
}

#[tokio::test]
async fn tokens_are_verified_stripped_and_known_to_policies_and_routes() {
    let app = App::start(OK, false).await;
    let bob =
        RbacPolicy { permissions: vec![Permission::Any], principals: vec![Principal::Metadata(claim("sub", "bob"))] };
    let rules = RbacRules { action: model::RbacAction::Deny, policies: BTreeMap::from([("bob".into(), bob)]) };
    let rbac = model::Rbac { rules: Some(rules), ..model::Rbac::default() };
    let direct = RouteAction::Direct { status: 299, body: Vec::new() };
    let mut of_dev = route("/", direct);
    of_dev.matches.dynamic_metadata = vec![claim("group", "dev")];
    let filters = vec![HttpFilter::JwtAuthn(Box::new(tokens())), HttpFilter::Rbac(rbac)];
    let mesh = Mesh::http(&app, vec![of_dev, forward("/")], filters);
    let mut client = mesh.connect();
    let with =
        |token: &str| format!("GET /x HTTP/1.1\r\nhost: a\r\nx-sub: forged\r\nauthorization: Bearer {token}\r\n\r\n");

    client.send(&with(&token(&serde_json::json!({"iss": "i", "sub": "alice"})))).await;
    client.until("ok\n").await;
    let head = app.heads().pop().unwrap();
    assert!(head.contains("x-sub: alice") && !head.contains("forged") && !head.contains("authorization"), "{head}");

    client.send("GET /x HTTP/1.1\r\nhost: a\r\nx-sub: forged\r\n\r\n").await;
    client.until("ok\n").await;
    assert!(!app.heads().pop().unwrap().contains("x-sub"));

    client.send(&with(&token(&serde_json::json!({"iss": "i", "sub": "bob"})))).await;
    let denied = client.until("RBAC: access denied").await;
    assert!(denied.starts_with("HTTP/1.1 403"), "{denied}");

    client.send(&with("abc")).await;
    let refused = client.until("3 sections").await;
    let realm = "www-authenticate: Bearer realm=\"http://a/x\", error=\"invalid_token\"";
    assert!(refused.starts_with("HTTP/1.1 401") && refused.contains(realm), "{refused}");

    let path = format!("/x?access_token={}&a=1", token(&serde_json::json!({"iss": "i", "sub": "carol"})));
    client.get(&path, "ok\n").await;
    assert!(app.heads().pop().unwrap().starts_with("GET /x?a=1 "), "{:?}", app.heads());

    client.send(&with(&token(&serde_json::json!({"iss": "i", "group": "dev"})))).await;
    assert!(client.until("\r\n\r\n").await.starts_with("HTTP/1.1 299"));
    assert_eq!(app.heads().len(), 3, "what is refused never arrives");
}

/// A response's lines without what differs from run to run, sorted.
fn lines(response: &str) -> Vec<&str> {
    let (head, _) = response.split_once("\r\n\r\n").unwrap();
    let mut lines: Vec<&str> = head.split("\r\n").filter(|line| !line.starts_with("date: ")).collect();
    lines[1..].sort_unstable();
    lines
}

#[tokio::test]
async fn a_request_goes_through_and_the_connection_is_kept() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let mut client = mesh.connect();
    for _ in 0..3 {
        let response = client.get("/x/../api?q=1", "ok\n").await;
        assert_eq!(
            lines(&response),
            [
                "HTTP/1.1 200 OK",
                "content-length: 3",
                "server: istio-envoy",
                "x-app: 1",
                "x-envoy-decorator-operation: op",
                "x-envoy-upstream-service-time: 0"
            ]
        );
    }
    let heads = app.heads();
    assert_eq!(heads.len(), 3);
    assert!(heads[0].starts_with("GET /api?q=1 HTTP/1.1\r\n"), "{}", heads[0]);
    for header in ["host: a", "x-forwarded-proto: http", "x-request-id: ", "x-envoy-attempt-count: 1"] {
        assert!(heads[0].contains(header), "{header} in {}", heads[0]);
    }
    drop(client.stream);
    client.task.await.unwrap();
    assert_eq!(mesh.drain.active(), 0);
}

#[tokio::test]
async fn policy_refuses_after_normalisation() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], vec![HttpFilter::Rbac(allow_only("/api"))]);
    let mut client = mesh.connect();
    assert!(client.get("/api/x", "ok\n").await.starts_with("HTTP/1.1 200"));
    let denied = client.get("/api/../admin", "denied").await;
    assert_eq!(
        lines(&denied),
        [
            "HTTP/1.1 403 Forbidden",
            "content-length: 19",
            "content-type: text/plain",
            "server: istio-envoy",
            "x-envoy-decorator-operation: op"
        ]
    );
    client.send("POST /y HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\ncontent-length: 0\r\n\r\n").await;
    let grpc = client.until("\r\n\r\n").await;
    assert!(grpc.starts_with("HTTP/1.1 200") && grpc.contains("grpc-status: 7\r\n"), "{grpc}");
    client.send("POST /y HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\n").await;
    let unread = client.rest().await;
    assert!(unread.starts_with("HTTP/1.1 403") && unread.contains("connection: close"), "{unread}");
    assert_eq!(app.heads().len(), 1);
}

#[tokio::test]
async fn proxies_tell_each_other_and_applications_hear_nothing() {
    let app = App::start(OK, false).await;
    let said = serde_json::json!({
        "downstream_discovery": [{"istio_headers": {}}, {"workload_discovery": {}}],
        "downstream_propagation": [{"istio_headers": {}}],
    });
    let mesh =
        Mesh::http(&app, vec![forward("/")], vec![HttpFilter::PeerMetadata(said), HttpFilter::Rbac(allow_only("/a"))]);
    let client = Workload { workload: "client".to_owned(), ..Workload::default() }.to_header();
    let mut connection = mesh.connect();
    for (path, end, status) in [("/a", "ok\n", "200"), ("/b", "denied", "403")] {
        let told = format!("x-envoy-peer-metadata-id: them\r\nx-envoy-peer-metadata: {client}\r\n");
        connection.send(&format!("GET {path} HTTP/1.1\r\nhost: a\r\n{told}\r\n")).await;
        let response = connection.until(end).await;
        assert!(response.starts_with(&format!("HTTP/1.1 {status}")), "{response}");
        assert!(response.contains("x-envoy-peer-metadata-id: us\r\n"), "{response}");
        let ours = response.lines().find_map(|line| line.strip_prefix("x-envoy-peer-metadata: ")).expect("ours");
        assert_eq!(Workload::from_header(ours.as_bytes(), &[]).expect("metadata").workload, "web");
    }
    assert!(!connection.get("/a", "ok\n").await.contains("x-envoy-peer-metadata"), "who does not ask is not told");
    assert!(app.heads().iter().all(|head| !head.contains("x-envoy-peer-metadata")));
}

#[tokio::test]
async fn answers_without_an_upstream() {
    let app = App::start(OK, false).await;
    let direct = RouteAction::Direct { status: 418, body: b"teapot".to_vec() };
    let redirect =
        RouteAction::Redirect(model::Redirect { status: 301, path: Some("/there".into()), ..Default::default() });
    let nowhere = RouteAction::Forward(Box::new(to("nowhere")));
    let routes = vec![route("/d", direct), route("/r", redirect), route("/n", nowhere)];
    let mesh = Mesh::http(&app, routes, Vec::new());
    let mut client = mesh.connect();
    assert!(client.get("/d", "teapot").await.starts_with("HTTP/1.1 418 Unknown\r\n"));
    let redirect = client.get("/r?q", "\r\n\r\n").await;
    assert!(redirect.starts_with("HTTP/1.1 301") && redirect.contains("location: http://a/there?q\r\n"), "{redirect}");
    assert!(client.get("/n", "\r\n\r\n").await.starts_with("HTTP/1.1 503"));
    assert!(client.get("/none", "\r\n\r\n").await.starts_with("HTTP/1.1 503"));
    assert!(client.get("/", "\r\n\r\n").await.starts_with("HTTP/1.1 404"));
    client.send("GET / HTTP/1.0\r\nhost: a\r\n\r\n").await;
    let old = client.rest().await;
    assert!(old.contains("426 Upgrade Required") && old.ends_with("\r\n\r\nUpgrade Required"), "{old}");
}

#[tokio::test]
async fn a_refused_connection_is_503() {
    let app = App { address: "127.0.0.1:1".parse().unwrap(), seen: Arc::default() };
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let response = mesh.connect().get("/", "failure").await;
    assert!(response.starts_with("HTTP/1.1 503"), "{response}");
    assert!(response.ends_with("before headers. reset reason: remote connection failure"), "{response}");
}

#[tokio::test]
async fn malformed_requests_are_refused() {
    let app = App::start(OK, false).await;
    for (request, expected) in [
        ("get / HTTP/1.1\r\nhost: a\r\n\r\n", "HTTP/1.1 400"),
        ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 400"),
        ("GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", "HTTP/1.1 400"),
        ("\0\u{1}binary\r\n\r\n", "HTTP/1.1 400"),
        ("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n", "HTTP/1.1 501"),
        ("GET /%00 HTTP/1.1\r\nhost: a\r\n\r\n", "HTTP/1.1 400"),
        ("GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\ncontent-length: 0\r\n\r\n", "HTTP/1.1 400"),
        (
            "GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "HTTP/1.1 400",
        ),
        ("CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n", "HTTP/1.1 404"),
        ("GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: foo\r\n\r\n", "HTTP/1.1 403"),
    ] {
        let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
        let mut client = mesh.connect();
        client.send(request).await;
        let response = client.rest().await;
        assert!(response.starts_with(expected), "{request:?}: {response}");
    }
    assert!(app.heads().is_empty());
}

#[tokio::test]
async fn websockets_relay_bytes() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec: x\r\n\r\n";
    let app = App::start(switch, true).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let mut client = mesh.connect();
    client.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: WebSocket\r\n\r\n").await;
    let response = client.until("\r\n\r\n").await;
    assert!(response.starts_with("HTTP/1.1 101") && response.contains("sec: x\r\n"), "{response}");
    assert!(response.contains("upgrade: websocket\r\n") && !response.contains("service-time"), "{response}");
    client.send("hello").await;
    assert_eq!(client.until("hello").await, "hello");
    assert_eq!(mesh.drain.active(), 1);
    let same = NetworkFilter::Http(Box::new(manager(vec![forward("/")], Vec::new())));
    mesh.swap(Mesh::compile(vec![same.clone()], vec![cluster("app", app.address, UpstreamProtocol::Http1)]));
    client.send("again").await;
    assert_eq!(client.until("again").await, "again");
    mesh.swap(without_chain(vec![same]));
    assert_eq!(client.rest().await, "", "no chain would take it any more");
    mesh.drain.wait_for_zero().await;
    assert_eq!(mesh.env.shard().http("s").cx_policy_close.value(), 1);
}

/// Configuration that goes on as before, and that closes connections of everybody.
fn open_and_closed(app: &App) -> (snapshot::Snapshot, snapshot::Snapshot) {
    let http = || NetworkFilter::Http(Box::new(manager(vec![forward("/")], Vec::new())));
    let clusters = || vec![cluster("app", app.address, UpstreamProtocol::Http1)];
    let nobody = model::Rbac { rules: Some(RbacRules::default()), ..model::Rbac::default() };
    (Mesh::compile(vec![http()], clusters()), Mesh::compile(vec![NetworkFilter::Rbac(nobody), http()], clusters()))
}

#[tokio::test]
async fn policy_that_is_tightened_ends_what_goes_on_and_counts_it() {
    let endless = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n";
    let app = App::start(endless, false).await;
    let (open, closed) = open_and_closed(&app);
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let (mut one, mut idle) = (mesh.connect(), mesh.connect());
    let mut two = http2(&mesh).await;
    one.get("/", "hello\r\n").await;
    let ask = Request::get("http://a/").body(Full::default()).unwrap();
    let mut stream = two.send_request(ask).await.unwrap().into_body();
    assert_eq!(stream.frame().await.unwrap().unwrap().into_data().unwrap(), "hello");
    idle.send("GET / HTTP/1.1\r\nhost: a\r\n").await;
    // A push without news of policy ends nothing.
    mesh.swap(open);
    let ask = Request::get("http://a/").body(Full::default()).unwrap();
    assert_eq!(two.send_request(ask).await.unwrap().status(), 200);
    mesh.swap(closed);
    let end = tokio::time::timeout(LIMIT, stream.frame()).await.expect("a stream that goes on is cut");
    assert!(end.is_none_or(|frame| frame.is_err()));
    assert!(!one.rest().await.contains("0\r\n\r\n"), "no response ends that did not");
    idle.rest().await;
    mesh.drain.wait_for_zero().await;
    let counted = mesh.env.shard().http("s");
    assert_eq!((counted.cx_policy_close.value(), counted.cx_drain_close.value()), (3, 0));
}

#[tokio::test]
async fn a_refused_websocket_closes() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let mut client = mesh.connect();
    client.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n").await;
    let response = client.rest().await;
    assert!(response.starts_with("HTTP/1.1 200") && response.contains("connection: close"), "{response}");
    assert!(response.ends_with("\r\n\r\n"));
}

#[tokio::test]
async fn bytes_are_relayed_and_a_half_close_is_passed_on() {
    let app = App::start("", true).await;
    let mesh = Mesh::new(vec![tcp_proxy()], vec![cluster("app", app.address, UpstreamProtocol::Http1)]);
    let mut client = mesh.connect();
    client.send("hello\n").await;
    assert_eq!(client.until("\n").await, "hello\n");
    client.stream.shutdown().await.unwrap();
    assert_eq!(client.rest().await, "");
    client.task.await.unwrap();
    assert_eq!(mesh.drain.active(), 0);
}

#[tokio::test]
async fn denied_bytes_never_reach_the_application() {
    let app = App::start("", true).await;
    let closed = model::Rbac { rules: Some(RbacRules::default()), ..model::Rbac::default() };
    let filters = vec![NetworkFilter::Rbac(closed), tcp_proxy()];
    let mesh = Mesh::new(filters, vec![cluster("app", app.address, UpstreamProtocol::Http1)]);
    let mut client = mesh.connect();
    assert_eq!(client.rest().await, "");
    client.task.await.unwrap();
}

#[tokio::test]
async fn a_policy_that_appears_ends_open_connections() {
    let app = App::start("", true).await;
    let clusters = || vec![cluster("app", app.address, UpstreamProtocol::Http1)];
    let mesh = Mesh::new(vec![tcp_proxy()], clusters());
    let mut client = mesh.connect();
    client.send("hello\n").await;
    client.until("\n").await;
    let same = Mesh::compile(vec![tcp_proxy()], clusters());
    mesh.swap(same);
    client.send("again\n").await;
    assert_eq!(client.until("\n").await, "again\n");
    let closed = model::Rbac { rules: Some(RbacRules::default()), ..model::Rbac::default() };
    let other = Mesh::compile(vec![NetworkFilter::Rbac(closed), tcp_proxy()], clusters());
    mesh.swap(other);
    assert_eq!(client.rest().await, "");
    mesh.drain.wait_for_zero().await;
    assert_eq!(mesh.env.shard().tcp("").cx_policy_close.value(), 1);
}

#[tokio::test]
async fn a_policy_that_cannot_be_used_any_more_ends_open_connections() {
    let app = App::start("", true).await;
    let clusters = || vec![cluster("app", app.address, UpstreamProtocol::Http1)];
    let mesh = Mesh::new(vec![tcp_proxy()], clusters());
    let mut client = mesh.connect();
    client.send("hello\n").await;
    client.until("\n").await;
    let closed = FilterChain {
        name: "c".into(),
        filters: vec![tcp_proxy()],
        unusable: Some("AuthorizationPolicy".into()),
        ..FilterChain::default()
    };
    mesh.swap(Mesh::compile_chain(closed, clusters(), Vec::new()));
    assert_eq!(client.rest().await, "");
}

/// A snapshot whose listener has a chain, but none for the port that clients of these tests ask for.
fn without_chain(filters: Vec<NetworkFilter>) -> snapshot::Snapshot {
    let elsewhere = ChainMatch { destination_port: Some(9), ..ChainMatch::default() };
    Mesh::compile_for(elsewhere, filters, Vec::new(), Vec::new())
}

#[tokio::test]
async fn a_peer_that_no_chain_would_take_any_more_is_closed() {
    let app = App::start("", true).await;
    let mesh = Mesh::new(vec![tcp_proxy()], vec![cluster("app", app.address, UpstreamProtocol::Http1)]);
    let mut client = mesh.connect();
    client.send("hello\n").await;
    client.until("\n").await;
    mesh.swap(without_chain(vec![tcp_proxy()]));
    assert_eq!(client.rest().await, "");
}

/// A configuration that lets only this path prefix pass.
fn allowing(app: &App, prefix: &str) -> snapshot::Snapshot {
    let filters = vec![HttpFilter::Rbac(allow_only(prefix))];
    let manager = NetworkFilter::Http(Box::new(manager(vec![forward("/")], filters)));
    Mesh::compile(vec![manager], vec![cluster("app", app.address, UpstreamProtocol::Http1)])
}

#[tokio::test]
async fn a_changed_policy_holds_for_the_next_request_of_an_open_connection() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::serving(allowing(&app, "/a"));
    let mut one = mesh.connect();
    let mut two = http2(&mesh).await;
    let ask = |path: &'static str| Request::get(format!("http://a{path}")).body(Full::default()).unwrap();
    for (allowed, denied) in [("/a", "/b"), ("/b", "/a"), ("/a", "/b")] {
        mesh.swap(allowing(&app, allowed));
        let refused = one.get(denied, "denied").await;
        assert!(refused.starts_with("HTTP/1.1 403") && !refused.contains("connection: close"), "{refused}");
        assert!(one.get(allowed, "ok\n").await.starts_with("HTTP/1.1 200"));
        assert_eq!(two.send_request(ask(denied)).await.unwrap().status(), 403);
        assert_eq!(two.send_request(ask(allowed)).await.unwrap().status(), 200);
    }
    assert_eq!(app.heads().len(), 6);
}

#[tokio::test]
async fn policy_of_requests_ends_a_websocket_that_would_not_pass_any_more() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
    let app = App::start(switch, true).await;
    let mesh = Mesh::serving(allowing(&app, "/a"));
    let (mut one, mut two) = (mesh.connect(), mesh.connect());
    for (client, path) in [(&mut one, "/a/one"), (&mut two, "/a/two")] {
        let ask = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n");
        client.send(&ask).await;
        assert!(client.until("\r\n\r\n").await.starts_with("HTTP/1.1 101"));
        client.send("hello").await;
        assert_eq!(client.until("hello").await, "hello");
    }
    mesh.swap(allowing(&app, "/a/t"));
    assert_eq!(one.rest().await, "");
    two.send("again").await;
    assert_eq!(two.until("again").await, "again");
    assert_eq!(mesh.env.shard().http("s").cx_policy_close.value(), 1);
}

#[tokio::test]
async fn policy_of_requests_ends_a_grpc_stream_with_its_next_message() {
    let app = grpc_echo().await;
    let allowing = |prefix: &str| {
        let filters = vec![HttpFilter::Rbac(allow_only(prefix))];
        let manager = NetworkFilter::Http(Box::new(manager(vec![forward("/")], filters)));
        Mesh::compile(vec![manager], vec![cluster("app", app, UpstreamProtocol::Http2)])
    };
    let mesh = Mesh::serving(allowing("/a"));
    let far = mesh.connect().stream;
    let (sender, connection) = h2::client::handshake(far).await.unwrap();
    tokio::spawn(connection);
    let mut streams = Vec::new();
    for path in ["/a/one", "/a/two"] {
        let ask = Request::post(format!("http://a{path}")).header("content-type", "application/grpc").body(()).unwrap();
        let (answer, mut send) = sender.clone().ready().await.unwrap().send_request(ask, false).unwrap();
        send.send_data(Bytes::from_static(b"\0\0\0\0\x02hi"), false).unwrap();
        let mut answers = answer.await.unwrap().into_body();
        assert_eq!(answers.data().await.unwrap().unwrap(), "\0\0\0\0\x02hi");
        streams.push((send, answers));
    }
    mesh.swap(allowing("/a/t"));
    for (send, _) in &mut streams {
        send.send_data(Bytes::from_static(b"\0\0\0\0\x02ho"), false).unwrap();
    }
    let (_, one) = &mut streams[0];
    assert!(one.data().await.is_none(), "not another message");
    assert_eq!(one.trailers().await.unwrap().unwrap()["grpc-status"], "7");
    assert_eq!(streams[1].1.data().await.unwrap().unwrap(), "\0\0\0\0\x02ho");
    assert_eq!(mesh.env.shard().http("s").rq_policy_close.value(), 1);
}

/// An HTTP/2 application that sends back what comes; its address.
async fn grpc_echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let echo = hyper::service::service_fn(|request: Request<hyper::body::Incoming>| async {
                let kind = request.headers()["content-type"].clone();
                let mut response = ::http::Response::new(request.into_body());
                response.headers_mut().insert("content-type", kind);
                Ok::<_, std::convert::Infallible>(response)
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            tokio::spawn(server.serve_connection(TokioIo::new(socket), echo));
        }
    });
    address
}

#[tokio::test]
async fn a_connection_whose_chain_is_gone_is_refused_and_ends() {
    let app = App::start(OK, false).await;
    let gone = || without_chain(vec![NetworkFilter::Http(Box::new(manager(vec![forward("/")], Vec::new())))]);
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let (mut busy, mut idle) = (mesh.connect(), mesh.connect());
    let mut two = http2(&mesh).await;
    for client in [&mut busy, &mut idle] {
        client.get("/", "ok\n").await;
    }
    let ask = || Request::get("http://a/").body(Full::default()).unwrap();
    assert_eq!(two.send_request(ask()).await.unwrap().status(), 200);
    mesh.swap(gone());
    // In the buffer before the connection hears of the change.
    busy.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let refused = busy.rest().await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("connection: close\r\n"), "{refused}");
    assert_eq!(idle.rest().await, "");
    let ended = async {
        while two.ready().await.is_ok() {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(LIMIT, ended).await.expect("HTTP/2 is told to go away");
    assert_eq!(app.heads().len(), 3);
    mesh.drain.wait_for_zero().await;
}

#[tokio::test]
async fn leaving_closes_after_the_response_and_then_what_is_idle() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let (mut busy, mut idle) = (mesh.connect(), mesh.connect());
    busy.get("/", "ok\n").await;
    idle.get("/", "ok\n").await;
    mesh.drain.enter(Phase::Lame);
    let response = busy.get("/", "ok\n").await;
    assert!(response.contains("connection: close\r\n"), "{response}");
    assert_eq!(busy.rest().await, "");
    mesh.drain.enter(Phase::Closing);
    assert_eq!(idle.rest().await, "");
    mesh.drain.wait_for_zero().await;
}

#[tokio::test]
async fn leaving_tells_http2_before_the_end() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let mut two = http2(&mesh).await;
    assert_eq!(two.send_request(post("/", "a")).await.unwrap().status(), 200);
    mesh.drain.enter(Phase::Lame);
    let ended = async {
        while two.ready().await.is_ok() {
            tokio::task::yield_now().await
        }
    };
    tokio::time::timeout(LIMIT, ended).await.expect("GOAWAY while there is time");
    mesh.drain.wait_for_zero().await;
}

#[tokio::test]
async fn a_body_of_unknown_length_goes_with_any_method() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let mut client = mesh.connect();
    client.send("GET / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n").await;
    client.until("ok\n").await;
    assert!(app.heads()[0].contains("transfer-encoding: chunked\r\n"), "{}", app.heads()[0]);
}

#[tokio::test]
async fn the_last_request_of_a_connection_closes_it() {
    let app = App::start(OK, false).await;
    let said =
        HttpConnectionManager { max_requests_per_connection: Some(2), ..manager(vec![forward("/")], Vec::new()) };
    let mesh = Mesh::managed(&app, said);
    let mut client = mesh.connect();
    assert!(!client.get("/", "ok\n").await.contains("connection: close"));
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(client.rest().await.contains("connection: close\r\n"));
}

#[tokio::test]
async fn the_last_request_of_an_http2_connection_closes_it() {
    let app = App::start(OK, false).await;
    let said =
        HttpConnectionManager { max_requests_per_connection: Some(2), ..manager(vec![forward("/")], Vec::new()) };
    let mesh = Mesh::managed(&app, said);
    let io = TokioIo::new(mesh.connect().stream);
    let (mut sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    let ended = tokio::spawn(connection);
    for _ in 0..2 {
        assert!(!ended.is_finished());
        let response = sender.send_request(post("/", "a")).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok\n");
    }
    tokio::time::timeout(LIMIT, ended).await.expect("GOAWAY").unwrap().unwrap();
}

async fn http2(mesh: &Mesh) -> SendRequest<Full<Bytes>> {
    let io = TokioIo::new(mesh.connect().stream);
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn post(path: &str, kind: &str) -> Request<Full<Bytes>> {
    let request = Request::post(format!("http://a{path}")).header("content-type", kind);
    request.body(Full::new(Bytes::from_static(b"abc"))).unwrap()
}

#[tokio::test]
async fn http2_streams_share_a_connection() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let mut sender = http2(&mesh).await;
    let (one, two) = tokio::join!(sender.clone().send_request(post("/1", "a")), sender.send_request(post("/2", "a")));
    for response in [one.unwrap(), two.unwrap()] {
        assert_eq!((response.status().as_u16(), &response.headers()["x-app"]), (200, &"1".parse().unwrap()));
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok\n");
    }
    let heads = app.heads();
    assert!(
        heads.iter().all(|head| head.contains("content-length: 3\r\n") && head.contains("host: a\r\n")),
        "{heads:?}"
    );
}

#[tokio::test]
async fn grpc_clients_get_trailers_only() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], vec![HttpFilter::Rbac(allow_only("/api"))]);
    let mut sender = http2(&mesh).await;
    let response = sender.send_request(post("/x", "application/grpc")).await.unwrap();
    let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap());
    assert_eq!((response.status().as_u16(), header("grpc-status")), (200, Some("7")));
    assert_eq!((header("grpc-message"), header("content-length")), (Some("RBAC: access denied"), None));
    let text = sender.send_request(post("/x", "a")).await.unwrap();
    assert_eq!(text.status(), 403);
    assert!(!text.headers().contains_key("connection"));
}

#[tokio::test]
async fn a_server_that_speaks_first_is_heard() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.write_all(b"220 hello\r\n").await.unwrap();
        let mut rest = Vec::new();
        socket.read_to_end(&mut rest).await.unwrap();
    });
    let clusters = vec![cluster("app", address, UpstreamProtocol::Http1)];
    let mesh = Mesh::sniffing(vec![tcp_proxy()], clusters);
    let mut client = mesh.connect();
    assert_eq!(client.until("\n").await, "220 hello\r\n");
}

#[tokio::test]
async fn mirrors_get_the_body_too() {
    let (app, shadow) = (App::start(OK, false).await, App::start(OK, false).await);
    let mirror = model::Mirror { cluster: "shadow".into(), millionths: 1_000_000, shadow_suffix: true };
    let action = RouteAction::Forward(Box::new(Forward { mirrors: vec![mirror], ..to("app") }));
    let manager = manager(vec![route("/", action)], Vec::new());
    let clusters = vec![
        cluster("app", app.address, UpstreamProtocol::Http1),
        cluster("shadow", shadow.address, UpstreamProtocol::Http1),
    ];
    let mesh = Mesh::new(vec![NetworkFilter::Http(Box::new(manager))], clusters);
    let mut client = mesh.connect();
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc").await;
    client.until("ok\n").await;
    let seen = async {
        while shadow.heads().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, seen).await.expect("the copy arrives");
    let head = shadow.heads().remove(0);
    assert!(head.contains("host: a-shadow\r\n") && head.contains("content-length: 3\r\n"), "{head}");
    assert!(head.contains("x-envoy-internal: true\r\n") && head.contains("x-forwarded-for: 10.0.0.1\r\n"), "{head}");
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_end_ends_the_connection() {
    let app = App::start(OK, false).await;
    let head = "GET / HTTP/1.1\r\nhost: a\r\nx: ";
    let late = "HTTP/1.1 408 Request Timeout\r\n";
    for (start, told) in [(head, late), ("G", late), ("PRI * HTTP/2", "")] {
        let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
        let mut client = mesh.connect();
        client.send(start).await;
        let begun = tokio::time::Instant::now();
        let mut answer = String::new();
        client.stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(told) && answer.is_empty() == told.is_empty(), "{start}: {answer}");
        assert!(begun.elapsed() < watched::HEAD_LIMIT * 2, "{start}: {:?}", begun.elapsed());
        client.task.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn what_makes_no_sense_is_bytes_after_a_while() {
    let app = App::start("", true).await;
    let mesh = Mesh::sniffing(vec![tcp_proxy()], vec![cluster("app", app.address, UpstreamProtocol::Http1)]);
    let mut client = mesh.connect();
    client.send("hello").await;
    let mut echoed = [0; 5];
    client.stream.read_exact(&mut echoed).await.unwrap();
    assert_eq!(&echoed, b"hello");
}

#[tokio::test]
async fn whoever_gives_up_all_requests_is_cut_off() {
    // It never answers.
    let app = App::start("", false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let (honest, mut hasty) = (http2(&mesh).await, http2(&mesh).await);
    let mut given_up = 0;
    while hasty.ready().await.is_ok() && given_up < 10_000 {
        let sent = app.heads().len();
        let answer = tokio::spawn(hasty.send_request(post("/", "a")));
        // Given up once it is under way, not before: that is the library's to count.
        while app.heads().len() == sent && !answer.is_finished() {
            tokio::task::yield_now().await;
        }
        answer.abort();
        given_up += 1;
    }
    assert!((250..300).contains(&given_up), "{given_up}");
    assert!(honest.is_ready());
}

#[tokio::test]
async fn a_pause_ends_nothing() {
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let mut client = mesh.connect();
    for _ in 0..3 {
        client.get("/a", "ok\n").await;
        tokio::time::pause();
        // The codec is gone after this.
        tokio::time::sleep(Duration::from_secs(10)).await;
        tokio::time::resume();
        // The same in the middle of a head: it goes on where it was.
        client.send("GET /b HTTP/1.1\r\nho").await;
        tokio::time::pause();
        tokio::time::sleep(Duration::from_secs(10)).await;
        tokio::time::resume();
        client.send("st: a\r\n\r\n").await;
        client.until("ok\n").await;
    }
    assert_eq!(app.heads().len(), 6);
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(10)).await;
    tokio::time::resume();
    mesh.drain.enter(Phase::Closing);
    assert_eq!(client.rest().await, "");
    client.task.await.unwrap();
}

#[tokio::test]
async fn a_body_that_pauses_is_no_request() {
    // Answers before it has the body.
    let app = App::start(OK, false).await;
    let mesh = Mesh::http(&app, vec![forward("/")], Vec::new());
    let mut client = mesh.connect();
    client.send("POST /first HTTP/1.1\r\nhost: a\r\ncontent-length: 200\r\n\r\n").await;
    client.until("ok\n").await;
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(10)).await;
    tokio::time::resume();
    // It may be cut off; it must not be heard.
    let _ = client.stream.write_all(b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(1), client.stream.read_to_end(&mut rest)).await;
    assert!(!String::from_utf8_lossy(&rest).contains("HTTP/1.1"), "{}", String::from_utf8_lossy(&rest));
}
