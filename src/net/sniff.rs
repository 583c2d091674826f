//! What a client's first bytes say: TLS or not, which HTTP if any. Pure inspectors and one loop that feeds them.
//!
//! The thresholds are Envoy's, because they are visible: text without a line end is held back, binary passes at once.

use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::timeout;

use super::Stream;
use super::client_hello::{self, TlsVerdict};

/// What every HTTP/2 connection starts with.
pub const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A ClientHello beyond this closes the connection.
const MAX_CLIENT_HELLO: usize = 16 * 1024;
/// A first line beyond this is no HTTP that anybody would accept.
const MAX_FIRST_LINE: usize = 64 * 1024;
/// Enough for nearly every ClientHello and request head, so that one read settles most connections.
const FIRST_READ: usize = 2 * 1024;

/// Which inspectors look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Inspectors {
    /// Look for a ClientHello.
    pub tls: bool,
    /// Look for HTTP in plaintext.
    pub http: bool,
}

/// What carries the connection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transport {
    /// No TLS was seen.
    #[default]
    RawBuffer,
    /// A ClientHello was seen.
    Tls,
}

/// What inspection found; the bytes it took are in `prefix` and have to be replayed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sniffed {
    /// TLS or not.
    pub transport: Transport,
    /// Server name of the ClientHello, lower case.
    pub sni: Option<String>,
    /// ALPN names offered by the client, or what the HTTP inspector found (`http/1.0`, `http/1.1`, `h2c`).
    pub alpn: Vec<String>,
    /// Bytes taken from the stream.
    pub prefix: Bytes,
    /// The client has finished sending.
    pub eof: bool,
    /// Time ran out before the inspectors were satisfied.
    pub timed_out: bool,
}

/// HTTP version of a plaintext connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Http {
    /// HTTP/1.0.
    V1_0,
    /// HTTP/1.1.
    V1_1,
    /// HTTP/2 with prior knowledge.
    H2c,
}

impl Http {
    /// The name under which filter chains ask for it.
    pub fn protocol(self) -> &'static str {
        match self {
            Self::V1_0 => "http/1.0",
            Self::V1_1 => "http/1.1",
            Self::H2c => "h2c",
        }
    }
}

/// The answer to "is this HTTP?" for a prefix of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpVerdict {
    /// Cannot be told yet.
    NeedMore,
    /// Other bytes.
    NotHttp,
    /// HTTP of this version.
    Http(Http),
}

/// Inspects a prefix for HTTP. More bytes never change an answer other than `NeedMore`.
pub fn http(bytes: &[u8]) -> HttpVerdict {
    http_from(bytes, 0)
}

/// [`http`] for a prefix whose first `seen` bytes were inspected before and asked for more: they are not looked at again,
/// so that a client that sends its line byte by byte costs no more than its bytes.
fn http_from(bytes: &[u8], seen: usize) -> HttpVerdict {
    let shared = bytes.len().min(H2_PREFACE.len());
    if bytes[..shared] == H2_PREFACE[..shared] {
        let complete = bytes.len() >= H2_PREFACE.len();
        return if complete { HttpVerdict::Http(Http::H2c) } else { HttpVerdict::NeedMore };
    }
    for (at, byte) in bytes.iter().enumerate().skip(seen) {
        match byte {
            b'\r' | b'\n' => return first_line(&bytes[..at]).map_or(HttpVerdict::NotHttp, HttpVerdict::Http),
            b' '..=b'~' if at < MAX_FIRST_LINE => {}
            _ => return HttpVerdict::NotHttp,
        }
    }
    HttpVerdict::NeedMore
}

/// `METHOD target HTTP/1.x`, where blanks may repeat. Which methods there are is the codec's question.
fn first_line(line: &[u8]) -> Option<Http> {
    let mut words = line.split(|b| *b == b' ').filter(|w| !w.is_empty());
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if line.starts_with(b" ") || words.next().is_some() || !is_token(method) || !is_target(method, target) {
        return None;
    }
    match version {
        b"HTTP/1.1" => Some(Http::V1_1),
        b"HTTP/1.0" => Some(Http::V1_0),
        _ => None,
    }
}

fn is_token(word: &[u8]) -> bool {
    word.iter().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(b))
}

fn is_target(method: &[u8], target: &[u8]) -> bool {
    if target[0] == b'/' || target[0] == b'*' || method == b"CONNECT" {
        return true;
    }
    let scheme = target.iter().take_while(|b| b.is_ascii_alphabetic()).count();
    scheme > 0 && target[scheme..].starts_with(b"://")
}

/// Which codec a decrypted or declared HTTP connection speaks, from its first bytes alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// HTTP/1.x, or bytes that its parser will refuse.
    Http1,
    /// HTTP/2.
    Http2,
}

/// `None` while the bytes are a proper prefix of the HTTP/2 preface.
pub fn codec(bytes: &[u8]) -> Option<Codec> {
    let shared = bytes.len().min(H2_PREFACE.len());
    if bytes[..shared] != H2_PREFACE[..shared] {
        return Some(Codec::Http1);
    }
    (shared == H2_PREFACE.len()).then_some(Codec::Http2)
}

/// Reads until the codec is clear and gives the stream back with those bytes in front. A client that leaves before is
/// an HTTP/1 connection that ends at once. `rest`: how long the other bytes of the preface may take after the first. Set a
/// limit around it: a silent client is waited for.
pub async fn read_codec(mut stream: Stream, rest: Duration) -> io::Result<(Codec, Stream)> {
    let mut buffer = BytesMut::new();
    let mut codec_of = read_some(&mut stream, &mut buffer).await.map(|read| first_codec(read, &buffer))?;
    if codec_of.is_none() {
        let more = async {
            while codec_of.is_none() {
                let read = read_some(&mut stream, &mut buffer).await?;
                codec_of = first_codec(read, &buffer);
            }
            Ok::<_, io::Error>(())
        };
        timeout(rest, more).await??;
    }
    Ok((codec_of.unwrap_or(Codec::Http1), stream.replay(buffer.freeze())))
}

/// Reads what has come, at most [`FIRST_READ`] bytes; 0 is the end. Memory is taken only then, and no more than it needs: a
/// crowd that connects and says nothing costs none. The price is a copy of the first bytes.
async fn read_some(stream: &mut Stream, buffer: &mut BytesMut) -> io::Result<usize> {
    poll_fn(|cx| {
        let mut bytes = [MaybeUninit::uninit(); FIRST_READ];
        let mut read = ReadBuf::uninit(&mut bytes);
        ready!(Pin::new(&mut *stream).poll_read(cx, &mut read))?;
        buffer.extend_from_slice(read.filled());
        Poll::Ready(Ok(read.filled().len()))
    })
    .await
}

/// `read`: bytes of the last read.
fn first_codec(read: usize, bytes: &[u8]) -> Option<Codec> {
    if read == 0 { Some(Codec::Http1) } else { codec(bytes) }
}

/// Inspection of one connection. It keeps what it has read, so [`Sniffer::run`] may be dropped and called again.
#[derive(Debug)]
pub struct Sniffer {
    inspectors: Inspectors,
    buffer: BytesMut,
    found: Sniffed,
    done: bool,
    /// Bytes that the HTTP inspector has looked at.
    seen_http: usize,
    /// The TLS inspector has nothing to say before there are so many.
    wanted: usize,
}

impl Sniffer {
    /// Starts an inspection; with no inspector enabled it is over at once.
    pub fn new(inspectors: Inspectors) -> Self {
        let done = !inspectors.tls && !inspectors.http;
        Self { inspectors, buffer: BytesMut::new(), found: Sniffed::default(), done, seen_http: 0, wanted: 0 }
    }

    /// Bytes that the client has sent so far.
    pub fn seen(&self) -> usize {
        self.buffer.len()
    }

    /// Whether the inspectors know enough.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Reads until the inspectors know enough or the client stops sending. Cancel safe. `InvalidData` means a
    /// ClientHello beyond all bounds: the connection has to be closed.
    pub async fn run(&mut self, stream: &mut Stream) -> io::Result<()> {
        while !self.done {
            self.read(stream).await?;
        }
        Ok(())
    }

    /// Reads once and looks. Cancel safe; errors as [`Sniffer::run`].
    pub async fn read(&mut self, stream: &mut Stream) -> io::Result<()> {
        self.found.eof = read_some(stream, &mut self.buffer).await? == 0;
        self.done = self.found.eof || self.inspect()?;
        Ok(())
    }

    /// What is known, complete or not.
    pub fn finish(mut self) -> Sniffed {
        self.found.timed_out = !self.done;
        self.found.prefix = self.buffer.freeze();
        self.found
    }

    fn inspect(&mut self) -> io::Result<bool> {
        if self.inspectors.tls {
            if self.buffer.len() < self.wanted {
                return Ok(false);
            }
            match client_hello::inspect(&self.buffer) {
                TlsVerdict::NeedMore(_) if self.buffer.len() >= MAX_CLIENT_HELLO => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "ClientHello too large"));
                }
                TlsVerdict::NeedMore(wanted) => {
                    self.wanted = wanted.min(MAX_CLIENT_HELLO);
                    return Ok(false);
                }
                TlsVerdict::Tls(hello) => {
                    self.found.transport = Transport::Tls;
                    self.found.sni = hello.sni;
                    self.found.alpn = hello.alpn;
                    return Ok(true);
                }
                TlsVerdict::NotTls => self.inspectors.tls = false,
            }
        }
        if !self.inspectors.http {
            return Ok(true);
        }
        match http_from(&self.buffer, self.seen_http) {
            HttpVerdict::NeedMore => {
                // The preface has line ends; what breaks it off has to be looked at from the start.
                let in_preface = H2_PREFACE.starts_with(&self.buffer);
                self.seen_http = if in_preface { 0 } else { self.buffer.len() };
                Ok(false)
            }
            HttpVerdict::NotHttp => Ok(true),
            HttpVerdict::Http(version) => {
                self.found.alpn.push(version.protocol().to_owned());
                Ok(true)
            }
        }
    }
}

/// Inspects with an optional limit; a limit that passes is told in [`Sniffed::timed_out`], not as an error.
pub async fn sniff(stream: &mut Stream, inspectors: Inspectors, limit: Option<Duration>) -> io::Result<Sniffed> {
    let mut sniffer = Sniffer::new(inspectors);
    match limit {
        None => sniffer.run(stream).await?,
        Some(limit) => timeout(limit, sniffer.run(stream)).await.unwrap_or(Ok(()))?,
    }
    Ok(sniffer.finish())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::client_hello::tests::hello;
    use super::*;

    const BOTH: Inspectors = Inspectors { tls: true, http: true };

    async fn sniff_bytes(bytes: &[u8], finish: bool) -> io::Result<Sniffed> {
        let (mut far, near) = tokio::io::duplex(1 << 20);
        far.write_all(bytes).await.unwrap();
        if finish {
            far.shutdown().await.unwrap();
        }
        sniff(&mut Stream::from(near), BOTH, Some(Duration::from_secs(1))).await
    }

    #[test]
    fn first_lines_as_observed() {
        use HttpVerdict::{NeedMore, NotHttp};
        let v1 = HttpVerdict::Http(Http::V1_1);
        for (bytes, expected) in [
            (&b"GET / HTTP/1.1\r\n"[..], v1),
            (b"GET / HTTP/1.1\r", v1),
            (b"GET / HTTP/1.1\n", v1),
            (b"GET  / HTTP/1.1\r\n", v1),
            (b"get /x HTTP/1.1\r\n", v1),
            (b"MYVERYLONGMETHODNAME / HTTP/1.1\r\n", v1),
            (b"GET http://plain/a HTTP/1.1\r\n", v1),
            (b"OPTIONS * HTTP/1.1\r\n", v1),
            (b"CONNECT plain:80 HTTP/1.1\r\n", v1),
            (b"GET / HTTP/1.0\r\n", HttpVerdict::Http(Http::V1_0)),
            (H2_PREFACE, HttpVerdict::Http(Http::H2c)),
            (b"PRI * HTTP/2.0\r\n\r\n", NeedMore),
            (b"GET /x HTTP/0.9\r\n", NotHttp),
            (b"GET /x HTTP/1.2\r\n", NotHttp),
            (b"GET /x HTTP/2.0\r\n", NotHttp),
            (b"GET / http/1.1\r\n", NotHttp),
            (b"GET / FTP/1.1\r\n", NotHttp),
            (b"GET /x\r\n", NotHttp),
            (b"GET a/b HTTP/1.1\r\n", NotHttp),
            (b"GET /a?b c HTTP/1.1\r\n", NotHttp),
            (b"\r\nGET / HTTP/1.1\r\n", NotHttp),
            (b"GET /\xc3\xa4 HTTP/1.1\r\n", NotHttp),
            (b"GE\x01T / HTTP/1.1\r\n", NotHttp),
            (b"hello\n", NotHttp),
            (b"PING\r\n", NotHttp),
            (b"*1\r\n$4\r\nPING\r\n", NotHttp),
            (b"\0\0\0\x08\x04\xd2\x16/", NotHttp),
            (b":\0\0\0", NotHttp),
            (b"hello world", NeedMore),
            (b"HELLO ", NeedMore),
            (b"", NeedMore),
        ] {
            assert_eq!(http(bytes), expected, "{:?}", String::from_utf8_lossy(bytes));
        }
        assert_eq!(http(&[b'A'; 9000]), NeedMore);
    }

    #[test]
    fn bytes_that_were_inspected_are_not_looked_at_again() {
        assert_eq!(http_from(b"\0\0\0 / HTTP", 3), HttpVerdict::NeedMore);
        assert_eq!(http_from(b"\0\0\0 / HTTP", 2), HttpVerdict::NotHttp);
        let mut sniffer = Sniffer::new(BOTH);
        let hello = hello(Some("a.b"), &[], 900);
        for byte in &hello[..hello.len() - 1] {
            sniffer.buffer.extend_from_slice(&[*byte]);
            assert!(!sniffer.inspect().unwrap());
        }
        assert_eq!(sniffer.wanted, hello.len());
    }

    #[tokio::test(start_paused = true)]
    async fn text_is_held_and_binary_passes() {
        assert!(sniff_bytes(b"hello world", false).await.unwrap().timed_out);
        assert!(sniff_bytes(b"abcd", false).await.unwrap().timed_out);
        let raw = sniff_bytes(b"\0\0\0\0\0", false).await.unwrap();
        assert!(!raw.timed_out);
        assert_eq!(raw.prefix, &b"\0\0\0\0\0"[..]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_costs_no_buffer() {
        let (mut far, near) = tokio::io::duplex(64);
        let mut near = Stream::from(near);
        let mut sniffer = Sniffer::new(BOTH);
        timeout(Duration::from_secs(1), sniffer.run(&mut near)).await.unwrap_err();
        assert_eq!(sniffer.buffer.capacity(), 0);
        far.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        sniffer.run(&mut near).await.unwrap();
        assert!(sniffer.buffer.capacity() < FIRST_READ, "{}", sniffer.buffer.capacity());
    }

    #[tokio::test]
    async fn fin_with_the_first_bytes_is_still_served() {
        let seen = sniff_bytes(b"hello", true).await.unwrap();
        assert!(seen.eof && !seen.timed_out);
        assert_eq!(seen.prefix, &b"hello"[..]);
    }

    #[tokio::test]
    async fn a_hello_just_below_the_limit_works_and_above_closes() {
        let seen = sniff_bytes(&hello(Some("a"), &["istio"], 16_200), false).await.unwrap();
        assert_eq!((seen.transport, seen.sni.as_deref()), (Transport::Tls, Some("a")));
        assert_eq!(seen.alpn, ["istio"]);
        let error = sniff_bytes(&hello(None, &[], 16_384), false).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn the_codec_is_read_from_the_bytes() {
        for (bytes, expected) in
            [(H2_PREFACE, Codec::Http2), (b"GET / HTTP/1.1\r\n", Codec::Http1), (b"PRI", Codec::Http1)]
        {
            let (mut far, near) = tokio::io::duplex(64);
            far.write_all(bytes).await.unwrap();
            drop(far);
            let (codec, mut stream) = read_codec(Stream::from(near), Duration::from_secs(1)).await.unwrap();
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.unwrap();
            assert_eq!((codec, &all[..]), (expected, bytes));
        }
    }

    proptest! {
        #[test]
        fn http_never_panics_and_is_final(bytes in "(GET|PRI \\*|x)?[ -~\\r\\n\\x00]{0,40}( HTTP/1.[01])?\r?\n?") {
            let bytes = bytes.as_bytes();
            let whole = http(bytes);
            for cut in 0..bytes.len() {
                let early = http(&bytes[..cut]);
                prop_assert!(early == HttpVerdict::NeedMore || early == whole);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            http(&bytes);
            codec(&bytes);
        }

        #[test]
        fn written_in_pieces_it_finds_the_same(
            bytes in prop_oneof![
                Just(hello(Some("a.b"), &["istio", "h2"], 300)),
                Just(b"GET /x HTTP/1.1\r\nhost: a\r\n\r\n".to_vec()),
                Just(H2_PREFACE.to_vec()),
                Just(b"PRI * HTTP/2.0\r\nhost: a".to_vec()),
                Just(b"PRI / HTTP/1.1\r\n".to_vec()),
                proptest::collection::vec(any::<u8>(), 1..40),
            ],
            piece in 1usize..30,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let (at_once, in_pieces) = runtime.block_on(async {
                let mut results = Vec::new();
                for size in [bytes.len(), piece] {
                    let (mut far, near) = tokio::io::duplex(size);
                    let mut near = Stream::from(near);
                    let write = async {
                        // The reader may be content before everything is written.
                        let _ = far.write_all(&bytes).await;
                        let _ = far.shutdown().await;
                        far
                    };
                    let read = async {
                        let mut sniffer = Sniffer::new(BOTH);
                        sniffer.run(&mut near).await.unwrap();
                        drop(near);
                        sniffer.finish()
                    };
                    let (_far, seen) = tokio::join!(write, read);
                    assert!(bytes.starts_with(&seen.prefix));
                    results.push((seen.transport, seen.sni, seen.alpn));
                }
                (results.remove(0), results.remove(0))
            });
            prop_assert_eq!(at_once, in_pieces);
        }
    }
}
