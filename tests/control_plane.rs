//! The real proxy, in this process, against a control plane that behaves well, badly, and not at all.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bench_harness::istiod::{self, Ca, Istiod, Setup, ads, resources};
use bytes::Bytes;
use istio_proxy::control::{self, Certs, Control, Input, Published};
use istio_proxy::drain::Drain;
use istio_proxy::grpc::{Credentials, Server};
use istio_proxy::proxy::Node;
use istio_proxy::telemetry::{LogOptions, Logs, NodeLabels, Telemetry};
use istio_proxy::worker::{self, Workers};
use istio_proxy::xds::{self, Ask, DeltaDiscoveryResponse, HEALTH, Health, Kind, Options, Request};
use proxy_config::bootstrap::Roots;
use proxy_config::model::Endpoints;
use proxy_config::xds::{Material, Secret};
use proxy_config::{WhoAmI, sds};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

/// How long an event may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A proxy that follows control planes.
struct Proxy {
    published: watch::Receiver<Arc<Published>>,
    /// Version whose sockets are open.
    open: watch::Receiver<u64>,
    health: watch::Sender<Option<Health>>,
    asks: mpsc::Sender<Ask>,
    _workers: tokio::task::JoinHandle<()>,
    _files: tempfile::TempDir,
    _drain: Drain,
    _asked: mpsc::Sender<()>,
}

/// A control plane with its discovery half at hand.
async fn plane() -> (Istiod, Arc<ads::Ads>) {
    plane_as(Setup::default()).await
}

/// The same, with certificates of another kind.
async fn plane_as(setup: Setup) -> (Istiod, Arc<ads::Ads>) {
    let ads = Arc::new(ads::Ads::default());
    let services = vec![(ads::SERVICE, Arc::clone(&ads) as _)];
    let istiod = Istiod::start(Setup { services, ..setup }).await.expect("a control plane");
    (istiod, ads)
}

/// How a proxy reaches them; its files are in a folder.
fn discovery(planes: &[&Istiod], files: &Path) -> xds::Settings {
    let server = |(at, plane): (usize, &&Istiod)| {
        let root = files.join(format!("root-{at}.pem"));
        std::fs::write(&root, plane.roots()).expect("written");
        Server {
            address: plane.address().to_string(),
            name: Some(istiod::NAME.to_owned()),
            roots: Some(Roots::File(root)),
            client: None,
            keepalive: None,
        }
    };
    let token = files.join("token");
    std::fs::write(&token, "tok:a:b\n").expect("written");
    let headers = vec![("ClusterID".to_owned(), "Kubernetes".to_owned())];
    xds::Settings {
        options: Options {
            delta: true,
            node: Bytes::from_static(b"\x0a\x04node"),
            names: true,
            proxy_config: false,
            checks: control::CHECKS,
        },
        servers: planes.iter().enumerate().map(server).collect(),
        credentials: Credentials { token: Some(token), headers },
    }
}

async fn proxy(planes: &[&Istiod]) -> Proxy {
    let files = tempfile::tempdir().expect("a folder");
    let (health, reports) = watch::channel(None);
    let telemetry = Telemetry::new(NodeLabels::default());
    let stream = xds::start(discovery(planes, files.path()), reports);
    let asks = stream.asks.clone();
    let control = Control::start(control::Settings {
        input: Input::Stream(stream),
        who: WhoAmI::Env(Default::default()),
        certs: Certs::None,
        publish_health: None,
    })
    .expect("nothing is needed");
    let (drain, leaving) = Drain::new();
    let (publish, published) = watch::channel(control.published());
    let (snapshots, receiver) = watch::channel(Arc::clone(&published.borrow().snapshot));
    let logs = Arc::new(Logs::start(LogOptions::default(), &telemetry).expect("a thread"));
    let settings = worker::Settings {
        snapshots: receiver,
        drain: leaving,
        node: Node::default(),
        telemetry,
        logs,
        connections: usize::MAX,
        refuse_above: None,
    };
    let mut workers = Workers::start(2, &settings).expect("threads");
    let (asked, asks_of_ours) = mpsc::channel(1);
    tokio::spawn(control::run(control, publish, asks_of_ours));
    let mut news = published.clone();
    let (opened, open) = watch::channel(0);
    let following = tokio::spawn(async move {
        while news.changed().await.is_ok() {
            let now = Arc::clone(&news.borrow_and_update());
            snapshots.send_replace(Arc::clone(&now.snapshot));
            assert!(workers.sockets(&now.snapshot).is_empty());
            opened.send_replace(now.version);
        }
    });
    Proxy { published, open, health, asks, _workers: following, _files: files, _drain: drain, _asked: asked }
}

impl Proxy {
    /// Waits until this holds of what is served, sockets included.
    async fn serves(&mut self, is: impl Fn(&Published) -> bool) -> Arc<Published> {
        let waited = timeout(LIMIT, self.published.wait_for(|published| is(published))).await;
        let published = Arc::clone(&waited.expect("in time").expect("somebody publishes"));
        let open = timeout(LIMIT, self.open.wait_for(|version| *version >= published.version)).await;
        open.expect("in time").expect("somebody listens");
        published
    }
}

async fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.and_then(|l| l.local_addr()).expect("a port")
}

/// An application that echoes what it gets, HTTP upgrades answered.
async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            tokio::spawn(answer(tcp));
        }
    });
    address
}

async fn answer(mut tcp: TcpStream) -> std::io::Result<()> {
    let mut seen = vec![0; 64 * 1024];
    let read = tcp.read(&mut seen).await?;
    let head = String::from_utf8_lossy(&seen[..read]).into_owned();
    if head.to_ascii_lowercase().contains("upgrade: websocket") {
        let yes = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\r\n";
        tcp.write_all(yes.as_bytes()).await?;
    } else if head.starts_with("GET /stream") {
        tcp.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n").await?;
        // The response goes on for as long as somebody listens.
        let mut rest = [0; 1];
        while tcp.read(&mut rest).await? > 0 {}
        return Ok(());
    } else if head.starts_with("GET") {
        return tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok").await;
    } else {
        tcp.write_all(&seen[..read]).await?;
    }
    let (mut reader, mut writer) = tcp.split();
    tokio::io::copy(&mut reader, &mut writer).await.map(|_| ())
}

/// Puts an application behind an HTTP and a TCP listener.
fn mesh(ads: &ads::Ads, app: SocketAddr, http: SocketAddr, tcp: SocketAddr) {
    for name in ["web", "db"] {
        ads.set(Kind::Cluster, name, resources::eds_cluster(name, 5));
        ads.set(Kind::Endpoints, name, resources::assignment(name, &[app]));
    }
    ads.set(Kind::Listener, "http", resources::http_listener("http", http, "80", Vec::new()));
    ads.set(Kind::Listener, "tcp", resources::tcp_listener("tcp", tcp, "db"));
    ads.set(Kind::Routes, "80", resources::table("80", "web", 0));
    ads.set(Kind::Names, "", resources::no_names());
}

async fn get(address: SocketAddr) -> String {
    get_path(address, "/").await
}

async fn get_path(address: SocketAddr, path: &str) -> String {
    let mut tcp = TcpStream::connect(address).await.expect("a listener");
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    tcp.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    timeout(LIMIT, tcp.read_to_string(&mut answer)).await.expect("in time").expect("an answer");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn what_istiod_says_is_served_and_asked_for_as_the_agent_asks() {
    let (istiod, ads) = plane().await;
    let (http, tcp) = (free().await, free().await);
    mesh(&ads, echo().await, http, tcp);
    let mut proxy = proxy(&[&istiod]).await;
    assert!(!proxy.published.borrow().unready(0).is_empty(), "nothing yet");
    proxy.serves(|p| p.snapshot.listeners().len() == 2).await;
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
    let first = &ads.heard.all()[0];
    assert_eq!(first.metadata["authorization"], "Bearer tok:a:b");
    assert_eq!(first.metadata["clusterid"], "Kubernetes");
    let Request::Delta(request) = &first.request else { panic!("delta is the default") };
    assert_eq!((request.type_url.as_str(), request.node.is_some()), (Kind::Cluster.url(), true));
    // Endpoints alone: everything else stays the same object.
    let before = Arc::clone(&proxy.published.borrow());
    ads.set(Kind::Endpoints, "web", resources::assignment("web", &[free().await]));
    ads.push_some(Kind::Endpoints, &["web"]);
    let after = proxy.serves(|p| p.version > before.version).await;
    assert!(after.model.clusters.same(&before.model.clusters));
    assert!(Arc::ptr_eq(&after.rejects, &before.rejects));
    assert!(get(http).await.starts_with("HTTP/1.1 503"), "nobody is there");
    assert_eq!(after.received.of(Kind::Cluster).len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_listener_is_refused_by_name_and_the_old_one_serves() {
    let (istiod, ads) = plane().await;
    let (http, tcp) = (free().await, free().await);
    mesh(&ads, echo().await, http, tcp);
    let mut proxy = proxy(&[&istiod]).await;
    proxy.serves(|p| p.version > 0).await;
    ads.set(Kind::Listener, "http", resources::http_listener("http", http, "80", vec![resources::unknown_guard()]));
    ads.push(Kind::Listener);
    let heard = ads.hears(|heard| heard.request.error().is_some()).await;
    let said = &heard.request.error().expect("a refusal").message;
    assert!(said.contains("Listener http: http_filters[envoy.filters.http.oauth2]"), "{said}");
    let published = proxy.serves(|p| !p.rejects.is_empty()).await;
    assert!(published.received.get(Kind::Listener, "http").expect("held").refused.is_some());
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_could_not_be_enforced_is_refused_and_the_old_one_is_in_force() {
    let (istiod, ads) = plane().await;
    let (http, tcp) = (free().await, free().await);
    mesh(&ads, echo().await, http, tcp);
    let with = |path: &str| resources::http_listener("http", http, "80", vec![resources::policy(path)]);
    ads.set(Kind::Listener, "http", with("/secret.*"));
    let mut proxy = proxy(&[&istiod]).await;
    proxy.serves(|p| p.version > 0).await;
    assert!(get_path(http, "/secret").await.starts_with("HTTP/1.1 403"));
    ads.set(Kind::Listener, "http", with("/(public"));
    ads.push(Kind::Listener);
    let heard = ads.hears(|heard| heard.request.error().is_some()).await;
    let said = &heard.request.error().expect("a refusal").message;
    assert!(said.contains("Listener http: filter_chains[].rbac: paths: "), "{said}");
    let told = proxy.serves(|p| !p.rejects.is_empty()).await;
    assert!(told.unready(0).is_empty(), "what is served is whole: {:?}", told.unready(0));
    assert!(get_path(http, "/secret").await.starts_with("HTTP/1.1 403"));
    assert!(get_path(http, "/public").await.starts_with("HTTP/1.1 200"));
    // Where nothing was before, nothing is served in its place.
    let other = free().await;
    ads.set(Kind::Listener, "new", resources::http_listener("new", other, "80", vec![resources::policy("(")]));
    ads.set(Kind::Listener, "http", with("/public.*"));
    ads.push(Kind::Listener);
    let now =
        proxy.serves(|p| p.version > told.version && p.rejects.iter().all(|r| r.resource == "Listener new")).await;
    assert!(now.snapshot.listener("new").is_none() && TcpStream::connect(other).await.is_err());
    // Workers take over what is published a moment later.
    let in_force = async { while !get_path(http, "/public").await.starts_with("HTTP/1.1 403") {} };
    timeout(LIMIT, in_force).await.expect("the policy is in force");
}

#[tokio::test(flavor = "multi_thread")]
async fn key_material_of_the_stream_serves_both_sides_is_renewed_and_never_lost() {
    let (istiod, ads) = plane().await;
    let (out, inside) = (free().await, free().await);
    // One proxy calls itself: out → cluster over TLS → listener behind TLS → application.
    let (own, client, roots) = ("kubernetes://shop", "kubernetes://shop-client", "kubernetes://shop-cacert");
    ads.set(Kind::Cluster, "app", resources::eds_cluster("app", 5));
    ads.set(Kind::Endpoints, "app", resources::assignment("app", &[echo().await]));
    ads.set(Kind::Cluster, "shop", resources::over_tls(resources::eds_cluster("shop", 5), client, roots));
    ads.set(Kind::Endpoints, "shop", resources::assignment("shop", &[inside]));
    ads.set(Kind::Listener, "out", resources::tcp_listener("out", out, "shop"));
    ads.set(Kind::Listener, "in", resources::with_tls(resources::tcp_listener("in", inside, "app"), own, roots));
    ads.set(Kind::Names, "", resources::no_names());
    let ca = Ca::new("shop").expect("a CA");
    let pair = |account: &str| {
        let (now, hour) = (time::OffsetDateTime::now_utc(), time::Duration::hours(1));
        let id = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        let (chain, key) = ca.issue(&id, now - hour, now + hour).expect("signed");
        Material::Certificate { chain: chain.into(), key: key.into() }
    };
    let put = |name: &str, material: Material| {
        ads.set(Kind::Secret, name, sds::write(&Secret { name: name.into(), material }));
        ads.push_some(Kind::Secret, &[name]);
    };
    let mut proxy = proxy(&[&istiod]).await;
    for name in [client, own, roots] {
        let asks = |request: &Request| matches!(request, Request::Delta(r) if r.resource_names_subscribe.iter().any(|asked| asked == name));
        let heard = ads.hears(|heard| asks(&heard.request)).await;
        assert_eq!(heard.request.type_url(), Kind::Secret.url());
    }
    // Without secrets nobody gets through, and that is no fault that istiod hears of.
    proxy.serves(|p| p.version > 0).await;
    assert!(!echoes(out).await);
    put(roots, Material::Roots { pem: ca.root().into(), revoked: None });
    put(client, pair("client"));
    put(own, pair("server"));
    let first = proxy.serves(|p| p.snapshot.secrets().identity(own).is_some() && p.unready(0).is_empty()).await;
    // Workers take over what is published a moment later.
    let through = async {
        while !echoes(out).await {
            tokio::task::yield_now().await;
        }
    };
    timeout(LIMIT, through).await.expect("it gets through");
    assert!(ads.heard.all().iter().all(|heard| heard.request.error().is_none()));
    // Garbage is refused by name and changes nothing.
    put(own, Material::Certificate { chain: "garbage".into(), key: "garbage".into() });
    let heard = ads.hears(|heard| heard.request.error().is_some()).await;
    let said = &heard.request.error().expect("a refusal").message;
    assert!(said.contains("Secret kubernetes://shop: tls_certificate: "), "{said}");
    assert!(echoes(out).await);
    // A renewal is what new connections meet.
    put(own, pair("renewed"));
    let serial = |p: &Published| p.snapshot.secrets().identity(own).map(|i| i.info[0].serial.clone());
    let old = serial(&first);
    proxy.serves(|p| serial(p) != old).await;
    assert!(echoes(out).await);
}

/// Whether bytes come back through a TCP listener.
async fn echoes(at: SocketAddr) -> bool {
    let exchange = async {
        let mut tcp = TcpStream::connect(at).await?;
        tcp.write_all(b"hello").await?;
        let mut back = [0; 5];
        tcp.read_exact(&mut back).await?;
        Ok::<_, std::io::Error>(&back == b"hello")
    };
    timeout(LIMIT, exchange).await.expect("in time").unwrap_or(false)
}

#[tokio::test(flavor = "multi_thread")]
async fn late_endpoints_hold_back_only_what_needs_them() {
    let (istiod, ads) = plane().await;
    let (http, tcp, app) = (free().await, free().await, echo().await);
    mesh(&ads, app, http, tcp);
    let mut proxy = proxy(&[&istiod]).await;
    proxy.serves(|p| p.version > 0).await;
    // A route to a new cluster whose endpoints come late: the old route serves meanwhile.
    ads.hold(Kind::Endpoints);
    ads.set(Kind::Cluster, "new", resources::eds_cluster("new", 5));
    ads.set(Kind::Endpoints, "new", resources::assignment("new", &[app]));
    ads.push(Kind::Cluster);
    ads.set(Kind::Routes, "80", resources::table("80", "new", 0));
    ads.push(Kind::Routes);
    ads.hears(|heard| matches!(&heard.request, Request::Delta(r) if r.resource_names_subscribe == ["new"])).await;
    // What does not depend on it goes ahead.
    let other = free().await;
    ads.set(Kind::Listener, "more", resources::tcp_listener("more", other, "db"));
    ads.push(Kind::Listener);
    let meanwhile = proxy.serves(|p| p.snapshot.listener("more").is_some()).await;
    assert!(!meanwhile.model.clusters.contains_key("new"));
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
    ads.release(Kind::Endpoints);
    proxy.serves(|p| p.model.clusters.contains_key("new")).await;
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_streams_are_taken_up_again_with_what_is_held_and_the_health_at_once() {
    let (istiod, ads) = plane().await;
    let (http, tcp) = (free().await, free().await);
    mesh(&ads, echo().await, http, tcp);
    let mut proxy = proxy(&[&istiod]).await;
    proxy.health.send_replace(Some(Health { healthy: false, message: "503".into() }));
    proxy.serves(|p| p.version > 0).await;
    let on = |stream: usize| move |heard: &ads::Heard| heard.stream == stream && heard.request.type_url() == HEALTH;
    let first = ads.hears(on(1)).await;
    assert_eq!(first.request.error().map(|e| e.message.as_str()), Some("503"));
    for (stream, how) in [(2, 0), (3, 1), (4, 2)] {
        match how {
            0 => ads.end(None),
            1 => ads.end(Some(tonic::Status::unavailable("going"))),
            _ => istiod.server.hang_up(),
        }
        ads.hears(on(stream)).await;
        let again = ads.heard.all();
        let opening = again.iter().find(|heard| heard.stream == stream).expect("it was opened");
        let Request::Delta(opening) = &opening.request else { panic!("delta") };
        assert!(opening.node.is_some() && opening.initial_resource_versions.contains_key("web"));
        assert!(get(http).await.starts_with("HTTP/1.1 200"));
    }
    let version = proxy.published.borrow().version;
    ads.end(None);
    ads.hears(on(5)).await;
    assert_eq!(proxy.published.borrow().version, version, "nothing was new on any of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_changes_nothing() {
    let (istiod, ads) = plane().await;
    let (http, tcp) = (free().await, free().await);
    mesh(&ads, echo().await, http, tcp);
    let mut proxy = proxy(&[&istiod]).await;
    let version = proxy.serves(|p| p.version > 0).await.version;
    let stray = |kind: Kind, nonce: &str| DeltaDiscoveryResponse {
        type_url: kind.url().to_owned(),
        nonce: nonce.to_owned(),
        ..Default::default()
    };
    // A type that nobody asked for is not answered; whatever nonce comes is, even without a version.
    ads.say(stray(Kind::Secret, "x"));
    ads.say(DeltaDiscoveryResponse { type_url: "nonsense".into(), nonce: "y".into(), ..Default::default() });
    ads.push_some(Kind::Endpoints, &["nobody"]);
    ads.say(stray(Kind::Cluster, "nonce-of-another"));
    ads.hears(|heard| heard.request.nonce() == "nonce-of-another").await;
    let answered = ads.heard.all();
    assert!(answered.iter().all(|heard| !matches!(heard.request.nonce(), "x" | "y")));
    assert_eq!(proxy.published.borrow().version, version);
    // After all that a real change comes through.
    ads.set(Kind::Routes, "80", resources::table("80", "web", 3));
    ads.push(Kind::Routes);
    proxy.serves(|p| p.version > version).await;
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_control_plane_is_asked_when_one_refuses_or_is_down() {
    let (down, _) = plane().await;
    let (refusing, no) = plane().await;
    let (good, ads) = plane().await;
    down.server.set_down(true);
    no.refuse(Some(tonic::Status::resource_exhausted("too many")));
    let (http, tcp) = (free().await, free().await);
    mesh(&ads, echo().await, http, tcp);
    let mut proxy = proxy(&[&down, &refusing, &good]).await;
    proxy.serves(|p| p.version > 0).await;
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
    proxy.asks.send(Ask::ChangeServer).await.expect("somebody listens");
    // Around the circle, back to the one that answers.
    ads.opened.reach(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_not_the_control_plane_hears_nothing_and_the_next_is_asked() {
    let other = Arc::new(Ca::new("somebody else").expect("keys"));
    let (impostor, nothing) = plane_as(Setup { server_ca: Some(other), ..Setup::default() }).await;
    let (expired, never) = plane_as(Setup { expired: true, ..Setup::default() }).await;
    let (good, ads) = plane().await;
    let (http, tcp) = (free().await, free().await);
    mesh(&ads, echo().await, http, tcp);
    let mut proxy = proxy(&[&impostor, &expired, &good]).await;
    proxy.serves(|p| p.version > 0).await;
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
    for (plane, ads) in [(&impostor, &nothing), (&expired, &never)] {
        let tried = plane.server.connections().reach(1).await;
        assert!(tried.iter().all(|connection| connection.error.is_some()), "{tried:?}");
        assert!(ads.opened.is_empty() && ads.heard.is_empty());
    }
}

#[tokio::test]
async fn a_stream_that_goes_silent_is_given_up_for_the_next_control_plane() {
    let (silent, nothing) = plane().await;
    let (good, ads) = plane().await;
    nothing.set_silent(true);
    let (http, tcp) = (free().await, free().await);
    mesh(&ads, echo().await, http, tcp);
    let mut proxy = proxy(&[&silent, &good]).await;
    nothing.heard.reach(1).await;
    assert!(ads.opened.is_empty(), "it is given time");
    // As if the time had passed; whoever is there has other troubles than us.
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(31)).await;
    tokio::time::resume();
    proxy.serves(|p| p.version > 0).await;
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_come_before_their_cluster_are_asked_for_again() {
    let (istiod, ads) = plane().await;
    let (http, tcp, app) = (free().await, free().await, echo().await);
    mesh(&ads, app, http, tcp);
    let mut proxy = proxy(&[&istiod]).await;
    let version = proxy.serves(|p| p.version > 0).await.version;
    // Endpoints, route and cluster, in the order in which nothing makes sense.
    ads.set(Kind::Endpoints, "late", resources::assignment("late", &[app]));
    ads.push_some(Kind::Endpoints, &["late"]);
    ads.set(Kind::Routes, "80", resources::table("80", "late", 0));
    ads.push(Kind::Routes);
    ads.hears(|heard| heard.request.type_url() == Kind::Routes.url() && !heard.request.nonce().is_empty()).await;
    assert!(get(http).await.starts_with("HTTP/1.1"), "somebody answers meanwhile");
    ads.set(Kind::Cluster, "late", resources::eds_cluster("late", 5));
    ads.push(Kind::Cluster);
    ads.hears(|heard| matches!(&heard.request, Request::Delta(r) if r.resource_names_subscribe == ["late"])).await;
    proxy.serves(|p| p.version > version && p.model.clusters.contains_key("late")).await;
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
    // Some of a kind is not all of it: the others are held.
    ads.set(Kind::Endpoints, "web", resources::assignment("web", &[app, free().await]));
    ads.push_some(Kind::Endpoints, &["web"]);
    let after = proxy.serves(|p| p.model.endpoints.get("web").is_some_and(|e| hosts(e) == 2)).await;
    assert_eq!((after.model.endpoints.len(), after.model.clusters.len()), (3, 3));
}

fn hosts(of: &Endpoints) -> usize {
    of.localities.iter().map(|locality| locality.endpoints.len()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn five_thousand_clusters_come_and_one_endpoint_changes() {
    const MANY: usize = 5000;
    let (istiod, ads) = plane().await;
    let (http, tcp, app) = (free().await, free().await, echo().await);
    mesh(&ads, app, http, tcp);
    for n in 0..MANY {
        let name = format!("outbound|80||s{n}.ns.svc.cluster.local");
        ads.set(Kind::Cluster, &name, resources::eds_cluster(&name, 5));
        ads.set(Kind::Endpoints, &name, resources::assignment(&name, &[app]));
    }
    let mut proxy = proxy(&[&istiod]).await;
    let before = proxy.serves(|p| p.snapshot.listeners().len() == 2).await;
    assert_eq!((before.model.clusters.len(), before.model.endpoints.len()), (MANY + 2, MANY + 2));
    assert!(get(http).await.starts_with("HTTP/1.1 200"));
    let name = format!("outbound|80||s{}.ns.svc.cluster.local", MANY / 2);
    ads.set(Kind::Endpoints, &name, resources::assignment(&name, &[app, free().await]));
    ads.push_some(Kind::Endpoints, &[&name]);
    let after = proxy.serves(|p| p.version > before.version).await;
    assert!(after.model.clusters.same(&before.model.clusters), "clusters are the same objects");
    let same = |name: &str, now| before.model.endpoints.get(name).is_some_and(|was| Arc::ptr_eq(was, now));
    let changed = after.model.endpoints.iter().filter(|(name, now)| !same(name, now));
    let changed: Vec<&str> = changed.map(|(name, _)| &**name).collect();
    assert_eq!(changed, [&*name], "one load assignment is another");
    // What is asked for again on a new stream is everything, and that is no news.
    let version = after.version;
    ads.end(None);
    ads.opened.reach(2).await;
    ads.hears(|heard| heard.stream == 2 && heard.request.type_url() == Kind::Routes.url()).await;
    assert_eq!(proxy.published.borrow().version, version);
}

/// A connection of one kind that must live through everything.
enum Live {
    Raw(TcpStream),
    Stream(TcpStream),
}

impl Live {
    async fn websocket(at: SocketAddr) -> Self {
        let mut tcp = TcpStream::connect(at).await.expect("a listener");
        let ask = "GET /ws HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n";
        tcp.write_all(ask.as_bytes()).await.expect("sent");
        let head = head(&mut tcp).await;
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        Self::Raw(tcp)
    }

    async fn idle(at: SocketAddr) -> Self {
        Self::Raw(TcpStream::connect(at).await.expect("a listener"))
    }

    async fn response(at: SocketAddr) -> Self {
        let mut tcp = TcpStream::connect(at).await.expect("a listener");
        tcp.write_all(b"GET /stream HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("sent");
        let head = head(&mut tcp).await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        Self::Stream(tcp)
    }

    /// Whether bytes still go to and fro; a response that goes on must not have ended.
    async fn lives(&mut self, round: usize) -> bool {
        match self {
            Self::Raw(tcp) => {
                let said = format!("round {round:04}");
                if tcp.write_all(said.as_bytes()).await.is_err() {
                    return false;
                }
                let mut back = vec![0; said.len()];
                let read = timeout(LIMIT, tcp.read_exact(&mut back)).await;
                matches!(read, Ok(Ok(_))) && back == said.as_bytes()
            }
            Self::Stream(tcp) => {
                let mut buffer = [0; 512];
                loop {
                    match tcp.try_read(&mut buffer) {
                        Ok(0) => return false,
                        Ok(read) if buffer[..read].ends_with(b"0\r\n\r\n") => return false,
                        Ok(_) => {}
                        Err(e) => return e.kind() == std::io::ErrorKind::WouldBlock,
                    }
                }
            }
        }
    }
}

async fn head(tcp: &mut TcpStream) -> String {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        let byte = timeout(LIMIT, tcp.read_u8()).await.expect("in time").expect("an answer");
        seen.push(byte);
    }
    String::from_utf8(seen).expect("a head")
}

/// Pushes of everything that a mesh's day brings, against connections that were there before.
async fn pushes_against_connections(pushes: usize, connections: usize) {
    let (istiod, ads) = plane().await;
    let (http, tcp, app) = (free().await, free().await, echo().await);
    mesh(&ads, app, http, tcp);
    let mut proxy = proxy(&[&istiod]).await;
    proxy.serves(|p| p.version > 0).await;
    let mut live = Vec::new();
    for i in 0..connections {
        live.push(match i % 3 {
            0 => Live::websocket(http).await,
            1 => Live::idle(tcp).await,
            _ => Live::response(http).await,
        });
    }
    for round in 0..pushes {
        let version = proxy.published.borrow().version;
        let seconds = i64::try_from(round).expect("few") + 6;
        match round % 6 {
            // The same again, as istiod does it all day.
            0 => [Kind::Cluster, Kind::Endpoints, Kind::Listener, Kind::Routes].into_iter().for_each(|k| ads.push(k)),
            1 => {
                ads.set(Kind::Cluster, "web", resources::eds_cluster("web", seconds));
                ads.push(Kind::Cluster);
            }
            2 => {
                ads.set(Kind::Endpoints, "db", resources::assignment("db", &[app, free().await]));
                ads.push_some(Kind::Endpoints, &["db"]);
            }
            3 => {
                ads.set(Kind::Endpoints, "db", resources::assignment("db", &[app]));
                ads.push_some(Kind::Endpoints, &["db"]);
            }
            4 => {
                ads.set(Kind::Routes, "80", resources::table("80", "web", round));
                ads.push(Kind::Routes);
            }
            _ => {
                let name = format!("more-{round}");
                ads.set(Kind::Listener, &name, resources::tcp_listener(&name, free().await, "db"));
                ads.push(Kind::Listener);
            }
        }
        if round % 6 != 0 {
            proxy.serves(|p| p.version > version).await;
        }
        if round % 10 == 9 {
            ads.end(None);
        }
    }
    let mut dead = 0;
    for one in &mut live {
        dead += usize::from(!one.lives(pushes).await);
    }
    assert_eq!(dead, 0, "{pushes} pushes broke {dead} of {connections} connections");
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_break_no_connection() {
    pushes_against_connections(50, 60).await;
}
