//! Messages of collectors, written field by field: OTLP and Envoy's access log service. A handful of fields of a handful
//! of messages; generated code for them would be a hundred times as long.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prost::encoding::{WireType, encode_key, encode_varint};

/// A message in the making.
#[derive(Debug, Default, Clone)]
pub(super) struct Message(pub(super) Vec<u8>);

impl Message {
    /// Bytes or a message, also when empty.
    pub(super) fn bytes(&mut self, field: u32, bytes: &[u8]) -> &mut Self {
        encode_key(field, WireType::LengthDelimited, &mut self.0);
        encode_varint(bytes.len() as u64, &mut self.0);
        self.0.extend_from_slice(bytes);
        self
    }

    /// A message inside.
    pub(super) fn message(&mut self, field: u32, inner: &Self) -> &mut Self {
        self.bytes(field, &inner.0)
    }

    /// Text, unless it is empty.
    pub(super) fn text(&mut self, field: u32, text: &str) -> &mut Self {
        if text.is_empty() { self } else { self.bytes(field, text.as_bytes()) }
    }

    /// A number, unless it is 0.
    pub(super) fn number(&mut self, field: u32, number: u64) -> &mut Self {
        if number != 0 {
            encode_key(field, WireType::Varint, &mut self.0);
            encode_varint(number, &mut self.0);
        }
        self
    }

    /// Eight bytes.
    pub(super) fn fixed(&mut self, field: u32, number: u64) -> &mut Self {
        encode_key(field, WireType::SixtyFourBit, &mut self.0);
        self.0.extend_from_slice(&number.to_le_bytes());
        self
    }

    /// An entry of a map of texts.
    pub(super) fn entry(&mut self, field: u32, key: &str, value: &str) -> &mut Self {
        let mut entry = Self::default();
        entry.text(1, key).text(2, value);
        self.message(field, &entry)
    }
}

/// `google.protobuf.Timestamp`
pub(super) fn timestamp(at: SystemTime) -> Message {
    duration(at.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// `google.protobuf.Duration`
pub(super) fn duration(of: Duration) -> Message {
    let mut out = Message::default();
    out.number(1, of.as_secs()).number(2, of.subsec_nanos().into());
    out
}

/// `envoy.config.core.v3.Address` of a socket.
pub(super) fn address(of: SocketAddr) -> Message {
    let (mut socket, mut out) = (Message::default(), Message::default());
    socket.text(2, &of.ip().to_string()).number(3, of.port().into());
    out.message(1, &socket);
    out
}

/// Nanoseconds since 1970.
pub(super) fn nanos(at: SystemTime) -> u64 {
    u64::try_from(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

/// `opentelemetry.proto.common.v1.KeyValue` with a text.
pub(super) fn attribute(key: &str, value: &str) -> Message {
    let (mut any, mut out) = (Message::default(), Message::default());
    any.bytes(1, value.as_bytes());
    out.text(1, key).message(2, &any);
    out
}

/// The same with any JSON value.
pub(super) fn any_value(value: &serde_json::Value) -> Message {
    use serde_json::Value;
    let mut out = Message::default();
    match value {
        Value::Null => {}
        Value::Bool(flag) => {
            encode_key(2, WireType::Varint, &mut out.0);
            encode_varint(u64::from(*flag), &mut out.0);
        }
        Value::String(text) => {
            out.bytes(1, text.as_bytes());
        }
        Value::Number(number) => match number.as_i64() {
            Some(whole) => {
                encode_key(3, WireType::Varint, &mut out.0);
                encode_varint(whole as u64, &mut out.0);
            }
            None => {
                out.fixed(4, number.as_f64().unwrap_or(f64::NAN).to_bits());
            }
        },
        Value::Array(items) => {
            let mut list = Message::default();
            items.iter().for_each(|item| {
                list.message(1, &any_value(item));
            });
            out.message(5, &list);
        }
        Value::Object(fields) => {
            let mut list = Message::default();
            for (key, value) in fields {
                let mut pair = Message::default();
                pair.text(1, key).message(2, &any_value(value));
                list.message(1, &pair);
            }
            out.message(6, &list);
        }
    }
    out
}

/// A message as the body of a gRPC request.
pub(super) fn grpc_frame(message: &Message) -> Vec<u8> {
    let length = u32::try_from(message.0.len()).unwrap_or(u32::MAX);
    [&[0][..], &length.to_be_bytes(), &message.0].concat()
}
