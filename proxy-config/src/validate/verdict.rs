//! The verdict on one document, for whoever holds no folder: the conformance runner, editors.

use super::{Finding, Weight, fragment, object};
use crate::model::{Reject, Severity};
use crate::yaml::{Node, parse};

/// What would be said to one document by itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Verdict {
    /// What only the kind's schema refuses, unknown fields among it.
    pub schema: Vec<Reject>,
    /// What Istio's own validation refuses.
    pub rules: Vec<Reject>,
    /// What is let pass and deserves a second look.
    pub warnings: Vec<Reject>,
}

impl Verdict {
    fn add(&mut self, resource: &str, finding: Finding) {
        let (list, severity) = match finding.weight {
            Weight::Warning => (&mut self.warnings, Severity::Warning),
            Weight::Unknown | Weight::Schema => (&mut self.schema, Severity::Error),
            Weight::Rule | Weight::Meant => (&mut self.rules, Severity::Error),
        };
        list.push(Reject {
            resource: resource.to_owned(),
            place: Some(format!("{}:{}", finding.place.0, finding.place.1)),
            field: finding.field,
            reason: finding.reason,
            severity,
            code: finding.code,
        });
    }
}

/// The verdict on one object in YAML; places are `line:column`.
///
/// # Errors
/// When the text is no YAML, or not one document with a kind.
pub fn verdict(text: &str) -> Result<Verdict, String> {
    let node = document(text)?;
    let kind = node.text("kind").ok_or("a kind is missing")?.to_owned();
    let mut out = Verdict::default();
    for finding in object(&kind, &node) {
        out.add(&kind, finding);
    }
    Ok(out)
}

/// The verdict on a part of an object, named by its protobuf message (`HTTPRoute`); `None` when the name is not known.
///
/// # Errors
/// When the text is no YAML, or not one document.
pub fn fragment_verdict(message: &str, text: &str) -> Result<Option<Verdict>, String> {
    let node = document(text)?;
    Ok(fragment(message, &node).map(|found| {
        let mut out = Verdict::default();
        for finding in found {
            out.add(message, finding);
        }
        out
    }))
}

fn document(text: &str) -> Result<Node, String> {
    let (mut documents, errors) = parse(text);
    if let Some(e) = errors.first() {
        return Err(format!("{}:{}: {}", e.line, e.column, e.reason));
    }
    if documents.len() == 1 {
        documents.pop().ok_or_else(String::new)
    } else {
        Err("one document is expected".to_owned())
    }
}
