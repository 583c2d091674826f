//! When keys are asked for, and the whole way from a server on the loopback to a verdict.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Mutex;

use http::{HeaderMap, HeaderValue, Method};
use jsonwebtoken::{EncodingKey, Header};
use proxy_config::WhoAmI;
use proxy_config::model::{Address, ClusterKind, Endpoint, Endpoints, HealthStatus, LocalityEndpoints};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};

use super::*;
use crate::control::{Certs, Control, Input, Published, Settings, yaml};
use crate::snapshot::{Denied, HttpFilter as Compiled, JwtCache, RequestView, Terminal};

const SOON: Duration = Duration::from_secs(20);

/// A key set with one secret.
fn keys(kid: &str) -> String {
    use base64::Engine as _;
    let k = base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(format!("secret of {kid}"));
    json!({"keys": [{"kty": "oct", "kid": kid, "k": k}]}).to_string()
}

fn token(kid: &str) -> String {
    let header = Header { kid: Some(kid.to_owned()), ..Header::default() };
    let key = EncodingKey::from_secret(format!("secret of {kid}").as_bytes());
    jsonwebtoken::encode(&header, &json!({"iss": "i"}), &key).unwrap()
}

fn source(uri: &str) -> Source {
    (uri.into(), "".into())
}

/// A model with one provider of that URI.
fn model(uri: &str) -> Arc<Model> {
    let dir = tempfile::tempdir().unwrap();
    let control = Control::start(settings(dir.path(), &format!("{{issuer: i, jwksUri: '{uri}'}}"))).unwrap();
    Arc::clone(&control.model)
}

fn known(model: &Model) -> Option<Arc<str>> {
    model.listeners.values().flat_map(|l| providers(l)).find_map(|p| match &p.jwks {
        JwksSource::Remote { keys, .. } => keys.clone(),
        _ => None,
    })
}

#[test]
fn when_keys_are_asked_for() {
    let start = Instant::now();
    let at = |seconds: u64| start + Duration::from_secs(seconds);
    let mut store = Store::default();
    let said = model("http://a/");
    let a = source("http://a/");
    store.follow(&said, start);
    assert_eq!(store.due(start), [(a.clone(), LIMIT)]);
    assert_eq!((store.due(at(9)), store.next()), (Vec::new(), None), "one question at a time");
    // Failures: 1 s, 2 s, 4 s, … 60 s.
    assert!(store.done(&a, Err("down".into()), at(0), 0.0));
    assert_eq!(store.next(), Some(at(1)));
    for (nth, pause) in [2, 4, 8, 16, 32, 60, 60].into_iter().enumerate() {
        store.due(at(100));
        assert!(!store.done(&a, Err("down".into()), at(100), 0.0), "told once");
        assert_eq!(store.next(), Some(at(100 + pause)), "failure {}", nth + 2);
    }
    assert!(store.rejects().any(|r| r.to_string().contains("down; tokens that need these keys are refused")));
    assert!(known(&store.fill(&said)).is_none());
    store.due(at(200));
    assert!(store.done(&a, Ok(keys("one")), at(200), 0.0));
    assert_eq!((known(&store.fill(&said)).as_deref(), store.next()), (Some(&*keys("one")), Some(at(200 + 20 * 60))));
    // An unknown key asks again, not sooner than the floor allows.
    store.asked(&a, at(210));
    assert_eq!(store.next(), Some(at(230)));
    store.due(at(230));
    assert!(!store.done(&a, Ok(keys("one")), at(230), 1.0), "the same keys are no news");
    assert_eq!(store.next(), Some(at(230) + Duration::from_secs(18 * 60)), "a fleet is spread");
    store.asked(&a, at(900));
    assert_eq!(store.due(at(900)).len(), 1);
    // What is no key set is no answer: the last good stays.
    assert!(store.done(&a, Ok("<html>".into()), at(900), 0.0));
    assert_eq!(known(&store.fill(&said)).as_deref(), Some(&*keys("one")));
    assert!(store.rejects().any(|r| r.to_string().contains("the last good keys stay")));
    store.follow(&model("http://b/"), at(901));
    assert!(store.due(at(901)) == [(source("http://b/"), LIMIT)] && !store.done(&a, Ok(keys("x")), at(901), 0.0));
    store.follow(&Model::default(), at(902));
    assert!(store.next().is_none() && store.rejects().next().is_none());
}

/// Publishes whatever `says` holds; `None` hangs up.
struct Publisher {
    address: SocketAddr,
    says: Arc<Mutex<Option<String>>>,
    asked: watch::Receiver<u32>,
}

impl Publisher {
    async fn start(first: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let says = Arc::new(Mutex::new(Some(first.to_owned())));
        let (count, asked) = watch::channel(0);
        let text = Arc::clone(&says);
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                count.send_modify(|n| *n += 1);
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let mut byte = [0];
                    if socket.read(&mut byte).await.unwrap_or(0) == 0 {
                        break;
                    }
                    head.push(byte[0]);
                }
                let Some(body) = text.lock().unwrap().clone() else { continue };
                let path = String::from_utf8_lossy(&head);
                let body = if path.starts_with("GET /.well-known/openid-configuration ") {
                    json!({"jwks_uri": format!("http://{address}/keys")}).to_string()
                } else {
                    body
                };
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                let _ = socket.write_all(answer.as_bytes()).await;
            }
        });
        Self { address, says, asked }
    }

    fn say(&self, text: Option<String>) {
        *self.says.lock().unwrap() = text;
    }
}

fn settings(folder: &Path, rule: &str) -> Settings {
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: w, namespace: a}}\n\
         spec: {{serviceAccountName: w}}\nstatus: {{phase: Running, podIP: 10.0.0.1}}\n---\n\
         apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: r, namespace: a}}\n\
         spec: {{jwtRules: [{rule}]}}\n"
    );
    std::fs::write(folder.join("all.yaml"), text).unwrap();
    let me = [("POD_NAMESPACE", "a"), ("INSTANCE_IP", "10.0.0.1")];
    Settings {
        input: Input::Yaml(yaml::Paths { config: vec![folder.to_owned()], ..yaml::Paths::default() }),
        who: WhoAmI::Env(me.map(|(name, value)| (name.to_owned(), value.to_owned())).into()),
        certs: Certs::MadeUp,
        publish_health: None,
    }
}

/// What the served configuration thinks of a token.
fn verdict(published: &Published, token: &str) -> Result<usize, Denied> {
    let mut headers = HeaderMap::new();
    headers.insert("authorization", HeaderValue::from_str(&format!("Bearer {token}")).unwrap());
    let request = RequestView { method: &Method::GET, scheme: "http", authority: "a", path: "/", headers: &headers };
    let listener = published.snapshot.listener("virtualInbound").unwrap();
    let jwt = listener.all_chains().find_map(|chain| match &chain.terminal {
        Terminal::Http(http) => http.filters.iter().find_map(|filter| match filter {
            Compiled::JwtAuthn(jwt) => Some(Arc::clone(jwt)),
            _ => None,
        }),
        _ => None,
    });
    jwt.unwrap().check(&request, 1_000_000, &mut JwtCache::default()).map(|grants| grants.len())
}

async fn until(
    published: &mut watch::Receiver<Arc<Published>>,
    what: &str,
    is: impl Fn(&Published) -> bool,
) -> Arc<Published> {
    let found = tokio::time::timeout(SOON, published.wait_for(|now| is(now))).await;
    Arc::clone(&found.unwrap_or_else(|_| panic!("never: {what}")).unwrap())
}

#[tokio::test]
async fn keys_are_fetched_rotated_and_kept_when_their_server_is_gone() {
    let server = Publisher::start(&keys("one")).await;
    let dir = tempfile::tempdir().unwrap();
    let rule = format!("{{issuer: i, jwksUri: 'http://{}/keys'}}", server.address);
    let mut control = Control::start(settings(dir.path(), &rule)).unwrap();
    control.keys.store.floor = Duration::ZERO;
    let before = control.published();
    assert_eq!(verdict(&before, &token("one")), Err(Denied::Signature), "not fetched yet");
    let (publish, mut published) = watch::channel(before);
    let (_ask, asked) = mpsc::channel(1);
    let task = tokio::spawn(crate::control::run(control, publish, asked));

    let now = until(&mut published, "the first keys", |p| verdict(p, &token("one")) == Ok(1)).await;
    server.say(Some(keys("two")));
    assert_eq!(verdict(&now, &token("two")), Err(Denied::NoSuchKey), "this rings");
    let now = until(&mut published, "the rotated keys", |p| verdict(p, &token("two")) == Ok(1)).await;
    assert_eq!(verdict(&now, &token("one")), Err(Denied::NoSuchKey), "this rings again; nothing is new");

    let mut count = server.asked.clone();
    let before = *count.borrow_and_update();
    server.say(None);
    let _ = verdict(&now, &token("three"));
    let is_told = |p: &Published| p.rejects.iter().any(|r| r.to_string().contains("the last good keys stay"));
    let now = until(&mut published, "the failure", is_told).await;
    assert_eq!(verdict(&now, &token("two")), Ok(1), "the last good keys stay");
    assert!(*count.borrow_and_update() > before);
    server.say(Some(keys("three")));
    let now = until(&mut published, "new keys", |p| verdict(p, &token("three")) == Ok(1)).await;
    assert!(!is_told(&now), "healed");
    task.abort();
}

#[tokio::test]
async fn an_issuer_alone_is_asked_where_its_keys_are() {
    let server = Publisher::start(&keys("one")).await;
    let dir = tempfile::tempdir().unwrap();
    // The discovery document, then the keys; tokens of this provider have the issuer's URL as `iss`.
    let issuer = format!("http://{}", server.address);
    let mut control = Control::start(settings(dir.path(), &format!("{{issuer: '{issuer}'}}"))).unwrap();
    let snapshot = Arc::clone(&control.published().snapshot);
    tokio::time::timeout(SOON, control.keys.changed(&snapshot)).await.unwrap();
    let (filled, rejects) = control.keys.fill(&control.model.clone());
    assert_eq!((known(&filled).as_deref(), rejects.len()), (Some(&*keys("one")), 0));
}

#[tokio::test]
async fn keys_behind_a_cluster() {
    let server = Publisher::start(&keys("one")).await;
    let dir = tempfile::tempdir().unwrap();
    let mut control =
        Control::start(settings(dir.path(), "{issuer: i, jwksUri: 'http://issuer.example/keys'}")).unwrap();
    // As a control plane says it that leaves the fetching to proxies.
    let mut said = (*control.model).clone();
    for listener in said.listeners.values_mut() {
        let listener = Arc::make_mut(listener);
        for filter in listener.filter_chains.iter_mut().flat_map(|chain| &mut chain.filters) {
            let NetworkFilter::Http(manager) = filter else { continue };
            for filter in &mut manager.filters {
                let HttpFilter::JwtAuthn(jwt) = filter else { continue };
                for provider in jwt.providers.values_mut() {
                    let JwksSource::Remote { cluster, .. } = &mut provider.jwks else { continue };
                    *cluster = "issuers".into();
                }
            }
        }
    }
    control.model = Arc::new(said.clone());
    control.publish(Vec::new());
    assert_eq!(verdict(&control.published(), &token("one")), Err(Denied::NotFetched));
    let news = tokio::time::timeout(SOON, control.new_answers()).await.unwrap();
    let told = news.rejects.iter().any(|r| r.to_string().contains("there is no cluster issuers"));
    assert!(told, "{:?}", news.rejects);

    let mut cluster = (**said.clusters.values().next().unwrap()).clone();
    let endpoint = Endpoint {
        address: Address::Socket(server.address),
        health: HealthStatus::Healthy,
        weight: 1,
        transport_labels: Default::default(),
        workload: Default::default(),
        hostname: String::new(),
        metadata: Default::default(),
    };
    let group = LocalityEndpoints { endpoints: vec![endpoint], ..LocalityEndpoints::default() };
    cluster.name = "issuers".into();
    cluster.kind = ClusterKind::Static(Endpoints { localities: vec![group], ..Endpoints::default() });
    (cluster.transport, cluster.transport_matches) = (proxy_config::model::Transport::Raw, Vec::new());
    said.clusters.insert("issuers".into(), Arc::new(cluster));
    control.model = Arc::new(said);
    control.publish(Vec::new());
    let news = tokio::time::timeout(SOON, control.new_answers()).await.unwrap();
    assert_eq!(verdict(&news, &token("one")), Ok(1));
}
