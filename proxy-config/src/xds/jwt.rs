//! `envoy.filters.http.jwt_authn`. A field that is not understood makes the filter unsupported.

use std::mem::take;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{data_source, http_uri};
use envoy_types::pb::envoy::config::route::v3::route_match;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{
    self as pb, jwt_provider, jwt_requirement, requirement_rule,
};

use super::context::{At, Fault, Read, Reader, each};
use super::value;
use crate::model::{JwksSource, JwtAuthn, JwtProvider, JwtRequirement, Name};

/// The whole filter.
pub(super) fn authn(mut of: pb::JwtAuthentication, reader: &mut Reader) -> Read<JwtAuthn> {
    let mut out = JwtAuthn { bypass_cors_preflight: take(&mut of.bypass_cors_preflight), ..JwtAuthn::default() };
    for (name, provider) in take(&mut of.providers) {
        let read = self::provider(provider, reader).at(&format!("providers[{name}]"))?;
        out.providers.insert(name, read);
    }
    out.rules = each("rules", take(&mut of.rules), rule)?;
    reader.done_strict(&of)?;
    Ok(out)
}

fn rule(of: pb::RequirementRule) -> Read<(String, JwtRequirement)> {
    let mut path = of.r#match.ok_or_else(|| Fault::new("no match"))?;
    let Some(route_match::PathSpecifier::Prefix(prefix)) = path.path_specifier.take() else {
        return Err(Fault::new("a prefix is expected")).at("match");
    };
    Reader::default().done_strict(&path).at("match")?;
    match of.requirement_type {
        Some(requirement_rule::RequirementType::Requires(r)) => Ok((prefix, requirement(r).at("requires")?)),
        Some(requirement_rule::RequirementType::RequirementName(_)) => {
            Err(Fault::new("requirement_name is not supported"))
        }
        // Nothing is required, so nothing is looked at.
        None => Ok((prefix, JwtRequirement::All(Vec::new()))),
    }
}

fn requirement(of: pb::JwtRequirement) -> Read<JwtRequirement> {
    use jwt_requirement::RequiresType;
    Ok(match of.requires_type {
        None => JwtRequirement::All(Vec::new()),
        Some(RequiresType::AllowMissingOrFailed(_)) => JwtRequirement::AllowMissingOrFailed,
        Some(RequiresType::AllowMissing(_)) => JwtRequirement::AllowMissing,
        Some(RequiresType::ProviderName(name)) => JwtRequirement::Provider(name),
        Some(RequiresType::RequiresAny(list)) => {
            JwtRequirement::Any(each("requires_any", list.requirements, requirement)?)
        }
        Some(RequiresType::RequiresAll(list)) => {
            JwtRequirement::All(each("requires_all", list.requirements, requirement)?)
        }
        Some(RequiresType::ProviderAndAudiences(of)) => {
            JwtRequirement::ProviderAndAudiences(of.provider_name, of.audiences)
        }
        Some(RequiresType::ExtractOnlyWithoutValidation(_)) => {
            return Err(Fault::new("extract_only_without_validation is not supported"));
        }
    })
}

fn provider(mut of: pb::JwtProvider, reader: &mut Reader) -> Read<JwtProvider> {
    // Routes that ask for claims are looked for again after every token, and verified tokens are always kept for a while.
    of.clear_route_cache = false;
    of.jwt_cache_config = None;
    let claims = of.normalize_payload_in_metadata.take().map(|n| n.space_delimited_claims).unwrap_or_default();
    let out = JwtProvider {
        issuer: take(&mut of.issuer),
        audiences: take(&mut of.audiences),
        jwks: keys(of.jwks_source_specifier.take(), reader)?,
        forward: take(&mut of.forward),
        forward_payload_header: take(&mut of.forward_payload_header),
        from_headers: take(&mut of.from_headers).into_iter().map(|h| (h.name, h.value_prefix)).collect(),
        from_params: take(&mut of.from_params),
        from_cookies: take(&mut of.from_cookies),
        payload_in_metadata: take(&mut of.payload_in_metadata),
        space_delimited_claims: sorted(claims),
        claim_to_headers: each("claim_to_headers", take(&mut of.claim_to_headers), claim_to_header)?,
        clock_skew: match take(&mut of.clock_skew_seconds) {
            0 => None,
            seconds => Some(Duration::from_secs(u64::from(seconds))),
        },
    };
    reader.done_strict(&of)?;
    Ok(out)
}

fn claim_to_header(of: pb::JwtClaimToHeader) -> Read<(String, String)> {
    if !of.claim_path.is_empty() {
        return Err(Fault::new("claim_path is not supported"));
    }
    Ok((of.header_name, of.claim_name))
}

fn sorted(mut of: Vec<String>) -> Vec<String> {
    of.sort();
    of
}

fn keys(of: Option<jwt_provider::JwksSourceSpecifier>, reader: &mut Reader) -> Read<JwksSource> {
    match of {
        None => Ok(JwksSource::None),
        Some(jwt_provider::JwksSourceSpecifier::LocalJwks(source)) => match source.specifier {
            Some(data_source::Specifier::InlineString(text)) => Ok(JwksSource::Inline(text)),
            Some(data_source::Specifier::InlineBytes(bytes)) => String::from_utf8(bytes)
                .map(JwksSource::Inline)
                .map_err(|_| Fault::new("keys are not UTF-8"))
                .at("local_jwks"),
            _ => Err(Fault::new("inline keys are expected")).at("local_jwks"),
        },
        Some(jwt_provider::JwksSourceSpecifier::RemoteJwks(mut remote)) => {
            let mut uri = remote.http_uri.take().ok_or_else(|| Fault::new("no http_uri")).at("remote_jwks")?;
            let Some(http_uri::HttpUpstreamType::Cluster(cluster)) = uri.http_upstream_type.take() else {
                return Err(Fault::new("no cluster")).at("remote_jwks.http_uri");
            };
            let out = JwksSource::Remote {
                uri: take(&mut uri.uri),
                cluster: Name::from(cluster),
                timeout: value::duration(&mut uri.timeout),
                cache: value::duration(&mut remote.cache_duration),
                keys: None,
            };
            reader.done(&remote);
            Ok(out)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_provider_that_asks_for_more_is_refused() {
        let provider = pb::JwtProvider { require_expiration: true, ..Default::default() };
        let filter = pb::JwtAuthentication { providers: [("p".to_owned(), provider)].into(), ..Default::default() };
        let reject = authn(filter, &mut Reader::default()).expect_err("unknown").into_reject(String::new());
        assert_eq!(reject.to_string(), ": providers[p]: require_expiration is not supported");
    }

    #[test]
    fn requirements_nest() {
        let of = |kind| pb::JwtRequirement { requires_type: Some(kind) };
        let list = vec![
            of(jwt_requirement::RequiresType::ProviderName("p".to_owned())),
            of(jwt_requirement::RequiresType::AllowMissing(Default::default())),
        ];
        let any = jwt_requirement::RequiresType::RequiresAny(pb::JwtRequirementOrList { requirements: list });
        let expected = vec![JwtRequirement::Provider("p".to_owned()), JwtRequirement::AllowMissing];
        assert_eq!(requirement(of(any)), Ok(JwtRequirement::Any(expected)));
    }

    #[test]
    fn what_changes_nothing_here_is_no_reason_to_refuse() {
        let provider = pb::JwtProvider {
            clear_route_cache: true,
            jwt_cache_config: Some(pb::JwtCacheConfig { jwt_cache_size: 9, ..Default::default() }),
            ..Default::default()
        };
        let audiences = pb::ProviderWithAudiences { provider_name: "p".to_owned(), audiences: vec!["a".to_owned()] };
        let kind = jwt_requirement::RequiresType::ProviderAndAudiences(audiences);
        let rule = pb::RequirementRule {
            r#match: Some(envoy_types::pb::envoy::config::route::v3::RouteMatch {
                path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
                ..Default::default()
            }),
            requirement_type: Some(requirement_rule::RequirementType::Requires(pb::JwtRequirement {
                requires_type: Some(kind),
            })),
        };
        let filter = pb::JwtAuthentication {
            providers: [("p".to_owned(), provider)].into(),
            rules: vec![rule],
            ..Default::default()
        };
        let read = authn(filter, &mut Reader::default()).expect("all of it is understood");
        let expected = JwtRequirement::ProviderAndAudiences("p".to_owned(), vec!["a".to_owned()]);
        assert_eq!(read.rules, [("/".to_owned(), expected)]);
    }
}
