//! `istio-proxy validate`: what is wrong with a folder of YAML, printed as a compiler prints it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use proxy_config::{Folder, Level, Message, Reject, Severity, Source};

use crate::control::yaml;

/// Arguments of `validate`.
#[derive(Debug, clap::Args)]
pub struct ValidateArgs {
    /// A file, or a folder with *.yaml and *.yml files. May be repeated.
    #[arg(long, value_name = "PATH", required = true, num_args = 1..)]
    config: Vec<PathBuf>,
    /// The objects of another cluster of the mesh; Services that differ from it are told. May be repeated.
    #[arg(long = "cluster", value_name = "NAME=PATH", value_parser = cluster)]
    clusters: Vec<(String, PathBuf)>,
}

/// One line of the report with the place that it points at.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    level: Level,
    place: Option<String>,
    resource: String,
    field: String,
    reason: String,
    code: Option<&'static str>,
}

/// Prints everything that is wrong, doubtful or worth knowing; whether nothing is an error.
///
/// # Errors
/// When a file cannot be read.
pub fn run(args: &ValidateArgs) -> Result<bool> {
    let sources = yaml::read_sources(&args.config)?;
    let mut lines: Vec<Line> = proxy_config::validate(&sources).into_iter().map(refused).collect();
    lines.extend(together(args, &sources)?);
    lines.sort_by_key(|line| order(line.place.as_deref()));
    let texts: BTreeMap<&str, &str> = sources.iter().map(|s| (s.name.as_str(), s.text.as_str())).collect();
    let mut out = std::io::stdout().lock();
    for line in &lines {
        write!(out, "{}", show(line, &texts))?;
    }
    let count = |level: Level| lines.iter().filter(|l| l.level == level).count();
    let (errors, warnings, notes) = (count(Level::Error), count(Level::Warning), count(Level::Info));
    write!(out, "{} files, {errors} errors, {warnings} warnings", sources.len())?;
    if notes > 0 {
        write!(out, ", {notes} notes")?;
    }
    writeln!(out)?;
    Ok(errors == 0)
}

/// What the analyzers say. Ports, subsets and open ports are told from endpoints by [`proxy_config::validate`] already,
/// which knows more of them than Istio's analyzers do.
fn together(args: &ValidateArgs, sources: &[Source]) -> Result<Vec<Line>> {
    const TOLD: [&str; 3] = ["IST0112", "IST0118", "IST0173"];
    let own = if args.clusters.is_empty() { String::new() } else { "this cluster".to_owned() };
    let mut clusters = vec![(own, sources.to_vec())];
    for (name, path) in &args.clusters {
        clusters.push((name.clone(), yaml::read_sources(std::slice::from_ref(path))?));
    }
    let only = |name: &str, clusters| {
        let folder = Folder { clusters, mesh: None, networks: None };
        proxy_config::analyze(&folder, Some(name).filter(|n| !n.is_empty())).unwrap_or_default()
    };
    let mut messages = only("", vec![(String::new(), sources.to_vec())]);
    if !args.clusters.is_empty() {
        messages.extend(only("multicluster.ServiceAnalyzer", clusters));
    }
    Ok(messages.into_iter().filter(|m| !TOLD.contains(&m.code)).map(said).collect())
}

fn refused(reject: Reject) -> Line {
    let level = match reject.severity {
        Severity::Warning if reject.code == Some("IST0131") => Level::Info,
        Severity::Warning => Level::Warning,
        Severity::Error | Severity::Security => Level::Error,
    };
    let Reject { place, resource, field, reason, code, .. } = reject;
    Line { level, place, resource, field, reason, code }
}

fn said(message: Message) -> Line {
    let level = message.level_in_files();
    let resource = match message.namespace.as_str() {
        "" => format!("{} {}", message.kind, message.name),
        namespace => format!("{} {namespace}/{}", message.kind, message.name),
    };
    let (place, field, reason) = (Some(message.place), message.field, message.reason);
    Line { level, place, resource, field, reason, code: Some(message.code) }
}

/// `file:line:column` taken apart.
fn parts(place: &str) -> Option<(&str, usize, usize)> {
    let (rest, column) = place.rsplit_once(':')?;
    let (file, line) = rest.rsplit_once(':')?;
    Some((file, line.parse().ok()?, column.parse().ok()?))
}

fn order(place: Option<&str>) -> (String, usize, usize) {
    let (file, line, column) = place.and_then(parts).unwrap_or_default();
    (file.to_owned(), line, column)
}

/// `file:line:column: level: resource: field: reason [code]`, then the line of the file and a mark below the place.
fn show(line: &Line, texts: &BTreeMap<&str, &str>) -> String {
    let place = line.place.as_deref().map(|place| format!("{place}: ")).unwrap_or_default();
    let level = match line.level {
        Level::Info => "info",
        Level::Warning => "warning",
        Level::Error => "error",
    };
    let field = if line.field.is_empty() { String::new() } else { format!("{}: ", line.field) };
    let code = line.code.map(|code| format!(" [{code}]")).unwrap_or_default();
    let mut out = format!("{place}{level}: {}: {field}{}{code}\n", line.resource, line.reason);
    if let Some((file, number, column)) = line.place.as_deref().and_then(parts)
        && let Some(text) = texts.get(file).and_then(|t| t.lines().nth(number.saturating_sub(1)))
    {
        out.push_str(&excerpt(text, number, column));
    }
    out
}

/// Characters of a line that are shown around the place.
const WIDTH: usize = 120;

fn excerpt(text: &str, number: usize, column: usize) -> String {
    let column = column.saturating_sub(1);
    let from = if column < WIDTH { 0 } else { column - WIDTH / 2 };
    let shown: String = text.chars().skip(from).take(WIDTH).collect();
    // Tabs stay, so that the mark stands where the text does.
    let before = text.chars().skip(from).take(column - from).map(|c| if c == '\t' { '\t' } else { ' ' });
    let gutter = format!("{number:>5}");
    format!("{gutter} | {}\n{:>5} | {}^\n", shown.trim_end(), "", before.collect::<String>())
}

fn cluster(text: &str) -> Result<(String, PathBuf)> {
    let (name, path) = text.split_once('=').context("NAME=PATH is expected")?;
    Ok((name.to_owned(), Path::new(path).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_read_like_a_compilers() {
        let mut line = Line {
            level: Level::Error,
            place: Some("x.yaml:2:8".to_owned()),
            resource: "Service a/b".to_owned(),
            field: "spec.port".to_owned(),
            reason: "expected a number".to_owned(),
            code: Some("IST0106"),
        };
        let texts = BTreeMap::from([("x.yaml", "spec:\n\tport: eighty\n")]);
        let expected = "x.yaml:2:8: error: Service a/b: spec.port: expected a number [IST0106]\n    \
                        2 | \tport: eighty\n      | \t      ^\n";
        assert_eq!(show(&line, &texts), expected);
        line = Line { place: None, field: String::new(), code: None, level: Level::Info, ..line };
        assert_eq!(show(&line, &texts), "info: Service a/b: expected a number\n");
        let long = format!("{}x", " ".repeat(500));
        let marked = excerpt(&long, 7, 501);
        assert!(marked.lines().all(|l| l.len() <= WIDTH + 8), "{marked}");
        assert_eq!(marked.lines().next().unwrap().find('x'), marked.lines().nth(1).unwrap().find('^'));
    }
}
