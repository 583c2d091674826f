//! `make demo`: the guide's hybrid mesh, run for real and put to the test.

mod checks;
mod client;
mod mesh;
mod report;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};

use tokio::signal::unix::{SignalKind, signal};

pub use mesh::Options;
pub use report::{Check, Report};

/// Arguments of the demo.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The proxy's binary.
    #[arg(long, value_name = "FILE")]
    proxy: PathBuf,
    /// Folder of Istio YAML.
    #[arg(long, value_name = "DIR", default_value = "proxy-config/examples/demo")]
    config: PathBuf,
    /// Where report.json goes.
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    out: PathBuf,
    /// Prefix of the namespaces, for two runs at once.
    #[arg(long, default_value = "demo")]
    tag: String,
}

/// Runs the demo and prints its report. Exit code 2: the machine lacks what it needs.
///
/// # Errors
/// When something cannot be started.
pub fn run(args: &Args) -> Result<ExitCode> {
    if let Some(missing) = missing() {
        eprintln!("{missing}");
        return Ok(ExitCode::from(2));
    }
    let stopped = stop_on_signal()?;
    let options = Options { proxy: args.proxy.clone(), config: args.config.clone(), tag: args.tag.clone() };
    let report = play(&options, &|| {
        ensure!(!stopped.load(Ordering::Relaxed), "stopped by a signal");
        Ok(())
    })?;
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let file = args.out.join("report.json");
    fs::write(&file, serde_json::to_vec_pretty(&report)?)?;
    println!("\nreport: {}", file.display());
    let (held, all) = (report.held(), report.checks.len());
    println!("demo: {held} of {all} checks held");
    Ok(if held == all { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Starts the mesh, makes every check, takes the mesh away.
///
/// # Errors
/// When something cannot be started, or `stop` says so.
pub fn play(options: &Options, stop: &dyn Fn() -> Result<()>) -> Result<Report> {
    println!("The mesh, each workload in a network namespace behind its own sidecar:");
    let mut mesh = mesh::Mesh::start(options)?;
    let mut report = Report::default();
    checks::all(&mut mesh, &mut report, stop)?;
    if !report.failed().is_empty() {
        keep_logs(&mesh)?;
    }
    Ok(report)
}

/// What a failed run leaves behind to be read.
fn keep_logs(mesh: &mesh::Mesh) -> Result<()> {
    let kept = PathBuf::from("target/demo/failed");
    fs::create_dir_all(&kept)?;
    for folder in ["logs", "config"] {
        let out = Command::new("cp").arg("-r").arg(mesh.folder().join(folder)).arg(&kept).output()?;
        ensure!(out.status.success(), "cannot keep {folder}: {}", String::from_utf8_lossy(&out.stderr));
    }
    println!("\nlogs and configuration of the failed run: {}", kept.display());
    Ok(())
}

/// One sentence about what the machine lacks.
fn missing() -> Option<String> {
    let out = Command::new("id").arg("-u").output().ok()?;
    if String::from_utf8_lossy(&out.stdout).trim() != "0" {
        return Some("the demo makes network namespaces and iptables rules: run it as root or with sudo".to_owned());
    }
    let lacks = |program: &&str| Command::new(program).arg("--version").output().is_err();
    let tools: Vec<&str> = ["iptables-restore", "curl", "wrk", "setpriv", "ss"].into_iter().filter(lacks).collect();
    (!tools.is_empty()).then(|| format!("the demo needs {} (make demo installs them)", tools.join(", ")))
}

fn stop_on_signal() -> Result<Arc<AtomicBool>> {
    let stopped = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stopped);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        runtime.block_on(async {
            let asked = match signal(SignalKind::terminate()) {
                Ok(mut term) => tokio::select! {
                    asked = tokio::signal::ctrl_c() => asked.is_ok(),
                    told = term.recv() => told.is_some(),
                },
                Err(_) => tokio::signal::ctrl_c().await.is_ok(),
            };
            if asked {
                flag.store(true, Ordering::Relaxed);
            }
        });
    })?;
    Ok(stopped)
}
