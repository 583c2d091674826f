//! The harness's command line; see `--help`.

use std::process::ExitCode;

use bench_harness::{app, bench, conformance, demo, soak};
use clap::{Parser, Subcommand};

/// Load, peers, the demo and the conformance runner of istio-proxy.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the guide's hybrid mesh in network namespaces and checks what it promises.
    Demo(demo::Args),
    /// Replays recordings of the real programs against the proxy's binary.
    Conformance(conformance::Args),
    /// Measures the proxy beside Envoy and HAProxy.
    Bench(bench::Args),
    /// Pushes, kills and rotations for minutes, under load.
    Soak(soak::Args),
    /// The bench's service.
    BenchBackend(bench::BackendArgs),
    /// The bench's load.
    BenchLoad(bench::LoadArgs),
    /// One end of a wire case, driven by lines of JSON.
    #[cfg(feature = "conformance")]
    Peer(bench_harness::wire::peer::Args),
    /// A small application to put behind a sidecar.
    App(app::Args),
    /// Sends bytes to a TCP server, prints what comes back.
    Tcp(app::TcpArgs),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Conformance(args) => conformance::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Soak(args) => soak::run(&args),
        Command::BenchBackend(args) => bench::backend(&args),
        Command::BenchLoad(args) => bench::load(&args),
        #[cfg(feature = "conformance")]
        Command::Peer(args) => bench_harness::wire::peer::run(&args),
        Command::App(args) => app::run(&args),
        Command::Tcp(args) => app::tcp(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
