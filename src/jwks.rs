//! Keys by URI: one question to whoever publishes them.
//!
//! What is asked is what configuration says and nothing else: redirects are not followed, an answer has a size and a time
//! limit, a discovery document does not lead from https to http, and link-local addresses (where clouds keep their
//! secrets) are refused. When to ask, and what an answer changes, is `control`'s affair.
//!
//! ```ignore
//! let ask = Ask { uri: "https://issuer.example/keys", limit: Duration::from_secs(5), roots: SYSTEM_ROOTS, way: Way::Straight };
//! let text = jwks::fetch(&ask, &Resolver::system()).await?;
//! ```

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use proxy_config::model::{CommonTls, UpstreamTls, Validation};
use tokio::time::timeout;

use crate::dns::{Family, Resolver};
use crate::net::{Stream, Target, connect};
use crate::tls::{self, ClientTls, Secrets};

/// The operating system's roots, as an SDS name.
pub const SYSTEM_ROOTS: &str = "file-root:system";
/// Bytes of an answer; a set of keys has a few thousand.
const LONGEST_ANSWER: usize = 1 << 20;
/// How OpenID providers name the document that leads to the keys.
const DISCOVERY: &str = "/.well-known/openid-configuration";

/// A question.
#[derive(Debug)]
pub struct Ask<'a> {
    /// Where the keys are; `…/.well-known/openid-configuration` says where they are.
    pub uri: &'a str,
    /// Limit on the whole.
    pub limit: Duration,
    /// SDS name (`file-root:…`) of the roots that an https server is checked by.
    pub roots: &'a str,
    /// How to get there.
    pub way: Way,
}

/// How to get to a server.
#[derive(Debug)]
pub enum Way {
    /// By the host's name or address.
    Straight,
    /// By the endpoints of a cluster, whatever the host's name; tried in order.
    Cluster(Vec<Door>),
}

/// One endpoint of a cluster.
#[derive(Debug)]
pub struct Door {
    /// Where.
    pub address: SocketAddr,
    /// TLS, with the server name to ask for; `None` is plaintext.
    pub tls: Option<(ClientTls, String)>,
}

/// The host of a URI; empty when there is none.
pub fn host(uri: &str) -> String {
    uri.parse::<Uri>().ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default()
}

/// Asks. The answer is a JSON text; what it is worth is for others to say.
///
/// # Errors
/// Why there is no answer, for people.
pub async fn fetch(ask: &Ask<'_>, resolver: &Resolver) -> Result<String, String> {
    match timeout(ask.limit, Box::pin(asked(ask, resolver))).await {
        Ok(answer) => answer,
        Err(_) => Err(format!("no answer within {:?}", ask.limit)),
    }
}

async fn asked(ask: &Ask<'_>, resolver: &Resolver) -> Result<String, String> {
    let uri = parsed(ask.uri)?;
    let text = get(ask, &uri, resolver).await?;
    if !matches!(ask.way, Way::Straight) || !uri.path().ends_with(DISCOVERY) {
        return Ok(text);
    }
    let next = keys_of_discovery(&uri, &text)?;
    get(ask, &next, resolver).await.map_err(|why| format!("{next}: {why}"))
}

fn parsed(text: &str) -> Result<Uri, String> {
    let uri: Uri = text.parse().map_err(|e| format!("{text:?} is no URI: {e}"))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http" | "https"), Some(host)) if !host.is_empty() => Ok(uri),
        _ => Err(format!("{text:?}: http or https with a host is expected")),
    }
}

/// Where an OpenID provider has its keys.
fn keys_of_discovery(from: &Uri, text: &str) -> Result<Uri, String> {
    let document: serde_json::Value = serde_json::from_str(text).map_err(|e| format!("the answer is no JSON: {e}"))?;
    let said = document.get("jwks_uri").and_then(|uri| uri.as_str()).ok_or("the answer has no jwks_uri")?;
    let uri = parsed(said)?;
    if from.scheme_str() == Some("https") && uri.scheme_str() != Some("https") {
        return Err(format!("jwks_uri {said:?} is not https"));
    }
    Ok(uri)
}

async fn get(ask: &Ask<'_>, uri: &Uri, resolver: &Resolver) -> Result<String, String> {
    let stream = match &ask.way {
        Way::Straight => straight(uri, ask.roots, resolver).await?,
        Way::Cluster(doors) => first_open(doors).await?,
    };
    exchange(stream, uri).await
}

async fn straight(uri: &Uri, roots: &str, resolver: &Resolver) -> Result<Stream, String> {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let https = uri.scheme_str() == Some("https");
    let port = uri.port_u16().unwrap_or(if https { 443 } else { 80 });
    let stream = dial(&addresses(host, resolver).await?, port).await?;
    if !https {
        return Ok(stream);
    }
    let secrets = Secrets::new().with_files(roots)?;
    let validation = Validation { roots: Some(roots.into()), ..Validation::default() };
    let said = UpstreamTls {
        common: CommonTls { validation: Some(validation), ..CommonTls::default() },
        auto_sni_san_validation: true,
        ..UpstreamTls::default()
    };
    let context = ClientTls::compile(&said, &secrets)?;
    let opened = tls::connect(stream, &context, host, &["http/1.1".to_owned()]).await;
    Ok(opened.map_err(|e| e.to_string())?.0)
}

async fn addresses(host: &str, resolver: &Resolver) -> Result<Vec<IpAddr>, String> {
    let found = match host.parse::<IpAddr>() {
        Ok(ip) => vec![ip],
        Err(_) => resolver.addresses(host, Family::All).await.map_err(|e| e.to_string())?.addresses,
    };
    if let Some(ip) = found.iter().find(|ip| is_link_local(**ip)) {
        return Err(format!("{host} is {ip}, a link-local address, which is not asked for keys"));
    }
    Ok(found)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

async fn dial(addresses: &[IpAddr], port: u16) -> Result<Stream, String> {
    let mut why = "the name has no address".to_owned();
    for ip in addresses {
        let address = SocketAddr::new(*ip, port);
        match connect(&Target::new(address)).await {
            Ok(tcp) => return Ok(tcp.into()),
            Err(e) => why = format!("{address}: {e}"),
        }
    }
    Err(why)
}

async fn first_open(doors: &[Door]) -> Result<Stream, String> {
    let mut why = "the cluster has no endpoint".to_owned();
    for door in doors {
        match open(door).await {
            Ok(stream) => return Ok(stream),
            Err(e) => why = format!("{}: {e}", door.address),
        }
    }
    Err(why)
}

async fn open(door: &Door) -> Result<Stream, String> {
    let stream: Stream = connect(&Target::new(door.address)).await.map_err(|e| e.to_string())?.into();
    let Some((context, name)) = &door.tls else { return Ok(stream) };
    let opened = tls::connect(stream, context, name, context.alpn()).await;
    Ok(opened.map_err(|e| e.to_string())?.0)
}

async fn exchange(stream: Stream, uri: &Uri) -> Result<String, String> {
    let request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()))
        .header(header::HOST, uri.authority().map_or("", |authority| authority.as_str()))
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, "istio-proxy")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|e| e.to_string())?;
    let text = |e: hyper::Error| e.to_string();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(text)?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(text)?;
        let status = response.status();
        if status.is_redirection() {
            return Err(format!("the answer is {status}; redirects are not followed"));
        }
        if status != http::StatusCode::OK {
            return Err(format!("the answer is {status}"));
        }
        let body = Limited::new(response.into_body(), LONGEST_ANSWER).collect().await.map_err(|e| e.to_string())?;
        String::from_utf8(body.to_bytes().into()).map_err(|_| "the answer is no UTF-8".to_owned())
    };
    let mut answer = pin!(answer);
    // The connection has to be driven until the body is there; when it ends first, it has delivered everything.
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        _ = connection => answer.await,
    }
}

#[cfg(test)]
mod tests {
    use proxy_config::model::DownstreamTls;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;
    use crate::tls::{Identity, ServerTls};

    #[test]
    fn discovery_stays_on_https() {
        let of = |from: &str, said: &str| {
            let text = format!("{{\"jwks_uri\": \"{said}\"}}");
            keys_of_discovery(&from.parse().unwrap(), &text).map(|uri| uri.to_string())
        };
        assert_eq!(of("https://i/x", "https://k/keys"), Ok("https://k/keys".to_owned()));
        assert_eq!(of("http://i/x", "http://k/keys"), Ok("http://k/keys".to_owned()));
        assert!(of("https://i/x", "http://k/keys").unwrap_err().contains("not https"));
        assert!(of("http://i/x", "file:///etc/passwd").is_err() && keys_of_discovery(&Uri::default(), "{}").is_err());
        for bad in ["", "/a", "ftp://a", "http://", "a b"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
    }

    /// Answers every connection with these bytes; over TLS when there is a certificate.
    async fn server(answer: String, tls: Option<ServerTls>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let mut stream = Stream::from(socket);
                if let Some(tls) = &tls {
                    let Ok((opened, _)) = tls::accept(stream, tls, tls::HANDSHAKE_LIMIT).await else { continue };
                    stream = opened;
                }
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") && stream.read_buf(&mut head).await.is_ok_and(|n| n > 0) {}
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        address
    }

    async fn asked_of(uri: &str, roots: &str) -> Result<String, String> {
        let ask = Ask { uri, limit: Duration::from_secs(20), roots, way: Way::Straight };
        fetch(&ask, &Resolver::with_servers(&[])).await
    }

    #[tokio::test]
    async fn answers_that_are_none() {
        let large = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(LONGEST_ANSWER + 1));
        for (answer, expected) in [
            ("HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1/\r\n\r\n", "redirects are not followed"),
            ("HTTP/1.1 404 Not Found\r\n\r\n", "the answer is 404"),
            (&*large, "limit"),
            ("nonsense\r\n\r\n", "invalid HTTP"),
            ("", "closed"),
        ] {
            let address = server(answer.to_owned(), None).await;
            let why = asked_of(&format!("http://{address}/"), SYSTEM_ROOTS).await.unwrap_err();
            assert!(why.contains(expected), "{expected}: {why}");
        }
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}/", silent.local_addr().unwrap());
        let ask = Ask { uri: &uri, limit: Duration::from_millis(20), roots: SYSTEM_ROOTS, way: Way::Straight };
        assert!(fetch(&ask, &Resolver::with_servers(&[])).await.unwrap_err().contains("no answer within"));
    }

    #[tokio::test]
    async fn https_servers_are_known_by_their_roots_and_names() {
        let certificate = |name: &str| {
            let key = rcgen::KeyPair::generate().unwrap();
            let said = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
            let certificate = said.self_signed(&key).unwrap();
            let identity = Identity::from_pem(certificate.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap();
            (certificate.pem(), Secrets::new().with_identity("default", identity))
        };
        let dir = tempfile::tempdir().unwrap();
        let serving = async |name: &str| {
            let (pem, secrets) = certificate(name);
            let file = dir.path().join(name);
            std::fs::write(&file, pem).unwrap();
            let common = CommonTls { certificates: vec!["default".into()], ..CommonTls::default() };
            let said = DownstreamTls { common, ..DownstreamTls::default() };
            let tls = ServerTls::compile(&said, &secrets, name).unwrap();
            let address = server("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}".to_owned(), Some(tls)).await;
            (format!("https://{address}/"), format!("file-root:{}", file.display()))
        };
        let (uri, roots) = serving("127.0.0.1").await;
        let (elsewhere, other_roots) = serving("127.0.0.2").await;
        assert_eq!(asked_of(&uri, &roots).await, Ok("{}".to_owned()));
        let why = asked_of(&uri, &other_roots).await.unwrap_err();
        assert!(why.contains("certificate"), "a stranger: {why}");
        let why = asked_of(&elsewhere, &other_roots).await.unwrap_err();
        assert!(why.contains("identity"), "another name: {why}");
        assert!(asked_of(&uri, "file-root:/nowhere").await.is_err());
    }

    #[tokio::test]
    async fn link_local_addresses_are_refused() {
        for host in ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254"] {
            let refused = addresses(host, &Resolver::with_servers(&[])).await.unwrap_err();
            assert!(refused.contains("link-local"), "{refused}");
        }
    }
}
