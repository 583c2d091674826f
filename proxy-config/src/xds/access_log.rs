//! Access logs. One that we do not write is noted and left out: traffic does not depend on it.

use std::mem::take;

use envoy_types::pb::envoy::config::accesslog::v3::{self as pb, access_log, access_log_filter, extension_filter};
use envoy_types::pb::envoy::config::core::v3::substitution_format_string::Format;
use envoy_types::pb::envoy::config::core::v3::{
    ApiVersion, GrpcService, SubstitutionFormatString, data_source, grpc_service,
};
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::{FileAccessLog, file_access_log};
use envoy_types::pb::envoy::extensions::access_loggers::filters::cel::v3::ExpressionFilter;
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3::{
    CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig,
};
use envoy_types::pb::envoy::extensions::access_loggers::open_telemetry::v3::OpenTelemetryAccessLogConfig;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::opentelemetry::proto::common::v1::{AnyValue, KeyValueList, any_value};
use serde_json::{Map, Value, json};

use super::context::{At, Fault, Read, Reader, type_name};
use super::{matcher, value};
use crate::model::{AccessLog, LogFilter, LogFormat, LogSink, Name, Severity};

/// The logs of a listener, connection manager or TCP proxy.
pub(super) fn logs(of: Vec<pb::AccessLog>, reader: &mut Reader) -> Vec<AccessLog> {
    let mut out = Vec::new();
    for log in of {
        let name = log.name.clone();
        match self::log(log, reader) {
            Ok(log) => out.push(log),
            Err(fault) => {
                let reject = fault.into_reject(String::new());
                reader.note(&format!("access_log {name}"), reject.to_string(), Severity::Warning);
            }
        }
    }
    out
}

fn log(of: pb::AccessLog, reader: &mut Reader) -> Read<AccessLog> {
    let Some(access_log::ConfigType::TypedConfig(any)) = of.config_type else {
        return Err(Fault::new("no typed_config"));
    };
    let sink = sink(&any, reader).at("typed_config")?;
    let filter = of.filter.map(|f| filter(f, reader)).transpose().at("filter")?;
    Ok(AccessLog { sink, filter })
}

fn sink(any: &Any, reader: &mut Reader) -> Read<LogSink> {
    match type_name(&any.type_url) {
        "envoy.extensions.access_loggers.file.v3.FileAccessLog" => {
            let mut file: FileAccessLog = reader.unpack(any)?;
            let (format, omit_empty) = format(file.access_log_format, reader)?;
            Ok(LogSink::File { path: take(&mut file.path), format, omit_empty })
        }
        "envoy.extensions.access_loggers.grpc.v3.HttpGrpcAccessLogConfig" => {
            let mut config: HttpGrpcAccessLogConfig = reader.unpack(any)?;
            let mut rest = Map::new();
            list(&mut rest, "additional_request_headers_to_log", &mut config.additional_request_headers_to_log);
            list(&mut rest, "additional_response_headers_to_log", &mut config.additional_response_headers_to_log);
            list(&mut rest, "additional_response_trailers_to_log", &mut config.additional_response_trailers_to_log);
            let (cluster, log_name) = common(config.common_config.unwrap_or_default(), &mut rest, reader)?;
            Ok(LogSink::Grpc { cluster, log_name, tcp: false, rest: Value::Object(rest) })
        }
        "envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig" => {
            let config: TcpGrpcAccessLogConfig = reader.unpack(any)?;
            let mut rest = Map::new();
            let (cluster, log_name) = common(config.common_config.unwrap_or_default(), &mut rest, reader)?;
            Ok(LogSink::Grpc { cluster, log_name, tcp: true, rest: Value::Object(rest) })
        }
        "envoy.extensions.access_loggers.open_telemetry.v3.OpenTelemetryAccessLogConfig" => {
            opentelemetry(reader.unpack(any)?, reader)
        }
        other => Err(Fault::new(format!("{other} is not supported"))),
    }
}

fn format(of: Option<file_access_log::AccessLogFormat>, reader: &mut Reader) -> Read<(LogFormat, bool)> {
    use file_access_log::AccessLogFormat;
    #[expect(deprecated, reason = "older control planes still send the old forms")]
    Ok(match of {
        None => (LogFormat::Default, false),
        Some(AccessLogFormat::Format(text)) => (LogFormat::Text(text), false),
        Some(AccessLogFormat::JsonFormat(s) | AccessLogFormat::TypedJsonFormat(s)) => {
            (LogFormat::Json(value::json(s)), false)
        }
        Some(AccessLogFormat::LogFormat(format)) => substitution(format, reader).at("log_format")?,
    })
}

#[expect(deprecated, reason = "older control planes still send the old forms")]
fn substitution(mut of: SubstitutionFormatString, reader: &mut Reader) -> Read<(LogFormat, bool)> {
    let omit_empty = take(&mut of.omit_empty_values);
    let out = match of.format.take() {
        Some(Format::TextFormat(text)) => LogFormat::Text(text),
        Some(Format::JsonFormat(s)) => LogFormat::Json(value::json(s)),
        Some(Format::TextFormatSource(source)) => match source.specifier {
            Some(data_source::Specifier::InlineString(text)) => LogFormat::Text(text),
            _ => return Err(Fault::new("an inline format is expected")),
        },
        None => LogFormat::Default,
    };
    reader.done(&of);
    Ok((out, omit_empty))
}

fn common(
    mut of: CommonGrpcAccessLogConfig,
    rest: &mut Map<String, Value>,
    reader: &mut Reader,
) -> Read<(Name, String)> {
    list(rest, "filter_state_objects_to_log", &mut of.filter_state_objects_to_log);
    let cluster = of.grpc_service.take().map(|s| service(s, rest, reader)).transpose()?;
    let name = take(&mut of.log_name);
    // There is no other version than V3, which AUTO means too.
    if matches!(of.transport_api_version(), ApiVersion::Auto | ApiVersion::V3) {
        take(&mut of.transport_api_version);
    }
    reader.done(&of);
    Ok((cluster.ok_or_else(|| Fault::new("no grpc_service"))?, name))
}

/// The cluster that a gRPC service is.
fn service(mut of: GrpcService, rest: &mut Map<String, Value>, reader: &mut Reader) -> Read<Name> {
    let Some(grpc_service::TargetSpecifier::EnvoyGrpc(mut grpc)) = of.target_specifier.take() else {
        return Err(Fault::new("envoy_grpc is expected")).at("grpc_service");
    };
    let authority = take(&mut grpc.authority);
    if !authority.is_empty() {
        rest.insert("authority".to_owned(), Value::String(authority));
    }
    let cluster = Name::from(take(&mut grpc.cluster_name));
    reader.done(&grpc);
    reader.done(&of);
    Ok(cluster)
}

#[expect(deprecated, reason = "istiod sends common_config")]
fn opentelemetry(mut of: OpenTelemetryAccessLogConfig, reader: &mut Reader) -> Read<LogSink> {
    let mut rest = Map::new();
    if let Some(body) = of.body.take().and_then(any_value) {
        rest.insert("body".to_owned(), body);
    }
    for (key, attributes) in
        [("attributes", of.attributes.take()), ("resource_attributes", of.resource_attributes.take())]
    {
        if let Some(attributes) = attributes {
            rest.insert(key.to_owned(), key_values(attributes));
        }
    }
    if take(&mut of.disable_builtin_labels) {
        rest.insert("disable_builtin_labels".to_owned(), Value::Bool(true));
    }
    list(&mut rest, "filter_state_objects_to_log", &mut of.filter_state_objects_to_log);
    let (cluster, log_name) = match of.common_config.take() {
        Some(config) => common(config, &mut rest, reader)?,
        None => {
            let cluster = of.grpc_service.take().map(|s| service(s, &mut rest, reader)).transpose()?;
            (cluster.ok_or_else(|| Fault::new("no grpc_service"))?, take(&mut of.log_name))
        }
    };
    reader.done(&of);
    Ok(LogSink::OpenTelemetry { cluster, log_name, rest: Value::Object(rest) })
}

fn any_value(of: AnyValue) -> Option<Value> {
    Some(match of.value? {
        any_value::Value::StringValue(s) => Value::String(s),
        any_value::Value::BoolValue(b) => Value::Bool(b),
        any_value::Value::IntValue(n) => json!(n),
        any_value::Value::DoubleValue(n) => json!(n),
        any_value::Value::ArrayValue(list) => list.values.into_iter().filter_map(any_value).collect(),
        any_value::Value::KvlistValue(list) => key_values(list),
        any_value::Value::BytesValue(_) | any_value::Value::StringValueStrindex(_) => return None,
    })
}

fn key_values(of: KeyValueList) -> Value {
    let pair =
        |kv: envoy_types::pb::opentelemetry::proto::common::v1::KeyValue| Some((kv.key, kv.value.and_then(any_value)?));
    Value::Object(of.values.into_iter().filter_map(pair).collect())
}

fn list(rest: &mut Map<String, Value>, key: &str, field: &mut Vec<String>) {
    let values = take(field);
    if !values.is_empty() {
        rest.insert(key.to_owned(), json!(values));
    }
}

fn filter(of: pb::AccessLogFilter, reader: &mut Reader) -> Read<LogFilter> {
    use access_log_filter::FilterSpecifier;
    Ok(match of.filter_specifier.ok_or_else(|| Fault::new("empty filter"))? {
        FilterSpecifier::ResponseFlagFilter(f) => LogFilter::ResponseFlags(f.flags),
        FilterSpecifier::StatusCodeFilter(f) => {
            let comparison = f.comparison.unwrap_or_default();
            let number = comparison.value.as_ref().map_or(0, |v| v.default_value);
            LogFilter::Status(comparison.op().as_str_name().to_owned(), number)
        }
        FilterSpecifier::AndFilter(f) => {
            LogFilter::And(super::context::each("and_filter", f.filters, |f| filter(f, reader))?)
        }
        FilterSpecifier::OrFilter(f) => {
            LogFilter::Or(super::context::each("or_filter", f.filters, |f| filter(f, reader))?)
        }
        FilterSpecifier::HeaderFilter(f) => {
            let header = f.header.ok_or_else(|| Fault::new("no header"))?;
            LogFilter::Header(matcher::header(header, reader).at("header_filter.header")?)
        }
        FilterSpecifier::ExtensionFilter(f) => match f.config_type {
            Some(extension_filter::ConfigType::TypedConfig(any))
                if type_name(&any.type_url) == "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter" =>
            {
                let mut cel: ExpressionFilter = reader.unpack(&any)?;
                let expression = take(&mut cel.expression);
                reader.done(&cel);
                LogFilter::Cel(expression)
            }
            _ => return Err(Fault::new(format!("filter {} is not supported", f.name))),
        },
        _ => return Err(Fault::new("this kind of filter is not supported")),
    })
}

#[cfg(test)]
mod tests {
    use envoy_types::util::pack_any;

    use super::*;

    fn file(format: Option<file_access_log::AccessLogFormat>) -> pb::AccessLog {
        let message = FileAccessLog { path: "/dev/stdout".to_owned(), access_log_format: format };
        let config_type = Some(access_log::ConfigType::TypedConfig(pack_any(message)));
        pb::AccessLog { name: "file".to_owned(), config_type, ..Default::default() }
    }

    #[test]
    fn a_log_that_we_cannot_write_is_noted() {
        let mut reader = Reader::default();
        let unknown = pb::AccessLog {
            name: "x".to_owned(),
            config_type: Some(access_log::ConfigType::TypedConfig(Any { type_url: "t/a.B".to_owned(), value: vec![] })),
            ..Default::default()
        };
        assert_eq!(logs(vec![unknown, file(None)], &mut reader).len(), 1);
        assert_eq!((reader.notes.len(), reader.notes[0].severity), (1, Severity::Warning));
    }

    #[test]
    fn filters_are_read() {
        let flags = pb::ResponseFlagFilter { flags: vec!["NR".to_owned()] };
        let specifier = access_log_filter::FilterSpecifier::ResponseFlagFilter(flags);
        let log = pb::AccessLog {
            filter: Some(pb::AccessLogFilter { filter_specifier: Some(specifier) }),
            ..file(Some(file_access_log::AccessLogFormat::LogFormat(SubstitutionFormatString {
                content_type: "x".to_owned(),
                ..Default::default()
            })))
        };
        let mut reader = Reader::default();
        let read = logs(vec![log], &mut reader);
        assert_eq!(read[0].filter, Some(LogFilter::ResponseFlags(vec!["NR".to_owned()])));
        assert!(reader.unread.contains("SubstitutionFormatString.content_type"));
    }
}
