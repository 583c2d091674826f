//! The process's own log. What happens to traffic is in the access log; this is for people who look for a fault.

use anyhow::{Context, Result};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// Changes the level while running.
#[derive(Clone)]
pub struct Levels(reload::Handle<EnvFilter, Registry>);

impl Levels {
    /// Sets levels as `--log-level` takes them.
    ///
    /// # Errors
    /// Says what is wrong with the text.
    pub fn set(&self, text: &str) -> Result<()> {
        self.0.reload(filter(text)?).context("the log is gone")
    }

    /// Sets the level of one target and leaves the others.
    ///
    /// # Errors
    /// Says what is wrong with the target or the level.
    pub fn set_one(&self, target: &str, level: &str) -> Result<()> {
        self.0.reload(parse(&format!("{},{target}={}", self.now(), known(level)))?).context("the log is gone")
    }

    /// What is set now.
    pub fn now(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }
}

/// Starts logging to standard error.
///
/// # Errors
/// Says what is wrong with the level, or that somebody else has the log already.
pub fn start(level: &str, json: bool) -> Result<Levels> {
    let (filter, handle) = reload::Layer::new(filter(level)?);
    let to = || std::io::stderr();
    let layer = if json {
        fmt::layer().json().with_writer(to).boxed()
    } else {
        fmt::layer().with_writer(to).with_ansi(false).boxed()
    };
    tracing_subscriber::registry().with(filter).with(layer).try_init().context("log")?;
    Ok(Levels(handle))
}

/// Levels as Envoy and pilot-agent name them are understood too; the chatter of libraries stays out unless asked for.
fn filter(text: &str) -> Result<EnvFilter> {
    let parts = text.split(',').map(|part| {
        let (scope, level) = part.rsplit_once('=').map_or((None, part), |(scope, level)| (Some(scope), level));
        let level = known(level);
        scope.map_or_else(|| format!("warn,istio_proxy={level}"), |scope| format!("{scope}={level}"))
    });
    parse(&parts.collect::<Vec<_>>().join(","))
}

fn known(level: &str) -> &str {
    match level.trim() {
        "warning" => "warn",
        "critical" => "error",
        level => level,
    }
}

fn parse(text: &str) -> Result<EnvFilter> {
    EnvFilter::builder().parse(text).with_context(|| format!("log level {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_of_envoy_are_understood() {
        assert_eq!(filter("warning").unwrap().to_string(), "istio_proxy=warn,warn");
        assert_eq!(
            filter("info,istio_proxy::tls=debug").unwrap().to_string(),
            "istio_proxy::tls=debug,istio_proxy=info,warn"
        );
        assert!(filter("loud").is_err());
    }

    #[test]
    fn one_target_changes_alone() {
        let (layer, handle) = reload::Layer::<EnvFilter, Registry>::new(filter("info").unwrap());
        let levels = Levels(handle);
        levels.set_one("istio_proxy::tls", "debug").unwrap();
        assert_eq!(levels.now(), "istio_proxy::tls=debug,istio_proxy=info,warn");
        assert!(levels.set_one("istio_proxy::tls", "loud").is_err());
        levels.set("critical").unwrap();
        assert_eq!(levels.now(), "istio_proxy=error,warn");
        drop(layer);
        assert!(levels.set("info").is_err(), "nobody listens any more");
    }
}
