//! Framing of HTTP/1 requests, watched as their bytes are read and before a parser sees them.
//!
//! The HTTP library resolves two things in silence that attackers live on, because two recipients resolve them
//! differently: several `Content-Length` lines, and `Content-Length` beside `Transfer-Encoding` (RFC 9112 §6.3, CVE-2026-2835
//! and its family). By the time we see a request nothing is left of them. So the watcher puts a NUL in place of the colon of
//! the line that is too much: the parser finds no header name there and answers 400 like to any other broken head. It also
//! tells whether a head has begun and is not finished, which is what a limit on slow heads needs.
//!
//! It costs one look at each byte of a head, and nothing for the bytes of a body. It never decides what a message means: a
//! head that it does not understand is one that the parser refuses, and it looks no further.

/// Longest name that matters, `transfer-encoding`.
const LONGEST: usize = 17;

/// Where the next byte belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before a request line; empty lines may come first.
    Start,
    /// In a line of a head that says nothing about framing, or in the rest of one.
    Line,
    /// In the name of a header, so many bytes of which are kept.
    Name(usize),
    /// In the value of `Content-Length`.
    Length,
    /// In a body that has so many bytes left.
    Body(u64),
    /// In the size of a chunk.
    Size,
    /// Behind the size of a chunk.
    Extension,
    /// In a chunk, or the line end behind it.
    Chunk(u64),
    /// At the beginning of a trailer line.
    Trailer,
    /// In a trailer line.
    TrailerLine,
    /// Where nobody looks any more.
    Blind,
}

/// The watcher of one connection.
#[derive(Debug)]
pub struct Heads {
    at: At,
    name: [u8; LONGEST],
    /// The head has a `Content-Length`, a `Transfer-Encoding`.
    has_length: bool,
    has_coding: bool,
    /// Of the body or of the chunk.
    length: u64,
}

impl Default for Heads {
    fn default() -> Self {
        Self { at: At::Start, name: [0; LONGEST], has_length: false, has_coding: false, length: 0 }
    }
}

impl Heads {
    /// Looks at bytes on their way to the parser. In a head that says its length twice it makes a header name invalid.
    pub fn feed(&mut self, bytes: &mut [u8]) {
        let mut from = 0;
        while from < bytes.len() {
            from += self.step(&mut bytes[from..]);
        }
    }

    /// Whether a head has begun and has not ended.
    pub fn is_inside(&self) -> bool {
        matches!(self.at, At::Line | At::Name(_) | At::Length)
    }

    /// Whether the last request has come whole and no other has begun.
    pub fn is_between(&self) -> bool {
        self.at == At::Start
    }

    /// Takes some of the bytes, which are not empty; how many.
    fn step(&mut self, bytes: &mut [u8]) -> usize {
        let first = bytes[0];
        match self.at {
            At::Blind => return bytes.len(),
            At::Start if matches!(first, b'\r' | b'\n') => {}
            At::Start => self.at = At::Line,
            At::Line => return self.skip_line(bytes, At::Name(0)),
            At::Name(have) => bytes[0] = self.in_name(have, first),
            At::Length => self.in_length(first),
            At::Body(left) => return self.skip(bytes, left, At::Body, At::Start),
            At::Size => self.in_size(first),
            At::Extension => return self.skip_line(bytes, self.after_size()),
            At::Chunk(left) => return self.skip(bytes, left, At::Chunk, At::Size),
            At::Trailer => self.in_trailer(first),
            At::TrailerLine => return self.skip_line(bytes, At::Trailer),
        }
        1
    }

    fn skip_line(&mut self, bytes: &[u8], then: At) -> usize {
        let Some(end) = bytes.iter().position(|b| *b == b'\n') else { return bytes.len() };
        self.at = then;
        end + 1
    }

    fn skip(&mut self, bytes: &[u8], left: u64, more: fn(u64) -> At, then: At) -> usize {
        let taken = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let left = left - taken as u64;
        self.at = if left == 0 { then } else { more(left) };
        if left == 0 && then == At::Size {
            self.length = 0;
        }
        taken
    }

    /// The byte that the parser should see.
    fn in_name(&mut self, have: usize, byte: u8) -> u8 {
        match byte {
            b'\n' if have == 0 => self.end_of_head(),
            b'\r' if have == 0 => {}
            // A line without a colon: refused by the parser.
            b'\n' => self.at = At::Blind,
            b':' => return self.after_name(have),
            _ if have == LONGEST || (have == 0 && !matches!(byte, b'c' | b'C' | b't' | b'T')) => self.at = At::Line,
            _ => {
                self.name[have] = byte;
                self.at = At::Name(have + 1);
            }
        }
        byte
    }

    fn after_name(&mut self, have: usize) -> u8 {
        let name = &self.name[..have];
        let (is_length, is_coding) =
            (name.eq_ignore_ascii_case(b"content-length"), name.eq_ignore_ascii_case(b"transfer-encoding"));
        self.at = if is_length { At::Length } else { At::Line };
        if (is_length && (self.has_length || self.has_coding)) || (is_coding && self.has_length) {
            self.at = At::Blind;
            return 0;
        }
        self.has_length |= is_length;
        self.has_coding |= is_coding;
        b':'
    }

    fn in_length(&mut self, byte: u8) {
        match byte {
            b'0'..=b'9' => self.digit(10, byte - b'0'),
            b'\n' => self.at = At::Name(0),
            b' ' | b'\t' | b'\r' => {}
            // No number: refused by the parser.
            _ => self.at = At::Blind,
        }
    }

    fn in_size(&mut self, byte: u8) {
        match byte {
            b'0'..=b'9' => self.digit(16, byte - b'0'),
            b'a'..=b'f' => self.digit(16, byte - b'a' + 10),
            b'A'..=b'F' => self.digit(16, byte - b'A' + 10),
            b'\n' => self.at = self.after_size(),
            _ => self.at = At::Extension,
        }
    }

    fn digit(&mut self, base: u64, digit: u8) {
        match self.length.checked_mul(base).and_then(|n| n.checked_add(digit.into())) {
            Some(length) => self.length = length,
            // More than the parser takes.
            None => self.at = At::Blind,
        }
    }

    fn after_size(&self) -> At {
        // The line end behind a chunk goes with it.
        if self.length == 0 { At::Trailer } else { At::Chunk(self.length.saturating_add(2)) }
    }

    fn in_trailer(&mut self, byte: u8) {
        match byte {
            b'\n' => self.at = At::Start,
            b'\r' => {}
            _ => self.at = At::TrailerLine,
        }
    }

    fn end_of_head(&mut self) {
        self.at = match (self.has_coding, self.length) {
            (true, _) => At::Size,
            (false, 0) => At::Start,
            (false, length) => At::Body(length),
        };
        (self.has_length, self.has_coding, self.length) = (false, false, 0);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the parser gets, fed in pieces.
    fn fed(text: &str, piece: usize) -> (Vec<u8>, Heads) {
        let mut heads = Heads::default();
        let mut bytes = text.as_bytes().to_vec();
        bytes.chunks_mut(piece).for_each(|part| heads.feed(part));
        (bytes, heads)
    }

    fn is_refused(text: &str) -> bool {
        let (bytes, heads) = fed(text, usize::MAX);
        assert_eq!(bytes.contains(&0), heads.at == At::Blind, "{text}");
        bytes.contains(&0)
    }

    #[test]
    fn a_length_is_said_once() {
        for text in [
            "POST / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc",
            "POST / HTTP/1.1\r\nContent-Length: 3\r\nhost: a\r\nCONTENT-LENGTH: 3\r\n\r\nabc",
            "POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n",
            "POST / HTTP/1.1\ncontent-length: 3\ncontent-length: 3\n\nabc",
            // Behind requests with bodies of either kind.
            "\r\nGET / HTTP/1.1\r\n\r\nPUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3;x=1\r\nabc\r\n0\r\na: b\r\n\r\n\
             PUT / HTTP/1.1\r\ncontent-length:\t2 \r\n\r\n\n\nGET / HTTP/1.1\r\ncontent-length: 0\r\ncontent-length: 0\r\n\r\n",
        ] {
            assert!(is_refused(text), "{text}");
            for piece in 1..8 {
                assert_eq!(fed(text, piece).0, fed(text, usize::MAX).0, "{text}");
            }
        }
    }

    #[test]
    fn what_is_sound_is_not_touched() {
        for text in [
            "POST / HTTP/1.1\r\ncontent-length: 3\r\nx-content-length: 3\r\ncontent-lengths: 3\r\n\r\nabc",
            "POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabcPOST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc",
            // A body that looks like a head.
            "POST / HTTP/1.1\r\ncontent-length: 40\r\n\r\na\r\ncontent-length: 3\r\ncontent-length: 3\r\nGET",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n28\r\na\r\ncontent-length: 3\r\ncontent-length: 3\r\nGET\r\n0\r\n\r\n",
            "GET / HTTP/1.1\r\ntransfer-encoding-and-more: x\r\ncontent-length: 0\r\n\r\n",
        ] {
            assert!(!is_refused(text), "{text}");
        }
    }

    #[test]
    fn it_knows_whether_a_head_is_unfinished() {
        for (text, inside) in [
            ("", false),
            ("\r\n", false),
            ("G", true),
            ("GET / HTTP/1.1\r\n", true),
            ("GET / HTTP/1.1\r\na: b\r\n", true),
            ("GET / HTTP/1.1\r\na: b\r\n\r", true),
            ("GET / HTTP/1.1\r\na: b\r\n\r\n", false),
            ("GET / HTTP/1.1\r\ncontent-length: 9\r\n\r\nabc", false),
            ("GET / HTTP/1.1\r\n\r\nG", true),
        ] {
            let (_, heads) = fed(text, usize::MAX);
            assert_eq!(heads.is_inside(), inside, "{text:?}");
            // A body is neither.
            assert_eq!(heads.is_between(), !inside && !text.ends_with("abc"), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            words in proptest::collection::vec(prop_oneof![
                Just("GET / HTTP/1.1\r\n"), Just("content-length: "), Just("3"), Just("\r\n"), Just("\r\n\r\n"), Just("abc"),
                Just("transfer-encoding: chunked"), Just("a\r\n"), Just("0"), Just("x: y"), Just("\n"), Just(":"),
            ], 0..30),
            piece in 1usize..9,
        ) {
            let text = words.concat();
            let ((once, at), (pieces, same)) = (fed(&text, usize::MAX), fed(&text, piece));
            prop_assert_eq!(once, pieces);
            prop_assert_eq!(at.at, same.at);
        }

        #[test]
        fn arbitrary_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            Heads::default().feed(&mut bytes);
        }
    }
}
