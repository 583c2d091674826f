//! A call with the answer that istiod's own simulator gave.

use std::path::Path;

use serde_json::{Value, json};

use super::Bench;
use super::explain::{self, From};
use super::tally::{Difference, Tally};

/// One call with what is expected of it, in the words of `explain`.
pub(super) struct Question {
    /// Name for messages.
    pub(super) name: String,
    /// What is asked.
    pub(super) call: Value,
    /// What must be answered; an absent field is not checked.
    pub(super) expect: Value,
    /// Absent fields must be absent.
    pub(super) strict: bool,
}

/// Asks all questions of one node and judges each as a case. `content` is what rules may look at.
pub(super) fn judge(
    bench: &Bench<'_>,
    (name, content): (&str, &Value),
    from: &From<'_>,
    node: &Path,
    questions: &[Question],
) -> Tally {
    let mut tally = Tally::default();
    if questions.is_empty() {
        return tally;
    }
    let calls: Vec<Value> = questions.iter().map(|q| q.call.clone()).collect();
    let answers = match explain::ask(bench.proxy, from, node, &calls) {
        Ok(answers) => answers,
        Err(error) => {
            for question in questions {
                let difference = Difference::new("explain", "an answer", format!("{error:#}"));
                let content = json!({"case": content, "call": question.call});
                tally.judge(bench.rules, &format!("{name} {}", question.name), &content, vec![difference]);
            }
            return tally;
        }
    };
    for (question, answer) in questions.iter().zip(&answers) {
        let content = json!({"case": content, "call": question.call, "expect": question.expect});
        let name = format!("{name} {}", question.name);
        tally.judge(bench.rules, &name, &content, differences(question, answer));
    }
    tally
}

/// Fields of an answer.
const FIELDS: [&str; 7] = ["error", "listener", "filterChain", "routeConfig", "virtualHost", "route", "cluster"];

fn differences(question: &Question, answer: &Value) -> Vec<Difference> {
    let text = |of: &Value, field: &str| of[field].as_str().unwrap_or_default().to_owned();
    let mut out = Vec::new();
    let error = text(&question.expect, "error");
    if error != text(answer, "error") {
        out.push(Difference::new("error", format!("{error:?}"), format!("{:?}", text(answer, "error"))));
        return out;
    }
    // After an error nothing else is promised.
    if !error.is_empty() {
        return out;
    }
    for field in FIELDS {
        let expected = text(&question.expect, field);
        let seen = text(answer, field);
        let checked = question.expect.get(field).is_some() || question.strict;
        if checked && expected != seen && !is_one_of(answer, field, &expected) {
            out.push(Difference::new(field, format!("{expected:?}"), format!("{seen:?}")));
        }
    }
    out
}

/// The simulator names one of the weighted clusters; ours draws another one as well.
fn is_one_of(answer: &Value, field: &str, expected: &str) -> bool {
    let weighted = answer["clusters"].as_array().map_or(&[][..], Vec::as_slice);
    field == "cluster" && weighted.iter().any(|c| c["name"] == expected || c["cluster"] == expected)
}
