//! `istio-proxy validate` on a folder of broken YAML: every mistake with its place, a mark below it and what was
//! expected. The whole output is kept in `validate/broken.txt`; `BLESS=1` writes it anew.

use std::path::Path;
use std::process::Command;

#[test]
fn broken_yaml_is_told_line_by_line() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let run = Command::new(env!("CARGO_BIN_EXE_istio-proxy"))
        .args(["validate", "--config", "tests/validate/broken"])
        .current_dir(root)
        .output()
        .expect("the program runs");
    assert_eq!(run.status.code(), Some(1));
    let out = String::from_utf8(run.stdout).expect("UTF-8");
    let golden = root.join("tests/validate/broken.txt");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&golden, &out).expect("the golden file can be written");
    }
    let kept = std::fs::read_to_string(&golden).expect("the golden file is there");
    assert_eq!(out, kept, "BLESS=1 keeps what is meant");
    // A mark stands below each message, and the place is in the file.
    for message in out.lines().filter(|l| l.starts_with("tests/")) {
        let file = message.split(':').next().unwrap_or_default();
        assert!(root.join(file).exists(), "{message}");
    }
}

#[test]
fn services_that_differ_between_clusters_are_told() {
    let dir = tempfile::tempdir().expect("a folder");
    let service = |port: u16| {
        let port = format!("{{name: http, port: {port}}}");
        format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {{ports: [{port}]}}\n")
    };
    for (name, port) in [("one.yaml", 80), ("two.yaml", 81), ("same.yaml", 80)] {
        std::fs::write(dir.path().join(name), service(port)).expect("a file");
    }
    let run = |other: &str| {
        let cluster = format!("west={}", dir.path().join(other).display());
        let one = dir.path().join("one.yaml");
        let run = Command::new(env!("CARGO_BIN_EXE_istio-proxy"))
            .args(["validate", "--config", one.to_str().expect("UTF-8"), "--cluster", &cluster])
            .output()
            .expect("the program runs");
        (run.status.code(), String::from_utf8(run.stdout).expect("UTF-8"))
    };
    let (code, out) = run("two.yaml");
    assert!(code == Some(0) && out.contains("[IST0170]") && out.contains("west"), "{out}");
    let (code, out) = run("same.yaml");
    assert!(code == Some(0) && !out.contains("IST0170"), "{out}");
}
