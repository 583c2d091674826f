//! Pushes break no connection, whatever they bring; a policy that is tightened ends the connections it is about, and no
//! others.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use istio_proxy::xds::Kind;
use proxy_config::xds::Any;
use tokio::time::{Instant, sleep, timeout};

use super::crowd::{Crowd, open};
use super::live::{SOCKET, STREAM, http2, session, stream, websocket};
use super::pair::Pair;
use super::side::{LIMIT, Side, free};
use super::world::{ROUND, app_cluster};
use super::{Args, Outcome};
use crate::istiod::ads::{Ads, Heard};
use crate::istiod::resources;

/// gRPC streams of one client connection.
const SHARE: usize = 20;
/// Between two looks at what a new request meets.
const LOOK: Duration = Duration::from_millis(2);

/// What is pushed, one after the other. Each comes to both proxies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Push {
    /// Everything again, byte for byte.
    Same,
    /// A cluster that no connection goes to.
    OtherCluster,
    /// One more endpoint, which is ill, of the clusters that all connections go to.
    Endpoints,
    /// These clusters themselves.
    Cluster,
    /// The tables that requests on open connections are routed by.
    Routes,
    /// A new listener; the one before is gone.
    Listener,
    /// A policy for somebody else's listener.
    OtherPolicy,
    /// A policy of their own that lets more pass.
    Loosened,
}

const PUSHES: [Push; 8] = [
    Push::Same,
    Push::OtherCluster,
    Push::Endpoints,
    Push::Cluster,
    Push::Routes,
    Push::Listener,
    Push::OtherPolicy,
    Push::Loosened,
];

/// Everything that is open while pushes come.
struct Scene {
    pair: Pair,
    crowd: Crowd,
    /// A connection whose requests must see every new route.
    asks: SendRequest<Bytes>,
}

/// Runs the case.
///
/// # Errors
/// When the rig does not stand.
pub(super) async fn run(args: &Args) -> Result<Outcome> {
    let mut pair = Pair::new(args.proxy.clone()).await?;
    pair.start().await?;
    let mut crowd = Crowd::new(&["idle-kept", "idle-closed"]);
    open_all(&mut crowd, &pair, args).await?;
    crowd.speak(0, true).await?;
    let asks = http2(pair.way("http-kept").near).await?;
    let mut scene = Scene { pair, crowd, asks };
    let mut outcome = Outcome::default();
    let opened = scene.crowd.all();
    let begun = Instant::now();
    let mut identical = 0;
    for round in 1..=args.pushes {
        let push = PUSHES[round % PUSHES.len()];
        identical += usize::from(push == Push::Same);
        scene.push(push, round).await.with_context(|| format!("push {round}, {push:?}"))?;
        scene.crowd.speak(round, round == args.pushes).await.with_context(|| format!("push {round}, {push:?}"))?;
        if round % 25 == 0 {
            scene.disturb(round);
        }
    }
    let gone = opened - scene.crowd.all();
    outcome.say(format!(
        "{} pushes to each of two proxies in {} s, {identical} of them identical, against {} websockets, {} gRPC streams \
         and {} idle TCP sessions: {gone} disconnects, {} messages came back between the pushes",
        args.pushes,
        begun.elapsed().as_secs(),
        args.websockets,
        args.streams,
        args.idle,
        scene.crowd.messages
    ));
    outcome.expect(gone == 0, || format!("{gone} disconnects, as {:?}", scene.crowd.ends));
    scene.counted(identical, &mut outcome).await?;
    scene.tighten(&mut outcome).await?;
    scene.tighten_requests(&mut outcome).await?;
    Ok(outcome)
}

async fn open_all(crowd: &mut Crowd, pair: &Pair, args: &Args) -> Result<()> {
    for (group, websockets, streams, idle) in [
        ("http-kept", "websocket-kept", "stream-kept", ("tcp-kept", "idle-kept")),
        ("http-closed", "websocket-closed", "stream-closed", ("tcp-closed", "idle-closed")),
    ] {
        // An odd one is kept.
        let half = |all: usize| if group == "http-kept" { all.div_ceil(2) } else { all / 2 };
        let at = pair.way(group).near;
        open(crowd, websockets, half(args.websockets), |_| websocket(at)).await?;
        let mut connections = Vec::new();
        for _ in 0..half(args.streams).div_ceil(SHARE) {
            connections.push(Arc::new(http2(at).await?));
        }
        open(crowd, streams, half(args.streams), |n| {
            let connection = Arc::clone(&connections[n / SHARE]);
            async move { stream(&connection).await }
        })
        .await?;
        let (way, kind) = idle;
        let at = pair.way(way).near;
        open(crowd, kind, half(args.idle), |_| session(at)).await?;
    }
    Ok(())
}

impl Scene {
    async fn push(&mut self, push: Push, round: usize) -> Result<()> {
        let (near, far) = (&self.pair.near, &self.pair.far);
        let all = [Kind::Cluster, Kind::Endpoints, Kind::Listener, Kind::Routes];
        match push {
            Push::Same => {
                for kind in all {
                    both(near, far, kind).await;
                }
            }
            Push::OtherCluster => {
                set(near, far, Kind::Cluster, "other", &app_cluster("other", round));
                set(near, far, Kind::Endpoints, "other", &resources::assignment("other", &[]));
                both(near, far, Kind::Cluster).await;
            }
            Push::Endpoints => {
                let ill = free().await?;
                for way in &self.pair.ways {
                    near.ads.set(Kind::Endpoints, way.name, resources::with_ill(way.name, &[way.far], ill));
                }
                both(near, far, Kind::Endpoints).await;
            }
            Push::Cluster => {
                for way in &self.pair.ways {
                    near.ads.set(Kind::Cluster, way.name, way.cluster(&far.id(), round));
                }
                far.ads.set(Kind::Cluster, "app-http", app_cluster("app-http", round));
                far.ads.set(Kind::Cluster, "app-tcp", app_cluster("app-tcp", round));
                both(near, far, Kind::Cluster).await;
            }
            Push::Routes => {
                for way in self.pair.ways.iter().filter(|way| way.http) {
                    near.ads.set(Kind::Routes, way.name, way.table(round));
                    far.ads.set(Kind::Routes, way.name, resources::table(way.name, "app-http", round));
                }
                both(near, far, Kind::Routes).await;
                return self.sees(round).await;
            }
            Push::Listener => {
                for side in [near, far] {
                    let at = free().await?;
                    side.ads.set(Kind::Listener, "more", resources::tcp_listener("more", at, "other"));
                }
                both(near, far, Kind::Listener).await;
            }
            Push::OtherPolicy | Push::Loosened => {
                let principal = format!("spiffe://cluster.local/ns/n/sa/{round}");
                self.set_policies(push == Push::Loosened, &principal).await?;
                both(near, far, Kind::Listener).await;
            }
        }
        Ok(())
    }

    /// Lets one more principal pass, where the connections are or at a listener that nobody uses.
    async fn set_policies(&self, own: bool, principal: &str) -> Result<()> {
        let (near, far) = (&self.pair.near, &self.pair.far);
        if own {
            for way in &self.pair.ways {
                far.ads.set(Kind::Listener, way.name, way.inbound(&[&near.id(), principal]));
            }
            return Ok(());
        }
        let other = resources::inbound(&resources::tcp_listener("guarded", free().await?, "other"), &[principal]);
        set(near, far, Kind::Listener, "guarded", &other);
        Ok(())
    }

    /// A new request on an open connection sees what was pushed.
    async fn sees(&mut self, round: usize) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let mut sender = self.asks.clone().ready().await?;
            let (answer, _) = sender.send_request(Request::get("http://a/").body(())?, true)?;
            let answer = timeout(LIMIT, answer).await.context("no answer")??;
            ensure!(answer.status() == 200, "a request meanwhile is answered {}", answer.status());
            let said = answer.headers().get(ROUND).and_then(|value| value.to_str().ok()?.parse().ok());
            if said == Some(round) {
                return Ok(());
            }
            ensure!(Instant::now() < end, "requests still meet {said:?} instead of {round}");
            sleep(LOOK).await;
        }
    }

    /// The stream ends, or its connection does, and is taken up again.
    fn disturb(&self, round: usize) {
        for side in [&self.pair.near, &self.pair.far] {
            if round.is_multiple_of(50) {
                side.istiod.server.hang_up();
            } else {
                side.ads.end(None);
            }
        }
    }

    /// Whether the proxies counted what did not change anything, and closed nothing.
    async fn counted(&self, identical: usize, outcome: &mut Outcome) -> Result<()> {
        for (name, side) in [("near", &self.pair.near), ("far", &self.pair.far)] {
            let pushes = side.metric("control_plane_pushes_total", "").await?;
            let unchanged = side.metric("control_plane_unchanged_total", "").await?;
            let refused = side.metric("control_plane_refused_total", "").await?;
            let closed = closed_by_policy(side, "").await?;
            outcome.say(format!(
                "{name}: {pushes} responses, {unchanged} without news, {refused} refused; {closed} connections closed by \
                 policy; {:.1} MB",
                side.resident_bytes() as f64 / 1e6
            ));
            // Each was one response of four kinds.
            let least = identical as u64 * 4;
            outcome.expect(unchanged >= least, || format!("{name}: {unchanged} of {least} no-ops were counted"));
            outcome.expect(refused == 0, || format!("{name}: {refused} pushes were refused"));
            outcome.expect(closed == 0, || format!("{name}: policy closed {closed} connections too early"));
        }
        Ok(())
    }

    /// The policy of two of the four ways lets the client's proxy pass no more.
    async fn tighten(&mut self, outcome: &mut Outcome) -> Result<()> {
        let far = &self.pair.far;
        let mut expected = 0;
        for name in CLOSED {
            expected += open_now(far, name).await?;
            let nobody = self.pair.way(name).inbound(&["spiffe://cluster.local/ns/n/sa/somebody-else"]);
            far.ads.set(Kind::Listener, name, nobody);
        }
        let before = self.crowd.all();
        let of = |crowd: &Crowd, group: &str| -> usize {
            ["websocket", "stream", "idle"].iter().map(|kind| crowd.living(&format!("{kind}-{group}"))).sum()
        };
        let (affected, others) = (of(&self.crowd, "closed"), of(&self.crowd, "kept"));
        let start = Instant::now();
        acknowledged(&far.ads, Kind::Listener).await;
        self.crowd.shrinks_to(before - affected).await?;
        let took = start.elapsed();
        self.crowd.speak(0, true).await?;
        let (stayed, wrongly) = (of(&self.crowd, "closed"), others - of(&self.crowd, "kept"));
        let end = Instant::now() + LIMIT;
        while closed_by_policy(far, "closed").await? < expected && Instant::now() < end {
            sleep(LOOK).await;
        }
        let (counted, elsewhere) = (closed_by_policy(far, "closed").await?, closed_by_policy(far, "kept").await?);
        outcome.say(format!(
            "policy tightened: of {affected} websockets, streams and sessions that it is about {} ended within {} ms, of \
             {others} others {wrongly}; {counted} of {expected} closes of connections counted",
            affected - stayed,
            took.as_millis()
        ));
        outcome.expect(stayed == 0, || format!("{stayed} connections live on against policy"));
        outcome.expect(wrongly == 0, || format!("{wrongly} connections ended that policy is not about"));
        outcome.expect(counted == expected, || format!("{counted} closes were counted instead of {expected}"));
        outcome.expect(elsewhere == 0, || format!("{elsewhere} closes were counted where policy did not change"));
        Ok(())
    }
}

impl Scene {
    /// The policy of requests, where connections were kept so far, lets none of them pass any more: websockets end at once,
    /// streams with their next message, and sessions of the other listener have nothing to do with it.
    async fn tighten_requests(&mut self, outcome: &mut Outcome) -> Result<()> {
        let (near, far) = (&self.pair.near, &self.pair.far);
        let (sockets, streams) = (self.crowd.living("websocket-kept"), self.crowd.living("stream-kept"));
        let before = self.crowd.all();
        let denied = self.pair.way("http-kept").inbound_without(&[&near.id()], &[SOCKET, STREAM]);
        far.ads.set(Kind::Listener, "http-kept", denied);
        acknowledged(&far.ads, Kind::Listener).await;
        self.crowd.shrinks_to(before - sockets).await?;
        // Policy that is acknowledged is served a moment later.
        let end = Instant::now() + LIMIT;
        while self.crowd.living("stream-kept") > 0 && Instant::now() < end {
            self.crowd.speak(0, true).await?;
        }
        let closed = far.metric("envoy_http_downstream_cx_policy_close", "http-kept").await?;
        let ended = far.metric("envoy_http_downstream_rq_policy_close", "http-kept").await?;
        let left = self.crowd.all();
        outcome.say(format!(
            "policy of requests tightened: {closed} closes for {sockets} websockets, {ended} ends for {streams} streams \
             counted; {left} of {} others live",
            before - sockets - streams
        ));
        outcome.expect(closed == sockets as u64, || format!("{closed} of {sockets} websockets were counted"));
        outcome.expect(ended == streams as u64, || format!("{ended} of {streams} streams were counted"));
        outcome.expect(left == before - sockets - streams, || format!("{left} live"));
        Ok(())
    }
}

/// Listeners whose policy is tightened at the end.
const CLOSED: [&str; 2] = ["http-closed", "tcp-closed"];

/// Tells both control planes the same.
fn set(near: &Side, far: &Side, kind: Kind, name: &str, any: &Any) {
    [near, far].iter().for_each(|side| side.ads.set(kind, name, any.clone()));
}

/// Pushes a kind to both proxies and waits until they have taken it.
async fn both(near: &Side, far: &Side, kind: Kind) {
    tokio::join!(acknowledged(&near.ads, kind), acknowledged(&far.ads, kind));
}

/// Pushes a kind and waits until a response of that kind is acknowledged. When no stream is open, the next one begins with
/// what was to be pushed.
async fn acknowledged(ads: &Ads, kind: Kind) {
    let known = ads.heard.len();
    ads.push(kind);
    let is = |heard: &Heard| heard.request.type_url() == kind.url() && !heard.request.nonce().is_empty();
    ads.heard.find(known, is).await;
}

/// Connections that the proxy has open at a listener.
async fn open_now(side: &Side, listener: &str) -> Result<u64> {
    let http = side.metric("envoy_http_downstream_cx_active", listener).await?;
    Ok(http + side.metric("envoy_tcp_downstream_cx_active", listener).await?)
}

/// Connections that the proxy closed because of policy, at listeners with this in their names.
async fn closed_by_policy(side: &Side, listeners: &str) -> Result<u64> {
    let http = side.metric("envoy_http_downstream_cx_policy_close", listeners).await?;
    Ok(http + side.metric("envoy_tcp_downstream_cx_policy_close", listeners).await?)
}
