//! Proxies are killed while no control plane is there.

use std::time::Duration;

use anyhow::Result;

use super::pair::Pair;
use super::{Args, Outcome};

/// Runs the case.
///
/// # Errors
/// When the rig does not stand.
pub(super) async fn run(args: &Args) -> Result<Outcome> {
    let mut pair = Pair::new(args.proxy.clone()).await?;
    pair.start().await?;
    for side in [&pair.near, &pair.far] {
        side.keeps().await?;
        side.istiod.server.set_down(true);
    }
    let mut took = Vec::new();
    let (mut unguarded, mut cpu) = (0, Duration::ZERO);
    for n in 0..args.kills {
        let (back, worked) = pair.kill(n % 2 == 0).await?;
        took.push(back);
        cpu += worked;
        unguarded += usize::from(!pair.guards().await?);
    }
    took.sort_unstable();
    let at = |share: usize| took.get((took.len() * share / 100).min(took.len().saturating_sub(1))).copied();
    let [half, most, worst] = [50, 95, 100].map(|share| at(share).unwrap_or_default().as_millis());
    let limit = Duration::from_millis(args.back_ms);
    let late = took.iter().filter(|took| **took > limit).count();
    let mut outcome = Outcome::default();
    outcome.say(format!(
        "{} kills, every other one of either proxy, no control plane: traffic back after {half} ms (median), {most} ms \
         (p95), {worst} ms (worst), {} ms of it the new process's CPU (mean); {late} later than {} ms; {unguarded} times \
         without policy or mTLS",
        args.kills,
        cpu.as_millis() / args.kills.max(1) as u128,
        args.back_ms
    ));
    outcome.expect(late == 0, || format!("{late} times traffic was back later than {} ms", args.back_ms));
    outcome.expect(unguarded == 0, || format!("{unguarded} times policy or mTLS was off"));
    Ok(outcome)
}
