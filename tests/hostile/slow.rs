//! Peers that take their time.

use std::io::{Read, Write};

use super::support::{LIMIT, wait_for};
use super::world::{OUTBOUND, SERVICE, ask, connect, hostile, until_closed};

hostile! {
    /// Slowloris: a thousand heads that go on byte by byte. That each ends after a minute is asked where time can be turned
    /// (`a_head_that_does_not_end_ends_the_connection`).
    fn slow_heads(world) {
        let mut open: Vec<_> = (0..1_000).map(|at| connect(if at % 2 == 0 { SERVICE } else { OUTBOUND })).collect();
        for byte in b"GET / HTTP/1.1\r\nx: y" {
            for stream in &mut open {
                stream.write_all(&[*byte]).expect("sent");
            }
        }
        world.all_is_well();
        // Who comes to an end after all is served.
        for stream in open.iter_mut().step_by(100) {
            stream.write_all(b"\r\nhost: web.shop\r\nconnection: close\r\n\r\n").expect("sent");
            let answer = until_closed(stream);
            assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        }
    }

    /// A first line of 64 KiB in pieces of a few bytes: looking at it costs what its bytes cost, not their square.
    fn endless_first_lines(world) {
        let mut open: Vec<_> = (0..8).map(|_| connect(SERVICE)).collect();
        for _ in 0..8_000 {
            for stream in &mut open {
                // Beyond the limit it is refused.
                let _ = stream.write_all(b"AAAAAAAA");
            }
        }
        world.all_is_well();
    }

    /// Bodies that trickle, in and out: nothing is held for them but what is on its way.
    fn slow_bodies(world) {
        let mut senders: Vec<_> = (0..200).map(|_| connect(SERVICE)).collect();
        for stream in &mut senders {
            stream.write_all(b"POST / HTTP/1.1\r\nhost: web.shop\r\ncontent-length: 1000000\r\n\r\nx").expect("sent");
        }
        let mut readers: Vec<_> = (0..50).map(|_| connect(SERVICE)).collect();
        for stream in &mut readers {
            stream.write_all(b"GET /large HTTP/1.1\r\nhost: web.shop\r\n\r\n").expect("sent");
            stream.read_exact(&mut [0; 12]).expect("the beginning of an answer");
        }
        world.all_is_well();
    }

    /// Connections to the readiness port that say nothing do not keep the kubelet's probe out.
    fn silence_on_the_readiness_port(world) {
        let _open: Vec<_> = (0..1_000).map(|_| connect("127.0.0.1:15021")).collect();
        let probe = || ask("127.0.0.1:15021", "/healthz/ready").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"));
        for _ in 0..5 {
            wait_for("an answer to the probe", LIMIT, probe).expect("it is let in");
        }
        world.all_is_well();
    }
}
