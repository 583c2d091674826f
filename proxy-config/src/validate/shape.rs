//! What the schemas of the kinds say: which fields there are, of which type, with which words and ranges.
//!
//! The table `shapes.txt` is read once. A document is compared with it value by value; what the table does not bound
//! (regular expressions, names, combinations) is left to the rules.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use super::at::At;
use super::{Findings, Weight, duration};
use crate::yaml::{Data, Node, Scalar, scalar};

const TABLE: &str = include_str!("shapes.txt");

/// Fields of a message.
#[derive(Debug, Default)]
struct Shape {
    fields: BTreeMap<&'static str, Field>,
    /// Fields of which at most one is said.
    one_of: Vec<Vec<&'static str>>,
    /// Of a kind: `spec` must be there.
    needed: bool,
}

#[derive(Debug)]
struct Field {
    needed: bool,
    kind: Kind,
}

/// What a value may be.
#[derive(Debug, Clone)]
enum Kind {
    Any,
    Bool,
    Text { empty: bool },
    Duration,
    Number { whole: bool, least: Option<f64>, most: Option<f64> },
    Words(Vec<&'static str>),
    Message(&'static str),
    List(Box<Self>),
    Map(Box<Self>),
}

/// Every shape by name.
fn shapes() -> &'static BTreeMap<&'static str, Shape> {
    static SHAPES: OnceLock<BTreeMap<&'static str, Shape>> = OnceLock::new();
    SHAPES.get_or_init(|| read(TABLE))
}

fn read(table: &'static str) -> BTreeMap<&'static str, Shape> {
    let mut out: BTreeMap<&'static str, Shape> = BTreeMap::new();
    let mut current = "";
    for line in table.lines().filter(|l| !l.starts_with('#') && !l.is_empty()) {
        let mut fields = line;
        if !line.starts_with(' ') {
            let (head, rest) = line.split_once(':').unwrap_or((line, ""));
            fields = rest;
            let mut words = head.split(" one(");
            let name = words.next().unwrap_or_default().trim();
            current = name.trim_start_matches('!');
            let one_of = words.map(|w| w.trim_end_matches(')').split(' ').collect()).collect();
            out.insert(current, Shape { one_of, needed: name.starts_with('!'), ..Shape::default() });
        }
        let shape = out.entry(current).or_default();
        for field in fields.split(',').map(str::trim).filter(|f| !f.is_empty()) {
            let (name, kind) = field.split_once(' ').unwrap_or((field, "any"));
            let needed = name.starts_with('!');
            shape.fields.insert(name.trim_start_matches('!'), Field { needed, kind: kind_of(kind) });
        }
    }
    out
}

fn kind_of(text: &'static str) -> Kind {
    if let Some(item) = text.strip_suffix('*') {
        return Kind::List(Box::new(kind_of(item)));
    }
    if let Some(item) = text.strip_suffix('%') {
        return Kind::Map(Box::new(kind_of(item)));
    }
    let (word, bounds) = text.split_once('[').unwrap_or((text, ""));
    let (least, most) = bounds.trim_end_matches(']').split_once("..").unwrap_or_default();
    match word {
        "any" => Kind::Any,
        "bool" => Kind::Bool,
        "text" => Kind::Text { empty: true },
        "text1" => Kind::Text { empty: false },
        "duration" => Kind::Duration,
        "int" | "number" => Kind::Number { whole: word == "int", least: least.parse().ok(), most: most.parse().ok() },
        words if words.contains('|') => Kind::Words(words.split('|').collect()),
        name => Kind::Message(name),
    }
}

/// Findings of a whole object against its kind's shape; kinds without one have none.
pub(super) fn check(found: &mut Findings, kind: &str, root: &At<'_>) {
    let Some(shape) = shapes().get(kind).filter(|_| kind.starts_with(|c: char| c.is_ascii_uppercase())) else { return };
    for (key, value) in root.entries() {
        if !matches!(key, "apiVersion" | "kind" | "metadata" | "spec" | "status") {
            unknown(found, &value, key, &["spec"]);
        }
    }
    let spec = root.get("spec");
    if spec.is_null() {
        found.schema(&spec, "a map is expected, nothing is written");
    } else if spec.is_said() {
        message(found, shape, &spec);
    } else if shape.needed {
        found.schema(&spec, "spec is missing");
    }
}

fn unknown(found: &mut Findings, at: &At<'_>, key: &str, known: &[&str]) {
    let near = known.iter().filter_map(|k| Some((distance(key, k)?, k))).min();
    let hint = near.map(|(_, k)| format!(" (is {k} meant?)")).unwrap_or_default();
    found.push(at, format!("there is no field {key:?} here{hint}"), Weight::Unknown);
}

/// How many letters differ; `None` when the words are not alike.
fn distance(a: &str, b: &str) -> Option<usize> {
    let (a, b) = (a.to_ascii_lowercase().into_bytes(), b.to_ascii_lowercase().into_bytes());
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let cost = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = cost.min(row[j] + 1).min(corner + 1);
        }
    }
    let most = 1 + a.len().min(b.len()) / 4;
    row.last().copied().filter(|d| *d <= most)
}

fn message(found: &mut Findings, shape: &Shape, at: &At<'_>) {
    if !matches!(at.node().map(|n| &n.data), Some(Data::Map(_))) {
        wrong(found, at, "a map");
        return;
    }
    for (key, value) in at.entries() {
        let name = if key.contains('_') { camel(key) } else { key.to_owned() };
        match shape.fields.get(name.as_str()) {
            Some(field) => self::value(found, &field.kind, &value),
            None => unknown(found, &value, key, &shape.fields.keys().copied().collect::<Vec<_>>()),
        }
    }
    for (name, _) in shape.fields.iter().filter(|(_, f)| f.needed) {
        let value = at.get(name);
        if !value.is_said() && !value.is_null() {
            found.schema(&value, format!("{name} is missing"));
        }
    }
    for group in &shape.one_of {
        let said: Vec<&str> = group.iter().copied().filter(|f| at.get(f).is_said()).collect();
        if let [_, second, ..] = said.as_slice() {
            found.schema(&at.get(second), format!("only one of {} may be set", group.join(", ")));
        }
    }
}

fn camel(key: &str) -> String {
    let mut parts = key.split('_');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut letters = part.chars();
        out.extend(letters.next().map(|c| c.to_ascii_uppercase()));
        out.push_str(letters.as_str());
    }
    out
}

fn value(found: &mut Findings, kind: &Kind, at: &At<'_>) {
    let Some(node) = at.node() else { return };
    if node.is_null() && !matches!(kind, Kind::Any) {
        found.schema(at, "a value is expected, nothing is written: leave the field out");
        return;
    }
    match kind {
        Kind::Any => {}
        Kind::Message(name) => {
            if let Some(shape) = shapes().get(name) {
                message(found, shape, at);
            }
        }
        Kind::List(item) => match &node.data {
            Data::List(_) => at.items().iter().for_each(|i| value(found, item, i)),
            _ => wrong(found, at, "a list"),
        },
        Kind::Map(item) => match &node.data {
            Data::Map(_) => at.entries().iter().for_each(|(_, v)| value(found, item, v)),
            _ => wrong(found, at, "a map"),
        },
        Kind::Bool if scalar(node) != Scalar::Bool => wrong(found, at, "true or false"),
        Kind::Bool => {}
        Kind::Text { empty } => {
            if scalar(node) != Scalar::Text {
                wrong(found, at, "text");
            } else if !empty && !at.has_text() {
                found.schema(at, "a text is expected, it is empty");
            }
        }
        Kind::Duration if scalar(node) != Scalar::Text => wrong(found, at, "a duration such as 1.5s"),
        Kind::Duration => length(found, at),
        Kind::Words(words) => word(found, words, at),
        Kind::Number { whole, least, most } => number(found, at, node, (*whole, *least, *most)),
    }
}

fn length(found: &mut Findings, at: &At<'_>) {
    match duration::nanoseconds(at.text()) {
        None => duration::check(found, at),
        Some(ns) if ns < 1_000_000 => found.schema(at, "a duration of at least 1ms is expected"),
        Some(_) => {}
    }
}

fn word(found: &mut Findings, words: &[&str], at: &At<'_>) {
    if !words.contains(&at.text()) {
        let near = words.iter().filter_map(|w| Some((distance(at.text(), w)?, w))).min();
        let hint = near.map(|(_, w)| format!(" (is {w} meant?)")).unwrap_or_default();
        found.schema(at, format!("one of {} is expected, not {:?}{hint}", words.join(", "), at.text()));
    }
}

fn number(found: &mut Findings, at: &At<'_>, node: &Node, (whole, least, most): (bool, Option<f64>, Option<f64>)) {
    let kind = scalar(node);
    if !(kind == Scalar::Whole || (kind == Scalar::Fraction && !whole)) {
        wrong(found, at, if whole { "a whole number" } else { "a number" });
        return;
    }
    let Some(value) = at.number() else { return };
    if least.is_some_and(|l| value < l) || most.is_some_and(|m| value > m) {
        let expected = match (least, most) {
            (Some(least), Some(most)) => format!("a number from {least} to {most}"),
            (Some(least), None) => format!("{least} or more"),
            (None, most) => format!("at most {}", most.unwrap_or_default()),
        };
        found.schema(at, format!("{expected} is expected"));
    }
}

/// No decoder takes a value of another type.
fn wrong(found: &mut Findings, at: &At<'_>, expected: &str) {
    let Some(node) = at.node() else { return };
    let quoted = expected == "text" || expected.starts_with("a duration");
    let seen = match (&node.data, scalar(node)) {
        (Data::List(_), _) => "a list".to_owned(),
        (Data::Map(_), _) => "a map".to_owned(),
        (_, Scalar::Text) => format!("the text {:?}", at.text()),
        (_, Scalar::Bool) if quoted => {
            let value = at.is_true();
            format!("{}, which YAML takes for the boolean {value}: quote it", at.text())
        }
        (_, Scalar::Bool) => format!("the boolean {}", at.text()),
        (_, Scalar::Null) => "nothing".to_owned(),
        (_, _) if quoted => format!("the number {}: quote it", at.text()),
        _ => format!("the number {}", at.text()),
    };
    found.add(at, format!("expected {expected}, found {seen}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_in_the_table_is_one() {
        fn named(kind: &Kind) -> Option<&'static str> {
            match kind {
                Kind::List(item) | Kind::Map(item) => named(item),
                Kind::Message(name) => Some(name),
                _ => None,
            }
        }
        for (shape, said) in shapes() {
            for (field, kind) in said.fields.iter().map(|(f, k)| (f, &k.kind)) {
                assert!(named(kind).is_none_or(|n| shapes().contains_key(n)), "{shape}.{field}: {kind:?}");
            }
            for field in said.one_of.iter().flatten() {
                assert!(said.fields.contains_key(field), "{shape}: one({field})");
            }
        }
        assert!(shapes()["WorkloadGroup"].needed && shapes()["ServiceEntry"].fields["hosts"].needed);
    }

    #[test]
    fn words_that_are_alike() {
        assert_eq!(distance("trafficPolcy", "trafficPolicy"), Some(1));
        assert_eq!(distance("foo", "trafficPolicy"), None);
        assert_eq!(camel("mirror_percent"), "mirrorPercent");
    }
}
