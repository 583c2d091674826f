//! Recorded resources: the same calls must get the same answers, and both mouths must give the same model. Recorded
//! streams: see [`super::streams`].

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::calls::{self, Question};
use super::explain::From;
use super::input::Input;
use super::tally::Tally;
use super::{Bench, Set, cases, dumps, models, simulation, streams};

/// Runs every recording that has questions or YAML beside it.
///
/// # Errors
/// When the vectors cannot be read.
pub(super) fn run(bench: &Bench<'_>, set: &Set) -> Result<Tally> {
    let mut tally = Tally::default();
    for case in cases(set) {
        let name = case["name"].as_str().unwrap_or_default();
        if !bench.wants(name) {
            continue;
        }
        let folder = set.folder.join(case["folder"].as_str().unwrap_or_default());
        match case["kind"].as_str().unwrap_or_default() {
            "simulation" => tally.add(of_simulation(bench, set, case, &folder)?),
            "feature" => {
                for node in case["nodes"].as_object().into_iter().flatten().map(|(node, _)| node) {
                    tally.add(of_feature(bench, case, &folder, node)?);
                }
            }
            "seed" => tally.add(of_seed(bench, case, &folder)?),
            "stream" => tally.add(streams::conversation(bench, name, &folder)?),
            "scale" => tally.add(streams::scale(bench, name, case, &folder)?),
            kind => tally.out_of_reach(format!("recordings of kind {kind} are not replayed yet"), 1),
        }
    }
    Ok(tally)
}

/// The tables of the simulation set, asked of the recording.
fn of_simulation(bench: &Bench<'_>, set: &Set, case: &Value, folder: &Path) -> Result<Tally> {
    let name = case["name"].as_str().unwrap_or_default();
    let place = case["calls"].as_str().unwrap_or_default().split(',').next().unwrap_or_default();
    let path = set.folder.join(place);
    let table: Value = read_json(&path)?;
    let tables = table["cases"].as_array().map_or(&[][..], Vec::as_slice);
    let mut tally = Tally::default();
    let Some(table) = tables.iter().find(|t| t["name"] == name) else {
        tally.out_of_reach("the table of this recording is not in the simulation set", 1);
        return Ok(tally);
    };
    let scratch = tempfile::tempdir()?;
    let input = simulation::lay_out(scratch.path(), &table["input"])?;
    let mut content = simulation::content(table, &input)?;
    content["recorded"] = json!(true);
    let questions = simulation::questions(table);
    let recorded = (format!("{name} (recorded)"), From::Recording(folder));
    tally.add(calls::judge(bench, (&recorded.0, &content), &recorded.1, &input.node, &questions));
    match bench.rules.beyond(&content) {
        Some(reason) => tally.out_of_reach(reason, 1),
        None => {
            let found = models::compare(bench.rules, &input, folder);
            tally.judge(bench.rules, &format!("{name} (model)"), &content, found);
        }
    }
    Ok(tally)
}

fn of_feature(bench: &Bench<'_>, case: &Value, folder: &Path, node: &str) -> Result<Tally> {
    let there = |path: PathBuf| path.exists().then_some(path);
    let base = folder.parent().map(|up| up.join("base.yaml")).and_then(there);
    let files = base.into_iter().chain(there(folder.join("istio.yaml"))).collect();
    let input = Input {
        files,
        mesh: there(folder.join("mesh.yaml")),
        networks: there(folder.join("networks.yaml")),
        node: folder.join(format!("{node}.node.json")),
    };
    let name = format!("{} {node}", case["name"].as_str().unwrap_or_default());
    both_mouths(bench, &name, &input, &folder.join(node))
}

fn of_seed(bench: &Bench<'_>, case: &Value, folder: &Path) -> Result<Tally> {
    let yaml = folder.parent().map(|up| up.join("input")).unwrap_or_default();
    let mut files: Vec<PathBuf> = fs::read_dir(&yaml)
        .with_context(|| format!("cannot read {}", yaml.display()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        .collect();
    files.sort();
    let input = Input { files, mesh: None, networks: None, node: folder.join("node.json") };
    both_mouths(bench, case["name"].as_str().unwrap_or_default(), &input, folder)
}

/// The calls from the recording and from YAML, then the structural comparison as one more case.
fn both_mouths(bench: &Bench<'_>, name: &str, input: &Input, recording: &Path) -> Result<Tally> {
    let content = input.content()?;
    let questions = questions(&recording.join("calls.json"))?;
    let mut tally = Tally::default();
    tally.add(dumps::of_recording(bench, name, recording)?);
    let recorded = From::Recording(recording);
    tally.add(calls::judge(bench, (&format!("{name} (recorded)"), &content), &recorded, &input.node, &questions));
    if let Some(reason) = bench.rules.beyond(&content) {
        tally.out_of_reach(reason, questions.len() + 1);
        return Ok(tally);
    }
    let yaml = From::Yaml { files: input.files.clone(), mesh: input.mesh.clone(), networks: input.networks.clone() };
    tally.add(calls::judge(bench, (&format!("{name} (YAML)"), &content), &yaml, &input.node, &questions));
    let found = models::compare(bench.rules, input, recording);
    tally.judge(bench.rules, &format!("{name} (model)"), &content, found);
    Ok(tally)
}

fn questions(path: &Path) -> Result<Vec<Question>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let calls = read_json(path)?;
    let list = calls.as_array().map_or(&[][..], Vec::as_slice);
    let question = |(number, said): (usize, &Value)| Question {
        name: format!("call {number}: {}", said["call"]),
        call: said["call"].clone(),
        expect: said["expect"].clone(),
        strict: false,
    };
    Ok(list.iter().enumerate().map(question).collect())
}

fn read_json(path: &Path) -> Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
}
