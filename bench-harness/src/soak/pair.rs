//! Two proxies, the ways through them, and the application at their end.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::application;
use super::live::head;
use super::side::{LIMIT, Side};
use super::world::{self, FORBIDDEN, Way};
use crate::istiod::Ca;

/// Between two tries of something that is not there yet.
const TRY: Duration = Duration::from_millis(2);

/// The test's mesh.
pub(super) struct Pair {
    /// Signs for both.
    pub(super) ca: Arc<Ca>,
    /// The client's proxy.
    pub(super) near: Side,
    /// The application's proxy.
    pub(super) far: Side,
    /// The ways through both.
    pub(super) ways: Vec<Way>,
    proxy: PathBuf,
}

impl Pair {
    /// Everything but the proxies.
    ///
    /// # Errors
    /// Without ports or keys.
    pub(super) async fn new(proxy: PathBuf) -> Result<Self> {
        let ca = Arc::new(Ca::new("cluster.local")?);
        let (near, far) = (Side::new(&ca, "near").await?, Side::new(&ca, "far").await?);
        let ways = world::ways().await?;
        world::tell(&near, &far, &ways, application::start().await?);
        Ok(Self { ca, near, far, ways, proxy })
    }

    /// Starts both proxies and waits until every way is open.
    ///
    /// # Errors
    /// When one is not.
    pub(super) async fn start(&mut self) -> Result<()> {
        self.near.start(&self.proxy)?;
        self.far.start(&self.proxy)?;
        for way in self.ways.clone() {
            let opened = timeout(LIMIT, until_open(way)).await;
            opened
                .with_context(|| format!("{}: no answer; {}{}", way.name, self.near.printed(), self.far.printed()))?;
        }
        Ok(())
    }

    /// Kills one of the proxies, starts it again; how long until a request is answered by the application, and the CPU time
    /// that the new process took by then.
    ///
    /// # Errors
    /// When it is not answered at all.
    pub(super) async fn kill(&mut self, near: bool) -> Result<(Duration, Duration)> {
        let way = self.ways[0];
        let side = if near { &mut self.near } else { &mut self.far };
        let start = Instant::now();
        side.kill();
        side.start(&self.proxy)?;
        timeout(LIMIT, until_open(way)).await.with_context(|| format!("no answer; {}", side.printed()))?;
        Ok((start.elapsed(), side.cpu()))
    }

    /// Whether policy and mTLS are on: a path that is denied is, and whoever has no certificate gets no answer.
    ///
    /// # Errors
    /// When nobody listens.
    pub(super) async fn guards(&self) -> Result<bool> {
        let way = self.ways[0];
        let denied = status(way, FORBIDDEN).await? == 403;
        let mut plain = TcpStream::connect(way.far).await?;
        plain.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await?;
        let mut told = Vec::new();
        // A reset is as good as an end.
        let _ = timeout(LIMIT, plain.read_to_end(&mut told)).await.context("plaintext is held")?;
        Ok(denied && !told.starts_with(b"HTTP/1.1 200"))
    }

    /// A way by its name.
    pub(super) fn way(&self, name: &str) -> Way {
        *self.ways.iter().find(|way| way.name == name).expect("a way of that name")
    }
}

async fn until_open(way: Way) {
    loop {
        let open = match way.http {
            true => status(way, "/").await.is_ok_and(|status| status == 200),
            false => echoes(way).await.is_ok(),
        };
        if open {
            return;
        }
        sleep(TRY).await;
    }
}

async fn status(way: Way, path: &str) -> Result<u16> {
    let mut tcp = TcpStream::connect(way.near).await?;
    tcp.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await?;
    let head = head(&mut tcp).await?;
    Ok(head.split(' ').nth(1).context("a status")?.parse()?)
}

async fn echoes(way: Way) -> Result<()> {
    let mut tcp = TcpStream::connect(way.near).await?;
    tcp.write_all(b"hello").await?;
    let mut back = [0; 5];
    tcp.read_exact(&mut back).await?;
    ensure!(&back == b"hello", "other bytes come back");
    Ok(())
}
