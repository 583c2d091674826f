//! Where a redirected connection really wanted to go.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::SockRef;
use tokio::net::TcpStream;

/// The destination before iptables REDIRECT (`SO_ORIGINAL_DST`). Under TPROXY, and for a connection that was not
/// redirected, the kernel has no such record and the local address is the destination already.
pub fn original_dst(socket: &TcpStream) -> io::Result<SocketAddr> {
    let local = socket.local_addr()?;
    let socket = SockRef::from(socket);
    // A v4 client of a v6 wildcard socket is tracked under its v4 address.
    let asked = match canonical(local).ip() {
        IpAddr::V4(_) => socket.original_dst_v4(),
        IpAddr::V6(_) => socket.original_dst_v6(),
    };
    match asked {
        Ok(address) => Ok(canonical(address.as_socket().unwrap_or(local))),
        Err(_) => Ok(canonical(local)),
    }
}

/// A v4-mapped v6 address as plain v4: chains and clusters are written in v4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn without_redirect_it_is_the_local_address() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        assert_eq!(original_dst(&accepted.unwrap().0).unwrap(), address);
    }

    #[test]
    fn mapped_addresses_become_v4() {
        assert_eq!(canonical("[::ffff:10.0.0.1]:80".parse().unwrap()), "10.0.0.1:80".parse().unwrap());
    }
}
