//! The load: keep-alive connections in a closed loop, clear or with a client certificate, and the CPU time of the processes
//! under test between two marks.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;

use super::backend::find;
use crate::child::cpu_of;

const WARM: u8 = 0;
const MEASURE: u8 = 1;
const STOP: u8 = 2;
/// Longest latency told apart, microseconds.
const LONGEST_US: u64 = 60_000_000;

/// What a sidecar would ask for.
pub(super) const SERVER_NAME: &str = "outbound_.8080_._.payment.apps.svc.cluster.local";

/// Flags of `bench-load`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where to connect.
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(super) target: SocketAddr,
    /// Host header.
    #[arg(long)]
    pub(super) host: String,
    /// Connections, each with one request at a time.
    #[arg(long, default_value_t = 65)]
    pub(super) connections: usize,
    /// Seconds before anything counts.
    #[arg(long, default_value_t = 1.0)]
    warm: f64,
    /// Seconds that count.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Folder with cert-chain.pem and key.pem: mTLS.
    #[arg(long, value_name = "DIR")]
    certs: Option<PathBuf>,
    /// Process whose CPU time is read; may be repeated.
    #[arg(long)]
    pub(super) pid: Vec<u32>,
    /// Open the connections, be silent, and read memory instead.
    #[arg(long)]
    hold: bool,
    /// With --hold: without a request first.
    #[arg(long)]
    pub(super) mute: bool,
}

/// What was measured.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Measured {
    /// Answers with status 200.
    pub(super) requests: u64,
    /// Anything else.
    pub(super) errors: u64,
    /// Between the marks.
    pub(super) seconds: f64,
    /// CPU time of each process between the marks.
    pub(super) cpu_seconds: Vec<f64>,
    /// Latency.
    pub(super) p50_us: u64,
    /// Latency.
    pub(super) p99_us: u64,
}

/// Loads, prints `Measured` as JSON.
///
/// # Errors
/// Without a runtime or with certificates that cannot be read.
pub fn run(args: &Args) -> Result<ExitCode> {
    let tls = args.certs.as_deref().map(connector).transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if args.hold {
        println!("{}", serde_json::to_string(&runtime.block_on(super::idle::hold(args, tls))?)?);
        return Ok(ExitCode::SUCCESS);
    }
    let measured = runtime.block_on(measure(args, tls))?;
    println!("{}", serde_json::to_string(&measured)?);
    Ok(ExitCode::SUCCESS)
}

async fn measure(args: &Args, tls: Option<TlsConnector>) -> Result<Measured> {
    let phase = Arc::new(AtomicU8::new(WARM));
    let request = request(&args.host);
    let tasks: Vec<_> = (0..args.connections)
        .map(|_| tokio::spawn(client(args.target, tls.clone(), Arc::clone(&request), Arc::clone(&phase))))
        .collect();
    let cpu = || args.pid.iter().map(|pid| cpu_of(*pid).as_secs_f64()).collect::<Vec<_>>();
    tokio::time::sleep(Duration::from_secs_f64(args.warm)).await;
    let (before, start) = (cpu(), Instant::now());
    phase.store(MEASURE, Relaxed);
    tokio::time::sleep(Duration::from_secs_f64(args.seconds)).await;
    phase.store(STOP, Relaxed);
    let (seconds, after) = (start.elapsed().as_secs_f64(), cpu());
    let mut all = histogram()?;
    let mut errors = 0;
    for task in tasks {
        // A connection that hangs at the end has one request unanswered.
        match tokio::time::timeout(Duration::from_secs(5), task).await {
            Ok(outcome) => {
                let tally = outcome.context("a client task")??;
                all.add(&tally.latency).context("histograms of one make")?;
                errors += tally.errors;
            }
            Err(_) => errors += 1,
        }
    }
    let cpu_seconds = before.iter().zip(&after).map(|(before, after)| after - before).collect();
    let (p50_us, p99_us) = (all.value_at_quantile(0.5), all.value_at_quantile(0.99));
    Ok(Measured { requests: all.len(), errors, seconds, cpu_seconds, p50_us, p99_us })
}

/// About 330 bytes with eight headers, as a browser of modest manners sends.
pub(super) fn request(host: &str) -> Arc<Vec<u8>> {
    let said = format!(
        "GET /api/v2/orders/17?page=2 HTTP/1.1\r\nhost: {host}\r\nuser-agent: bench-harness/1.0 (x86_64; linux)\r\n\
         accept: application/json, text/plain, */*\r\naccept-language: en-GB,en;q=0.8\r\nx-tenant: bench\r\n\
         x-trace-hint: 5c1f6a2e9d7b4830a1c2e3f405162738\r\ncookie: session=0123456789abcdef0123456789abcdef\r\n\
         cache-control: no-cache\r\n\r\n"
    );
    Arc::new(said.into_bytes())
}

struct Tally {
    latency: Histogram<u64>,
    errors: u64,
}

fn histogram() -> Result<Histogram<u64>> {
    Histogram::new_with_bounds(1, LONGEST_US, 2).context("bounds of a histogram")
}

/// One connection after the other, each as long as it lasts.
async fn client(
    target: SocketAddr,
    tls: Option<TlsConnector>,
    request: Arc<Vec<u8>>,
    phase: Arc<AtomicU8>,
) -> Result<Tally> {
    let mut tally = Tally { latency: histogram()?, errors: 0 };
    while phase.load(Relaxed) != STOP {
        if let Err(error) = connection(target, tls.as_ref(), &request, &phase, &mut tally).await {
            if tally.errors == 0 {
                eprintln!("{error:#}");
            }
            tally.errors += 1;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(tally)
}

async fn connection(
    target: SocketAddr,
    tls: Option<&TlsConnector>,
    request: &[u8],
    phase: &AtomicU8,
    tally: &mut Tally,
) -> Result<()> {
    let socket = TcpStream::connect(target).await?;
    socket.set_nodelay(true)?;
    let Some(tls) = tls else { return exchange(socket, request, phase, tally).await };
    let name = ServerName::try_from(SERVER_NAME)?;
    exchange(tls.connect(name, socket).await?, request, phase, tally).await
}

async fn exchange<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S,
    request: &[u8],
    phase: &AtomicU8,
    tally: &mut Tally,
) -> Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let before = phase.load(Relaxed);
        if before == STOP {
            return Ok(());
        }
        let start = Instant::now();
        stream.write_all(request).await?;
        stream.flush().await?;
        let status = answer(&mut stream, &mut buffer).await?;
        if before == MEASURE && phase.load(Relaxed) == MEASURE {
            if status == 200 {
                tally.latency.saturating_record(u64::try_from(start.elapsed().as_micros()).unwrap_or(LONGEST_US));
            } else {
                tally.errors += 1;
            }
        }
    }
}

/// Reads one answer; its status.
pub(super) async fn answer<S: AsyncRead + Unpin>(stream: &mut S, buffer: &mut [u8]) -> Result<u16> {
    let mut filled = 0;
    let mut whole = None;
    loop {
        let read = stream.read(&mut buffer[filled..]).await?;
        if read == 0 {
            bail!("the connection ended inside an answer");
        }
        filled += read;
        if whole.is_none()
            && let Some(end) = find(&buffer[..filled], b"\r\n\r\n")
        {
            let head = std::str::from_utf8(&buffer[..end])?;
            let length = head.lines().filter_map(|line| line.split_once(':'));
            let length = length.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
            let length: usize = length.map(|(_, value)| value.trim().parse()).next().context("no content-length")??;
            let status = head.split(' ').nth(1).context("no status")?.parse()?;
            whole = Some((end + 4 + length, status));
        }
        match whole {
            Some((length, status)) if filled >= length => return Ok(status),
            _ if filled == buffer.len() => bail!("an answer longer than {} bytes", buffer.len()),
            _ => {}
        }
    }
}

/// A client with a certificate that believes whoever answers: what it costs to verify is not ours to measure here.
fn connector(certs: &Path) -> Result<TlsConnector> {
    let chain: Vec<_> = CertificateDer::pem_file_iter(certs.join("cert-chain.pem"))?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(certs.join("key.pem"))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(Anyone(Arc::clone(&provider)));
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = builder.dangerous().with_custom_certificate_verifier(verifier);
    let mut config = builder.with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![b"istio-http/1.1".to_vec(), b"istio".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
