//! Asks a running proxy: it answers from what it serves at that moment.

use std::io::Write;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::{Answer, Call};

/// Port of the admin server when the URL has none.
const ADMIN_PORT: u16 = 15000;

/// Sends the calls to `URL/explain` and prints the answers.
pub fn ask_live(url: &str, calls: &[Call], json: bool, out: &mut impl Write) -> Result<()> {
    let lines: Vec<String> = calls.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let body = runtime.block_on(post(url, lines.join("\n"))).with_context(|| url.to_owned())?;
    let answers: Vec<Answer> = body.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(answers.len() == calls.len(), "{url}: {} answers to {} calls", answers.len(), calls.len());
    for (answer, call) in answers.iter().zip(calls) {
        super::print(answer, call, json, out)?;
    }
    Ok(())
}

async fn post(url: &str, body: String) -> Result<String> {
    let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let uri: Uri = url.parse().with_context(|| format!("{url:?} is not a URL"))?;
    let (Some(host), Some("http")) = (uri.host(), uri.scheme_str()) else {
        bail!("expected an address as in http://127.0.0.1:{ADMIN_PORT}");
    };
    let port = uri.port_u16().unwrap_or(ADMIN_PORT);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((bare, port)).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::post("/explain")
        .header(header::HOST, format!("{host}:{port}"))
        .header(header::CONNECTION, "close")
        .body(Full::new(Bytes::from(body)))?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        let text = String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?;
        ensure!(status.is_success(), "{status}: {}", text.trim());
        Ok(text)
    };
    let (answer, _) = tokio::join!(exchange, connection);
    answer
}
