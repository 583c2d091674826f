//! What reading a resource needs beside its messages: field paths for errors, and the account of what was not read.
//!
//! Decoders own their message and *take* fields out of it; [`Reader::done`] reports whatever is left. So a field
//! counts as read only where some code took it, and a field that nobody thought of is reported by name.

use std::collections::BTreeSet;
use std::fmt::Debug;

use envoy_types::pb::google::protobuf as wkt;
use prost::Message;

use super::wire;
use crate::model::{Reject, Severity};

/// Why a resource cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Field path, outermost first; built from the inside out.
    path: String,
    /// What was wrong and what was expected.
    reason: String,
}

pub(super) type Read<T> = Result<T, Fault>;

impl Fault {
    /// A fault at the message itself; callers add where that is.
    pub(super) fn new(reason: impl Into<String>) -> Self {
        Self { path: String::new(), reason: reason.into() }
    }

    fn under(mut self, field: &str) -> Self {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("{field}{dot}{}", self.path);
        self
    }

    pub(super) fn into_reject(self, resource: String) -> Reject {
        let Self { path: field, reason } = self;
        Reject { resource, place: None, field, reason, severity: Severity::Error, code: None }
    }
}

/// Says in which field something went wrong.
pub(super) trait At {
    fn at(self, field: &str) -> Self;
}

impl<T> At for Read<T> {
    fn at(self, field: &str) -> Self {
        self.map_err(|fault| fault.under(field))
    }
}

/// Reads every element of a repeated field.
pub(super) fn each<M, T>(field: &str, of: Vec<M>, mut read: impl FnMut(M) -> Read<T>) -> Read<Vec<T>> {
    let one = |(i, m)| read(m).map_err(|fault| fault.under(&format!("{field}[{i}]")));
    let mut all: Vec<T> = of.into_iter().enumerate().map(one).collect::<Read<_>>()?;
    // It has the room of what it was read from, or of the next power of two, and is kept for long.
    all.shrink_to_fit();
    Ok(all)
}

/// Account of one resource.
#[derive(Debug, Default)]
pub(super) struct Reader {
    /// Kind and name, for rejects.
    pub(super) resource: String,
    /// Parts that are not served as said; the resource itself stays.
    pub(super) notes: Vec<Reject>,
    /// Known, harmless, nothing to do.
    pub(super) inert: BTreeSet<String>,
    /// `Message.field` that was set and not read.
    pub(super) unread: BTreeSet<String>,
    /// Filters that come by extension discovery, by name.
    pub(super) extensions: BTreeSet<String>,
}

impl Reader {
    /// Decodes a packed message; fields that its type does not know count as not read.
    pub(super) fn open<T: Message + Default>(&mut self, value: &[u8]) -> Read<T> {
        let message = T::decode(value).map_err(|e| Fault::new(format!("malformed {}: {e}", short_name::<T>())))?;
        if message.encoded_len() != value.len() {
            let name = short_name::<T>();
            self.unread.extend(wire::missing(value, &message.encode_to_vec()).map(|path| format!("{name}.{path}")));
        }
        Ok(message)
    }

    /// As [`Self::open`] for the library's own wrapper.
    pub(super) fn unpack<T: Message + Default>(&mut self, any: &wkt::Any) -> Read<T> {
        self.open(&any.value)
    }

    /// Reports what is left of a message whose decoder took all that it reads.
    pub(super) fn done<T: Default + PartialEq + Debug>(&mut self, rest: &T) {
        let blank = T::default();
        if *rest == blank {
            return;
        }
        let name = short_name::<T>();
        self.unread.extend(wire::differing(rest, &blank).into_iter().map(|field| format!("{name}.{field}")));
    }

    /// As [`Self::done`] where a field that is not understood must not be passed over.
    pub(super) fn done_strict<T: Default + PartialEq + Debug>(&self, rest: &T) -> Read<()> {
        match self.unknown(rest) {
            Some(fields) => Err(Fault::new(format!("{fields} is not supported"))),
            None => Ok(()),
        }
    }

    /// Names of the fields that are left in a message, for callers that refuse a part of it by name.
    pub(super) fn unknown<T: Default + PartialEq + Debug>(&self, rest: &T) -> Option<String> {
        let blank = T::default();
        (*rest != blank).then(|| wire::differing(rest, &blank).join(", "))
    }

    /// Notes a part that is known by name only.
    pub(super) fn note(&mut self, field: &str, reason: impl Into<String>, severity: Severity) {
        self.notes.push(Reject {
            resource: self.resource.clone(),
            place: None,
            field: field.to_owned(),
            reason: reason.into(),
            severity,
            code: None,
        });
    }
}

/// A type's name without its packages: `HttpConnectionManager`, `route_action::HashPolicy`.
fn short_name<T>() -> &'static str {
    let full = std::any::type_name::<T>();
    match full.rfind("::v3::").map(|at| at + "::v3::".len()) {
        Some(at) => &full[at..],
        None => full.rsplit("::").next().unwrap_or(full),
    }
}

/// The name after the last slash of a type URL.
pub(super) fn type_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or(url)
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::core::v3::Locality;

    use super::super::messages::NameEntry;
    use super::*;

    #[test]
    fn what_is_not_taken_is_reported_by_name() {
        let mut reader = Reader::default();
        let mut locality = Locality { region: "r".into(), zone: "z\n    sub_zone: x".into(), ..Default::default() };
        std::mem::take(&mut locality.region);
        reader.done(&locality);
        assert_eq!(reader.unread.iter().collect::<Vec<_>>(), ["Locality.zone"]);
    }

    #[test]
    fn what_a_type_does_not_know_is_reported_by_number() {
        let mut reader = Reader::default();
        let mut bytes = NameEntry { registry: "k".into(), ..Default::default() }.encode_to_vec();
        bytes.extend([0xa2, 0x06, 0x01, b'x']);
        let entry: NameEntry = reader.open(&bytes).expect("valid");
        assert_eq!(entry.registry, "k");
        assert_eq!(reader.unread.iter().collect::<Vec<_>>(), ["NameEntry.100"]);
    }

    #[test]
    fn paths_grow_outwards() {
        let inner = each("filters", vec![1, 2], |n| if n == 2 { Err(Fault::new("no")) } else { Ok(n) });
        let fault = inner.at("filter_chains[0]").expect_err("second");
        assert_eq!(fault, Fault { path: "filter_chains[0].filters[1]".into(), reason: "no".into() });
    }
}
