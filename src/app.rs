//! Wiring: control thread, workers, servers, signals, drain. The only module that knows everyone.

mod agent;
mod host;
mod istiod;
mod levels;
mod observe;
mod ports;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use proxy_config::bootstrap;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::cli::InputArgs;
use crate::control::{self, Certs, Control, Published, health};
use crate::drain::{self, Drain, Phase, Plan};
use crate::snapshot::Snapshot;
use crate::telemetry::{Logs, logging};
use crate::worker::{self, Workers};
use ports::Ports;

/// How long an orderly goodbye without `EXIT_ON_ZERO_ACTIVE_CONNECTIONS` takes when ProxyConfig says nothing.
const TERMINATION_DRAIN: Duration = Duration::from_secs(5);
/// `MINIMUM_DRAIN_DURATION` when nobody says it.
const MINIMUM_DRAIN: Duration = Duration::from_secs(5);
/// What a start without files means, for those who forgot them.
const UNDER_ISTIOD: &str = "started under istiod, as neither --config nor --xds-dir is given";
/// With `EXIT_ON_ZERO_ACTIVE_CONNECTIONS` whoever started us sets the limit; this is a month.
const UNBOUNDED: Duration = Duration::from_secs(30 * 86_400);

/// Flags of `proxy`.
#[derive(Debug, Clone, Args)]
pub struct ProxyArgs {
    /// What this proxy is; only sidecars are served.
    #[arg(default_value = "sidecar", value_parser = ["sidecar"])]
    role: String,
    #[command(flatten)]
    inputs: InputArgs,
    #[command(flatten)]
    agent: agent::AgentArgs,
    /// One JSON object for each request, TCP connection and refused connection; - is standard output.
    #[arg(long, value_name = "PATH|-")]
    access_log: Option<PathBuf>,
    /// Write this workload's own WorkloadEntry into a watched folder as its health changes.
    #[arg(long, value_name = "DIR")]
    publish_health: Option<PathBuf>,
    /// Worker threads [default: the CPU limit, else 2].
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// Admin server on 127.0.0.1; 0 switches it off [default: proxyAdminPort, else 15000].
    #[arg(long, value_name = "PORT")]
    admin_port: Option<u16>,
    /// Readiness at /healthz/ready; 0 switches it off [default: ENVOY_STATUS_PORT, else 15021].
    #[arg(long, value_name = "PORT")]
    status_port: Option<u16>,
    /// Metrics at /stats/prometheus; 0 switches it off [default: ENVOY_PROMETHEUS_PORT, else 15090].
    #[arg(long, value_name = "PORT")]
    metrics_port: Option<u16>,
    /// error, warn, info, debug or off; also per module, as in info,istio_proxy::tls=debug [default: info].
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// Log lines as JSON.
    #[arg(long, alias = "log_as_json")]
    log_json: bool,
}

/// The process ended by itself after it had served; not a start-up failure.
#[derive(Debug)]
pub struct Died(String);

impl fmt::Display for Died {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Died {}

/// Serves until told to leave.
///
/// # Errors
/// What keeps it from starting; [`Died`] when it ends without being told.
pub fn run(args: &ProxyArgs, variables: BTreeMap<String, String>) -> Result<()> {
    let said = args.log_level.clone().or_else(|| levels::said(&args.agent));
    let levels = logging::start(said.as_deref().unwrap_or("info"), args.log_json)?;
    let flag = args.concurrency.unwrap_or(0);
    let agent = match args.inputs.are_given() {
        true => None,
        false => Some(agent::bootstrap(&args.agent, &variables, flag).context(UNDER_ISTIOD)?),
    };
    let ports = Ports::new(args, agent.as_ref(), &variables, levels);
    let plan = agent.as_ref().map_or_else(|| plan(&variables), |agent| agreed(agent.drain));
    let said = Some(flag).filter(|n| *n > 0).or_else(|| agent.as_ref()?.concurrency);
    let workers = said.unwrap_or_else(|| host::concurrency(&variables));
    let limit = agent.as_ref().and_then(|agent| agent.connection_limit);
    let limit = limit.map(|most| usize::try_from(most).unwrap_or(usize::MAX));
    let process = Process { ports, plan, limit };
    // This thread is the control thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if let Some(agent) = agent {
        return runtime.block_on(Box::pin(async {
            let (control, reports) = istiod::begin(&agent)?;
            serve(args, control, workers, process, reports).await
        }));
    }
    let certs = args.inputs.certs.clone().map_or(Certs::None, Certs::Folder);
    let mut settings = args.inputs.settings(variables, certs)?;
    settings.publish_health.clone_from(&args.publish_health);
    let control = Control::start(settings)?;
    runtime.block_on(Box::pin(serve(args, control, workers, process, None)))
}

/// What the process was started with.
struct Process {
    ports: Ports,
    plan: Plan,
    /// Connections that somebody said are enough.
    limit: Option<usize>,
}

/// What a goodbye looks like.
fn plan(variables: &BTreeMap<String, String>) -> Plan {
    let on =
        |name: &str| variables.get(name).is_some_and(|v| matches!(&**v, "1" | "t" | "T" | "true" | "TRUE" | "True"));
    if on("EXIT_ON_ZERO_ACTIVE_CONNECTIONS") {
        let min = variables.get("MINIMUM_DRAIN_DURATION").and_then(|v| host::go_duration(v)).unwrap_or(MINIMUM_DRAIN);
        return Plan { min, max: UNBOUNDED, exit_on_zero: true };
    }
    let said = variables.get("PROXY_CONFIG").and_then(|text| host::termination_drain(text));
    let max = said.unwrap_or(TERMINATION_DRAIN);
    // Accepting goes on to the end: peers learn late that we leave.
    Plan { min: max, max, exit_on_zero: false }
}

/// A goodbye as ProxyConfig and variables have it.
fn agreed(said: bootstrap::Drain) -> Plan {
    if said.exit_on_zero {
        return Plan { min: said.minimum, max: UNBOUNDED, exit_on_zero: true };
    }
    Plan { min: said.termination, max: said.termination, exit_on_zero: false }
}

async fn serve(
    args: &ProxyArgs,
    mut control: Control,
    count: usize,
    process: Process,
    reports: Option<istiod::Reports>,
) -> Result<()> {
    let first = control.warm().await.unwrap_or_else(|| control.published());
    let (drain, leaving) = Drain::new();
    let (snapshots, receiver) = watch::channel(Arc::clone(&first.snapshot));
    let telemetry = observe::telemetry(&first.proxy);
    let logs = Arc::new(observe::logs(args.access_log.as_deref(), args.inputs.are_given(), &telemetry)?);
    let settings = worker::Settings {
        snapshots: receiver,
        drain: leaving.clone(),
        node: host::node(&first.proxy),
        telemetry: Arc::clone(&telemetry),
        logs: Arc::clone(&logs),
        connections: host::connections(),
        refuse_above: process.limit,
    };
    let mut workers = Workers::start(count, &settings).context("workers")?;
    if let Some((address, e)) = workers.sockets(&first.snapshot).into_iter().next() {
        return Err(anyhow!(e).context(format!("cannot listen on {address}")));
    }
    observe::published(&first, &telemetry);
    observe::forget_unused(&first.proxy, &telemetry);
    let (publish, published) = watch::channel(Arc::clone(&first));
    // What is served: news whose sockets are open. Whoever asks whether this proxy is ready is not told too early.
    let (serving, served) = watch::channel(first);
    let drain = Arc::new(drain);
    let state = process.ports.state(served.clone(), &telemetry, &drain, workers.handles());
    process.ports.open(&state)?;
    let (ready, is_ready) = watch::channel(false);
    tokio::spawn(ports::keep_ready(state, ready));
    if let Some(reports) = reports {
        tokio::spawn(reports.run(is_ready.clone()));
    }
    let (ask, asked) = mpsc::channel(1);
    let health = control
        .publish_health()
        .map(|folder| tokio::spawn(health::run(folder, served.clone(), is_ready, leaving.clone())));
    tokio::spawn(control::run(control, publish, asked));
    tracing::info!("{count} workers serve {} listeners", served.borrow().snapshot.listeners().len());
    tokio::spawn(leave(drain, process.plan, ask, logs));
    until_gone(published, &mut workers, leaving, |news, workers| {
        follow(news, &snapshots, workers);
        observe::published(news, &telemetry);
        serving.send_replace(Arc::clone(news));
    })
    .await?;
    if let Some(health) = health {
        // It has heard of the end too, and takes its file back.
        health.await?;
    }
    Ok(())
}

/// Passes on what is published until the last phase, then waits for the workers.
async fn until_gone(
    mut published: watch::Receiver<Arc<Published>>,
    workers: &mut Workers,
    mut leaving: drain::Watch,
    pass_on: impl Fn(&Arc<Published>, &mut Workers),
) -> Result<()> {
    loop {
        tokio::select! {
            // Told to go is looked at before workers that went because of it.
            biased;
            () = leaving.reached(Phase::Gone) => break,
            changed = published.changed() => {
                if changed.is_err() {
                    return Err(Died("the control loop ended".to_owned()).into());
                }
                let news = Arc::clone(&published.borrow_and_update());
                pass_on(&news, workers);
            }
            index = workers.ended() => {
                return Err(Died(format!("worker {index} ended without being told to")).into());
            }
        }
    }
    workers.all_ended().await;
    Ok(())
}

/// Gives workers what was published: first the configuration, then the sockets it speaks of.
fn follow(news: &Published, snapshots: &watch::Sender<Arc<Snapshot>>, workers: &mut Workers) {
    snapshots.send_replace(Arc::clone(&news.snapshot));
    for (address, e) in workers.sockets(&news.snapshot) {
        tracing::error!("cannot listen on {address}: {e}");
    }
}

/// Waits for a reason to leave, and leaves in order. Further signals change nothing, as with the agent. SIGHUP reloads;
/// SIGUSR1 writes what is logged and opens the files anew, for whoever rotates them.
async fn leave(drain: Arc<Drain>, plan: Plan, ask: mpsc::Sender<()>, logs: Arc<Logs>) {
    let listen = |kind: SignalKind| signal(kind).inspect_err(|e| tracing::error!("signals: {e}")).ok();
    let (mut term, mut int) = (listen(SignalKind::terminate()), listen(SignalKind::interrupt()));
    let mut hup = listen(SignalKind::hangup());
    let mut rotated = listen(SignalKind::user_defined1());
    loop {
        let why = tokio::select! {
            () = next(&mut term) => "SIGTERM",
            () = next(&mut int) => "SIGINT",
            () = next(&mut hup) => {
                // A full channel has the request in it already.
                let _ = ask.try_send(());
                continue;
            }
            () = next(&mut rotated) => {
                logs.reopen();
                continue;
            }
        };
        tracing::info!("{why}: leaving, {} connections open", drain.active());
        break;
    }
    drain.run(plan).await;
}

async fn next(signal: &mut Option<tokio::signal::unix::Signal>) {
    // Without a handler, and after the runtime's own end, there is nothing to wait for.
    let came = match signal {
        Some(signal) => signal.recv().await,
        None => None,
    };
    if came.is_none() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn goodbyes() {
        let default = Plan { min: TERMINATION_DRAIN, max: TERMINATION_DRAIN, exit_on_zero: false };
        assert_eq!(plan(&variables(&[])), default);
        assert_eq!(plan(&variables(&[("PROXY_CONFIG", "{terminationDrainDuration: 1m30s}")])).max.as_secs(), 90);
        assert_eq!(plan(&variables(&[("PROXY_CONFIG", "{")])), default);
        let zero =
            plan(&variables(&[("EXIT_ON_ZERO_ACTIVE_CONNECTIONS", "true"), ("MINIMUM_DRAIN_DURATION", "500ms")]));
        assert_eq!(zero, Plan { min: Duration::from_millis(500), max: UNBOUNDED, exit_on_zero: true });
    }
}
