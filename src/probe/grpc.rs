//! `grpc.health.v1.Health/Check`, with the words of Go's client, which people search for.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Request, header};
use prost::Message;
use tokio::time::{sleep, timeout};

use super::{Grpc, USER_AGENT, dial};
use crate::error::GRPC_CODES;
use crate::net::Stream;

/// A health answer is a few bytes; more is not one.
const MAX_ANSWER: usize = 4096;
/// A server that is just starting is given the whole time of the check.
const AGAIN: Duration = Duration::from_millis(50);
const SERVING: i32 = 1;

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`.
#[derive(Clone, PartialEq, Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// One check, connecting included, within `limit`.
pub(super) async fn check(grpc: &Grpc, own: IpAddr, limit: Duration) -> Result<(), String> {
    let address = SocketAddr::new(own, grpc.port);
    let mut connected = false;
    let asked = async {
        let stream = loop {
            match dial(address).await {
                Ok(stream) => break stream,
                Err(_) => sleep(AGAIN).await,
            }
        };
        connected = true;
        ask(stream, grpc, address).await
    };
    match timeout(limit, Box::pin(asked)).await {
        Ok(answer) => answer,
        Err(_) if connected => Err(format!(
            "health rpc probe timed out after {}s: rpc error: code = DeadlineExceeded desc = context deadline exceeded",
            limit.as_secs()
        )),
        Err(_) => {
            Err(format!("failed to connect health check grpc service on port {}: context deadline exceeded", grpc.port))
        }
    }
}

async fn ask(stream: Stream, grpc: &Grpc, address: SocketAddr) -> Result<(), String> {
    let (sender, connection) = h2::client::handshake(stream).await.map_err(failed)?;
    let mut exchange = std::pin::pin!(exchange(sender, grpc, address));
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        _ = connection => exchange.await,
    }
}

fn failed(error: h2::Error) -> String {
    status(grpc_code("Unavailable"), &error.to_string(), 0).expect_err("a code that is not OK")
}

fn grpc_code(name: &str) -> usize {
    GRPC_CODES.iter().position(|code| *code == name).unwrap_or(2)
}

async fn exchange(sender: h2::client::SendRequest<Bytes>, grpc: &Grpc, address: SocketAddr) -> Result<(), String> {
    let mut sender = sender.ready().await.map_err(failed)?;
    let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
        .version(http::Version::HTTP_2)
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, USER_AGENT)
        .body(())
        .map_err(|e| e.to_string())?;
    let (response, mut body) = sender.send_request(request, false).map_err(failed)?;
    body.send_data(frame(&HealthCheckRequest { service: grpc.service.clone() }), true).map_err(failed)?;
    let (head, mut body) = response.await.map_err(failed)?.into_parts();
    told(&head.headers, grpc.port)?;
    let mut received = BytesMut::new();
    while let Some(data) = body.data().await {
        let data = data.map_err(failed)?;
        if received.len() + data.len() > MAX_ANSWER {
            return Err("the answer is too long".to_owned());
        }
        // The window was opened for it; a failure here shows with the next read.
        let _ = body.flow_control().release_capacity(data.len());
        received.extend_from_slice(&data);
    }
    if let Some(trailers) = body.trailers().await.map_err(failed)? {
        told(&trailers, grpc.port)?;
    }
    health(received.freeze())
}

fn frame(message: &HealthCheckRequest) -> Bytes {
    let mut frame = BytesMut::with_capacity(5 + message.encoded_len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).expect("a service name is short"));
    message.encode(&mut frame).expect("the buffer grows as needed");
    frame.freeze()
}

/// A status among headers or trailers.
fn told(headers: &HeaderMap, port: u16) -> Result<(), String> {
    let Some(code) = headers.get("grpc-status") else { return Ok(()) };
    let code = code.to_str().ok().and_then(|code| code.parse().ok()).unwrap_or(2);
    let message = headers.get("grpc-message").map(HeaderValue::as_bytes).unwrap_or_default();
    let message = percent_encoding::percent_decode(message).decode_utf8_lossy();
    status(code, &message, port)
}

fn status(code: usize, message: &str, port: u16) -> Result<(), String> {
    let name = GRPC_CODES.get(code).copied().unwrap_or("Unknown");
    let told = format!("rpc error: code = {name} desc = {message}");
    match name {
        "OK" => Ok(()),
        "Unimplemented" => Err(format!(
            "service on port {port} doesn't implement the grpc health protocol grpc.health.v1.Health: {told}"
        )),
        _ => Err(format!("health rpc probe failed with status {name}: {told}")),
    }
}

fn health(mut frame: Bytes) -> Result<(), String> {
    const PREFIX: usize = 5;
    if frame.len() < PREFIX {
        return Err("the answer holds no message".to_owned());
    }
    frame.advance(PREFIX);
    let answer = HealthCheckResponse::decode(frame).map_err(|e| e.to_string())?;
    match answer.status {
        SERVING => Ok(()),
        0 => Err("the service is UNKNOWN".to_owned()),
        2 => Err("the service is NOT_SERVING".to_owned()),
        3 => Err("the service is SERVICE_UNKNOWN".to_owned()),
        other => Err(format!("the service has status {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_in_gos_words() {
        let error = status(5, "unknown service", 1).unwrap_err();
        assert_eq!(
            error,
            "health rpc probe failed with status NotFound: rpc error: code = NotFound desc = unknown service"
        );
        assert!(status(12, "x", 7).unwrap_err().starts_with("service on port 7 doesn't implement"));
        assert!(status(0, "", 1).is_ok() && status(99, "", 1).is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_is_not_there_is_waited_for() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        let grpc = Grpc { port, service: String::new() };
        let error = check(&grpc, [127, 0, 0, 1].into(), Duration::from_secs(1)).await.unwrap_err();
        assert_eq!(
            error,
            format!("failed to connect health check grpc service on port {port}: context deadline exceeded")
        );
    }
}
