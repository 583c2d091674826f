//! Circuit breakers as guards. What a guard took it gives back when it is dropped, whichever way its owner ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_utils::CachePadded;
use proxy_config::model::CircuitBreakers;

use crate::error::{Error, Kind, Limit};
use crate::snapshot::{Breakers, Gauge, HostStats};
use crate::telemetry::ClusterMetrics;

/// This worker's counters of a cluster.
pub(super) type Metrics = Arc<CachePadded<ClusterMetrics>>;

/// One unit of one limit of a cluster.
#[derive(Debug)]
pub(super) struct Permit {
    breakers: Arc<Breakers>,
    limit: Limit,
}

impl Permit {
    /// Takes a unit, or says which limit is met.
    pub(super) fn take(breakers: &Arc<Breakers>, limit: Limit) -> Result<Self, Error> {
        if gauge(breakers, limit).take() {
            return Ok(Self { breakers: Arc::clone(breakers), limit });
        }
        Err(Error::local(Kind::Overflow(limit)))
    }

    /// Takes a unit whatever the limit is: the first connection of a pool, without which its requests would wait for
    /// ever.
    pub(super) fn force(breakers: &Arc<Breakers>, limit: Limit) -> Self {
        gauge(breakers, limit).force();
        Self { breakers: Arc::clone(breakers), limit }
    }

    /// Takes a retry, from the budget if there is one.
    pub(super) fn retry(breakers: &Arc<Breakers>, config: &CircuitBreakers) -> Result<Self, Error> {
        let most = retry_limit(config, breakers.requests.used(), breakers.pending.used());
        if breakers.retries.take_below(most) {
            return Ok(Self { breakers: Arc::clone(breakers), limit: Limit::Retries });
        }
        Err(Error::local(Kind::Overflow(Limit::Retries)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        gauge(&self.breakers, self.limit).give_back();
    }
}

fn gauge(breakers: &Breakers, limit: Limit) -> &Gauge {
    match limit {
        Limit::Connections => &breakers.connections,
        Limit::Pending => &breakers.pending,
        Limit::Requests => &breakers.requests,
        Limit::Retries => &breakers.retries,
    }
}

/// Retries that may run at once: `max_retries`, or the budget's share of what is active.
fn retry_limit(config: &CircuitBreakers, active: u32, pending: u32) -> u32 {
    let Some((percent, least)) = config.retry_budget else { return config.max_retries };
    let load = f64::from(active) + f64::from(pending);
    // A share of two counts of 32 bits; the conversion saturates at the top.
    let share = (percent / 100.0 * load) as u32;
    share.max(least)
}

/// A request (TCP: a connection) that a host is busy with.
#[derive(Debug)]
pub(super) struct Active {
    stats: Arc<HostStats>,
    metrics: Metrics,
}

impl Active {
    pub(super) fn enter(stats: &Arc<HostStats>, metrics: &Metrics) -> Self {
        stats.active.fetch_add(1, Ordering::Relaxed);
        stats.totals.requests.fetch_add(1, Ordering::Relaxed);
        metrics.rq_total.inc();
        metrics.rq_active.inc();
        Self { stats: Arc::clone(stats), metrics: Arc::clone(metrics) }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.stats.active.fetch_sub(1, Ordering::Relaxed);
        self.metrics.rq_active.dec();
    }
}

/// An open connection, or one that is being opened.
#[derive(Debug)]
pub(super) struct Connected {
    _permit: Permit,
    stats: Arc<HostStats>,
    pub(super) metrics: Metrics,
}

impl Connected {
    pub(super) fn new(permit: Permit, stats: &Arc<HostStats>, metrics: &Metrics) -> Self {
        metrics.cx_total.inc();
        metrics.cx_active.inc();
        stats.totals.connections.fetch_add(1, Ordering::Relaxed);
        stats.totals.connections_total.fetch_add(1, Ordering::Relaxed);
        Self { _permit: permit, stats: Arc::clone(stats), metrics: Arc::clone(metrics) }
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.metrics.cx_active.dec();
        self.metrics.cx_destroy.inc();
        self.stats.totals.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> CircuitBreakers {
        CircuitBreakers { max_connections: 1, max_pending_requests: 0, max_requests: 2, ..CircuitBreakers::default() }
    }

    #[test]
    fn a_dropped_permit_is_free_again() {
        let breakers = Arc::new(Breakers::new(&limits()));
        let one = Permit::take(&breakers, Limit::Requests).unwrap();
        let _two = Permit::take(&breakers, Limit::Requests).unwrap();
        let refused = Permit::take(&breakers, Limit::Requests).unwrap_err();
        assert_eq!(refused.kind, Kind::Overflow(Limit::Requests));
        drop(one);
        assert_eq!(breakers.requests.used(), 1);
        assert!(Permit::take(&breakers, Limit::Requests).is_ok());
        assert!(Permit::take(&breakers, Limit::Pending).is_err());
    }

    #[test]
    fn a_forced_permit_counts_too() {
        let breakers = Arc::new(Breakers::new(&limits()));
        let forced = (0..3).map(|_| Permit::force(&breakers, Limit::Connections)).collect::<Vec<_>>();
        assert_eq!(breakers.connections.used(), 3);
        assert!(Permit::take(&breakers, Limit::Connections).is_err());
        drop(forced);
        assert_eq!(breakers.connections.used(), 0);
    }

    #[test]
    fn retry_limits() {
        let fixed = CircuitBreakers { max_retries: 7, ..limits() };
        assert_eq!(retry_limit(&fixed, 1000, 1000), 7);
        let budget = CircuitBreakers { retry_budget: Some((20.0, 3)), ..limits() };
        for (active, pending, most) in [(0, 0, 3), (10, 5, 3), (100, 0, 20), (80, 25, 21)] {
            assert_eq!(retry_limit(&budget, active, pending), most, "{active} active, {pending} pending");
        }
    }
}
