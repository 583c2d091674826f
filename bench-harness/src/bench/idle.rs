//! What a silent connection costs in memory: many are opened, each serves one request or none, then nobody says anything.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::load::{Args, SERVER_NAME, answer, request};
use super::rig::Peer;
use crate::child::resident_bytes;

/// One way of being silent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case {
    /// Name in the table.
    pub(super) name: &'static str,
    /// Index of the case whose configuration it has.
    pub(super) base: usize,
    /// The clients never say anything.
    pub(super) mute: bool,
    /// Most bytes that ours may take for each.
    most: u64,
}

/// All of them.
pub(super) const CASES: [Case; 3] = [
    Case { name: "idle-mute", base: 0, mute: true, most: 6_000 },
    Case { name: "idle-clear", base: 0, mute: false, most: 6_000 },
    Case { name: "idle-mtls", base: 1, mute: false, most: 14_000 },
];
/// Requests before anything is counted, so that what is made once is made.
const WARM: usize = 200;
/// Long enough for a proxy to notice the silence, and for allocators to give back what the handshakes took.
const SILENCE: Duration = Duration::from_secs(15);

/// What was measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Held {
    /// Open connections.
    pub(super) connections: usize,
    /// Resident bytes of the proxy for each, the kernel's not counted.
    pub(super) bytes_each: u64,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Idle {
    pub(super) case: &'static str,
    pub(super) peer: Peer,
    pub(super) held: Held,
    /// See [`Case::most`].
    most: u64,
}

impl Idle {
    pub(super) fn new(case: &Case, peer: Peer, held: Held) -> Self {
        Self { case: case.name, peer, held, most: case.most }
    }
}

trait Stream: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// Opens the connections, waits, reads the memory of the first process.
///
/// # Errors
/// When a connection is not served.
pub(super) async fn hold(args: &Args, tls: Option<TlsConnector>) -> Result<Held> {
    let pid = *args.pid.first().context("--hold wants --pid")?;
    let said = request(&args.host);
    let mut first = open(args, tls.as_ref(), &said).await?;
    for _ in 0..WARM {
        exchange(&mut first, &said).await?;
    }
    let before = resident_bytes(pid);
    let mut open_ones = Vec::with_capacity(args.connections);
    for _ in 0..args.connections {
        if args.mute {
            open_ones.push(Box::new(TcpStream::connect(args.target).await?) as Box<dyn Stream>);
        } else {
            open_ones.push(open(args, tls.as_ref(), &said).await?);
        }
    }
    tokio::time::sleep(SILENCE).await;
    // Allocators give back when they are asked for something.
    for _ in 0..WARM {
        exchange(&mut first, &said).await?;
    }
    let grown = resident_bytes(pid).saturating_sub(before);
    Ok(Held { connections: open_ones.len(), bytes_each: grown / open_ones.len().max(1) as u64 })
}

/// A connection that has served one request.
async fn open(args: &Args, tls: Option<&TlsConnector>, said: &Arc<Vec<u8>>) -> Result<Box<dyn Stream>> {
    let socket = TcpStream::connect(args.target).await?;
    socket.set_nodelay(true)?;
    let mut stream: Box<dyn Stream> = match tls {
        None => Box::new(socket),
        Some(tls) => Box::new(tls.connect(SERVER_NAME.try_into()?, socket).await?),
    };
    exchange(&mut stream, said).await?;
    Ok(stream)
}

async fn exchange(stream: &mut Box<dyn Stream>, said: &[u8]) -> Result<()> {
    stream.write_all(said).await?;
    stream.flush().await?;
    let status = answer(stream, &mut vec![0; 16 * 1024]).await?;
    ensure!(status == 200, "status {status}");
    Ok(())
}

/// The lines of the table.
pub(super) fn text(all: &[Idle]) -> String {
    let line = |idle: &Idle| {
        let Held { connections, bytes_each } = idle.held;
        let name = super::table::name(idle.peer);
        format!("{:<16} {name:<12} {connections:>6} connections {bytes_each:>7} bytes each\n", idle.case)
    };
    all.iter().map(line).collect()
}

/// Limits that ours went beyond.
pub(super) fn missed(all: &[Idle]) -> Vec<String> {
    let ours = all.iter().filter(|idle| idle.peer == Peer::IstioProxy && idle.held.bytes_each > idle.most);
    let line = |idle: &Idle| {
        format!("{}: {} bytes for a silent connection, at most {}", idle.case, idle.held.bytes_each, idle.most)
    };
    ours.map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_has_its_price() {
        let idle = |case: &Case, peer, bytes_each| Idle::new(case, peer, Held { connections: 1, bytes_each });
        let [mute, clear, mtls] = &CASES;
        let kept = [
            idle(mute, Peer::IstioProxy, 6_000),
            idle(clear, Peer::Envoy, 60_000),
            idle(clear, Peer::IstioProxy, 6_000),
            idle(mtls, Peer::IstioProxy, 14_000),
        ];
        assert!(missed(&kept).is_empty());
        let broken = [idle(clear, Peer::IstioProxy, 6_001), idle(mtls, Peer::IstioProxy, 14_001)];
        assert_eq!(
            missed(&broken),
            [
                "idle-clear: 6001 bytes for a silent connection, at most 6000",
                "idle-mtls: 14001 bytes for a silent connection, at most 14000"
            ]
        );
    }
}
