//! HTTP/1 as it comes: heads and bodies of both directions, read without mercy or repair.

use std::time::Duration;

use tokio::time::Instant;

use super::conn::{Conn, Got};

/// A head with its lines as they came.
#[derive(Debug, Clone, Default)]
pub(super) struct Head {
    /// First line.
    pub(super) line: String,
    /// Names in lower case, values trimmed.
    pub(super) headers: Vec<(String, String)>,
}

impl Head {
    /// The first value of a header.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// Word of the first line.
    pub(super) fn word(&self, at: usize) -> &str {
        self.line.split(' ').nth(at).unwrap_or_default()
    }

    /// Status of a response.
    pub(super) fn status(&self) -> u64 {
        self.word(1).parse().unwrap_or(0)
    }

    /// Reason phrase of a response.
    pub(super) fn reason(&self) -> &str {
        self.line.splitn(3, ' ').nth(2).unwrap_or_default()
    }
}

/// A body with what came after it.
#[derive(Debug, Clone, Default)]
pub(super) struct Body {
    pub(super) bytes: Vec<u8>,
    pub(super) trailers: Vec<(String, String)>,
    /// It was cut before its end.
    pub(super) incomplete: bool,
}

/// A reader with what it has read ahead.
pub(super) struct Reader {
    pub(super) ahead: Vec<u8>,
    /// How the connection ended, once it did.
    pub(super) end: Option<Got>,
    deadline: Instant,
}

impl Reader {
    pub(super) fn new(limit: Duration) -> Self {
        Self { ahead: Vec::new(), end: None, deadline: Instant::now() + limit }
    }

    /// Starts the time limit anew.
    pub(super) fn extend(&mut self, limit: Duration) {
        self.deadline = Instant::now() + limit;
    }

    /// Reads more; `false` at the end of the connection or of the time.
    pub(super) async fn more(&mut self, conn: &mut Conn) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || self.end.is_some() {
            return false;
        }
        match conn.read(&mut self.ahead, left).await {
            Got::Bytes(_) => true,
            Got::Timeout => false,
            end => {
                self.end = Some(end);
                false
            }
        }
    }

    /// The next head; `None` when the connection or the time ended before one.
    pub(super) async fn head(&mut self, conn: &mut Conn) -> Option<Head> {
        loop {
            if let Some(at) = find(&self.ahead, b"\r\n\r\n") {
                let text = latin1(&self.ahead[..at]);
                self.ahead.drain(..at + 4);
                return Some(parse(&text));
            }
            if !self.more(conn).await {
                return None;
            }
        }
    }

    /// The body after a head. `to_end`: without a length it lasts until the connection ends.
    pub(super) async fn body(&mut self, conn: &mut Conn, head: &Head, to_end: bool) -> Body {
        if head.get("transfer-encoding").is_some_and(|v| v.to_ascii_lowercase().contains("chunked")) {
            return self.chunked(conn).await;
        }
        let Some(length) = head.get("content-length").and_then(|v| v.parse::<usize>().ok()) else {
            if to_end {
                while self.more(conn).await {}
                let incomplete = self.end != Some(Got::End);
                return Body { bytes: std::mem::take(&mut self.ahead), incomplete, ..Body::default() };
            }
            return Body::default();
        };
        while self.ahead.len() < length && self.more(conn).await {}
        let there = length.min(self.ahead.len());
        Body { bytes: self.ahead.drain(..there).collect(), incomplete: there < length, ..Body::default() }
    }

    async fn chunked(&mut self, conn: &mut Conn) -> Body {
        let mut body = Body { incomplete: true, ..Body::default() };
        loop {
            let Some(line) = self.line(conn).await else { return body };
            let size = line.split(';').next().unwrap_or_default().trim();
            let Ok(size) = usize::from_str_radix(size, 16) else { return body };
            if size == 0 {
                break;
            }
            while self.ahead.len() < size + 2 && self.more(conn).await {}
            let there = size.min(self.ahead.len());
            body.bytes.extend(self.ahead.drain(..there));
            if there < size || self.ahead.len() < 2 {
                return body;
            }
            self.ahead.drain(..2);
        }
        while let Some(line) = self.line(conn).await {
            if line.is_empty() {
                body.incomplete = false;
                break;
            }
            body.trailers.extend(header(&line));
        }
        body
    }

    async fn line(&mut self, conn: &mut Conn) -> Option<String> {
        loop {
            if let Some(at) = find(&self.ahead, b"\r\n") {
                let line = latin1(&self.ahead[..at]);
                self.ahead.drain(..at + 2);
                return Some(line);
            }
            if !self.more(conn).await {
                return None;
            }
        }
    }
}

fn parse(text: &str) -> Head {
    let mut lines = text.split("\r\n");
    let line = lines.next().unwrap_or_default().to_owned();
    // A line that is no header is shown whole, so that it is not overlooked.
    let line_of = |text: &str| header(text).unwrap_or_else(|| (text.to_ascii_lowercase(), String::new()));
    Head { line, headers: lines.map(line_of).collect() }
}

fn header(line: &str) -> Option<(String, String)> {
    let (name, value) = line.split_once(':')?;
    Some((name.to_ascii_lowercase(), value.trim().to_owned()))
}

/// Each byte as one character.
pub(super) fn latin1(bytes: &[u8]) -> String {
    bytes.iter().map(|b| char::from(*b)).collect()
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}
