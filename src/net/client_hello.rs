//! Reads SNI and ALPN from the first record of a TLS connection, with the thresholds of Envoy's inspector.
//!
//! Five bytes decide whether this can be TLS at all, whatever they are; then the whole handshake message is awaited.
//! Whether we could speak to that client (cipher suites, versions beyond 1.0) is the handshake's question, not ours.

/// Bytes of a record header: type, version, length.
const RECORD_HEADER: usize = 5;
/// Longest record on the wire: 2^14 plaintext, 256 of expansion and 64 of slack, as BoringSSL bounds it.
const MAX_RECORD: usize = 16_384 + 256 + 64;
/// Longest ClientHello message; longer ones are an error of the handshake.
const MAX_MESSAGE: usize = 16_384;
/// Longest SSLv2-framed hello.
const MAX_V2_RECORD: usize = 4096;
/// Shortest SSLv2-framed hello: type, version and three lengths.
const MIN_V2_RECORD: usize = 9;

const TYPE_HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const TLS_MAJOR: u8 = 3;
const TLS10: u16 = 0x0301;
const TLS13: u16 = 0x0304;
const EXT_SERVER_NAME: u16 = 0;
const EXT_ALPN: u16 = 16;
const EXT_SUPPORTED_VERSIONS: u16 = 43;
const MAX_HOST_NAME: usize = 255;

/// What a ClientHello says about where it wants to go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ClientHello {
    /// Server name, in lower case.
    pub(super) sni: Option<String>,
    /// Offered protocols, in the client's order.
    pub(super) alpn: Vec<String>,
}

/// The answer to "is this TLS?" for a prefix of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TlsVerdict {
    /// Cannot be told before there are so many bytes; perhaps not even then.
    NeedMore(usize),
    /// It is not TLS, or nothing a TLS server could read.
    NotTls,
    /// A complete ClientHello.
    Tls(ClientHello),
}

/// Inspects a prefix. More bytes never change an answer other than `NeedMore`.
pub(super) fn inspect(bytes: &[u8]) -> TlsVerdict {
    if bytes.len() < RECORD_HEADER {
        return TlsVerdict::NeedMore(RECORD_HEADER);
    }
    if bytes[0] & 0x80 != 0 && bytes[2] == CLIENT_HELLO && bytes[3] == TLS_MAJOR {
        return v2_hello(bytes);
    }
    match message(bytes) {
        Progress::NeedMore(wanted) => TlsVerdict::NeedMore(wanted),
        Progress::Bad => TlsVerdict::NotTls,
        Progress::Done(body) => parse(&body).map_or(TlsVerdict::NotTls, TlsVerdict::Tls),
    }
}

enum Progress {
    NeedMore(usize),
    Bad,
    Done(Vec<u8>),
}

/// Puts the handshake message together, which may span records. The copy costs a few hundred bytes, once.
fn message(bytes: &[u8]) -> Progress {
    let mut rest = bytes;
    let mut body = Vec::new();
    loop {
        let Some((header, after)) = rest.split_at_checked(RECORD_HEADER) else {
            return Progress::NeedMore(bytes.len() - rest.len() + RECORD_HEADER);
        };
        let length = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[1] != TLS_MAJOR || length > MAX_RECORD {
            return Progress::Bad;
        }
        let Some((fragment, after)) = after.split_at_checked(length) else {
            return Progress::NeedMore(bytes.len() - after.len() + length);
        };
        if header[0] != TYPE_HANDSHAKE || fragment.is_empty() {
            return Progress::Bad;
        }
        body.extend_from_slice(fragment);
        rest = after;
        if body[0] != CLIENT_HELLO {
            return Progress::Bad;
        }
        let Some(&[_, a, b, c]) = body.first_chunk::<4>() else { continue };
        let wanted = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        if wanted > MAX_MESSAGE {
            return Progress::Bad;
        }
        if body.len() >= wanted + 4 {
            body.truncate(wanted + 4);
            body.drain(..4);
            return Progress::Done(body);
        }
    }
}

/// A hello in SSLv2 framing is awaited like any other; it carries neither SNI nor ALPN.
fn v2_hello(bytes: &[u8]) -> TlsVerdict {
    let length = usize::from(bytes[0] & 0x7f) << 8 | usize::from(bytes[1]);
    if !(MIN_V2_RECORD..=MAX_V2_RECORD).contains(&length) {
        return TlsVerdict::NotTls;
    }
    if bytes.len() < length + 2 {
        return TlsVerdict::NeedMore(length + 2);
    }
    TlsVerdict::Tls(ClientHello::default())
}

fn parse(body: &[u8]) -> Option<ClientHello> {
    let mut hello = Reader(body);
    let legacy_version = hello.u16()?;
    hello.take(32)?;
    let session = hello.vec8()?;
    let suites = hello.vec16()?;
    let compressions = hello.vec8()?;
    let sizes_fit = session.len() <= 32 && suites.len() >= 2 && suites.len().is_multiple_of(2);
    if !sizes_fit || !compressions.contains(&0) {
        return None;
    }
    let mut found = ClientHello::default();
    let mut versions: Option<&[u8]> = None;
    if !hello.0.is_empty() {
        let mut extensions = Reader(hello.vec16()?);
        if !hello.0.is_empty() {
            return None;
        }
        while !extensions.0.is_empty() {
            let kind = extensions.u16()?;
            let value = extensions.vec16()?;
            match kind {
                EXT_SERVER_NAME => found.sni = Some(server_name(value)?),
                EXT_ALPN => found.alpn = protocols(value).unwrap_or_default(),
                EXT_SUPPORTED_VERSIONS => versions = Some(Reader(value).vec8()?),
                _ => {}
            }
        }
    }
    speaks_tls(legacy_version, versions).then_some(found)
}

/// Whether any version from TLS 1.0 on is offered; SSL 3.0 alone is refused like bytes that are no TLS.
fn speaks_tls(legacy: u16, versions: Option<&[u8]>) -> bool {
    let Some(versions) = versions else { return legacy >= TLS10 };
    versions.chunks_exact(2).any(|v| (TLS10..=TLS13).contains(&u16::from_be_bytes([v[0], v[1]])))
}

fn server_name(value: &[u8]) -> Option<String> {
    let mut list = Reader(Reader(value).vec16()?);
    let kind = list.take(1)?;
    let name = list.vec16()?;
    let plausible = kind[0] == 0 && list.0.is_empty() && (1..=MAX_HOST_NAME).contains(&name.len());
    if !plausible || name.contains(&0) {
        return None;
    }
    // It goes into logs that end their lines with a line feed.
    let shown = |c: char| if c.is_control() { '_' } else { c.to_ascii_lowercase() };
    Some(String::from_utf8_lossy(name).chars().map(shown).collect())
}

fn protocols(value: &[u8]) -> Option<Vec<String>> {
    let mut list = Reader(Reader(value).vec16()?);
    let mut names = Vec::new();
    while !list.0.is_empty() {
        names.push(String::from_utf8_lossy(list.vec8()?).into_owned());
    }
    Some(names)
}

/// A cursor over TLS presentation language.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }
    fn vec8(&mut self) -> Option<&'a [u8]> {
        let length = self.take(1)?[0];
        self.take(usize::from(length))
    }
    fn vec16(&mut self) -> Option<&'a [u8]> {
        let length = self.u16()?;
        self.take(usize::from(length))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A minimal ClientHello in one record.
    pub(in crate::net) fn hello(sni: Option<&str>, alpn: &[&str], padding: usize) -> Vec<u8> {
        let mut extensions = Vec::new();
        if let Some(name) = sni {
            let entry = [&[0][..], &vec16(name.as_bytes())].concat();
            extensions.extend(extension(EXT_SERVER_NAME, &vec16(&entry)));
        }
        if !alpn.is_empty() {
            let names: Vec<u8> = alpn.iter().flat_map(|n| [&[n.len() as u8][..], n.as_bytes()].concat()).collect();
            extensions.extend(extension(EXT_ALPN, &vec16(&names)));
        }
        if padding > 0 {
            extensions.extend(extension(21, &vec![0; padding]));
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(0);
        body.extend(vec16(&[0x13, 0x01]));
        body.extend([1, 0]);
        body.extend(vec16(&extensions));
        let mut message = vec![CLIENT_HELLO, 0];
        message.extend((body.len() as u16).to_be_bytes());
        message.extend(body);
        records(&message, 16_384)
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        message.chunks(size).flat_map(|part| [&[TYPE_HANDSHAKE, 3, 1][..], &vec16(part)].concat()).collect()
    }

    fn extension(kind: u16, value: &[u8]) -> Vec<u8> {
        [&kind.to_be_bytes()[..], &vec16(value)].concat()
    }

    fn vec16(value: &[u8]) -> Vec<u8> {
        [&(value.len() as u16).to_be_bytes()[..], value].concat()
    }

    #[test]
    fn reads_name_and_protocols() {
        let bytes = hello(Some("Outbound_.80_._.A.b"), &["istio-http/1.1", "istio"], 0);
        let TlsVerdict::Tls(found) = inspect(&bytes) else { panic!("not TLS") };
        assert_eq!(found.sni.as_deref(), Some("outbound_.80_._.a.b"));
        assert_eq!(found.alpn, ["istio-http/1.1", "istio"]);
    }

    #[test]
    fn a_name_cannot_write_lines_of_a_log() {
        let TlsVerdict::Tls(found) = inspect(&hello(Some("a\r\n[B]\u{85}"), &[], 0)) else { panic!("not TLS") };
        assert_eq!(found.sni.as_deref(), Some("a__[b]_"));
    }

    #[test]
    fn a_hello_may_span_records() {
        let whole = hello(Some("a.b"), &["h2"], 0);
        let split = records(&whole[RECORD_HEADER..], 10);
        assert_eq!(inspect(&split), inspect(&whole));
    }

    #[test]
    fn first_bytes_decide_as_observed() {
        assert_eq!(inspect(b"abcd"), TlsVerdict::NeedMore(5));
        assert_eq!(inspect(b"abcde"), TlsVerdict::NotTls);
        assert_eq!(inspect(b"\r\n\r\n"), TlsVerdict::NeedMore(5));
        assert_eq!(inspect(b"\x17\x03\x03\x00\x05abcde"), TlsVerdict::NotTls);
        assert_eq!(inspect(b"\x16\x03\x01\x00\x05abcde"), TlsVerdict::NotTls);
        assert_eq!(inspect(b"\x80\x2e\x01\x03\x01\x00\x15\x00\x00\x00\x10xxxx"), TlsVerdict::NeedMore(48));
        assert_eq!(inspect(b"\x16\x03\x01\x02\x00\x01"), TlsVerdict::NeedMore(517));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            inspect(&bytes);
        }

        #[test]
        fn mutated_hellos_never_panic(at in 0usize..200, with: u8, cut in 0usize..300) {
            let mut bytes = hello(Some("a.example"), &["h2", "istio"], 60);
            let at = at % bytes.len();
            bytes[at] = with;
            inspect(&bytes[..cut.min(bytes.len())]);
        }

        #[test]
        fn an_answer_is_final(at in 0usize..200, with: u8) {
            let mut bytes = hello(Some("a.example"), &["h2", "istio"], 20);
            let at = at % bytes.len();
            bytes[at] = with;
            let whole = inspect(&bytes);
            for cut in 0..bytes.len() {
                let early = inspect(&bytes[..cut]);
                match early {
                    // Whoever waits for what was asked for misses nothing.
                    TlsVerdict::NeedMore(wanted) => prop_assert!(wanted > cut),
                    answer => prop_assert_eq!(&answer, &whole),
                }
            }
        }

        #[test]
        fn written_hellos_are_read(sni in "[a-z0-9._-]{1,60}", alpn in proptest::collection::vec("[a-z0-9/.-]{1,20}", 0..5)) {
            let names: Vec<&str> = alpn.iter().map(String::as_str).collect();
            let TlsVerdict::Tls(found) = inspect(&hello(Some(&sni), &names, 0)) else { panic!("not TLS") };
            prop_assert_eq!(found.sni, Some(sni));
            prop_assert_eq!(found.alpn, alpn);
        }
    }
}
