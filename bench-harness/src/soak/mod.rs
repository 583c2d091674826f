//! `make soak`: what takes minutes to show. Two proxies, each under a control plane of its own, carry traffic by mTLS and
//! policy from clients to an application, all of it on loopback, while
//!
//! * control planes push for hours' worth and then tighten a policy (`pushes`),
//! * proxies are killed while no control plane is there (`kills`),
//! * certificates and roots rotate faster than anybody would let them (`rotation`).

mod application;
mod crowd;
mod kills;
mod live;
mod pair;
mod pushes;
mod rotation;
mod side;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};

/// Arguments of `soak`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The proxy's binary.
    #[arg(long, value_name = "FILE")]
    proxy: PathBuf,
    /// Only cases whose name contains this, of pushes, kills, rotation; may be repeated.
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// Pushes, before the one that tightens a policy.
    #[arg(long, default_value_t = 500)]
    pushes: usize,
    /// Websockets that must live through them.
    #[arg(long, default_value_t = 1000)]
    websockets: usize,
    /// gRPC streams, 20 on a connection.
    #[arg(long, default_value_t = 1000)]
    streams: usize,
    /// TCP sessions that say nothing meanwhile.
    #[arg(long, default_value_t = 100)]
    idle: usize,
    /// Times that a proxy is killed.
    #[arg(long, default_value_t = 100)]
    kills: usize,
    /// Longest time from a kill to the next answer, milliseconds.
    #[arg(long, default_value_t = 200)]
    back_ms: u64,
    /// How long certificates rotate, seconds.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// What a case came to: what is printed, and what it broke.
#[derive(Debug, Default)]
struct Outcome {
    said: Vec<String>,
    broken: Vec<String>,
}

impl Outcome {
    /// Notes a figure.
    fn say(&mut self, line: String) {
        self.said.push(line);
    }

    /// Notes what has to hold.
    fn expect(&mut self, holds: bool, what: impl FnOnce() -> String) {
        if !holds {
            self.broken.push(what());
        }
    }
}

/// Runs the cases. Exit code 1 when one of them broke anything.
///
/// # Errors
/// When something cannot be started.
pub fn run(args: &Args) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (mut ran, mut held) = (0, 0);
    for case in ["pushes", "kills", "rotation"] {
        if !args.case.is_empty() && !args.case.iter().any(|wish| case.contains(wish.as_str())) {
            continue;
        }
        let outcome = runtime.block_on(async {
            match case {
                "pushes" => Box::pin(pushes::run(args)).await,
                "kills" => Box::pin(kills::run(args)).await,
                _ => Box::pin(rotation::run(args)).await,
            }
        })?;
        outcome.said.iter().for_each(|line| println!("{case}: {line}"));
        outcome.broken.iter().for_each(|line| println!("{case}: BROKEN: {line}"));
        ran += 1;
        held += usize::from(outcome.broken.is_empty());
    }
    ensure!(ran > 0, "no case of that name");
    println!("soak: {held} of {ran} cases held");
    Ok(if held == ran { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
