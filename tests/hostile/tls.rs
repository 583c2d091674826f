//! TLS that is cut, oversized, out of order, or somebody else's protocol.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::Arc;

use super::world::{OUTBOUND, SERVICE, connect, hostile, refused, until_closed};

/// A ClientHello as a library says it.
fn hello() -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    // What a peer of the mesh says; other TLS is the application's.
    config.alpn_protocols = vec![b"istio-http/1.1".to_vec(), b"istio".to_vec()];
    let name = "outbound_.8080_._.web.shop.svc.cluster.local".try_into().expect("a name");
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).expect("memory");
    bytes
}

hostile! {
    /// Truncated TLS: every prefix of a hello, then the end.
    fn truncated_hellos(world) {
        let hello = hello();
        let mut cuts: Vec<usize> = (1..12).collect();
        cuts.extend((12..hello.len()).step_by(17));
        for cut in cuts {
            let mut stream = connect(SERVICE);
            stream.write_all(&hello[..cut]).expect("sent");
            stream.shutdown(Shutdown::Write).expect("open");
            until_closed(&mut stream);
        }
        assert!(world.seen().is_empty(), "{:?}", world.seen());
    }

    /// Oversized and malformed TLS: lengths that lie, records of the wrong kind, hellos beyond all bounds.
    fn hellos_that_lie(world) {
        let hello = hello();
        let mut forms: Vec<Vec<u8>> = Vec::new();
        for (at, value) in [(3, 0xff), (4, 0xff), (6, 0xff), (7, 0xff), (8, 0x01), (9, 0x09), (0, 0x17), (5, 0x02), (43, 0xff)] {
            let mut form = hello.clone();
            form[at] = value;
            forms.push(form);
        }
        // A hello in one-byte records, and one that never ends.
        forms.push(hello[5..].iter().flat_map(|byte| [22, 3, 1, 0, 1, *byte]).collect());
        forms.push([&[22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff][..], &[0; 40_000]].concat());
        // The handshake begins and goes on with nonsense.
        forms.push([&hello[..], &[20, 3, 3, 0, 1, 1, 23, 3, 3, 0x40, 0][..], &[9; 16_384]].concat());
        forms.push([&hello[..], b"GET / HTTP/1.1\r\n\r\n"].concat());
        // SSLv2 and alerts.
        forms.push(b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx".to_vec());
        forms.push(b"\x15\x03\x03\x00\x02\x02\x28".to_vec());
        for form in forms {
            let mut stream = connect(SERVICE);
            // It may be refused before everything was sent.
            let _ = stream.write_all(&form);
            let _ = stream.shutdown(Shutdown::Write);
            until_closed(&mut stream);
        }
        assert!(world.seen().iter().all(|head| !head.starts_with("GET / ")), "{:?}", world.seen());
    }

    /// Many handshakes that stop half-way: memory for each is small, and others are served.
    fn unfinished_handshakes(world) {
        let hello = hello();
        let mut open = Vec::new();
        for at in 0..1_000 {
            let mut stream = connect(SERVICE);
            let cut = if at % 2 == 0 { hello.len() } else { hello.len() / 2 };
            stream.write_all(&hello[..cut]).expect("sent");
            open.push(stream);
        }
        // The whole ones are answered, which means that the proxy has taken them up.
        for stream in open.iter_mut().step_by(100) {
            stream.read_exact(&mut [0; 5]).expect("a ServerHello");
        }
        world.all_is_well();
    }

    /// Peers of another trust domain, and none at all, get no further than the handshake (ISTIO-SECURITY checks of peers).
    fn somebody_elses_protocol(world) {
        for bytes in [&b"SSH-2.0-OpenSSH_9.2\r\n"[..], b"\x00\x00\x00\x85\xffSMB", b"EHLO a\r\n", b"\x16\x03", b"*1\r\n$4\r\nPING\r\n"] {
            let mut stream = connect(SERVICE);
            stream.write_all(bytes).expect("sent");
            stream.shutdown(Shutdown::Write).expect("open");
            until_closed(&mut stream);
        }
        let answer = refused(SERVICE, b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n");
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 400"), "{answer}");
    }

    /// The honest way, so that refusals above mean something: the same port takes mTLS from our own outbound side.
    fn sound_tls_is_served(world) {
        let answer = refused(OUTBOUND, b"GET /tls HTTP/1.1\r\nhost: web.shop\r\nconnection: close\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let seen = world.seen();
        assert!(seen.iter().any(|head| head.contains("URI=spiffe://cluster.local/ns/shop/sa/web")), "{seen:?}");
    }
}
