//! What the runs say together.

use std::fmt::Write as _;

use serde::Serialize;

use super::rig::{Peer, Run};

/// Most that our share of Envoy's CPU time may be.
const MOST_OF_ENVOY: f64 = 0.5;
/// Most resident memory without configuration.
const MOST_EMPTY_BYTES: u64 = 15_000_000;

/// Runs of one proxy in one case.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    case: &'static str,
    peer: Peer,
    runs: usize,
    /// Median, least, most.
    cpu_us_per_request: [f64; 3],
    ratio_to_envoy: Option<f64>,
    rps: f64,
    p50_us: f64,
    p99_us: f64,
    rss_mb: f64,
}

/// How a table names a proxy.
pub(super) fn name(peer: Peer) -> &'static str {
    match peer {
        Peer::Direct => "direct",
        Peer::Envoy => "envoy",
        Peer::Haproxy => "haproxy",
        Peer::IstioProxy => "istio-proxy",
    }
}

/// Megabytes of a thousand kilobytes.
pub(super) fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// One row for each case and proxy, in the order of their first run.
pub(super) fn rows(runs: &[Run]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for run in runs {
        if rows.iter().all(|row| (row.case, row.peer) != (run.case, run.peer)) {
            rows.push(row(runs, run.case, run.peer));
        }
    }
    let envoys: Vec<(&str, f64)> =
        rows.iter().filter(|row| row.peer == Peer::Envoy).map(|row| (row.case, row.cpu_us_per_request[0])).collect();
    for row in rows.iter_mut().filter(|row| row.peer != Peer::Direct) {
        let envoy = envoys.iter().find(|(case, _)| *case == row.case);
        row.ratio_to_envoy = envoy.map(|(_, cpu)| row.cpu_us_per_request[0] / cpu);
    }
    rows
}

fn row(runs: &[Run], case: &'static str, peer: Peer) -> Row {
    let mine: Vec<&Run> = runs.iter().filter(|run| (run.case, run.peer) == (case, peer)).collect();
    let spread = |value: &dyn Fn(&Run) -> f64| {
        let mut values: Vec<f64> = mine.iter().map(|run| value(run)).collect();
        values.sort_by(f64::total_cmp);
        let (low, high) = ((values.len() - 1) / 2, values.len() / 2);
        [f64::midpoint(values[low], values[high]), values[0], values[values.len() - 1]]
    };
    Row {
        case,
        peer,
        runs: mine.len(),
        cpu_us_per_request: spread(&|run| run.cpu_us),
        ratio_to_envoy: None,
        rps: spread(&|run| run.rps)[0],
        p50_us: spread(&|run| run.measured.p50_us as f64)[0],
        p99_us: spread(&|run| run.measured.p99_us as f64)[0],
        rss_mb: spread(&|run| megabytes(run.rss_bytes))[0],
    }
}

/// The table.
pub(super) fn text(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<16} {:<12} {:>22} {:>14} {:>8} {:>8} {:>8} {:>7}\n",
        "case", "proxy", "cpu_us_per_request", "ratio_to_envoy", "rps", "p50", "p99", "rss_mb"
    );
    for row in rows {
        let [median, least, most] = row.cpu_us_per_request;
        let (cpu, rss) = match row.peer {
            Peer::Direct => ("-".to_owned(), "-".to_owned()),
            _ => (format!("{median:.1} ({least:.1}..{most:.1})"), format!("{:.1}", row.rss_mb)),
        };
        let ratio = row.ratio_to_envoy.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
        writeln!(
            text,
            "{:<16} {:<12} {cpu:>22} {ratio:>14} {:>8.0} {:>8.0} {:>8.0} {rss:>7}",
            row.case,
            name(row.peer),
            row.rps,
            row.p50_us,
            row.p99_us
        )
        .expect("writing to a string");
    }
    text
}

/// Goals that were missed.
pub(super) fn missed(rows: &[Row], rss_empty: u64) -> Vec<String> {
    let dear = rows.iter().filter(|row| row.peer == Peer::IstioProxy);
    let dear = dear.filter_map(|row| row.ratio_to_envoy.filter(|r| *r > MOST_OF_ENVOY).map(|r| (row.case, r)));
    let mut missed: Vec<String> =
        dear.map(|(case, ratio)| format!("{case}: {ratio:.2} of Envoy's CPU, at most {MOST_OF_ENVOY}")).collect();
    if rss_empty > MOST_EMPTY_BYTES {
        missed.push(format!("{:.1} MB without configuration, at most 15", megabytes(rss_empty)));
    }
    missed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::load::Measured;

    fn run(peer: Peer, cpu_us: f64) -> Run {
        let measured = Measured { requests: 1, ..Measured::default() };
        Run { case: "c", peer, measured, cpu_us, rps: 1.0, rss_bytes: 1_000_000 }
    }

    #[test]
    fn medians_are_compared_with_envoys() {
        let runs: Vec<Run> =
            [(Peer::Envoy, 40.0), (Peer::IstioProxy, 30.0), (Peer::IstioProxy, 10.0), (Peer::Envoy, 42.0)]
                .map(|(peer, cpu)| run(peer, cpu))
                .to_vec();
        let rows = rows(&runs);
        assert_eq!(rows[1].cpu_us_per_request, [20.0, 10.0, 30.0]);
        assert_eq!(rows[1].ratio_to_envoy, Some(20.0 / 41.0));
        assert!(missed(&rows, 15_000_000).is_empty());
        assert_eq!(missed(&rows, 15_000_001).len(), 1);
        let dear = self::rows(&[run(Peer::Envoy, 40.0), run(Peer::IstioProxy, 21.0)]);
        assert_eq!(missed(&dear, 0), ["c: 0.53 of Envoy's CPU, at most 0.5"]);
        assert!(text(&dear).contains("21.0 (21.0..21.0)"), "{}", text(&dear));
    }
}
