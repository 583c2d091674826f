//! HTTP/2 floods and frames that no library would send.

use std::io::{Read, Write};
use std::net::TcpStream;

use bench_harness::frames::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, PING, PREFACE, PRIORITY, RST_STREAM,
    SETTINGS, WINDOW_UPDATE, block, frame, string, take,
};

use super::support::{LIMIT, wait_for};
use super::world::{SERVICE, connect, hostile, until_closed};

const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const ENHANCE_YOUR_CALM: u32 = 11;
/// Much more than any honest client sends of anything, and quickly sent.
const MANY: u32 = 100_000;

/// An attacker's connection after its preface.
struct Peer {
    stream: TcpStream,
    seen: Vec<u8>,
}

/// How the proxy ended a connection.
#[derive(Debug, Default)]
struct End {
    goaway: Option<u32>,
    resets: Vec<(u32, u32)>,
    answered: Vec<u32>,
}

impl Peer {
    fn new() -> Self {
        Self::with_settings(&[])
    }

    fn with_settings(settings: &[(u16, u32)]) -> Self {
        let mut stream = connect(SERVICE);
        let payload: Vec<u8> =
            settings.iter().flat_map(|(id, v)| [&id.to_be_bytes()[..], &v.to_be_bytes()].concat()).collect();
        let mut out = PREFACE.to_vec();
        frame(&mut out, SETTINGS, 0, 0, &payload);
        stream.write_all(&out).expect("a new connection takes that");
        Self { stream, seen: Vec::new() }
    }

    /// Sends what fits until the proxy has had enough; whether all was taken.
    fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).is_ok()
    }

    /// The next frame of a kind.
    fn next(&mut self, kind: u8) -> Frame {
        loop {
            while let Some(frame) = take(&mut self.seen) {
                if frame.kind == kind {
                    return frame;
                }
            }
            let mut buffer = [0; 16 * 1024];
            let n = self.stream.read(&mut buffer).expect("a frame");
            assert!(n > 0, "closed before a frame of type {kind}");
            self.seen.extend_from_slice(&buffer[..n]);
        }
    }

    /// Everything until the connection ends.
    fn end(mut self) -> End {
        let mut bytes = std::mem::take(&mut self.seen);
        bytes.extend(until_closed(&mut self.stream));
        let mut end = End::default();
        while let Some(frame) = take(&mut bytes) {
            match frame.kind {
                GOAWAY => end.goaway = frame.word(4),
                RST_STREAM => end.resets.push((frame.stream, frame.word(0).unwrap_or_default())),
                HEADERS => end.answered.push(frame.stream),
                _ => {}
            }
        }
        end
    }

    /// Whether the connection is alive: it answers a ping.
    fn is_alive(&mut self) -> bool {
        let mut out = Vec::new();
        frame(&mut out, PING, 0, 0, b"still on");
        self.send(&out)
            && loop {
                let answer = self.next(PING);
                if answer.payload == b"still on" {
                    break answer.flags & ACK != 0;
                }
            }
    }
}

fn request(path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let all = [(":method", "GET"), (":scheme", "http"), (":authority", "web.shop"), (":path", path)];
    fields(&[&all, more].concat())
}

fn fields(headers: &[(&str, &str)]) -> Vec<u8> {
    block(headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())))
}

fn one(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    frame(&mut out, kind, flags, stream, payload);
    out
}

/// Sends the same bytes until the proxy ends the connection, which it has to. How many were taken says little: the kernel
/// holds megabytes.
fn is_cut_off(name: &str, mut peer: Peer, bytes: &[u8]) {
    let piece = bytes.repeat(100);
    let taken = (0..MANY / 100).take_while(|_| peer.send(&piece)).count();
    let end = peer.end();
    assert!(end.answered.is_empty(), "{name}: {taken} taken, {end:?}");
}

hostile! {
    /// CVE-2023-44487, CVE-2023-35945: requests that are reset at once.
    fn rapid_reset(world) {
        let mut peer = Peer::new();
        let fields = request("/never", &[]);
        let mut sent = 0;
        for stream in (1..2 * MANY).step_by(2) {
            let mut out = one(HEADERS, END_HEADERS | END_STREAM, stream, &fields);
            frame(&mut out, RST_STREAM, 0, stream, &8_u32.to_be_bytes());
            if !peer.send(&out) {
                break;
            }
            sent += 1;
        }
        let end = peer.end();
        assert!(sent < MANY / 2, "{sent} requests were taken; {:?}", end.goaway);
        assert!(matches!(end.goaway, None | Some(ENHANCE_YOUR_CALM)), "{end:?}");
    }

    /// CVE-2023-44487, the patient way: each request is given time to reach the upstream before it is reset.
    fn rapid_reset_of_requests_under_way(world) {
        let mut peer = Peer::new();
        let fields = request("/never", &[]);
        let mut resets = 0;
        for stream in (1..4001).step_by(2) {
            let before = world.seen().len();
            if !peer.send(&one(HEADERS, END_HEADERS | END_STREAM, stream, &fields)) {
                break;
            }
            // Either it arrives or the connection is over.
            let gone = wait_for("the request", LIMIT, || {
                world.seen().len() > before || peer.stream.peek(&mut []).is_err() || resets > 240
            });
            if gone.is_err() || !peer.send(&one(RST_STREAM, 0, stream, &8_u32.to_be_bytes())) {
                break;
            }
            resets += 1;
        }
        let end = peer.end();
        assert!((250..1000).contains(&resets), "{resets} resets; {end:?}");
    }

    /// CVE-2025-8671 (MadeYouReset): provoked resets are counted like others.
    fn resets_that_we_are_made_to_send(world) {
        let mut peer = Peer::new();
        let fields = request("/never", &[]);
        let mut sent = 0;
        for stream in (1..2 * MANY).step_by(2) {
            let mut out = one(HEADERS, END_HEADERS | END_STREAM, stream, &fields);
            // A window that is larger by nothing is an error of the stream.
            frame(&mut out, WINDOW_UPDATE, 0, stream, &[0; 4]);
            if !peer.send(&out) {
                break;
            }
            sent += 1;
        }
        let end = peer.end();
        assert!(sent < MANY / 2, "{sent} requests were taken; {:?}", end.goaway);
    }

    /// CVE-2019-9512, -9515, -9513, -9518, -9511 and the rest of that summer: frames that ask for nothing.
    fn floods_of_control_frames(world) {
        let open = |peer: &mut Peer| peer.send(&one(HEADERS, END_HEADERS, 1, &request("/never", &[])));
        is_cut_off("ping", Peer::new(), &one(PING, 0, 0, &[7; 8]));
        is_cut_off("settings", Peer::new(), &one(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]));
        is_cut_off("priority", Peer::new(), &one(PRIORITY, 0, 3, &[0, 0, 0, 1, 7]));
        is_cut_off("window updates", Peer::new(), &one(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()));
        is_cut_off("unknown frames", Peer::new(), &one(0x77, 0, 0, &[1]));
        let mut peer = Peer::new();
        open(&mut peer);
        is_cut_off("empty data", peer, &one(DATA, 0, 1, &[]));
        let mut peer = Peer::new();
        open(&mut peer);
        is_cut_off("window updates of a stream", peer, &one(WINDOW_UPDATE, 0, 1, &1_u32.to_be_bytes()));
    }

    /// CVE-2019-9515, CVE-2019-9514: answers that nobody reads are not queued without bound.
    fn answers_that_nobody_reads(world) {
        let mut peer = Peer::new();
        peer.stream.set_nonblocking(true).expect("a socket");
        let pings = one(PING, 0, 0, &[7; 8]).repeat(1000);
        let over = wait_for("the end of patience", LIMIT, || (0..1000).any(|_| {
            matches!(peer.stream.write(&pings), Err(e) if e.kind() != std::io::ErrorKind::WouldBlock)
        }));
        over.expect("the connection is ended");
        world.all_is_well();
    }

    /// CVE-2024-27919, CVE-2024-30255, RUSTSEC-2024-0332: a header block that does not end, with content and without.
    fn continuation_floods(world) {
        for payload in [vec![], fields(&[("x-filler", &"y".repeat(8_000))])] {
            let mut peer = Peer::new();
            peer.send(&one(HEADERS, 0, 1, &request("/", &[])));
            is_cut_off("continuation", peer, &one(CONTINUATION, 0, 1, &payload));
        }
    }

    /// CVE-2026-47774: a kilobyte that unpacks to megabytes; cookies count like everything else.
    fn header_bombs(world) {
        let large = "c".repeat(4_000);
        for name in ["x-filler", "cookie"] {
            let mut fields = request("/bomb", &[]);
            // Into the table once, then a byte for each repetition.
            fields.push(0x40);
            string(&mut fields, name.as_bytes());
            string(&mut fields, large.as_bytes());
            fields.resize(fields.len() + 10_000, 0x80 | 62);
            let mut peer = Peer::new();
            peer.send(&one(HEADERS, END_HEADERS | END_STREAM, 1, &fields));
            // 40 MB would come of it: refused with 431, or with a reset.
            let refused = loop {
                let mut buffer = [0; 16 * 1024];
                let n = peer.stream.read(&mut buffer).expect("an answer");
                peer.seen.extend_from_slice(&buffer[..n]);
                let kinds: Vec<u8> = std::iter::from_fn(|| take(&mut peer.seen)).map(|frame| frame.kind).collect();
                if n == 0 || kinds.iter().any(|kind| matches!(*kind, HEADERS | RST_STREAM | GOAWAY)) {
                    break true;
                }
            };
            assert!(refused);
            world.all_is_well();
        }
        assert!(world.seen().is_empty(), "{:.300?}", world.seen());
    }

    /// CVE-2026-73550, CVE-2019-9516: lists of many small and of empty fields.
    fn long_lists_of_small_fields(world) {
        let empty: Vec<(&str, &str)> = vec![("x", ""); 3_000];
        let mut peer = Peer::new();
        peer.send(&one(HEADERS, END_HEADERS | END_STREAM, 1, &request("/list", &empty)[..16_384.min(request("/list", &empty).len())]));
        drop(peer);
        world.all_is_well();
        assert!(world.seen().is_empty(), "{:.300?}", world.seen());
    }

    /// CVE-2023-27491, CVE-2023-35944: pseudo-headers that would break an HTTP/1 request line, or read differently twice.
    fn pseudo_headers_cannot_inject(world) {
        let base = [(":method", "GET"), (":scheme", "http"), (":authority", "web.shop"), (":path", "/ok")];
        for (name, value) in [
            (":path", "/ HTTP/1.1\r\nx: y"), (":path", "/a b"), (":path", "/a\0"), (":path", "a"), (":path", ""), (":path", "/\t"),
            (":method", "GET / HTTP/1.1\r\nhost: x\r\n\r\nGET"), (":method", "GET "), (":method", ""), (":method", "G\0T"),
            (":authority", "a\r\nx: y"), (":authority", "a b"), (":authority", "a/b"), (":scheme", "http://x/?"), (":scheme", "h ttp"),
            ("x\r\ny", "z"), ("X-Upper", "z"), ("", "z"), ("x", "a\r\nb: c"), ("x", "a\0b"), ("connection", "close"),
            ("transfer-encoding", "chunked"), ("te", "gzip"), (":unknown", "x"), ("content-length", "5"),
        ] {
            let mut all: Vec<(&str, &str)> = base.iter().map(|(n, v)| (*n, if *n == name { value } else { *v })).collect();
            if base.iter().all(|(n, _)| *n != name) {
                all.push((name, value));
            }
            let mut peer = Peer::new();
            peer.send(&one(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&all)));
            let mut buffer = [0; 4096];
            let status_or_reset = loop {
                let n = peer.stream.read(&mut buffer).expect("an answer");
                peer.seen.extend_from_slice(&buffer[..n]);
                let frames: Vec<Frame> = std::iter::from_fn(|| take(&mut peer.seen)).collect();
                if n == 0 || frames.iter().any(|f| matches!(f.kind, HEADERS | RST_STREAM | GOAWAY)) {
                    break frames;
                }
            };
            // No application has seen it, whatever the client was told.
            assert!(world.seen().is_empty(), "{name}: {value:?}: {:?}; {status_or_reset:?}", world.seen());
        }
        // Either sound or refused: `:scheme` in another case is the same scheme.
        let mut peer = Peer::new();
        peer.send(&one(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&[base[0], (":scheme", "HtTp"), base[2], base[3]])));
        let answer = wait_for("an answer", LIMIT, || {
            let mut buffer = [0; 4096];
            let n = peer.stream.read(&mut buffer).unwrap_or(0);
            peer.seen.extend_from_slice(&buffer[..n]);
            n == 0 || std::iter::from_fn(|| take(&mut peer.seen)).any(|f| matches!(f.kind, HEADERS | RST_STREAM | GOAWAY))
        });
        answer.expect("an answer");
        assert!(world.seen().iter().all(|head| head.to_ascii_lowercase().contains("x-forwarded-proto: http\r\n")), "{:?}", world.seen());
    }

    /// Windows: larger by nothing, beyond 2^31, and an initial window that overflows open ones.
    fn window_games(world) {
        let open = one(HEADERS, END_HEADERS, 1, &request("/never", &[]));
        let huge = 0x7fff_ffff_u32.to_be_bytes();
        let initial_window = one(SETTINGS, 0, 0, &[&[0, 4][..], &0x8000_0000_u32.to_be_bytes()].concat());
        for (bytes, codes) in [
            (one(WINDOW_UPDATE, 0, 0, &[0; 4]), [PROTOCOL_ERROR; 2]),
            (one(WINDOW_UPDATE, 0, 0, &huge), [FLOW_CONTROL_ERROR; 2]),
            // The library has one code for all settings that cannot be.
            (initial_window.clone(), [FLOW_CONTROL_ERROR, PROTOCOL_ERROR]),
            ([open.clone(), initial_window].concat(), [FLOW_CONTROL_ERROR, PROTOCOL_ERROR]),
        ] {
            let mut peer = Peer::new();
            peer.send(&bytes);
            let end = peer.end();
            assert!(end.goaway.is_some_and(|code| codes.contains(&code)), "{end:?}");
        }
        // On a stream it is that stream's end only.
        let mut peer = Peer::new();
        peer.send(&[open, one(WINDOW_UPDATE, 0, 1, &huge)].concat());
        assert_eq!(peer.next(RST_STREAM).word(0), Some(FLOW_CONTROL_ERROR));
        assert!(peer.is_alive());
    }

    /// CVE-2019-9517, CVE-2020-12603, -12604: large answers that are asked for and not taken wait at their source.
    fn answers_without_window(world) {
        world.may_grow(192 << 20);
        let mut peer = Peer::with_settings(&[(4, 0)]);
        for stream in (1..400).step_by(2) {
            assert!(peer.send(&one(HEADERS, END_HEADERS | END_STREAM, stream, &request("/large", &[]))));
        }
        wait_for("the requests", LIMIT, || world.seen().len() == 200).expect("all arrive");
        assert!(peer.is_alive());
        world.all_is_well();
        // One byte at a time keeps it small as well.
        for stream in (1..400).step_by(2) {
            assert!(peer.send(&one(WINDOW_UPDATE, 0, stream, &1_u32.to_be_bytes())));
        }
        assert!(peer.is_alive());
        world.all_is_well();
    }

    /// More streams than agreed are refused, not queued.
    fn too_many_streams(world) {
        let mut peer = Peer::new();
        let fields = request("/never", &[]);
        for stream in (1..2 * 1_100).step_by(2) {
            assert!(peer.send(&one(HEADERS, END_HEADERS | END_STREAM, stream, &fields)));
        }
        let refused = peer.next(RST_STREAM);
        assert_eq!(refused.word(0), Some(7), "REFUSED_STREAM");
        assert!(peer.is_alive());
    }

    /// Frames that break the protocol end the connection with a word.
    fn broken_frames(world) {
        for (name, bytes) in [
            ("a frame beyond the agreed size", one(DATA, 0, 1, &[0; 20_000])),
            ("data on no stream", one(DATA, 0, 0, b"x")),
            ("data on an idle stream", one(DATA, 0, 5, b"x")),
            ("a ping that is too short", one(PING, 0, 0, &[1])),
            ("settings of odd length", one(SETTINGS, 0, 0, &[1])),
            ("a reset of an idle stream", one(RST_STREAM, 0, 9, &[0; 4])),
            ("an even stream", one(HEADERS, END_HEADERS, 2, &request("/", &[]))),
            ("a continuation of nothing", one(CONTINUATION, END_HEADERS, 1, &[])),
            ("a header block that is none", one(HEADERS, END_HEADERS, 1, &[0xff; 64])),
            ("padding longer than the frame", one(HEADERS, END_HEADERS | 8, 1, &[200, 1])),
        ] {
            let mut peer = Peer::new();
            peer.send(&bytes);
            // Something after it, so that nothing is waited for.
            frame_after(&mut peer);
            let end = peer.end();
            assert!(end.goaway.is_some_and(|code| code != 0), "{name}: {end:?}");
        }
    }
}

fn frame_after(peer: &mut Peer) {
    // It may have been cut off already.
    let _ = peer.send(&one(PING, 0, 0, &[1; 8]));
}
