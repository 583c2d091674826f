//! The house rules that a compiler does not know: imports point down, some crates have one home, files and functions
//! stay small, nothing unwraps. Where a rule proves wrong, an ADR in `docs/adr` changes it and this table with it.

use std::fs;
use std::path::{Path, PathBuf};

/// Module and what it may import, lowest first. `main` and `app` know everyone.
const LAYERS: &[(&str, &[&str])] = &[
    ("error", &[]),
    ("drain", &[]),
    ("net", &["error"]),
    ("telemetry", &["error"]),
    ("tls", &["net", "error"]),
    ("snapshot", &["tls", "telemetry", "error"]),
    ("upstream", &["snapshot", "tls", "net", "telemetry", "error"]),
    ("proxy", &["upstream", "snapshot", "tls", "net", "telemetry", "drain", "error"]),
    ("worker", &["proxy", "upstream", "snapshot", "tls", "net", "telemetry", "drain", "error"]),
    ("dns", &["net"]),
    // Servers of the control plane are found by name.
    ("grpc", &["net", "tls", "dns", "error"]),
    ("xds", &["grpc", "net", "tls", "telemetry", "error"]),
    ("identity", &["grpc", "net", "tls", "error"]),
    ("iptables", &["net"]),
    // HTTPS probes need a handshake, and hosts may have names; refusals of gRPC are told by theirs.
    ("probe", &["net", "tls", "dns", "error"]),
    // Keys of tokens, by URI.
    ("jwks", &["net", "tls", "dns"]),
    ("ca", &["tls", "error"]),
    // `ca` makes up a certificate for questions that no peer will see; a published health is taken back on leaving.
    (
        "control",
        &["xds", "identity", "grpc", "dns", "jwks", "probe", "snapshot", "tls", "telemetry", "ca", "drain", "error"],
    ),
    ("validate", &["control"]),
    ("explain", &["control", "upstream", "snapshot", "tls", "telemetry", "error"]),
    // `/explain` answers for the configuration that is served; `/config_dump` shows what the stream received.
    (
        "admin",
        &["control", "explain", "worker", "upstream", "xds", "snapshot", "tls", "telemetry", "drain", "net", "error"],
    ),
];

/// Crate and the only module of the product that may name it.
const HOMES: &[(&str, &str)] = &[
    ("rustls", "tls"),
    ("tokio_rustls", "tls"),
    ("webpki", "tls"),
    ("socket2", "net"),
    ("metrics", "telemetry"),
    ("hickory_resolver", "dns"),
    ("jsonwebtoken", "snapshot"),
];

const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 60;
const DEPTH: usize = 2;

/// A source file without its tests.
struct Source {
    path: PathBuf,
    /// Path below `src`.
    inner: PathBuf,
    code: String,
}

impl Source {
    /// The top module it belongs to.
    fn module(&self) -> String {
        let first = self.inner.iter().next().expect("a file has a name").to_string_lossy();
        first.trim_end_matches(".rs").to_owned()
    }

    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        let plain = |line: &&str| !line.trim_start().starts_with("//");
        self.code.lines().enumerate().map(|(at, line)| (at + 1, line)).filter(move |(_, line)| plain(line))
    }
}

fn sources(crate_folder: &str) -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(crate_folder).join("src");
    let mut out = Vec::new();
    collect(&root, &root, &mut out);
    assert!(!out.is_empty(), "no sources under {}", root.display());
    out
}

fn collect(root: &Path, folder: &Path, out: &mut Vec<Source>) {
    for entry in fs::read_dir(folder).expect("a readable source folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            collect(root, &path, out);
        } else if path.extension().is_some_and(|e| e == "rs") && !is_test_file(&path) {
            let text = fs::read_to_string(&path).expect("a readable source file");
            if text.lines().any(|line| line == "#![cfg(test)]") {
                continue;
            }
            let inner = path.strip_prefix(root).expect("below the root").to_owned();
            out.push(Source { code: without_tests(&text), inner, path });
        }
    }
}

/// Files that only a `#[cfg(test)] mod` declares.
fn is_test_file(path: &Path) -> bool {
    let in_tests = path.iter().any(|part| part == "tests");
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    in_tests || name == "tests" || name.ends_with("_tests") || name == "fixture"
}

/// Tests stand last, so everything from the first `#[cfg(test)] mod` block on is left out.
fn without_tests(text: &str) -> String {
    let mut out = String::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let next = lines.peek().copied().unwrap_or_default();
        if line == "#[cfg(test)]" && (next.starts_with("mod ") || next.contains(") mod ")) && next.ends_with('{') {
            break;
        }
        out.push_str(line);
        out.push('\n');
    }
    out
}

fn report(broken: &[String]) {
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

/// Modules of this crate that a line names.
fn imported(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        let rest = &line[at + "crate::".len()..];
        let names = match rest.strip_prefix('{') {
            Some(group) => top_names(group),
            None => {
                vec![rest.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default().to_owned()]
            }
        };
        out.extend(names);
    }
    out
}

/// First segments of a `{a::b, c::{d, e}}` group.
fn top_names(group: &str) -> Vec<String> {
    let mut depth = 0;
    let mut names = vec![String::new()];
    let mut open = true;
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                names.push(String::new());
                open = true;
            }
            ':' if depth == 0 => open = false,
            c if depth == 0 && open && (c.is_alphanumeric() || c == '_') => {
                names.last_mut().expect("one at least").push(c);
            }
            _ => {}
        }
    }
    names
}

#[test]
fn imports_point_down() {
    let mut broken = Vec::new();
    for source in sources(".") {
        let module = source.module();
        if matches!(&*module, "main" | "app" | "cli" | "lib") {
            continue;
        }
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == module) else {
            broken.push(format!("{}: module {module} has no row in the layer table", source.path.display()));
            continue;
        };
        for (at, line) in source.lines() {
            for name in imported(line) {
                let known = LAYERS.iter().any(|(layer, _)| *layer == name) || name == "app";
                if known && name != module && !allowed.contains(&name.as_str()) {
                    broken.push(format!("{}:{at}: {module} must not import {name}", source.path.display()));
                }
            }
        }
    }
    report(&broken);
}

#[test]
fn crates_have_one_home() {
    let mut broken = Vec::new();
    for source in sources(".") {
        for (at, line) in source.lines() {
            for (name, home) in HOMES {
                let word = format!("{name}::");
                let named = line.match_indices(&word).any(|(i, _)| {
                    let before = line[..i].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':')
                });
                if named && source.module() != *home {
                    broken.push(format!("{}:{at}: {name} belongs to {home}", source.path.display()));
                }
            }
        }
    }
    report(&broken);
}

#[test]
fn the_configuration_crate_knows_no_runtime() {
    let mut broken = Vec::new();
    for source in sources("proxy-config") {
        for (at, line) in source.lines() {
            for name in ["tokio::", "hyper::", "tower::", "std::fs::", "std::env::", "std::net::Tcp"] {
                if line.contains(name) {
                    broken.push(format!("{}:{at}: {name} has no place here", source.path.display()));
                }
            }
        }
    }
    report(&broken);
}

#[test]
fn nothing_unwraps_and_only_main_reads_the_environment() {
    let mut broken = Vec::new();
    for source in sources(".").into_iter().chain(sources("proxy-config")) {
        for (at, line) in source.lines() {
            let place = format!("{}:{at}", source.path.display());
            if line.contains(".unwrap()") || line.contains("todo!(") || line.contains("unimplemented!(") {
                broken.push(format!("{place}: state the invariant with expect(\"why\")"));
            }
            if line.contains("std::env::var") && source.module() != "main" {
                broken.push(format!("{place}: variables are passed in by main"));
            }
            if line.contains("unbounded_channel") && source.module() != "worker" {
                broken.push(format!("{place}: channels have a bound outside worker"));
            }
        }
    }
    report(&broken);
}

#[test]
fn files_and_functions_stay_small() {
    let mut broken = Vec::new();
    for source in sources(".").into_iter().chain(sources("proxy-config")).chain(sources("bench-harness")) {
        let count = source.code.lines().count();
        if count > FILE_LINES {
            broken.push(format!("{}: {count} lines, {FILE_LINES} at most", source.path.display()));
        }
        if source.inner.iter().count() > DEPTH {
            broken.push(format!("{}: deeper than {DEPTH} below src", source.path.display()));
        }
        long_functions(&source, &mut broken);
    }
    report(&broken);
}

/// rustfmt closes a function at the indentation of its first line.
fn long_functions(source: &Source, broken: &mut Vec<String>) {
    let mut open: Option<(usize, String, String)> = None;
    for (at, line) in source.code.lines().enumerate() {
        if let Some((start, close, name)) = &open {
            if line == close {
                let count = at - start + 1;
                if count > FUNCTION_LINES {
                    let place = source.path.display();
                    broken.push(format!("{place}:{}: {name} has {count} lines, {FUNCTION_LINES} at most", start + 1));
                }
                open = None;
            }
            continue;
        }
        let trimmed = line.trim_start();
        let head = trimmed.split('(').next().unwrap_or_default();
        if head.split_whitespace().any(|word| word == "fn") && !trimmed.starts_with("//") && !line.ends_with(['}', ';'])
        {
            let indent = &line[..line.len() - trimmed.len()];
            open = Some((at, format!("{indent}}}"), head.to_owned()));
        }
    }
}

#[test]
fn the_guards_see_what_they_guard_against() {
    assert_eq!(imported("use crate::{proxy::Env, tls::{Peer, crate_}};"), ["proxy", "tls"]);
    assert_eq!(imported("    crate::upstream::send(x)"), ["upstream"]);
    let body = "    x\n".repeat(70);
    let source = |code: String| Source { path: "a.rs".into(), inner: "a.rs".into(), code };
    let mut broken = Vec::new();
    long_functions(&source(format!("pub fn long() {{\n{body}}}\n")), &mut broken);
    assert_eq!(broken.len(), 1);
    assert_eq!(without_tests("a\n#[cfg(test)]\nmod tests {\nb\n}\n"), "a\n");
}
