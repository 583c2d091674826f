//! One concrete stream type, so that nothing above is generic over its transport.

use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// What an encrypted transport offers; `tls` implements it by being a stream, so that `net` need not know its types.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// A connection. The encrypted variants are boxed trait objects: one indirect call per read or write is nothing beside
/// a record's encryption, and the rarer variants stay out of the size of every future that holds a plain one.
pub enum Stream {
    /// A plain socket.
    Tcp(TcpStream),
    /// A Unix domain socket.
    Unix(Box<UnixStream>),
    /// TLS where we are the server.
    ServerTls(Box<dyn Io>),
    /// TLS where we are the client.
    ClientTls(Box<dyn Io>),
    /// Bytes already taken from the stream come again first.
    Prefixed(Box<Prefixed>),
    /// An in-memory pipe, for tests of everything above.
    Mem(DuplexStream),
}

/// A stream whose first bytes were read before and are replayed.
pub struct Prefixed {
    prefix: Bytes,
    inner: Stream,
}

impl Stream {
    /// Puts bytes that were read for inspection back in front.
    #[must_use]
    pub fn replay(self, prefix: Bytes) -> Self {
        if prefix.is_empty() {
            return self;
        }
        // A stream may be looked at many times in its life; what was replayed before goes.
        let inner = match self {
            Self::Prefixed(read) if read.prefix.is_empty() => read.inner,
            other => other,
        };
        Self::Prefixed(Box::new(Prefixed { prefix, inner }))
    }

    /// The plain socket below, if the stream is not encrypted.
    pub fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Tcp(tcp) => Some(tcp),
            Self::Prefixed(p) => p.inner.tcp(),
            Self::Unix(_) | Self::ServerTls(_) | Self::ClientTls(_) | Self::Mem(_) => None,
        }
    }

    /// Whether the bytes are encrypted by us.
    pub fn is_tls(&self) -> bool {
        match self {
            Self::ServerTls(_) | Self::ClientTls(_) => true,
            Self::Prefixed(p) => p.inner.is_tls(),
            Self::Tcp(_) | Self::Unix(_) | Self::Mem(_) => false,
        }
    }

    /// Makes the coming drop a RST instead of a FIN, as Envoy refuses a connection without a chain.
    /// Best effort: an encrypted or in-memory stream just closes.
    pub fn reset_on_drop(&self) {
        if let Some(tcp) = self.tcp() {
            let _ = socket2::SockRef::from(tcp).set_linger(Some(Duration::ZERO));
        }
    }
}

impl From<TcpStream> for Stream {
    fn from(tcp: TcpStream) -> Self {
        Self::Tcp(tcp)
    }
}

impl From<UnixStream> for Stream {
    fn from(unix: UnixStream) -> Self {
        Self::Unix(Box::new(unix))
    }
}

impl From<DuplexStream> for Stream {
    fn from(mem: DuplexStream) -> Self {
        Self::Mem(mem)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(tcp) => f.debug_tuple("Tcp").field(tcp).finish(),
            Self::Unix(unix) => f.debug_tuple("Unix").field(unix).finish(),
            Self::ServerTls(_) => f.write_str("ServerTls"),
            Self::ClientTls(_) => f.write_str("ClientTls"),
            Self::Prefixed(p) => f.debug_tuple("Prefixed").field(&p.prefix.len()).field(&p.inner).finish(),
            Self::Mem(_) => f.write_str("Mem"),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_read(cx, buf),
            Self::Unix(s) => Pin::new(&mut **s).poll_read(cx, buf),
            Self::ServerTls(s) | Self::ClientTls(s) => Pin::new(s).poll_read(cx, buf),
            Self::Mem(s) => Pin::new(s).poll_read(cx, buf),
            Self::Prefixed(p) => {
                if p.prefix.is_empty() {
                    return Pin::new(&mut p.inner).poll_read(cx, buf);
                }
                let n = p.prefix.len().min(buf.remaining());
                buf.put_slice(&p.prefix[..n]);
                p.prefix.advance(n);
                if p.prefix.is_empty() {
                    // Advanced to its end it would keep its memory as long as the connection lives.
                    p.prefix = Bytes::new();
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_write(cx, buf),
            Self::Unix(s) => Pin::new(&mut **s).poll_write(cx, buf),
            Self::ServerTls(s) | Self::ClientTls(s) => Pin::new(s).poll_write(cx, buf),
            Self::Mem(s) => Pin::new(s).poll_write(cx, buf),
            Self::Prefixed(p) => Pin::new(&mut p.inner).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Unix(s) => Pin::new(&mut **s).poll_write_vectored(cx, bufs),
            Self::ServerTls(s) | Self::ClientTls(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Mem(s) => Pin::new(s).poll_write_vectored(cx, bufs),
            Self::Prefixed(p) => Pin::new(&mut p.inner).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(s) => s.is_write_vectored(),
            Self::Unix(s) => s.is_write_vectored(),
            Self::ServerTls(s) | Self::ClientTls(s) => s.is_write_vectored(),
            Self::Mem(s) => s.is_write_vectored(),
            Self::Prefixed(p) => p.inner.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_flush(cx),
            Self::Unix(s) => Pin::new(&mut **s).poll_flush(cx),
            Self::ServerTls(s) | Self::ClientTls(s) => Pin::new(s).poll_flush(cx),
            Self::Mem(s) => Pin::new(s).poll_flush(cx),
            Self::Prefixed(p) => Pin::new(&mut p.inner).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(s) => Pin::new(s).poll_shutdown(cx),
            Self::Unix(s) => Pin::new(&mut **s).poll_shutdown(cx),
            Self::ServerTls(s) | Self::ClientTls(s) => Pin::new(s).poll_shutdown(cx),
            Self::Mem(s) => Pin::new(s).poll_shutdown(cx),
            Self::Prefixed(p) => Pin::new(&mut p.inner).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn replayed_bytes_come_first_and_once() {
        let (mut far, near) = tokio::io::duplex(64);
        far.write_all(b"world").await.unwrap();
        far.shutdown().await.unwrap();
        let mut near = Stream::from(near).replay(Bytes::from_static(b"hello "));
        let mut all = String::new();
        near.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "hello world");
    }

    #[tokio::test]
    async fn replay_passes_through_small_reads() {
        let (_far, near) = tokio::io::duplex(64);
        let mut near = Stream::from(near).replay(Bytes::from_static(b"abc"));
        let mut two = [0; 2];
        assert_eq!(near.read(&mut two).await.unwrap(), 2);
        assert_eq!(near.read(&mut two).await.unwrap(), 1);
        assert_eq!(two[0], b'c');
    }

    #[tokio::test]
    async fn replayed_bytes_are_given_back() {
        struct Lent(std::sync::Arc<[u8; 3]>);
        impl AsRef<[u8]> for Lent {
            fn as_ref(&self) -> &[u8] {
                &*self.0
            }
        }
        let bytes = std::sync::Arc::new(*b"abc");
        let (_far, near) = tokio::io::duplex(64);
        let mut near = Stream::from(near).replay(Bytes::from_owner(Lent(bytes.clone())));
        near.read_exact(&mut [0; 2]).await.unwrap();
        assert_eq!(std::sync::Arc::strong_count(&bytes), 2);
        near.read_exact(&mut [0; 1]).await.unwrap();
        assert_eq!(std::sync::Arc::strong_count(&bytes), 1);
    }

    #[test]
    fn a_stream_stays_small() {
        assert!(size_of::<Stream>() <= 40, "{}", size_of::<Stream>());
    }
}
