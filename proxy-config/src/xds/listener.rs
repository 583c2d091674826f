//! Listeners, their filters and chains.

use std::mem::take;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::TrafficDirection;
use envoy_types::pb::envoy::config::listener::v3::listener_filter_chain_match_predicate::Rule;
use envoy_types::pb::envoy::config::listener::v3::{
    self as pb, filter_chain_match, listener, listener::connection_balance_config, listener_filter,
};
use envoy_types::pb::envoy::extensions::filters::listener::original_src::v3::OriginalSrc;
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3::ProxyProtocol;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;

use super::context::{At, Fault, Read, Reader, each, type_name};
use super::{Extensions, access_log, network_filter, tls, value};
use crate::model::{
    Address, ChainMatch, Direction, FilterChain, Listener, ListenerFilter, ListenerFilterKind, Name, PortPredicate,
    SourceType, TransportProtocol,
};

/// Envoy's limit on inspection when none is said.
const DEFAULT_INSPECTION: Duration = Duration::from_secs(15);

/// `envoy.config.listener.v3.Listener`.
pub(super) fn listener(mut of: pb::Listener, extensions: &Extensions, reader: &mut Reader) -> Read<Listener> {
    let name = Name::from(take(&mut of.name));
    if of.filter_chain_matcher.is_some() {
        return Err(Fault::new("filter_chain_matcher is not supported"));
    }
    let filters = each("listener_filters", take(&mut of.listener_filters), |f| listener_filter(f, reader))?;
    let default = of.default_filter_chain.take().map(|c| chain(c, extensions, reader)).transpose();
    let out = Listener {
        address: address(&mut of, &name, reader).at("address")?,
        name,
        additional_addresses: each("additional_addresses", take(&mut of.additional_addresses), |mut a| {
            let address = a.address.take().unwrap_or_default();
            reader.done(&a);
            value::address(address, reader)
        })?,
        direction: match TrafficDirection::try_from(take(&mut of.traffic_direction)) {
            Ok(TrafficDirection::Inbound) => Direction::Inbound,
            Ok(TrafficDirection::Outbound) => Direction::Outbound,
            Ok(TrafficDirection::Unspecified) | Err(_) => Direction::Unspecified,
        },
        bind_to_port: bind_to_port(&mut of),
        use_original_dst: value::flag(&mut of.use_original_dst).unwrap_or(false),
        transparent: value::flag(&mut of.transparent).unwrap_or(false),
        listener_filters_timeout: inspection(&mut of, !filters.is_empty()),
        listener_filters: filters,
        continue_on_listener_filters_timeout: take(&mut of.continue_on_listener_filters_timeout),
        filter_chains: each("filter_chains", take(&mut of.filter_chains), |c| chain(c, extensions, reader))?,
        default_filter_chain: default.at("default_filter_chain")?,
        access_log: access_log::logs(take(&mut of.access_log), reader),
        exact_balance: exact_balance(of.connection_balance_config.take(), reader),
        max_accepts_per_event: value::number(&mut of.max_connections_to_accept_per_socket_event),
    };
    reader.done(&of);
    Ok(out)
}

/// Internal listeners have a name instead of an address.
fn address(of: &mut pb::Listener, name: &str, reader: &mut Reader) -> Read<Address> {
    if of.listener_specifier.take().is_some_and(|listener::ListenerSpecifier::InternalListener(_)| true) {
        return Ok(Address::Internal(name.to_owned(), String::new()));
    }
    let address = of.address.take().ok_or_else(|| Fault::new("no address"))?;
    match value::address(address, reader)? {
        Address::Host(host, _) => Err(Fault::new(format!("{host} is no IP address"))),
        address => Ok(address),
    }
}

#[expect(deprecated, reason = "older control planes say it the old way")]
fn bind_to_port(of: &mut pb::Listener) -> bool {
    let old = of.deprecated_v1.take().and_then(|mut v1| value::flag(&mut v1.bind_to_port));
    value::flag(&mut of.bind_to_port).or(old).unwrap_or(true)
}

/// Zero is for ever. Without anything to inspect the limit means nothing.
fn inspection(of: &mut pb::Listener, inspects: bool) -> Option<Duration> {
    let said = value::duration(&mut of.listener_filters_timeout);
    said.or_else(|| inspects.then_some(DEFAULT_INSPECTION)).filter(|limit| !limit.is_zero())
}

fn exact_balance(of: Option<listener::ConnectionBalanceConfig>, reader: &mut Reader) -> bool {
    match of.and_then(|c| c.balance_type) {
        Some(connection_balance_config::BalanceType::ExactBalance(_)) => true,
        Some(_) => {
            reader.unread.insert("ConnectionBalanceConfig.balance_type".to_owned());
            false
        }
        None => false,
    }
}

fn listener_filter(of: pb::ListenerFilter, reader: &mut Reader) -> Read<ListenerFilter> {
    let disabled = of.filter_disabled.map(predicate).transpose().at("filter_disabled")?;
    let Some(listener_filter::ConfigType::TypedConfig(any)) = of.config_type else {
        return Err(Fault::new(format!("listener filter {} has no typed_config", of.name)));
    };
    let kind = match type_name(&any.type_url) {
        "envoy.extensions.filters.listener.original_dst.v3.OriginalDst" => ListenerFilterKind::OriginalDst,
        "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector" => ListenerFilterKind::HttpInspector,
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector" => {
            let mut inspector: TlsInspector = reader.unpack(&any)?;
            let size = value::number(&mut inspector.initial_read_buffer_size);
            reader.done(&inspector);
            ListenerFilterKind::TlsInspector { initial_read_buffer_size: size }
        }
        "envoy.extensions.filters.listener.original_src.v3.OriginalSrc" => {
            let mut source: OriginalSrc = reader.unpack(&any)?;
            let mark = take(&mut source.mark);
            reader.done(&source);
            ListenerFilterKind::OriginalSrc { mark }
        }
        "envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol" => {
            let rest: ProxyProtocol = reader.unpack(&any)?;
            reader.done(&rest);
            ListenerFilterKind::ProxyProtocol
        }
        other => return Err(Fault::new(format!("listener filter {other} is not supported"))),
    };
    Ok(ListenerFilter { kind, disabled })
}

fn predicate(of: pb::ListenerFilterChainMatchPredicate) -> Read<PortPredicate> {
    Ok(match of.rule.ok_or_else(|| Fault::new("predicate without a rule"))? {
        Rule::AnyMatch(true) => PortPredicate::Any,
        Rule::AnyMatch(false) => return Err(Fault::new("any_match: false is not valid")),
        Rule::OrMatch(set) => PortPredicate::Or(each("or_match", set.rules, predicate)?),
        Rule::AndMatch(set) => PortPredicate::And(each("and_match", set.rules, predicate)?),
        Rule::NotMatch(not) => PortPredicate::Not(Box::new(predicate(*not).at("not_match")?)),
        Rule::DestinationPortRange(range) => {
            let (start, end) = (u32::try_from(range.start), u32::try_from(range.end));
            let (Ok(start), Ok(end)) = (start, end) else { return Err(Fault::new("negative port")) };
            PortPredicate::Range(value::port(start)?, end)
        }
    })
}

fn chain(mut of: pb::FilterChain, extensions: &Extensions, reader: &mut Reader) -> Read<FilterChain> {
    let out = FilterChain {
        name: Name::from(take(&mut of.name)),
        matches: chain_match(of.filter_chain_match.take().unwrap_or_default(), reader).at("filter_chain_match")?,
        tls: tls::downstream(of.transport_socket.take(), reader).at("transport_socket")?,
        filters: each("filters", take(&mut of.filters), |f| network_filter::filter(f, extensions, reader))?,
        transport_socket_connect_timeout: value::duration(&mut of.transport_socket_connect_timeout),
        unusable: None,
    };
    reader.done(&of);
    Ok(out)
}

/// A condition that is not understood would make the chain take more than it should.
fn chain_match(mut of: pb::FilterChainMatch, reader: &mut Reader) -> Read<ChainMatch> {
    let out = ChainMatch {
        destination_port: value::number(&mut of.destination_port)
            .map(value::port)
            .transpose()
            .at("destination_port")?,
        prefix_ranges: each("prefix_ranges", take(&mut of.prefix_ranges), value::network)?,
        server_names: sorted(take(&mut of.server_names)),
        transport_protocol: match take(&mut of.transport_protocol).as_str() {
            "" => None,
            "raw_buffer" => Some(TransportProtocol::RawBuffer),
            "tls" => Some(TransportProtocol::Tls),
            other => return Err(Fault::new(format!("transport_protocol {other} is not supported"))),
        },
        application_protocols: take(&mut of.application_protocols),
        direct_source_prefix_ranges: each(
            "direct_source_prefix_ranges",
            take(&mut of.direct_source_prefix_ranges),
            value::network,
        )?,
        source_type: match filter_chain_match::ConnectionSourceType::try_from(take(&mut of.source_type)) {
            Ok(filter_chain_match::ConnectionSourceType::Any) => SourceType::Any,
            Ok(filter_chain_match::ConnectionSourceType::SameIpOrLoopback) => SourceType::SameIpOrLoopback,
            Ok(filter_chain_match::ConnectionSourceType::External) => SourceType::External,
            Err(_) => return Err(Fault::new("unknown source_type")),
        },
        source_prefix_ranges: each("source_prefix_ranges", take(&mut of.source_prefix_ranges), value::network)?,
        source_ports: each("source_ports", take(&mut of.source_ports), value::port)?,
    };
    reader.done_strict(&of)?;
    Ok(out)
}

fn sorted(mut of: Vec<String>) -> Vec<String> {
    of.sort();
    of
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::{self as core, address as pb_address, socket_address};
    use envoy_types::pb::envoy::r#type::v3::Int32Range;
    use envoy_types::pb::google::protobuf as wkt;

    use super::*;

    fn at(ip: &str, port: u32) -> Option<core::Address> {
        let socket = core::SocketAddress {
            address: ip.to_owned(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(port)),
            ..Default::default()
        };
        Some(core::Address { address: Some(pb_address::Address::SocketAddress(socket)) })
    }

    fn read(of: pb::Listener) -> Read<Listener> {
        listener(of, &Extensions::new(), &mut Reader::default())
    }

    fn minimal() -> pb::Listener {
        pb::Listener { name: "l".to_owned(), address: at("0.0.0.0", 80), ..Default::default() }
    }

    #[test]
    fn defaults_are_envoys() {
        let l = read(minimal()).expect("valid");
        assert!(l.bind_to_port && !l.use_original_dst && !l.continue_on_listener_filters_timeout);
        assert_eq!((l.listener_filters_timeout, l.direction), (None, Direction::Unspecified));
        assert_eq!(l.address, Address::Socket(([0, 0, 0, 0], 80).into()));
    }

    #[test]
    fn inspection_ends_by_default_and_never_at_zero() {
        let any = wkt::Any {
            type_url: "t/envoy.extensions.filters.listener.http_inspector.v3.HttpInspector".to_owned(),
            value: Vec::new(),
        };
        let inspector = pb::ListenerFilter {
            config_type: Some(listener_filter::ConfigType::TypedConfig(any)),
            ..Default::default()
        };
        let with = |timeout| {
            let listener_filters = vec![inspector.clone()];
            let l = read(pb::Listener { listener_filters, listener_filters_timeout: timeout, ..minimal() });
            l.expect("valid").listener_filters_timeout
        };
        assert_eq!(with(None), Some(DEFAULT_INSPECTION));
        assert_eq!(with(Some(wkt::Duration::default())), None);
        assert_eq!(with(Some(wkt::Duration { seconds: 3, nanos: 0 })), Some(Duration::from_secs(3)));
    }

    #[test]
    fn what_cannot_be_matched_is_refused() {
        let chain = |m| pb::Listener {
            filter_chains: vec![pb::FilterChain { filter_chain_match: Some(m), ..Default::default() }],
            ..minimal()
        };
        let suffix = pb::FilterChainMatch { address_suffix: "x".to_owned(), ..Default::default() };
        let reject = read(chain(suffix)).expect_err("suffix").into_reject("Listener l".to_owned());
        assert_eq!(
            reject.to_string(),
            "Listener l: filter_chains[0].filter_chain_match: address_suffix is not supported"
        );
        assert!(
            read(chain(pb::FilterChainMatch { transport_protocol: "quic".to_owned(), ..Default::default() })).is_err()
        );
        assert!(read(pb::Listener { address: at("host", 1), ..minimal() }).is_err());
        assert!(read(pb::Listener { address: at("1.2.3.4", 70_000), ..minimal() }).is_err());
        assert!(read(pb::Listener { address: None, ..minimal() }).is_err());
    }

    #[test]
    fn predicates_are_read_inside_out() {
        let range = pb::ListenerFilterChainMatchPredicate {
            rule: Some(Rule::DestinationPortRange(Int32Range { start: 5, end: 70_000 })),
        };
        let not = pb::ListenerFilterChainMatchPredicate { rule: Some(Rule::NotMatch(Box::new(range))) };
        assert_eq!(predicate(not), Ok(PortPredicate::Not(Box::new(PortPredicate::Range(5, 70_000)))));
        assert!(predicate(pb::ListenerFilterChainMatchPredicate { rule: None }).is_err());
    }
}
