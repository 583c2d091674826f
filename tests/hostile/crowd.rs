//! Very many connections.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::support::{LIMIT, wait_for};
use super::world::{SERVICE, connect, hostile, inside_with};

/// What a connection may take of the proxy just after it was served; and when it has been silent. Debug build, allocator
/// and all.
const MOST_BYTES: u64 = 28 << 10;
const SILENT_BYTES: u64 = 12 << 10;

const NAME: &str = "crowd::ten_thousand_idle_connections";

/// A connection that was served once.
fn served() -> TcpStream {
    let mut stream = connect(SERVICE);
    stream.write_all(b"GET /honest HTTP/1.1\r\nhost: web.shop\r\n\r\n").expect("sent");
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\nok") {
        let mut buffer = [0; 1024];
        let n = stream.read(&mut buffer).expect("an answer");
        assert!(n > 0, "{}", String::from_utf8_lossy(&answer));
        answer.extend_from_slice(&buffer[..n]);
    }
    stream
}

hostile! {
    /// 10,000 idle connections, or as many as this system lets a process have.
    fn ten_thousand_idle_connections(world) {
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).expect("up to the hard limit");
        // The proxy keeps some for upstreams and itself, we for the application.
        let files = limit.maximum.unwrap_or(u64::MAX);
        let many = files.saturating_sub(1_000).min(20_000) / 2;
        let many = many.min(10_000);
        if many < 10_000 {
            eprintln!("{NAME}: only {many} connections: a process may have {files} files here");
        }
        world.may_grow(many * MOST_BYTES);
        let open: Vec<TcpStream> = (0..many).map(|_| served()).collect();
        world.all_is_well();
        // Who has been silent for a moment needs no codec; allocators give back when they are asked for something.
        let small = wait_for("memory to be given back", LIMIT, || world.grown() < many * SILENT_BYTES);
        eprintln!("{NAME}: {many} idle connections: {} bytes each", world.grown() / many.max(1));
        small.expect("silent connections are small");
        drop(open);
    }
}

/// CVE-2020-8663: a crowd that needs more file descriptors than there are. The proxy stops accepting, keeps what it needs
/// for upstreams, and goes on when some have left.
#[test]
fn more_connections_than_files() {
    inside_with("crowd::more_connections_than_files", Some(256), |world| {
        let mut crowd: Vec<TcpStream> = Vec::new();
        // The kernel completes connections that nobody has accepted.
        for _ in 0..600 {
            let mut stream = connect(SERVICE);
            stream.set_read_timeout(Some(Duration::from_millis(1))).expect("a socket");
            stream.write_all(b"GET /honest HTTP/1.1\r\nhost: web.shop\r\n\r\n").expect("sent");
            crowd.push(stream);
        }
        world.all_is_well();
        let answered = |crowd: &Vec<TcpStream>| crowd.iter().filter(|s| s.peek(&mut [0]).is_ok_and(|n| n > 0)).count();
        wait_for("some are served", LIMIT, || answered(&crowd) > 100).expect("as many as fit");
        let fit = answered(&crowd);
        assert!(fit < 256, "{fit} of 256 files");
        // Those who were served make room for the others. All of them are found before the first one leaves: whoever takes
        // its place is served while we look.
        let (served, waiting): (Vec<_>, Vec<_>) =
            crowd.into_iter().partition(|stream| stream.peek(&mut [0]).is_ok_and(|n| n > 0));
        drop(served);
        let crowd = waiting;
        wait_for("others are served", LIMIT, || answered(&crowd) > 50).expect("there is room again");
    });
}
