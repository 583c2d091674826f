//! `make bench`: CPU for a request, latency and memory beside Envoy and HAProxy in the same run.

mod backend;
mod case;
mod envoy;
mod haproxy;
mod idle;
mod load;
mod mesh;
mod own;
mod rig;
mod scale;
mod table;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

pub use backend::{Args as BackendArgs, run as backend};
pub use load::{Args as LoadArgs, run as load};

use case::{CASES, Case};
use rig::{Peer, Programs, Rig, Run};

/// Flags of `bench`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The proxy's binary, a release build.
    #[arg(long, value_name = "FILE")]
    proxy: PathBuf,
    /// Envoy: its binary, or the launcher of its Python package.
    #[arg(long, value_name = "FILE", default_value = crate::envoy::LAUNCHER)]
    envoy: PathBuf,
    /// Only cases whose name contains this; may be repeated.
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// Only these, of direct, envoy, haproxy, istioproxy; may be repeated.
    #[arg(long, value_name = "NAME")]
    peer: Vec<String>,
    /// Runs of each proxy in a case; every second round goes backwards.
    #[arg(long, default_value_t = 4)]
    rounds: u32,
    /// Seconds of a run that count, after one of warm-up.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Connections of the load, each with one request at a time.
    #[arg(long, default_value_t = 65)]
    connections: usize,
    /// Silent connections that are held to see what each takes (cases idle-mute, idle-clear, idle-mtls).
    #[arg(long, default_value_t = 10_000)]
    idle: usize,
    /// Services of the meshes of the case `scale`; may be repeated.
    #[arg(long, value_name = "N", default_values_t = [1_000, 5_000])]
    services: Vec<usize>,
    /// A folder of recorded responses that the case `scale` serves too (ours only).
    #[arg(long, value_name = "DIR")]
    recording: Option<PathBuf>,
    /// Every run as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Exit code 1 when ours costs more than half of Envoy in a case, takes more than 15 MB without configuration, 6 kB for a
    /// silent connection or 14 kB for one with mutual TLS, or more than a fifth of Envoy's memory or time with a large mesh.
    #[arg(long)]
    check: bool,
}

/// Measures, prints the table.
///
/// # Errors
/// When something cannot be started or answers wrongly.
pub fn run(args: &Args) -> Result<ExitCode> {
    let programs = Programs {
        proxy: args.proxy.clone(),
        envoy: crate::envoy::binary(&args.envoy)?,
        seconds: args.seconds,
        connections: args.connections,
    };
    let mut runs = Vec::new();
    for case in CASES.iter().filter(|case| wanted(&args.case, case.name)) {
        measure(case, &programs, args, &mut runs)?;
    }
    let held = hold(&programs, args)?;
    let scaled = grow(&programs, args)?;
    ensure!(!runs.is_empty() || !held.is_empty() || !scaled.is_empty(), "no case of that name");
    // A large mesh alone needs no namespaces.
    let only_scaled = runs.is_empty() && held.is_empty();
    let rss = if only_scaled { None } else { Some(Rig::new(&CASES[0], &programs)?.rss_empty()?) };
    let rows = table::rows(&runs);
    print!("{}{}{}", table::text(&rows), idle::text(&held), scale::text(&scaled));
    if let Some(rss) = rss {
        println!("RSS empty: {:.1} MB", table::megabytes(rss));
    }
    if let Some(file) = &args.json {
        let all =
            serde_json::json!({"rss_empty_bytes": rss, "rows": rows, "runs": runs, "idle": held, "scale": scaled});
        fs::write(file, serde_json::to_vec_pretty(&all)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    let mut missed = table::missed(&rows, rss.unwrap_or(0));
    missed.extend(idle::missed(&held));
    missed.extend(scale::missed(&scaled));
    for line in &missed {
        println!("missed: {line}");
    }
    Ok(if args.check && !missed.is_empty() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn measure(case: &Case, programs: &Programs, args: &Args, runs: &mut Vec<Run>) -> Result<()> {
    let rig = Rig::new(case, programs)?;
    let mut peers = vec![Peer::Envoy, Peer::IstioProxy, Peer::Haproxy];
    if case.direct {
        peers.insert(0, Peer::Direct);
    }
    peers.retain(|peer| wanted(&args.peer, &format!("{peer:?}").to_lowercase()));
    for _ in 0..args.rounds {
        for peer in &peers {
            let run = rig.run(*peer)?;
            eprintln!("{:<16} {:<12} {:>6.1} us {:>8.0} /s", case.name, table::name(*peer), run.cpu_us, run.rps);
            runs.push(run);
        }
        peers.reverse();
    }
    Ok(())
}

/// What silent connections take.
fn hold(programs: &Programs, args: &Args) -> Result<Vec<idle::Idle>> {
    let mut all = Vec::new();
    for case in idle::CASES.iter().filter(|case| args.idle > 0 && wanted(&args.case, case.name)) {
        let rig = Rig::new(&CASES[case.base], programs)?;
        for peer in [Peer::Envoy, Peer::IstioProxy, Peer::Haproxy] {
            if wanted(&args.peer, &format!("{peer:?}").to_lowercase()) {
                all.push(idle::Idle::new(case, peer, rig.hold(peer, args.idle, case.mute)?));
            }
        }
    }
    Ok(all)
}

/// What large meshes take.
fn grow(programs: &Programs, args: &Args) -> Result<Vec<scale::Scaled>> {
    if !wanted(&args.case, scale::CASE) {
        return Ok(Vec::new());
    }
    let peer = |peer: Peer| wanted(&args.peer, &format!("{peer:?}").to_lowercase());
    scale::run(programs, &args.services, args.recording.as_deref(), peer)
}

/// Whether a name is asked for; without a wish every one is.
fn wanted(wishes: &[String], name: &str) -> bool {
    wishes.is_empty() || wishes.iter().any(|wish| name.contains(wish))
}
