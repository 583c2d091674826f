//! Certificates rotate every fraction of a second, and the mesh moves to another root, while requests come over HTTP/1 and
//! HTTP/2, on connections that stay and on new ones.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::live::{head, http2};
use super::pair::Pair;
use super::side::LIMIT;
use super::{Args, Outcome};
use crate::istiod::{Answer, Ca};

/// Certificates outlast any hiccup of the machine, but are renewed after a hundredth of their life.
const LIFE: Duration = Duration::from_secs(21);
const RATIO: &str = "0.99";
/// Clients of each kind.
const CLIENTS: usize = 4;

/// What clients counted.
#[derive(Default)]
struct Tally {
    served: AtomicU64,
    failed: AtomicU64,
    /// The first failure.
    why: std::sync::Mutex<Option<String>>,
}

impl Tally {
    fn count(&self, outcome: Result<()>) -> bool {
        let Err(error) = outcome else {
            self.served.fetch_add(1, Ordering::Relaxed);
            return true;
        };
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut why = self.why.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        why.get_or_insert_with(|| format!("{error:#}"));
        false
    }
}

/// Runs the case.
///
/// # Errors
/// When the rig does not stand.
pub(super) async fn run(args: &Args) -> Result<Outcome> {
    let mut pair = Pair::new(args.proxy.clone()).await?;
    pair.ca.otherwise(Answer::SignFor(LIFE));
    for side in [&mut pair.near, &mut pair.far] {
        side.set("SECRET_GRACE_PERIOD_RATIO", RATIO);
    }
    pair.start().await?;
    let at = pair.way("http-kept").near;
    let (stop, stopped) = watch::channel(false);
    let tallies: [(&str, Arc<Tally>); 3] =
        ["HTTP/1 kept open", "HTTP/1 anew", "HTTP/2"].map(|name| (name, Arc::default()));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        let tally = |n: usize| Arc::clone(&tallies[n].1);
        clients.spawn(one(at, true, tally(0), stopped.clone()));
        clients.spawn(one(at, false, tally(1), stopped.clone()));
        clients.spawn(two(at, tally(2), stopped.clone()));
    }
    let before = pair.ca.calls().len();
    let begun = Instant::now();
    move_root(&pair, Duration::from_secs(args.seconds)).await?;
    tokio::time::sleep_until(begun + Duration::from_secs(args.seconds)).await;
    stop.send_replace(true);
    while let Some(client) = clients.join_next().await {
        client.context("a client")?;
    }
    let mut outcome = Outcome::default();
    outcome.say(format!("{} certificates in {} s, and another root", pair.ca.calls().len() - before, args.seconds));
    for (name, tally) in &tallies {
        let (served, failed) = (tally.served.load(Ordering::Relaxed), tally.failed.load(Ordering::Relaxed));
        outcome.say(format!("{name}: {served} requests, {failed} failed"));
        let why = tally.why.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        outcome.expect(failed == 0, || format!("{name}: {failed} failed, as {why:?}"));
        outcome.expect(served > 100, || format!("{name}: {served} requests are no load"));
    }
    Ok(outcome)
}

/// Everybody trusts both roots before the first certificate of the new one is signed, and nobody uses the old one when it
/// goes.
async fn move_root(pair: &Pair, all: Duration) -> Result<()> {
    let next = Ca::new("next").context("keys")?;
    let old = pair.ca.root();
    tokio::time::sleep(all / 4).await;
    pair.ca.send_roots(&format!("{old}{}", next.root()));
    renewed(pair).await;
    tokio::time::sleep(all / 4).await;
    pair.ca.sign_as(&next)?;
    renewed(pair).await;
    tokio::time::sleep(all / 4).await;
    pair.ca.send_roots(&next.root());
    renewed(pair).await;
    Ok(())
}

/// Waits until both proxies were given certificates several times: the answers to questions of before are on their way
/// still.
async fn renewed(pair: &Pair) {
    for id in ["near", "far"] {
        for _ in 0..3 {
            let known = pair.ca.calls().len();
            pair.ca
                .calls()
                .find(known, |call| call.metadata.get("authorization").is_some_and(|t| said_by(t, id)))
                .await;
        }
    }
}

fn said_by(token: &tonic::metadata::MetadataValue<tonic::metadata::Ascii>, account: &str) -> bool {
    token.to_str().is_ok_and(|token| token.contains(account))
}

async fn one(at: SocketAddr, stays: bool, tally: Arc<Tally>, stopped: watch::Receiver<bool>) {
    let mut connection = None;
    while !*stopped.borrow() {
        let mut tcp = match connection.take() {
            Some(tcp) => tcp,
            None => match TcpStream::connect(at).await {
                Ok(tcp) => tcp,
                Err(error) => {
                    tally.count(Err(error.into()));
                    continue;
                }
            },
        };
        if tally.count(ask(&mut tcp).await) && stays {
            connection = Some(tcp);
        }
    }
}

async fn ask(tcp: &mut TcpStream) -> Result<()> {
    tcp.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
    let head = timeout(LIMIT, head(tcp)).await.context("no answer")??;
    ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
    let mut body = [0; 2];
    tcp.read_exact(&mut body).await?;
    Ok(())
}

/// Two requests at a time on one connection.
async fn two(at: SocketAddr, tally: Arc<Tally>, stopped: watch::Receiver<bool>) {
    let Ok(connection) = http2(at).await else {
        tally.count(Err(anyhow::anyhow!("no HTTP/2 connection")));
        return;
    };
    while !*stopped.borrow() {
        let (left, right) = tokio::join!(ask_two(&connection), ask_two(&connection));
        tally.count(left);
        if !tally.count(right) {
            return;
        }
    }
}

async fn ask_two(connection: &SendRequest<Bytes>) -> Result<()> {
    let mut sender = connection.clone().ready().await?;
    let (answer, _) = sender.send_request(Request::get("http://a/").body(())?, true)?;
    let answer = timeout(LIMIT, answer).await.context("no answer")??;
    ensure!(answer.status() == 200, "status {}", answer.status());
    let mut body = answer.into_body();
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
    }
    Ok(())
}
