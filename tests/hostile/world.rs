//! One sidecar with its application in a network namespace, an honest client beside the attack, and what is asked in the
//! end.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use super::support::shop::{mtls, pod, service};
use super::support::{
    self, LIMIT, Proxy, certificates, folder, give_to_proxy, in_own_network, public_binary, redirect, run, wait_for,
};

/// The application as peers know it; the way there leads through the sidecar's inbound listener.
pub(crate) const SERVICE: &str = "10.9.0.1:8080";
/// The same through the outbound listener, and then the inbound one over mTLS.
pub(crate) const OUTBOUND: &str = "10.96.9.1:80";
/// Memory that an attack may leave behind or hold, unless it says otherwise.
pub(crate) const GROWTH: u64 = 64 << 20;

/// Runs a test with a sidecar in a namespace of its own; `name` is the test's whole name. Without the privilege it says so.
pub(crate) fn inside(name: &str, body: impl FnOnce(&mut World)) {
    inside_with(name, None, body);
}

/// The same with so many file descriptors for the proxy.
pub(crate) fn inside_with(name: &str, files: Option<u32>, body: impl FnOnce(&mut World)) {
    in_own_network(name, || {
        let mut world = World::start(files);
        body(&mut world);
        world.end();
    });
}

/// Names a test to [`inside`].
macro_rules! hostile {
    ($($(#[$about:meta])* fn $name:ident($world:ident) $body:block)*) => {$(
        $(#[$about])*
        #[test]
        fn $name() {
            let path = concat!(module_path!(), "::", stringify!($name));
            let name = path.split_once("::").expect("a crate and a name").1;
            $crate::world::inside(name, |$world: &mut $crate::world::World| {
                // Not every attack has something to ask the application.
                let _: &$crate::world::World = $world;
                $body
            });
        }
    )*};
}
pub(crate) use hostile;

/// The sidecar, its application and the honest client.
pub(crate) struct World {
    pub(crate) proxy: Proxy,
    honest: Honest,
    seen: Arc<Mutex<Vec<String>>>,
    before: u64,
    growth: u64,
    _dir: tempfile::TempDir,
}

impl World {
    fn start(files: Option<u32>) -> Self {
        run("ip", &["address", "add", "10.9.0.1/32", "dev", "lo"]);
        run("ip", &["route", "add", "10.96.0.0/16", "dev", "lo"]);
        redirect("10.9.0.1", 8080, 15006);
        redirect("10.96.9.1", 80, 15001);
        // What the sidecar itself sends to its own pod over mTLS comes in like from a peer.
        let own = ["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", "10.9.0.1", "--dport", "8080"];
        let rest =
            ["!", "-s", "127.0.0.6", "-m", "owner", "--uid-owner", "1337", "-j", "REDIRECT", "--to-ports", "15006"];
        run("iptables", &[&own[..], &rest].concat());
        let dir = folder(&[("mesh.yaml", "{}")]);
        let config = dir.path().join("config");
        std::fs::create_dir(&config).expect("a folder");
        let objects = [service("10.96.9.1", 80, 8080), pod("web", "10.9.0.1"), mtls("PERMISSIVE")].concat();
        std::fs::write(config.join("objects.yaml"), objects).expect("a file");
        certificates(dir.path(), &[("web", "spiffe://cluster.local/ns/shop/sa/web")]);
        let binary = public_binary(dir.path());
        give_to_proxy(dir.path());
        let seen = Arc::new(Mutex::new(Vec::new()));
        serve(&seen);
        let mut command = Command::new("setpriv");
        if let Some(files) = files {
            command = Command::new("prlimit");
            command.args([&format!("--nofile={files}:{files}"), "setpriv"]);
        }
        command.args(["--reuid=1337", "--regid=1337", "--clear-groups"]);
        command.arg(binary).args(["proxy", "--concurrency", "1", "--config"]).arg(&config);
        command.arg("--certs").arg(dir.path().join("web")).env("POD_NAMESPACE", "shop").env("POD_NAME", "web-1");
        command.env("INSTANCE_IP", "10.9.0.1").env("SERVICE_ACCOUNT", "web");
        let proxy = Proxy::start(command);
        let ready = || ask("127.0.0.1:15021", "/healthz/ready").is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"));
        wait_for("readiness", LIMIT, ready).expect("it becomes ready");
        let honest = Honest::start();
        honest.go_on();
        let before = proxy.resident_bytes();
        Self { proxy, honest, seen, before, growth: GROWTH, _dir: dir }
    }

    /// Lets the attack leave or hold so many bytes.
    pub(crate) fn may_grow(&mut self, bytes: u64) {
        self.growth = bytes;
    }

    /// The honest client has been served since it was asked last; memory is within bounds.
    pub(crate) fn all_is_well(&self) {
        self.honest.go_on();
        let now = self.proxy.resident_bytes();
        let grown = now.saturating_sub(self.before);
        assert!(grown <= self.growth, "memory grew by {} KiB", grown >> 10);
    }

    /// Bytes that the proxy has grown by.
    pub(crate) fn grown(&self) -> u64 {
        self.proxy.resident_bytes().saturating_sub(self.before)
    }

    /// Heads and bodies that the application has seen, without those of the honest client.
    pub(crate) fn seen(&self) -> Vec<String> {
        self.seen.lock().expect("no panic").clone()
    }

    fn end(mut self) {
        self.all_is_well();
        self.honest.stop();
        let fresh = ask(SERVICE, "/honest").expect("a new connection is served");
        assert!(fresh.starts_with("HTTP/1.1 200"), "{fresh}");
        let stats = ask("127.0.0.1:15000", "/stats?filter=panics_total").expect("admin");
        assert!(stats.contains("panics_total: 0"), "{stats}");
        self.proxy.signal("KILL");
        self.proxy.wait();
    }
}

/// One request on a connection of its own.
pub(crate) fn ask(to: &str, path: &str) -> std::io::Result<String> {
    support::http(address(to), &format!("GET {path} HTTP/1.1\r\nhost: web.shop\r\nconnection: close\r\n\r\n"))
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A connection of the attacker's.
pub(crate) fn connect(to: &str) -> TcpStream {
    let stream = TcpStream::connect_timeout(&address(to), LIMIT).expect("a connection");
    stream.set_read_timeout(Some(LIMIT)).expect("a socket");
    stream.set_write_timeout(Some(LIMIT)).expect("a socket");
    stream.set_nodelay(true).expect("a socket");
    stream
}

/// Everything until the proxy ends the connection. It has to: waiting in vain fails the test.
pub(crate) fn until_closed(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return all,
            Ok(n) => all.extend_from_slice(&buffer[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                panic!("the connection was left open after {:?}", String::from_utf8_lossy(&all))
            }
            // What was still on its way to a socket that closed is answered with a reset.
            Err(_) => return all,
        }
    }
}

/// What comes back for these bytes, until the proxy ends the connection.
pub(crate) fn refused(to: &str, bytes: &[u8]) -> String {
    let mut stream = connect(to);
    // A refusal may come before everything was sent.
    let _ = stream.write_all(bytes);
    String::from_utf8_lossy(&until_closed(&mut stream)).into_owned()
}

/// A client that does nothing wrong, on one connection for the whole test.
struct Honest {
    served: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Honest {
    fn start() -> Self {
        let (served, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stopped) = (Arc::clone(&served), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut stream = connect(SERVICE);
            let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
            while !stopped.load(Ordering::Relaxed) {
                stream.write_all(b"GET /honest HTTP/1.1\r\nhost: web.shop\r\n\r\n").expect("the proxy reads");
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    assert!(reader.read_line(&mut head).expect("the proxy answers") > 0, "closed after {head}");
                }
                assert!(head.starts_with("HTTP/1.1 200"), "{head}");
                reader.read_exact(&mut [0; 2]).expect("a body");
                count.fetch_add(1, Ordering::Relaxed);
                // It shares two cores with everybody.
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
        });
        Self { served, stop, thread: Some(thread) }
    }

    /// Waits until it has been served a few times more.
    fn go_on(&self) {
        let now = self.served.load(Ordering::Relaxed);
        let alive = || self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        wait_for("an answer to an honest client", LIMIT, || {
            assert!(alive(), "the honest client was not served");
            self.served.load(Ordering::Relaxed) > now + 3
        })
        .expect("it is served");
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the honest client was served to the end");
        }
    }
}

/// The application. `/honest` is not noted; `/never` is not answered; `/large` is 32 MB; `/early` is answered before its
/// body is read; `/switch` switches protocols and echoes, `/refuse` answers 200 to that.
fn serve(seen: &Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind(SERVICE).expect("the application's port");
    let seen = Arc::clone(seen);
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let seen = Arc::clone(&seen);
            // It ends with the connection, whoever breaks it.
            std::thread::Builder::new().stack_size(128 * 1024).spawn(move || answer(stream, &seen)).expect("a thread");
        }
    });
}

fn answer(mut stream: TcpStream, seen: &Mutex<Vec<String>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
        match &*path {
            "/honest" => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").ok()?;
                continue;
            }
            "/never" => {
                note(seen, head);
                std::io::copy(&mut reader, &mut std::io::sink()).ok()?;
                return None;
            }
            "/large" => {
                note(seen, head);
                let length = 32 << 20;
                stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").as_bytes()).ok()?;
                std::io::copy(&mut std::io::repeat(b'x').take(length), &mut stream).ok()?;
                continue;
            }
            "/switch" => {
                note(seen, head);
                let switch = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
                stream.write_all(switch.as_bytes()).ok()?;
                std::io::copy(&mut reader, &mut stream).ok()?;
                return None;
            }
            "/early" => {
                note(seen, head.clone());
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").ok()?;
                read_body(&mut reader, &head)?;
                continue;
            }
            _ => {}
        }
        let body = read_body(&mut reader, &head)?;
        note(seen, head + &String::from_utf8_lossy(&body));
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").ok()?;
    }
}

fn note(seen: &Mutex<Vec<String>>, message: String) {
    seen.lock().expect("no panic").push(message);
}

fn read_body(reader: &mut impl BufRead, head: &str) -> Option<Vec<u8>> {
    let lower = head.to_ascii_lowercase();
    let mut body = Vec::new();
    if lower.contains("transfer-encoding: chunked") {
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let size = usize::from_str_radix(line.trim(), 16).ok()?;
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).ok()?;
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                return Some(body);
            }
        }
    }
    let length = lower.split("content-length: ").nth(1).and_then(|rest| rest.split("\r\n").next()?.parse().ok());
    body.resize(length.unwrap_or(0), 0);
    reader.read_exact(&mut body).ok()?;
    Some(body)
}
