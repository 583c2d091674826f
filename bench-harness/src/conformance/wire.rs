//! Wire cases: the real binary between recorded clients and applications, from YAML and from recorded resources.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::explain::From;
use super::input::Input;
use super::judge::{self, Happened};
use super::stage::{Mouth, Side, Stage};
use super::tally::{Difference, Tally};
use super::{Bench, Set, cases, wire_explain};

/// Stages at work at a time.
const LANES: usize = 4;
/// Cases that measure time or totals run alone.
const ALONE: [&str; 4] = ["time", "pool", "outlier", "dr"];

/// Cases that share a running proxy.
struct Group<'a> {
    side: Side,
    mouth: Mouth,
    config: PathBuf,
    certs: PathBuf,
    /// The proxy's own certificate.
    own: String,
    cases: Vec<&'a Value>,
}

/// Runs a set of wire cases.
///
/// # Errors
/// When the machine cannot make namespaces.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut groups: BTreeMap<(bool, String, String, String), Group<'_>> = BTreeMap::new();
    for case in cases(set) {
        let id = text(&case["id"]);
        if !bench.wants(id) {
            continue;
        }
        let tags: Vec<String> = list(&case["tags"]).iter().map(|t| text(t).to_owned()).collect();
        if !bench.rules.reaches(&tags) {
            tally.out_of_reach("its tags are not reached yet", 2);
            continue;
        }
        if let Some(reason) = undecidable(case) {
            tally.unsupported(reason);
            tally.unsupported(reason);
            continue;
        }
        let alone = tags.iter().any(|tag| ALONE.contains(&tag.as_str()));
        for mouth in [Mouth::Yaml, Mouth::Recording] {
            let side = if case["backends"].is_array() { Side::Outbound } else { Side::Inbound };
            let own = text(if side == Side::Inbound { &case["server"] } else { &case["clientCert"] });
            let own = if own.is_empty() { "SRV-PAY" } else { own };
            let config = set.folder.join(text(&case["config"]));
            let key = (alone, config.display().to_string(), format!("{mouth:?}"), own.to_owned());
            let certs = set.folder.join("certs");
            let new = || Group { side, mouth, config, certs, own: own.to_owned(), cases: Vec::new() };
            groups.entry(key).or_insert_with(new).cases.push(case);
        }
    }
    let (alone, together): (Vec<_>, Vec<_>) = groups.into_iter().partition(|((alone, ..), _)| *alone);
    let (_folder, proxy) = public_copy(bench.proxy)?;
    for (lanes, groups) in [(LANES, together), (1, alone)] {
        let mut groups: Vec<_> = groups.into_iter().map(|(_, group)| group).collect();
        // The longest begin first (the last is taken first), so that no lane is left alone with one.
        groups.sort_by_key(|group| group.cases.len());
        tally.add(play(bench, &proxy, lanes, groups)?);
    }
    Ok(tally)
}

/// The proxy where its user may run it. Made before any process is started: whoever is started while it is written would
/// hold it open, and what is open for writing cannot be run.
fn public_copy(proxy: &Path) -> Result<(tempfile::TempDir, PathBuf)> {
    let folder = tempfile::Builder::new().prefix("istio-wire-").tempdir()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
    let binary = folder.path().join("istio-proxy");
    fs::copy(proxy, &binary).with_context(|| format!("cannot copy {}", proxy.display()))?;
    Ok((folder, binary))
}

/// Plays groups on several stages at a time.
fn play(bench: &Bench<'_>, proxy: &Path, lanes: usize, groups: Vec<Group<'_>>) -> Result<Tally> {
    let waiting = Mutex::new(groups);
    let done = Mutex::new(Tally::default());
    std::thread::scope(|scope| {
        let lane = |number: usize| {
            let (waiting, done) = (&waiting, &done);
            scope.spawn(move || -> Result<()> {
                loop {
                    let next = waiting.lock().expect("no lane panics while holding it").pop();
                    let Some(group) = next else { return Ok(()) };
                    let tally = group_on(bench, proxy, &format!("{}{number}", bench.tag), &group)?;
                    done.lock().expect("no lane panics while holding it").add(tally);
                }
            })
        };
        let handles: Vec<_> = (0..lanes).map(lane).collect();
        handles.into_iter().try_for_each(|h| h.join().expect("a lane does not panic"))
    })?;
    Ok(done.into_inner().expect("no lane panicked"))
}

fn group_on(bench: &Bench<'_>, proxy: &Path, tag: &str, group: &Group<'_>) -> Result<Tally> {
    let mut tally = Tally::default();
    let input = input_of(&group.config)?;
    let content = input.content()?;
    if group.mouth == Mouth::Yaml
        && let Some(reason) = bench.rules.beyond(&content)
    {
        tally.out_of_reach(reason, group.cases.len());
        return Ok(tally);
    }
    let mut stage = Stage::build(tag, group.side, &group.certs, &group.own)?;
    let recording = group.config.join("xds");
    let certs = certificates(&group.certs)?;
    let mut foretold = foretold(proxy, group, &input, &recording);
    for (at, case) in group.cases.iter().enumerate() {
        let name = format!("{} ({})", text(&case["id"]), group.mouth.name());
        let judged = json!({"case": case, "input": content, "certs": shown_by(case, &certs)});
        if case["fresh"] == true {
            stage.stop();
        }
        let started = stage.ensure(proxy, group.mouth, &input, &recording);
        let mut found = match started.and_then(|()| one(&mut stage, case)) {
            Ok(happened) => judge::differences(case, &happened),
            Err(error) => {
                stage.stop();
                vec![Difference::new("run", "a running proxy", format!("{error:#}"))]
            }
        };
        if let Some(answer) = foretold.remove(&at) {
            found.extend(wire_explain::differences(case, &answer));
        }
        tally.judge(bench.rules, &name, &judged, found);
    }
    if let Some(told) = stage.panicked() {
        let found = vec![Difference::new("panic", "none", told)];
        tally.judge(bench.rules, &format!("{} never panics", group.config.display()), &content, found);
    }
    Ok(tally)
}

/// What `explain` says of the group's cases, by their place.
fn foretold(proxy: &Path, group: &Group<'_>, input: &Input, recording: &Path) -> BTreeMap<usize, Result<Value>> {
    let from = match group.mouth {
        Mouth::Recording => From::Recording(recording),
        Mouth::Yaml => {
            let (mesh, networks) = (input.mesh.clone(), input.networks.clone());
            From::Yaml { files: input.files.clone(), mesh, networks }
        }
    };
    let asked = group.cases.iter().enumerate();
    let (places, calls): (Vec<usize>, Vec<Value>) =
        asked.filter_map(|(at, case)| Some((at, wire_explain::call(case, group.side)?))).unzip();
    if calls.is_empty() {
        return BTreeMap::new();
    }
    places.into_iter().zip(wire_explain::ask(proxy, &from, &input.node, &calls)).collect()
}

/// Plays one case.
fn one(stage: &mut Stage, case: &Value) -> Result<Happened> {
    stage.begin(case)?;
    let mut steps = Vec::new();
    for step in list(&case["steps"]) {
        steps.push(stage.step(step)?);
    }
    let log = stage.log(lines_of(case));
    let report = stage.end()?;
    Ok(Happened { steps, report, log })
}

/// Lines that the access log will have. Who does not finish a handshake has none with us.
fn lines_of(case: &Value) -> usize {
    let served = |step: &Value| matches!(step["expect"]["handshake"].as_str(), None | Some("ok"));
    let early = list(&case["app_saw"]).iter().any(|seen| seen["emptyConnection"] == true);
    if early && !list(&case["steps"]).iter().any(served) {
        return 0;
    }
    let lines = list(&case["log"]).iter().filter(|line| line["kind"] != "conn");
    let wanted: u64 = lines.map(|line| line["count"].as_u64().unwrap_or(1)).sum();
    let any = !list(&case["log"]).is_empty();
    usize::try_from(wanted.max(u64::from(any))).unwrap_or(usize::MAX)
}

/// What is special about the certificates of a set.
fn certificates(folder: &Path) -> Result<Value> {
    let Ok(text) = fs::read_to_string(folder.join("certs.json")) else { return Ok(Value::Null) };
    Ok(serde_json::from_str(&text)?)
}

/// The certificates that clients of a case show.
fn shown_by(case: &Value, certs: &Value) -> Value {
    let shown = list(&case["steps"]).iter().filter_map(|step| certs.get(step["tls"]["cert"].as_str()?));
    Value::Array(shown.cloned().collect())
}

/// What no program can decide.
fn undecidable(case: &Value) -> Option<&'static str> {
    if case["rule"].is_string() {
        return Some("the case is a rule in words; the project's own tests cover it");
    }
    let refuses = |entry: &Value| !entry["goaway"].is_null() && entry["headers"].is_null();
    if list(&case["app"]).iter().flat_map(|app| list(&app["script"])).any(refuses) {
        return Some(
            "an application that says goodbye instead of answering: the runner's HTTP/2 library finishes what it took",
        );
    }
    let resumes = |step: &Value| !step["tls"]["resume"].is_null() || !step["tls"]["keepSession"].is_null();
    list(&case["steps"])
        .iter()
        .any(resumes)
        .then_some("offering a TLS session by hand needs an unsafe call; the project's own tests cover resumption")
}

fn input_of(config: &Path) -> Result<Input> {
    let there = |name: &str| Some(config.join(name)).filter(|path| path.exists());
    let mut files: Vec<PathBuf> = fs::read_dir(config)?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .filter(|path| !path.ends_with("mesh.yaml") && !path.ends_with("networks.yaml"))
        .collect();
    files.sort();
    Ok(Input { files, mesh: there("mesh.yaml"), networks: there("networks.yaml"), node: config.join("node.json") })
}

fn text(of: &Value) -> &str {
    of.as_str().unwrap_or_default()
}

fn list(of: &Value) -> &[Value] {
    of.as_array().map_or(&[], Vec::as_slice)
}
