//! `HttpProtocolOptions` of a cluster: the upstream's HTTP version and connection limits.

use std::mem::take;

use envoy_types::pb::envoy::config::common::matcher::v3::{MatchPredicate, match_predicate};
use envoy_types::pb::envoy::config::core::v3::{Http1ProtocolOptions, HttpProtocolOptions as Common};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    UpstreamProtocolOptions, UseDownstreamHttpConfig, explicit_http_config::ProtocolConfig,
};

use super::context::{At, Fault, Read, Reader};
use super::{http, matcher, value};
use crate::model::{Cluster, HeaderValueMatch, OutlierDetection, StringPattern, UpstreamHttp, UpstreamProtocol};

/// Reads the options into the cluster; the statuses that count as errors go to its outlier detection.
pub(super) fn options(mut of: HttpProtocolOptions, out: &mut Cluster, reader: &mut Reader) -> Read<()> {
    out.http = UpstreamHttp { configured: true, ..UpstreamHttp::default() };
    if let Some(options) = of.common_http_protocol_options.take() {
        common(options, &mut out.http, reader);
    }
    if let Some(mut options) = of.upstream_http_protocol_options.take() {
        out.http.auto_sni = take(&mut options.auto_sni);
        out.http.auto_san_validation = take(&mut options.auto_san_validation);
        reader.done(&options);
    }
    match of.upstream_protocol_options.take() {
        None => {}
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => match explicit.protocol_config {
            None => {}
            Some(ProtocolConfig::HttpProtocolOptions(options)) => http1(options, &mut out.http, reader),
            Some(ProtocolConfig::Http2ProtocolOptions(options)) => {
                out.http.protocol = UpstreamProtocol::Http2;
                out.http.http2 = http::http2(options, reader);
            }
            Some(ProtocolConfig::Http3ProtocolOptions(_)) => return Err(Fault::new("HTTP/3 is not supported")),
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(config)) => as_client(config, &mut out.http, reader),
        Some(UpstreamProtocolOptions::AutoConfig(_)) => return Err(Fault::new("auto_config is not supported")),
    }
    if let Some(predicate) = of.outlier_detection.take().and_then(|o| o.error_matcher) {
        let statuses = statuses(predicate, reader).at("outlier_detection.error_matcher")?;
        out.outlier.get_or_insert_with(OutlierDetection::default).error_statuses = statuses;
    }
    reader.done(&of);
    Ok(())
}

fn common(mut of: Common, out: &mut UpstreamHttp, reader: &mut Reader) {
    out.idle_timeout = value::duration(&mut of.idle_timeout);
    out.max_requests_per_connection = value::number(&mut of.max_requests_per_connection);
    out.max_connection_duration = value::duration(&mut of.max_connection_duration);
    reader.done(&of);
}

fn http1(mut of: Http1ProtocolOptions, out: &mut UpstreamHttp, reader: &mut Reader) {
    out.preserve_header_case = http::preserves_case(of.header_key_format.take(), reader);
    reader.done(&of);
}

fn as_client(mut of: UseDownstreamHttpConfig, out: &mut UpstreamHttp, reader: &mut Reader) {
    out.protocol = UpstreamProtocol::Downstream;
    if let Some(options) = of.http_protocol_options.take() {
        http1(options, out, reader);
    }
    if let Some(options) = of.http2_protocol_options.take() {
        out.http2 = http::http2(options, reader);
    }
    reader.done(&of);
}

/// Ranges of statuses, both ends included, that a predicate over `:status` names.
fn statuses(of: MatchPredicate, reader: &mut Reader) -> Read<Vec<(u16, u16)>> {
    use match_predicate::Rule;
    match of.rule {
        Some(Rule::OrMatch(set)) => {
            let lists: Read<Vec<_>> = set.rules.into_iter().map(|rule| statuses(rule, reader)).collect();
            Ok(lists?.into_iter().flatten().collect())
        }
        Some(Rule::HttpResponseHeadersMatch(headers)) => match <[_; 1]>::try_from(headers.headers) {
            Ok([header]) => status(header, reader),
            Err(_) => Err(Fault::new("one header is expected")),
        },
        _ => Err(Fault::new("only statuses of responses are supported")),
    }
}

fn status(of: envoy_types::pb::envoy::config::route::v3::HeaderMatcher, reader: &mut Reader) -> Read<Vec<(u16, u16)>> {
    let header = matcher::header(of, reader)?;
    if header.name != ":status" || header.invert {
        return Err(Fault::new("a condition on :status is expected"));
    }
    let code = |n: i64| u16::try_from(n).map_err(|_| Fault::new(format!("{n} is no status")));
    match header.value {
        HeaderValueMatch::Range(start, end) => Ok(vec![(code(start)?, code(end.saturating_sub(1))?)]),
        HeaderValueMatch::String(m) => match m.pattern {
            StringPattern::Exact(text) => {
                let n = text.parse().map_err(|_| Fault::new(format!("{text} is no status")))?;
                Ok(vec![(n, n)])
            }
            _ => Err(Fault::new("an exact status is expected")),
        },
        HeaderValueMatch::Present(_) => Err(Fault::new("a status is expected")),
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::common::matcher::v3::HttpHeadersMatch;
    use envoy_types::pb::envoy::config::route::v3::{HeaderMatcher, header_matcher::HeaderMatchSpecifier};
    use envoy_types::pb::envoy::r#type::v3::Int64Range;

    use super::*;

    fn on_status(specifier: HeaderMatchSpecifier) -> MatchPredicate {
        let header =
            HeaderMatcher { name: ":status".to_owned(), header_match_specifier: Some(specifier), ..Default::default() };
        let headers = HttpHeadersMatch { headers: vec![header] };
        MatchPredicate { rule: Some(match_predicate::Rule::HttpResponseHeadersMatch(headers)) }
    }

    #[test]
    fn statuses_are_ranges() {
        let range = on_status(HeaderMatchSpecifier::RangeMatch(Int64Range { start: 500, end: 505 }));
        #[expect(deprecated, reason = "the shortest form")]
        let exact = on_status(HeaderMatchSpecifier::ExactMatch("429".to_owned()));
        let set = match_predicate::MatchSet { rules: vec![range, exact] };
        let or = MatchPredicate { rule: Some(match_predicate::Rule::OrMatch(set)) };
        assert_eq!(statuses(or, &mut Reader::default()), Ok(vec![(500, 504), (429, 429)]));
        let any = MatchPredicate { rule: Some(match_predicate::Rule::AnyMatch(true)) };
        assert!(statuses(any, &mut Reader::default()).is_err());
    }
}
