//! Small values: durations, percentages, addresses, untyped structures.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{self as core, address, envoy_internal_address, socket_address};
use envoy_types::pb::envoy::r#type::v3::FractionalPercent;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use envoy_types::pb::google::protobuf as wkt;
use ipnet::IpNet;
use serde_json::{Map, Number, Value};

use super::context::{Fault, Read, Reader};
use crate::model::Address;

/// Takes a duration; a negative one is none at all, that is zero.
pub(super) fn duration(field: &mut Option<wkt::Duration>) -> Option<Duration> {
    field.take().map(|d| {
        let seconds = u64::try_from(d.seconds).unwrap_or(0);
        Duration::new(seconds, u32::try_from(d.nanos.clamp(0, 999_999_999)).unwrap_or(0))
    })
}

/// Takes a wrapped number.
pub(super) fn number(field: &mut Option<wkt::UInt32Value>) -> Option<u32> {
    field.take().map(|v| v.value)
}

/// Takes a wrapped switch.
pub(super) fn flag(field: &mut Option<wkt::BoolValue>) -> Option<bool> {
    field.take().map(|v| v.value)
}

/// Takes a text that is `None` when empty.
pub(super) fn text(field: &mut String) -> Option<String> {
    Some(std::mem::take(field)).filter(|t| !t.is_empty())
}

/// A port number.
pub(super) fn port(number: u32) -> Read<u16> {
    u16::try_from(number).map_err(|_| Fault::new(format!("port {number} is out of range")))
}

/// A share in millionths, at most all.
pub(super) fn millionths(share: FractionalPercent) -> u32 {
    let of = match share.denominator() {
        DenominatorType::Hundred => 10_000,
        DenominatorType::TenThousand => 100,
        DenominatorType::Million => 1,
    };
    share.numerator.saturating_mul(of).min(1_000_000)
}

/// Takes the configured value of a share; runtime keys do not exist here.
pub(super) fn fraction(field: &mut Option<core::RuntimeFractionalPercent>, reader: &mut Reader) -> Option<u32> {
    let mut fraction = field.take()?;
    let share = fraction.default_value.take().map(millionths);
    reader.done(&fraction);
    share
}

/// A network; host bits stay as said.
pub(super) fn network(range: core::CidrRange) -> Read<IpNet> {
    let core::CidrRange { address_prefix, prefix_len } = range;
    let ip: IpAddr = address_prefix.parse().map_err(|_| Fault::new(format!("{address_prefix} is no IP address")))?;
    let length = prefix_len.map_or(0, |l| l.value);
    let length = u8::try_from(length).map_err(|_| Fault::new(format!("prefix length {length} is out of range")))?;
    IpNet::new(ip, length).map_err(|e| Fault::new(e.to_string()))
}

/// An address; a host name in it is kept for DNS clusters.
pub(super) fn address(mut of: core::Address, reader: &mut Reader) -> Read<Address> {
    let address = of.address.take().ok_or_else(|| Fault::new("no address"))?;
    match address {
        address::Address::SocketAddress(socket) => self::socket(socket, reader),
        address::Address::Pipe(mut pipe) => {
            let path = std::mem::take(&mut pipe.path);
            reader.done(&pipe);
            Ok(Address::Pipe(path))
        }
        address::Address::EnvoyInternalAddress(internal) => {
            let name = internal.address_name_specifier;
            let envoy_internal_address::AddressNameSpecifier::ServerListenerName(name) =
                name.ok_or_else(|| Fault::new("internal address without a name"))?;
            Ok(Address::Internal(name, internal.endpoint_id))
        }
    }
}

/// A socket address.
pub(super) fn socket(mut socket: core::SocketAddress, reader: &mut Reader) -> Read<Address> {
    let host = std::mem::take(&mut socket.address);
    let number = match socket.port_specifier.take() {
        Some(socket_address::PortSpecifier::PortValue(number)) => port(number)?,
        Some(socket_address::PortSpecifier::NamedPort(name)) => {
            return Err(Fault::new(format!("named port {name} is not supported")));
        }
        None => 0,
    };
    if socket.protocol() == socket_address::Protocol::Udp {
        return Err(Fault::new("UDP is not supported"));
    }
    reader.done(&socket);
    Ok(match host.parse::<IpAddr>() {
        Ok(ip) => Address::Socket(SocketAddr::new(ip, number)),
        Err(_) => Address::Host(host, number),
    })
}

/// An untyped structure as JSON; whole numbers are integers.
pub(super) fn json(of: wkt::Struct) -> Value {
    Value::Object(of.fields.into_iter().map(|(k, v)| (k, json_value(v))).collect::<Map<_, _>>())
}

fn json_value(of: wkt::Value) -> Value {
    use wkt::value::Kind;
    match of.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(b)) => Value::Bool(b),
        Some(Kind::StringValue(s)) => Value::String(s),
        Some(Kind::NumberValue(n)) => json_number(n),
        Some(Kind::StructValue(s)) => json(s),
        Some(Kind::ListValue(l)) => Value::Array(l.values.into_iter().map(json_value).collect()),
    }
}

fn json_number(n: f64) -> Value {
    /// Every integer up to here is exact in a double.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if n.fract() == 0.0 && n.abs() <= EXACT {
        return Value::from(n as i64);
    }
    Number::from_f64(n).map_or(Value::Null, Value::Number)
}

/// A duration as protobuf's JSON has it: `10s`, `0.500s`.
pub(crate) fn duration_text(d: Duration) -> String {
    match (d.as_secs(), d.subsec_nanos()) {
        (s, 0) => format!("{s}s"),
        (s, n) if n % 1_000_000 == 0 => format!("{s}.{:03}s", n / 1_000_000),
        (s, n) => format!("{s}.{n:09}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_one_unit() {
        let share = |numerator, denominator: DenominatorType| {
            millionths(FractionalPercent { numerator, denominator: denominator as i32 })
        };
        assert_eq!(share(50, DenominatorType::Hundred), 500_000);
        assert_eq!(share(125, DenominatorType::TenThousand), 12_500);
        assert_eq!(share(7, DenominatorType::Million), 7);
        assert_eq!(share(u32::MAX, DenominatorType::Hundred), 1_000_000);
    }

    #[test]
    fn networks_are_checked() {
        let range = |ip: &str, len| core::CidrRange {
            address_prefix: ip.to_owned(),
            prefix_len: Some(wkt::UInt32Value { value: len }),
        };
        assert_eq!(network(range("10.0.0.0", 8)).map(|n| n.to_string()), Ok("10.0.0.0/8".to_owned()));
        assert!(network(range("10.0.0.0", 33)).is_err());
        assert!(network(range("x", 8)).is_err());
    }

    #[test]
    fn durations_are_never_negative() {
        let of = |seconds, nanos| duration(&mut Some(wkt::Duration { seconds, nanos }));
        assert_eq!(of(-1, -5), Some(Duration::ZERO));
        assert_eq!(of(1, 500_000_000).map(duration_text).as_deref(), Some("1.500s"));
        assert_eq!(of(3, i32::MAX), Some(Duration::new(3, 999_999_999)));
    }

    #[test]
    fn whole_numbers_are_integers() {
        assert_eq!(json_number(4.0), Value::from(4));
        assert_eq!(json_number(0.5), Value::from(0.5));
        assert_eq!(json_number(f64::NAN), Value::Null);
    }
}
