//! Clients: one connection a step, exactly the bytes that the step says.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::conn::{self, Conn, Got, Handshake};
use super::http1::Reader;
use super::value::{bytes_at, parts_of, put_bytes};
use super::{http2, raw2};

/// How long a reply is waited for, unless the step says.
const REPLY: u64 = 1500;
/// A connection that stays open is watched this long.
const WATCH: u64 = 100;
/// Where nothing is expected, silence for this long is proof enough.
const SILENCE: u64 = 400;
/// Upper bound where something is expected: ten times what was recorded would be too long for all cases.
const PATIENCE: u64 = 5000;

/// A connection with what is told of it so far, or what to report instead.
type Opened = Result<(Conn, Map<String, Value>), Value>;

/// All of many that speak at once have spoken within this time, milliseconds: as far apart as their handshakes kept them in
/// the recordings, so that a connection stands before the next asks for one.
const ARRIVALS: u64 = 400;

/// What all steps of a case share.
#[derive(Clone)]
pub(super) struct Client {
    /// Folder of certificates.
    pub(super) certs: PathBuf,
    /// Source address, unless the step says.
    pub(super) from: Option<IpAddr>,
}

impl Client {
    /// Plays a step and tells what came of it.
    pub(super) async fn step(&self, said: &Value) -> Value {
        let count = |key: &str| said[key].as_u64().unwrap_or(0);
        if count("parallel") > 0 {
            return self.parallel(said, count("parallel")).await;
        }
        if count("repeat") > 0 {
            return self.repeated(said, count("repeat")).await;
        }
        let answer = self.single(said, self.open(said).await).await;
        if let Some(wait) = said["waitAfterMs"].as_u64() {
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
        answer
    }

    async fn parallel(&self, said: &Value, count: u64) -> Value {
        let stagger = said["staggerMs"].as_u64().unwrap_or_else(|| (ARRIVALS / count).clamp(2, 30));
        let said = Arc::new(said.clone());
        let mut tasks = Vec::new();
        // Handshakes cost more than what the case is about: everybody speaks once all are there.
        let all = Arc::new(tokio::sync::Barrier::new(usize::try_from(count).unwrap_or(usize::MAX)));
        for number in 0..count {
            let (client, said, all) = (self.clone(), Arc::clone(&said), Arc::clone(&all));
            tasks.push(tokio::spawn(async move {
                let opened = client.open(&said).await;
                all.wait().await;
                tokio::time::sleep(Duration::from_millis(stagger * number)).await;
                client.single(&said, opened).await
            }));
        }
        let mut tally = Tally::default();
        for task in tasks {
            match task.await {
                Ok(answer) => tally.add(&answer, &said),
                Err(error) => tally.add(&json!({"error": error.to_string()}), &said),
            }
        }
        tally.report()
    }

    async fn repeated(&self, said: &Value, count: u64) -> Value {
        let mut tally = Tally::default();
        let mut open: Option<(Conn, Reader)> = None;
        for _ in 0..count {
            let (conn, reader) = match open.take() {
                Some(open) => open,
                None => match self.open(said).await {
                    Ok((conn, _)) => (conn, Reader::new(Duration::ZERO)),
                    Err(failed) => {
                        tally.add(&failed, said);
                        continue;
                    }
                },
            };
            let mut out = Map::new();
            if let Some((conn, reader)) = exchange(conn, reader, said, &mut out).await {
                let closes = said_close(&out);
                if reader.end.is_none() && !closes {
                    open = Some((conn, reader));
                }
            }
            tally.add(&Value::Object(out), said);
        }
        tally.report()
    }

    /// Connects, with TLS where the step says. `Err`: what to report instead.
    async fn open(&self, said: &Value) -> Opened {
        let Ok(to) = said["connect"].as_str().unwrap_or_default().parse::<SocketAddr>() else {
            return Err(json!({"error": format!("{} is no address", said["connect"])}));
        };
        let from = said["from"].as_str().and_then(|a| a.parse().ok()).or(self.from);
        let tcp = Conn::open(to, from).await.map_err(|e| {
            // A reset may be there before the connection is looked at for the first time.
            let reset = e.kind() == std::io::ErrorKind::ConnectionReset;
            json!({"connection": if reset { "reset" } else { "refused" }, "error": e.to_string()})
        })?;
        let mut out = Map::new();
        if said["tls"].is_null() {
            return Ok((Conn::Plain(tcp), out));
        }
        match conn::connect(tcp, &said["tls"], &self.certs).await {
            Ok(Handshake::Ok(conn)) => {
                out.insert("handshake".to_owned(), json!("ok"));
                Ok((conn, out))
            }
            Ok(Handshake::Failed(how)) => Err(json!({"handshake": how})),
            Err(error) => Err(json!({"handshake": "error", "error": format!("{error:#}")})),
        }
    }

    async fn single(&self, said: &Value, opened: Opened) -> Value {
        let (conn, mut out) = match opened {
            Ok(opened) => opened,
            Err(failed) => return failed,
        };
        let tls = !out.is_empty();
        let mut reader = Reader::new(Duration::ZERO);
        let mut next = exchange(conn, Reader::new(Duration::ZERO), said, &mut out).await;
        let mut more = Vec::new();
        for said in said["more"].as_array().into_iter().flatten() {
            if let Some(pause) = said["pauseBeforeMs"].as_u64() {
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            let Some((conn, ahead)) = next.take() else { break };
            let mut answer = Map::new();
            next = exchange(conn, ahead, said, &mut answer).await;
            if let Some((conn, ahead)) = &mut next {
                state(conn, ahead, said, &mut answer).await;
            }
            more.push(Value::Object(answer));
        }
        if let Some((mut conn, ahead)) = next {
            reader = ahead;
            state(&mut conn, &mut reader, said, &mut out).await;
            if said["rstAtEnd"] == true {
                conn.abort();
            }
        }
        if !more.is_empty() {
            out.insert("more".to_owned(), Value::Array(more));
        }
        late_refusal(tls, &reader, &mut out);
        Value::Object(out)
    }
}

/// TLS 1.3: the client is done before the server has looked at its certificate; the refusal is the first thing read.
fn late_refusal(tls: bool, reader: &Reader, out: &mut Map<String, Value>) {
    let got_something = out.contains_key("status") || out.get("bytes").is_some_and(|b| b != "");
    if let (true, Some(Got::Alert(name)), false) = (tls, &reader.end, got_something) {
        let name = name.clone();
        out.clear();
        out.insert("handshake".to_owned(), json!(format!("alert:{name}")));
    }
}

fn said_close(out: &Map<String, Value>) -> bool {
    let headers = out.get("headers").and_then(Value::as_array);
    headers.is_some_and(|list| list.iter().any(|h| h[0] == "connection" && h[1] == "close"))
}

/// One exchange. `None`: the connection is used up and its state is told.
async fn exchange(
    mut conn: Conn,
    mut reader: Reader,
    said: &Value,
    out: &mut Map<String, Value>,
) -> Option<(Conn, Reader)> {
    let expect = &said["expect"];
    let silent = expect["reply"] == "none" && expect["connection"] != "closed";
    let limit = said["timeoutMs"].as_u64().unwrap_or(REPLY);
    let limit = if silent { limit.min(SILENCE) } else { limit.max(PATIENCE) };
    let limit = Duration::from_millis(limit);
    if !said["h2"].is_null() {
        two(conn, said, limit, out).await;
        return None;
    }
    reader.extend(limit);
    for (part, pause) in parts_of(said) {
        if conn.write(&part).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    if said["shutdownWrite"] == true {
        conn.shutdown_write().await;
    }
    if said["speak"] == "raw" {
        raw(&mut conn, &mut reader, said, out).await;
    } else {
        one(&mut conn, &mut reader, said, out).await;
    }
    Some((conn, reader))
}

async fn two(mut conn: Conn, said: &Value, limit: Duration, out: &mut Map<String, Value>) {
    let requests = &said["h2"];
    let odd = if requests.is_array() { None } else { Some(requests).filter(|r| raw2::is_odd(r)) };
    if let Some(request) = odd {
        let refusal = raw2::send(&mut conn, request, Duration::from_millis(1000)).await;
        if refusal.answered {
            out.insert("answered".to_owned(), json!(true));
        }
        if let Some(code) = refusal.reset {
            out.insert("reset".to_owned(), json!(format!("{:?}", h2::Reason::from(code))));
        }
        if let Some(code) = refusal.goaway {
            out.insert("goaway".to_owned(), json!(format!("{:?}", h2::Reason::from(code))));
        }
        out.insert("connection".to_owned(), json!(ending(refusal.end.as_ref())));
        return;
    }
    let more = said["more"].as_array().map_or(&[][..], Vec::as_slice);
    match http2::exchange(conn, std::iter::once(said).chain(more), limit).await {
        Ok((answers, state)) => {
            let tell = |(said, mut answers): (&Value, Vec<Value>)| {
                let mut out = Map::new();
                if said["h2"].is_array() {
                    out.insert("streams".to_owned(), Value::Array(answers));
                } else if let Some(Value::Object(answer)) = answers.pop() {
                    out.extend(answer);
                }
                out.insert("connection".to_owned(), json!(state));
                out
            };
            let mut told = std::iter::once(said).chain(more).zip(answers).map(tell);
            out.extend(told.next().into_iter().flatten());
            let more: Vec<Value> = told.map(Value::Object).collect();
            if !more.is_empty() {
                out.insert("more".to_owned(), Value::Array(more));
            }
        }
        Err(error) => {
            out.insert("connection".to_owned(), json!("closed"));
            out.insert("error".to_owned(), json!(error.to_string()));
        }
    }
}

async fn raw(conn: &mut Conn, reader: &mut Reader, said: &Value, out: &mut Map<String, Value>) {
    let expected = bytes_at(&said["expect"], "bytes").map_or(0, |b| b.len());
    let expected = said["expect"]["bytesLength"].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(expected);
    let kept = said["expect"]["connection"] == "kept";
    let counted = !said["expect"]["counts"].is_null();
    if counted {
        reader.extend(Duration::from_millis(said["timeoutMs"].as_u64().unwrap_or(REPLY)));
    }
    let enough = |have: usize| kept && have >= expected && !counted;
    while !enough(reader.ahead.len()) && reader.more(conn).await {}
    if enough(reader.ahead.len()) && reader.end.is_none() {
        // What should not come does not come later either.
        reader.extend(Duration::from_millis(WATCH));
        while reader.more(conn).await {}
    }
    put_bytes(out, "bytes", &reader.ahead);
    reader.ahead.clear();
}

async fn one(conn: &mut Conn, reader: &mut Reader, said: &Value, out: &mut Map<String, Value>) {
    let method = parts_of(said).first().map(|(bytes, _)| bytes.clone()).unwrap_or_default();
    let method = String::from_utf8_lossy(method.split(|b| *b == b' ').next().unwrap_or_default()).into_owned();
    let mut informational = Vec::new();
    let head = loop {
        let Some(head) = reader.head(conn).await else {
            if reader.end.is_none() {
                out.insert("reply".to_owned(), json!("none"));
            }
            return;
        };
        if !(100..200).contains(&head.status()) || head.status() == 101 {
            break head;
        }
        informational.push(json!({"status": head.status(), "headers": head.headers}));
    };
    if !informational.is_empty() {
        out.insert("informational".to_owned(), Value::Array(informational));
    }
    out.insert("version".to_owned(), json!(head.word(0)));
    out.insert("status".to_owned(), json!(head.status()));
    out.insert("reason".to_owned(), json!(head.reason()));
    out.insert("headers".to_owned(), json!(head.headers));
    if head.status() == 101 || (method == "CONNECT" && head.status() == 200) {
        out.insert("upgraded".to_owned(), json!(true));
        return;
    }
    let bodiless = method == "HEAD" || matches!(head.status(), 204 | 304);
    let body = if bodiless { super::http1::Body::default() } else { reader.body(conn, &head, true).await };
    put_bytes(out, "body", &body.bytes);
    if !body.trailers.is_empty() {
        out.insert("trailers".to_owned(), json!(body.trailers));
    }
    if body.incomplete {
        out.insert("incomplete".to_owned(), json!(true));
    }
}

/// Whether the connection is still open.
async fn state(conn: &mut Conn, reader: &mut Reader, said: &Value, out: &mut Map<String, Value>) {
    if reader.end.is_none() {
        let wants_end = said["expect"]["connection"].as_str().is_some_and(|c| c != "kept");
        let watch = if wants_end { PATIENCE } else { said["stateMs"].as_u64().unwrap_or(WATCH).min(SILENCE) };
        reader.extend(Duration::from_millis(watch));
        let before = reader.ahead.len();
        while reader.more(conn).await {}
        if reader.ahead.len() > before && !out.contains_key("bytes") {
            out.insert("extra".to_owned(), json!(super::http1::latin1(&reader.ahead[before..])));
        }
    }
    out.insert("connection".to_owned(), json!(ending(reader.end.as_ref())));
}

fn ending(end: Option<&Got>) -> String {
    match end {
        None | Some(Got::Timeout | Got::Bytes(_)) => "kept".to_owned(),
        Some(Got::End) => "closed".to_owned(),
        Some(Got::Reset) => "reset".to_owned(),
        Some(Got::Alert(name)) => format!("alert:{name}"),
    }
}

/// Counts of many equal exchanges.
#[derive(Default)]
struct Tally {
    counts: BTreeMap<String, u64>,
    samples: BTreeMap<String, Value>,
    statuses: Vec<Value>,
}

impl Tally {
    fn add(&mut self, answer: &Value, said: &Value) {
        let key = self.key(answer, said);
        *self.counts.entry(key.clone()).or_default() += 1;
        self.statuses.push(answer["status"].clone());
        self.samples.entry(key).or_insert_with(|| answer.clone());
    }

    /// The recordings' own ways of naming an answer.
    fn key(&self, answer: &Value, said: &Value) -> String {
        if let Some(streams) = answer["streams"].as_array() {
            return format!("streams {}", streams.len());
        }
        let Some(status) = answer["status"].as_u64() else {
            // The recordings keep bytes that are no text elsewhere.
            let is_text = |t: &&str| t.chars().all(|c| !c.is_control() || matches!(c, '\r' | '\n' | '\t'));
            let bytes = answer["bytes"].as_str().filter(is_text).unwrap_or_default();
            return format!("- {bytes} {}", answer["connection"].as_str().unwrap_or_default());
        };
        let overloaded = answer["headers"].as_array().into_iter().flatten().any(|h| h[0] == "x-envoy-overloaded");
        if said["parallel"].as_u64().is_some() {
            return format!("{status}{}", if overloaded { " x-envoy-overloaded" } else { "" });
        }
        format!("{status} {}", answer["body"].as_str().unwrap_or_default().trim())
    }

    fn report(self) -> Value {
        json!({"counts": self.counts, "samples": self.samples, "statuses": self.statuses})
    }
}
