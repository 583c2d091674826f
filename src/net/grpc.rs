//! Messages of a gRPC stream, counted as its bytes pass: a flag, a 32-bit length, so many bytes, and again.

/// Bytes in front of each message.
const PREFIX: u8 = 5;

/// Where a stream is, and how many messages have begun in it.
#[derive(Debug, Default, Clone, Copy)]
pub struct Messages {
    count: u64,
    /// Bytes of the prefix that have come.
    prefix: u8,
    /// Length as far as it is known; bytes of the message that are still to come.
    left: u32,
}

impl Messages {
    /// Messages so far; one counts as soon as its length is known.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Looks at the next bytes.
    pub fn note(&mut self, mut bytes: &[u8]) {
        while let Some((first, rest)) = bytes.split_first() {
            if self.prefix < PREFIX {
                if self.prefix > 0 {
                    self.left = self.left << 8 | u32::from(*first);
                }
                self.prefix += 1;
                bytes = rest;
                if self.prefix == PREFIX {
                    self.count += 1;
                }
            } else {
                let taken = bytes.len().min(self.left as usize);
                self.left -= taken as u32;
                bytes = &bytes[taken..];
            }
            if self.prefix == PREFIX && self.left == 0 {
                self.prefix = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_counted_however_they_are_cut() {
        let message = |length: u32| [&[0][..], &length.to_be_bytes(), &vec![7; length as usize]].concat();
        let stream = [message(3), message(0), message(300)].concat();
        for size in 1..=stream.len() {
            let mut messages = Messages::default();
            stream.chunks(size).for_each(|chunk| messages.note(chunk));
            assert_eq!((messages.count(), messages.prefix, messages.left), (3, 0, 0), "cut every {size} bytes");
        }
        let mut part = Messages::default();
        part.note(&stream[..4]);
        assert_eq!(part.count(), 0);
    }
}
