//! HTTP/2 by the library: the client's requests, the applications' answers.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::conn::Conn;
use super::raw2;
use super::server::Notes;
use super::value::{bytes_at, pairs, put_bytes};

/// How long a connection stays after its goodbye.
const LINGER: Duration = Duration::from_millis(300);

/// Sends the requests of steps on one new connection: those of a step at a time, one step after the other. Returns what
/// came back, for each step one answer for each request, and the connection's state (`kept`, `closed`).
///
/// # Errors
/// When the connection cannot be set up.
pub(super) async fn exchange<'s>(
    conn: Conn,
    steps: impl Iterator<Item = &'s Value>,
    limit: Duration,
) -> Result<(Vec<Vec<Value>>, String), h2::Error> {
    let (mut sender, connection) = h2::client::handshake(conn).await?;
    let driver = tokio::spawn(async move { connection.await.err().map(|e| e.to_string()) });
    let mut all = Vec::new();
    for step in steps {
        if let Some(pause) = step["pauseBeforeMs"].as_u64() {
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        sender = match sender.ready().await {
            Ok(sender) => sender,
            Err(error) => {
                all.push(vec![failure(&error)]);
                return Ok((all, "closed".to_owned()));
            }
        };
        let said = &step["h2"];
        let requests = said.as_array().map_or_else(|| vec![said.clone()], Clone::clone);
        all.push(together(&mut sender, &requests, limit).await);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let state = if driver.is_finished() { "closed" } else { "kept" };
    driver.abort();
    Ok((all, state.to_owned()))
}

/// Concurrent requests.
async fn together(sender: &mut SendRequest<Bytes>, requests: &[Value], limit: Duration) -> Vec<Value> {
    let mut pending = Vec::new();
    for request in requests {
        if let Err(error) = std::future::poll_fn(|cx| sender.poll_ready(cx)).await {
            pending.push(tokio::spawn(async move { failure(&error) }));
            continue;
        }
        let ends = request["data"].is_null() && request["dataBase64"].is_null() && request["trailers"].is_null();
        let open = request["keepOpen"] == true;
        let sent = sender.send_request(client_head(request), ends && !open);
        pending.push(match sent {
            Ok((response, stream)) => {
                if !ends {
                    send_rest(stream, request, open).ok();
                }
                tokio::spawn(one_answer(response, limit))
            }
            Err(error) => tokio::spawn(async move { failure(&error) }),
        });
    }
    let mut answers = Vec::new();
    for answer in pending {
        answers.push(answer.await.unwrap_or_else(|e| json!({"error": e.to_string()})));
    }
    answers
}

fn client_head(request: &Value) -> Request<()> {
    let headers = pairs(&request["headers"]);
    let pseudo = |name: &str| headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
    let authority = pseudo(":authority");
    let (scheme, path) = (pseudo(":scheme"), pseudo(":path"));
    let uri = match (&scheme, &authority, &path) {
        (Some(scheme), Some(authority), Some(path)) => format!("{scheme}://{authority}{path}"),
        (_, Some(authority), None) => authority.clone(),
        (_, _, Some(path)) => path.clone(),
        _ => "/".to_owned(),
    };
    let mut out = Request::builder().method(pseudo(":method").as_deref().unwrap_or("GET")).uri(uri);
    if let Some(protocol) = pseudo(":protocol") {
        out = out.extension(h2::ext::Protocol::from(protocol.as_str()));
    }
    let mut out = out.body(()).unwrap_or_default();
    *out.version_mut() = http::Version::HTTP_2;
    extend(out.headers_mut(), &headers);
    out
}

fn extend(into: &mut HeaderMap, headers: &[(String, String)]) {
    for (name, value) in headers.iter().filter(|(n, _)| !n.starts_with(':')) {
        let name = HeaderName::from_bytes(name.as_bytes());
        let value = HeaderValue::from_bytes(&super::value::bytes_of(value));
        if let (Ok(name), Ok(value)) = (name, value) {
            into.append(name, value);
        }
    }
}

fn send_rest(mut stream: SendStream<Bytes>, request: &Value, open: bool) -> Result<(), h2::Error> {
    let trailers = pairs(&request["trailers"]);
    if let Some(data) = bytes_at(request, "data") {
        stream.send_data(Bytes::from(data), trailers.is_empty() && !open)?;
    }
    if !trailers.is_empty() {
        let mut map = HeaderMap::new();
        extend(&mut map, &trailers);
        stream.send_trailers(map)?;
    }
    if open {
        // The stream stays open as long as the connection does.
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(60)).await;
            drop(stream);
        });
    }
    Ok(())
}

fn failure(error: &h2::Error) -> Value {
    match error.reason() {
        Some(reason) if error.is_go_away() => json!({"goaway": format!("{reason:?}")}),
        Some(reason) => json!({"reset": format!("{reason:?}")}),
        None => json!({"ended": error.to_string()}),
    }
}

async fn one_answer(response: h2::client::ResponseFuture, limit: Duration) -> Value {
    match tokio::time::timeout(limit, answer(response)).await {
        Ok(value) => value,
        Err(_) => json!({"reply": "none"}),
    }
}

async fn answer(mut response: h2::client::ResponseFuture) -> Value {
    let mut out = Map::new();
    let informational = early(&mut response).await;
    if !informational.is_empty() {
        out.insert("informational".to_owned(), Value::Array(informational));
    }
    let response = match response.await {
        Ok(response) => response,
        Err(error) => {
            if let Value::Object(map) = failure(&error) {
                out.extend(map);
            }
            return Value::Object(out);
        }
    };
    out.insert("version".to_owned(), json!("HTTP/2"));
    out.insert("status".to_owned(), json!(response.status().as_u16()));
    out.insert("headers".to_owned(), headers(response.headers()));
    let body = read(response.into_body()).await;
    put_bytes(&mut out, "body", &body.bytes);
    if let Some(trailers) = body.trailers {
        out.insert("trailers".to_owned(), trailers);
    }
    if let Some(Value::Object(failed)) = body.failed {
        out.extend(failed);
    }
    Value::Object(out)
}

/// 1xx answers before the final one.
async fn early(response: &mut h2::client::ResponseFuture) -> Vec<Value> {
    let mut out = Vec::new();
    while let Some(Ok(info)) = std::future::poll_fn(|cx| response.poll_informational(cx)).await {
        out.push(json!({"status": info.status().as_u16(), "headers": headers(info.headers())}));
    }
    out
}

fn headers(map: &HeaderMap) -> Value {
    let pair =
        |(name, value): (&HeaderName, &HeaderValue)| json!([name.as_str(), super::http1::latin1(value.as_bytes())]);
    Value::Array(map.iter().map(pair).collect())
}

struct Read {
    bytes: Vec<u8>,
    trailers: Option<Value>,
    failed: Option<Value>,
}

async fn read(mut body: RecvStream) -> Read {
    let mut out = Read { bytes: Vec::new(), trailers: None, failed: None };
    while let Some(chunk) = body.data().await {
        match chunk {
            Ok(chunk) => {
                // A closed connection no longer needs its window.
                body.flow_control().release_capacity(chunk.len()).ok();
                out.bytes.extend_from_slice(&chunk);
            }
            Err(error) => {
                out.failed = Some(failure(&error));
                return out;
            }
        }
    }
    match body.trailers().await {
        Ok(trailers) => out.trailers = trailers.map(|t| headers(&t)),
        Err(error) => out.failed = Some(failure(&error)),
    }
    out
}

/// Bytes that the library would not write.
type Aside = Arc<Mutex<Vec<u8>>>;

/// A stream that they can be slipped into between two frames.
struct WithAside<S> {
    stream: S,
    aside: Aside,
}

impl<S: AsyncRead + Unpin> AsyncRead for WithAside<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WithAside<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut aside = this.aside.lock().expect("nobody panics while holding it");
        while !aside.is_empty() {
            let written = ready!(Pin::new(&mut this.stream).poll_write(cx, &aside))?;
            aside.drain(..written);
        }
        Pin::new(&mut this.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Serves one connection of an application that speaks HTTP/2.
pub(super) async fn serve(conn: Conn, base: Map<String, Value>, script: Vec<Value>, notes: Arc<Notes>) {
    serve_on(conn, base, script, notes).await;
}

/// The same over any stream.
pub(super) async fn serve_on<S>(stream: S, base: Map<String, Value>, script: Vec<Value>, notes: Arc<Notes>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let aside = Aside::default();
    let stream = WithAside { stream, aside: Arc::clone(&aside) };
    let Ok(mut server) = h2::server::handshake(stream).await else { return };
    while let Some(Ok((request, respond))) = server.accept().await {
        let entry = notes.next_entry(&base, &script);
        if let Some(last) = entry["lastStream"].as_u64() {
            let head = noted_head(&request);
            let mut noted = base.clone();
            noted.extend(head);
            put_bytes(&mut noted, "body", &[]);
            notes.saw(Value::Object(noted));
            *aside.lock().expect("nobody panics while holding it") = raw2::goaway(last, entry["goaway"].as_u64());
            // The library flushes while it waits for the next stream.
            tokio::time::timeout(LINGER, server.accept()).await.ok();
            return;
        }
        let closes = entry["close"] == true || entry["closeAfter"] == true;
        let goaway = entry["goaway"].is_null();
        let (base, notes) = (base.clone(), Arc::clone(&notes));
        let task = tokio::spawn(one_request(request, respond, entry, base, notes));
        if closes {
            // The connection's driver must run while the answer goes out.
            tokio::select! {
                _ = task => {}
                _ = server.accept() => {}
            }
            return;
        }
        if !goaway {
            server.graceful_shutdown();
        }
    }
}

async fn one_request(
    request: Request<RecvStream>,
    mut respond: h2::server::SendResponse<Bytes>,
    entry: Value,
    base: Map<String, Value>,
    notes: Arc<Notes>,
) {
    let head = noted_head(&request);
    let early = entry["respondAtHeaders"] == true;
    let body = request.into_body();
    let mut noted = base;
    noted.extend(head);
    let reading = async {
        let body = read(body).await;
        put_bytes(&mut noted, "body", &body.bytes);
        if let Some(trailers) = body.trailers {
            noted.insert("trailers".to_owned(), trailers);
        }
        if let Some(failed) = body.failed {
            noted.insert("rst".to_owned(), failed["reset"].clone());
        }
        notes.saw(Value::Object(noted));
    };
    if early {
        answer_with(&mut respond, &entry).await.ok();
        reading.await;
    } else {
        reading.await;
        answer_with(&mut respond, &entry).await.ok();
    }
}

fn noted_head(request: &Request<RecvStream>) -> Map<String, Value> {
    let uri = request.uri();
    let path = uri.path_and_query().map_or("", |p| p.as_str());
    let mut all = vec![json!([":method", request.method().as_str()])];
    if let Some(scheme) = uri.scheme_str() {
        all.push(json!([":scheme", scheme]));
    }
    if let Some(authority) = uri.authority() {
        all.push(json!([":authority", authority.as_str()]));
    }
    if !path.is_empty() {
        all.push(json!([":path", path]));
    }
    if let Value::Array(rest) = headers(request.headers()) {
        all.extend(rest);
    }
    let mut out = Map::new();
    out.insert("version".to_owned(), json!("HTTP/2"));
    out.insert("method".to_owned(), json!(request.method().as_str()));
    out.insert("path".to_owned(), json!(path));
    out.insert("headers".to_owned(), Value::Array(all));
    out
}

async fn answer_with(respond: &mut h2::server::SendResponse<Bytes>, entry: &Value) -> Result<(), h2::Error> {
    if let Some(delay) = entry["delayMs"].as_u64() {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    if let Some(code) = reason(&entry["rst"]) {
        respond.send_reset(code);
        return Ok(());
    }
    let said = pairs(&entry["headers"]);
    let status = said.iter().find(|(n, _)| n == ":status").and_then(|(_, v)| v.parse().ok()).unwrap_or(200);
    let mut response = Response::new(());
    *response.status_mut() = http::StatusCode::from_u16(status).unwrap_or_default();
    extend(response.headers_mut(), &said);
    let data = bytes_at(entry, "data");
    let trailers = pairs(&entry["trailers"]);
    let rst_after = reason(&entry["rstAfterData"]);
    let ends = data.is_none() && trailers.is_empty() && rst_after.is_none();
    let mut stream = respond.send_response(response, ends)?;
    if let Some(data) = data {
        stream.send_data(Bytes::from(data), trailers.is_empty() && rst_after.is_none())?;
    }
    if let Some(code) = rst_after {
        tokio::time::sleep(Duration::from_millis(50)).await;
        stream.send_reset(code);
        return Ok(());
    }
    if !trailers.is_empty() {
        let mut map = HeaderMap::new();
        extend(&mut map, &trailers);
        stream.send_trailers(map)?;
    }
    Ok(())
}

fn reason(said: &Value) -> Option<h2::Reason> {
    if let Some(code) = said.as_u64() {
        return u32::try_from(code).ok().map(h2::Reason::from);
    }
    Some(match said.as_str()? {
        "NO_ERROR" => h2::Reason::NO_ERROR,
        "PROTOCOL_ERROR" => h2::Reason::PROTOCOL_ERROR,
        "REFUSED_STREAM" => h2::Reason::REFUSED_STREAM,
        "CANCEL" => h2::Reason::CANCEL,
        "ENHANCE_YOUR_CALM" => h2::Reason::ENHANCE_YOUR_CALM,
        _ => h2::Reason::INTERNAL_ERROR,
    })
}
