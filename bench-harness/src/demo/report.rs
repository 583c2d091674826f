//! What was expected, what was seen.

use serde::Serialize;

/// One promise of the mesh, put to the test.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// Section of the report.
    pub group: &'static str,
    /// The promise.
    pub name: &'static str,
    /// What should be seen.
    pub expected: String,
    /// What was seen.
    pub seen: String,
    /// Whether the promise was kept.
    pub held: bool,
}

/// All checks of a run.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// In the order in which they were made.
    pub checks: Vec<Check>,
    /// Figures that are told and not judged.
    pub figures: Vec<(String, String)>,
}

impl Report {
    /// Adds a check and prints it.
    pub fn check(&mut self, group: &'static str, name: &'static str, expected: &str, (held, seen): (bool, String)) {
        if self.checks.last().is_none_or(|last| last.group != group) {
            println!("\n{group}");
        }
        let mark = if held { "ok  " } else { "FAIL" };
        println!("  {mark} {name}\n         expected {expected}\n         seen     {seen}");
        self.checks.push(Check { group, name, expected: expected.to_owned(), seen, held });
    }

    /// Adds a figure and prints it.
    pub fn figure(&mut self, name: &str, value: String) {
        println!("  ---- {name}: {value}");
        self.figures.push((name.to_owned(), value));
    }

    /// Checks that held.
    pub fn held(&self) -> usize {
        self.checks.iter().filter(|c| c.held).count()
    }

    /// Names of the checks that did not hold.
    pub fn failed(&self) -> Vec<&'static str> {
        self.checks.iter().filter(|c| !c.held).map(|c| c.name).collect()
    }
}
