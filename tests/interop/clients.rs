//! Programs that ask: curl, and the Go tools.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use super::support::LIMIT;
use super::world::{World, program};

/// Bytes of a large body.
const LARGE: usize = 20 << 20;
/// Requests of a load.
const LOAD: usize = 400;

/// What curl was told.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// HTTP version of the connection.
    pub(crate) version: String,
    /// Lines of heads and trailers.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl World {
    /// `curl` with these arguments.
    pub(crate) fn curl(&self, arguments: &[&str]) -> Answer {
        let (head, body) = (self.dir.path().join("head"), self.dir.path().join("body"));
        let mut command = Command::new("curl");
        command.args(["-sS", "-m", "60", "-w", "%{http_code} %{http_version}", "-D"]).arg(&head).arg("-o").arg(&body);
        let out = command.args(arguments).output().expect("curl (package curl)");
        let told = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(out.status.success(), "curl {arguments:?}: {told} {}", String::from_utf8_lossy(&out.stderr));
        let (status, version) = told.split_once(' ').unwrap_or_default();
        let read = |file| String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
        let answer = Answer {
            status: status.parse().unwrap_or(0),
            version: version.to_owned(),
            head: read(&head).to_ascii_lowercase(),
            body: read(&body),
        };
        // A response without a body leaves the last one's file alone.
        let _ = std::fs::remove_file(&body);
        answer
    }

    /// A large body comes back as it was sent.
    pub(crate) fn echoes(&self, arguments: &[&str]) {
        let (sent, got) = (self.dir.path().join("large"), self.dir.path().join("echo"));
        let bytes: Vec<u8> = (0..LARGE).map(|at| ((at * 31) >> 5) as u8).collect();
        std::fs::write(&sent, &bytes).expect("a file");
        let mut command = Command::new("curl");
        command
            .args(["-sS", "-m", "120", "-H", "expect:", "-o"])
            .arg(&got)
            .arg("--data-binary")
            .arg(format!("@{}", sent.display()));
        let out = command.args(arguments).output().expect("curl");
        assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(std::fs::read(&got).expect("an answer") == bytes, "{arguments:?}: another body came back");
    }

    /// A connection switches to bytes, which come back.
    pub(crate) fn websocket(&self, to: &str, host: &str) {
        let to = if to.contains(':') { to.to_owned() } else { format!("{to}:80") };
        let mut stream = TcpStream::connect(&to).expect("a connection");
        stream.set_read_timeout(Some(LIMIT)).expect("a socket");
        write!(stream, "GET /ws HTTP/1.1\r\nhost: {host}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n")
            .expect("sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream
                .read_exact(&mut byte)
                .unwrap_or_else(|e| panic!("{to}: {e} after {}", String::from_utf8_lossy(&head)));
            head.push(byte[0]);
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{to}: {}", String::from_utf8_lossy(&head));
        // It looks like two requests that nobody should look at.
        let said = b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n\0\x81\xff";
        stream.write_all(said).expect("sent");
        let mut heard = vec![0; said.len()];
        stream.read_exact(&mut heard).expect("an echo");
        assert_eq!(heard, said, "{to}");
    }

    /// One gRPC message; arguments are curl's.
    pub(crate) fn grpc(&self, arguments: &[&str]) -> Answer {
        let message = self.dir.path().join("message");
        std::fs::write(&message, b"\0\0\0\0\x03\x0a\x01x").expect("a file");
        let data = format!("@{}", message.display());
        let kind = ["--http2-prior-knowledge", "-H", "content-type: application/grpc", "-H", "te: trailers"];
        let (host, url) = (arguments[0], arguments[1]);
        self.curl(&[&kind[..], &["--data-binary", &data, "-H", host, url]].concat())
    }

    /// Cases of h2spec that fail against an address.
    pub(crate) fn h2spec(&self, to: &str) -> Vec<String> {
        let (host, port) = to.rsplit_once(':').expect("HOST:PORT");
        let mut command = Command::new(program("h2spec").expect("looked for before"));
        let out = command.args(["-h", host, "-p", port, "-o", "5", "-P", "/heads"]).output().expect("h2spec starts");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains(" tests, "), "{text} {}", String::from_utf8_lossy(&out.stderr));
        let summary = text.lines().rfind(|line| line.contains(" tests, ")).unwrap_or_default();
        eprintln!("h2spec_in_clear_and_through_mtls: {to}: {summary}");
        failures(&text)
    }

    /// Some hundred requests, each answered with 200.
    pub(crate) fn fortio(&self, to: &str, host: &str, h2: bool) {
        let mut command = Command::new(program("fortio").expect("looked for before"));
        let many = LOAD.to_string();
        command.args(["load", "-qps", "0", "-n", &many, "-c", "8", "-quiet", "-H", &format!("Host: {host}")]);
        if h2 {
            command.args(["-h2", "-stdclient"]);
        }
        let out = command.arg(format!("http://{to}/heads")).output().expect("fortio starts");
        let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{text}");
        assert!(text.contains(&format!("Code 200 : {LOAD} (100.0 %)")), "{to}: {text}");
    }

    /// Some hundred gRPC calls, each OK.
    pub(crate) fn ghz(&self, to: &str, host: &str) {
        let proto = self.dir.path().join("echo.proto");
        let said = "syntax = \"proto3\"; package test; message Text { string text = 1; } \
                    service Echo { rpc Say (Text) returns (Text); }";
        std::fs::write(&proto, said).expect("a file");
        let mut command = Command::new(program("ghz").expect("looked for before"));
        let many = LOAD.to_string();
        command.args([
            "--insecure",
            "--call",
            "test.Echo.Say",
            "-d",
            "{\"text\": \"x\"}",
            "-n",
            &many,
            "-c",
            "8",
            "-O",
            "json",
        ]);
        let out = command.arg("--authority").arg(host).arg("--proto").arg(&proto).arg(to).output().expect("ghz starts");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let told: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_eq!(told["statusCodeDistribution"], serde_json::json!({"OK": LOAD}), "{to}: {text}");
    }
}

/// Names of failed cases with what they saw, from h2spec's last section.
fn failures(text: &str) -> Vec<String> {
    let Some((_, list)) = text.split_once("Failures:") else { return Vec::new() };
    let mut section = String::new();
    let mut failed = Vec::new();
    for line in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line.starts_with('×') {
            failed.push(format!("{section}: {line}"));
        } else if line.chars().next().is_some_and(|c| c.is_ascii_digit()) && !line.contains(" tests, ") {
            section = line.to_owned();
        } else if let Some(last) = failed.last_mut() {
            last.push_str(&format!(" | {line}"));
        }
    }
    failed
}
