//! What became of the cases of a set.

use std::collections::BTreeMap;

use serde_json::Value;

use super::rules::Rules;

/// A difference between what was recorded and what we did.
#[derive(Debug, Clone)]
pub(super) struct Difference {
    /// Field path (`steps[0].status`).
    pub(super) field: String,
    /// What was recorded.
    pub(super) expected: String,
    /// What we did.
    pub(super) seen: String,
}

impl Difference {
    pub(super) fn new(field: impl Into<String>, expected: impl ToString, seen: impl ToString) -> Self {
        Self { field: field.into(), expected: expected.to_string(), seen: seen.to_string() }
    }
}

/// Counts of a set.
#[derive(Debug, Default)]
pub(super) struct Tally {
    passed: usize,
    excepted: BTreeMap<String, usize>,
    failed: Vec<(String, Vec<Difference>)>,
    /// Not supported and in reach, by reason.
    unsupported: BTreeMap<String, usize>,
    out_of_reach: BTreeMap<String, usize>,
}

impl Tally {
    /// A set whose format the runner does not know: all of it out of reach.
    pub(super) fn unknown_format(index: &Value) -> Self {
        let cases = index["cases"].as_array().map_or(0, Vec::len);
        let sets = index["sets"].as_array().map_or(0, Vec::len);
        let mut tally = Self::default();
        tally.out_of_reach.insert("the runner does not know this format yet".to_owned(), cases.max(sets));
        tally
    }

    /// Judges a case: no difference passes, differences that a rule covers are excepted.
    pub(super) fn judge(&mut self, rules: &Rules, name: &str, content: &Value, differences: Vec<Difference>) {
        if differences.is_empty() {
            self.passed += 1;
            return;
        }
        let mut reasons = Vec::new();
        let mut left = Vec::new();
        for difference in differences {
            match rules.exception(content, &difference) {
                Some(reason) => reasons.push(reason.to_owned()),
                None => left.push(difference),
            }
        }
        match reasons.pop() {
            Some(reason) if left.is_empty() => *self.excepted.entry(reason).or_default() += 1,
            _ => self.failed.push((name.to_owned(), left)),
        }
    }

    /// A case that cannot be run and should.
    pub(super) fn unsupported(&mut self, reason: impl Into<String>) {
        *self.unsupported.entry(reason.into()).or_default() += 1;
    }

    /// Cases that nobody expects yet.
    pub(super) fn out_of_reach(&mut self, reason: impl Into<String>, cases: usize) {
        *self.out_of_reach.entry(reason.into()).or_default() += cases;
    }

    /// Adds another tally's counts.
    pub(super) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        for (mine, theirs) in [
            (&mut self.excepted, other.excepted),
            (&mut self.unsupported, other.unsupported),
            (&mut self.out_of_reach, other.out_of_reach),
        ] {
            for (reason, count) in theirs {
                *mine.entry(reason).or_default() += count;
            }
        }
    }

    /// Prints the set's line, what the rules covered, then the failures; returns how many failed.
    pub(super) fn print(&self, set: &str, most: usize) -> usize {
        let excepted: usize = self.excepted.values().sum();
        let unsupported: usize = self.unsupported.values().sum();
        let outside: usize = self.out_of_reach.values().sum();
        let failed = self.failed.len();
        let reach = self.passed + excepted + failed + unsupported;
        println!(
            "{set}: {} passed, {excepted} excepted, {failed} failed, {} not supported ({reach} in reach)",
            self.passed,
            unsupported + outside
        );
        for (title, reasons) in
            [("excepted", &self.excepted), ("not supported", &self.unsupported), ("out of reach", &self.out_of_reach)]
        {
            for (reason, count) in reasons {
                println!("    {title}: {count} × {reason}");
            }
        }
        for (name, differences) in self.failed.iter().take(most) {
            println!("  FAILED {name}");
            for d in differences.iter().take(12) {
                println!("      {}: expected {}, seen {}", d.field, short(&d.expected), short(&d.seen));
            }
            if differences.len() > 12 {
                println!("      and {} more", differences.len() - 12);
            }
        }
        if failed > most {
            println!("  and {} more failures", failed - most);
        }
        failed
    }
}

fn short(text: &str) -> String {
    const MOST: usize = 300;
    if text.chars().count() <= MOST {
        return text.to_owned();
    }
    let cut: String = text.chars().take(MOST).collect();
    format!("{cut}…")
}
