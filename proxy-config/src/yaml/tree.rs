//! Text to documents of nodes that know where they stand.

use std::collections::HashMap;

use serde_saphyr::granit_parser::{Event, Marker, Parser, ScalarStyle, ScanError, Span, StrInput};

/// Nodes of one text, copies by alias included; far above any real folder, far below what exhausts memory.
const MAX_NODES: usize = 4_000_000;

/// Depth of nesting; Kubernetes objects stay below 30.
const MAX_DEPTH: usize = 200;

/// A value with its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// From 1.
    pub(crate) line: usize,
    /// From 1.
    pub(crate) column: usize,
    /// The value.
    pub(crate) data: Data,
}

/// A value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Data {
    /// Text; `plain` when unquoted, so that it may be a number, a boolean or null.
    Scalar { text: String, plain: bool },
    /// A list.
    List(Vec<Node>),
    /// Keys in written order, each once.
    Map(Vec<(String, Node)>),
}

/// Text that is no YAML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SyntaxError {
    pub(crate) line: usize,
    pub(crate) column: usize,
    pub(crate) reason: String,
}

impl Node {
    /// Value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        match &self.data {
            Data::Map(entries) => entries.iter().find(|(k, _)| k == key).map(|(_, v)| v),
            Data::Scalar { .. } | Data::List(_) => None,
        }
    }

    /// Text of a key, when it holds one.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.data {
            Data::Scalar { text, plain } if !(*plain && is_null(text)) => Some(text),
            Data::Scalar { .. } | Data::List(_) | Data::Map(_) => None,
        }
    }

    /// Whether nothing is written.
    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.data, Data::Scalar { text, plain: true } if is_null(text))
    }

    /// The deepest node that a field path (`spec.rules[0].to`) names; the node itself when nothing of it exists.
    pub(crate) fn at(&self, path: &str) -> &Self {
        let mut node = self;
        for segment in path.split(['.', '[']).filter(|s| !s.is_empty()) {
            let next = match (&node.data, segment.strip_suffix(']')) {
                (Data::List(items), Some(index)) => index.parse().ok().and_then(|i: usize| items.get(i)),
                (Data::Map(_), Some(key)) => node.get(key),
                _ => node.get(segment),
            };
            let Some(next) = next else { break };
            node = next;
        }
        node
    }
}

/// What YAML 1.1 takes for nothing.
pub(crate) fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

/// Documents of a text in order, empty ones left out. What comes after a syntax error in a document is skipped up to
/// the next document.
pub(crate) fn parse(text: &str) -> (Vec<Node>, Vec<SyntaxError>) {
    let mut documents = Vec::new();
    let mut errors = Vec::new();
    for (first_line, part) in split(text) {
        let mut builder = Builder {
            parser: Parser::new_from_str(part),
            anchors: HashMap::new(),
            nodes: 0,
            line_offset: first_line,
            peeked: None,
        };
        match builder.documents(&mut documents) {
            Ok(()) => {}
            Err(mut e) => {
                e.line += first_line;
                errors.push(e);
            }
        }
    }
    (documents, errors)
}

/// Parts between `---` lines, each with the number of lines before it; one broken document leaves the others alone.
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut parts = Vec::new();
    let (mut start, mut start_line, mut offset) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let rest = line.strip_prefix("---");
        if offset > start && rest.is_some_and(|r| r.is_empty() || r.starts_with([' ', '\t', '\r', '\n'])) {
            parts.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, number);
        }
        offset += line.len();
    }
    parts.push((start_line, &text[start..]));
    parts
}

struct Builder<'t> {
    parser: Parser<'t, StrInput<'t>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    line_offset: usize,
    peeked: Option<(Event<'t>, Span)>,
}

impl<'t> Builder<'t> {
    fn next(&mut self) -> Result<Option<(Event<'t>, Span)>, SyntaxError> {
        if let Some(event) = self.peeked.take() {
            return Ok(Some(event));
        }
        self.parser.next().transpose().map_err(|e| scan_error(&e))
    }

    fn documents(&mut self, out: &mut Vec<Node>) -> Result<(), SyntaxError> {
        while let Some((event, _)) = self.next()? {
            if !matches!(event, Event::DocumentStart(..)) {
                continue;
            }
            self.anchors.clear();
            let Some((event, span)) = self.next()? else { break };
            let node = self.node(event, span, 0)?;
            if !node.is_null() {
                out.push(node);
            }
        }
        Ok(())
    }

    fn node(&mut self, event: Event<'t>, span: Span, depth: usize) -> Result<Node, SyntaxError> {
        self.count(1, &span.start)?;
        if depth > MAX_DEPTH {
            return Err(error(&span.start, "nested too deeply"));
        }
        let (data, anchor) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let tagged_text = tag.is_some_and(|t| t.is_yaml_core_schema_tag("str"));
                let plain = style == ScalarStyle::Plain && !tagged_text;
                (Data::Scalar { text: text.into_owned(), plain }, anchor)
            }
            Event::SequenceStart(_, anchor, _) => (Data::List(self.list(depth)?), anchor),
            Event::MappingStart(_, anchor, _) => (Data::Map(self.map(depth)?), anchor),
            Event::Alias(id) => {
                let known = self.anchors.get(&id).cloned();
                let node = known.ok_or_else(|| error(&span.start, "an alias of something that does not exist"))?;
                self.count(size(&node), &span.start)?;
                return Ok(node);
            }
            _ => return Err(error(&span.start, "a value was expected here")),
        };
        let node = Node { line: span.start.line() + self.line_offset, column: span.start.col() + 1, data };
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Node>, SyntaxError> {
        let mut items = Vec::new();
        while let Some((event, span)) = self.next()? {
            if matches!(event, Event::SequenceEnd) {
                break;
            }
            items.push(self.node(event, span, depth + 1)?);
        }
        Ok(items)
    }

    fn map(&mut self, depth: usize) -> Result<Vec<(String, Node)>, SyntaxError> {
        let mut entries: Vec<(String, Node)> = Vec::new();
        let mut merged: Vec<(String, Node)> = Vec::new();
        while let Some((event, span)) = self.next()? {
            if matches!(event, Event::MappingEnd) {
                break;
            }
            let key = self.node(event, span, depth + 1)?;
            let Data::Scalar { text: key, plain } = key.data else {
                return Err(error(&span.start, "a key must be text"));
            };
            let Some((event, value_span)) = self.next()? else { break };
            let value = self.node(event, value_span, depth + 1)?;
            if plain && key == "<<" {
                merge(&mut merged, value).map_err(|reason| error(&span.start, reason))?;
            } else if let Some((_, first)) = entries.iter().find(|(k, _)| *k == key) {
                return Err(error(&span.start, &format!("key {key} stands here twice, first on line {}", first.line)));
            } else {
                entries.push((key, value));
            }
        }
        for (key, value) in merged {
            if entries.iter().all(|(k, _)| *k != key) {
                entries.push((key, value));
            }
        }
        Ok(entries)
    }

    fn count(&mut self, more: usize, at: &Marker) -> Result<(), SyntaxError> {
        self.nodes += more;
        if self.nodes > MAX_NODES {
            Err(error(at, "too many values, aliases counted by what they stand for"))
        } else {
            Ok(())
        }
    }
}

fn merge(merged: &mut Vec<(String, Node)>, value: Node) -> Result<(), &'static str> {
    match value.data {
        Data::Map(entries) => merged.extend(entries),
        Data::List(items) => {
            for item in items {
                let Data::Map(entries) = item.data else { return Err("<< takes a map or a list of maps") };
                merged.extend(entries);
            }
        }
        Data::Scalar { .. } => return Err("<< takes a map or a list of maps"),
    }
    Ok(())
}

fn size(node: &Node) -> usize {
    match &node.data {
        Data::Scalar { .. } => 1,
        Data::List(items) => 1 + items.iter().map(size).sum::<usize>(),
        Data::Map(entries) => 1 + entries.iter().map(|(_, v)| size(v)).sum::<usize>(),
    }
}

fn error(at: &Marker, reason: &str) -> SyntaxError {
    SyntaxError { line: at.line(), column: at.col() + 1, reason: reason.to_owned() }
}

fn scan_error(e: &ScanError) -> SyntaxError {
    let at = e.marker();
    SyntaxError { line: at.line(), column: at.col() + 1, reason: e.info() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_keep_their_lines() {
        let (docs, errors) = parse("# nothing\n---\na: 1\n---\n---\nb:\n- {c: 'x'}\n");
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(docs.len(), 2);
        let c = docs[1].at("b[0].c");
        assert_eq!((c.line, c.column), (7, 7));
        assert_eq!(c.data, Data::Scalar { text: "x".to_owned(), plain: false });
        assert_eq!(docs[1].at("b[0].zz.y").line, 7);
    }

    #[test]
    fn a_broken_document_leaves_the_others() {
        let (docs, errors) = parse("a: 1\n---\nb: [1\n---\nc: 2\n");
        assert_eq!(docs.len(), 2);
        assert_eq!(errors.len(), 1);
        assert!(errors[0].line >= 3, "{errors:?}");
    }

    #[test]
    fn keys_twice_are_refused_and_merges_yield() {
        let (_, errors) = parse("a: 1\na: 2\n");
        assert!(errors[0].reason.contains("twice, first on line 1"), "{errors:?}");
        let (docs, errors) = parse("x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\n");
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!((docs[0].at("y").text("a"), docs[0].at("y").text("b")), (Some("1"), Some("3")));
    }

    #[test]
    fn aliases_cannot_explode() {
        let mut text = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n".to_owned();
        for i in 1..9 {
            let list = vec![format!("*a{}", i - 1); 10].join(",");
            text.push_str(&format!("a{i}: &a{i} [{list}]\n"));
        }
        assert!(parse(&text).1[0].reason.contains("too many"));
    }
}
