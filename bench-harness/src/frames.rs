//! HTTP/2 frames written and read by hand: what no library would send.

/// What every connection starts with.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Frame types.
pub const DATA: u8 = 0;
/// Opens a stream.
pub const HEADERS: u8 = 1;
/// Says what depends on what.
pub const PRIORITY: u8 = 2;
/// Ends a stream at once.
pub const RST_STREAM: u8 = 3;
/// Settings of the connection.
pub const SETTINGS: u8 = 4;
/// Asks for an answer.
pub const PING: u8 = 6;
/// Ends a connection.
pub const GOAWAY: u8 = 7;
/// Gives credit.
pub const WINDOW_UPDATE: u8 = 8;
/// The rest of a header block.
pub const CONTINUATION: u8 = 9;
/// Flag of `DATA` and `HEADERS`: the last of its stream.
pub const END_STREAM: u8 = 1;
/// Flag of `SETTINGS` and `PING`: an answer.
pub const ACK: u8 = 1;
/// Flag of `HEADERS` and `CONTINUATION`: the end of the block.
pub const END_HEADERS: u8 = 4;

const HEAD: usize = 9;

/// A frame that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Type.
    pub kind: u8,
    /// Flags.
    pub flags: u8,
    /// Stream; 0 is the connection.
    pub stream: u32,
    /// Content.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Four bytes of the payload as a number.
    pub fn word(&self, at: usize) -> Option<u32> {
        self.payload.get(at..at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }
}

/// Appends a frame.
pub fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or_default().to_be_bytes();
    out.extend_from_slice(&length[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Takes the first frame off, if it is there whole.
pub fn take(seen: &mut Vec<u8>) -> Option<Frame> {
    let head = seen.get(..HEAD)?;
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let (kind, flags) = (head[3], head[4]);
    let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
    if seen.len() < HEAD + length {
        return None;
    }
    let payload = seen.drain(..HEAD + length).skip(HEAD).collect();
    Some(Frame { kind, flags, stream, payload })
}

/// Headers as literals that nobody indexes, without compression.
pub fn block<'a>(headers: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, value) in headers {
        out.push(0);
        string(&mut out, name);
        string(&mut out, value);
    }
    out
}

/// A string without compression.
pub fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    const PREFIX: usize = 127;
    if bytes.len() < PREFIX {
        out.push(u8::try_from(bytes.len()).unwrap_or_default());
    } else {
        out.push(127);
        let mut rest = bytes.len() - PREFIX;
        while rest >= 128 {
            out.push(u8::try_from(rest % 128).unwrap_or_default() | 128);
            rest /= 128;
        }
        out.push(u8::try_from(rest).unwrap_or_default());
    }
    out.extend_from_slice(bytes);
}
