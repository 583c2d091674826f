//! The peer process: commands come as lines of JSON, answers go the same way.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::client::Client;
use super::server::Servers;

/// Arguments of a peer process.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder of certificates.
    #[arg(long, value_name = "DIR")]
    certs: PathBuf,
    /// Source address of clients.
    #[arg(long, value_name = "ADDRESS")]
    from: Option<std::net::IpAddr>,
}

/// Serves commands until its input ends: `begin` starts applications, `step` plays a client, `end` tells what the
/// applications saw.
///
/// # Errors
/// When the input is not as expected.
pub fn run(args: &Args) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(commands(args))?;
    Ok(ExitCode::SUCCESS)
}

async fn commands(args: &Args) -> Result<()> {
    let client = Client { certs: args.certs.clone(), from: args.from };
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut out = tokio::io::stdout();
    let mut servers: Option<Servers> = None;
    while let Some(line) = lines.next_line().await? {
        let command: Value = serde_json::from_str(&line).context("a command is one line of JSON")?;
        let answer = match command["do"].as_str() {
            Some("begin") => {
                if let Some(before) = servers.take() {
                    before.stop().await;
                }
                let apps = command["apps"].as_array().map_or(&[][..], Vec::as_slice);
                match Servers::start(apps, &command["defaults"], args.certs.clone()).await {
                    Ok(started) => {
                        servers = Some(started);
                        json!({"ok": true})
                    }
                    Err(error) => json!({"error": format!("{error:#}")}),
                }
            }
            Some("step") => client.step(&command["step"]).await,
            Some("look") => servers.as_ref().map_or(Value::Null, Servers::report),
            Some("end") => match servers.take() {
                Some(servers) => servers.stop().await,
                None => Value::Null,
            },
            _ => json!({"error": "unknown command"}),
        };
        out.write_all(format!("{answer}\n").as_bytes()).await?;
        out.flush().await?;
    }
    Ok(())
}
