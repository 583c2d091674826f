//! Numbers as text: Envoy's `/stats`, its JSON, and Prometheus.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use regex::Regex;
use serde_json::json;

use super::histogram::Merged;
use super::labels::push_label;

/// One number with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// `cluster`, `listener`, `http`, `tcp`: the name continues with the instance. `server` and the like: the name
    /// continues with `name`. Empty: a name of our own, whose instance is label text.
    pub scope: &'static str,
    /// Which one; empty for scopes without instances.
    pub instance: Arc<str>,
    /// The rest of the name, `upstream_cx_total`.
    pub name: Cow<'static, str>,
    /// How much.
    pub value: Value,
}

/// How much.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Grows.
    Counter(u64),
    /// Goes up and down.
    Gauge(i64),
    /// A distribution.
    Histogram(Box<Merged>),
}

impl Value {
    fn is_used(&self) -> bool {
        match self {
            Self::Counter(n) => *n != 0,
            Self::Gauge(n) => *n != 0,
            Self::Histogram(merged) => merged.count() != 0,
        }
    }
}

impl Sample {
    /// A counter without an instance, `scope.name`.
    pub fn counter(scope: &'static str, name: &'static str, value: u64) -> Self {
        Self { scope, instance: "".into(), name: name.into(), value: Value::Counter(value) }
    }

    /// A gauge without an instance, `scope.name`.
    pub fn gauge(scope: &'static str, name: &'static str, value: i64) -> Self {
        Self { scope, instance: "".into(), name: name.into(), value: Value::Gauge(value) }
    }

    /// The name in `/stats`.
    pub fn text_name(&self) -> String {
        match (self.scope, &*self.instance) {
            ("", "") => self.name.clone().into_owned(),
            ("", labels) => format!("{}{{{labels}}}", self.name),
            (scope, "") => format!("{scope}.{}", self.name),
            (scope, instance) => format!("{scope}.{instance}.{}", self.name),
        }
    }

    /// The name of the Prometheus family and the label text.
    fn family(&self) -> (String, String) {
        let mut labels = String::new();
        if self.scope.is_empty() {
            return (metric_name("", &self.name), self.instance.to_string());
        }
        let mut name = &*self.name;
        if let Some((before, class)) = name.rsplit_once('_')
            && before.ends_with("_rq")
            && class.ends_with("xx")
        {
            push_label(&mut labels, "response_code_class", class);
            name = before;
        }
        if !self.instance.is_empty() {
            let label = match self.scope {
                "cluster" => "cluster_name",
                "listener" => "listener_address",
                "http" => "http_conn_manager_prefix",
                _ => "tcp_prefix",
            };
            push_label(&mut labels, label, &self.instance);
        }
        (metric_name(self.scope, name), labels)
    }
}

/// `envoy_SCOPE_NAME` with every odd character replaced; our own names have no prefix.
fn metric_name(scope: &str, name: &str) -> String {
    let whole = if scope.is_empty() { name.to_owned() } else { format!("envoy_{scope}_{name}") };
    whole.chars().map(|c| if c.is_ascii_alphanumeric() || c == '_' || c == ':' { c } else { '_' }).collect()
}

/// What of it is wanted.
#[derive(Debug, Clone, Default)]
pub struct StatsQuery {
    /// Only what was ever counted.
    pub used_only: bool,
    /// Only names in which this is found.
    pub filter: Option<Regex>,
}

impl StatsQuery {
    fn wants(&self, sample: &Sample, name: &str) -> bool {
        (!self.used_only || sample.value.is_used()) && self.filter.as_ref().is_none_or(|filter| filter.is_match(name))
    }

    /// What is wanted, by name.
    fn select<'a>(&self, samples: &'a [Sample]) -> BTreeMap<String, &'a Sample> {
        let named = samples.iter().map(|sample| (sample.text_name(), sample));
        named.filter(|(name, sample)| self.wants(sample, name)).collect()
    }
}

/// `name: value` lines in the order of names.
pub fn render_text(samples: &[Sample], query: &StatsQuery) -> String {
    let mut out = String::new();
    for (name, sample) in query.select(samples) {
        // Writing to a string cannot fail, here and below.
        let _ = match &sample.value {
            Value::Counter(n) => writeln!(out, "{name}: {n}"),
            Value::Gauge(n) => writeln!(out, "{name}: {n}"),
            Value::Histogram(merged) if merged.count() == 0 => writeln!(out, "{name}: No recorded values"),
            Value::Histogram(merged) => {
                let _ = write!(out, "{name}:");
                for percent in [0, 25, 50, 75, 90, 95, 99, 100] {
                    let _ = write!(out, " P{percent}(nan,{})", merged.quantile(percent));
                }
                writeln!(out)
            }
        };
    }
    out
}

/// `{"stats":[{"name":…,"value":…}]}`
pub fn render_json(samples: &[Sample], query: &StatsQuery) -> String {
    let stat = |(name, sample): (String, &Sample)| match &sample.value {
        Value::Counter(n) => json!({"name": name, "value": n}),
        Value::Gauge(n) => json!({"name": name, "value": n}),
        Value::Histogram(merged) => json!({"name": name, "count": merged.count(), "sum": merged.sum}),
    };
    let stats: Vec<_> = query.select(samples).into_iter().map(stat).collect();
    json!({ "stats": stats }).to_string()
}

/// Prometheus text, version 0.0.4. Families are in the order of their names, each with its `TYPE`.
pub fn render_prometheus(samples: &[Sample], query: &StatsQuery, out: &mut String) {
    let mut families: BTreeMap<String, Vec<(String, &Value)>> = BTreeMap::new();
    for sample in samples {
        if query.wants(sample, &sample.text_name()) {
            let (family, labels) = sample.family();
            families.entry(family).or_default().push((labels, &sample.value));
        }
    }
    for (name, mut series) in families {
        series.sort_by(|(one, _), (other, _)| one.cmp(other));
        let kind = match series.first() {
            Some((_, Value::Counter(_))) => "counter",
            Some((_, Value::Gauge(_))) => "gauge",
            _ => "histogram",
        };
        let _ = writeln!(out, "# TYPE {name} {kind}");
        for (labels, value) in series {
            let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
            let _ = match value {
                Value::Counter(n) => writeln!(out, "{name}{braces} {n}"),
                Value::Gauge(n) => writeln!(out, "{name}{braces} {n}"),
                Value::Histogram(merged) => {
                    histogram_lines(out, &name, &labels, merged);
                    Ok(())
                }
            };
        }
    }
}

/// The lines of one histogram.
pub(super) fn histogram_lines(out: &mut String, name: &str, labels: &str, merged: &Merged) {
    let comma = if labels.is_empty() { "" } else { "," };
    let braces = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
    for (bound, below) in merged.cumulative() {
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {below}");
    }
    let count = merged.count();
    let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {count}");
    let _ = writeln!(out, "{name}_sum{braces} {}\n{name}_count{braces} {count}", merged.sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Sample> {
        let in_cluster = |name: &'static str, value| Sample {
            scope: "cluster",
            instance: "outbound|80||a.b".into(),
            name: name.into(),
            value,
        };
        let mut merged = Merged::default();
        let histogram = super::super::Histogram::default();
        histogram.record(7);
        merged.add(&histogram);
        vec![
            in_cluster("upstream_cx_total", Value::Counter(5)),
            in_cluster("upstream_rq_5xx", Value::Counter(1)),
            in_cluster("outlier_detection.ejections_active", Value::Gauge(0)),
            in_cluster("upstream_rq_time", Value::Histogram(Box::new(merged))),
            Sample::gauge("server", "live", 1),
            Sample { instance: "type=\"X\"".into(), ..Sample::counter("", "config_unsupported_total", 2) },
        ]
    }

    #[test]
    fn text_has_envoys_names() {
        let text = render_text(&samples(), &StatsQuery::default());
        let wanted = "cluster.outbound|80||a.b.outlier_detection.ejections_active: 0\n\
                      cluster.outbound|80||a.b.upstream_cx_total: 5\n\
                      cluster.outbound|80||a.b.upstream_rq_5xx: 1\n";
        assert!(text.starts_with(wanted), "{text}");
        assert!(text.contains("server.live: 1\n"));
        let query = StatsQuery { used_only: true, filter: Some(Regex::new("^cluster\\..*ejections|^server").unwrap()) };
        assert_eq!(render_text(&samples(), &query), "server.live: 1\n");
    }

    #[test]
    fn json_is_a_list() {
        let json: serde_json::Value = serde_json::from_str(&render_json(&samples(), &StatsQuery::default())).unwrap();
        let stats = json["stats"].as_array().unwrap();
        assert!(stats.contains(&json!({"name": "server.live", "value": 1})));
        assert!(stats.contains(&json!({"name": "cluster.outbound|80||a.b.upstream_rq_time", "count": 1, "sum": 7})));
    }

    #[test]
    fn prometheus_moves_names_into_labels() {
        let mut out = String::new();
        render_prometheus(&samples(), &StatsQuery::default(), &mut out);
        for line in [
            "# TYPE envoy_cluster_upstream_cx_total counter",
            "envoy_cluster_upstream_cx_total{cluster_name=\"outbound|80||a.b\"} 5",
            "envoy_cluster_upstream_rq{response_code_class=\"5xx\",cluster_name=\"outbound|80||a.b\"} 1",
            "envoy_cluster_outlier_detection_ejections_active{cluster_name=\"outbound|80||a.b\"} 0",
            "envoy_cluster_upstream_rq_time_bucket{cluster_name=\"outbound|80||a.b\",le=\"5\"} 0",
            "envoy_cluster_upstream_rq_time_bucket{cluster_name=\"outbound|80||a.b\",le=\"10\"} 1",
            "envoy_cluster_upstream_rq_time_sum{cluster_name=\"outbound|80||a.b\"} 7",
            "envoy_server_live 1",
            "config_unsupported_total{type=\"X\"} 2",
        ] {
            assert!(out.lines().any(|l| l == line), "{line}\n{out}");
        }
    }
}
