//! `make conformance`: recorded cases of the real programs, put to the real binary.
//!
//! The runner knows formats. What is in reach, what may differ and why, is said by rules in `docs/conformance.toml`,
//! which are predicates over a case's content and the difference, never case names.

#![cfg_attr(not(feature = "conformance"), allow(dead_code, reason = "what replays wire cases needs the feature"))]

mod agent_ads;
mod agent_bootstrap;
mod agent_ca;
mod agent_health;
mod agent_recording;
mod agent_run;
mod agent_said;
mod agent_sds;
mod analysis;
mod authz;
mod calls;
mod dumps;
mod explain;
mod health;
mod input;
#[cfg(feature = "conformance")]
mod judge;
mod models;
mod pair;
mod prototext;
mod resources;
mod rules;
mod simulation;
#[cfg(feature = "conformance")]
mod stage;
mod streams;
mod tally;
mod telemetry;
mod validation;
mod vm;
#[cfg(feature = "conformance")]
mod wire;
#[cfg(feature = "conformance")]
mod wire_explain;
mod xds;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde_json::Value;

use rules::Rules;
use tally::Tally;

/// Arguments of the conformance runner.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The proxy's binary.
    #[arg(long, value_name = "FILE")]
    proxy: PathBuf,
    /// Folder of sets, each a folder with an index.json.
    #[arg(long, value_name = "DIR")]
    vectors: PathBuf,
    /// Reach and exceptions.
    #[arg(long, value_name = "FILE", default_value = "docs/conformance.toml")]
    rules: PathBuf,
    /// Only sets whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Only cases whose name contains this.
    #[arg(long = "case", value_name = "TEXT")]
    case: Option<String>,
    /// Begins the names of network namespaces (`TAG0-server`), so that two runs can share a machine.
    #[arg(long, value_name = "TAG", default_value = "wire")]
    tag: String,
    /// Sets whose failures decide the exit code; all of them when none is named.
    #[arg(long, value_name = "SET", value_delimiter = ',')]
    gate: Vec<String>,
    /// Failures printed for each set.
    #[arg(long, default_value_t = 200)]
    most: usize,
}

/// One set on disk.
struct Set {
    name: String,
    folder: PathBuf,
    index: Value,
}

/// What the formats need.
struct Bench<'a> {
    proxy: &'a Path,
    rules: &'a Rules,
    /// Part of a case's name, to run few of them.
    case: Option<&'a str>,
    /// Begins the names of network namespaces.
    tag: &'a str,
}

impl Bench<'_> {
    fn wants(&self, case: &str) -> bool {
        self.case.is_none_or(|part| case.contains(part))
    }
}

/// Runs every set; the exit code is 1 when a case failed that no rule covers.
///
/// # Errors
/// When the vectors or the rules cannot be read, or the proxy cannot be run.
pub fn run(args: &Args) -> Result<ExitCode> {
    let rules = Rules::load(&args.rules)?;
    let bench = Bench { proxy: &args.proxy, rules: &rules, case: args.case.as_deref(), tag: &args.tag };
    let mut failed = 0;
    for set in sets(&args.vectors)? {
        if args.only.as_ref().is_some_and(|part| !set.name.contains(part.as_str())) {
            continue;
        }
        let tally = run_set(&bench, &set)?;
        let here = tally.print(&set.name, args.most);
        if args.gate.is_empty() || args.gate.contains(&set.name) {
            failed += here;
        }
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn run_set(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    match set.name.as_str() {
        "agent/ads" => agent_ads::run(bench, set),
        "agent/bootstrap" => agent_bootstrap::run(bench, set),
        "agent/health" => agent_health::run(bench, set),
        "analysis" => analysis::run(bench, set),
        "agent/ca" => agent_ca::run(bench, set),
        "agent/sds" => agent_sds::run(bench, set),
        "authz" => authz::run(bench, set),
        "health" => health::run(bench, set),
        "simulation" => simulation::run(bench, set),
        "validation" => validation::run(bench, set),
        "vm" => vm::run(bench, set),
        "telemetry" => telemetry::run(bench, set),
        "xds" => xds::run(bench, set),
        "mx-config-dumps" => dumps::run(bench, set),
        #[cfg(feature = "conformance")]
        _ if is_wire(set) => wire::run(bench, set),
        _ => Ok(Tally::unknown_format(&set.index)),
    }
}

/// Sets of a folder; an index that counts sets stands for the sets in the folders below it.
fn sets(folder: &Path) -> Result<Vec<Set>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut out = Vec::new();
    for entry in entries {
        let folder = entry?.path();
        let Ok(text) = fs::read_to_string(folder.join("index.json")) else { continue };
        let index: Value =
            serde_json::from_str(&text).with_context(|| format!("{}/index.json is no JSON", folder.display()))?;
        let own = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let name = index["set"].as_str().map_or(own, str::to_owned);
        if index["sets"].is_object() {
            out.extend(sets(&folder)?);
        } else {
            out.push(Set { name, folder, index });
        }
    }
    out.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(out)
}

/// The cases of an index.
fn cases(set: &Set) -> &[Value] {
    set.index["cases"].as_array().map_or(&[], Vec::as_slice)
}

/// A set of wire cases names steps and who saw what.
#[cfg(feature = "conformance")]
fn is_wire(set: &Set) -> bool {
    let steps_and_notes = |c: &Value| c["steps"].is_array() && (c["app_saw"].is_array() || c["upstream"].is_array());
    cases(set).first().is_some_and(steps_and_notes)
}
