//! The two handshakes.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::Acceptor;
use rustls::{CommonState, HandshakeKind, ProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::{LazyConfigAcceptor, TlsConnector};

use super::config::{ClientTls, ServerTls};
use super::peer::Peer;
use super::verify::{NameMismatch, PeerVerifier, Role};
use crate::net::Stream;

/// How long a peer may take for its handshake when configuration does not say.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(15);
/// How long a refused peer may take to read its alert before the connection is reset under it.
const FAREWELL: Duration = Duration::from_secs(1);
/// Bytes of a refused peer that are read away, so that the kernel does not answer them with a reset.
const FAREWELL_BYTES: usize = 64 * 1024;

/// Why a handshake failed.
#[derive(Debug)]
pub enum TlsError {
    /// It took too long.
    Timeout,
    /// The transport failed or ended.
    Io(io::Error),
    /// The peer's certificate is not acceptable: chain, dates, usage.
    Certificate(String),
    /// The certificate is sound and speaks of somebody else.
    Identity(String),
    /// Anything else that TLS refuses: no shared version, an alert from the peer, bytes that are no TLS.
    Protocol(String),
}

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout => f.write_str("TLS handshake timeout"),
            Self::Io(e) => write!(f, "TLS handshake: {e}"),
            Self::Certificate(why) => write!(f, "TLS certificate: {why}"),
            Self::Identity(why) => write!(f, "TLS peer identity: {why}"),
            Self::Protocol(why) => write!(f, "TLS: {why}"),
        }
    }
}

impl std::error::Error for TlsError {}

impl From<io::Error> for TlsError {
    fn from(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => tls.into(),
            None => Self::Io(error),
        }
    }
}

impl From<&rustls::Error> for TlsError {
    fn from(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(rustls::CertificateError::Other(other)) => {
                match other.0.downcast_ref::<NameMismatch>() {
                    Some(mismatch) => Self::Identity(mismatch.0.clone()),
                    None => Self::Certificate(other.0.to_string()),
                }
            }
            rustls::Error::InvalidCertificate(why) => Self::Certificate(why.to_string()),
            rustls::Error::NoCertificatesPresented => Self::Certificate("the peer presented none".to_owned()),
            other => Self::Protocol(other.to_string()),
        }
    }
}

/// Serves a handshake. When it fails the peer has been sent its alert and given a moment to read it.
pub async fn accept(stream: Stream, tls: &ServerTls, limit: Duration) -> Result<(Stream, Arc<Peer>), TlsError> {
    let deadline = Instant::now() + limit;
    let mut hello = Box::pin(LazyConfigAcceptor::new(Acceptor::default(), stream));
    let start = match timeout_at(deadline, hello.as_mut()).await {
        Err(_) => return Err(TlsError::Timeout),
        Ok(Ok(start)) => start,
        Ok(Err(error)) => {
            if let Some(stream) = hello.take_io() {
                say_farewell(stream).await;
            }
            return Err(error.into());
        }
    };
    let config = tls.for_offer(start.client_hello().alpn().into_iter().flatten());
    let handshake = Box::pin(start.into_stream(config).into_fallible());
    let stream = match timeout_at(deadline, handshake).await {
        Err(_) => return Err(TlsError::Timeout),
        Ok(Ok(stream)) => stream,
        Ok(Err((error, stream))) => {
            say_farewell(stream).await;
            return Err(error.into());
        }
    };
    let connection = stream.get_ref().1;
    let mut peer = peer_of(connection)?;
    peer.sni = connection.server_name().map(str::to_owned);
    if let Some(verifier) = tls.verifier() {
        recheck(connection, verifier, Role::Client)?;
    }
    Ok((Stream::ServerTls(Box::new(stream)), tls.share(peer)))
}

/// Asks for a handshake, offering exactly these protocols. An empty server name sends none.
pub async fn connect(
    stream: Stream,
    tls: &ClientTls,
    sni: &str,
    alpn: &[String],
) -> Result<(Stream, Arc<Peer>), TlsError> {
    let name = server_name(sni);
    let handshake = TlsConnector::from(tls.for_alpn(alpn)).connect(name.clone(), stream);
    let stream = match timeout(HANDSHAKE_LIMIT, Box::pin(handshake)).await {
        Err(_) => return Err(TlsError::Timeout),
        Ok(result) => result?,
    };
    let connection = stream.get_ref().1;
    let mut peer = peer_of(connection)?;
    peer.sni = (!sni.is_empty()).then(|| sni.to_owned());
    recheck(connection, tls.verifier(), Role::Server(&name))?;
    Ok((Stream::ClientTls(Box::new(stream)), Arc::new(peer)))
}

/// The name for the ClientHello. An address is never sent, so it stands for "no name".
fn server_name(sni: &str) -> ServerName<'static> {
    ServerName::try_from(sni.to_owned()).unwrap_or_else(|_| ServerName::from(std::net::IpAddr::from([0; 4])))
}

fn peer_of(connection: &CommonState) -> Result<Peer, TlsError> {
    let leaf = connection.peer_certificates().and_then(<[CertificateDer<'_>]>::first);
    let mut peer = match leaf {
        Some(leaf) => Peer::from_certificate(leaf).map_err(TlsError::Certificate)?,
        None => Peer::default(),
    };
    peer.alpn = connection.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned());
    peer.tls_version = match connection.protocol_version() {
        Some(ProtocolVersion::TLSv1_2) => "TLSv1.2",
        _ => "TLSv1.3",
    };
    peer.cipher = connection.negotiated_cipher_suite().map(|s| format!("{:?}", s.suite())).unwrap_or_default();
    peer.resumed = connection.handshake_kind() == Some(HandshakeKind::Resumed);
    Ok(peer)
}

/// A resumed session brings the certificate of an earlier handshake. It may have expired since, or trust and rules may
/// have changed, so it is checked as if it were presented now.
fn recheck(connection: &CommonState, verifier: &PeerVerifier, role: Role<'_>) -> Result<(), TlsError> {
    if connection.handshake_kind() != Some(HandshakeKind::Resumed) {
        return Ok(());
    }
    let Some([leaf, intermediates @ ..]) = connection.peer_certificates() else {
        let refused = verifier.mandatory.then(|| TlsError::Certificate("the resumed session has none".to_owned()));
        return refused.map_or(Ok(()), Err);
    };
    verifier.check(leaf, intermediates, role, UnixTime::now()).map_err(|e| TlsError::from(&e))
}

/// Ends our side and reads the rest away for a moment: closing with unread bytes makes the kernel send a reset, which
/// can overtake the alert that tells the peer what is wrong.
async fn say_farewell(mut stream: Stream) {
    let goodbye = async {
        stream.shutdown().await?;
        let mut rest = [0; 1024];
        let mut total = 0;
        while total < FAREWELL_BYTES {
            match stream.read(&mut rest).await? {
                0 => break,
                n => total += n,
            }
        }
        Ok::<_, io::Error>(())
    };
    // Whatever comes of it, the connection is over.
    let _ = timeout(FAREWELL, goodbye).await;
}
