//! Peer metadata on TCP: where `istio-peer-exchange` was negotiated, the other proxy puts one frame in front of its bytes.
//! It is for proxies, so it is taken off here; the application must never see it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What a frame begins with; a 32-bit length follows.
const MAGIC: [u8; 4] = 0x3D23_0467_u32.to_be_bytes();
const HEADER: usize = 8;

/// A stream without the frame in front of it, if there is one.
pub(super) struct Exchanged<S> {
    inner: S,
    state: State,
}

enum State {
    /// Reading the header.
    Header([u8; HEADER], usize),
    /// Frame bytes that are still to come.
    Frame(usize),
    /// No frame: these bytes come first, from this one on.
    Replay([u8; HEADER], usize, usize),
    Bytes,
}

impl<S> Exchanged<S> {
    /// `expected`: the protocol was negotiated.
    pub(super) fn new(inner: S, expected: bool) -> Self {
        let state = if expected { State::Header([0; HEADER], 0) } else { State::Bytes };
        Self { inner, state }
    }
}

impl<S: AsyncRead + Unpin> Exchanged<S> {
    /// Reads at most as much as the frame has left; 0 is the end.
    fn poll_some(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut into = ReadBuf::new(into);
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut into))?;
        Poll::Ready(Ok(into.filled().len()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Exchanged<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match this.state {
                State::Bytes => return Pin::new(&mut this.inner).poll_read(cx, out),
                State::Header(mut header, have) => {
                    let n = ready!(this.poll_some(cx, &mut header[have..]))?;
                    let have = have + n;
                    let shared = have.min(MAGIC.len());
                    this.state = if n == 0 || header[..shared] != MAGIC[..shared] {
                        State::Replay(header, 0, have)
                    } else if have < HEADER {
                        State::Header(header, have)
                    } else {
                        let length = [header[4], header[5], header[6], header[7]];
                        State::Frame(u32::from_be_bytes(length) as usize)
                    };
                }
                State::Frame(0) => this.state = State::Bytes,
                State::Frame(left) => {
                    let mut dropped = [0; 512];
                    let most = left.min(dropped.len());
                    let n = ready!(this.poll_some(cx, &mut dropped[..most]))?;
                    this.state = if n == 0 { State::Bytes } else { State::Frame(left - n) };
                }
                State::Replay(header, from, to) => {
                    let n = (to - from).min(out.remaining());
                    out.put_slice(&header[from..from + n]);
                    this.state = if from + n < to { State::Replay(header, from + n, to) } else { State::Bytes };
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Exchanged<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn through(pieces: &[&[u8]], expected: bool) -> Vec<u8> {
        let (mut far, near) = tokio::io::duplex(1);
        let pieces: Vec<Vec<u8>> = pieces.iter().map(|p| p.to_vec()).collect();
        tokio::spawn(async move {
            for piece in pieces {
                far.write_all(&piece).await.unwrap();
            }
        });
        let mut all = Vec::new();
        Exchanged::new(near, expected).read_to_end(&mut all).await.unwrap();
        all
    }

    #[tokio::test]
    async fn a_frame_is_taken_off_and_only_a_frame() {
        let frame = [&MAGIC[..], &[0, 0, 0, 3], b"abc"].concat();
        assert_eq!(through(&[&frame, b"hello"], true).await, b"hello");
        assert_eq!(through(&[&frame, b"hello"], false).await, [&frame[..], b"hello"].concat());
        assert_eq!(through(&[b"hello"], true).await, b"hello");
        assert_eq!(through(&[&MAGIC[..3], b"x, a near miss"], true).await, [&MAGIC[..3], b"x, a near miss"].concat());
        assert_eq!(through(&[&MAGIC[..2]], true).await, &MAGIC[..2]);
        assert_eq!(through(&[&[&MAGIC[..], &[0; 4]].concat(), b"x"], true).await, b"x");
        let long = [&MAGIC[..], &[0, 0, 8, 0], &[7; 2048]].concat();
        assert_eq!(through(&[&long, b"end"], true).await, b"end");
        assert_eq!(through(&[], true).await, b"");
    }
}
