//! String, header, query and metadata matchers.

use std::mem::take;

use envoy_types::pb::envoy::config::route::v3::{self as route, header_matcher, query_parameter_matcher};
use envoy_types::pb::envoy::r#type::matcher::v3::{
    self as matcher, double_matcher, list_matcher, metadata_matcher, string_matcher, value_matcher,
};

use super::context::{At, Fault, Read, Reader, each};
use crate::model::{
    HeaderMatcher, HeaderValueMatch, MetadataMatcher, QueryMatcher, StringMatcher, StringPattern, ValueMatcher,
};

/// A regular expression; the deprecated choice of an engine says nothing.
pub(super) fn regex(mut of: matcher::RegexMatcher, reader: &mut Reader) -> String {
    let regex = take(&mut of.regex);
    reader.done(&of);
    regex
}

/// A string matcher.
pub(super) fn string(of: matcher::StringMatcher, reader: &mut Reader) -> Read<StringMatcher> {
    use string_matcher::MatchPattern;
    let pattern = match of.match_pattern.ok_or_else(|| Fault::new("string matcher without a pattern"))? {
        MatchPattern::Exact(v) => StringPattern::Exact(v),
        MatchPattern::Prefix(v) => StringPattern::Prefix(v),
        MatchPattern::Suffix(v) => StringPattern::Suffix(v),
        MatchPattern::Contains(v) => StringPattern::Contains(v),
        MatchPattern::SafeRegex(v) => StringPattern::Regex(regex(v, reader)),
        MatchPattern::Custom(v) => return Err(Fault::new(format!("string matcher {} is not supported", v.name))),
    };
    let ignore_case = of.ignore_case && !matches!(pattern, StringPattern::Regex(_));
    Ok(StringMatcher { pattern, ignore_case })
}

/// A header matcher, with the forms that preceded `string_match`. Without a condition the header must be there.
#[expect(deprecated, reason = "older control planes still send the old forms")]
pub(super) fn header(of: route::HeaderMatcher, reader: &mut Reader) -> Read<HeaderMatcher> {
    use header_matcher::HeaderMatchSpecifier as Form;
    let pattern = |pattern| HeaderValueMatch::String(StringMatcher { pattern, ignore_case: false });
    let value = match of.header_match_specifier {
        None => HeaderValueMatch::Present(true),
        Some(Form::PresentMatch(present)) => HeaderValueMatch::Present(present),
        Some(Form::StringMatch(m)) => HeaderValueMatch::String(string(m, reader).at("string_match")?),
        Some(Form::RangeMatch(range)) => HeaderValueMatch::Range(range.start, range.end),
        Some(Form::ExactMatch(v)) => pattern(StringPattern::Exact(v)),
        Some(Form::PrefixMatch(v)) => pattern(StringPattern::Prefix(v)),
        Some(Form::SuffixMatch(v)) => pattern(StringPattern::Suffix(v)),
        Some(Form::ContainsMatch(v)) => pattern(StringPattern::Contains(v)),
        Some(Form::SafeRegexMatch(v)) => pattern(StringPattern::Regex(regex(v, reader))),
    };
    if of.name.is_empty() {
        return Err(Fault::new("header matcher without a name"));
    }
    Ok(HeaderMatcher {
        name: of.name.to_ascii_lowercase(),
        value,
        invert: of.invert_match,
        treat_missing_as_empty: of.treat_missing_header_as_empty,
    })
}

/// A query parameter matcher; without a condition the parameter must be there.
pub(super) fn query(of: route::QueryParameterMatcher, reader: &mut Reader) -> Read<QueryMatcher> {
    use query_parameter_matcher::QueryParameterMatchSpecifier as Form;
    let (value, present) = match of.query_parameter_match_specifier {
        None => (None, None),
        Some(Form::PresentMatch(present)) => (None, Some(present)),
        Some(Form::StringMatch(m)) => (Some(string(m, reader).at("string_match")?), None),
    };
    Ok(QueryMatcher { name: of.name, value, present })
}

/// A condition on dynamic metadata.
pub(super) fn metadata(of: matcher::MetadataMatcher, reader: &mut Reader) -> Read<MetadataMatcher> {
    let matcher::MetadataMatcher { filter, path, value, invert } = of;
    let key = |segment: metadata_matcher::PathSegment| match segment.segment {
        Some(metadata_matcher::path_segment::Segment::Key(key)) => Ok(key),
        None => Err(Fault::new("path segment without a key")),
    };
    let path = each("path", path, key)?;
    let condition =
        value.ok_or_else(|| Fault::new("metadata matcher without a value")).and_then(|v| self::value(v, reader));
    Ok(MetadataMatcher { filter, path, value: condition.at("value")?, invert })
}

fn value(of: matcher::ValueMatcher, reader: &mut Reader) -> Read<ValueMatcher> {
    use value_matcher::MatchPattern;
    Ok(match of.match_pattern.ok_or_else(|| Fault::new("value matcher without a pattern"))? {
        MatchPattern::NullMatch(_) => ValueMatcher::Null,
        MatchPattern::BoolMatch(v) => ValueMatcher::Bool(v),
        MatchPattern::PresentMatch(v) => ValueMatcher::Present(v),
        MatchPattern::StringMatch(m) => ValueMatcher::String(string(m, reader).at("string_match")?),
        MatchPattern::DoubleMatch(m) => match m.match_pattern {
            Some(double_matcher::MatchPattern::Exact(v)) => ValueMatcher::Double(v),
            _ => return Err(Fault::new("ranges of numbers in metadata are not supported")),
        },
        MatchPattern::ListMatch(list) => match list.match_pattern {
            Some(list_matcher::MatchPattern::OneOf(one)) => {
                ValueMatcher::ListOneOf(Box::new(value(*one, reader).at("one_of")?))
            }
            None => return Err(Fault::new("list matcher without a pattern")),
        },
        MatchPattern::OrMatch(any) => {
            ValueMatcher::Or(each("value_matchers", any.value_matchers, |m| value(m, reader))?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_and_new_forms_mean_the_same() {
        use header_matcher::HeaderMatchSpecifier as Form;
        let of = |form| {
            let message = route::HeaderMatcher {
                name: "X-A".to_owned(),
                header_match_specifier: form,
                ..route::HeaderMatcher::default()
            };
            header(message, &mut Reader::default()).map(|m| m.value)
        };
        #[expect(deprecated, reason = "the old form is the point")]
        let old = of(Some(Form::PrefixMatch("p".to_owned())));
        let pattern = string_matcher::MatchPattern::Prefix("p".to_owned());
        let new = matcher::StringMatcher { match_pattern: Some(pattern), ..Default::default() };
        assert_eq!(old, of(Some(Form::StringMatch(new))));
        assert_eq!(of(None), Ok(HeaderValueMatch::Present(true)));
        assert!(of(Some(Form::StringMatch(matcher::StringMatcher::default()))).is_err());
    }

    #[test]
    fn case_never_matters_less_for_expressions() {
        let re = matcher::RegexMatcher { regex: ".*".to_owned(), ..Default::default() };
        let pattern = string_matcher::MatchPattern::SafeRegex(re);
        let read =
            string(matcher::StringMatcher { ignore_case: true, match_pattern: Some(pattern) }, &mut Reader::default());
        assert_eq!(read, Ok(StringMatcher::regex(".*")));
    }
}
