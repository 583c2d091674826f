//! Clusters whose hosts are names: who is asked for when, and what an answer makes of the clusters.
//!
//! [`Book`] decides and does no I/O; [`Names`] asks. Rules are those of Envoy's STRICT_DNS and LOGICAL_DNS clusters: a
//! name is asked for again after its records' lifetime where that counts, else after the refresh rate; after a failure
//! with growing distance, and what was known stays. That a name has no address is an answer: a strict cluster loses the
//! hosts, a logical one keeps the last.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use proxy_config::Model;
use proxy_config::model::{Address, Cluster, ClusterKind, DnsOptions, Endpoint, Endpoints, LocalityEndpoints};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::dns::{Answer, Error, Family, Resolver};

/// Refresh rate when none is said.
const REFRESH: Duration = Duration::from_secs(5);
/// How long new configuration waits for the first answers to its names. A healthy resolver takes milliseconds; a broken
/// one must not hold back what else was said.
const WARM: Duration = Duration::from_secs(2);
/// Questions that are open at a time, so that a thousand names do not flood the resolver.
const OPEN: usize = 64;
/// A lifetime of zero would ask without a pause.
const LEAST: Duration = Duration::from_secs(1);

/// When a name is asked for again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Timing {
    refresh: Duration,
    respect_ttl: bool,
    /// First and longest distance after failures; `None` is the refresh rate.
    failure: Option<(Duration, Duration)>,
    jitter: Duration,
}

impl From<&DnsOptions> for Timing {
    fn from(said: &DnsOptions) -> Self {
        Self {
            refresh: said.refresh_rate.unwrap_or(REFRESH),
            respect_ttl: said.respect_ttl,
            failure: said.failure_refresh,
            jitter: said.jitter.unwrap_or_default(),
        }
    }
}

/// What is asked; clusters that ask the same share the answer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Question {
    host: String,
    family: Family,
    timing: Timing,
    /// One address is enough.
    logical: bool,
}

/// What is known of a name.
#[derive(Debug, Default)]
struct Entry {
    /// When to ask; `None` while it is being asked.
    due: Option<Instant>,
    /// What hosts are made of: all of the latest answer, for a logical cluster the first of the latest that had one.
    addresses: Vec<IpAddr>,
    /// Whether there was an answer or a failure yet.
    tried: bool,
    /// Failures in a row.
    failures: u32,
}

/// All names of a configuration. Decides, does no I/O.
#[derive(Debug, Default)]
struct Book {
    entries: BTreeMap<Question, Entry>,
}

impl Book {
    /// These names and no others; new ones are due at once.
    fn follow(&mut self, wanted: &BTreeSet<Question>, now: Instant) {
        self.entries.retain(|question, _| wanted.contains(question));
        for question in wanted {
            let new = || Entry { due: Some(now), ..Entry::default() };
            self.entries.entry(question.clone()).or_insert_with(new);
        }
    }

    /// Up to `most` names that are to be asked for now; they count as being asked.
    fn start(&mut self, now: Instant, most: usize) -> Vec<Question> {
        let due = self.entries.iter_mut().filter(|(_, entry)| entry.due.is_some_and(|due| due <= now));
        let begin = |(question, entry): (&Question, &mut Entry)| {
            entry.due = None;
            question.clone()
        };
        due.take(most).map(begin).collect()
    }

    /// When the next name is to be asked for.
    fn next_due(&self) -> Option<Instant> {
        self.entries.values().filter_map(|entry| entry.due).min()
    }

    /// Whether some name was never asked for to the end.
    fn is_cold(&self) -> bool {
        self.entries.values().any(|entry| !entry.tried)
    }

    /// Takes what came back; whether clusters change by it. `draw` is below 1.
    fn take(&mut self, question: &Question, came: Result<Answer, Error>, now: Instant, draw: f64) -> bool {
        let Some(entry) = self.entries.get_mut(question) else { return false };
        entry.tried = true;
        let timing = &question.timing;
        let answer = match came {
            Ok(answer) => answer,
            Err(e) => {
                if entry.failures == 0 {
                    tracing::warn!("{e}; what was known stays");
                }
                entry.due = Some(now + after_failure(timing, entry.failures, draw));
                entry.failures += 1;
                return false;
            }
        };
        if std::mem::take(&mut entry.failures) > 0 {
            tracing::info!("{} is resolved again", question.host);
        }
        let ttl = answer.ttl.filter(|ttl| timing.respect_ttl && !ttl.is_zero());
        entry.due = Some(now + ttl.unwrap_or(timing.refresh).max(LEAST) + timing.jitter.mul_f64(draw));
        let mut addresses = answer.addresses;
        if question.logical {
            addresses.truncate(1);
        }
        // Resolvers turn the order round: the same hosts in another order are no news.
        let same = same_set(&entry.addresses, &addresses) || (question.logical && addresses.is_empty());
        if !same {
            entry.addresses = addresses;
        }
        !same
    }

    fn known(&self, question: &Question) -> Option<&Entry> {
        self.entries.get(question)
    }
}

/// Doubled with every failure up to the longest, and a random part of that, so that clients do not ask in step.
fn after_failure(timing: &Timing, failures: u32, draw: f64) -> Duration {
    let Some((base, longest)) = timing.failure else { return timing.refresh.max(LEAST) };
    let grown = base.saturating_mul(1_u32.checked_shl(failures).unwrap_or(u32::MAX)).min(longest);
    grown.mul_f64(draw).max(LEAST.min(base))
}

fn same_set(a: &[IpAddr], b: &[IpAddr]) -> bool {
    a.len() == b.len() && a.iter().all(|ip| b.contains(ip))
}

/// The names of a cluster, and whether only one address of them counts.
fn inline(cluster: &Cluster) -> Option<(&Endpoints, bool)> {
    match &cluster.kind {
        ClusterKind::StrictDns(inline) => Some((inline, false)),
        ClusterKind::LogicalDns(inline) => Some((inline, true)),
        ClusterKind::Eds(_) | ClusterKind::Static(_) | ClusterKind::OriginalDst | ClusterKind::DynamicForwardProxy => {
            None
        }
    }
}

/// What to ask for an endpoint; `None` where its address is one.
fn question(options: &DnsOptions, logical: bool, endpoint: &Endpoint) -> Option<(Question, u16)> {
    let Address::Host(host, port) = &endpoint.address else { return None };
    if host.parse::<IpAddr>().is_ok() {
        return None;
    }
    let family = Family::named(&options.family);
    Some((Question { host: host.clone(), family, timing: options.into(), logical }, *port))
}

fn wanted(model: &Model) -> BTreeSet<Question> {
    let mut out = BTreeSet::new();
    for cluster in model.clusters.values() {
        let Some((inline, logical)) = inline(cluster) else { continue };
        let options = cluster.dns.clone().unwrap_or_default();
        let endpoints = inline.localities.iter().flat_map(|l| &l.endpoints);
        out.extend(endpoints.filter_map(|e| question(&options, logical, e)).map(|(question, _)| question));
    }
    out
}

/// The load assignment of a DNS cluster with the addresses that are known: each with the weight, locality and metadata
/// of its name. An address that several names of a priority have is one host, that of the first.
fn resolved(cluster: &Cluster, (inline, logical): (&Endpoints, bool), book: &Book) -> Endpoints {
    let options = cluster.dns.clone().unwrap_or_default();
    let mut seen = BTreeSet::new();
    let mut localities = Vec::new();
    for group in &inline.localities {
        let mut endpoints = Vec::new();
        for endpoint in &group.endpoints {
            let Some((question, port)) = question(&options, logical, endpoint) else {
                endpoints.push(endpoint.clone());
                continue;
            };
            let Some(entry) = book.known(&question) else { continue };
            let new = entry
                .addresses
                .iter()
                .map(|ip| SocketAddr::new(*ip, port))
                .filter(|a| seen.insert((group.priority, *a)));
            endpoints.extend(new.map(|address| at(endpoint, &question.host, address)));
        }
        localities.push(LocalityEndpoints { locality: group.locality.clone(), endpoints, ..*group });
    }
    Endpoints { name: Arc::clone(&cluster.name), localities, overprovisioning_factor: inline.overprovisioning_factor }
}

fn at(endpoint: &Endpoint, host: &str, address: SocketAddr) -> Endpoint {
    let mut out = Endpoint { address: Address::Socket(address), ..endpoint.clone() };
    if out.hostname.is_empty() {
        host.clone_into(&mut out.hostname);
    }
    out
}

/// The names of the served configuration, asked for in the background of whoever waits for [`Names::changed`].
pub(super) struct Names {
    resolver: Resolver,
    book: Book,
    open: JoinSet<(Question, Result<Answer, Error>)>,
}

impl Names {
    /// None yet.
    pub(super) fn new(resolver: Resolver) -> Self {
        Self { resolver, book: Book::default(), open: JoinSet::new() }
    }

    /// Looks after the names of this model, and gives it with what is known of them. Answers already there stay.
    pub(super) fn put_into(&mut self, model: &Arc<Model>) -> Arc<Model> {
        self.book.follow(&wanted(model), Instant::now());
        let named = model.clusters.values().filter_map(|cluster| Some((cluster, inline(cluster)?)));
        let known: Vec<_> = named.map(|(cluster, inline)| resolved(cluster, inline, &self.book)).collect();
        if known.is_empty() {
            return Arc::clone(model);
        }
        let mut out = Model::clone(model);
        out.endpoints.extend(known.into_iter().map(|e| (Arc::clone(&e.name), Arc::new(e))));
        Arc::new(out)
    }

    /// Waits for an answer that changes a cluster. Nothing is lost when the wait is given up.
    pub(super) async fn changed(&mut self) {
        while !self.step().await {}
    }

    /// Waits until every name was asked for once, but not for long; whether an answer changed a cluster.
    pub(super) async fn warm(&mut self) -> bool {
        let mut changed = false;
        let all = async {
            while self.book.is_cold() {
                changed |= self.step().await;
            }
        };
        if timeout(WARM, all).await.is_err() {
            tracing::warn!("some names are not resolved after {WARM:?}; their clusters have no hosts yet");
        }
        changed
    }

    /// Asks for what is due and waits for one event; whether it changed a cluster.
    async fn step(&mut self) -> bool {
        let now = Instant::now();
        for question in self.book.start(now, OPEN.saturating_sub(self.open.len())) {
            let resolver = self.resolver.clone();
            self.open.spawn(async move {
                let came = resolver.addresses(&question.host, question.family).await;
                (question, came)
            });
        }
        // With all slots in use, only an answer lets somebody else ask.
        let due = self.book.next_due().filter(|_| self.open.len() < OPEN);
        let until = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = until => false,
            Some(done) = self.open.join_next() => match done {
                Ok((question, came)) => self.book.take(&question, came, Instant::now(), fastrand::f64()),
                Err(e) => {
                    tracing::error!("a question for a name ended early: {e}");
                    false
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> DnsOptions {
        DnsOptions {
            family: "V4_ONLY".to_owned(),
            refresh_rate: Some(Duration::from_secs(60)),
            respect_ttl: true,
            failure_refresh: Some((Duration::from_secs(2), Duration::from_secs(10))),
            jitter: Some(Duration::from_millis(100)),
        }
    }

    fn asked(host: &str) -> Question {
        Question { host: host.to_owned(), family: Family::V4Only, timing: Timing::from(&options()), logical: false }
    }

    fn answer(addresses: &[&str], ttl: u64) -> Result<Answer, Error> {
        let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        Ok(Answer { addresses, ttl: Some(Duration::from_secs(ttl)).filter(|ttl| !ttl.is_zero()) })
    }

    fn failure() -> Result<Answer, Error> {
        Err(Error { host: "a".to_owned(), why: "no answer".to_owned() })
    }

    /// A book that asks for `a.example`, and the time.
    fn book() -> (Book, Instant) {
        let (mut book, now) = (Book::default(), Instant::now());
        book.follow(&BTreeSet::from([asked("a.example")]), now);
        assert_eq!(book.start(now, OPEN), [asked("a.example")]);
        assert_eq!(book.start(now, OPEN), [], "it is being asked");
        (book, now)
    }

    fn wait(book: &Book, now: Instant) -> Duration {
        book.next_due().unwrap() - now
    }

    #[tokio::test(start_paused = true)]
    async fn the_lifetime_counts_where_it_is_respected() {
        let (mut book, now) = book();
        assert!(book.is_cold());
        assert!(book.take(&asked("a.example"), answer(&["10.0.0.1"], 7), now, 0.5));
        assert!(!book.is_cold());
        assert_eq!(wait(&book, now), Duration::from_millis(7050));
        assert!(!book.take(&asked("a.example"), answer(&["10.0.0.1"], 0), now, 0.0), "the same is no news");
        assert_eq!(wait(&book, now), Duration::from_secs(60), "nobody said a lifetime");
        let deaf =
            Question { timing: Timing { respect_ttl: false, ..asked("a.example").timing }, ..asked("a.example") };
        book.follow(&BTreeSet::from([deaf.clone()]), now);
        book.take(&deaf, answer(&["10.0.0.1"], 7), now, 0.0);
        assert_eq!(wait(&book, now), Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn failures_keep_what_was_known_and_are_tried_again_ever_later() {
        let (mut book, now) = book();
        book.take(&asked("a.example"), answer(&["10.0.0.1"], 7), now, 0.0);
        for seconds in [2, 4, 8, 10, 10] {
            assert!(!book.take(&asked("a.example"), failure(), now, 1.0));
            assert_eq!(wait(&book, now), Duration::from_secs(seconds));
        }
        assert_eq!(book.entries[&asked("a.example")].addresses.len(), 1);
        book.take(&asked("a.example"), answer(&["10.0.0.1"], 7), now, 0.0);
        book.take(&asked("a.example"), failure(), now, 1.0);
        assert_eq!(wait(&book, now), Duration::from_secs(2), "an answer forgives");
    }

    #[tokio::test(start_paused = true)]
    async fn names_that_nobody_uses_are_forgotten_and_late_answers_to_them_too() {
        let (mut book, now) = book();
        book.follow(&BTreeSet::from([asked("b")]), now);
        assert!(!book.take(&asked("a.example"), answer(&["10.0.0.1"], 7), now, 0.0));
        assert_eq!(book.start(now, OPEN), [asked("b")]);
        book.follow(&BTreeSet::from([asked("b"), asked("c"), asked("d")]), now);
        assert_eq!(book.start(now, 1), [asked("c")], "no more than may be open");
    }

    /// A cluster of one name and one address.
    fn cluster(kind: fn(Endpoints) -> ClusterKind, name: &str) -> Cluster {
        let file = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: w, namespace: a}}\nstatus: {{podIP: 10.1.0.9}}\n---\n\
            apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: x, namespace: a}}\n\
            spec: {{hosts: [db.example], resolution: DNS, ports: [{{number: 80, name: http, protocol: HTTP}}], \
            endpoints: [{{address: {name}, weight: 3, locality: r/z}}, {{address: 10.0.0.9, locality: r/z}}]}}\n"
        );
        let source = proxy_config::Source { name: "x.yaml".to_owned(), text: file };
        let me = [("POD_NAME", "w"), ("POD_NAMESPACE", "a"), ("INSTANCE_IP", "10.1.0.9")];
        let who = proxy_config::WhoAmI::Env(me.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
        let inputs = proxy_config::Inputs { sources: vec![source], mesh: None, networks: None, who };
        let model = proxy_config::from_yaml(&inputs, None).unwrap().model;
        let mut cluster = Cluster::clone(&model.clusters["outbound|80||db.example"]);
        let ClusterKind::StrictDns(inline) = cluster.kind.clone() else { panic!("{:?}", cluster.kind) };
        cluster.kind = kind(inline);
        cluster.dns = Some(options());
        cluster
    }

    fn hosts(cluster: &Cluster, book: &Book) -> Vec<(String, u32, String)> {
        let all = resolved(cluster, inline(cluster).unwrap(), book).localities;
        let one = |e: &Endpoint| (format!("{:?}", e.address), e.weight, e.hostname.clone());
        all.iter().flat_map(|l| l.endpoints.iter().map(one)).collect()
    }

    fn seen(hosts: &[(&str, u32, &str)]) -> Vec<(String, u32, String)> {
        let address = |a: &str| {
            a.parse().map_or_else(
                |_| format!("{:?}", Address::Host(a.to_owned(), 80)),
                |a| format!("{:?}", Address::Socket(a)),
            )
        };
        hosts.iter().map(|(a, weight, name)| (address(a), *weight, (*name).to_owned())).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn strict_clusters_have_every_address_and_none_once_the_name_has_none() {
        let cluster = cluster(ClusterKind::StrictDns, "a.example");
        let (mut book, now) = book();
        let literal = hosts(&cluster, &book);
        assert_eq!(literal.len(), 1);
        book.take(&asked("a.example"), answer(&["10.0.0.1", "10.0.0.2"], 7), now, 0.0);
        let both = seen(&[("10.0.0.1:80", 3, "a.example"), ("10.0.0.2:80", 3, "a.example")]);
        assert_eq!(hosts(&cluster, &book)[..2], both);
        assert_eq!(hosts(&cluster, &book)[2..], literal);
        book.take(&asked("a.example"), answer(&["10.0.0.2", "10.0.0.1"], 7), now, 0.0);
        assert_eq!(hosts(&cluster, &book)[..2], both, "another order is no news");
        assert!(book.take(&asked("a.example"), answer(&[], 0), now, 0.0));
        assert_eq!(hosts(&cluster, &book), literal);
    }

    #[tokio::test(start_paused = true)]
    async fn logical_clusters_have_the_first_address_and_keep_it() {
        let cluster = cluster(ClusterKind::LogicalDns, "a.example");
        let a = Question { logical: true, ..asked("a.example") };
        let (mut book, now) = (Book::default(), Instant::now());
        book.follow(&BTreeSet::from([a.clone()]), now);
        book.take(&a, answer(&["10.0.0.1", "10.0.0.2"], 7), now, 0.0);
        assert_eq!(hosts(&cluster, &book)[..1], seen(&[("10.0.0.1:80", 3, "a.example")]));
        assert!(!book.take(&a, answer(&["10.0.0.1"], 7), now, 0.0), "the others do not matter");
        assert!(book.take(&a, answer(&["10.0.0.2", "10.0.0.1"], 7), now, 0.0), "another first is news");
        assert_eq!(hosts(&cluster, &book)[..1], seen(&[("10.0.0.2:80", 3, "a.example")]));
        assert!(!book.take(&a, answer(&[], 0), now, 0.0));
        assert_eq!(hosts(&cluster, &book)[..1], seen(&[("10.0.0.2:80", 3, "a.example")]));
    }

    async fn warmed(name: &str) -> (bool, usize) {
        let cluster = Arc::new(cluster(ClusterKind::StrictDns, name));
        let model = Arc::new(Model {
            clusters: BTreeMap::from([(Arc::clone(&cluster.name), Arc::clone(&cluster))]).into(),
            ..Model::default()
        });
        let mut names = Names::new(crate::dns::fixture::server().await);
        assert_eq!(names.put_into(&model).endpoints[&cluster.name].localities[0].endpoints.len(), 1, "the literal");
        let changed = names.warm().await;
        (changed, names.put_into(&model).endpoints[&cluster.name].localities[0].endpoints.len())
    }

    #[tokio::test]
    async fn names_are_asked_of_a_real_resolver() {
        assert_eq!(warmed("two.example").await, (true, 3));
        assert_eq!(warmed("broken.example").await, (false, 1), "a failure ends the waiting too");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_ever() {
        let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut names = Names::new(Resolver::with_servers(&[silent.local_addr().unwrap()]));
        let cluster = Arc::new(cluster(ClusterKind::StrictDns, "two.example"));
        let clusters = BTreeMap::from([(Arc::clone(&cluster.name), cluster)]).into();
        names.put_into(&Arc::new(Model { clusters, ..Model::default() }));
        let start = Instant::now();
        assert!(!names.warm().await);
        assert_eq!(start.elapsed(), WARM);
    }

    #[tokio::test]
    async fn without_names_nothing_is_waited_for() {
        assert!(!Names::new(Resolver::system()).warm().await);
    }
}
