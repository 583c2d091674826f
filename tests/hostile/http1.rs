//! HTTP/1 framing and smuggling.

use std::io::{Read, Write};

use super::support::{LIMIT, wait_for};
use super::world::{SERVICE, World, ask, connect, hostile, refused, until_closed};

/// The request is refused with this status, the connection closed, and the application has seen nothing of it.
fn is_refused(world: &World, status: &str, request: &[u8]) {
    let seen = world.seen().len();
    let answer = refused(SERVICE, request);
    let shown = String::from_utf8_lossy(request);
    assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{shown:?} was answered {answer:?}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{shown:?} was answered {answer:?}");
    assert_eq!(world.seen().len(), seen, "{shown:?} reached the application");
}

/// A request with this line among its headers.
fn with_line(line: &[u8]) -> Vec<u8> {
    [b"POST / HTTP/1.1\r\nhost: web.shop\r\n", line, b"\r\n\r\n"].concat()
}

hostile! {
    /// CVE-2019-9900: NUL and other control characters in a header. Behind a first sound request, so that the parser gets
    /// them and not the protocol detection.
    fn control_characters_in_headers(world) {
        for byte in (0..0x20_u8).chain([0x7f]).filter(|byte| !matches!(byte, b'\t' | b'\n' | b'\r')) {
            is_refused(world, "400", &with_line(&[&b"x: a"[..], &[byte], b"b"].concat()));
            is_refused(world, "400", &with_line(&[&b"x"[..], &[byte], b"y: b"].concat()));
        }
        is_refused(world, "400", &with_line(b"x: a\rb"));
        is_refused(world, "400", &with_line(b"x\r: b"));
    }

    /// CVE-2026-2835, CVE-2019-18277, hyper's own list: what `Transfer-Encoding` may say, and beside what.
    fn transfer_encoding_forms(world) {
        let chunks = "\r\n\r\n5\r\nhello\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n";
        for (status, line) in [
            ("400", "content-length: 5\r\ntransfer-encoding: chunked"),
            ("400", "transfer-encoding: chunked\r\ncontent-length: 5"),
            ("400", "transfer-encoding: chunked, identity"),
            ("400", "transfer-encoding: identity"),
            ("400", "transfer-encoding: \x0bchunked"),
            ("400", "transfer-encoding : chunked"),
            ("400", " transfer-encoding: chunked"),
            ("400", "x: y\r\n transfer-encoding: chunked"),
            ("400", "transfer-encoding: xchunked"),
            ("400", "transfer-encoding: \"chunked\""),
            ("501", "transfer-encoding: identity, chunked"),
            ("501", "transfer-encoding: chunked\r\ntransfer-encoding: chunked"),
            ("501", "transfer-encoding: chunked, chunked"),
        ] {
            is_refused(world, status, format!("POST / HTTP/1.1\r\nhost: web.shop\r\n{line}{chunks}").as_bytes());
        }
        // On a connection that was taken for HTTP already; before, HTTP/1.0 is bytes for the application's port.
        let old = format!("GET /honest HTTP/1.1\r\nhost: a\r\n\r\nPOST / HTTP/1.0\r\ntransfer-encoding: chunked{chunks}");
        let answer = refused(SERVICE, old.as_bytes());
        assert!(answer.contains("HTTP/1.1 400") || answer.contains("HTTP/1.0 400"), "{answer}");
        assert!(world.seen().is_empty(), "{:?}", world.seen());
    }

    /// CVE-2021-32714, -32715, CVE-2023-40225: numbers that are none.
    fn content_length_forms(world) {
        for value in ["+5", "-5", "5,5", "5, 6", "5 5", "", "0x5", "5a", "18446744073709551616", "99999999999999999999999", "\u{b2}"] {
            is_refused(world, "400", &with_line(format!("content-length: {value}").as_bytes()));
        }
        is_refused(world, "400", &with_line(b"content-length: 5\r\ncontent-length: 6"));
        is_refused(world, "400", &with_line(b"content-length: 0\r\ncontent-length: 0"));
        is_refused(world, "400", &with_line(b"content-length: 0\r\nCONTENT-LENGTH: 0"));
    }

    /// CVE-2021-32714: chunk sizes beyond all numbers, signs, blanks, and what follows a chunk. The request has begun by
    /// then: it may reach the application without its end, and the connection is over.
    fn chunk_forms(world) {
        let hexes = "f".repeat(17);
        for chunks in [
            format!("{hexes}\r\n"), "10000000000000000\r\n".into(), "+5\r\nhello\r\n".into(), "-5\r\nhello\r\n".into(),
            "0x5\r\nhello\r\n".into(), "5\nhello\r\n".into(), "5\r\nhelloXX0\r\n".into(), "5\r\nhello\n0\r\n".into(),
            "\r\nhello".into(), "5;\x00\r\nhello\r\n".into(), format!("5;{}\r\n", "e".repeat(40_000)),
            format!("0\r\n{}\r\n", "t: x\r\n".repeat(5_000)),
        ] {
            let head = "POST / HTTP/1.1\r\nhost: web.shop\r\ntransfer-encoding: chunked\r\n\r\n";
            let answer = refused(SERVICE, format!("{head}{chunks}GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes());
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{chunks:.40?}: {answer}");
            assert!(answer.matches("HTTP/1.1 ").count() <= 1, "{chunks:.40?}: {answer}");
        }
        assert!(!world.seen().iter().any(|head| head.contains("smuggled")), "{:?}", world.seen());
    }

    /// CVE-2023-25725, CVE-2021-40346: names that are empty or too long, lines without end, too many of them.
    fn header_line_forms(world) {
        for line in [": x", " : x", "x", "x y: z", "x\t: z", "=: \r\n: y", "(x): y", "x: y\r\n\tz: a", "\u{e4}: x"] {
            is_refused(world, "400", &with_line(line.as_bytes()));
        }
        let long = "n".repeat(70_000);
        is_refused(world, "431", &with_line(format!("{long}: x").as_bytes()));
        is_refused(world, "431", &with_line(format!("x: {long}").as_bytes()));
        is_refused(world, "431", &with_line("x: y\r\n".repeat(101).trim_end().as_bytes()));
        let path = format!("GET /{long} HTTP/1.1\r\nhost: a\r\n\r\n");
        is_refused(world, "4", path.as_bytes());
        is_refused(world, "400", b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n");
        is_refused(world, "400", b"GET / HTTP/1.1\r\n\r\n");
    }

    /// CVE-2026-2833, CVE-2025-64763: bytes behind a request to switch protocols wait until the upstream has switched;
    /// CVE-2024-23326: nothing but 101 is a switch.
    fn bytes_behind_an_upgrade(world) {
        let smuggled = "GET /smuggled HTTP/1.1\r\nhost: web.shop\r\n\r\n";
        let ask = |path: &str| {
            format!("GET {path} HTTP/1.1\r\nhost: web.shop\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n{smuggled}")
        };
        let answer = refused(SERVICE, ask("/").as_bytes());
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(answer.contains("connection: close"), "{answer}");
        assert!(!world.seen().iter().any(|head| head.contains("smuggled")), "{:?}", world.seen());
        let mut stream = connect(SERVICE);
        stream.write_all(ask("/switch").as_bytes()).expect("sent");
        let mut all = Vec::new();
        while !all.ends_with(smuggled.as_bytes()) {
            let mut buffer = [0; 1024];
            let n = stream.read(&mut buffer).expect("the echo");
            assert!(n > 0, "{}", String::from_utf8_lossy(&all));
            all.extend_from_slice(&buffer[..n]);
        }
        assert!(all.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&all));
        let connect = format!("CONNECT web.shop:80 HTTP/1.1\r\nhost: web.shop\r\n\r\n{smuggled}");
        let answer = refused(SERVICE, connect.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
        assert!(!world.seen().iter().any(|head| head.starts_with("GET /smuggled")), "{:?}", world.seen());
    }

    /// CVE-2025-4366: the body of a request that was answered early is no request.
    fn an_unread_body_is_no_request(world) {
        let body = "GET /smuggled HTTP/1.1\r\nhost: web.shop\r\n\r\n";
        let length = body.len() + 10;
        let mut stream = connect(SERVICE);
        write!(stream, "POST /early HTTP/1.1\r\nhost: web.shop\r\ncontent-length: {length}\r\n\r\n{body}").expect("sent");
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).expect("an answer");
        assert_eq!(&answer, b"HTTP/1.1 200");
        drop(stream);
        // Refused before anybody reads the body.
        let policy = format!("POST /%00 HTTP/1.1\r\nhost: web.shop\r\ncontent-length: {length}\r\n\r\n{body}0123456789");
        let answer = refused(SERVICE, policy.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        assert!(!world.seen().iter().any(|head| head.starts_with("GET /smuggled")), "{:?}", world.seen());
    }

    /// RUSTSEC-2020-0008: bodies of methods that have none by custom.
    fn bodies_of_any_method(world) {
        for method in ["GET", "HEAD", "DELETE", "OPTIONS"] {
            let before = world.seen().len();
            let mut stream = connect(SERVICE);
            write!(stream, "{method} /with HTTP/1.1\r\nhost: web.shop\r\ncontent-length: 5\r\n\r\nGET /").expect("sent");
            write!(stream, "{method} /chunked HTTP/1.1\r\nhost: web.shop\r\ntransfer-encoding: chunked\r\n\r\n").expect("sent");
            write!(stream, "5\r\nGET /\r\n0\r\n\r\nGET /last HTTP/1.1\r\nhost: web.shop\r\nconnection: close\r\n\r\n").expect("sent");
            until_closed(&mut stream);
            let paths: Vec<String> = world.seen()[before..].iter().map(|m| m.split(' ').nth(1).unwrap_or_default().to_owned()).collect();
            assert_eq!(paths, ["/with", "/chunked", "/last"], "{method}");
        }
    }

    /// CVE-2023-45539, CVE-2021-39156: a fragment never takes part in a decision and never goes on.
    fn fragments_are_cut(world) {
        refused(SERVICE, b"GET /open#/../admin HTTP/1.1\r\nhost: web.shop\r\nconnection: close\r\n\r\n");
        assert!(!world.seen().iter().any(|head| head.contains('#') || head.contains("admin")), "{:?}", world.seen());
    }

    /// CVE-2020-12605: heads that are as large as they may be, on many connections, all unfinished.
    fn memory_of_large_heads(world) {
        world.may_grow(160 << 20);
        let large = format!("GET / HTTP/1.1\r\nhost: web.shop\r\nx: {}", "y".repeat(50_000));
        let mut open = Vec::new();
        for _ in 0..500 {
            let mut stream = connect(SERVICE);
            stream.write_all(large.as_bytes()).expect("sent");
            open.push(stream);
        }
        world.all_is_well();
        drop(open);
    }

    /// CVE-2026-48042: JSON so deep that a parser which calls itself runs out of stack; CVE-2023-39325-like floods of the
    /// admin server are the kernel's queue.
    fn deep_json_for_admin(world) {
        let deep = "[".repeat(200_000);
        let mut stream = connect("127.0.0.1:15000");
        let head = format!("POST /explain HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", deep.len());
        stream.write_all((head + &deep).as_bytes()).expect("sent");
        let answer = String::from_utf8_lossy(&until_closed(&mut stream)).into_owned();
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer:.300}");
        world.all_is_well();
    }

    /// Pipelined requests without reading an answer: they wait for their turn, and what waits is bounded.
    fn pipelining_without_reading(world) {
        let mut stream = connect(SERVICE);
        stream.set_nonblocking(true).expect("a socket");
        let many = b"GET /large HTTP/1.1\r\nhost: web.shop\r\n\r\n".repeat(1000);
        let mut sent = 0;
        // Until nothing more is taken for a while.
        let full = wait_for("a full pipe", LIMIT, || match stream.write(&many) {
            Ok(n) => { sent += n; sent > 64 << 20 }
            Err(_) => world.seen().len() == 1,
        });
        full.expect("the first answer begins");
        world.all_is_well();
        assert!(world.seen().len() <= 2, "{} requests were begun", world.seen().len());
        let answer = ask(SERVICE, "/honest").expect("served");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}
