//! From the kernel's queue to a connection's task.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

use super::balance::{self, Limit, Seat, choose};
use super::{Command, Way, Worker};
use crate::drain::Phase;
use crate::net::{self, Stream};
use crate::proxy;
use crate::snapshot::{Listener, Snapshot};

/// Milliseconds to wait when the process has run out of something; a connection's end may free it at any moment.
const BACK_OFF_MS: std::ops::Range<u64> = 5..100;

/// An accepted connection on its way to its worker.
pub(super) struct Arrival {
    peer: SocketAddr,
    /// Which socket it came from.
    socket: SocketAddr,
    seat: Seat,
}

impl Worker {
    /// Accepts from one socket until the proxy leaves.
    ///
    /// # Errors
    /// A socket that can never accept again.
    pub(super) async fn accept(
        self: &Arc<Self>,
        address: SocketAddr,
        way: Way,
        socket: std::net::TcpListener,
    ) -> io::Result<()> {
        let socket = TcpListener::from_std(socket)?;
        let end = if way == Way::Inbound { Phase::Closing } else { Phase::Gone };
        let mut drain = self.drain.clone();
        loop {
            let accepted = tokio::select! {
                biased;
                () = drain.reached(end) => break,
                accepted = self.next(&socket, address) => accepted,
            };
            match accepted {
                Ok((tcp, peer)) => {
                    self.take(tcp, peer, address);
                    // One at a time is within every `max_connections_to_accept_per_socket_event`, and it lets the
                    // connections that are there go first. It costs a turn of the loop for each connection.
                    tokio::task::yield_now().await;
                }
                Err(e) => match judge(&e) {
                    Trouble::Connection => tracing::debug!("accept on {address}: {e}"),
                    Trouble::Resources => {
                        tracing::warn!("accept on {address}: {e}");
                        sleep(Duration::from_millis(fastrand::u64(BACK_OFF_MS))).await;
                    }
                    Trouble::Socket => return Err(e),
                },
            }
        }
        // What the kernel has already promised to serve would be reset with the socket.
        while let Some(Ok((tcp, peer))) = socket.accept().now_or_never() {
            self.take(tcp, peer, address);
        }
        Ok(())
    }

    /// The next connection, once there is room for it. Who waits waits in the kernel and costs us nothing.
    async fn next(&self, socket: &TcpListener, address: SocketAddr) -> io::Result<(TcpStream, SocketAddr)> {
        if balance::is_full(&self.loads, self.connections) {
            tracing::warn!("accept on {address}: {} connections are open; more have to wait", self.connections);
            while balance::is_full(&self.loads, self.connections) {
                sleep(Duration::from_millis(fastrand::u64(BACK_OFF_MS))).await;
            }
        }
        socket.accept().await
    }

    /// Serves it here or sends it where there is less to do.
    fn take(self: &Arc<Self>, tcp: TcpStream, peer: SocketAddr, socket: SocketAddr) {
        let room = self.limit.as_ref().map(Limit::room);
        if let Some(None) = room {
            return self.overflow(peer, socket);
        }
        let to = choose(&self.loads, self.index);
        let arrival = Arrival { peer, socket, seat: Seat::take(&self.loads, to, &self.drain, room.flatten()) };
        if to == self.index {
            return self.serve(tcp, arrival);
        }
        self.loads[to].handed_over.fetch_add(1, Ordering::Relaxed);
        // Either failure closes the connection; the second one means that the process is ending.
        let sent = tcp.into_std().map(|tcp| self.peers[to].send(Command::Take(tcp, arrival)));
        if !matches!(sent, Ok(Ok(()))) {
            tracing::warn!("a connection from {peer} was lost between workers");
        }
    }

    /// Closes a connection that is one too many, by dropping it where this is called.
    fn overflow(&self, peer: SocketAddr, socket: SocketAddr) {
        let view = self.env.view();
        if let Some(listener) = listener_at(&view.snap, socket) {
            self.env.shard().listener(&listener.name).global_cx_overflow.inc();
        }
        tracing::debug!("a connection from {peer} is closed: the limit of all connections is reached");
    }

    /// Starts the connection's task.
    pub(super) fn serve(self: &Arc<Self>, tcp: TcpStream, arrival: Arrival) {
        let Arrival { peer, socket, seat } = arrival;
        let view = self.env.view();
        let (Some(listener), Ok(local)) = (listener_at(&view.snap, socket), tcp.local_addr()) else {
            // The listener was removed while the connection was in the queue.
            return;
        };
        let listener = Arc::clone(listener);
        // A client that is already gone has no destination; serving finds out.
        let original = if listener.original_dst { net::original_dst(&tcp).ok() } else { None };
        let destination = original.unwrap_or_else(|| canonical(local));
        // Small answers must not wait for more to send.
        let _ = tcp.set_nodelay(true);
        tokio::spawn(proxy::serve(
            Stream::from(tcp),
            canonical(peer),
            (canonical(local), destination),
            listener,
            Arc::clone(&self.env),
            seat,
        ));
    }
}

/// The listener whose socket it is.
fn listener_at(snapshot: &Snapshot, socket: SocketAddr) -> Option<&Arc<Listener>> {
    snapshot.bound().iter().find(|l| l.address == Some(socket) || l.additional.contains(&socket))
}

/// A v4 client of a v6 socket is a v4 client.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What a failed accept is about.
#[derive(Debug, PartialEq, Eq)]
enum Trouble {
    /// That one connection; the next one may be fine.
    Connection,
    /// The process or the system has run out of something.
    Resources,
    /// The socket itself.
    Socket,
}

/// Linux passes errors of the new connection through accept, so most errors are not about the socket.
fn judge(error: &io::Error) -> Trouble {
    const ENOMEM: i32 = 12;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const ENOBUFS: i32 = 105;
    const EBADF: i32 = 9;
    const EFAULT: i32 = 14;
    const EINVAL: i32 = 22;
    const ENOTSOCK: i32 = 88;
    const EOPNOTSUPP: i32 = 95;
    match error.raw_os_error() {
        Some(ENOMEM | ENFILE | EMFILE | ENOBUFS) => Trouble::Resources,
        Some(EBADF | EFAULT | EINVAL | ENOTSOCK) => Trouble::Socket,
        // On TCP this is a network error of the connection.
        Some(EOPNOTSUPP) => Trouble::Connection,
        // Not from the kernel: the runtime is shutting down.
        None => Trouble::Socket,
        Some(_) => Trouble::Connection,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_accept_are_told_apart() {
        for (code, expected) in [
            (103, Trouble::Connection), // ECONNABORTED
            (113, Trouble::Connection), // EHOSTUNREACH
            (1, Trouble::Connection),   // EPERM, a firewall
            (24, Trouble::Resources),
            (105, Trouble::Resources),
            (9, Trouble::Socket),
            (22, Trouble::Socket),
        ] {
            assert_eq!(judge(&io::Error::from_raw_os_error(code)), expected, "{code}");
        }
        assert_eq!(judge(&io::Error::other("gone")), Trouble::Socket);
    }
}
