//! curl, as a user calls it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use crate::netns::Space;

/// What a call came to.
#[derive(Debug, Clone, Default)]
pub(super) struct Reply {
    /// curl's exit code: 0, or 52 and 56 for a connection that was closed or reset.
    pub exit: i32,
    /// Status; 0 without a response.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Body without the last line end.
    pub body: String,
}

impl Reply {
    /// `200 payment-vm`, or curl's exit code.
    pub(super) fn summary(&self) -> String {
        match self.status {
            0 => format!("no response (curl exit {})", self.exit),
            status => format!("{status} {:?}", self.body),
        }
    }

    /// A header; empty when absent.
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// One call from a namespace.
///
/// # Errors
/// When curl cannot be started.
pub(super) fn call(from: &Space, url: &str, more: &[&str]) -> Result<Reply> {
    let mut command = from.command("curl");
    command.args(["-sS", "-i", "-m", "8", "--path-as-is"]).args(more).arg(url);
    let out = command.output().context("cannot run curl")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let mut lines = head.lines();
    let status = lines.next().and_then(|l| l.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0);
    let pairs = lines.filter_map(|l| l.split_once(':'));
    let headers = pairs.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
    Ok(Reply { exit: out.status.code().unwrap_or(-1), status, headers, body: body.trim_end().to_owned() })
}

/// Many calls by one curl; how often each answer (`200 payment-vm`) came.
///
/// # Errors
/// When curl cannot be started.
pub(super) fn count(from: &Space, url: &str, calls: u32, more: &[&str]) -> Result<BTreeMap<String, u32>> {
    let mut command = from.command("curl");
    // The body is the application's name and a line end; a refused call has a body of its own without one.
    command.args(["-s", "-m", "60", "-w", " %{http_code}\\n"]).args(more).arg(format!("{url}?n=[1-{calls}]"));
    let out = command.output().context("cannot run curl")?;
    let mut counts = BTreeMap::new();
    let mut name = String::new();
    for line in String::from_utf8_lossy(&out.stdout).lines() {
        let (body, status) = line.rsplit_once(' ').unwrap_or((line, ""));
        if status.len() == 3 && status.bytes().all(|b| b.is_ascii_digit()) {
            let who = if body.is_empty() { name.as_str() } else { body };
            *counts.entry(format!("{status} {who}")).or_insert(0) += 1;
            name.clear();
        } else {
            name = line.to_owned();
        }
    }
    Ok(counts)
}

/// How many answers start with a text.
pub(super) fn starting(counts: &BTreeMap<String, u32>, with: &str) -> u32 {
    counts.iter().filter(|(answer, _)| answer.starts_with(with)).map(|(_, n)| n).sum()
}

/// `1800 x 200 payment-v2-0, 200 x 200 payment-vm`
pub(super) fn shown(counts: &BTreeMap<String, u32>) -> String {
    let parts: Vec<String> = counts.iter().map(|(answer, n)| format!("{n} x {answer}")).collect();
    parts.join(", ")
}
