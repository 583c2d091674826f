//! RBAC of HTTP and TCP chains. A field that is not understood makes the whole filter unsupported: half a policy
//! would let pass what it forbids.

use std::mem::take;

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::rbac::v3::{self as pb, permission, principal, rbac};
use envoy_types::pb::envoy::extensions::filters::{http::rbac::v3 as http, network::rbac::v3 as network};
use envoy_types::pb::envoy::r#type::matcher::v3::{PathMatcher, filter_state_matcher, path_matcher};

use super::context::{At, Fault, Read, Reader, each, type_name};
use super::messages::UriTemplate;
use super::{matcher, value};
use crate::model::{Name, Permission, Principal, Rbac, RbacAction, RbacPolicy, RbacRules, StringMatcher};

/// `envoy.filters.http.rbac`.
pub(super) fn http(mut of: http::Rbac, reader: &mut Reader) -> Read<Rbac> {
    let out = Rbac {
        rules: of.rules.take().map(|r| rules(r, reader)).transpose().at("rules")?,
        shadow_rules: of.shadow_rules.take().map(|r| rules(r, reader)).transpose().at("shadow_rules")?,
        shadow_rules_stat_prefix: take(&mut of.shadow_rules_stat_prefix),
        stat_prefix: take(&mut of.rules_stat_prefix),
    };
    reader.done_strict(&of)?;
    Ok(out)
}

/// `envoy.filters.network.rbac`.
pub(super) fn network(mut of: network::Rbac, reader: &mut Reader) -> Read<Rbac> {
    let out = Rbac {
        rules: of.rules.take().map(|r| rules(r, reader)).transpose().at("rules")?,
        shadow_rules: of.shadow_rules.take().map(|r| rules(r, reader)).transpose().at("shadow_rules")?,
        shadow_rules_stat_prefix: take(&mut of.shadow_rules_stat_prefix),
        stat_prefix: take(&mut of.stat_prefix),
    };
    reader.done_strict(&of)?;
    Ok(out)
}

fn rules(mut of: pb::Rbac, reader: &mut Reader) -> Read<RbacRules> {
    let action = match of.action() {
        rbac::Action::Allow => RbacAction::Allow,
        rbac::Action::Deny => RbacAction::Deny,
        rbac::Action::Log => RbacAction::Log,
    };
    if rbac::Action::try_from(take(&mut of.action)).is_err() {
        return Err(Fault::new("unknown action"));
    }
    let mut out = RbacRules { action, ..RbacRules::default() };
    for (name, policy) in take(&mut of.policies) {
        let read = self::policy(policy, reader).at(&format!("policies[{name}]"))?;
        out.policies.insert(Name::from(name), read);
    }
    reader.done_strict(&of)?;
    Ok(out)
}

fn policy(mut of: pb::Policy, reader: &mut Reader) -> Read<RbacPolicy> {
    let out = RbacPolicy {
        permissions: each("permissions", take(&mut of.permissions), |p| permission(p, reader))?,
        principals: each("principals", take(&mut of.principals), |p| principal(p, reader))?,
    };
    reader.done_strict(&of)?;
    Ok(out)
}

#[expect(deprecated, reason = "metadata is what istiod sends")]
fn permission(of: pb::Permission, reader: &mut Reader) -> Read<Permission> {
    use permission::Rule;
    Ok(match of.rule.ok_or_else(|| Fault::new("permission without a rule"))? {
        Rule::Any(true) => Permission::Any,
        Rule::AndRules(set) => Permission::And(each("and_rules", set.rules, |p| permission(p, reader))?),
        Rule::OrRules(set) => Permission::Or(each("or_rules", set.rules, |p| permission(p, reader))?),
        Rule::NotRule(not) => Permission::Not(Box::new(permission(*not, reader).at("not_rule")?)),
        Rule::Header(m) => Permission::Header(matcher::header(m, reader).at("header")?),
        Rule::UrlPath(m) => Permission::UrlPath(path(m, reader).at("url_path")?),
        Rule::UriTemplate(m) => Permission::UriTemplate(template(m, reader).at("uri_template")?),
        Rule::DestinationIp(range) => Permission::DestinationIp(value::network(range).at("destination_ip")?),
        Rule::DestinationPort(port) => Permission::DestinationPort(value::port(port).at("destination_port")?),
        Rule::RequestedServerName(m) => Permission::ServerName(matcher::string(m, reader).at("requested_server_name")?),
        Rule::Metadata(m) => Permission::Metadata(matcher::metadata(m, reader).at("metadata")?),
        Rule::Any(false) => return Err(Fault::new("any: false is not valid")),
        Rule::DestinationPortRange(_) => return Err(Fault::new("destination_port_range is not supported")),
        Rule::Matcher(m) => return Err(Fault::new(format!("matcher {} is not supported", m.name))),
        Rule::SourcedMetadata(_) => return Err(Fault::new("sourced_metadata is not supported")),
    })
}

#[expect(deprecated, reason = "metadata and source_ip are what istiod and older control planes send")]
fn principal(of: pb::Principal, reader: &mut Reader) -> Read<Principal> {
    use principal::Identifier;
    Ok(match of.identifier.ok_or_else(|| Fault::new("principal without an identifier"))? {
        Identifier::Any(true) => Principal::Any,
        Identifier::AndIds(set) => Principal::And(each("and_ids", set.ids, |p| principal(p, reader))?),
        Identifier::OrIds(set) => Principal::Or(each("or_ids", set.ids, |p| principal(p, reader))?),
        Identifier::NotId(not) => Principal::Not(Box::new(principal(*not, reader).at("not_id")?)),
        Identifier::Authenticated(who) => {
            let name = who.principal_name.map(|m| matcher::string(m, reader)).transpose();
            Principal::Authenticated(name.at("authenticated.principal_name")?)
        }
        Identifier::DirectRemoteIp(range) => Principal::DirectRemoteIp(value::network(range).at("direct_remote_ip")?),
        Identifier::RemoteIp(range) => Principal::RemoteIp(value::network(range).at("remote_ip")?),
        Identifier::Header(m) => Principal::Header(matcher::header(m, reader).at("header")?),
        Identifier::UrlPath(m) => Principal::UrlPath(path(m, reader).at("url_path")?),
        Identifier::Metadata(m) => Principal::Metadata(matcher::metadata(m, reader).at("metadata")?),
        Identifier::FilterState(m) => match m.matcher {
            Some(filter_state_matcher::Matcher::StringMatch(s)) => {
                Principal::FilterState(m.key, matcher::string(s, reader).at("filter_state.string_match")?)
            }
            _ => return Err(Fault::new("filter_state is supported with string_match only")),
        },
        Identifier::Any(false) => return Err(Fault::new("any: false is not valid")),
        Identifier::SourceIp(_) => return Err(Fault::new("source_ip is not supported")),
        Identifier::SourcedMetadata(_) => return Err(Fault::new("sourced_metadata is not supported")),
        Identifier::Custom(c) => return Err(Fault::new(format!("principal {} is not supported", c.name))),
    })
}

fn path(of: PathMatcher, reader: &mut Reader) -> Read<StringMatcher> {
    let path_matcher::Rule::Path(m) = of.rule.ok_or_else(|| Fault::new("path matcher without a rule"))?;
    matcher::string(m, reader).at("path")
}

/// The path template of a `TypedExtensionConfig`.
pub(super) fn template(of: TypedExtensionConfig, reader: &mut Reader) -> Read<String> {
    let any = of.typed_config.ok_or_else(|| Fault::new("no typed_config"))?;
    if !type_name(&any.type_url).ends_with("uri_template.v3.UriTemplateMatchConfig") {
        return Err(Fault::new(format!("{} is not supported", any.type_url)));
    }
    reader.unpack::<UriTemplate>(&any).map(|t| t.path_template).at("typed_config")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any_rules() -> pb::Rbac {
        let permissions = vec![pb::Permission { rule: Some(permission::Rule::Any(true)) }];
        let principals = vec![pb::Principal { identifier: Some(principal::Identifier::Any(true)) }];
        let policy = pb::Policy { permissions, principals, ..Default::default() };
        pb::Rbac {
            action: rbac::Action::Deny as i32,
            policies: [("p".to_owned(), policy)].into(),
            ..Default::default()
        }
    }

    #[test]
    fn policies_keep_their_name() {
        let read = rules(any_rules(), &mut Reader::default()).expect("valid");
        assert_eq!(read.action, RbacAction::Deny);
        assert_eq!(read.policies["p"].permissions, [Permission::Any]);
    }

    #[test]
    fn a_condition_that_is_not_understood_refuses_the_filter() {
        let mut message = any_rules();
        let policy = message.policies.get_mut("p").expect("there");
        policy.condition = Some(Default::default());
        let filter = http::Rbac { rules: Some(message), ..Default::default() };
        let reject = http(filter, &mut Reader::default()).expect_err("condition").into_reject(String::new());
        assert_eq!(
            (reject.field.as_str(), reject.reason.as_str()),
            ("rules.policies[p]", "condition is not supported")
        );
    }

    #[test]
    fn unknown_conditions_refuse() {
        let mut reader = Reader::default();
        let rule = permission::Rule::DestinationPortRange(Default::default());
        assert!(permission(pb::Permission { rule: Some(rule) }, &mut reader).is_err());
        assert!(permission(pb::Permission { rule: None }, &mut reader).is_err());
        assert!(principal(pb::Principal { identifier: Some(principal::Identifier::Any(false)) }, &mut reader).is_err());
        let unknown = pb::Rbac { action: 9, ..Default::default() };
        assert!(rules(unknown, &mut reader).is_err());
    }
}
