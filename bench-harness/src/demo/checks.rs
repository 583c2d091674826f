//! What the guide promises, asked with real traffic.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::client::{Reply, call, count, shown, starting};
use super::mesh::Mesh;
use super::report::Report;
use crate::netns::{Space, wait_for};

const PAYMENT: &str = "http://payment-service.payments:8080";
/// A whole line: on a port whose protocol is not declared, text that may still become a request line is held back.
const QUERY: &str = "select 1;\n";
const DENY_RULE: &str = "ns[payments]-policy[deny-external-to-vms]-rule[0]";
const DENIED: &str = "RBAC: access denied";
/// Four standard deviations of 2,000 draws at one in ten.
const SPLIT_TOLERANCE: u32 = 55;

/// Runs every check in turn; `stop` is asked between them.
///
/// # Errors
/// When a tool cannot be run: a promise that is not kept is a failed check, not an error.
pub(super) fn all(mesh: &mut Mesh, report: &mut Report, stop: &dyn Fn() -> Result<()>) -> Result<()> {
    let steps: [fn(&mut Mesh, &mut Report) -> Result<()>; 8] =
        [database, vm_joins, who_may, split, overflow, load, ejection, vm_health];
    for step in steps {
        stop()?;
        step(mesh, report)?;
    }
    let dead: Vec<&str> = mesh.machines().filter_map(|m| (!m.sidecar.is_alive()).then_some(m.name)).collect();
    let panics = mesh.machines().filter(|m| m.sidecar.printed().contains("panicked")).count();
    let seen = (dead.is_empty() && panics == 0, format!("{} ended, {panics} panicked", dead.len()));
    report.check("At the end", "every sidecar still runs", "0 ended, 0 panicked", seen);
    Ok(())
}

fn space(mesh: &Mesh, name: &str) -> Space {
    mesh.machine(name).space.clone()
}

fn tcp(from: &Space, address: &str, text: &str, hold_ms: u64) -> Result<(bool, String)> {
    let own = std::env::current_exe().context("cannot find this program")?;
    let hold = hold_ms.to_string();
    let out = from.command(&own.to_string_lossy()).args(["tcp", "--hold-ms", &hold, address, text]).output()?;
    Ok((out.status.success(), String::from_utf8_lossy(&out.stdout).trim().to_owned()))
}

fn database(mesh: &mut Mesh, report: &mut Report) -> Result<()> {
    let group = "The database VM, over TCP";
    let address = "legacy-database.hybrid-app:5432";
    let (api, frontend) = (space(mesh, "api-1"), space(mesh, "frontend-1"));
    let published = wait_for("publishing", Duration::from_secs(15), || is_published(mesh, "legacy-database", "True"));
    let seen = published.map_or_else(|e| (false, e.to_string()), |()| (true, "Healthy: True".to_owned()));
    report.check(group, "its first probe publishes it", "Healthy: True", seen);
    // The client follows a moment later.
    let mut last = (false, String::new());
    wait_for("a first answer", Duration::from_secs(5), || {
        last = tcp(&api, address, QUERY, 0).unwrap_or_else(|error| (false, error.to_string()));
        last.0
    })
    .ok();
    let seen = (last == (true, QUERY.trim().to_owned()), last.1);
    report.check(group, "api-sa is served", "the same bytes back", seen);
    let (answered, seen) = tcp(&frontend, address, QUERY, 0)?;
    report.check(group, "frontend-sa is refused", "closed without an answer", (!answered, seen));
    let reply = call(&api, "http://10.0.2.20:9187/metrics", &[])?;
    // The port is in no Service, so the client's sidecar passes plaintext on, which STRICT refuses.
    let held = reply.status == 0 && matches!(reply.exit, 52 | 56);
    report.check(group, "its metrics port takes no plaintext", "no response", (held, reply.summary()));
    Ok(())
}

fn is_published(mesh: &Mesh, group: &str, status: &str) -> bool {
    let Ok(entries) = fs::read_dir(&mesh.config) else { return false };
    entries.flatten().any(|entry| {
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let compact: String = text.chars().filter(|c| !matches!(c, '"' | '\'' | ' ')).collect();
        compact.contains("kind:WorkloadEntry")
            && compact.contains(group)
            && compact.contains("type:Healthy")
            && compact.contains(&format!("status:{status}"))
    })
}

fn vm_joins(mesh: &mut Mesh, report: &mut Report) -> Result<()> {
    let group = "The payment VM joins";
    let frontend = space(mesh, "frontend-1");
    let url = format!("{PAYMENT}/api/v1/x");
    let mut last = Reply::default();
    let joined = wait_for("the canary's first answer", Duration::from_secs(25), || {
        last = call(&frontend, &url, &["-H", "x-canary: true"]).unwrap_or_default();
        last.status == 200
    });
    let published = is_published(mesh, "legacy-payment-service", "True");
    let seen = (joined.is_ok() && published, format!("{}, published: {published}", last.summary()));
    report.check(group, "traffic follows its health", "200 \"payment-vm\", published: true", seen);
    Ok(())
}

/// The last denial or answer that a workload's own log tells about a path.
fn told(mesh: &Mesh, machine: &str, path: &str) -> String {
    let mut found = String::new();
    // The log is flushed within a second.
    wait_for("a log line", Duration::from_secs(4), || {
        let log = mesh.machine(machine).access_log();
        let line = log.iter().rev().find(|l| l["path"].as_str().is_some_and(|p| p.starts_with(path)));
        found = line.and_then(|l| l["details"].as_str()).unwrap_or_default().to_owned();
        !found.is_empty()
    })
    .ok();
    found
}

fn who_may(mesh: &mut Mesh, report: &mut Report) -> Result<()> {
    let group = "Who may call the payment service";
    let (frontend, api) = (space(mesh, "frontend-1"), space(mesh, "api-1"));
    let canary = ["-H", "x-canary: true"];
    let vm = |path: &str, more: &[&str]| call(&frontend, &format!("{PAYMENT}{path}"), &[&canary, more].concat());
    let reply = vm("/api/v1/orders", &[])?;
    report.check(group, "frontend-sa may GET /api/v1/*", "200", (reply.status == 200, reply.summary()));
    let peer = reply.header("x-app-saw-peer").to_owned();
    let held = peer.contains("URI=spiffe://cluster.local/ns/frontend/sa/frontend-sa");
    report.check(group, "the application learns who called", "URI=spiffe://…/ns/frontend/sa/frontend-sa", (held, peer));
    let reply = vm("/api/v1/pay", &["-X", "POST", "-d", "amount=1"])?;
    report.check(group, "frontend-sa may POST /api/v1/*", "200", (reply.status == 200, reply.summary()));
    let denied = |reply: &Reply| reply.status == 403 && reply.body == DENIED;
    let reply = vm("/api/v1/gone", &["-X", "DELETE"])?;
    let details = told(mesh, "payment-vm", "/api/v1/gone");
    let held = denied(&reply) && details.contains("matched_policy[none]");
    let seen = (held, format!("{}, log: {details}", reply.summary()));
    report.check(group, "frontend-sa may not DELETE", "403, log: no ALLOW rule matched", seen);
    let reply = vm("/admin", &[])?;
    report.check(group, "frontend-sa may not GET /admin", "403", (denied(&reply), reply.summary()));
    let reply = vm("/api/v1/../../admin", &[])?;
    report.check(group, "dot segments do not get around it", "403", (denied(&reply), reply.summary()));
    let reply = call(&api, &format!("{PAYMENT}/api/v1/from-api"), &canary)?;
    let details = told(mesh, "payment-vm", "/api/v1/from-api");
    let seen = (denied(&reply) && details.contains(DENY_RULE), format!("{}, log: {details}", reply.summary()));
    report.check(group, "api-sa is denied by rule", &format!("403, log: {DENY_RULE}"), seen);
    let reply = call(&mesh.outsider, "http://10.0.1.5:8080/api/v1/x", &[])?;
    let held = reply.status == 0 && matches!(reply.exit, 52 | 56);
    report.check(group, "plaintext from outside is refused", "no response", (held, reply.summary()));
    Ok(())
}

fn split(mesh: &mut Mesh, report: &mut Report) -> Result<()> {
    let group = "Where requests go";
    let frontend = space(mesh, "frontend-1");
    let url = format!("{PAYMENT}/api/v1/split");
    let counts = count(&frontend, &url, 50, &["-H", "x-canary: true"])?;
    let held = starting(&counts, "200 payment-vm") == 50;
    report.check(group, "the canary header chooses the VM", "50 x 200 payment-vm", (held, shown(&counts)));
    let counts = count(&frontend, &url, 2000, &[])?;
    let (pods, vm) = (starting(&counts, "200 payment-v2-"), starting(&counts, "200 payment-vm"));
    let expected = format!("2000 answers, VM 200 ± {SPLIT_TOLERANCE}");
    let held = pods + vm == 2000 && vm.abs_diff(200) <= SPLIT_TOLERANCE;
    report.check(group, "the rest is split 90/10", &expected, (held, shown(&counts)));
    let (first, second) = (starting(&counts, "200 payment-v2-0"), starting(&counts, "200 payment-v2-1"));
    let held = first.min(second) * 4 > pods;
    report.check(group, "both pods take their share", "each more than a quarter of the pods'", (held, shown(&counts)));
    Ok(())
}

fn overflow(mesh: &mut Mesh, report: &mut Report) -> Result<()> {
    let group = "The circuit breaker of y13";
    let frontend = space(mesh, "frontend-1");
    let url = format!("{PAYMENT}/api/v1/slow");
    // One cluster, 50 connections, 100 requests waiting. How many of those 100 wait for a connection that is still being
    // opened depends on the machine: between 100 and 150 are served, and every other call is refused at once.
    let more = ["-H", "x-canary: true", "-o", "/dev/null", "-Z", "--parallel-immediate", "--parallel-max", "200"];
    let counts = count(&frontend, &url, 200, &more)?;
    let (served, refused) = (starting(&counts, "200"), starting(&counts, "503"));
    let held = (100..=152).contains(&served) && served + refused == 200;
    report.check(
        group,
        "200 slow calls at once: the surplus is refused",
        "100 to 150 served, 503 for the rest",
        (held, shown(&counts)),
    );
    let mut flagged = 0;
    wait_for("log lines", Duration::from_secs(4), || {
        let log = mesh.machine("frontend-1").access_log();
        flagged = log.iter().filter(|l| l["flags"] == "UO").count();
        flagged as u32 >= refused
    })
    .ok();
    let seen = (flagged as u32 == refused && refused > 0, format!("{flagged} log lines with UO"));
    report.check(group, "the log says why", &format!("{refused} log lines with UO"), seen);
    Ok(())
}

fn load(mesh: &mut Mesh, report: &mut Report) -> Result<()> {
    let group = "Under load";
    let frontend = space(mesh, "frontend-1");
    let cpu = |mesh: &mut Mesh| mesh.machines().map(|m| m.sidecar.cpu()).sum::<Duration>();
    let before = cpu(mesh);
    let url = format!("{PAYMENT}/api/v1/load");
    let out = frontend.command("wrk").args(["-t1", "-c16", "-d4s", "--latency", &url]).output();
    let out = out.context("cannot run wrk")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let spent = cpu(mesh) - before;
    let number = |line: &str| line.split_whitespace().find_map(|word| word.parse::<u64>().ok());
    let requests = text.lines().find(|l| l.contains("requests in")).and_then(number).unwrap_or(0);
    let failed = text.lines().find(|l| l.contains("Non-2xx")).map_or("none failed", str::trim);
    let sockets = text.lines().find(|l| l.contains("Socket errors")).map_or("no socket errors", str::trim);
    let held = requests > 0 && failed == "none failed" && sockets == "no socket errors";
    let seen = (held, format!("{requests} requests, {failed}, {sockets}"));
    report.check(group, "16 connections for 4 s lose nothing", "none failed, no socket errors", seen);
    if let Some(per_request) = spent.as_micros().checked_div(u128::from(requests)) {
        report.figure("CPU of both sidecars per request", format!("{per_request} µs"));
    }
    if let Some(p99) = text.lines().find(|l| l.trim_start().starts_with("99%")) {
        report.figure("latency, 99th percentile", p99.trim().trim_start_matches("99%").trim().to_owned());
    }
    Ok(())
}

fn ejection(mesh: &mut Mesh, report: &mut Report) -> Result<()> {
    let group = "Outlier detection of y13";
    let frontend = space(mesh, "frontend-1");
    mesh.switch("payment-v2-1", "fail", true)?;
    let counts = count(&frontend, &format!("{PAYMENT}/api/v1/ejection"), 200, &[])?;
    mesh.switch("payment-v2-1", "fail", false)?;
    let failed = starting(&counts, "500 payment-v2-1");
    let held = failed == 5 && starting(&counts, "200") == 195;
    report.check(group, "five failures in a row eject a pod", "5 x 500, then only answers", (held, shown(&counts)));
    Ok(())
}

fn vm_health(mesh: &mut Mesh, report: &mut Report) -> Result<()> {
    let group = "The payment VM's health";
    let frontend = space(mesh, "frontend-1");
    let url = format!("{PAYMENT}/api/v1/health-flip");
    let mut last = Reply::default();
    let mut becomes = |status: u16| {
        let found = wait_for("the change", Duration::from_secs(45), || {
            last = call(&frontend, &url, &["-H", "x-canary: true"]).unwrap_or_default();
            last.status == status
        });
        (found.is_ok(), last.clone())
    };
    println!("  .... three probes must fail, ten seconds apart");
    mesh.switch("payment-vm", "sick", true)?;
    let (changed, reply) = becomes(503);
    let published = is_published(mesh, "legacy-payment-service", "False");
    let held = changed && reply.body == "no healthy upstream" && published;
    let seen = (held, format!("{}, published: {published}", reply.summary()));
    report.check(group, "sick: published, and clients leave it", "503 \"no healthy upstream\", published: true", seen);
    mesh.switch("payment-vm", "sick", false)?;
    let (changed, reply) = becomes(200);
    report.check(group, "well again: clients return", "200 \"payment-vm\"", (changed, reply.summary()));
    Ok(())
}
