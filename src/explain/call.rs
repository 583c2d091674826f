//! A call to explain, from flags or from JSON.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::tls::{Peer, SpiffeId};

/// An address that nobody has, for calls that do not say where to.
const NOBODY: IpAddr = IpAddr::V4(Ipv4Addr::new(1, 3, 3, 7));
/// A client that nothing is known of.
const UNKNOWN: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// Which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// From the local application.
    #[default]
    #[serde(alias = "")]
    Outbound,
    /// To the local application.
    Inbound,
}

/// What the client speaks inside TLS, or without it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.1.
    #[default]
    Http,
    /// HTTP/2.
    Http2,
    /// Other bytes.
    Tcp,
}

/// What the client wraps it in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[allow(clippy::enum_variant_names, reason = "the words of the command line")]
pub enum Tls {
    /// Nothing.
    #[default]
    #[serde(alias = "")]
    Plaintext,
    /// TLS without a client certificate.
    Tls,
    /// TLS with the mesh's client certificate.
    Mtls,
}

/// One call.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Call {
    /// Which way.
    #[serde(alias = "callMode")]
    pub mode: Mode,
    /// Original destination; one that nobody has when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Original destination port.
    pub port: u16,
    /// What is spoken.
    pub protocol: Protocol,
    /// In what.
    pub tls: Tls,
    /// Offered protocols, comma-separated; what such a client of a mesh offers when absent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub alpn: String,
    /// Server name; `host` for TLS when absent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sni: String,
    /// Host header.
    #[serde(alias = "hostHeader", skip_serializing_if = "String::is_empty")]
    pub host: String,
    /// Path with query; `/` when absent, and none for CONNECT.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Method; GET when absent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub method: String,
    /// Headers; a value or a list of values each.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, Values>,
    /// SPIFFE id of the client's certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    /// The client's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_ip: Option<IpAddr>,
    /// SDS name of the certificate that stands for the mesh's mTLS, `default` when absent.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mtls_secret_config_name: String,
}

/// One value or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Values {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Values {
    fn all(&self) -> &[String] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// Flags of `explain` that say one call.
#[derive(Debug, Clone, Args)]
pub struct CallArgs {
    /// Which way the call goes.
    #[arg(long, value_enum, default_value = "outbound")]
    mode: Mode,
    /// Destination address.
    #[arg(long, value_name = "IP")]
    address: Option<IpAddr>,
    /// Destination port.
    #[arg(long)]
    port: Option<u16>,
    /// What the client speaks.
    #[arg(long, value_enum, default_value = "http")]
    protocol: Protocol,
    /// What the client wraps it in.
    #[arg(long, value_enum, default_value = "plaintext")]
    tls: Tls,
    /// Protocols that the client offers, comma-separated.
    #[arg(long, default_value = "")]
    alpn: String,
    /// Server name that the client sends.
    #[arg(long, default_value = "")]
    sni: String,
    /// Host header.
    #[arg(long, default_value = "")]
    host: String,
    /// Path with query.
    #[arg(long, default_value = "/")]
    path: String,
    /// HTTP method.
    #[arg(long, default_value = "GET")]
    method: String,
    /// A header, as in 'x-user: jane'. May be repeated.
    #[arg(long, value_name = "NAME: VALUE")]
    header: Vec<String>,
    /// SPIFFE id of the client's certificate.
    #[arg(long, value_name = "SPIFFE_ID")]
    peer: Option<String>,
    /// The client's address.
    #[arg(long, value_name = "IP")]
    source_ip: Option<IpAddr>,
}

impl CallArgs {
    /// The calls of a file, or the one that the flags say.
    pub fn calls(&self, file: Option<&Path>) -> Result<Vec<Call>> {
        let Some(file) = file else { return Ok(vec![self.call()?]) };
        let text = if file == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input")?;
            text
        } else {
            std::fs::read_to_string(file).with_context(|| file.display().to_string())?
        };
        parse(&text).with_context(|| file.display().to_string())
    }

    fn call(&self) -> Result<Call> {
        let Some(port) = self.port else { bail!("which call? give --port (and more), or --calls FILE") };
        let mut headers: BTreeMap<String, Values> = BTreeMap::new();
        for line in &self.header {
            let (name, value) =
                line.split_once(':').with_context(|| format!("--header {line:?}: expected NAME: VALUE"))?;
            let values = headers.entry(name.trim().to_owned()).or_insert_with(|| Values::Many(Vec::new()));
            if let Values::Many(values) = values {
                values.push(value.trim().to_owned());
            }
        }
        let call = Call {
            mode: self.mode,
            address: self.address,
            port,
            protocol: self.protocol,
            tls: self.tls,
            alpn: self.alpn.clone(),
            sni: self.sni.clone(),
            host: self.host.clone(),
            path: self.path.clone(),
            method: self.method.clone(),
            headers,
            peer: self.peer.clone(),
            source_ip: self.source_ip,
            mtls_secret_config_name: String::new(),
        };
        call.check()?;
        Ok(call)
    }
}

/// Calls as JSON: objects one after another, arrays of them, each a call or `{"call": …}`.
pub fn parse(text: &str) -> Result<Vec<Call>> {
    let mut calls = Vec::new();
    for value in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
        let some = match value? {
            Value::Array(many) => many,
            one => vec![one],
        };
        for mut value in some {
            let said = value.get_mut("call").map(Value::take).unwrap_or(value);
            let nth = calls.len() + 1;
            let call: Call = serde_json::from_value(said).with_context(|| format!("call {nth}"))?;
            call.check().with_context(|| format!("call {nth}"))?;
            calls.push(call);
        }
    }
    Ok(calls)
}

impl Call {
    /// Whether everything in it can be asked.
    fn check(&self) -> Result<()> {
        self.method()?;
        self.header_map()?;
        self.tls_peer()?;
        Ok(())
    }

    /// Original destination.
    pub fn destination(&self) -> SocketAddr {
        SocketAddr::new(self.address.unwrap_or(NOBODY), self.port)
    }

    /// The client. Its port is not known.
    pub fn source(&self) -> SocketAddr {
        SocketAddr::new(self.source_ip.unwrap_or(UNKNOWN), 0)
    }

    /// Offered protocols of a TLS client.
    pub fn offered(&self) -> Vec<String> {
        let said = match (&*self.alpn, self.tls, self.protocol) {
            ("", Tls::Plaintext, _) | ("", Tls::Tls, Protocol::Tcp) => "",
            ("", Tls::Tls, Protocol::Http) => "http/1.1",
            ("", Tls::Tls, Protocol::Http2) => "h2",
            ("", Tls::Mtls, Protocol::Http) => "istio-http/1.1",
            ("", Tls::Mtls, Protocol::Http2) => "istio-h2",
            ("", Tls::Mtls, Protocol::Tcp) => "istio",
            (said, _, _) => said,
        };
        said.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
    }

    /// What the HTTP inspector finds in plaintext.
    pub fn sniffed(&self) -> Vec<String> {
        match self.protocol {
            Protocol::Http => vec!["http/1.1".to_owned()],
            Protocol::Http2 => vec!["h2c".to_owned()],
            Protocol::Tcp => Vec::new(),
        }
    }

    /// Server name of a TLS client; empty for none.
    pub fn server_name(&self) -> String {
        let said = if self.sni.is_empty() && self.tls == Tls::Tls { &self.host } else { &self.sni };
        said.to_ascii_lowercase()
    }

    /// Method.
    pub fn method(&self) -> Result<Method> {
        let said = if self.method.is_empty() { "GET" } else { &self.method };
        said.parse().with_context(|| format!("method {said:?}"))
    }

    /// Path with query. A CONNECT that says none has none.
    pub fn request_path(&self) -> &str {
        if self.path.is_empty() && self.method != "CONNECT" { "/" } else { &self.path }
    }

    /// Host with port, as sent: `host`, else a header of that name.
    pub fn authority(&self) -> &str {
        let header = || self.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("host"));
        match self.host.as_str() {
            "" => header().and_then(|(_, values)| values.all().first()).map_or("", String::as_str),
            host => host,
        }
    }

    /// Headers without host and pseudo-headers.
    pub fn header_map(&self) -> Result<HeaderMap> {
        let mut map = HeaderMap::new();
        for (name, values) in self.headers.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("host")) {
            let parsed: HeaderName = name.parse().with_context(|| format!("header {name:?}"))?;
            for value in values.all() {
                let value: HeaderValue = value.parse().with_context(|| format!("header {name:?}"))?;
                map.append(parsed.clone(), value);
            }
        }
        Ok(map)
    }

    /// What a handshake would tell about the client; `None` is plaintext.
    pub fn tls_peer(&self) -> Result<Option<Peer>> {
        if self.tls == Tls::Plaintext {
            return Ok(None);
        }
        let mut peer = Peer::default();
        if let Some(said) = &self.peer {
            let id: SpiffeId = said.parse().map_err(|e| anyhow::anyhow!("peer {said:?}: {e}"))?;
            peer.uri_sans.push(id.as_str().to_owned());
            peer.spiffe = Some(id);
        }
        peer.sni = Some(self.server_name()).filter(|sni| !sni.is_empty());
        Ok(Some(peer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_lines_and_wrapped_calls() {
        let one = r#"{"port": 80, "host": "a", "mode": "inbound"}"#;
        let wrapped = r#"{"call": {"port": 80, "hostHeader": "a", "callMode": "inbound"}, "expect": {"x": 1}}"#;
        for text in [format!("[{one}, {wrapped}]"), format!("{one}\n{wrapped}\n"), format!("[{one}] {wrapped}")] {
            let calls = parse(&text).unwrap();
            assert_eq!(calls.len(), 2, "{text}");
            assert_eq!(calls[0], calls[1]);
            assert_eq!(calls[0].mode, Mode::Inbound);
        }
    }

    #[test]
    fn what_is_not_said_is_what_a_mesh_client_does() {
        let call = |json: &str| parse(json).unwrap().remove(0);
        let mtls = call(r#"{"port": 1, "tls": "mtls", "protocol": "http2", "host": "a"}"#);
        assert_eq!((mtls.offered(), mtls.server_name()), (vec!["istio-h2".to_owned()], String::new()));
        let tls = call(r#"{"port": 1, "tls": "tls", "host": "A"}"#);
        assert_eq!((tls.offered(), tls.server_name()), (vec!["http/1.1".to_owned()], "a".to_owned()));
        let plain = call(r#"{"port": 1, "callMode": "", "headers": {"Host": ["b"]}}"#);
        assert!(plain.offered().is_empty() && plain.authority() == "b" && plain.header_map().unwrap().is_empty());
        assert_eq!(plain.request_path(), "/");
        assert_eq!(call(r#"{"port": 1, "method": "CONNECT", "host": "a:1"}"#).request_path(), "");
    }

    #[test]
    fn bad_calls_are_refused_by_number() {
        for (text, expected) in [
            (r#"{"port": 80}{"port": 70000}"#, "call 2"),
            (r#"{"port": 80, "tls": "ssl"}"#, "call 1"),
            (r#"{"port": 80, "tls": "mtls", "peer": "jane"}"#, "call 1"),
            (r#"{"port": 80, "headers": {"a b": "c"}}"#, "call 1"),
            (r#"{"port": 80"#, "EOF"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
