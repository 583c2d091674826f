//! The demo's checks can fail: against a mesh that breaks two promises exactly those checks fail.
//!
//! It takes more than a minute and needs root, so it runs when ignored tests are asked for (`make test` does, last). The
//! demo starts its applications and clients from its own executable, which here is this one: hence no test harness.

use std::path::Path;
use std::process::ExitCode;

use bench_harness::{app, demo, netns};
use clap::Parser;

#[derive(Parser)]
enum Helper {
    App(app::Args),
    Tcp(app::TcpArgs),
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|arg| arg == "app" || arg == "tcp") {
        let outcome = match Helper::parse() {
            Helper::App(args) => app::run(&args),
            Helper::Tcp(args) => app::tcp(&args),
        };
        return outcome.unwrap_or_else(|error| panic!("{error:#}"));
    }
    if !args.iter().any(|arg| arg == "--ignored" || arg == "--include-ignored") {
        println!("demo_checks: left out, as it takes a minute: run it with -- --ignored");
        return ExitCode::SUCCESS;
    }
    if let Err(error) = netns::Lab::new(&format!("probe-{}", std::process::id())) {
        println!("demo_checks: left out: {error:#}");
        return ExitCode::SUCCESS;
    }
    broken_promises_are_seen();
    println!("demo_checks: ok");
    ExitCode::SUCCESS
}

fn broken_promises_are_seen() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("proxy-config/examples/demo");
    for entry in std::fs::read_dir(demo).expect("the examples") {
        let path = entry.expect("readable").path();
        let name = path.file_name().expect("a file").to_string_lossy().into_owned();
        if name.contains("deny-external-to-vms") {
            continue;
        }
        let mut text = std::fs::read_to_string(&path).expect("text");
        if name.contains("payment-service-vs") {
            // Not 10 and 90: the check of ejection needs enough calls to the pods.
            for (weight, other) in [("weight: 90", "weight: 40"), ("weight: 10\n", "weight: 60\n")] {
                assert!(text.contains(weight), "{name} has no {weight}");
                text = text.replace(weight, other);
            }
        }
        std::fs::write(dir.path().join(name), text).expect("a copy");
    }
    let options = demo::Options {
        proxy: env!("CARGO_BIN_EXE_istio-proxy").into(),
        config: dir.path().to_owned(),
        tag: format!("broken-{}", std::process::id()),
    };
    let report = demo::play(&options, &|| Ok(())).expect("the mesh starts");
    assert_eq!(report.failed(), ["api-sa is denied by rule", "the rest is split 90/10"]);
}
