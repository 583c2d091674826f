//! Outlier detection: who has failed often enough to be left alone for a while. Envoy's rules over shared atomics; time
//! is milliseconds on the cluster's clock and comes in as an argument, as do draws.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use proxy_config::model::OutlierDetection;

use crate::snapshot::{Breakers, Host, HostStats};

/// Success rates are compared only among at least this many hosts with enough requests.
const RATE_HOSTS: usize = 5;
/// Requests of one interval that make a host's success rate count.
const RATE_REQUESTS: u32 = 100;
/// Standard deviations below the mean that make an outlier.
const RATE_DEVIATIONS: f64 = 1.9;

/// What one try says about its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signal {
    /// A response with this status (gRPC: the status it maps to).
    Status(u16),
    /// A relayed connection stands.
    Connected,
    /// It took too long to answer.
    Timeout,
    /// No response: the connection could not be opened, or it ended.
    Broken,
}

/// The settings with Envoy's defaults filled in. Times are milliseconds, shares percent.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Policy {
    server_error: u32,
    gateway: u32,
    local_origin: u32,
    interval: u64,
    base: u64,
    longest: u64,
    most_ejected: u32,
    enforce_server_error: u32,
    enforce_gateway: u32,
    enforce_local_origin: u32,
    enforce_success_rate: u32,
    split: bool,
    error_statuses: Box<[(u16, u16)]>,
}

fn millis(said: Option<Duration>, default: u64) -> u64 {
    said.map_or(default, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

impl Policy {
    pub(super) fn new(said: &OutlierDetection) -> Self {
        let base = millis(said.base_ejection_time, 30_000);
        Self {
            server_error: said.consecutive_5xx.unwrap_or(5),
            gateway: said.consecutive_gateway_failure.unwrap_or(5),
            local_origin: said.consecutive_local_origin_failure.unwrap_or(5),
            interval: millis(said.interval, 10_000).max(1),
            base,
            longest: millis(said.max_ejection_time, 300_000).max(base),
            most_ejected: said.max_ejection_percent.unwrap_or(10).min(100),
            enforce_server_error: said.enforcing_consecutive_5xx.unwrap_or(100),
            enforce_gateway: said.enforcing_consecutive_gateway_failure.unwrap_or(0),
            enforce_local_origin: said.enforcing_consecutive_local_origin_failure.unwrap_or(100),
            enforce_success_rate: said.enforcing_success_rate.unwrap_or(100),
            split: said.split_external_local_origin_errors,
            error_statuses: said.error_statuses.clone().into(),
        }
    }

    /// Time between sweeps.
    pub(super) fn interval(&self) -> Duration {
        Duration::from_millis(self.interval)
    }

    /// Whether a status counts as a failure: 5xx, or what configuration lists instead. Both ends belong to a range.
    fn is_error(&self, status: u16) -> bool {
        if self.error_statuses.is_empty() {
            return (500..600).contains(&status);
        }
        self.error_statuses.iter().any(|(from, to)| (*from..=*to).contains(&status))
    }
}

/// The hosts of a cluster with what is shared about them, as detection sees them.
pub(super) struct Detector<'a> {
    pub(super) policy: &'a Policy,
    pub(super) breakers: &'a Breakers,
    pub(super) hosts: &'a [Arc<Host>],
}

/// Why a host is ejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    ServerError,
    Gateway,
    LocalOrigin,
}

/// What a signal came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Verdict {
    /// The host is ejected now, and why.
    pub(super) ejected: Option<Cause>,
    /// It would be, but too many are.
    pub(super) overflow: bool,
}

impl Detector<'_> {
    /// Takes note of a try. `draw` is below 100.
    pub(super) fn record(&self, host: &HostStats, signal: Signal, now: u64, draw: u32) -> Verdict {
        let policy = self.policy;
        if policy.split {
            match signal {
                Signal::Status(status) => {
                    // A response also proves that the way to the host works.
                    clear(&host.failures.local_origin);
                    self.external(host, status, now, draw)
                }
                Signal::Connected => {
                    clear(&host.failures.local_origin);
                    Verdict::default()
                }
                Signal::Timeout | Signal::Broken => {
                    let met = reaches(&host.failures.local_origin, policy.local_origin);
                    self.verdict(host, met && draw < policy.enforce_local_origin, Cause::LocalOrigin, now)
                }
            }
        } else {
            let status = match signal {
                Signal::Status(status) => status,
                Signal::Connected => 200,
                Signal::Timeout => 504,
                Signal::Broken => 503,
            };
            let local = matches!(signal, Signal::Timeout | Signal::Broken);
            if local { self.failed(host, status, now, draw) } else { self.external(host, status, now, draw) }
        }
    }

    fn external(&self, host: &HostStats, status: u16, now: u64, draw: u32) -> Verdict {
        let good = !self.policy.is_error(status);
        if self.policy.enforce_success_rate > 0 {
            host.window.total.fetch_add(1, Relaxed);
            if good {
                host.window.good.fetch_add(1, Relaxed);
            }
        }
        if good {
            clear(&host.failures.server_error);
            clear(&host.failures.gateway);
            return Verdict::default();
        }
        // A listed status is a failure as 500 is, whatever its number.
        let status = if (500..600).contains(&status) { status } else { 500 };
        self.failed(host, status, now, draw)
    }

    fn failed(&self, host: &HostStats, status: u16, now: u64, draw: u32) -> Verdict {
        let policy = self.policy;
        let mut verdict = Verdict::default();
        if matches!(status, 502..=504) {
            let met = reaches(&host.failures.gateway, policy.gateway);
            verdict = self.verdict(host, met && draw < policy.enforce_gateway, Cause::Gateway, now);
        } else {
            clear(&host.failures.gateway);
        }
        let met = reaches(&host.failures.server_error, policy.server_error);
        let server = self.verdict(host, met && draw < policy.enforce_server_error, Cause::ServerError, now);
        Verdict { ejected: verdict.ejected.or(server.ejected), overflow: verdict.overflow | server.overflow }
    }

    fn verdict(&self, host: &HostStats, asked: bool, cause: Cause, now: u64) -> Verdict {
        if !asked || host.ejection.until.load(Relaxed) != 0 {
            return Verdict::default();
        }
        let ejected = self.eject(host, now);
        Verdict { ejected: ejected.then_some(cause), overflow: !ejected }
    }

    /// Ejects, unless too many are ejected already: no share of the hosts greater than the limit, not even one host.
    fn eject(&self, host: &HostStats, now: u64) -> bool {
        let policy = self.policy;
        let all = u64::try_from(self.hosts.len()).expect("a count of hosts fits 64 bits");
        let ejected = u64::from(self.breakers.ejected.load(Relaxed)) + 1;
        if ejected * 100 > u64::from(policy.most_ejected) * all {
            return false;
        }
        let times = host.ejection.times.load(Relaxed).saturating_add(1);
        let until = now + (policy.base.saturating_mul(u64::from(times))).min(policy.longest);
        if host.ejection.until.compare_exchange(0, until.max(1), Relaxed, Relaxed).is_err() {
            return false;
        }
        // Growing beyond the longest ejection would only make forgiving slower.
        if policy.base.saturating_mul(u64::from(times - 1)) < policy.longest {
            host.ejection.times.store(times, Relaxed);
        }
        self.breakers.ejected.fetch_add(1, Relaxed);
        self.breakers.health_version.fetch_add(1, Relaxed);
        true
    }

    /// Whether it is this caller's turn to sweep; then the next turn is one interval away.
    pub(super) fn is_due(&self, now: u64) -> bool {
        let due = self.breakers.next_sweep.load(Relaxed);
        let next = now + self.policy.interval;
        if now < due {
            return false;
        }
        let won = self.breakers.next_sweep.compare_exchange(due, next, Relaxed, Relaxed).is_ok();
        won && due != 0
    }

    /// Once in an interval: hosts whose time is over come back, those that behaved are forgiven one ejection, and success
    /// rates are compared. Returns how many hosts are ejected now.
    pub(super) fn sweep(&self, now: u64, draw: u32) -> u32 {
        let mut ejected = 0;
        let mut changed = false;
        for host in self.hosts {
            let until = host.stats.ejection.until.load(Relaxed);
            if until == 0 {
                let times = host.stats.ejection.times.load(Relaxed);
                if times > 0 {
                    host.stats.ejection.times.store(times - 1, Relaxed);
                }
            } else if now >= until {
                // Old failures must not eject it again at once.
                clear(&host.stats.failures.server_error);
                clear(&host.stats.failures.gateway);
                clear(&host.stats.failures.local_origin);
                host.stats.ejection.until.store(0, Relaxed);
                changed = true;
            } else {
                ejected += 1;
            }
        }
        // Hosts may have left the cluster while they were ejected: the count is made anew.
        self.breakers.ejected.store(ejected, Relaxed);
        if changed {
            self.breakers.health_version.fetch_add(1, Relaxed);
        }
        if self.policy.enforce_success_rate > 0 {
            self.compare_success_rates(now, draw);
        }
        self.breakers.ejected.load(Relaxed)
    }

    fn compare_success_rates(&self, now: u64, draw: u32) {
        let mut rates = Vec::new();
        for host in self.hosts {
            let total = host.stats.window.total.swap(0, Relaxed);
            let good = host.stats.window.good.swap(0, Relaxed);
            if total >= RATE_REQUESTS && host.stats.ejection.until.load(Relaxed) == 0 {
                rates.push((&*host.stats, 100.0 * f64::from(good) / f64::from(total)));
            }
        }
        if rates.len() < RATE_HOSTS {
            return;
        }
        let count = rates.len() as f64;
        let mean = rates.iter().map(|(_, rate)| rate).sum::<f64>() / count;
        let variance = rates.iter().map(|(_, rate)| (rate - mean).powi(2)).sum::<f64>() / count;
        let threshold = mean - RATE_DEVIATIONS * variance.sqrt();
        if draw < self.policy.enforce_success_rate {
            for (host, _) in rates.iter().filter(|(_, rate)| *rate < threshold) {
                self.eject(host, now);
            }
        }
    }
}

/// Counts a failure. At the threshold the count starts anew, so that a host that could not be ejected is looked at again.
fn reaches(count: &AtomicU32, threshold: u32) -> bool {
    let met = count.fetch_add(1, Relaxed) + 1 == threshold;
    if met {
        count.store(0, Relaxed);
    }
    met
}

/// The success path reads and writes nothing while there is nothing to clear: the cache line stays shared.
fn clear(count: &AtomicU32) {
    if count.load(Relaxed) != 0 {
        count.store(0, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{cluster, endpoints};
    use super::*;
    use crate::snapshot::ClusterShared;

    const SOON: u64 = 1_000;

    fn policy(change: impl FnOnce(&mut OutlierDetection)) -> Policy {
        let mut said = OutlierDetection {
            max_ejection_percent: Some(100),
            enforcing_success_rate: Some(0),
            ..OutlierDetection::default()
        };
        change(&mut said);
        Policy::new(&said)
    }

    fn hosts(count: u16) -> ClusterShared {
        let ports: Vec<u16> = (1..=count).collect();
        ClusterShared::alone(cluster("c"), &endpoints(&ports), &Default::default())
    }

    fn detector<'a>(policy: &'a Policy, shared: &'a ClusterShared) -> Detector<'a> {
        Detector { policy, breakers: &shared.breakers, hosts: &shared.hosts().all }
    }

    fn is_ejected(shared: &ClusterShared, host: usize) -> bool {
        shared.hosts().all[host].stats.ejection.until.load(Relaxed) != 0
    }

    #[test]
    fn what_counts() {
        use Signal::{Broken, Connected, Status, Timeout};
        let plain = policy(|_| ());
        let split = policy(|p| p.split_external_local_origin_errors = true);
        let gateway = policy(|p| {
            p.consecutive_5xx = Some(0);
            p.consecutive_gateway_failure = Some(3);
            p.enforcing_consecutive_gateway_failure = Some(100);
        });
        let listed = policy(|p| p.error_statuses = vec![(429, 429), (500, 503)]);
        let off = policy(|p| p.enforcing_consecutive_5xx = Some(0));
        let cases: &[(&str, &Policy, &[Signal], bool)] = &[
            ("five 500", &plain, &[Status(500); 5], true),
            ("four", &plain, &[Status(500); 4], false),
            ("resets count as 5xx", &plain, &[Broken, Timeout, Broken, Status(500), Broken], true),
            (
                "not in a row",
                &plain,
                &[Status(500), Status(500), Status(500), Status(200), Status(500), Status(500)],
                false,
            ),
            ("a connection in between", &plain, &[Broken, Broken, Broken, Broken, Connected, Broken], false),
            ("404 is fine", &plain, &[Status(404); 9], false),
            ("split: own failures", &split, &[Broken, Broken, Timeout, Broken, Broken], true),
            ("split: a response proves the way", &split, &[Broken, Broken, Broken, Broken, Status(500), Broken], false),
            (
                "split: 5xx apart",
                &split,
                &[Status(500), Status(500), Status(500), Status(500), Broken, Status(500)],
                true,
            ),
            ("gateway", &gateway, &[Status(502), Status(503), Status(504)], true),
            ("500 is no gateway failure", &gateway, &[Status(502), Status(503), Status(500), Status(504)], false),
            ("listed", &listed, &[Status(429); 5], true),
            ("not listed", &listed, &[Status(504); 5], false),
            ("not enforced", &off, &[Status(500); 5], false),
        ];
        for (name, policy, signals, ejected) in cases {
            let shared = hosts(1);
            let detector = detector(policy, &shared);
            signals.iter().for_each(|s| {
                detector.record(&shared.hosts().all[0].stats, *s, SOON, 99);
            });
            assert_eq!(is_ejected(&shared, 0), *ejected, "{name}");
        }
    }

    #[test]
    fn no_more_than_the_share() {
        // (hosts, percent, how many may be ejected)
        for (count, percent, most) in [(1, 10, 0), (9, 10, 0), (10, 10, 1), (2, 50, 1), (3, 50, 1), (4, 100, 4)] {
            let policy = policy(|p| p.max_ejection_percent = Some(percent));
            let shared = hosts(count);
            let detector = detector(&policy, &shared);
            for host in &shared.hosts().all {
                (0..5).for_each(|_| {
                    detector.record(&host.stats, Signal::Broken, SOON, 0);
                });
            }
            let ejected = (0..usize::from(count)).filter(|i| is_ejected(&shared, *i)).count();
            assert_eq!(ejected, most, "{count} hosts at {percent} %");
        }
    }

    #[test]
    fn ejections_grow_and_are_forgiven() {
        let policy = policy(|p| {
            p.base_ejection_time = Some(Duration::from_secs(30));
            p.max_ejection_time = Some(Duration::from_secs(70));
        });
        let shared = hosts(1);
        let detector = detector(&policy, &shared);
        let stats = &shared.hosts().all[0].stats;
        let mut now = SOON;
        for expected in [30_000, 60_000, 70_000, 70_000] {
            (0..5).for_each(|_| {
                detector.record(stats, Signal::Broken, now, 0);
            });
            assert_eq!(stats.ejection.until.load(Relaxed), now + expected);
            detector.sweep(now + expected - 1, 0);
            assert!(is_ejected(&shared, 0));
            now += expected;
            assert_eq!(detector.sweep(now, 0), 0);
            assert!(!is_ejected(&shared, 0));
        }
        (0..4).for_each(|_| {
            detector.sweep(now, 0);
        });
        (0..5).for_each(|_| {
            detector.record(stats, Signal::Broken, now, 0);
        });
        assert_eq!(stats.ejection.until.load(Relaxed), now + 30_000);
    }

    #[test]
    fn one_worker_sweeps() {
        let policy = policy(|_| ());
        let shared = hosts(1);
        let detector = detector(&policy, &shared);
        assert!(!detector.is_due(1), "the first look only starts the interval");
        assert!(!detector.is_due(10_000));
        assert!(detector.is_due(10_001));
        assert!(!detector.is_due(10_001));
    }

    #[test]
    fn a_low_success_rate_ejects() {
        let policy = policy(|p| {
            p.enforcing_success_rate = Some(100);
            p.consecutive_5xx = Some(0);
        });
        let shared = hosts(6);
        let detector = detector(&policy, &shared);
        for (i, host) in shared.hosts().all.iter().enumerate() {
            for request in 0..200 {
                let status = if i == 0 && request % 2 == 0 { 500 } else { 200 };
                detector.record(&host.stats, Signal::Status(status), SOON, 0);
            }
        }
        assert_eq!(detector.sweep(SOON, 0), 1);
        assert!(is_ejected(&shared, 0));
    }
}
