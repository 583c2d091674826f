//! The command line; see `--help`. The only place that reads the environment and decides about exit codes.

use std::collections::BTreeMap;
use std::process::ExitCode;

use istio_proxy::cli;

#[cfg(feature = "jemalloc")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let variables: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    ExitCode::from(cli::run(&std::env::args().collect::<Vec<_>>(), variables))
}
