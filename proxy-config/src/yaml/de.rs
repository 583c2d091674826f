//! A node as serde input: YAML 1.1 scalars, field paths in errors, unread fields noted.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, IntoDeserializer, Unexpected, Visitor};

use super::tree::{Data, Node, is_null};

/// What reading an object has brought to light.
#[derive(Debug, Default)]
pub(crate) struct Notes {
    /// Fields that no type asks for: path with indices, line, column.
    pub(crate) unread: RefCell<BTreeSet<(String, usize, usize)>>,
}

/// A value that is not what its field takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Field path from the object's root.
    pub(crate) field: String,
    pub(crate) line: usize,
    pub(crate) column: usize,
    pub(crate) reason: String,
}

/// Reads `node`, which stands at `path` of its object.
pub(crate) fn read<T: DeserializeOwned>(node: &Node, path: &str, notes: &Notes) -> Result<T, Failure> {
    let root = Path { parent: None, step: Step::Root(path) };
    T::deserialize(Reader { node, path: &root, notes }).map_err(|e| Failure {
        field: e.path.unwrap_or_else(|| path.to_owned()),
        line: if e.line == 0 { node.line } else { e.line },
        column: if e.line == 0 { node.column } else { e.column },
        reason: e.reason,
    })
}

/// Way to a value; lives on the stack.
struct Path<'p> {
    parent: Option<&'p Self>,
    step: Step<'p>,
}

enum Step<'p> {
    Root(&'p str),
    Key(&'p str),
    Index(usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parent) = self.parent {
            parent.fmt(f)?;
        }
        match self.step {
            Step::Root(text) => f.write_str(text),
            Step::Index(index) => write!(f, "[{index}]"),
            Step::Key(key) if self.parent.is_some_and(|p| matches!(p.step, Step::Root(""))) => f.write_str(key),
            Step::Key(key) => write!(f, ".{key}"),
        }
    }
}

#[derive(Debug)]
struct ReadError {
    reason: String,
    path: Option<String>,
    line: usize,
    column: usize,
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(reason: T) -> Self {
        Self { reason: reason.to_string(), path: None, line: 0, column: 0 }
    }
}

#[derive(Clone, Copy)]
struct Reader<'n, 'p> {
    node: &'n Node,
    path: &'p Path<'p>,
    notes: &'p Notes,
}

/// An unquoted scalar after YAML 1.1.
enum Plain {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text,
}

impl<'n> Reader<'n, '_> {
    /// Gives an error the place of this node, unless a deeper one has claimed it.
    fn locate<T>(&self, result: Result<T, ReadError>) -> Result<T, ReadError> {
        result.map_err(|mut e| {
            if e.path.is_none() {
                e.path = Some(self.path.to_string());
                (e.line, e.column) = (self.node.line, self.node.column);
            }
            e
        })
    }

    fn wrong(&self, expected: &str) -> ReadError {
        let found = match &self.node.data {
            Data::List(_) => "a list".to_owned(),
            Data::Map(_) => "a map".to_owned(),
            Data::Scalar { text, plain: false } => format!("the text {text:?}"),
            Data::Scalar { text, plain: true } => match plain(text) {
                Plain::Null => "nothing".to_owned(),
                Plain::Bool(value) if expected == TEXT => {
                    format!("{text}, which YAML takes for the boolean {value}: quote it")
                }
                Plain::Unsigned(_) | Plain::Signed(_) | Plain::Float(_) if expected == TEXT => {
                    format!("the number {text}: quote it")
                }
                Plain::Bool(_) => format!("the boolean {text}"),
                Plain::Unsigned(_) | Plain::Signed(_) | Plain::Float(_) => format!("the number {text}"),
                Plain::Text => format!("the text {text:?}"),
            },
        };
        de::Error::custom(format!("expected {expected}, found {found}"))
    }

    fn visit_plain<V: Visitor<'n>>(&self, text: &'n str, visitor: V) -> Result<V::Value, ReadError> {
        match plain(text) {
            Plain::Null => visitor.visit_unit(),
            Plain::Bool(value) => visitor.visit_bool(value),
            Plain::Unsigned(value) => visitor.visit_u64(value),
            Plain::Signed(value) => visitor.visit_i64(value),
            Plain::Float(value) => visitor.visit_f64(value),
            Plain::Text => visitor.visit_borrowed_str(text),
        }
    }

    fn number<V: Visitor<'n>>(self, visitor: V, whole: bool) -> Result<V::Value, ReadError> {
        let expected = if whole { "a whole number" } else { "a number" };
        let result = match &self.node.data {
            Data::Scalar { text, plain: true } => match plain(text) {
                Plain::Null => visitor.visit_u64(0),
                Plain::Unsigned(value) => visitor.visit_u64(value),
                Plain::Signed(value) => visitor.visit_i64(value),
                Plain::Float(value) if !whole => visitor.visit_f64(value),
                Plain::Float(_) | Plain::Bool(_) | Plain::Text => Err(self.wrong(expected)),
            },
            Data::Scalar { .. } | Data::List(_) | Data::Map(_) => Err(self.wrong(expected)),
        };
        self.locate(result)
    }

    fn map<V: Visitor<'n>>(self, visitor: V, skip_null: bool) -> Result<V::Value, ReadError> {
        let entries: &[(String, Node)] = match &self.node.data {
            Data::Map(entries) => entries,
            _ if self.node.is_null() => &[],
            Data::List(_) | Data::Scalar { .. } => return self.locate(Err(self.wrong("a map"))),
        };
        self.locate(visitor.visit_map(Entries { of: self, rest: entries.iter(), value: None, skip_null }))
    }
}

/// How errors name a text field.
const TEXT: &str = "text";

fn plain(text: &str) -> Plain {
    if is_null(text) {
        return Plain::Null;
    }
    match text {
        "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON" => return Plain::Bool(true),
        "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off" | "OFF" => {
            return Plain::Bool(false);
        }
        _ => {}
    }
    number(text).unwrap_or(Plain::Text)
}

/// What YAML takes a value for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scalar {
    Null,
    Bool,
    Whole,
    Fraction,
    Text,
    /// A list or a map.
    No,
}

/// What kind of scalar a node is.
pub(crate) fn scalar(node: &Node) -> Scalar {
    match &node.data {
        Data::Scalar { plain: false, .. } => Scalar::Text,
        Data::Scalar { text, plain: true } => match plain(text) {
            Plain::Null => Scalar::Null,
            Plain::Bool(_) => Scalar::Bool,
            Plain::Unsigned(_) | Plain::Signed(_) => Scalar::Whole,
            Plain::Float(_) => Scalar::Fraction,
            Plain::Text => Scalar::Text,
        },
        Data::List(_) | Data::Map(_) => Scalar::No,
    }
}

fn number(text: &str) -> Option<Plain> {
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let clean = digits.replace('_', "");
    let radix = |prefix: &str, radix| clean.strip_prefix(prefix).map(|rest| u64::from_str_radix(rest, radix));
    let octal = clean.len() > 1 && clean.starts_with('0') && clean.bytes().all(|b| b.is_ascii_digit());
    let whole = radix("0x", 16)
        .or_else(|| radix("0o", 8))
        .or_else(|| radix("0b", 2))
        .or_else(|| octal.then(|| u64::from_str_radix(&clean, 8)))
        .unwrap_or_else(|| clean.parse());
    match whole {
        Ok(value) if text.starts_with('-') => 0_i64.checked_sub_unsigned(value).map(Plain::Signed),
        Ok(value) => Some(Plain::Unsigned(value)),
        Err(_) if clean.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'-' | b'+')) => {
            let value: f64 = clean.parse().ok()?;
            Some(Plain::Float(if text.starts_with('-') { -value } else { value }))
        }
        Err(_) => None,
    }
}

macro_rules! numbers {
    ($($name:ident $whole:literal),*) => {$(
        fn $name<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
            self.number(visitor, $whole)
        }
    )*};
}

impl<'n> de::Deserializer<'n> for Reader<'n, '_> {
    type Error = ReadError;

    numbers!(deserialize_i8 true, deserialize_i16 true, deserialize_i32 true, deserialize_i64 true,
        deserialize_u8 true, deserialize_u16 true, deserialize_u32 true, deserialize_u64 true,
        deserialize_f32 false, deserialize_f64 false);

    fn deserialize_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.data {
            Data::Scalar { text, plain: false } => self.locate(visitor.visit_borrowed_str(text)),
            Data::Scalar { text, plain: true } => self.locate(self.visit_plain(text, visitor)),
            Data::List(_) => self.deserialize_seq(visitor),
            Data::Map(_) => self.map(visitor, false),
        }
    }

    fn deserialize_bool<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let result = match &self.node.data {
            Data::Scalar { text, plain: true } => match plain(text) {
                Plain::Bool(value) => visitor.visit_bool(value),
                Plain::Null => visitor.visit_bool(false),
                _ => Err(self.wrong("true or false")),
            },
            Data::Scalar { .. } | Data::List(_) | Data::Map(_) => Err(self.wrong("true or false")),
        };
        self.locate(result)
    }

    fn deserialize_str<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let result = match &self.node.data {
            Data::Scalar { text, plain: false } => visitor.visit_borrowed_str(text),
            Data::Scalar { text, plain: true } => match plain(text) {
                Plain::Text => visitor.visit_borrowed_str(text),
                Plain::Null => visitor.visit_borrowed_str(""),
                _ => Err(self.wrong(TEXT)),
            },
            Data::List(_) | Data::Map(_) => Err(self.wrong(TEXT)),
        };
        self.locate(result)
    }

    fn deserialize_string<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_char<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_bytes<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        if self.node.is_null() { self.locate(visitor.visit_none()) } else { visitor.visit_some(self) }
    }

    fn deserialize_unit<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.locate(visitor.visit_unit())
    }

    fn deserialize_unit_struct<V: Visitor<'n>>(self, _: &'static str, visitor: V) -> Result<V::Value, ReadError> {
        self.locate(visitor.visit_unit())
    }

    fn deserialize_newtype_struct<V: Visitor<'n>>(self, _: &'static str, visitor: V) -> Result<V::Value, ReadError> {
        self.locate(visitor.visit_newtype_struct(self))
    }

    fn deserialize_seq<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let items: &[Node] = match &self.node.data {
            Data::List(items) => items,
            _ if self.node.is_null() => &[],
            Data::Map(_) | Data::Scalar { .. } => return self.locate(Err(self.wrong("a list"))),
        };
        self.locate(visitor.visit_seq(Items { of: self, items, next: 0 }))
    }

    fn deserialize_tuple<V: Visitor<'n>>(self, _: usize, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_tuple_struct<V: Visitor<'n>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.deserialize_seq(visitor)
    }

    fn deserialize_map<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.map(visitor, false)
    }

    fn deserialize_struct<V: Visitor<'n>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.map(visitor, true)
    }

    fn deserialize_enum<V: Visitor<'n>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        let Data::Scalar { text, .. } = &self.node.data else {
            return self.locate(Err(self.wrong(&format!("one of {}", variants.join(", ")))));
        };
        if !variants.contains(&text.as_str()) {
            return self.locate(Err(self.wrong(&format!("one of {}", variants.join(", ")))));
        }
        let text: StrDeserializer<'n, ReadError> = text.as_str().into_deserializer();
        self.locate(visitor.visit_enum(text))
    }

    fn deserialize_identifier<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        let note = (self.path.to_string(), self.node.line, self.node.column);
        self.notes.unread.borrow_mut().insert(note);
        visitor.visit_unit()
    }
}

struct Items<'n, 'p> {
    of: Reader<'n, 'p>,
    items: &'n [Node],
    next: usize,
}

impl<'n> de::SeqAccess<'n> for Items<'n, '_> {
    type Error = ReadError;

    fn next_element_seed<T: DeserializeSeed<'n>>(&mut self, seed: T) -> Result<Option<T::Value>, ReadError> {
        let Some(node) = self.items.get(self.next) else { return Ok(None) };
        let path = Path { parent: Some(self.of.path), step: Step::Index(self.next) };
        self.next += 1;
        seed.deserialize(Reader { node, path: &path, notes: self.of.notes }).map(Some)
    }
}

struct Entries<'n, 'p> {
    of: Reader<'n, 'p>,
    rest: std::slice::Iter<'n, (String, Node)>,
    value: Option<&'n (String, Node)>,
    skip_null: bool,
}

impl<'n> de::MapAccess<'n> for Entries<'n, '_> {
    type Error = ReadError;

    fn next_key_seed<K: DeserializeSeed<'n>>(&mut self, seed: K) -> Result<Option<K::Value>, ReadError> {
        // A struct's null field is an absent one, as Kubernetes prunes it.
        let Some(entry) = self.rest.find(|(_, v)| !(self.skip_null && v.is_null())) else { return Ok(None) };
        self.value = Some(entry);
        let path = Path { parent: Some(self.of.path), step: Step::Key(&entry.0) };
        let key = seed.deserialize(Key(&entry.0)).map(Some);
        Reader { node: &entry.1, path: &path, notes: self.of.notes }.locate(key)
    }

    fn next_value_seed<V: DeserializeSeed<'n>>(&mut self, seed: V) -> Result<V::Value, ReadError> {
        let (key, node) = self.value.expect("serde asks for a value after its key");
        let path = Path { parent: Some(self.of.path), step: Step::Key(key) };
        seed.deserialize(Reader { node, path: &path, notes: self.of.notes })
    }
}

/// A map's key: text, or a number where the type wants one.
struct Key<'n>(&'n str);

macro_rules! key_numbers {
    ($($name:ident $visit:ident $kind:ty),*) => {$(
        fn $name<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
            match self.0.parse::<$kind>() {
                Ok(value) => visitor.$visit(value),
                Err(_) => Err(de::Error::invalid_type(Unexpected::Str(self.0), &visitor)),
            }
        }
    )*};
}

impl<'n> de::Deserializer<'n> for Key<'n> {
    type Error = ReadError;

    key_numbers!(deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32, deserialize_u64 visit_u64 u64,
        deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64);

    fn deserialize_any<V: Visitor<'n>>(self, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_newtype_struct<V: Visitor<'n>>(self, _: &'static str, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        <V: Visitor<'n>>
        bool i8 i16 u8 f32 f64 i128 u128 char str string bytes byte_buf option unit unit_struct seq tuple
        tuple_struct map struct enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::super::tree::parse;
    use super::*;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(default)]
    struct Inner {
        text: String,
        port: u16,
        on: Option<bool>,
        share: f64,
        by_port: BTreeMap<u16, String>,
        list: Vec<Self>,
        any: Option<serde_json::Value>,
    }

    fn of(text: &str) -> (Result<Inner, Failure>, Vec<String>) {
        let (documents, errors) = parse(text);
        assert!(errors.is_empty(), "{errors:?}");
        let notes = Notes::default();
        let read = read(&documents[0], "spec", &notes);
        (read, notes.unread.into_inner().into_iter().map(|(path, ..)| path).collect())
    }

    #[test]
    fn values_and_unread_fields() {
        let (read, unread) = of("text: a\nport: 80\non: yes\nshare: 1\nby_port: {8080: x}\nany: {n: 1, t: '1'}\n\
                                 list:\n- {text: b, port: ~, what: {deep: 1}}\nother: 1\n");
        let read = read.expect("valid");
        assert_eq!((read.text.as_str(), read.port, read.on, read.share), ("a", 80, Some(true), 1.0));
        assert_eq!(read.by_port[&8080], "x");
        assert_eq!(read.any, Some(serde_json::json!({"n": 1, "t": "1"})));
        assert_eq!(read.list[0].text, "b");
        assert_eq!(unread, ["spec.list[0].what", "spec.other"]);
    }

    #[test]
    fn errors_say_where_and_what() {
        for (text, field, place, reason) in [
            ("list:\n- text: off\n", "spec.list[0].text", (2, 9), "the boolean false: quote it"),
            ("text: 1.5\n", "spec.text", (1, 7), "the number 1.5: quote it"),
            ("port: 70000\n", "spec.port", (1, 7), "u16"),
            ("port: \"80\"\n", "spec.port", (1, 7), "expected a whole number"),
            ("list: {}\n", "spec.list", (1, 7), "expected a list, found a map"),
            ("by_port: {a: b}\n", "spec.by_port.a", (1, 14), "u16"),
        ] {
            let failure = of(text).0.expect_err("invalid");
            assert_eq!((failure.field.as_str(), (failure.line, failure.column)), (field, place), "{text}");
            assert!(failure.reason.contains(reason), "{text}: {}", failure.reason);
        }
    }

    #[test]
    fn scalars_are_yaml_1_1() {
        for text in ["y", "Y", "yes", "on", "n", "no", "OFF", "true", "False"] {
            assert!(matches!(plain(text), Plain::Bool(_)), "{text}");
        }
        for text in ["1.2.3", "10.0.0.1", "1h", "a", "2024-01-01", "-", "1:30", "0b", "e1"] {
            assert!(matches!(plain(text), Plain::Text), "{text}");
        }
        assert!(matches!(plain("010"), Plain::Unsigned(8)) && matches!(plain("0x1F"), Plain::Unsigned(31)));
        assert!(matches!(plain("-3"), Plain::Signed(-3)) && matches!(plain("1_000"), Plain::Unsigned(1000)));
        assert!(matches!(plain("1e3"), Plain::Float(v) if v == 1000.0));
    }
}
