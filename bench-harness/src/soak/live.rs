//! Connections that say something and listen for it to come back: a websocket, a gRPC stream, a TCP session.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use h2::client::SendRequest;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::side::LIMIT;

/// Bytes before a gRPC message: no compression, and its length.
const PREFIX: usize = 5;

/// What a websocket asks for.
pub(super) const SOCKET: &str = "/ws";
/// What a gRPC stream asks for.
pub(super) const STREAM: &str = "/soak.Echo/Chat";

/// One of them.
pub(super) enum Live {
    /// Bytes, once the head is over.
    Raw(TcpStream),
    /// A stream of an HTTP/2 connection that others share.
    Stream { send: h2::SendStream<Bytes>, answers: h2::RecvStream },
}

/// Opens a TCP session.
///
/// # Errors
/// When nobody listens.
pub(super) async fn session(at: SocketAddr) -> Result<Live> {
    let tcp = TcpStream::connect(at).await.context("a TCP session")?;
    tcp.set_nodelay(true)?;
    Ok(Live::Raw(tcp))
}

/// Opens a websocket.
///
/// # Errors
/// When it is refused.
pub(super) async fn websocket(at: SocketAddr) -> Result<Live> {
    let mut tcp = TcpStream::connect(at).await.context("a websocket")?;
    tcp.set_nodelay(true)?;
    let ask = format!(
        "GET {SOCKET} HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: Upgrade\r\n\
         sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
    );
    tcp.write_all(ask.as_bytes()).await?;
    let head = timeout(LIMIT, head(&mut tcp)).await.context("a websocket's answer")??;
    ensure!(head.starts_with("HTTP/1.1 101"), "a websocket is answered {head}");
    Ok(Live::Raw(tcp))
}

/// Reads to the end of a head.
///
/// # Errors
/// When the connection ends before.
pub(super) async fn head(tcp: &mut TcpStream) -> Result<String> {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        seen.push(tcp.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&seen).into_owned())
}

/// Opens an HTTP/2 connection.
///
/// # Errors
/// When nobody speaks it there.
pub(super) async fn http2(at: SocketAddr) -> Result<SendRequest<Bytes>> {
    let tcp = TcpStream::connect(at).await.context("an HTTP/2 connection")?;
    tcp.set_nodelay(true)?;
    let (sender, connection) = h2::client::handshake(tcp).await?;
    // Its end is told by its streams.
    tokio::spawn(connection);
    Ok(sender)
}

/// Opens a gRPC stream.
///
/// # Errors
/// When it is refused.
pub(super) async fn stream(connection: &SendRequest<Bytes>) -> Result<Live> {
    let mut sender = connection.clone().ready().await?;
    let request = Request::post(format!("http://a{STREAM}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (response, send) = sender.send_request(request, false)?;
    let response = timeout(LIMIT, response).await.context("a gRPC stream's answer")??;
    ensure!(response.status() == 200, "a gRPC stream is answered {}", response.status());
    Ok(Live::Stream { send, answers: response.into_body() })
}

impl Live {
    /// Says something and waits for it to come back.
    ///
    /// # Errors
    /// When something else comes, or an end.
    pub(super) async fn exchange(&mut self, round: usize) -> Result<()> {
        let said = format!("round {round:06}");
        match self {
            Self::Raw(tcp) => {
                tcp.write_all(said.as_bytes()).await?;
                let mut back = vec![0; said.len()];
                timeout(LIMIT, tcp.read_exact(&mut back)).await.context("nothing comes back")??;
                ensure!(back == said.as_bytes(), "other bytes come back");
            }
            Self::Stream { send, answers } => {
                let mut message = BytesMut::with_capacity(PREFIX + said.len());
                message.extend_from_slice(&[0, 0, 0, 0, u8::try_from(said.len()).expect("short")]);
                message.extend_from_slice(said.as_bytes());
                let message = message.freeze();
                send.send_data(message.clone(), false)?;
                let mut back = BytesMut::new();
                while back.len() < message.len() {
                    let data = timeout(LIMIT, answers.data()).await.context("nothing comes back")?;
                    let data = data.context("the stream has ended")??;
                    answers.flow_control().release_capacity(data.len())?;
                    back.extend_from_slice(&data);
                }
                ensure!(back == message, "another message comes back");
            }
        }
        Ok(())
    }

    /// Waits for the end that must not come.
    pub(super) async fn ended(&mut self) -> anyhow::Error {
        let unasked: Result<()> = async {
            match self {
                Self::Raw(tcp) => match tcp.read(&mut [0; 64]).await? {
                    0 => bail!("closed"),
                    read => bail!("{read} bytes come unasked"),
                },
                Self::Stream { answers, .. } => match answers.data().await {
                    None => bail!("the stream has ended"),
                    Some(data) => bail!("{} bytes come unasked", data?.len()),
                },
            }
        }
        .await;
        unasked.err().unwrap_or_else(|| anyhow::anyhow!("ended"))
    }
}
