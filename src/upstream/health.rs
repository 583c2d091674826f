//! Which hosts may be used, and how traffic divides over priorities: Envoy's rules as pure functions.

use std::sync::atomic::Ordering;

use proxy_config::model::HealthStatus;

use crate::snapshot::{Host, HostSet};

/// What a host is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fitness {
    Healthy,
    Degraded,
    Unhealthy,
}

/// Control plane and ejection together.
pub(super) fn fitness(host: &Host) -> Fitness {
    if host.stats.ejection.until.load(Ordering::Relaxed) != 0 || !host.is_eligible() {
        return Fitness::Unhealthy;
    }
    if host.health == HealthStatus::Degraded { Fitness::Degraded } else { Fitness::Healthy }
}

/// Hosts of one priority, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) all: u32,
    pub(super) healthy: u32,
    pub(super) degraded: u32,
}

/// Counts each priority.
pub(super) fn count(set: &HostSet) -> Vec<Count> {
    let of = |priority: &crate::snapshot::Priority| {
        let mut count = Count::default();
        for host in &priority.hosts {
            count.all += 1;
            match fitness(host) {
                Fitness::Healthy => count.healthy += 1,
                Fitness::Degraded => count.degraded += 1,
                Fitness::Unhealthy => {}
            }
        }
        count
    };
    set.priorities.iter().map(of).collect()
}

/// What one priority gets, in percent of all traffic.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) healthy: u32,
    pub(super) degraded: u32,
    /// Too few hosts are healthy: all are used.
    pub(super) panic: bool,
}

/// Divides traffic. Each priority counts for its healthy share times the overprovisioning factor; what a priority cannot
/// take spills over to the next. `panic_threshold` and `overprovisioning` are percentages.
pub(super) fn loads(counts: &[Count], overprovisioning: u32, panic_threshold: f64) -> Vec<Load> {
    let share = |part: u32, all: u32| (overprovisioning * part).checked_div(all).unwrap_or(0).min(100);
    let able: Vec<(u32, u32)> = counts.iter().map(|c| (share(c.healthy, c.all), share(c.degraded, c.all))).collect();
    let total = able.iter().map(|(healthy, degraded)| healthy + degraded).sum::<u32>().min(100);
    let mut loads = vec![Load::default(); counts.len()];
    if total == 0 && panic_threshold <= 0.0 {
        if let Some(first) = loads.first_mut() {
            first.healthy = 100;
        }
        return loads;
    }
    for (load, count) in loads.iter_mut().zip(counts) {
        load.panic = total != 100 && is_in_panic(*count, panic_threshold);
    }
    if loads.iter().all(|load| load.panic) {
        divide_by_size(&mut loads, counts);
        return loads;
    }
    if total != 0 {
        spill(&mut loads, &able, total);
    }
    loads
}

fn is_in_panic(count: Count, threshold: f64) -> bool {
    if count.all == 0 {
        return threshold > 0.0;
    }
    100.0 * f64::from(count.healthy + count.degraded) / f64::from(count.all) < threshold
}

fn spill(loads: &mut [Load], able: &[(u32, u32)], total: u32) {
    let mut left = 100;
    for (load, (healthy, _)) in loads.iter_mut().zip(able) {
        load.healthy = (healthy * 100 / total).min(left);
        left -= load.healthy;
    }
    for (load, (_, degraded)) in loads.iter_mut().zip(able) {
        load.degraded = (degraded * 100 / total).min(left);
        left -= load.degraded;
    }
    // Rounding leaves a few percent; the first priority that can take anything takes them.
    let first = able.iter().position(|(healthy, degraded)| healthy + degraded > 0);
    if let Some((load, (healthy, _))) = first.map(|at| (&mut loads[at], able[at])) {
        if healthy > 0 { load.healthy += left } else { load.degraded += left }
    }
}

/// Every priority panics: traffic follows the number of hosts.
fn divide_by_size(loads: &mut [Load], counts: &[Count]) {
    let all: u32 = counts.iter().map(|c| c.all).sum();
    let Some(first) = counts.iter().position(|c| c.all > 0) else {
        if let Some(load) = loads.first_mut() {
            load.healthy = 100;
        }
        return;
    };
    let mut left = 100;
    for (load, count) in loads.iter_mut().zip(counts) {
        load.healthy = 100 * count.all / all;
        left -= load.healthy;
    }
    loads[first].healthy += left;
}

/// The priority for a draw, and whether its degraded hosts serve; `None` without priorities.
pub(super) fn choose(loads: &[Load], draw: u64) -> Option<(usize, bool)> {
    let at = u32::try_from(draw % 100).expect("a remainder of 100 fits") + 1;
    let mut sum = 0;
    for (level, load) in loads.iter().enumerate() {
        sum += load.healthy;
        if at <= sum {
            return Some((level, false));
        }
    }
    for (level, load) in loads.iter().enumerate() {
        sum += load.degraded;
        if at <= sum {
            return Some((level, true));
        }
    }
    (!loads.is_empty()).then_some((0, false))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(said: &[(u32, u32, u32)]) -> Vec<Count> {
        said.iter()
            .map(|(all, healthy, degraded)| Count { all: *all, healthy: *healthy, degraded: *degraded })
            .collect()
    }

    #[test]
    fn priorities_take_what_they_can() {
        // (hosts, healthy, degraded) of each priority → (healthy, degraded) percent.
        type Case<'a> = (&'a [(u32, u32, u32)], &'a [(u32, u32)]);
        let cases: &[Case<'_>] = &[
            (&[(10, 10, 0), (10, 10, 0)], &[(100, 0), (0, 0)]),
            // 72 % healthy is enough at 140 %.
            (&[(100, 72, 0), (100, 100, 0)], &[(100, 0), (0, 0)]),
            (&[(100, 71, 0), (100, 100, 0)], &[(99, 0), (1, 0)]),
            (&[(100, 50, 0), (100, 100, 0)], &[(70, 0), (30, 0)]),
            (&[(100, 0, 0), (100, 100, 0)], &[(0, 0), (100, 0)]),
            // Neither suffices: both are scaled up.
            (&[(100, 25, 0), (100, 25, 0)], &[(50, 0), (50, 0)]),
            // Degraded hosts come after every healthy one.
            (&[(100, 50, 50), (100, 0, 0)], &[(70, 30), (0, 0)]),
            (&[(100, 0, 100), (100, 100, 0)], &[(0, 0), (100, 0)]),
            (&[(100, 0, 0), (100, 0, 0)], &[(100, 0), (0, 0)]),
            (&[(0, 0, 0), (3, 3, 0)], &[(0, 0), (100, 0)]),
        ];
        for (said, expected) in cases {
            let got: Vec<_> = loads(&counts(said), 140, 0.0).iter().map(|l| (l.healthy, l.degraded)).collect();
            assert_eq!(&got[..], *expected, "{said:?}");
        }
    }

    #[test]
    fn panic_uses_every_host() {
        let at = |said: &[(u32, u32, u32)], threshold| loads(&counts(said), 140, threshold);
        assert!(at(&[(10, 3, 0)], 50.0)[0].panic);
        assert!(!at(&[(10, 8, 0)], 50.0)[0].panic);
        assert!(!at(&[(10, 0, 0)], 0.0)[0].panic);
        // The second priority makes up for the first.
        let made_up = at(&[(10, 1, 0), (10, 10, 0)], 50.0);
        assert!(!made_up[0].panic && made_up[0].healthy == 14 && made_up[1].healthy == 86);
        let total = at(&[(4, 0, 0), (12, 0, 0)], 50.0);
        assert_eq!(total.iter().map(|l| (l.healthy, l.panic)).collect::<Vec<_>>(), [(25, true), (75, true)]);
    }

    #[test]
    fn draws_follow_the_loads() {
        let loads = [Load { healthy: 70, degraded: 10, panic: false }, Load { healthy: 20, ..Load::default() }];
        let picks = (0..100).map(|draw| choose(&loads, draw).unwrap());
        let mut count = [0; 3];
        picks.for_each(|pick| match pick {
            (0, false) => count[0] += 1,
            (1, false) => count[1] += 1,
            (0, true) => count[2] += 1,
            other => panic!("{other:?}"),
        });
        assert_eq!(count, [70, 20, 10]);
        assert_eq!(choose(&[], 1), None);
    }
}
