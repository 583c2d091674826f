use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use proptest::prelude::*;
use proxy_config::sds;
use proxy_config::xds::{Any, DiscoveryResponse, Material, Secret};
use tokio::time::Instant;

use super::fixture::{
    Server, assignment, cors_extension, delta, discovered, eds_cluster, http_listener, no_names, policy, settle, table,
    trusting, unknown_guard, with_old_tls, with_tls,
};
use super::*;
use crate::control::CHECKS;

const NODE: &[u8] = b"\x0a\x01n";

fn ads(names: bool) -> Ads {
    Ads::new(Options { delta: true, node: Bytes::from_static(NODE), names, proxy_config: false, checks: CHECKS })
}

fn says(ads: &mut Ads, response: Response) -> Step {
    ads.received(response, Instant::now(), SystemTime::UNIX_EPOCH)
}

/// `cds`, `cds ack`, `eds +a +b -c =d`, `cds nack`, `health`: what was sent, short.
fn short(requests: &[Request]) -> Vec<String> {
    requests.iter().map(one).collect()
}

fn one(request: &Request) -> String {
    let kind = match Kind::of(request.type_url()) {
        Some(kind) => format!("{kind:?}"),
        None => "Health".to_owned(),
    };
    let mut out = kind;
    if !request.nonce().is_empty() {
        out += if request.error().is_some() { " nack" } else { " ack" };
    }
    match request {
        Request::Delta(request) => {
            let node = if request.node.is_some() { " node" } else { "" };
            let add = request.resource_names_subscribe.iter().map(|n| format!(" +{n}"));
            let remove = request.resource_names_unsubscribe.iter().map(|n| format!(" -{n}"));
            let held = request.initial_resource_versions.keys().map(|n| format!(" ={n}"));
            out + node + &add.chain(remove).chain(held).collect::<String>()
        }
        Request::Sotw(request) => {
            let names = request.resource_names.iter().map(|n| format!(" {n}"));
            format!("{out} v{}{}", request.version_info, names.collect::<String>())
        }
    }
}

fn seeded() -> Server {
    let mut server = Server::default();
    server.set(Kind::Cluster, "a", Some(eds_cluster("a", 1)));
    server.set(Kind::Endpoints, "a", Some(assignment("a", "10.0.0.1")));
    server.set(Kind::Listener, "l", Some(http_listener("l", "80", Vec::new())));
    server.set(Kind::Routes, "80", Some(table("80", "a")));
    server.set(Kind::Names, "", Some(no_names()));
    server
}

#[test]
fn types_are_asked_for_in_order_and_health_follows_the_listeners() {
    let mut ads = ads(true);
    ads.report(Some(Health { healthy: false, message: "503".into() }));
    assert_eq!(short(&ads.connected(Instant::now())), ["Cluster node"]);
    let step = says(&mut ads, delta(Kind::Cluster, "1", &[("a", eds_cluster("a", 1))], &[]));
    assert_eq!(short(&step.send), ["Cluster ack", "Endpoints +a"]);
    let step = says(&mut ads, delta(Kind::Endpoints, "2", &[("a", assignment("a", "10.0.0.1"))], &[]));
    assert_eq!(short(&step.send), ["Endpoints ack", "Listener", "Names", "Health"]);
    let Request::Delta(health) = &step.send[3] else { panic!() };
    assert_eq!(health.error_detail, Some(Status { code: 13, message: "503".into() }));
    let step = says(&mut ads, delta(Kind::Listener, "3", &[("l", http_listener("l", "80", Vec::new()))], &[]));
    assert_eq!(short(&step.send), ["Listener ack", "Routes +80"]);
    assert_eq!(short(&ads.report(Some(Health { healthy: true, message: String::new() }))), ["Health"]);
}

#[test]
fn without_endpoints_listeners_are_asked_for_at_once_and_with_silent_ones_after_a_while() {
    let mut none = ads(false);
    none.connected(Instant::now());
    assert_eq!(short(&says(&mut none, delta(Kind::Cluster, "1", &[], &[])).send), ["Cluster ack", "Listener"]);
    let (mut ads, now) = (ads(false), Instant::now());
    ads.connected(now);
    ads.received(delta(Kind::Cluster, "1", &[("a", eds_cluster("a", 1))], &[]), now, SystemTime::UNIX_EPOCH);
    assert!(ads.tick(now).is_empty());
    let later = ads.wake().expect("it will not wait for ever");
    assert_eq!(short(&ads.tick(later)), ["Listener"]);
    assert!(ads.patience().is_some_and(|end| end > later), "the question for endpoints stays open");
}

#[test]
fn a_new_stream_asks_for_everything_names_what_is_held_and_reports_again() {
    let (mut ads, mut server, now) = (ads(true), seeded(), Instant::now());
    ads.report(Some(Health { healthy: true, message: String::new() }));
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    ads.disconnected();
    let again = short(&ads.connected(now));
    assert_eq!(again, ["Cluster node =a", "Endpoints +a =a", "Listener =l", "Names", "Health", "Routes +80 =80"],);
}

#[test]
fn what_is_sent_again_is_acknowledged_and_is_no_news() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    let served = ads.update(now).expect("complete").model;
    for (kind, name) in [(Kind::Cluster, "a"), (Kind::Listener, "l"), (Kind::Routes, "80"), (Kind::Endpoints, "a")] {
        let any = server.has[&kind][name].clone();
        let step = says(&mut ads, delta(kind, "again", &[(name, any)], &[]));
        assert_eq!(short(&step.send), [format!("{kind:?} ack")]);
        assert!(!step.changed);
    }
    assert!(ads.update(now).is_none());
    let other = assignment("a", "10.0.0.2");
    assert!(says(&mut ads, delta(Kind::Endpoints, "n", &[("a", other)], &[])).changed);
    let update = ads.update(now).expect("news");
    assert_eq!(update.endpoints.as_deref(), Some(&["a".into()][..]));
    assert!(update.model.clusters.same(&served.clusters) && !update.model.endpoints.same(&served.endpoints));
}

#[test]
fn a_push_without_a_version_counts_as_one() {
    let (mut ads, now) = (ads(false), Instant::now());
    ads.connected(now);
    for kind in [Kind::Cluster, Kind::Listener] {
        let response = DeltaDiscoveryResponse { type_url: kind.url().into(), nonce: "n".into(), ..Default::default() };
        assert!(ads.update(now).is_none());
        says(&mut ads, response.into());
    }
    assert!(ads.update(now).is_some());
}

#[test]
fn a_bad_resource_refuses_itself_by_name_and_leaves_what_was() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    ads.update(now).expect("complete");
    let bad = Any { type_url: Kind::Cluster.url().into(), value: Bytes::from_static(b"\x0a\x01a\xff") };
    let wave = [("a", bad.clone()), ("b", eds_cluster("b", 1))];
    let step = says(&mut ads, delta(Kind::Cluster, "9", &wave, &[]));
    assert_eq!(short(&step.send), ["Cluster nack", "Endpoints +b"]);
    let said = &step.send[0].error().expect("a refusal").message;
    assert!(said.starts_with("Error adding/updating cluster(s) Cluster"), "{said}");
    assert!(!said.contains('b') || !said.contains("Cluster b"), "{said}");
    says(&mut ads, delta(Kind::Endpoints, "10", &[("b", assignment("b", "10.0.0.9"))], &[]));
    let model = ads.update(now).expect("news").model;
    assert!(model.clusters.contains_key("a") && model.clusters.contains_key("b"));
    assert_eq!(model.rejects.len(), 1);
    let kept = ads.bytes().get(Kind::Cluster, "a").expect("held");
    assert_eq!(kept.accepted.map(|v| v.bytes.bytes()), Some(eds_cluster("a", 1).value));
    assert_eq!(kept.refused.map(|r| r.version.bytes.bytes()), Some(bad.value.clone()));
    let step = says(&mut ads, delta(Kind::Cluster, "11", &[("a", bad)], &[]));
    assert_eq!(short(&step.send), ["Cluster nack"], "as bad as it was");
    let step = says(&mut ads, delta(Kind::Cluster, "12", &[("a", eds_cluster("a", 2))], &[]));
    assert_eq!(short(&step.send), ["Cluster ack"]);
    assert!(ads.update(now).expect("news").model.rejects.is_empty());
}

#[test]
fn an_unknown_guard_refuses_the_listener_and_a_wrong_name_the_resource() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    let guarded = http_listener("l", "80", vec![unknown_guard()]);
    let step = says(&mut ads, delta(Kind::Listener, "9", &[("l", guarded)], &[]));
    let said = &step.send[0].error().expect("a refusal").message;
    assert!(said.starts_with("Error adding/updating listener(s) Listener l: "), "{said}");
    assert!(said.contains("http_filters[envoy.filters.http.oauth2]"), "{said}");
    let step = says(&mut ads, delta(Kind::Listener, "10", &[("x", http_listener("y", "80", Vec::new()))], &[]));
    assert!(step.send[0].error().expect("a refusal").message.contains("calls itself \"y\""));
    let step = says(&mut ads, delta(Kind::Listener, "11", &[("x", eds_cluster("x", 1))], &[]));
    assert!(step.send[0].error().expect("a refusal").message.contains("v3.Cluster among resources of type"));
}

#[test]
fn what_could_not_be_enforced_is_refused_by_name_and_leaves_what_was() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    server.set(Kind::Listener, "l", Some(http_listener("l", "80", vec![policy("/a.*")])));
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    let served = ads.update(now).expect("complete").model;
    let refused = |ads: &mut Ads, kind: Kind, name: &str, any: Any| {
        let step = says(ads, delta(kind, "9", &[(name, any)], &[]));
        step.send[0].error().expect("a refusal").message.clone()
    };
    let said = refused(&mut ads, Kind::Listener, "l", http_listener("l", "80", vec![policy("(")]));
    assert!(said.starts_with("Error adding/updating listener(s) Listener l: filter_chains[].rbac: paths: "), "{said}");
    assert!(ads.update(now).is_none_or(|update| update.model.listeners.same(&served.listeners)));
    // TLS settings that cannot be had. Secrets that have not come are no fault.
    let plain = http_listener("m", "80", Vec::new());
    let (own, roots) = ("kubernetes://a", "kubernetes://b");
    let step = says(&mut ads, delta(Kind::Listener, "10", &[("m", with_tls(plain.clone(), own, roots))], &[]));
    assert_eq!(short(&step.send), ["Listener ack", "Secret +kubernetes://a +kubernetes://b"]);
    let said = refused(&mut ads, Kind::Listener, "m", with_old_tls(plain, own, roots));
    assert!(said.contains("Listener m: filter_chains[].transport_socket: no TLS version"), "{said}");
    // Key material that nobody could use.
    let certificate = Material::Certificate { chain: "garbage".into(), key: "garbage".into() };
    let secret = Secret { name: own.into(), material: certificate };
    let said = refused(&mut ads, Kind::Secret, own, sds::write(&secret));
    assert!(said.contains("Secret kubernetes://a: tls_certificate: "), "{said}");
}

#[test]
fn the_proxys_own_settings_are_asked_for_after_names_and_give_anchors() {
    let node = Bytes::from_static(NODE);
    let options = Options { delta: true, node, names: true, proxy_config: true, checks: CHECKS };
    let (mut ads, mut server, now) = (Ads::new(options), seeded(), Instant::now());
    ads.report(Some(Health { healthy: true, message: String::new() }));
    let (root, _) = crate::ca::Root::generate("further").unwrap();
    server.set(Kind::ProxyConfig, "", Some(trusting(&[root.certificate()])));
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    assert_eq!(ads.anchors(), [root.certificate()]);
    let step = says(&mut ads, delta(Kind::ProxyConfig, "9", &[("", trusting(&[root.certificate(), "garbage"]))], &[]));
    let said = &step.send[0].error().expect("a refusal").message;
    assert!(said.starts_with("Error updating the proxy configuration ProxyConfig: ca_certificates_pem[1]: "), "{said}");
    assert_eq!(ads.anchors(), [root.certificate()], "the last good ones");
    assert!(says(&mut ads, delta(Kind::ProxyConfig, "10", &[], &[])).send.is_empty(), "an empty one is not answered");
    ads.disconnected();
    let again = short(&ads.connected(now));
    assert_eq!(again[2..6], ["Listener =l", "Names", "ProxyConfig", "Health"]);
    assert_eq!(ads.anchors(), [root.certificate()], "until something else is said");
    says(&mut ads, delta(Kind::ProxyConfig, "11", &[("", trusting(&[]))], &[]));
    assert!(ads.anchors().is_empty());
}

#[test]
fn what_was_not_asked_for_is_passed_over() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    let step = says(&mut ads, delta(Kind::Cluster, "9", &[], &["a"]));
    assert_eq!(short(&step.send), ["Cluster ack", "Endpoints -a"]);
    let step = says(&mut ads, delta(Kind::Endpoints, "10", &[("a", assignment("a", "10.0.0.1"))], &[]));
    assert_eq!(short(&step.send), ["Endpoints ack"]);
    assert!(!step.changed && ads.held(Kind::Endpoints).is_empty());
    let names = delta(Kind::Names, "11", &[("", no_names())], &[]);
    assert!(says(&mut ads, names).send.is_empty(), "a type that was not asked for gets no answer at all");
    ads.disconnected();
    assert_eq!(short(&ads.connected(now)), ["Cluster node", "Listener =l", "Routes +80 =80"]);
}

#[test]
fn a_removed_table_is_served_until_nobody_names_it() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    ads.update(now);
    says(&mut ads, delta(Kind::Routes, "9", &[], &["80"]));
    assert!(ads.held(Kind::Routes).is_empty());
    assert!(ads.update(now).is_none_or(|u| u.model.routes.contains_key("80")));
    let other = http_listener("l", "90", Vec::new());
    let step = says(&mut ads, delta(Kind::Listener, "10", &[("l", other)], &[]));
    assert_eq!(short(&step.send), ["Listener ack", "Routes -80", "Routes +90"]);
    says(&mut ads, delta(Kind::Routes, "11", &[("90", table("90", "a"))], &[]));
    let model = ads.update(now).expect("news").model;
    assert_eq!(model.routes.keys().map(|n| &**n).collect::<Vec<_>>(), ["90"]);
}

#[test]
fn nothing_enters_before_what_it_needs_and_nothing_waits_for_ever() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    server.has.remove(&Kind::Routes);
    let first = ads.connected(now);
    first.iter().for_each(|request| server.hears(request));
    let mut unsent = Vec::new();
    // The route table does not come.
    while let Some(response) = server.says.pop_front() {
        for request in ads.received(response, now, SystemTime::UNIX_EPOCH).send {
            if request.type_url() == Kind::Routes.url() {
                unsent.push(request);
            } else {
                server.hears(&request);
            }
        }
    }
    assert!(ads.update(now).is_none(), "the first one is complete or late");
    assert_eq!(ads.wake(), Some(now + Duration::from_secs(15)));
    let model = ads.update(now + Duration::from_secs(15)).expect("late").model;
    assert!(model.listeners.contains_key("l") && model.routes.is_empty());
    // Afterwards a new version waits and the old one stays.
    let (mut ads, mut server) = (self::ads(false), seeded());
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    let old = ads.update(now).expect("complete").model;
    says(&mut ads, delta(Kind::Cluster, "90", &[("b", eds_cluster("b", 1))], &[]));
    says(&mut ads, delta(Kind::Routes, "91", &[("80", table("80", "b"))], &[]));
    says(&mut ads, delta(Kind::Listener, "92", &[("m", http_listener("m", "90", Vec::new()))], &[]));
    assert!(ads.update(now).is_none_or(|u| u.model.routes == old.routes && u.model.listeners == old.listeners));
    says(&mut ads, delta(Kind::Endpoints, "93", &[], &["b"]));
    let model = ads.update(now).expect("b has none, which is an answer").model;
    assert!(model.routes != old.routes && model.clusters.contains_key("b") && !model.listeners.contains_key("m"));
    says(&mut ads, delta(Kind::Routes, "94", &[("90", table("90", "a"))], &[]));
    assert!(ads.update(now).expect("news").model.listeners.contains_key("m"));
    assert_eq!(ads.wake(), None);
}

#[test]
fn discovered_filters_are_asked_for_and_listeners_wait_for_them() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    let old = ads.update(now).expect("complete").model;
    let plugin = http_listener("l", "80", vec![discovered("ext")]);
    let step = says(&mut ads, delta(Kind::Listener, "9", &[("l", plugin)], &[]));
    assert_eq!(short(&step.send), ["Listener ack", "Extension +ext"]);
    assert!(ads.update(now).is_none_or(|u| u.model.listeners == old.listeners));
    says(&mut ads, delta(Kind::Extension, "10", &[("ext", cors_extension("ext"))], &[]));
    let model = ads.update(now).expect("news").model;
    assert!(format!("{:?}", model.listeners["l"]).contains("Cors"), "{:?}", model.listeners["l"]);
    assert!(model.rejects.is_empty(), "{:?}", model.rejects);
}

#[test]
fn the_state_of_the_world_is_understood_too() {
    let (mut ads, now) = (
        Ads::new(Options {
            delta: false,
            node: Bytes::from_static(NODE),
            names: false,
            proxy_config: false,
            checks: CHECKS,
        }),
        Instant::now(),
    );
    let all = |kind: Kind, n: &str, resources: Vec<Any>| {
        Response::Sotw(DiscoveryResponse {
            version_info: n.to_owned(),
            resources,
            type_url: kind.url().to_owned(),
            nonce: format!("nonce {n}"),
        })
    };
    assert_eq!(short(&ads.connected(now)), ["Cluster v"]);
    let two = vec![eds_cluster("a", 1), eds_cluster("b", 1)];
    let step = says(&mut ads, all(Kind::Cluster, "1", two));
    assert_eq!(short(&step.send), ["Cluster ack v1", "Endpoints v a b"]);
    let step = says(&mut ads, all(Kind::Endpoints, "1", vec![assignment("a", "10.0.0.1")]));
    assert_eq!(short(&step.send), ["Endpoints ack v1 a b", "Listener v"]);
    let step = says(&mut ads, all(Kind::Cluster, "2", vec![eds_cluster("a", 1)]));
    assert_eq!(short(&step.send), ["Cluster ack v2", "Endpoints ack v1 a"], "what is not there is gone");
    let step = says(&mut ads, all(Kind::Endpoints, "2", Vec::new()));
    assert_eq!(short(&step.send), ["Endpoints ack v2 a"]);
    assert_eq!(ads.held(Kind::Endpoints), ["a".into()], "but not endpoints");
    let bad = Any { type_url: Kind::Cluster.url().into(), value: Bytes::from_static(b"\xff") };
    let step = says(&mut ads, all(Kind::Cluster, "3", vec![eds_cluster("a", 1), bad]));
    assert_eq!(short(&step.send), ["Cluster nack v2"], "the version that is served");
    assert!(ads.resubscribe(&["a".into()]).is_empty());
}

#[test]
fn a_cluster_in_trouble_is_asked_for_again() {
    let (mut ads, mut server, now) = (ads(false), seeded(), Instant::now());
    let first = ads.connected(now);
    settle(&mut ads, &mut server, first, now);
    assert_eq!(short(&ads.resubscribe(&["a".into(), "nobody".into()])), ["Endpoints -a", "Endpoints +a"]);
    ads.disconnected();
    assert!(ads.resubscribe(&["a".into()]).is_empty());
}

#[test]
fn long_lists_go_in_parts_below_the_servers_limit() {
    let (mut ads, now) = (ads(false), Instant::now());
    ads.connected(now);
    let names: Vec<String> = (0..9_000).map(|i| format!("outbound|80||{i}.{}", "x".repeat(400))).collect();
    let clusters: Vec<(&str, Any)> = names.iter().map(|n| (n.as_str(), eds_cluster(n, 1))).collect();
    let send = says(&mut ads, delta(Kind::Cluster, "1", &clusters, &[])).send;
    let size = |r: &Request| match r {
        Request::Delta(r) => prost::Message::encoded_len(r),
        Request::Sotw(r) => prost::Message::encoded_len(r),
    };
    assert!(send.len() > 2 && send.iter().all(|r| size(r) < 4 << 20), "{}", send.len());
    let asked: usize = send.iter().map(|r| short(std::slice::from_ref(r))[0].matches('+').count()).sum();
    assert_eq!(asked, names.len());
    ads.disconnected();
    // What is held does not fit beside: the answer then tells everything.
    let again = ads.connected(now);
    assert!(again.iter().all(|r| size(r) < 4 << 20));
    says(&mut ads, delta(Kind::Cluster, "1", &[(&names[0], eds_cluster(&names[0], 1))], &[]));
    assert_eq!(ads.held(Kind::Cluster).len(), 1);
}

#[derive(Debug, Clone)]
enum Event {
    Cluster(u8, Option<u8>),
    Endpoints(u8, u8),
    Listener(u8, Option<u8>),
    Routes(u8, u8),
    Stray(u8),
    Up,
    Down,
    Drop,
    Update,
}

fn event() -> impl Strategy<Value = Event> {
    let version = || proptest::option::weighted(0.7, 1..4_u8);
    prop_oneof![
        1 => (0..4_u8, version()).prop_map(|(n, v)| Event::Cluster(n, v)),
        1 => (0..4_u8, 1..4_u8).prop_map(|(n, v)| Event::Endpoints(n, v)),
        1 => (0..3_u8, version()).prop_map(|(n, v)| Event::Listener(n, v)),
        1 => (0..3_u8, 0..4_u8).prop_map(|(n, v)| Event::Routes(n, v)),
        1 => (0..4_u8).prop_map(Event::Stray),
        4 => Just(Event::Up),
        4 => Just(Event::Down),
        1 => Just(Event::Drop),
        1 => Just(Event::Update),
    ]
}

fn apply(event: &Event, server: &mut Server) {
    match event {
        Event::Cluster(n, v) => {
            let name = format!("c{n}");
            server.set(Kind::Cluster, &name, v.map(|v| eds_cluster(&name, v.into())));
        }
        Event::Endpoints(n, v) => {
            let name = format!("c{n}");
            server.set(Kind::Endpoints, &name, Some(assignment(&name, &format!("10.0.0.{v}"))));
        }
        Event::Listener(n, v) => {
            let name = format!("l{n}");
            server.set(Kind::Listener, &name, v.map(|v| http_listener(&name, &format!("r{}", v - 1), Vec::new())));
        }
        Event::Routes(n, v) => {
            let name = format!("r{n}");
            server.set(Kind::Routes, &name, Some(table(&name, &format!("c{v}"))));
        }
        // Endpoints that nobody may have asked for.
        Event::Stray(n) => server.push(Kind::Endpoints, |name| name != format!("c{n}"), &[]),
        Event::Up | Event::Down | Event::Drop | Event::Update => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Whatever the order of pushes, answers and broken streams: in the end we hold what the server has and we need.
    #[test]
    fn every_interleaving_ends_with_what_the_server_holds(events in proptest::collection::vec(event(), 0..60)) {
        let (mut ads, mut server, now) = (ads(false), Server::default(), Instant::now());
        for n in 0..4 {
            apply(&Event::Endpoints(n, 1), &mut server);
        }
        for n in 0..3 {
            apply(&Event::Routes(n, n), &mut server);
        }
        let mut up: VecDeque<Request> = ads.connected(now).into();
        for event in &events {
            apply(event, &mut server);
            match event {
                Event::Up => up.pop_front().iter().for_each(|request| server.hears(request)),
                Event::Down => if let Some(response) = server.says.pop_front() {
                    up.extend(ads.received(response, now, SystemTime::UNIX_EPOCH).send);
                },
                Event::Drop => {
                    ads.disconnected();
                    server.dropped();
                    up = ads.connected(now).into();
                }
                Event::Update => drop(ads.update(now)),
                _ => {}
            }
        }
        settle(&mut ads, &mut server, up.into(), now);
        prop_assert_eq!(server.refusals, 0);
        let names = |kind: Kind| -> BTreeSet<String> { server.has.get(&kind).into_iter().flatten().map(|(n, _)| n.clone()).collect() };
        let routes = |any: &Any| (0..3).map(|n| format!("r{n}")).filter(|r| any.value.windows(2).any(|w| w == r.as_bytes())).collect::<Vec<_>>();
        let listeners: BTreeMap<String, Any> = server.has.get(&Kind::Listener).cloned().unwrap_or_default();
        let needed = [
            (Kind::Cluster, names(Kind::Cluster)),
            (Kind::Endpoints, names(Kind::Cluster)),
            (Kind::Listener, names(Kind::Listener)),
            (Kind::Routes, listeners.values().flat_map(routes).collect()),
        ];
        let received = ads.bytes();
        for (kind, needed) in needed {
            let held: BTreeMap<String, Bytes> = received.of(kind).into_iter()
                .filter_map(|(n, r)| r.accepted.map(|v| (n.to_string(), v.bytes.bytes()))).collect();
            let expected: BTreeMap<String, Bytes> =
                needed.iter().map(|n| (n.clone(), server.has[&kind][n].value.clone())).collect();
            prop_assert_eq!(&held, &expected, "{:?}", kind);
            if !kind.is_wildcard() {
                let told: BTreeSet<String> = ads.subscribed(kind).iter().map(ToString::to_string).collect();
                prop_assert_eq!(told, needed);
            }
        }
        // What is served is what is held.
        ads.update(now + Duration::from_secs(60));
        prop_assert!(ads.update(now + Duration::from_secs(120)).is_none());
    }
}
