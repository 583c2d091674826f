//! Balancers: which host of a cluster comes next. One balancer per worker and cluster; it reads the shared health and
//! load of hosts and keeps lists of its own, made anew when a host was ejected or came back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use proxy_config::model::LbPolicy;

use super::edf::Edf;
use super::hash::{Maglev, Ring, Share};
use super::health::{self, Count, Fitness, Load};
use crate::snapshot::{ClusterShared, Host, LocalityHosts, Priority};

/// Share of its weight that a host begins with, when it warms up.
const WARM_UP_START: f64 = 0.1;
/// Envoy's panic threshold when configuration does not say, percent.
const PANIC_THRESHOLD: f64 = 50.0;

/// What one choice depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wish<'a> {
    /// For consistent hashing.
    pub(super) hash: Option<u64>,
    /// Hosts that were tried before and are avoided, by position.
    pub(super) avoid: &'a [u32],
    /// How often another host is chosen to avoid them.
    pub(super) attempts: u32,
    /// Priorities that get nothing as long as others can take it, a bit each.
    pub(super) pass_over: u32,
}

/// Lists of hosts by what they are good for, and whose turn it is.
#[derive(Debug)]
pub(super) struct Balancer {
    version: u32,
    stale_at: Option<u64>,
    counts: Vec<Count>,
    loads: Vec<Load>,
    levels: Vec<Level>,
    rng: fastrand::Rng,
}

#[derive(Debug, Default)]
struct Level {
    all: Group,
    healthy: Groups,
    degraded: Groups,
}

/// The hosts of one fitness: by locality when localities have weights, and all together.
#[derive(Debug, Default)]
struct Groups {
    together: Group,
    localities: Vec<Group>,
    turns: Edf,
    weights: Vec<f64>,
}

#[derive(Debug, Default)]
struct Group {
    hosts: Box<[u32]>,
    turns: Turns,
}

#[derive(Debug, Default)]
enum Turns {
    #[default]
    Equal,
    Next(usize),
    Weighted(Edf),
    Ring(Ring),
    Maglev(Maglev),
}

impl Balancer {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            version: 0,
            stale_at: None,
            counts: Vec::new(),
            loads: Vec::new(),
            levels: Vec::new(),
            rng: fastrand::Rng::with_seed(seed),
        }
    }

    /// A number below `below`.
    pub(super) fn draw(&mut self, below: u32) -> u32 {
        self.rng.u32(..below)
    }

    /// A host by its position in [`crate::snapshot::HostSet::all`]; `None`: nobody may be used. `now` is milliseconds on
    /// the cluster's clock and read only while hosts warm up.
    pub(super) fn pick(&mut self, cluster: &ClusterShared, wish: Wish<'_>, now: impl Fn() -> u64) -> Option<u32> {
        let version = cluster.breakers.health_version.load(Relaxed).wrapping_add(1);
        if version != self.version || self.stale_at.is_some_and(|at| now() >= at) {
            self.rebuild(cluster, now());
            self.version = version;
        }
        let mut chosen = self.choose(cluster, wish, 0, &now)?;
        for attempt in 1..=wish.attempts {
            if !wish.avoid.contains(&chosen) {
                break;
            }
            chosen = self.choose(cluster, wish, attempt, &now)?;
        }
        Some(chosen)
    }

    fn choose(&mut self, cluster: &ClusterShared, wish: Wish<'_>, attempt: u32, now: &impl Fn() -> u64) -> Option<u32> {
        let hash = wish.hash.unwrap_or_else(|| self.rng.u64(..));
        let by_hash = matches!(cluster.config.lb, LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. });
        let draw = if by_hash { hash } else { self.rng.u64(..) };
        let (level, degraded) = match &*self.loads {
            [only] if only.degraded == 0 => (0, false),
            loads if wish.pass_over == 0 => health::choose(loads, draw)?,
            _ => self.choose_passing_over(cluster, wish.pass_over, draw)?,
        };
        let panic = self.loads[level].panic;
        let level = &mut self.levels[level];
        let group = if panic {
            &mut level.all
        } else if degraded {
            level.degraded.choose()
        } else {
            level.healthy.choose()
        };
        let seen = Seen { cluster, now: &now };
        group.pick(&seen, hash, attempt, &mut self.rng)
    }

    /// Only for retries that have tried a priority for long enough; worked out each time.
    fn choose_passing_over(&self, cluster: &ClusterShared, pass_over: u32, draw: u64) -> Option<(usize, bool)> {
        let is_passed = |level: u32| pass_over.checked_shr(level).unwrap_or(0) & 1 == 1;
        let without = |(level, count): (u32, &Count)| match is_passed(level) {
            true => Count { healthy: 0, degraded: 0, ..*count },
            false => *count,
        };
        let rest: Vec<Count> = (0..).zip(&self.counts).map(without).collect();
        if rest.iter().all(|count| count.healthy + count.degraded == 0) {
            return health::choose(&self.loads, draw);
        }
        health::choose(&health::loads(&rest, cluster.hosts().overprovisioning, 0.0), draw)
    }

    fn rebuild(&mut self, cluster: &ClusterShared, now: u64) {
        let set = cluster.hosts();
        let threshold = cluster.config.healthy_panic_threshold.unwrap_or(PANIC_THRESHOLD);
        self.counts = health::count(set);
        self.loads = health::loads(&self.counts, set.overprovisioning, threshold);
        self.stale_at = warm_at(cluster, now);
        let positions: HashMap<*const Host, u32> =
            (0..).zip(&set.all).map(|(i, host)| (Arc::as_ptr(host), i)).collect();
        let build = Build { cluster, positions, warming: self.stale_at.is_some(), now };
        self.levels = set.priorities.iter().map(|priority| build.level(priority, &mut self.rng)).collect();
    }
}

/// What a group needs to see of the cluster to weigh its hosts.
struct Seen<'a, N: Fn() -> u64> {
    cluster: &'a ClusterShared,
    now: &'a N,
}

impl<N: Fn() -> u64> Seen<'_, N> {
    fn host(&self, at: u32) -> &Host {
        &self.cluster.hosts().all[at as usize]
    }

    fn active(&self, at: u32) -> u32 {
        self.host(at).stats.active.load(Relaxed)
    }

    /// The weight of now: less while a host warms up, and less the busier it is.
    fn weight(&self, at: u32) -> f64 {
        let host = self.host(at);
        let mut weight = f64::from(host.weight);
        if let LbPolicy::LeastRequest { .. } = self.cluster.config.lb {
            weight /= f64::from(self.active(at)) + 1.0;
        }
        match window(self.cluster) {
            Some(window) => weight * warmth(host, window, (self.now)()),
            None => weight,
        }
    }
}

impl Groups {
    fn choose(&mut self) -> &mut Group {
        let weights = &self.weights;
        match self.turns.pick(|locality| weights[locality as usize]) {
            Some(locality) => &mut self.localities[locality as usize],
            None => &mut self.together,
        }
    }
}

impl Group {
    fn pick<N: Fn() -> u64>(
        &mut self,
        seen: &Seen<'_, N>,
        hash: u64,
        attempt: u32,
        rng: &mut fastrand::Rng,
    ) -> Option<u32> {
        let hosts = &*self.hosts;
        if hosts.is_empty() {
            return None;
        }
        match &mut self.turns {
            Turns::Ring(ring) => ring.pick(hash, attempt),
            Turns::Maglev(maglev) => maglev.pick(hash, attempt),
            Turns::Weighted(edf) => edf.pick(|at| seen.weight(at)),
            Turns::Next(next) => {
                *next = next.wrapping_add(1);
                Some(hosts[*next % hosts.len()])
            }
            Turns::Equal => match &seen.cluster.config.lb {
                LbPolicy::LeastRequest { choice_count, .. } => {
                    Some(least_active(hosts, choice_count.unwrap_or(2), seen, rng))
                }
                _ => Some(hosts[rng.usize(..hosts.len())]),
            },
        }
    }
}

/// The least busy of a few that were drawn; the first drawn wins a tie.
fn least_active<N: Fn() -> u64>(hosts: &[u32], choices: u32, seen: &Seen<'_, N>, rng: &mut fastrand::Rng) -> u32 {
    let mut best = hosts[rng.usize(..hosts.len())];
    if hosts.len() == 1 {
        return best;
    }
    let mut load = seen.active(best);
    for _ in 1..choices.max(2) {
        let other = hosts[rng.usize(..hosts.len())];
        let other_load = seen.active(other);
        if other_load < load {
            (best, load) = (other, other_load);
        }
    }
    best
}

fn window(cluster: &ClusterShared) -> Option<Duration> {
    match &cluster.config.lb {
        LbPolicy::RoundRobin { slow_start } | LbPolicy::LeastRequest { slow_start, .. } => {
            slow_start.filter(|window| !window.is_zero())
        }
        LbPolicy::Random | LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. } | LbPolicy::ClusterProvided => None,
    }
}

fn millis(window: Duration) -> u64 {
    u64::try_from(window.as_millis()).unwrap_or(u64::MAX)
}

/// The share of its weight that a warming host has.
fn warmth(host: &Host, window: Duration, now: u64) -> f64 {
    let age = now.saturating_sub(host.stats.ejection.since.load(Relaxed)).max(1);
    (age as f64 / millis(window).max(1) as f64).clamp(WARM_UP_START, 1.0)
}

/// When the last warming host is warm; `None` when all are. Hosts that were never seen are seen now.
fn warm_at(cluster: &ClusterShared, now: u64) -> Option<u64> {
    let window = millis(window(cluster)?);
    let warm = cluster.hosts().all.iter().map(|host| {
        let since = &host.stats.ejection.since;
        // Another worker may have seen it first; then that is when it was seen.
        let _ = since.compare_exchange(0, now, Relaxed, Relaxed);
        since.load(Relaxed).saturating_add(window)
    });
    warm.max().filter(|at| *at > now)
}

/// Makes the lists of one moment.
struct Build<'a> {
    cluster: &'a ClusterShared,
    positions: HashMap<*const Host, u32>,
    warming: bool,
    now: u64,
}

impl Build<'_> {
    fn level(&self, priority: &Priority, rng: &mut fastrand::Rng) -> Level {
        let all: Vec<u32> = priority.hosts.iter().map(|host| self.position(host)).collect();
        let shares = self.plain_shares(&all);
        Level {
            all: self.group(all, shares, rng),
            healthy: self.groups(priority, Fitness::Healthy, rng),
            degraded: self.groups(priority, Fitness::Degraded, rng),
        }
    }

    fn position(&self, host: &Arc<Host>) -> u32 {
        *self.positions.get(&Arc::as_ptr(host)).expect("priorities hold the hosts of the set")
    }

    fn fit(&self, hosts: &[Arc<Host>], fitness: Fitness) -> Vec<u32> {
        hosts.iter().filter(|h| health::fitness(h) == fitness).map(|h| self.position(h)).collect()
    }

    fn groups(&self, priority: &Priority, fitness: Fitness, rng: &mut fastrand::Rng) -> Groups {
        let fit = self.fit(&priority.hosts, fitness);
        let by_locality =
            self.cluster.config.locality_weighted && priority.localities.iter().any(|l| l.weight.is_some());
        if !by_locality {
            let shares = self.plain_shares(&fit);
            return Groups { together: self.group(fit, shares, rng), ..Groups::default() };
        }
        if self.hashes() {
            let shares = self.locality_shares(priority, fitness);
            return Groups { together: self.group(fit, shares, rng), ..Groups::default() };
        }
        let weights: Vec<f64> = priority.localities.iter().map(|l| self.locality_weight(l, fitness)).collect();
        let group = |locality: &LocalityHosts, rng: &mut fastrand::Rng| {
            self.group(self.fit(&locality.hosts, fitness), Vec::new(), rng)
        };
        let localities = priority.localities.iter().map(|l| group(l, rng)).collect();
        let turns = Edf::new((0..).zip(weights.iter().copied()), rng.u64(..), |i| weights[i as usize]);
        Groups { together: self.group(fit, Vec::new(), rng), localities, turns, weights }
    }

    /// A locality counts with its weight as long as enough of its hosts are fit, less when they are fewer.
    fn locality_weight(&self, locality: &LocalityHosts, fitness: Fitness) -> f64 {
        let fit = self.fit(&locality.hosts, fitness).len();
        if fit == 0 {
            return 0.0;
        }
        let factor = f64::from(self.cluster.hosts().overprovisioning) / 100.0;
        let able = (factor * fit as f64 / locality.hosts.len() as f64).min(1.0);
        f64::from(locality.weight.unwrap_or(0)) * able
    }

    fn hashes(&self) -> bool {
        matches!(self.cluster.config.lb, LbPolicy::RingHash { .. } | LbPolicy::Maglev { .. })
    }

    fn group(&self, hosts: Vec<u32>, shares: Vec<Share>, rng: &mut fastrand::Rng) -> Group {
        let all = &self.cluster.hosts().all;
        let same =
            |hosts: &[u32]| hosts.windows(2).all(|two| all[two[0] as usize].weight == all[two[1] as usize].weight);
        let turns = match &self.cluster.config.lb {
            LbPolicy::RingHash { minimum, maximum, .. } => Turns::Ring(Ring::build(&shares, *minimum, *maximum)),
            LbPolicy::Maglev { table_size } => Turns::Maglev(Maglev::build(&shares, *table_size)),
            LbPolicy::Random | LbPolicy::ClusterProvided => Turns::Equal,
            LbPolicy::RoundRobin { .. } | LbPolicy::LeastRequest { .. } if self.warming || !same(&hosts) => {
                let now = || self.now;
                let seen = Seen { cluster: self.cluster, now: &now };
                let weigh = |at| seen.weight(at);
                Turns::Weighted(Edf::new(hosts.iter().map(|at| (*at, weigh(*at))), rng.u64(..), weigh))
            }
            LbPolicy::RoundRobin { .. } => Turns::Next(rng.usize(..)),
            LbPolicy::LeastRequest { .. } => Turns::Equal,
        };
        Group { hosts: hosts.into(), turns }
    }

    /// Shares by the weights of hosts; empty when nothing is hashed.
    fn plain_shares(&self, hosts: &[u32]) -> Vec<Share> {
        if self.hashes() { self.shares(hosts, 1.0) } else { Vec::new() }
    }

    fn locality_shares(&self, priority: &Priority, fitness: Fitness) -> Vec<Share> {
        let total: u64 = priority.localities.iter().map(|l| u64::from(l.weight.unwrap_or(0))).sum();
        let part = |l: &LocalityHosts| f64::from(l.weight.unwrap_or(0)) / total.max(1) as f64;
        let weighted = priority.localities.iter().filter(|l| l.weight.unwrap_or(0) > 0);
        weighted.flat_map(|l| self.shares(&self.fit(&l.hosts, fitness), part(l))).collect()
    }

    fn shares(&self, hosts: &[u32], of: f64) -> Vec<Share> {
        let all = &self.cluster.hosts().all;
        let total: f64 = hosts.iter().map(|at| f64::from(all[*at as usize].weight)).sum();
        let by_name = matches!(self.cluster.config.lb, LbPolicy::RingHash { use_hostname: true, .. });
        let share = |at: &u32| {
            let host = &all[*at as usize];
            let key = match &host.pipe {
                _ if by_name && !host.hostname.is_empty() => host.hostname.to_string(),
                Some(path) => path.to_string(),
                None => host.address.to_string(),
            };
            Share { key, share: of * f64::from(host.weight) / total, host: *at }
        };
        hosts.iter().map(share).collect()
    }
}

#[cfg(test)]
mod tests {
    use proxy_config::model::{Cluster, Endpoints, HealthStatus};

    use super::super::fixture::{cluster, endpoint, endpoints, group, shared};
    use super::super::hash::xx_hash;
    use super::*;

    const ANY: Wish<'static> = Wish { hash: None, avoid: &[], attempts: 0, pass_over: 0 };

    fn with(lb: LbPolicy) -> Cluster {
        Cluster { lb, ..cluster("c") }
    }

    fn weighted(weights: &[u32]) -> Endpoints {
        let hosts = (1..).zip(weights).map(|(port, w)| endpoint(([127, 0, 0, 1], port).into(), *w)).collect();
        Endpoints { localities: vec![group(0, None, hosts)], ..Endpoints::default() }
    }

    fn spread(cluster: &ClusterShared, picks: u32) -> Vec<u32> {
        let mut balancer = Balancer::new(7);
        let mut counts = vec![0; cluster.hosts().all.len()];
        (0..picks).for_each(|_| counts[balancer.pick(cluster, ANY, || 1).unwrap() as usize] += 1);
        counts
    }

    fn near(counts: &[u32], expected: &[u32]) {
        let close = |(got, want): (&u32, &u32)| got.abs_diff(*want) <= 10 + want / 8;
        assert!(counts.iter().zip(expected).all(close), "{counts:?} is not near {expected:?}");
    }

    fn least() -> LbPolicy {
        LbPolicy::LeastRequest { slow_start: None, choice_count: None }
    }

    #[test]
    fn balancers_share_as_they_should() {
        let round = LbPolicy::RoundRobin { slow_start: None };
        let ring = LbPolicy::RingHash { minimum: None, maximum: None, use_hostname: false };
        let cases: &[(LbPolicy, &[u32], &[u32])] = &[
            (least(), &[1, 1, 1, 1], &[250; 4]),
            (least(), &[1, 3], &[250, 750]),
            (round.clone(), &[1, 1, 1, 1], &[250; 4]),
            (round, &[2, 5, 3], &[200, 500, 300]),
            (LbPolicy::Random, &[1, 9], &[500, 500]),
            (ring, &[1, 3], &[250, 750]),
            (LbPolicy::Maglev { table_size: Some(1009) }, &[1, 3], &[250, 750]),
        ];
        for (lb, weights, expected) in cases {
            near(&spread(&shared(with(lb.clone()), &weighted(weights)), 1000), expected);
        }
    }

    #[test]
    fn the_less_busy_of_two() {
        let cluster = shared(cluster("c"), &endpoints(&[1, 2]));
        cluster.hosts().all[0].stats.active.store(5, Relaxed);
        // Both draws hit the busy one in a quarter of the picks.
        near(&spread(&cluster, 1000), &[250, 750]);
    }

    #[test]
    fn ejected_hosts_get_nothing_at_once() {
        let cluster = shared(cluster("c"), &endpoints(&[1, 2, 3]));
        let mut balancer = Balancer::new(1);
        assert!(balancer.pick(&cluster, ANY, || 1).is_some());
        let eject = |at: usize, until| {
            cluster.hosts().all[at].stats.ejection.until.store(until, Relaxed);
            cluster.breakers.health_version.fetch_add(1, Relaxed);
        };
        eject(0, 9);
        eject(1, 9);
        assert!((0..50).all(|_| balancer.pick(&cluster, ANY, || 1) == Some(2)));
        eject(2, 9);
        assert_eq!(balancer.pick(&cluster, ANY, || 1), None, "panic is off");
        eject(1, 0);
        assert!((0..50).all(|_| balancer.pick(&cluster, ANY, || 1) == Some(1)));
    }

    #[test]
    fn panic_uses_hosts_that_are_out() {
        let mut config = cluster("c");
        config.healthy_panic_threshold = None;
        let cluster = shared(config, &endpoints(&[1, 2, 3, 4]));
        cluster.hosts().all[..3].iter().for_each(|h| h.stats.ejection.until.store(9, Relaxed));
        assert!(spread(&cluster, 200).iter().all(|count| *count > 20));
    }

    #[test]
    fn priorities_spill_and_localities_weigh() {
        let hosts =
            |from: u16| (from..from + 4).map(|port| endpoint(([127, 0, 0, 1], port).into(), 1)).collect::<Vec<_>>();
        let said =
            Endpoints { localities: vec![group(0, None, hosts(1)), group(1, None, hosts(11))], ..Endpoints::default() };
        let cluster_ = shared(cluster("c"), &said);
        near(&spread(&cluster_, 1000), &[250, 250, 250, 250, 0, 0, 0, 0]);
        cluster_.hosts().all[..2].iter().for_each(|h| h.stats.ejection.until.store(9, Relaxed));
        near(&spread(&cluster_, 1000), &[0, 0, 350, 350, 75, 75, 75, 75]);

        let mut config = cluster("c");
        config.locality_weighted = true;
        let said = Endpoints {
            localities: vec![group(0, Some(20), hosts(1)), group(0, Some(80), hosts(11))],
            ..Endpoints::default()
        };
        let cluster_ = shared(config, &said);
        near(&spread(&cluster_, 1000), &[50, 50, 50, 50, 200, 200, 200, 200]);
        // One of four left: 80 × 1.4 / 4 = 28 against 20.
        cluster_.hosts().all[4..7].iter().for_each(|h| h.stats.ejection.until.store(9, Relaxed));
        near(&spread(&cluster_, 960), &[100, 100, 100, 100, 0, 0, 0, 560]);
    }

    #[test]
    fn degraded_hosts_are_the_last_resort() {
        let mut said = endpoints(&[1, 2]);
        said.localities[0].endpoints[0].health = HealthStatus::Degraded;
        said.localities[0].endpoints[1].health = HealthStatus::Unhealthy;
        assert_eq!(spread(&shared(cluster("c"), &said), 50), [50, 0]);
        said.localities[0].endpoints[1].health = HealthStatus::Healthy;
        // Half of the hosts at 140 %: 70 for the healthy one.
        near(&spread(&shared(cluster("c"), &said), 1000), &[300, 700]);
    }

    #[test]
    fn a_key_stays_with_its_host() {
        for lb in [
            LbPolicy::RingHash { minimum: None, maximum: None, use_hostname: false },
            LbPolicy::Maglev { table_size: None },
        ] {
            let cluster = shared(with(lb), &endpoints(&[1, 2, 3, 4, 5]));
            let (mut one, mut two) = (Balancer::new(1), Balancer::new(2));
            for key in 0..100_u32 {
                let wish = Wish { hash: Some(xx_hash(&key.to_le_bytes())), ..ANY };
                assert_eq!(one.pick(&cluster, wish, || 1), two.pick(&cluster, wish, || 1));
            }
        }
    }

    #[test]
    fn tried_hosts_are_avoided_for_a_while() {
        let cluster = shared(with(LbPolicy::RoundRobin { slow_start: None }), &endpoints(&[1, 2, 3]));
        let mut balancer = Balancer::new(3);
        let wish = Wish { avoid: &[0, 2], attempts: 5, ..ANY };
        assert!((0..20).all(|_| balancer.pick(&cluster, wish, || 1) == Some(1)));
        let all = Wish { avoid: &[0, 1, 2], attempts: 5, ..ANY };
        assert!(balancer.pick(&cluster, all, || 1).is_some(), "a tried host is better than none");
    }

    #[test]
    fn tried_priorities_are_passed_over_while_others_can_serve() {
        let hosts = |port: u16| vec![endpoint(([127, 0, 0, 1], port).into(), 1)];
        let localities = vec![group(0, None, hosts(1)), group(1, None, hosts(2))];
        let cluster = shared(cluster("c"), &Endpoints { localities, ..Endpoints::default() });
        let mut balancer = Balancer::new(3);
        let mut with = |pass_over| balancer.pick(&cluster, Wish { pass_over, ..ANY }, || 1);
        assert_eq!((with(0), with(0b1), with(0b11)), (Some(0), Some(1), Some(0)));
    }

    #[test]
    fn new_hosts_warm_up() {
        let window = Duration::from_secs(10);
        let said = endpoints(&[1, 2]);
        let cluster = shared(with(LbPolicy::RoundRobin { slow_start: Some(window) }), &said);
        cluster.hosts().all[0].stats.ejection.since.store(1, Relaxed);
        let mut balancer = Balancer::new(3);
        let mut at = |now: u64| {
            let mut counts = [0_u32; 2];
            (0..1100).for_each(|_| counts[balancer.pick(&cluster, ANY, || now).unwrap() as usize] += 1);
            counts
        };
        near(&at(20_000), &[1000, 100]);
        near(&at(25_000), &[733, 367]);
        near(&at(30_001), &[550, 550]);
    }
}
