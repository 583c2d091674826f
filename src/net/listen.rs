//! Listening sockets, one per worker.

use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

/// Connections the kernel queues for a busy worker; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// How a socket is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct ListenOptions {
    /// Several sockets share the port, one per worker (SO_REUSEPORT).
    pub reuse_port: bool,
    /// Accept connections to foreign addresses (TPROXY interception; needs CAP_NET_ADMIN).
    pub transparent: bool,
    /// A v6 wildcard socket takes v4 clients too.
    pub dual_stack: bool,
}

/// Opens a listening socket. Call it inside the runtime that will accept.
pub fn listen(address: SocketAddr, options: ListenOptions) -> io::Result<TcpListener> {
    let socket = open(address, options)?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Fails with `AddrInUse` if anybody listens on the address. Sharing a port is asked for by every worker, so without
/// this question two proxies would split the traffic in silence.
pub fn probe_free(address: SocketAddr, options: ListenOptions) -> io::Result<()> {
    open(address, ListenOptions { reuse_port: false, ..options })?.listen(1)
}

fn open(address: SocketAddr, options: ListenOptions) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // Connections of a predecessor in TIME_WAIT must not keep us from starting.
    socket.set_reuse_address(true)?;
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(!options.dual_stack)?;
    }
    if options.transparent {
        match address {
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true)?,
            SocketAddr::V6(_) => socket.set_ip_transparent_v6(true)?,
        }
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    #[tokio::test]
    async fn workers_share_a_port_that_a_second_proxy_cannot_take() {
        let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
        let first = listen(any(), options).unwrap();
        let address = first.local_addr().unwrap();
        let _second = listen(address, options).unwrap();
        assert_eq!(probe_free(address, options).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[tokio::test]
    async fn a_free_port_stays_free_after_the_probe() {
        let options = ListenOptions { reuse_port: true, ..ListenOptions::default() };
        let address = listen(any(), options).unwrap().local_addr().unwrap();
        probe_free(address, options).unwrap();
        listen(address, options).unwrap();
    }
}
