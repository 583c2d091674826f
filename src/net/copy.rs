//! Copies bytes both ways between two connections until both have said goodbye.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Buffers grow with the traffic: most connections are idle or small, so 1 KiB keeps ten thousand of them cheap, while a
/// bulk transfer soon gets 256 KiB and a fraction of the system calls.
const SIZES: [usize; 3] = [1024, 16 * 1024, 256 * 1024];
/// Full reads in a row that move a direction to the next size.
const FULL_READS: u32 = 3;

/// Bytes that went each way; readable while the copy runs.
#[derive(Debug, Default)]
pub struct Counters {
    /// From the client to the upstream.
    pub sent: AtomicU64,
    /// From the upstream to the client.
    pub received: AtomicU64,
}

/// How a copy ended.
#[derive(Debug)]
pub enum End {
    /// Both sides finished in order; who did so first.
    Done(First),
    /// No byte went either way for the idle time.
    Idle,
    /// The client's side failed.
    Client(io::Error),
    /// The upstream's side failed.
    Upstream(io::Error),
}

/// Who finished first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// The client.
    Client,
    /// The upstream.
    Upstream,
}

/// Copies until both directions have ended. A finished direction is passed on as a half-close, the other goes on.
pub async fn both<A, B>(client: &mut A, upstream: &mut B, counters: &Counters, idle: Option<Duration>) -> End
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut up = Direction::new();
    let mut down = Direction::new();
    let mut watchdog = idle.map(Watchdog::new);
    let mut first = None;
    poll_fn(|cx| {
        let before = up.moved + down.moved;
        let up_done = match up.poll(cx, client, upstream, &counters.sent) {
            // A client that goes without ceremony once the upstream has said everything breaks nothing off.
            Poll::Ready(Err(Failure::Read(_))) if first == Some(First::Upstream) => {
                return Poll::Ready(End::Done(First::Upstream));
            }
            Poll::Ready(Err(failure)) => return Poll::Ready(failure.end(false)),
            other => other.is_ready(),
        };
        let down_done = match down.poll(cx, upstream, client, &counters.received) {
            Poll::Ready(Err(failure)) => return Poll::Ready(failure.end(true)),
            other => other.is_ready(),
        };
        if up_done || down_done {
            let first = *first.get_or_insert(if up_done { First::Client } else { First::Upstream });
            if up_done && down_done {
                return Poll::Ready(End::Done(first));
            }
        }
        let active = up.moved + down.moved != before;
        match &mut watchdog {
            Some(watchdog) => watchdog.poll(cx, active).map(|()| End::Idle),
            None => Poll::Pending,
        }
    })
    .await
}

/// Which end of a direction failed.
enum Failure {
    Read(io::Error),
    Write(io::Error),
}

impl Failure {
    fn end(self, downwards: bool) -> End {
        match (self, downwards) {
            (Self::Read(e), false) | (Self::Write(e), true) => End::Client(e),
            (Self::Read(e), true) | (Self::Write(e), false) => End::Upstream(e),
        }
    }
}

/// Fires when nothing moved for `idle`. Activity only notes the time; the timer is re-armed when it fires, so a busy
/// connection pays no timer operation per read.
struct Watchdog {
    idle: Duration,
    last: Instant,
    timer: Pin<Box<Sleep>>,
}

impl Watchdog {
    fn new(idle: Duration) -> Self {
        let last = Instant::now();
        Self { idle, last, timer: Box::pin(sleep_until(last + idle)) }
    }

    fn poll(&mut self, cx: &mut Context<'_>, active: bool) -> Poll<()> {
        if active {
            self.last = Instant::now();
        }
        loop {
            ready!(self.timer.as_mut().poll(cx));
            let deadline = self.last + self.idle;
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(deadline);
        }
    }
}

/// A TLS peer that closes without close_notify has ended as any TCP peer does: whether opaque bytes are complete is for
/// those to judge who understand them.
fn close_as_end(read: io::Result<()>) -> io::Result<()> {
    match read {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        other => other,
    }
}

/// One way. Lives in the connection's future, so the buffer is on the heap and empty until the first byte.
struct Direction {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    size: usize,
    full_reads: u32,
    moved: u64,
    unflushed: bool,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Copying,
    Closing,
    Closed,
}

impl Direction {
    fn new() -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            end: 0,
            size: 0,
            full_reads: 0,
            moved: 0,
            unflushed: false,
            state: State::Copying,
        }
    }

    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        count: &AtomicU64,
    ) -> Poll<Result<(), Failure>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            match self.state {
                State::Closed => return Poll::Ready(Ok(())),
                State::Closing => {
                    ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(Failure::Write)?;
                    self.state = State::Closed;
                    self.buffer = Vec::new();
                }
                State::Copying => {
                    ready!(self.poll_write(cx, to, count)).map_err(Failure::Write)?;
                    ready!(self.poll_read(cx, from, to))?;
                }
            }
        }
    }

    /// Writes what is buffered.
    fn poll_write<W>(&mut self, cx: &mut Context<'_>, to: &mut W, count: &AtomicU64) -> Poll<io::Result<()>>
    where
        W: AsyncWrite + Unpin,
    {
        while self.start < self.end {
            let n = ready!(Pin::new(&mut *to).poll_write(cx, &self.buffer[self.start..self.end]))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.start += n;
            self.moved += n as u64;
            self.unflushed = true;
            count.fetch_add(n as u64, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once; flushes before waiting, because an encrypted stream may hold written bytes back.
    fn poll_read<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W) -> Poll<Result<(), Failure>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.buffer.len() < SIZES[self.size] {
            self.buffer = vec![0; SIZES[self.size]];
        }
        let mut into = ReadBuf::new(&mut self.buffer);
        match Pin::new(from).poll_read(cx, &mut into) {
            Poll::Pending => {
                if self.unflushed {
                    ready!(Pin::new(to).poll_flush(cx)).map_err(Failure::Write)?;
                    self.unflushed = false;
                }
                return Poll::Pending;
            }
            Poll::Ready(result) => close_as_end(result).map_err(Failure::Read)?,
        }
        self.start = 0;
        self.end = into.filled().len();
        if self.end == 0 {
            self.state = State::Closing;
        }
        self.adapt();
        Poll::Ready(Ok(()))
    }

    fn adapt(&mut self) {
        if self.end < self.buffer.len() {
            self.full_reads = 0;
            return;
        }
        self.full_reads += 1;
        if self.full_reads >= FULL_READS && self.size + 1 < SIZES.len() {
            self.size += 1;
            self.full_reads = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    struct Ends {
        client: DuplexStream,
        app: DuplexStream,
        copy: tokio::task::JoinHandle<(End, u64, u64)>,
    }

    fn start(idle: Option<Duration>) -> Ends {
        let (client, mut a) = duplex(4096);
        let (app, mut b) = duplex(4096);
        let copy = tokio::spawn(async move {
            let counters = Counters::default();
            let end = both(&mut a, &mut b, &counters, idle).await;
            (end, counters.sent.into_inner(), counters.received.into_inner())
        });
        Ends { client, app, copy }
    }

    /// A peer whose bytes end without a goodbye, as TLS calls it.
    struct Cut<'a>(&'a [u8]);

    impl AsyncRead for Cut<'_> {
        fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            if self.0.is_empty() {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            into.put_slice(std::mem::take(&mut self.0));
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Cut<'_> {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(bytes.len()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn closing_tls_without_a_goodbye_is_an_end() {
        let (mut app, mut near) = duplex(64);
        let copy =
            tokio::spawn(async move { both(&mut Cut(b"all of it"), &mut near, &Counters::default(), None).await });
        let mut got = String::new();
        app.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "all of it");
        drop(app);
        assert!(matches!(copy.await.unwrap(), End::Done(First::Client)));
    }

    #[tokio::test]
    async fn a_half_close_is_passed_on_and_the_answer_still_comes() {
        let mut ends = start(None);
        ends.client.write_all(b"question").await.unwrap();
        ends.client.shutdown().await.unwrap();
        let mut asked = String::new();
        ends.app.read_to_string(&mut asked).await.unwrap();
        assert_eq!(asked, "question");
        ends.app.write_all(b"late answer").await.unwrap();
        drop(ends.app);
        let mut answer = String::new();
        ends.client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "late answer");
        let (end, sent, received) = ends.copy.await.unwrap();
        assert!(matches!(end, End::Done(_)));
        assert_eq!((sent, received), (8, 11));
    }

    #[tokio::test]
    async fn bulk_arrives_whole() {
        let ends = start(None);
        let sent: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let expected = sent.clone();
        let (mut client, mut app) = (ends.client, ends.app);
        let write = tokio::spawn(async move {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            client
        });
        let mut got = Vec::new();
        app.read_to_end(&mut got).await.unwrap();
        assert!(got == expected);
        drop(app);
        write.await.unwrap();
        assert!(matches!(ends.copy.await.unwrap().0, End::Done(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn idle_time_counts_from_the_last_byte() {
        let mut ends = start(Some(Duration::from_secs(10)));
        let begin = Instant::now();
        tokio::time::sleep(Duration::from_secs(8)).await;
        ends.client.write_all(b"x").await.unwrap();
        let (end, sent, _) = ends.copy.await.unwrap();
        assert!(matches!(end, End::Idle));
        assert_eq!((sent, begin.elapsed().as_secs()), (1, 18));
    }

    #[tokio::test]
    async fn a_client_breaks_nothing_off_once_the_upstream_is_done() {
        for (upstream_ends, in_order) in [(true, true), (false, false)] {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let (client, accepted) = tokio::join!(tokio::net::TcpStream::connect(address), listener.accept());
            let (mut client, mut near) = (client.unwrap(), accepted.unwrap().0);
            let (mut app, mut far) = duplex(64);
            let copy = tokio::spawn(async move { both(&mut near, &mut far, &Counters::default(), None).await });
            app.write_all(b"bye").await.unwrap();
            let mut said = vec![0; 3];
            client.read_exact(&mut said).await.unwrap();
            if upstream_ends {
                app.shutdown().await.unwrap();
                assert_eq!(client.read(&mut said).await.unwrap(), 0);
            }
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
            drop(client);
            let end = copy.await.unwrap();
            assert!(if in_order { matches!(end, End::Done(First::Upstream)) } else { matches!(end, End::Client(_)) });
        }
    }

    #[tokio::test]
    async fn a_broken_side_is_named() {
        let ends = start(None);
        drop(ends.app);
        let mut client = ends.client;
        client.write_all(b"x").await.unwrap();
        assert!(matches!(ends.copy.await.unwrap().0, End::Upstream(_)));
    }
}
