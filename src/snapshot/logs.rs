//! Access logs of the model, compiled for telemetry.

use std::sync::Arc;

use proxy_config::model;

use super::compile::Sink;
use crate::error::Flags;
use crate::telemetry::{
    AccessLogs, Compare, Expression, LogFilter, LogShape, RemoteShape, SaidLog, SaidRemote, Speaks, Target,
};

/// Compiles. A log whose sink or filter we do not do is left out by name; an operator that we do not know prints as
/// absent.
pub(super) fn access_logs(said: &[model::AccessLog], sink: &mut Sink<'_>) -> AccessLogs {
    let mut logs = Vec::new();
    for log in said {
        match one(log) {
            Ok(log) => logs.push(log),
            Err(why) => sink.error("access_log", format!("{why} is not supported; the log is left out")),
        }
    }
    let (compiled, unknown) = AccessLogs::compile(logs);
    for operator in unknown {
        sink.warn("access_log", format!("operator {operator} is not supported; it prints as absent"));
    }
    compiled
}

fn one(said: &model::AccessLog) -> Result<SaidLog<'_>, String> {
    let (path, format, omit_empty) = match &said.sink {
        model::LogSink::File { path, format, omit_empty } => (path, format, *omit_empty),
        remote => {
            let shape = LogShape::Remote(Box::new(collector(remote)));
            let filter = said.filter.as_ref().map(filter).transpose()?;
            return Ok(SaidLog { path: "", shape, omit_empty: false, filter });
        }
    };
    let shape = match format {
        model::LogFormat::Text(text) => LogShape::Text(text),
        model::LogFormat::Json(value) => LogShape::Json(value),
        model::LogFormat::Default => LogShape::Default,
    };
    Ok(SaidLog { path, shape, omit_empty, filter: said.filter.as_ref().map(filter).transpose()? })
}

/// A log that goes to a collector.
fn collector(said: &model::LogSink) -> SaidRemote {
    let (cluster, rest) = match said {
        model::LogSink::Grpc { cluster, rest, .. } | model::LogSink::OpenTelemetry { cluster, rest, .. } => {
            (cluster, rest)
        }
        model::LogSink::File { .. } => unreachable!("a file is none"),
    };
    let names = |key: &str| {
        let list = rest[key].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str);
        list.filter_map(|name| name.to_ascii_lowercase().parse().ok()).collect()
    };
    let pairs = |key: &str| -> Vec<(String, String)> {
        let fields = rest[key].as_object().into_iter().flatten();
        fields.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
    };
    let (speaks, shape) = match said {
        model::LogSink::Grpc { log_name, tcp, .. } => {
            let request = names("additional_request_headers_to_log");
            let response = names("additional_response_headers_to_log");
            let shape = if *tcp { RemoteShape::Tcp } else { RemoteShape::Http { request, response } };
            (Speaks::AccessLogService { log: log_name.clone(), tcp: *tcp }, shape)
        }
        _ => {
            let mut resource = pairs("resource_attributes");
            if let (model::LogSink::OpenTelemetry { log_name, .. }, false) =
                (said, rest["disable_builtin_labels"] == true)
            {
                resource.push(("log_name".to_owned(), log_name.clone()));
            }
            let body = rest["body"].as_str().map(str::to_owned);
            (Speaks::OtlpLogs(resource), RemoteShape::Otlp { body, attributes: pairs("attributes") })
        }
    };
    let authority = rest["authority"].as_str().unwrap_or(cluster).to_owned();
    SaidRemote { target: Target { cluster: Arc::clone(cluster), authority, speaks }, shape }
}

fn filter(said: &model::LogFilter) -> Result<LogFilter, String> {
    Ok(match said {
        model::LogFilter::ResponseFlags(names) => {
            let mut flags = Flags::NONE;
            for name in names {
                flags.insert(Flags::named(name).ok_or_else(|| format!("filter on unknown flag {name}"))?);
            }
            LogFilter::Flags(flags)
        }
        model::LogFilter::Status(operator, value) => {
            let compare = match operator.as_str() {
                "EQ" => Compare::Eq,
                "NE" => Compare::Ne,
                "GE" => Compare::Ge,
                "LE" => Compare::Le,
                other => return Err(format!("status filter with operator {other}")),
            };
            LogFilter::Status(compare, u16::try_from(*value).map_err(|_| format!("status filter on {value}"))?)
        }
        model::LogFilter::Cel(text) => {
            LogFilter::Expression(Expression::compile(text).map_err(|why| format!("CEL filter `{text}` ({why})"))?)
        }
        model::LogFilter::Header(_) => return Err("header filter".to_owned()),
        model::LogFilter::And(all) => LogFilter::And(all.iter().map(filter).collect::<Result<_, _>>()?),
        model::LogFilter::Or(some) => LogFilter::Or(some.iter().map(filter).collect::<Result<_, _>>()?),
    })
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use proxy_config::Severity;

    use super::*;
    use crate::telemetry::{Facts, NodeLabels, Record, RecordKind};

    fn file(filter: Option<model::LogFilter>) -> model::AccessLog {
        let format = model::LogFormat::Text("%FILTER_STATE(x:PLAIN)%\n".to_owned());
        model::AccessLog {
            sink: model::LogSink::File { path: "/dev/stdout".to_owned(), format, omit_empty: false },
            filter,
        }
    }

    #[test]
    fn what_is_not_done_is_named() {
        let cel = file(Some(model::LogFilter::Cel("response.code.exists(x, x)".to_owned())));
        let mut rejects = Vec::new();
        let logs = access_logs(&[cel, file(None)], &mut Sink::new(&mut rejects, "Listener x"));
        assert!(!logs.is_empty());
        let [error, warning] = &rejects[..] else { panic!("{rejects:?}") };
        assert!(error.severity == Severity::Error && error.reason.contains("exists is not supported"));
        assert!(warning.severity == Severity::Warning && warning.reason.contains("%FILTER_STATE(x:PLAIN)%"));
    }

    #[test]
    fn filters_compare_flags_and_status() {
        let said = model::LogFilter::Or(vec![
            model::LogFilter::ResponseFlags(vec!["NR".to_owned(), "UF".to_owned()]),
            model::LogFilter::Status("GE".to_owned(), 400),
        ]);
        let filter = filter(&said).unwrap();
        let quiet = Record::new(RecordKind::Http, SystemTime::UNIX_EPOCH, Duration::ZERO);
        let node = NodeLabels::default();
        let holds = |filter: &LogFilter, record: &Record<'_>| filter.holds(&Facts { record, node: &node });
        assert!(!holds(&filter, &quiet));
        assert!(holds(&filter, &Record { code: 400, ..quiet }));
        assert!(holds(&filter, &Record { flags: Flags::UF | Flags::URX, ..quiet }));
        let any = LogFilter::Flags(Flags::NONE);
        assert!(holds(&any, &Record { flags: Flags::DC, ..quiet }) && !holds(&any, &quiet));
        let said = model::LogFilter::Cel("response.code >= 500 || connection.mtls == false".to_owned());
        let cel = super::filter(&said).unwrap();
        assert!(
            holds(&cel, &Record { code: 200, ..quiet }) && !holds(&cel, &Record { code: 200, mtls: true, ..quiet })
        );
    }
}
