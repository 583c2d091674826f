//! What a silent connection costs in memory: many are opened, each serves one request, then nobody says anything.

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

/// Cases with the one whose configuration they have.
pub(super) const CASES: [(&str, usize); 2] = [("idle-clear", 0), ("idle-mtls", 1)];
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
        open_ones.push(open(args, tls.as_ref(), &said).await?);
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
