//! What tests of the real binary share: processes that end with the test, waiting for events, little machines.
//!
//! * [`Run`] runs a command to its end: exit code and both outputs.
//! * [`Proxy`] starts `istio-proxy proxy` and waits until it says what it should; killed on drop, its log in the panic
//!   message when waiting is in vain.
//! * [`free_ports`] gives ports for programs that cannot take 0.
//! * [`Machines`] are network namespaces with real addresses and iptables ([`bench_harness::netns`]); [`privileged`] says
//!   whether the kernel lets us, and tells on standard error when it does not.
//! * [`serve_as_app`] turns the test's own executable into the application, or its client, inside a namespace.
//!
//! Nothing sleeps for a guessed time: waiting polls for the event with a generous limit.

#![allow(dead_code, unreachable_pub, reason = "each test file uses its part")]

pub mod shop;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

pub use bench_harness::netns::{Lab as Machines, Space as Machine, wait_for};

/// How long an event may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(20);

/// The program under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_istio-proxy");

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A command that ran to its end.
#[derive(Debug)]
pub struct Run {
    /// Exit code; -1 for a signal.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// Runs `istio-proxy` with these arguments and no environment of ours.
pub fn istio_proxy(args: &[&str]) -> Run {
    istio_proxy_in(args, &[], "")
}

/// Runs `istio-proxy` with variables and standard input.
pub fn istio_proxy_in(args: &[&str], variables: &[(&str, &str)], input: &str) -> Run {
    let mut command = Command::new(BINARY);
    command.args(args).env_clear().envs(variables.iter().copied());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the binary starts");
    // A command that does not read its input closes the pipe; that is no failure.
    let _ = child.stdin.take().expect("piped").write_all(input.as_bytes());
    child.wait_with_output().expect("the binary ends").into()
}

/// A proxy that runs until it is dropped.
pub struct Proxy {
    child: Child,
    lines: Receiver<String>,
    log: Vec<String>,
}

impl Proxy {
    /// Starts it and waits until it serves.
    pub fn start(command: Command) -> Self {
        let mut proxy = Self::spawn(command);
        proxy.wait_for_line("workers serve");
        proxy
    }

    /// Starts it.
    pub fn spawn(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary starts");
        let err = BufReader::new(child.stderr.take().expect("piped"));
        let (send, lines) = channel();
        std::thread::spawn(move || {
            // Ends with the process, or with the receiver.
            err.lines().map_while(Result::ok).try_for_each(|line| send.send(line))
        });
        Self { child, lines, log: Vec::new() }
    }

    /// Waits until a line with this text has been logged; the line.
    pub fn wait_for_line(&mut self, text: &str) -> String {
        loop {
            let Ok(line) = self.lines.recv_timeout(LIMIT) else {
                panic!("{text:?} was not logged; what was:\n{}", self.log.join("\n"));
            };
            self.log.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its name (`TERM`).
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.pid().to_string()]).status();
        assert!(sent.expect("kill (package procps)").success());
    }

    /// Waits until it ends; the exit code.
    pub fn wait(&mut self) -> i32 {
        let mut code = None;
        wait_for("the end of the proxy", LIMIT, || {
            code = self.child.try_wait().expect("a child of ours");
            code.is_some()
        })
        .unwrap_or_else(|e| panic!("{e}; it logged:\n{}", self.log.join("\n")));
        code.and_then(|status| status.code()).unwrap_or(-1)
    }

    /// Resident memory in bytes.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("it runs");
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("VmRSS");
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).expect("kB") * 1024
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ports nobody listens on now, for programs whose configuration must name one.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let held: [TcpListener; N] = std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    held.map(|listener| listener.local_addr().expect("bound").port())
}

/// Writes files into a folder that goes away with the value.
pub fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).expect("a file");
    }
    dir
}

/// Replaces a file as a whole.
pub fn replace(file: &Path, text: &str) {
    let new = file.with_extension("new");
    std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, file)).expect("a file");
}

/// Certificates for identities signed by one root, each in its folder below `dir`.
pub fn certificates(dir: &Path, identities: &[(&str, &str)]) {
    let root = dir.join("root").display().to_string();
    for (name, id) in identities {
        let to = dir.join(name).display().to_string();
        let run = istio_proxy(&["ca", "--root", &root, "--dir", &to, "--id", id]);
        assert_eq!(run.code, 0, "{}", run.err);
    }
}

/// Whether namespaces and rules can be made; tells why not.
pub fn privileged(test: &str) -> bool {
    // Tests of one file ask at the same time.
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let number = ASKED.fetch_add(1, Ordering::Relaxed);
    let Err(e) = Machines::new(&format!("probe{number}-{}", std::process::id())) else { return true };
    eprintln!("{test}: left out: {e:#}");
    false
}

/// Says that the process is inside already.
const INSIDE: &str = "ISTIO_PROXY_TEST_INSIDE";

/// Runs a test in a network namespace of its own, where every port and address is free; `name` is the test's whole name.
/// The test executable runs itself again for that. Without the privilege it says so.
pub fn in_own_network(name: &str, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        run("ip", &["link", "set", "lo", "up"]);
        return body();
    }
    if !privileged(name) {
        return;
    }
    let own = std::env::current_exe().expect("our path");
    let mut command = Command::new("unshare");
    command.arg("--net").arg(own).args(["--exact", name, "--nocapture", "--test-threads", "1"]).env(INSIDE, "1");
    let out = command.output().expect("unshare (package util-linux)");
    let told = format!("{}\n{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{told}");
    assert!(told.contains("1 passed"), "no test {name}: {told}");
    // What it measured, or went without.
    told.lines().filter(|line| line.starts_with(&format!("{name}: "))).for_each(|line| eprintln!("{line}"));
}

/// Runs a program that has to succeed.
pub fn run(program: &str, arguments: &[&str]) {
    let out = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Sends what goes to an address to a port of the sidecar, except what the sidecar itself sends.
pub fn redirect(address: &str, port: u16, to: u16) {
    let (port, to) = (port.to_string(), to.to_string());
    let rule = ["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", address, "--dport", &port];
    let rest = ["-m", "owner", "!", "--uid-owner", "1337", "-j", "REDIRECT", "--to-ports", &to];
    run("iptables", &[&rule[..], &rest].concat());
}

/// One HTTP/1.1 exchange in plain words: what came back, head and body.
pub fn http(to: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// `curl` inside a machine: status and body. Arguments are curl's.
pub fn curl(machine: &Machine, args: &[&str]) -> (u16, String) {
    let mut command = machine.command("curl");
    command.args(["-s", "-m", "10", "-w", "\n%{http_code}"]).args(args);
    let out = command.output().expect("curl (package curl)");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", &text));
    (status.parse().unwrap_or(0), body.to_owned())
}

const APP: &str = "ISTIO_PROXY_TEST_APP";
const CLIENT: &str = "ISTIO_PROXY_TEST_CLIENT";

/// Call it first in a test named `application`, which does nothing in a normal run: under [`start_app`] it serves on the
/// given address and never returns. HTTP/1.1 is answered with the request's head; `tcp:ADDRESS` sends back what comes.
/// Under [`talk`] and [`crowd`] it is their client.
pub fn serve_as_app() {
    if let Ok(order) = std::env::var(CLIENT) {
        let words: Vec<&str> = order.split(' ').collect();
        match words[..] {
            ["talk", to, say, heard] => converse(to, Path::new(say), Path::new(heard)),
            ["crowd", to, many, seen] => gather(to, many.parse().expect("a number"), Path::new(seen)),
            _ => panic!("{order}"),
        }
    }
    let Ok(address) = std::env::var(APP) else { return };
    let echo = address.strip_prefix("tcp:");
    let listener = TcpListener::bind(echo.unwrap_or(&address)).expect("the application's port");
    let serve = if echo.is_some() { send_back } else { answer_requests };
    for stream in listener.incoming() {
        std::thread::spawn(move || stream.map(serve));
    }
}

fn send_back(mut stream: TcpStream) {
    let mut reader = stream.try_clone().expect("a socket");
    // Ends with either side.
    let _ = std::io::copy(&mut reader, &mut stream);
    let _ = stream.shutdown(Shutdown::Write);
}

fn converse(to: &str, say: &Path, heard: &Path) {
    let bytes = std::fs::read(say).expect("what to say");
    let mut stream = TcpStream::connect(to).expect("a connection");
    stream.set_read_timeout(Some(LIMIT)).expect("a socket");
    let mut writer = stream.try_clone().expect("a socket");
    let writing = std::thread::spawn(move || writer.write_all(&bytes).and_then(|()| writer.shutdown(Shutdown::Write)));
    let mut answer = Vec::new();
    // A refused connection is closed or reset; either way the answer is what came.
    let _ = stream.read_to_end(&mut answer);
    let _ = writing.join().expect("no panic");
    std::fs::write(heard, answer).expect("a file");
}

/// Counts who is served of so many at once, then lets one go and tries again.
fn gather(to: &str, many: usize, seen: &Path) {
    let open = || {
        let mut stream = TcpStream::connect(to).expect("a connection");
        stream.set_read_timeout(Some(LIMIT)).expect("a socket");
        // Enough to tell it from TLS and HTTP.
        let served = stream.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").and_then(|()| stream.read_exact(&mut [0])).is_ok();
        served.then_some(stream)
    };
    let mut served: Vec<TcpStream> = (0..many).filter_map(|_| open()).collect();
    let first = served.len();
    served.pop();
    let mut again = false;
    // The other end learns of it in a moment.
    for _ in 0..100 {
        again = open().is_some();
        if again {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    std::fs::write(seen, format!("{first} {again}")).expect("a file");
}

fn answer_requests(mut stream: TcpStream) {
    let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{head}", head.len());
        if stream.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

fn application(machine: &Machine) -> Command {
    let own = std::env::current_exe().expect("our path");
    let mut command = machine.command(&own.to_string_lossy());
    command.args(["--exact", "application", "--nocapture"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Sends bytes from a machine, ends the sending, and gives what came back until the other end closed.
pub fn talk(machine: &Machine, to: &str, bytes: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let (say, heard) = (dir.path().join("say"), dir.path().join("heard"));
    std::fs::write(&say, bytes).expect("a file");
    let order = format!("talk {to} {} {}", say.display(), heard.display());
    let ended = application(machine).env(CLIENT, order).status();
    assert!(ended.expect("the client starts").success(), "the client of {to} failed");
    std::fs::read(heard).expect("what was heard")
}

/// Opens so many connections at once from a machine: how many are served, and whether another is once one has gone.
pub fn crowd(machine: &Machine, to: &str, many: usize) -> (usize, bool) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let seen = dir.path().join("seen");
    let ended = application(machine).env(CLIENT, format!("crowd {to} {many} {}", seen.display())).status();
    assert!(ended.expect("the client starts").success(), "the clients of {to} failed");
    let text = std::fs::read_to_string(seen).expect("what was seen");
    let (first, again) = text.split_once(' ').expect("two words");
    (first.parse().expect("a number"), again == "true")
}

/// Starts this test executable's `application` inside a machine.
pub fn start_app(machine: &Machine, address: &str) -> Killed {
    let mut command = application(machine);
    command.env(APP, address);
    let app = Killed(command.spawn().expect("the application starts"));
    let port = address.rsplit(':').next().and_then(|p| p.parse().ok()).expect("ADDRESS:PORT");
    wait_for("the application", LIMIT, || machine.listens(port)).expect("it listens");
    app
}

/// A process that is killed on drop.
pub struct Killed(pub Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Lines of a `--access-log` file as JSON.
pub fn access_log(file: &Path) -> Vec<serde_json::Value> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// A node file for `--node`.
pub fn node(name: &str, namespace: &str, ip: &str, metadata: &[(&str, &str)]) -> String {
    let mut all: BTreeMap<&str, &str> = metadata.iter().copied().collect();
    all.insert("NAMESPACE", namespace);
    all.insert("INSTANCE_IPS", ip);
    let id = format!("sidecar~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local");
    serde_json::json!({"id": id, "metadata": all}).to_string()
}

/// Gives a folder to the proxy's own user.
pub fn give_to_proxy(dir: &Path) {
    let done = Command::new("chown").args(["-R", "1337:1337"]).arg(dir).status();
    assert!(done.expect("chown").success());
}

/// A copy of the binary that every user can run: build folders often lie below a closed home.
pub fn public_binary(dir: &Path) -> PathBuf {
    let copy = dir.join("istio-proxy");
    std::fs::copy(BINARY, &copy).expect("a copy of the binary");
    copy
}
