//! Frames of HTTP/2 clients, counted as their bytes are read and before the codec sees them.
//!
//! The codec answers or drops each control frame by itself and has no opinion on how many there are; a client that sends
//! nothing else makes it work for nothing (CVE-2019-9512, -9513, -9515, -9518 and what came after). Here such frames are
//! counted against what would justify them: requests and their bodies, and bytes that we send, which window updates answer.
//! A client that goes on is cut off. The count also tells whether a header block is unfinished, which is what a limit on
//! slow heads needs. It costs a look at nine bytes of each frame.

use std::time::Duration;

use tokio::time::Instant;

use super::sniff::H2_PREFACE;

/// Frames in [`PERIOD`] that nothing asked for. Peers that measure bandwidth send a ping for each round trip, and only while
/// there are data; what a busy download needs in window updates is covered by what it downloads.
const MOST: u32 = 2_000;
/// See [`MOST`].
const PERIOD: Duration = Duration::from_secs(1);
/// A request justifies so many: its window updates, its reset.
const PER_REQUEST: u32 = 8;
/// A data frame with content justifies so many.
const PER_DATA: u32 = 4;
/// So many bytes sent justify one. More than the answers to pings and settings have.
const BYTES_PER_FRAME: usize = 32;

const HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const CONTINUATION: u8 = 9;

/// The counter of one connection.
#[derive(Debug)]
pub struct Frames {
    /// Bytes left of the preface or of a payload.
    skip: usize,
    header: [u8; HEADER],
    have: usize,
    /// Frames that nothing asked for.
    spent: u32,
    /// When that was last zero by time.
    since: Instant,
    /// A header block has begun and has not ended.
    in_block: bool,
}

/// A client that makes us work for nothing.
#[derive(Debug, PartialEq, Eq)]
pub struct Flood;

impl Frames {
    /// Counts from the preface on.
    pub fn new(now: Instant) -> Self {
        Self { skip: H2_PREFACE.len(), header: [0; HEADER], have: 0, spent: 0, since: now, in_block: false }
    }

    /// Looks at bytes on their way to the codec.
    ///
    /// # Errors
    /// [`Flood`]: the connection should end.
    pub fn feed(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), Flood> {
        loop {
            let skipped = self.skip.min(bytes.len());
            bytes = &bytes[skipped..];
            self.skip -= skipped;
            if bytes.is_empty() {
                return Ok(());
            }
            let taken = (HEADER - self.have).min(bytes.len());
            self.header[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            bytes = &bytes[taken..];
            self.have += taken;
            if self.have == HEADER {
                self.have = 0;
                self.frame(now)?;
            }
        }
    }

    /// Notes what goes to the client.
    pub fn sent(&mut self, bytes: usize) {
        self.justify(u32::try_from(bytes / BYTES_PER_FRAME).unwrap_or(u32::MAX));
    }

    /// Whether a header block has begun and has not ended.
    pub fn is_inside(&self) -> bool {
        self.in_block
    }

    fn justify(&mut self, frames: u32) {
        self.spent = self.spent.saturating_sub(frames);
    }

    fn frame(&mut self, now: Instant) -> Result<(), Flood> {
        let [a, b, c, kind, flags, ..] = self.header;
        let length = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        self.skip = length;
        match kind {
            HEADERS => {
                self.in_block = flags & END_HEADERS == 0;
                self.justify(PER_REQUEST);
                return Ok(());
            }
            DATA if length > 0 || flags & END_STREAM != 0 => {
                self.justify(PER_DATA);
                return Ok(());
            }
            CONTINUATION => self.in_block = flags & END_HEADERS == 0,
            _ => {}
        }
        self.spent += 1;
        if self.spent <= MOST {
            return Ok(());
        }
        if now.duration_since(self.since) < PERIOD {
            return Err(Flood);
        }
        (self.spent, self.since) = (0, now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let length = u32::try_from(payload).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, 1], &vec![7; payload]].concat()
    }

    fn counter() -> Frames {
        let mut frames = Frames::new(Instant::now());
        frames.feed(H2_PREFACE, Instant::now()).unwrap();
        frames
    }

    /// How many of these pass at once.
    fn passing(frames: &mut Frames, bytes: &[u8]) -> usize {
        let now = Instant::now();
        (0..100_000).take_while(|_| frames.feed(bytes, now).is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn floods_of_each_kind_are_cut_off() {
        let most = MOST as usize;
        for (name, kind, flags, payload) in [
            ("ping", 6, 0, 8),
            ("settings", 4, 0, 6),
            ("settings answers", 4, 1, 0),
            ("priority", 2, 0, 5),
            ("window update", 8, 0, 4),
            ("reset", 3, 0, 4),
            ("empty data", 0, 0, 0),
            ("continuation", 9, 0, 0),
            ("unknown", 77, 0, 3),
        ] {
            assert_eq!(passing(&mut counter(), &frame(kind, flags, payload)), most, "{name}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn time_requests_and_bytes_sent_justify_frames() {
        let ping = frame(6, 0, 8);
        let mut frames = counter();
        for _ in 0..5 {
            for _ in 0..MOST {
                frames.feed(&ping, Instant::now()).unwrap();
            }
            tokio::time::advance(PERIOD).await;
        }
        let update = frame(8, 0, 4);
        let mut download = counter();
        let call = [frame(HEADERS, END_STREAM | END_HEADERS, 30), update.clone(), frame(3, 0, 4)].concat();
        assert_eq!(passing(&mut counter(), &call), 100_000);
        for _ in 0..10_000 {
            download.sent(16_384);
            for _ in 0..10 {
                download.feed(&update, Instant::now()).unwrap();
            }
        }
        // What a ping makes us say justifies no other.
        let mut pinged = counter();
        let answered = (0..100_000).take_while(|_| {
            pinged.sent(17);
            pinged.feed(&ping, Instant::now()).is_ok()
        });
        assert_eq!(answered.count(), MOST as usize);
    }

    #[tokio::test(start_paused = true)]
    async fn it_knows_whether_a_header_block_is_unfinished() {
        let mut frames = counter();
        for (kind, flags, inside) in [
            (HEADERS, 0, true),
            (CONTINUATION, 0, true),
            (CONTINUATION, END_HEADERS, false),
            (HEADERS, END_HEADERS, false),
        ] {
            frames.feed(&frame(kind, flags, 10), Instant::now()).unwrap();
            assert_eq!(frames.is_inside(), inside);
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(
            kinds in proptest::collection::vec((0u8..10, 0usize..40), 0..40),
            piece in 1usize..30,
        ) {
            let bytes: Vec<u8> =
                [H2_PREFACE.to_vec()].into_iter().chain(kinds.iter().map(|(kind, n)| frame(*kind, 0, *n))).flatten().collect();
            let now = Instant::now();
            let (mut once, mut pieces) = (Frames::new(now), Frames::new(now));
            once.feed(&bytes, now).unwrap();
            bytes.chunks(piece).for_each(|part| pieces.feed(part, now).unwrap());
            prop_assert_eq!((once.spent, once.skip, once.in_block), (pieces.spent, pieces.skip, pieces.in_block));
        }
    }
}
