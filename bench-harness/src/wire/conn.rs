//! One connection, clear or TLS, and how it ended.

use std::future::Future as _;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use openssl::ssl::{
    NameType, Ssl, SslAcceptor, SslConnector, SslContextBuilder, SslFiletype, SslMethod, SslVerifyMode, SslVersion,
};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Sleep;
use tokio_openssl::SslStream;

/// A connection.
pub(super) enum Conn {
    Plain(TcpStream),
    Tls(Box<SslStream<Paced>>),
}

/// What a read brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Got {
    Bytes(usize),
    /// FIN or close_notify.
    End,
    Reset,
    Alert(String),
    Timeout,
}

impl Conn {
    /// Opens a connection from an address of this machine.
    ///
    /// # Errors
    /// When it is refused.
    pub(super) async fn open(to: SocketAddr, from: Option<IpAddr>) -> io::Result<TcpStream> {
        let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(from) = from {
            socket.set_reuseaddr(true)?;
            socket.bind(SocketAddr::new(from, 0))?;
        }
        let stream = socket.connect(to).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn tcp(&self) -> &TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => &tls.get_ref().tcp,
        }
    }

    /// Reads once.
    pub(super) async fn read(&mut self, into: &mut Vec<u8>, limit: Duration) -> Got {
        into.reserve(16 * 1024);
        let read = async {
            match self {
                Self::Plain(tcp) => tcp.read_buf(into).await,
                Self::Tls(tls) => tls.read_buf(into).await,
            }
        };
        match tokio::time::timeout(limit, read).await {
            Err(_) => Got::Timeout,
            Ok(Ok(0)) => Got::End,
            Ok(Ok(count)) => Got::Bytes(count),
            Ok(Err(error)) => ended(&error),
        }
    }

    /// Writes everything.
    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Plain(tcp) => tcp.write_all(bytes).await,
            Self::Tls(tls) => {
                tls.write_all(bytes).await?;
                tls.flush().await
            }
        }
    }

    /// Says that nothing more will be sent.
    pub(super) async fn shutdown_write(&mut self) {
        // The other end may be gone already, which is what the recordings then show.
        match self {
            Self::Plain(tcp) => tcp.shutdown().await.ok(),
            Self::Tls(tls) => {
                tls.shutdown().await.ok();
                tls.get_mut().tcp.shutdown().await.ok()
            }
        };
    }

    /// Closes with RST.
    pub(super) fn abort(self) {
        socket2::SockRef::from(self.tcp()).set_linger(Some(Duration::ZERO)).ok();
    }
}

impl AsyncRead for Conn {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, buf),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_write(cx, buf),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(&mut **tls).poll_shutdown(cx),
        }
    }
}

/// How an error of a read ends a connection.
pub(super) fn ended(error: &io::Error) -> Got {
    if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) {
        return Got::Reset;
    }
    let text = error.to_string();
    match text.find("alert ") {
        Some(at) => {
            let name = text[at + "alert ".len()..].split([':', ')']).next().unwrap_or_default();
            Got::Alert(name.trim().to_owned())
        }
        None if text.contains("unexpected eof") || error.kind() == io::ErrorKind::UnexpectedEof => Got::End,
        None => Got::Alert(text),
    }
}

/// A socket that can send its first bytes in small segments, or only some of them.
pub(super) struct Paced {
    tcp: TcpStream,
    segment: usize,
    pause: Duration,
    /// Bytes of the first flight still to be cut up.
    paced_left: usize,
    /// Bytes that may still be sent.
    allowed: usize,
    sleep: Option<Pin<Box<Sleep>>>,
}

/// A ClientHello is shorter than this; what follows goes out as it comes.
const FIRST_FLIGHT: usize = 4096;

impl Paced {
    fn new(tcp: TcpStream, said: &Value) -> Self {
        let number = |key: &str| said[key].as_u64().and_then(|n| usize::try_from(n).ok());
        Self {
            tcp,
            segment: number("helloSegments").unwrap_or(usize::MAX),
            pause: Duration::from_millis(said["helloPauseMs"].as_u64().unwrap_or(0)),
            paced_left: if said["helloSegments"].is_null() { 0 } else { FIRST_FLIGHT },
            allowed: number("helloTruncate").unwrap_or(usize::MAX),
            sleep: None,
        }
    }
}

impl AsyncRead for Paced {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Whoever waits for an answer has sent its first flight.
        self.paced_left = 0;
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}

impl AsyncWrite for Paced {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Some(sleep) = &mut self.sleep {
            ready!(sleep.as_mut().poll(cx));
            self.sleep = None;
        }
        let mut most = buf.len();
        if self.paced_left > 0 {
            most = most.min(self.segment);
        }
        let sent = most.min(self.allowed);
        if sent == 0 {
            // Swallowed: the rest of a truncated hello.
            return Poll::Ready(Ok(buf.len()));
        }
        let count = ready!(Pin::new(&mut self.tcp).poll_write(cx, &buf[..sent]))?;
        if self.allowed != usize::MAX {
            self.allowed -= count;
        }
        if self.paced_left > 0 {
            self.paced_left = self.paced_left.saturating_sub(count);
            self.sleep = Some(Box::pin(tokio::time::sleep(self.pause)));
        }
        Poll::Ready(Ok(count))
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// Outcome of a client's handshake.
pub(super) enum Handshake {
    Ok(Conn),
    /// `alert:NAME`, `closed`, `reset`, `timeout` or `error:TEXT`.
    Failed(String),
}

/// A client's handshake as the step says it.
///
/// # Errors
/// When a certificate cannot be read or OpenSSL refuses the settings.
pub(super) async fn connect(tcp: TcpStream, said: &Value, certs: &Path) -> Result<Handshake> {
    let limit = Duration::from_millis(said["timeoutMs"].as_u64().unwrap_or(3000));
    let ssl = client_ssl(said, certs)?;
    let mut stream = SslStream::new(ssl, Paced::new(tcp, said))?;
    let outcome = tokio::time::timeout(limit, Pin::new(&mut stream).connect()).await;
    let failed = match outcome {
        Ok(Ok(())) => return Ok(Handshake::Ok(Conn::Tls(Box::new(stream)))),
        Err(_) => "timeout".to_owned(),
        Ok(Err(error)) => match error.into_io_error() {
            Ok(io) => told(ended(&io)),
            Err(other) => told(ended(&io::Error::other(other.to_string()))),
        },
    };
    Ok(Handshake::Failed(failed))
}

fn told(got: Got) -> String {
    match got {
        Got::Alert(name) if name.contains("error:") => format!("error:{name}"),
        Got::Alert(name) => format!("alert:{name}"),
        Got::Reset => "reset".to_owned(),
        Got::Timeout => "timeout".to_owned(),
        Got::End | Got::Bytes(_) => "closed".to_owned(),
    }
}

fn client_ssl(said: &Value, certs: &Path) -> Result<Ssl> {
    let mut builder = SslConnector::builder(SslMethod::tls_client())?;
    builder.set_verify(SslVerifyMode::NONE);
    // Old versions and ciphers are what some cases are about.
    builder.set_security_level(0);
    builder.set_min_proto_version(Some(version(&said["min"]).unwrap_or(SslVersion::TLS1_2)))?;
    builder.set_max_proto_version(Some(version(&said["max"]).unwrap_or(SslVersion::TLS1_3)))?;
    if let Some(list) = said["ciphers"].as_str() {
        builder.set_cipher_list(list)?;
    }
    if let Some(name) = said["cert"].as_str() {
        identity(&mut builder, certs, name)?;
    }
    if let Some(list) = said["alpn"].as_array() {
        builder.set_alpn_protos(&wire_alpn(list))?;
    }
    let mut config = builder.build().configure()?;
    config.set_verify_hostname(false);
    config.set_use_server_name_indication(false);
    let mut ssl = config.into_ssl("unused")?;
    if let Some(sni) = said["sni"].as_str() {
        ssl.set_hostname(sni)?;
    }
    Ok(ssl)
}

fn version(said: &Value) -> Option<SslVersion> {
    Some(match said.as_str()?.trim_start_matches("TLSv").trim_start_matches("TLS") {
        "1.0" | "1" => SslVersion::TLS1,
        "1.1" => SslVersion::TLS1_1,
        "1.2" => SslVersion::TLS1_2,
        _ => SslVersion::TLS1_3,
    })
}

fn wire_alpn(list: &[Value]) -> Vec<u8> {
    let mut out = Vec::new();
    for name in list.iter().filter_map(Value::as_str) {
        out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
        out.extend_from_slice(name.as_bytes());
    }
    out
}

fn identity(builder: &mut SslContextBuilder, certs: &Path, name: &str) -> Result<()> {
    let chain = certs.join(format!("{name}.pem"));
    let key = certs.join(format!("{name}-key.pem"));
    builder.set_certificate_chain_file(&chain).with_context(|| format!("cannot use {}", chain.display()))?;
    builder.set_private_key_file(&key, SslFiletype::PEM).with_context(|| format!("cannot use {}", key.display()))?;
    Ok(())
}

/// What a TLS backend saw of its client.
#[derive(Debug, Clone, Default)]
pub(super) struct Saw {
    pub(super) sni: Option<String>,
    pub(super) alpn_offered: Vec<String>,
    pub(super) alpn_selected: Option<String>,
    pub(super) version: String,
    pub(super) peer_uris: Vec<String>,
}

/// A backend's handshake as its entry says it.
///
/// # Errors
/// When the handshake fails; says how.
pub(super) async fn accept(tcp: TcpStream, said: &Value, certs: &Path) -> Result<(Conn, Saw)> {
    let mut builder = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
    identity(&mut builder, certs, said["cert"].as_str().unwrap_or_default())?;
    builder.set_ca_file(certs.join("root.pem"))?;
    let wanted = if said["clientCert"] == "none" { SslVerifyMode::NONE } else { SslVerifyMode::PEER };
    builder.set_verify(wanted);
    let mine: Vec<String> =
        said["alpn"].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect();
    let offered = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&offered);
    builder.set_alpn_select_callback(move |_, theirs| {
        *noted.lock().expect("nobody panics while holding it") = names(theirs);
        let found = mine.iter().find_map(|m| {
            let at = position(theirs, m.as_bytes())?;
            Some(&theirs[at..at + m.len()])
        });
        found.ok_or(openssl::ssl::AlpnError::NOACK)
    });
    let ssl = Ssl::new(builder.build().context())?;
    let mut stream = SslStream::new(ssl, Paced::new(tcp, &Value::Null))?;
    let done = tokio::time::timeout(Duration::from_secs(5), Pin::new(&mut stream).accept()).await;
    done.context("no handshake")?.map_err(|error| anyhow!("{error}"))?;
    let ssl = stream.ssl();
    let peer_uris = ssl
        .peer_certificate()
        .and_then(|c| c.subject_alt_names())
        .map(|names| names.iter().filter_map(|n| n.uri().map(str::to_owned)).collect());
    let saw = Saw {
        sni: ssl.servername(NameType::HOST_NAME).map(str::to_owned),
        alpn_offered: offered.lock().expect("nobody panics while holding it").clone(),
        alpn_selected: ssl.selected_alpn_protocol().map(|p| String::from_utf8_lossy(p).into_owned()),
        version: ssl.version_str().to_owned(),
        peer_uris: peer_uris.unwrap_or_default(),
    };
    Ok((Conn::Tls(Box::new(stream)), saw))
}

fn names(wire: &[u8]) -> Vec<String> {
    let mut out = Vec::new();
    let mut rest = wire;
    while let Some((len, after)) = rest.split_first() {
        let len = usize::from(*len).min(after.len());
        out.push(String::from_utf8_lossy(&after[..len]).into_owned());
        rest = &after[len..];
    }
    out
}

fn position(wire: &[u8], name: &[u8]) -> Option<usize> {
    let mut at = 0;
    while at < wire.len() {
        let len = usize::from(wire[at]);
        if wire.get(at + 1..at + 1 + len) == Some(name) {
            return Some(at + 1);
        }
        at += 1 + len;
    }
    None
}
