//! Opening connections.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio::time::timeout;

use super::Stream;

/// Where to connect to and how.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The peer.
    pub address: SocketAddr,
    /// Local address; port 0 lets the kernel choose one.
    pub source: Option<SocketAddr>,
    /// Bind to a `source` that is not ours (the client's own, TPROXY).
    pub transparent: bool,
    /// Limit on the connection attempt; `None` leaves it to the kernel (about two minutes).
    pub timeout: Option<Duration>,
    /// TCP keep-alive probes.
    pub keepalive: Option<Keepalive>,
    /// SO_MARK of outgoing packets (needs CAP_NET_ADMIN).
    pub mark: Option<u32>,
}

/// TCP keep-alive; a missing value is the kernel's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Keepalive {
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
    /// Unanswered probes that end the connection.
    pub probes: Option<u32>,
}

impl Target {
    /// A plain connection to an address.
    pub fn new(address: SocketAddr) -> Self {
        Self { address, source: None, transparent: false, timeout: None, keepalive: None, mark: None }
    }
}

/// Attempts that share their source port with other connections, before one insists on a port of its own.
const SHARED_PORT_ATTEMPTS: usize = 4;

/// Connects. The error of an attempt that took too long has kind `TimedOut`.
pub async fn connect(target: &Target) -> io::Result<TcpStream> {
    let attempt = attempts(target);
    let Some(limit) = target.timeout else { return attempt.await };
    match timeout(limit, attempt).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "connect timeout")),
    }
}

/// Connects to a Unix domain socket; a path that begins with `@` is in the abstract namespace.
pub async fn connect_unix(path: &str) -> io::Result<Stream> {
    let path = path.strip_prefix('@').map_or_else(|| path.to_owned(), |name| format!("\0{name}"));
    Ok(UnixStream::connect(path).await?.into())
}

/// A bound source owns its port alone, also in TIME_WAIT, so 28 000 connections from 127.0.0.6 would be the end of it.
/// IP_BIND_ADDRESS_NO_PORT would choose the port at connect time, but is out of reach without `unsafe`; ports are shared
/// instead (SO_REUSEADDR), and the rare clash of two connections to the same peer is tried again.
async fn attempts(target: &Target) -> io::Result<TcpStream> {
    if target.source.is_some_and(|source| source.port() == 0) {
        for _ in 0..SHARED_PORT_ATTEMPTS {
            match prepare(target, true)?.connect(target.address).await {
                Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => {}
                result => return result,
            }
        }
    }
    prepare(target, false)?.connect(target.address).await
}

fn prepare(target: &Target, share_port: bool) -> io::Result<TcpSocket> {
    let socket = if target.address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // Requests are written whole; waiting to fill a segment would only add latency.
    socket.set_nodelay(true)?;
    let raw = SockRef::from(&socket);
    if let Some(keepalive) = target.keepalive {
        raw.set_tcp_keepalive(&keepalive.into())?;
    }
    if let Some(mark) = target.mark {
        raw.set_mark(mark)?;
    }
    let Some(source) = target.source else { return Ok(socket) };
    if target.transparent {
        match source {
            SocketAddr::V4(_) => raw.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => raw.set_ip_transparent_v6(true)?,
        }
    }
    // TPROXY may ask for a client's own port, which its first connection still holds.
    socket.set_reuseaddr(share_port || target.transparent)?;
    socket.bind(source)?;
    Ok(socket)
}

impl From<Keepalive> for TcpKeepalive {
    fn from(said: Keepalive) -> Self {
        let mut keepalive = Self::new();
        if let Some(time) = said.time {
            keepalive = keepalive.with_time(time);
        }
        if let Some(interval) = said.interval {
            keepalive = keepalive.with_interval(interval);
        }
        if let Some(probes) = said.probes {
            keepalive = keepalive.with_retries(probes);
        }
        keepalive
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn binds_the_source_address() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut target = Target::new(listener.local_addr().unwrap());
        target.source = Some("127.0.0.6:0".parse().unwrap());
        target.keepalive = Some(Keepalive { time: Some(Duration::from_secs(9)), ..Keepalive::default() });
        let (client, accepted) = tokio::join!(connect(&target), listener.accept());
        assert_eq!(accepted.unwrap().1.ip().to_string(), "127.0.0.6");
        assert!(client.unwrap().nodelay().unwrap());
    }

    #[tokio::test]
    async fn a_refused_connection_says_so() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert_eq!(connect(&Target::new(address)).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
