//! A value of a document with the path that leads to it; what is not there has a path and a place all the same.

use crate::yaml::{Data, Node};

/// A value, or the place where it would stand.
#[derive(Debug, Clone)]
pub(crate) struct At<'n> {
    node: Option<&'n Node>,
    /// Field path from the object's root, `spec.http[0].route`.
    pub(crate) path: String,
    /// Line and column, both from 1: the value's own, else those of the deepest part that is there.
    pub(crate) place: (usize, usize),
}

impl<'n> At<'n> {
    /// The whole document.
    pub(crate) fn root(node: &'n Node) -> Self {
        Self { node: Some(node), path: String::new(), place: (node.line, node.column) }
    }

    /// The value of a key; protobuf's spelling (`mirror_percent`) is as good as JSON's.
    pub(crate) fn get(&self, key: &str) -> Self {
        let node = self.node.and_then(|n| n.get(key).or_else(|| n.get(&snake(key))));
        let dot = if self.path.is_empty() { "" } else { "." };
        self.step(node, format!("{}{dot}{key}", self.path))
    }

    /// The value at several keys, one below the other.
    pub(crate) fn at(&self, keys: &str) -> Self {
        keys.split('.').fold(self.clone(), |at, key| at.get(key))
    }

    fn step(&self, node: Option<&'n Node>, path: String) -> Self {
        Self { node, path, place: node.map_or(self.place, |n| (n.line, n.column)) }
    }

    /// Items of a list; none when it is no list.
    pub(crate) fn items(&self) -> Vec<Self> {
        match self.node.map(|n| &n.data) {
            Some(Data::List(items)) => {
                let item = |(i, n): (usize, &'n Node)| self.step(Some(n), format!("{}[{i}]", self.path));
                items.iter().enumerate().map(item).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Entries of a map; none when it is no map.
    pub(crate) fn entries(&self) -> Vec<(&'n str, Self)> {
        match self.node.map(|n| &n.data) {
            Some(Data::Map(entries)) => {
                let entry = |(k, n): &'n (String, Node)| (k.as_str(), self.step(Some(n), format!("{}.{k}", self.path)));
                entries.iter().map(entry).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Whether something is written here; `null` is nothing.
    pub(crate) fn is_said(&self) -> bool {
        self.node.is_some_and(|n| !n.is_null())
    }

    /// Whether an explicit `null` is written here.
    pub(crate) fn is_null(&self) -> bool {
        self.node.is_some_and(Node::is_null)
    }

    /// How many items or entries; 0 for anything that is neither list nor map.
    pub(crate) fn len(&self) -> usize {
        match self.node.map(|n| &n.data) {
            Some(Data::List(items)) => items.len(),
            Some(Data::Map(entries)) => entries.len(),
            _ => 0,
        }
    }

    /// Text of a scalar, empty when there is none: protobuf does not tell an empty text from none either.
    pub(crate) fn text(&self) -> &'n str {
        match self.node {
            Some(node @ Node { data: Data::Scalar { text, .. }, .. }) if !node.is_null() => text,
            _ => "",
        }
    }

    /// Texts of a list.
    pub(crate) fn texts(&self) -> Vec<&'n str> {
        self.items().iter().map(Self::text).collect()
    }

    /// Whether a text is written and not empty.
    pub(crate) fn has_text(&self) -> bool {
        !self.text().is_empty()
    }

    /// A whole number; `None` for anything else.
    pub(crate) fn whole(&self) -> Option<i64> {
        self.text().parse().ok()
    }

    /// A whole number, 0 when nothing is said.
    pub(crate) fn whole_or_zero(&self) -> i64 {
        self.whole().unwrap_or(0)
    }

    /// A number.
    pub(crate) fn number(&self) -> Option<f64> {
        self.text().parse().ok().filter(|n: &f64| n.is_finite())
    }

    /// Whether the value is true.
    pub(crate) fn is_true(&self) -> bool {
        matches!(self.text(), "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On" | "ON")
    }

    /// The node, when there is one.
    pub(crate) fn node(&self) -> Option<&'n Node> {
        self.node
    }
}

fn snake(key: &str) -> String {
    let mut out = String::with_capacity(key.len() + 4);
    for c in key.chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::parse;

    #[test]
    fn what_is_not_there_has_the_place_of_what_is() {
        let (documents, _) = parse("spec:\n  http:\n  - mirror_percent: 3\n    route: null\n");
        let root = At::root(&documents[0]);
        let route = root.at("spec.http").items()[0].clone();
        assert_eq!((route.path.as_str(), route.place), ("spec.http[0]", (3, 5)));
        assert_eq!(route.get("mirrorPercent").whole(), Some(3));
        let missing = route.at("fault.delay");
        assert_eq!((missing.path.as_str(), missing.place), ("spec.http[0].fault.delay", (3, 5)));
        assert!(!route.get("route").is_said() && route.get("route").is_null() && !missing.is_null());
    }
}
