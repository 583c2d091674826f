//! Asks the real binary what it would do.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Where a configuration comes from.
pub(super) enum From<'a> {
    /// Recorded resources.
    Recording(&'a Path),
    /// Istio YAML, with the mesh's own files.
    Yaml { files: Vec<PathBuf>, mesh: Option<PathBuf>, networks: Option<PathBuf> },
}

/// One answer for each call.
///
/// # Errors
/// When the binary cannot be run, fails, or answers another number of calls.
pub(super) fn ask(proxy: &Path, from: &From<'_>, node: &Path, calls: &[Value]) -> Result<Vec<Value>> {
    let mut command = Command::new(proxy);
    command.args(["explain", "--json", "--calls", "-", "--node"]).arg(node);
    match from {
        From::Recording(folder) => {
            command.arg("--xds-dir").arg(folder);
        }
        From::Yaml { files, mesh, networks } => {
            for file in files {
                command.arg("--config").arg(file);
            }
            if let Some(mesh) = mesh {
                command.arg("--mesh").arg(mesh);
            }
            if let Some(networks) = networks {
                command.arg("--networks").arg(networks);
            }
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {}", proxy.display()))?;
    let mut text = String::new();
    for call in calls {
        text.push_str(&call.to_string());
        text.push('\n');
    }
    let mut stdin = child.stdin.take().expect("a pipe was asked for");
    // The program reads all calls before it answers, so writing from this thread cannot block for ever.
    let written = stdin.write_all(text.as_bytes());
    drop(stdin);
    let out = child.wait_with_output().context("explain did not end")?;
    let told = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "explain failed: {}", told.trim());
    written.context("explain did not take the calls")?;
    let answers: Vec<Value> = String::from_utf8_lossy(&out.stdout)
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .context("explain's answer is no JSON")?;
    ensure!(answers.len() == calls.len(), "{} calls, {} answers", calls.len(), answers.len());
    Ok(answers)
}
