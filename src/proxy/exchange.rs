//! Peer metadata on TCP: where `istio-peer-exchange` was negotiated, each proxy puts one frame in front of its bytes.
//! It is for proxies, so it is taken off here; the application must never see it.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use proxy_config::peer::{FRAME_MAGIC, Workload};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::sync::watch;

use super::Node;
use crate::snapshot::TcpExchange;
use crate::telemetry::{ExchangeMetrics, Peer};

/// What a frame begins with; a 32-bit length follows.
const MAGIC: [u8; 4] = FRAME_MAGIC.to_be_bytes();
const HEADER: usize = 8;
/// Of a frame that is longer nothing is understood; it is skipped.
const LONGEST: usize = 64 * 1024;

/// What is known of the peer.
#[derive(Debug, Clone)]
pub(super) enum Known {
    /// Its frame has not come yet.
    NotYet,
    /// Nothing was agreed on, or nothing was told.
    NoExchange,
    /// It agreed and did not begin with a frame.
    NoHeader,
    /// Its frame is not understood.
    Garbage,
    /// This.
    Peer(Arc<Peer>),
}

/// A stream without the frame in front of it, if there is one, and with ours.
pub(super) struct Exchanged<S> {
    inner: S,
    state: State,
    said: Option<Arc<TcpExchange>>,
    known: watch::Sender<Known>,
}

enum State {
    /// Reading the header.
    Header([u8; HEADER], usize),
    /// A frame with so many bytes still to come; what has come of one that we want to understand.
    Frame(usize, Option<Vec<u8>>),
    /// No frame: these bytes come first, from this one on.
    Replay([u8; HEADER], usize, usize),
    Bytes,
}

impl<S> Exchanged<S> {
    /// `said`: the exchange that was negotiated, if one was.
    pub(super) fn new(inner: S, said: Option<&Arc<TcpExchange>>) -> Self {
        let (state, known) = match said {
            Some(_) => (State::Header([0; HEADER], 0), Known::NotYet),
            None => (State::Bytes, Known::NoExchange),
        };
        Self { inner, state, said: said.cloned(), known: watch::Sender::new(known) }
    }

    /// What is known of the peer, now and later.
    pub(super) fn known(&self) -> watch::Receiver<Known> {
        self.known.subscribe()
    }

    fn understood(&mut self, frame: Option<&[u8]>) {
        let additional = self.said.as_ref().map_or(&[][..], |said| &said.additional);
        let known = match frame.and_then(|frame| Workload::from_frame(frame, additional)) {
            None => Known::Garbage,
            Some((_, None)) => Known::NoExchange,
            Some((_, Some(peer))) => Known::Peer(Peer::new(peer)),
        };
        self.known.send_replace(known);
        self.state = State::Bytes;
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Exchanged<S> {
    /// Sends our frame, where one is due. Before anything else is written: the peer waits for it.
    pub(super) async fn tell(&mut self, node: &Node, metrics: &ExchangeMetrics) -> io::Result<()> {
        let Some(said) = &self.said else { return Ok(()) };
        let mut frame = said.frame.get_or_init(|| frame(said, node)).clone();
        if frame.is_empty() {
            return Ok(());
        }
        metrics.added.inc();
        while frame.has_remaining() {
            let written = self.inner.write(&frame).await?;
            frame.advance(written);
        }
        poll_fn(|cx| Pin::new(&mut self.inner).poll_flush(cx)).await
    }
}

fn frame(said: &TcpExchange, node: &Node) -> Bytes {
    let id = node.id.as_ref().and_then(|id| id.to_str().ok());
    id.map_or_else(Bytes::new, |id| node.told(&said.additional).to_frame(id).into())
}

impl<S: AsyncRead + Unpin> Exchanged<S> {
    /// Reads at most as much as the frame has left; 0 is the end.
    fn poll_some(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut into = ReadBuf::new(into);
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut into))?;
        Poll::Ready(Ok(into.filled().len()))
    }

    /// Reads the header as far as it has come.
    fn poll_header(&mut self, cx: &mut Context<'_>, mut header: [u8; HEADER], have: usize) -> Poll<io::Result<()>> {
        let n = ready!(self.poll_some(cx, &mut header[have..]))?;
        let have = have + n;
        let shared = have.min(MAGIC.len());
        if n == 0 || header[..shared] != MAGIC[..shared] {
            self.known.send_replace(Known::NoHeader);
            self.state = State::Replay(header, 0, have);
        } else if have < HEADER {
            self.state = State::Header(header, have);
        } else {
            let length = u32::from_be_bytes([header[4], header[5], header[6], header[7]]) as usize;
            self.state = State::Frame(length, (length <= LONGEST).then(Vec::new));
        }
        Poll::Ready(Ok(()))
    }

    /// Reads a piece of the frame.
    fn poll_frame(&mut self, cx: &mut Context<'_>, left: usize) -> Poll<io::Result<()>> {
        let mut piece = [0; 512];
        let most = left.min(piece.len());
        let n = ready!(self.poll_some(cx, &mut piece[..most]))?;
        if n == 0 {
            self.understood(None);
            return Poll::Ready(Ok(()));
        }
        if let State::Frame(left, kept) = &mut self.state {
            *left -= n;
            if let Some(kept) = kept {
                kept.extend_from_slice(&piece[..n]);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Exchanged<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match &mut this.state {
                State::Bytes => return Pin::new(&mut this.inner).poll_read(cx, out),
                State::Header(header, have) => {
                    let (header, have) = (*header, *have);
                    ready!(this.poll_header(cx, header, have))?;
                }
                State::Frame(0, kept) => {
                    let kept = kept.take();
                    this.understood(kept.as_deref());
                }
                State::Frame(left, _) => {
                    let left = *left;
                    ready!(this.poll_frame(cx, left))?;
                }
                State::Replay(header, from, to) => {
                    let n = (*to - *from).min(out.remaining());
                    out.put_slice(&header[*from..*from + n]);
                    *from += n;
                    if from == to {
                        this.state = State::Bytes;
                    }
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

impl Known {
    /// The peer.
    pub(super) fn peer(&self) -> Option<Arc<Peer>> {
        if let Self::Peer(peer) = self { Some(Arc::clone(peer)) } else { None }
    }

    /// Counts what went wrong.
    pub(super) fn count(&self, metrics: &ExchangeMetrics) {
        match self {
            Self::NoHeader => metrics.no_header.inc(),
            Self::Garbage => metrics.garbage.inc(),
            Self::NotYet | Self::NoExchange | Self::Peer(_) => {}
        }
    }
}

/// What is known of the peer, once that will not change.
pub(super) async fn settled(known: &mut watch::Receiver<Known>) -> Known {
    // The sender lives as long as the relay.
    let settled = known.wait_for(|known| !matches!(known, Known::NotYet)).await;
    settled.map_or(Known::NotYet, |known| known.clone())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proxy_config::model::MetadataExchange;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn said() -> Arc<TcpExchange> {
        TcpExchange::new(&MetadataExchange {
            protocol: "istio-peer-exchange".to_owned(),
            enable_discovery: true,
            additional_labels: vec!["role".to_owned()],
        })
    }

    async fn through(pieces: &[&[u8]], said: Option<&Arc<TcpExchange>>) -> (Vec<u8>, Option<String>) {
        let (mut far, near) = tokio::io::duplex(1);
        let pieces: Vec<Vec<u8>> = pieces.iter().map(|p| p.to_vec()).collect();
        tokio::spawn(async move {
            for piece in pieces {
                far.write_all(&piece).await.unwrap();
            }
        });
        let mut all = Vec::new();
        let mut exchanged = Exchanged::new(near, said);
        exchanged.read_to_end(&mut all).await.unwrap();
        (all, exchanged.known().borrow().peer().map(|peer| peer.workload.clone()))
    }

    fn node() -> Node {
        let labels = [("role".to_owned(), "r".to_owned()), ("secret".to_owned(), "s".to_owned())].into();
        let workload = Workload { workload: "web".to_owned(), labels, ..Workload::default() };
        Node { id: Some(HeaderValue::from_static("id")), workload: Arc::new(workload), ..Node::default() }
    }

    #[tokio::test]
    async fn a_frame_is_taken_off_and_only_a_frame() {
        let said = said();
        let said = Some(&said);
        let garbage = [&MAGIC[..], &[0, 0, 0, 3], b"abc"].concat();
        assert_eq!(through(&[&garbage, b"hello"], said).await, (b"hello".to_vec(), None));
        assert_eq!(through(&[&garbage, b"hello"], None).await.0, [&garbage[..], b"hello"].concat());
        assert_eq!(through(&[b"hello"], said).await.0, b"hello");
        assert_eq!(through(&[&MAGIC[..3], b"x, a near miss"], said).await.0, [&MAGIC[..3], b"x, a near miss"].concat());
        assert_eq!(through(&[&MAGIC[..2]], said).await.0, &MAGIC[..2]);
        assert_eq!(through(&[&[&MAGIC[..], &[0; 4]].concat(), b"x"], said).await.0, b"x");
        let long = [&MAGIC[..], &[0, 2, 0, 0], &[7; 0x20000]].concat();
        assert_eq!(through(&[&long, b"end"], said).await.0, b"end");
        assert_eq!(through(&[], said).await.0, b"");
    }

    #[tokio::test]
    async fn proxies_tell_each_other() {
        let (near, far) = tokio::io::duplex(64);
        let (one, other) = (said(), said());
        let (mut near, mut far) = (Exchanged::new(near, Some(&one)), Exchanged::new(far, Some(&other)));
        let mut known = far.known();
        let node = node();
        let (told, read) = tokio::join!(
            async {
                near.tell(&node, &ExchangeMetrics::default()).await.unwrap();
                near.write_all(b"hello").await
            },
            async {
                let mut read = [0; 5];
                far.read_exact(&mut read).await.map(|_| read)
            }
        );
        told.unwrap();
        assert_eq!(&read.unwrap(), b"hello");
        let peer = settled(&mut known).await.peer().expect("a peer");
        assert_eq!((peer.workload.as_str(), peer.labels.len()), ("web", 1));
    }

    #[tokio::test]
    async fn who_has_no_id_tells_nothing() {
        let (near, mut far) = tokio::io::duplex(64);
        let said = said();
        let mut near = Exchanged::new(near, Some(&said));
        near.tell(&Node::default(), &ExchangeMetrics::default()).await.unwrap();
        drop(near);
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        assert!(all.is_empty());
    }
}
