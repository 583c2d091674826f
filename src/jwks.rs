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
    use super::*;

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

    #[tokio::test]
    async fn link_local_addresses_are_refused() {
        for host in ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254"] {
            let refused = addresses(host, &Resolver::with_servers(&[])).await.unwrap_err();
            assert!(refused.contains("link-local"), "{refused}");
        }
    }
}
