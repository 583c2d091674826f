//! Applications and backends: they answer by script and note everything they see.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::conn::{self, Conn, Got};
use super::http1::{Head, Reader};
use super::http2;
use super::value::{bytes_at, bytes_of, parts_of, put_bytes};

/// Nothing in a case lasts longer.
const LONG: Duration = Duration::from_secs(30);
/// What an application that meets a ClientHello answers: handshake_failure.
const TLS_ALERT: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 0x28];

/// Record type of a ClientHello.
const TLS_HANDSHAKE: u8 = 0x16;

/// What all applications of a case saw.
#[derive(Default)]
pub(super) struct Notes {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    saw: Vec<Value>,
    /// Requests so far, by place.
    requests: HashMap<String, usize>,
    /// Entries of a script used so far, by place.
    answers: HashMap<String, usize>,
    connections: HashMap<String, usize>,
    open: HashMap<String, usize>,
    most_open: HashMap<String, usize>,
    all_connections: usize,
    /// Answers of an application that has no script.
    defaults: Value,
}

impl Notes {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics while holding it")
    }

    /// Adds an observation; its number may be used to change it.
    pub(super) fn saw(&self, what: Value) -> usize {
        let mut inner = self.lock();
        inner.saw.push(what);
        inner.saw.len() - 1
    }

    fn change(&self, number: usize, with: impl FnOnce(&mut Map<String, Value>)) {
        if let Some(Value::Object(map)) = self.lock().saw.get_mut(number) {
            with(map);
        }
    }

    /// The script's entry for the next request at a place; without a script the default answer.
    pub(super) fn next_entry(&self, base: &Map<String, Value>, script: &[Value]) -> Value {
        *self.lock().requests.entry(place(base)).or_default() += 1;
        self.next_answer(base, script)
    }

    /// The same for a connection without requests.
    fn next_answer(&self, base: &Map<String, Value>, script: &[Value]) -> Value {
        let mut inner = self.lock();
        let count = inner.answers.entry(place(base)).or_default();
        let at = *count;
        *count += 1;
        match script.get(at).or_else(|| script.last()) {
            Some(entry) if entry["ok"] != true => entry.clone(),
            _ => inner.defaults["h2"].clone(),
        }
    }

    fn connected(&self, place: &str) -> (usize, usize) {
        let mut inner = self.lock();
        inner.all_connections += 1;
        let of_all = inner.all_connections;
        let count = inner.connections.entry(place.to_owned()).or_default();
        *count += 1;
        let own = *count;
        let open = inner.open.entry(place.to_owned()).or_default();
        *open += 1;
        let open = *open;
        let most = inner.most_open.entry(place.to_owned()).or_default();
        *most = open.max(*most);
        (of_all, own)
    }

    fn disconnected(&self, place: &str) {
        if let Some(open) = self.lock().open.get_mut(place) {
            *open -= 1;
        }
    }

    fn report(&self) -> Value {
        let inner = self.lock();
        json!({
            "saw": inner.saw,
            "requests": inner.requests,
            "connections": inner.connections,
            "maxConcurrent": inner.most_open,
        })
    }
}

fn place(base: &Map<String, Value>) -> String {
    match base.get("backend") {
        Some(backend) => backend.as_str().unwrap_or_default().to_owned(),
        None => base.get("port").map(ToString::to_string).unwrap_or_default(),
    }
}

/// The applications of one case. Dropping it closes everything.
pub(super) struct Servers {
    notes: Arc<Notes>,
    tasks: JoinSet<()>,
}

/// What one application is.
#[derive(Clone)]
struct App {
    said: Value,
    script: Vec<Value>,
    certs: PathBuf,
    notes: Arc<Notes>,
    /// `10.1.0.26:8080`, or only the port of an application on every address.
    place: String,
    by_port: bool,
}

impl Servers {
    /// Starts listening.
    ///
    /// # Errors
    /// When an address is taken.
    pub(super) async fn start(apps: &[Value], defaults: &Value, certs: PathBuf) -> Result<Self> {
        let notes = Arc::new(Notes::default());
        notes.lock().defaults = defaults.clone();
        let mut tasks = JoinSet::new();
        for said in apps {
            let by_port = said["listen"].is_u64();
            let place = match &said["listen"] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let address: SocketAddr = if by_port { format!("0.0.0.0:{place}") } else { place.clone() }
                .parse()
                .with_context(|| format!("{place} is no address"))?;
            let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
            let script = said["script"].as_array().cloned().unwrap_or_default();
            let notes = Arc::clone(&notes);
            let app = App { said: said.clone(), script, certs: certs.clone(), notes, place, by_port };
            tasks.spawn(accept(listener, app));
        }
        Ok(Self { notes, tasks })
    }

    /// What was seen so far.
    pub(super) fn report(&self) -> Value {
        self.notes.report()
    }

    /// Closes everything, tells what was seen, and returns when every address is free again.
    pub(super) async fn stop(mut self) -> Value {
        let report = self.report();
        self.tasks.shutdown().await;
        report
    }
}

/// Counts a connection for as long as it is open.
struct Counted {
    notes: Arc<Notes>,
    place: String,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.notes.disconnected(&self.place);
    }
}

async fn accept(listener: TcpListener, app: App) {
    let mut connections = JoinSet::new();
    while let Ok((tcp, peer)) = listener.accept().await {
        let (of_all, own) = app.notes.connected(&app.place);
        let counted = Counted { notes: Arc::clone(&app.notes), place: app.place.clone() };
        let mut base = Map::new();
        if app.by_port {
            base.insert("port".to_owned(), json!(app.place.parse::<u16>().unwrap_or(0)));
            base.insert("peer".to_owned(), json!(peer.ip().to_string()));
            base.insert("conn".to_owned(), json!(of_all));
        } else {
            base.insert("backend".to_owned(), json!(app.place));
            base.insert("conn".to_owned(), json!(own));
        }
        let app = app.clone();
        connections.spawn(async move {
            let _counted = counted;
            one(tcp, app, base).await;
        });
    }
}

async fn one(tcp: TcpStream, app: App, mut base: Map<String, Value>) {
    tcp.set_nodelay(true).ok();
    if let Some(end) = app.said["onConnect"].as_str() {
        let closes = end == "close";
        base.insert("version".to_owned(), json!("tcp"));
        base.insert("end".to_owned(), json!(if closes { "closed-by-backend" } else { "reset-by-backend" }));
        put_bytes(&mut base, "bytes", &[]);
        app.notes.saw(Value::Object(base));
        if !closes {
            Conn::Plain(tcp).abort();
        }
        return;
    }
    let tls = &app.said["tls"];
    let mut first = [0];
    if !tls.is_null() && matches!(tcp.peek(&mut first).await, Ok(1)) && first[0] != TLS_HANDSHAKE {
        return plaintext(Conn::Plain(tcp), &app, base).await;
    }
    if tls.is_null() {
        let protocol = app.said["protocol"].as_str().unwrap_or("h1").to_owned();
        return speak(Conn::Plain(tcp), app, base, &protocol).await;
    }
    match conn::accept(tcp, tls, &app.certs).await {
        Ok((conn, saw)) => {
            let h2 = matches!(saw.alpn_selected.as_deref(), Some("h2" | "istio-h2"));
            base.insert(
                "tls".to_owned(),
                json!({
                    "sni": saw.sni,
                    "alpnOffered": saw.alpn_offered,
                    "alpnSelected": saw.alpn_selected,
                    "version": saw.version,
                    "peerUri": saw.peer_uris,
                }),
            );
            let protocol = if h2 { "h2c" } else { app.said["protocol"].as_str().unwrap_or("h1") }.to_owned();
            speak(conn, app, base, &protocol).await;
        }
        Err(error) => {
            base.insert("version".to_owned(), json!("tls-failed"));
            base.insert("error".to_owned(), json!(format!("{error:#}")));
            app.notes.saw(Value::Object(base));
        }
    }
}

/// A client that should have spoken TLS.
async fn plaintext(mut conn: Conn, app: &App, mut base: Map<String, Value>) {
    let mut bytes = Vec::new();
    conn.read(&mut bytes, LONG).await;
    base.insert("version".to_owned(), json!("plaintext-to-tls-backend"));
    put_bytes(&mut base, "bytes", &bytes);
    app.notes.saw(Value::Object(base));
}

async fn speak(conn: Conn, app: App, base: Map<String, Value>, protocol: &str) {
    match protocol {
        "h2c" => http2::serve(conn, base, app.script, app.notes).await,
        "tcp" => raw(conn, app, base, Vec::new()).await,
        "auto" => guess(conn, app, base).await,
        _ => h1(conn, app, base, Reader::new(LONG)).await,
    }
}

/// Decides by the first bytes.
async fn guess(mut conn: Conn, app: App, base: Map<String, Value>) {
    let mut reader = Reader::new(LONG);
    while reader.ahead.len() < 6 && !reader.ahead.contains(&b' ') && reader.more(&mut conn).await {
        if reader.ahead.starts_with(&[0x16, 3]) {
            let mut base = base;
            base.insert("version".to_owned(), json!("tcp"));
            base.insert("bytes".to_owned(), json!("<TLS ClientHello>"));
            app.notes.saw(Value::Object(base));
            // The client may be gone.
            conn.write(&TLS_ALERT).await.ok();
            return;
        }
        let undecided = reader.ahead == [0x16] || reader.ahead.iter().all(u8::is_ascii_uppercase);
        if !undecided && !reader.ahead.contains(&b' ') {
            break;
        }
    }
    let is_method = |bytes: &[u8]| {
        let word = bytes.split(|b| *b == b' ').next().unwrap_or_default();
        bytes.contains(&b' ') && !word.is_empty() && word.iter().all(u8::is_ascii_uppercase)
    };
    if reader.ahead.starts_with(b"PRI * ") {
        let prefixed = Prefixed { conn, ahead: std::mem::take(&mut reader.ahead) };
        prefixed.serve(base, app).await;
    } else if is_method(&reader.ahead) {
        h1(conn, app, base, reader).await;
    } else {
        raw(conn, app, base, reader.ahead).await;
    }
}

/// A connection whose first bytes were read already, handed to the HTTP/2 library through a pipe.
struct Prefixed {
    conn: Conn,
    ahead: Vec<u8>,
}

impl Prefixed {
    async fn serve(self, base: Map<String, Value>, app: App) {
        let (near, mut far) = tokio::io::duplex(256 * 1024);
        let mut conn = self.conn;
        let pump = async move {
            if tokio::io::AsyncWriteExt::write_all(&mut far, &self.ahead).await.is_ok() {
                // Either side may end first; what matters was noted.
                tokio::io::copy_bidirectional(&mut conn, &mut far).await.ok();
            }
        };
        tokio::join!(pump, http2::serve_on(near, base, app.script, app.notes));
    }
}

async fn h1(mut conn: Conn, app: App, base: Map<String, Value>, mut reader: Reader) {
    loop {
        reader.extend(LONG);
        let Some(head) = reader.head(&mut conn).await else { return };
        let entry = entry_of(&app, &base);
        let expects = head.get("expect").is_some_and(|v| v.eq_ignore_ascii_case("100-continue"));
        if expects && entry["no100"] != true {
            conn.write(b"HTTP/1.1 100 Continue\r\n\r\n").await.ok();
        }
        if let Some(early) = bytes_at(&entry, "beforeBody") {
            conn.write(&early).await.ok();
        }
        let body = reader.body(&mut conn, &head, false).await;
        let mut noted = noted_head(&head, &base);
        put_bytes(&mut noted, "body", &body.bytes);
        if !body.trailers.is_empty() {
            noted.insert("trailers".to_owned(), json!(body.trailers));
        }
        if body.incomplete {
            noted.insert("incomplete".to_owned(), json!(true));
        }
        app.notes.saw(Value::Object(noted));
        let Some(next) = answer(conn, &entry).await else { return };
        conn = next;
        if entry["rawEcho"] == true {
            let mut upgraded = base.clone();
            upgraded.insert("version".to_owned(), json!("upgraded"));
            return echo(conn, &app, upgraded, std::mem::take(&mut reader.ahead)).await;
        }
        if head.get("connection").is_some_and(|v| v.eq_ignore_ascii_case("close")) {
            return;
        }
    }
}

fn entry_of(app: &App, base: &Map<String, Value>) -> Value {
    let entry = app.notes.next_entry(base, &app.script);
    // The default of `next_entry` is HTTP/2's; a script's entry names none of its fields.
    if entry == app.notes.lock().defaults["h2"] { app.notes.lock().defaults["h1"].clone() } else { entry }
}

fn noted_head(head: &Head, base: &Map<String, Value>) -> Map<String, Value> {
    let mut out = base.clone();
    out.insert("version".to_owned(), json!(head.word(2)));
    out.insert("method".to_owned(), json!(head.word(0)));
    out.insert("path".to_owned(), json!(head.word(1)));
    out.insert("headers".to_owned(), json!(head.headers));
    out
}

/// Answers by an entry; `None` when the connection is over.
async fn answer(mut conn: Conn, entry: &Value) -> Option<Conn> {
    if let Some(delay) = entry["delayMs"].as_u64() {
        tokio::time::sleep(Duration::from_millis(delay)).await;
    }
    for (part, pause) in parts_of(entry) {
        conn.write(&part).await.ok()?;
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    if entry["reset"] == true {
        conn.abort();
        return None;
    }
    (entry["close"] != true).then_some(conn)
}

/// Opaque bytes: by script, else an echo.
async fn raw(mut conn: Conn, app: App, mut base: Map<String, Value>, ahead: Vec<u8>) {
    base.insert("version".to_owned(), json!("tcp"));
    if app.script.is_empty() {
        return echo(conn, &app, base, ahead).await;
    }
    let entry = app.notes.next_answer(&base, &app.script);
    if let Some(greeting) = entry["sendOnConnect"].as_str() {
        conn.write(&bytes_of(greeting)).await.ok();
    }
    let number = app.notes.saw(Value::Object(base));
    let mut bytes = ahead;
    let mut answered = false;
    loop {
        app.notes.change(number, |map| put_bytes(map, "bytes", &bytes));
        if !answered && !bytes.is_empty() {
            answered = true;
            match answer(conn, &entry).await {
                Some(next) => conn = next,
                None => return,
            }
        }
        match conn.read(&mut bytes, LONG).await {
            Got::Bytes(_) => {}
            end => {
                app.notes.change(number, |map| ending(map, &end));
                break;
            }
        }
    }
    if let Some(late) = entry["sendAfterEof"].as_str() {
        tokio::time::sleep(Duration::from_millis(100)).await;
        conn.write(&bytes_of(late)).await.ok();
    }
    conn.shutdown_write().await;
}

fn ending(map: &mut Map<String, Value>, end: &Got) {
    let word = if *end == Got::End { "eof" } else { "reset" };
    map.insert("end".to_owned(), json!(word));
}

async fn echo(mut conn: Conn, app: &App, base: Map<String, Value>, ahead: Vec<u8>) {
    let number = app.notes.saw(Value::Object(base));
    let mut all = ahead.clone();
    app.notes.change(number, |map| put_bytes(map, "bytes", &all));
    if !ahead.is_empty() && conn.write(&ahead).await.is_err() {
        return;
    }
    loop {
        let mut bytes = Vec::new();
        match conn.read(&mut bytes, LONG).await {
            Got::Bytes(_) => {
                all.extend_from_slice(&bytes);
                app.notes.change(number, |map| put_bytes(map, "bytes", &all));
                if all.starts_with(&[0x16, 3]) {
                    // The recordings' echo takes these for TLS as well. The client may be gone.
                    conn.write(&TLS_ALERT).await.ok();
                    return;
                }
                if conn.write(&bytes).await.is_err() {
                    return;
                }
            }
            end => {
                app.notes.change(number, |map| ending(map, &end));
                conn.shutdown_write().await;
                return;
            }
        }
    }
}
