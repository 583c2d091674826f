//! A host of the world behind TLS, reached by its name through a sidecar: captured, routed by the Host header, looked up
//! by the proxy, encrypted on the way. The world's addresses change while it serves.

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use hickory_resolver::proto::op::{Message, MessageType, OpCode, ResponseCode};
use hickory_resolver::proto::rr::{RData, Record};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use support::{
    Killed, LIMIT, Machine, Machines, Proxy, certificates, curl, folder, give_to_proxy, privileged, public_binary,
    replace, wait_for,
};

const CLIENT: &str = "10.79.0.1";
const WORLD: [&str; 2] = ["10.79.0.8", "10.79.0.9"];
const WORLDS_ID: &str = "spiffe://cluster.local/ns/world/sa/api";
const ORDER: &str = "ISTIO_PROXY_TEST_WORLD";

fn objects(dir: &Path) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: client-1, namespace: shop, labels: {{app: client}}}}
status: {{phase: Running, podIP: {CLIENT}}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: api, namespace: shop}}
spec:
  hosts: [api.example.com]
  location: MESH_EXTERNAL
  resolution: DNS
  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: 443}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: api, namespace: shop}}
spec:
  host: api.example.com
  trafficPolicy:
    tls: {{mode: SIMPLE, sni: api.example.com, caCertificates: {}, subjectAltNames: ['{WORLDS_ID}']}}
",
        dir.join("world/root-cert.pem").display()
    )
}

/// The world's process; nothing in a normal run. `dns FILE`: a resolver that answers as the file says now: addresses of
/// `api.example.com`, one a line, or a response code. `tls ADDRESS FOLDER`: a TLS server that says its address and the
/// server name it was asked for.
#[test]
fn application() {
    let Ok(order) = std::env::var(ORDER) else { return };
    match order.split(' ').collect::<Vec<_>>()[..] {
        ["dns", address, file] => answer_names(address, Path::new(file)),
        ["tls", address, dir] => answer_tls(address, Path::new(dir)),
        _ => panic!("{order}"),
    }
}

fn answer_names(address: &str, file: &Path) {
    let socket = UdpSocket::bind((address, 53)).expect("port 53");
    let mut buffer = [0; 1500];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        let asked = Message::from_vec(&buffer[..length]).expect("a query");
        let query = asked.queries[0].clone();
        let mut out = Message::new(asked.metadata.id, MessageType::Response, OpCode::Query);
        let text = std::fs::read_to_string(file).expect("the file of answers");
        match text.trim() {
            "SERVFAIL" => out.metadata.response_code = ResponseCode::ServFail,
            "NXDOMAIN" => out.metadata.response_code = ResponseCode::NXDomain,
            addresses => {
                for ip in addresses.lines().filter_map(|ip| ip.parse::<IpAddr>().ok()) {
                    let record = Record::from_rdata(query.name().clone(), 1, RData::from(ip));
                    if record.record_type() == query.query_type() {
                        out.add_answer(record);
                    }
                }
            }
        }
        out.add_query(query);
        socket.send_to(&out.to_vec().expect("a message"), from).expect("an answer");
    }
}

fn answer_tls(address: &str, dir: &Path) {
    let chain = CertificateDer::pem_file_iter(dir.join("cert-chain.pem")).expect("a chain");
    let chain = chain.collect::<Result<Vec<_>, _>>().expect("certificates");
    let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).expect("a key");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.expect("versions").with_no_client_auth().with_single_cert(chain, key).expect("a certificate");
    let config = Arc::new(config);
    let listener = TcpListener::bind((address, 443)).expect("port 443");
    for stream in listener.incoming().map_while(Result::ok) {
        let (config, address) = (Arc::clone(&config), address.to_owned());
        std::thread::spawn(move || {
            let connection = rustls::ServerConnection::new(config).expect("a connection");
            let mut stream = rustls::StreamOwned::new(connection, stream);
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
                head.push(byte[0]);
            }
            let body = format!("{address} {}", stream.conn.server_name().unwrap_or("-"));
            // One answer for each connection, so that every request says where the next one goes.
            let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", body.len());
            let _ = stream.write_all(format!("{head}{body}").as_bytes());
            stream.conn.send_close_notify();
            let _ = stream.flush();
        });
    }
}

fn start(machine: &Machine, order: &str) -> Killed {
    let own = std::env::current_exe().expect("our path");
    let mut command = machine.command(&own.to_string_lossy());
    command.args(["--exact", "application", "--nocapture"]).env(ORDER, order);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Killed(command.spawn().expect("it starts"))
}

struct World {
    client: Machine,
    // Processes go before their namespaces.
    proxy: Proxy,
    _others: Vec<Killed>,
    _machines: Machines,
    answers: PathBuf,
    _dir: tempfile::TempDir,
}

impl World {
    fn start() -> Self {
        let dir = folder(&[("answers", WORLD[0]), ("mesh", "dnsRefreshRate: 1s\n")]);
        let config = dir.path().join("config");
        std::fs::create_dir(&config).expect("a folder");
        std::fs::write(config.join("objects.yaml"), objects(dir.path())).expect("a file");
        certificates(dir.path(), &[("client", "spiffe://cluster.local/ns/shop/sa/client"), ("world", WORLDS_ID)]);
        let (binary, answers) = (public_binary(dir.path()), dir.path().join("answers"));
        give_to_proxy(dir.path());
        let mut machines = Machines::new(&format!("names-{}", std::process::id())).expect("namespaces");
        let client = machines.space("client", &[&format!("{CLIENT}/8")]).expect("a namespace");
        let world = machines.space("world", &WORLD.map(|ip| format!("{ip}/8")).each_ref().map(|s| &**s));
        let world = world.expect("a namespace");
        client.resolver(WORLD[0]).expect("a file");
        let certs = dir.path().join("world");
        let tls = WORLD.map(|ip| format!("tls {ip} {}", certs.display()));
        let orders = tls.into_iter().chain([format!("dns {} {}", WORLD[0], answers.display())]);
        let others: Vec<Killed> = orders.map(|order| start(&world, &order)).collect();
        let sockets = || world.command("ss").args(["-Hltun"]).output().expect("ss").stdout;
        let open = |of: &str| String::from_utf8_lossy(&sockets()).contains(of);
        for socket in [format!("{}:443", WORLD[0]), format!("{}:443", WORLD[1]), format!("{}:53", WORLD[0])] {
            wait_for("the world", LIMIT, || open(&socket)).expect("it listens");
        }
        let rules = client.command(&binary.to_string_lossy()).args(["istio-iptables", "-i", "*", "-b", "*"]).output();
        assert!(rules.expect("it runs").status.success());
        let mut command = client.command_as_proxy(&binary.to_string_lossy());
        command.args(["proxy", "--concurrency", "1", "--config"]).arg(&config);
        command.arg("--mesh").arg(dir.path().join("mesh")).arg("--certs").arg(dir.path().join("client"));
        command.env("POD_NAMESPACE", "shop").env("POD_NAME", "client-1").env("INSTANCE_IP", CLIENT);
        let proxy = Proxy::start(command);
        Self { client, proxy, _others: others, _machines: machines, answers, _dir: dir }
    }

    /// What the host says; its address is not the one that the client finds.
    fn get(&self) -> (u16, String) {
        curl(&self.client, &["-H", "host: api.example.com", "http://10.79.0.250/"])
    }

    fn names_are(&self, answer: &str) {
        replace(&self.answers, answer);
    }
}

#[test]
fn hosts_of_the_world_are_reached_by_name_over_tls() {
    if !privileged("hosts_of_the_world_are_reached_by_name_over_tls") {
        return;
    }
    let mut world = World::start();
    let at = |ip: &str| (200, format!("{ip} api.example.com"));
    assert_eq!(world.get(), at(WORLD[0]), "the first answer is there before anybody is served");

    world.names_are(WORLD[1]);
    wait_for("the new address", LIMIT, || world.get() == at(WORLD[1]))
        .unwrap_or_else(|e| panic!("{e}: {:?}", world.get()));

    world.names_are("SERVFAIL");
    world.proxy.wait_for_line("what was known stays");
    assert_eq!(world.get(), at(WORLD[1]));

    world.names_are(&WORLD.join("\n"));
    let mut both = [false; 2];
    wait_for("both addresses", LIMIT, || {
        let seen = world.get();
        WORLD.iter().zip(&mut both).for_each(|(ip, met)| *met |= seen == at(ip));
        both == [true; 2]
    })
    .expect("every address is used");

    world.names_are("NXDOMAIN");
    wait_for("the end of the name", LIMIT, || world.get().0 == 503).expect("it has no host");
}
