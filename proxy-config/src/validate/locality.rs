//! `localityLbSetting` and `zoneAwareLbSetting`.

use super::Findings;
use super::at::At;

const TOPOLOGY: [&str; 3] =
    ["topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"];

/// Findings of `localityLbSetting`; `outlier` says whether hosts are ever found to be bad.
pub(super) fn check(found: &mut Findings, at: &At<'_>, outlier: bool) {
    let (distribute, failover) = (at.get("distribute"), at.get("failover"));
    let priority = at.get("failoverPriority");
    if distribute.len() > 0 && failover.len() > 0 {
        found.add(&failover, "only one of distribute and failover may be set");
        return;
    }
    for label in priority.items().iter().filter(|_| failover.len() > 0) {
        found.expect(!TOPOLOGY.contains(&label.text()), label, "failover decides between regions already");
    }
    let mut sources = Vec::new();
    for entry in distribute.items() {
        sources.push(entry.get("from"));
        let to = entry.get("to").entries();
        let mut total = 0;
        for (_, weight) in &to {
            let value = weight.whole_or_zero();
            found.expect((1..=100).contains(&value), weight, "a weight from 1 to 100 is expected");
            total += value;
        }
        found.expect(total == 100, &entry.get("to"), "weights that make 100 together are expected");
        distinct(found, &to.iter().map(|(k, v)| (*k, v)).collect::<Vec<_>>());
    }
    distinct(found, &sources.iter().map(|s| (s.text(), s)).collect::<Vec<_>>());
    effective(found, at, outlier);
    regions(found, &failover);
}

/// Findings of `zoneAwareLbSetting`.
pub(super) fn zone_aware(found: &mut Findings, at: &At<'_>, outlier: bool) {
    for label in at.get("failoverPriority").items() {
        found.expect(!TOPOLOGY.contains(&label.text()), &label, "regions and zones are told apart without it");
    }
    effective(found, at, outlier);
    regions(found, &at.get("failover"));
}

fn effective(found: &mut Findings, at: &At<'_>, outlier: bool) {
    for field in ["failover", "failoverPriority"].map(|f| at.get(f)) {
        if field.len() > 0 && !outlier {
            found.warn(&field, "without outlierDetection no host is ever found to be bad: it has no effect");
        }
    }
}

fn regions(found: &mut Findings, failover: &At<'_>) {
    for entry in failover.items() {
        let (from, to) = (entry.get("from"), entry.get("to"));
        found.expect(from.text() != to.text(), &to, "another region than the first is expected");
        for region in [from, to] {
            found.expect(!region.text().contains(['/', '*']), &region, "the name of a region alone is expected");
        }
    }
}

/// Localities, `region/zone/subzone` with a star at the end, none of which is part of one before.
fn distinct(found: &mut Findings, localities: &[(&str, &At<'_>)]) {
    let mut seen: Vec<Vec<&str>> = Vec::new();
    for (text, at) in localities {
        let parts: Vec<&str> = text.splitn(3, '/').collect();
        let stars = text.matches('*').count();
        if stars > 1 || (stars == 1 && !text.ends_with('*')) {
            found.add(at, "a star is allowed once, at the end");
        } else if parts.iter().any(|p| p.is_empty()) {
            found.add(at, "region, region/zone or region/zone/subzone is expected");
        } else {
            found.expect(!seen.iter().any(|s| clash(s, &parts)), at, "the locality overlaps with one before");
            seen.push(parts);
        }
    }
}

/// A later `region/*` stands for the rest of a region of which zones were named before.
fn clash(earlier: &[&str], later: &[&str]) -> bool {
    for (depth, part) in later.iter().enumerate() {
        match earlier.get(depth) {
            None | Some(&"*") => return true,
            Some(other) if other != part => return false,
            Some(_) => {}
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::clash;

    #[test]
    fn overlaps() {
        let of = |a: &str, b: &str| {
            let parts = |t: &str| t.splitn(3, '/').map(str::to_owned).collect::<Vec<_>>();
            let (a, b) = (parts(a), parts(b));
            clash(&a.iter().map(String::as_str).collect::<Vec<_>>(), &b.iter().map(String::as_str).collect::<Vec<_>>())
        };
        for (a, b) in [("*", "r/z"), ("r", "r/z/s"), ("r/*", "r/z"), ("r/z", "r"), ("r/z/s", "r/z"), ("r/z/*", "r/z/s")]
        {
            assert!(of(a, b), "{a} {b}");
        }
        for (a, b) in [("r/z", "*"), ("r/z", "r/*"), ("r/z/s", "r/z/*"), ("r", "q"), ("r/z", "r/y/s")] {
            assert!(!of(a, b), "{a} {b}");
        }
    }
}
