//! What `iptables-save` prints, as far as it concerns us.

use std::collections::BTreeMap;

use super::rules::{Rule, blocks, bodies, is_ours};

/// The rules and chains of one family.
#[derive(Debug, Default)]
pub(super) struct Saved {
    /// Own chains as (table, chain).
    chains: Vec<(String, String)>,
    /// Every rule as (table, chain, match and target in the kernel's words).
    pub(super) rules: Vec<(String, String, String)>,
}

impl Saved {
    pub(super) fn parse(text: &str) -> Self {
        let mut saved = Self::default();
        let mut table = "";
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = name.trim();
            } else if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
                if is_ours(chain) {
                    saved.chains.push((table.to_owned(), chain.to_owned()));
                }
            } else if let Some((chain, rule)) =
                line.strip_prefix("-A ").map(|rest| rest.split_once(' ').unwrap_or((rest, "")))
            {
                saved.rules.push((table.to_owned(), chain.to_owned(), rule.to_owned()));
            }
        }
        saved
    }

    pub(super) fn has_rules(&self) -> bool {
        !self.rules.is_empty()
    }

    pub(super) fn has_our_chains(&self) -> bool {
        !self.chains.is_empty()
    }

    pub(super) fn our_chains(&self) -> Vec<&str> {
        self.chains.iter().map(|(_, chain)| &**chain).collect()
    }

    /// Whether our chains are those of the rules and hold as many rules each.
    pub(super) fn counts_match(&self, wanted: &[Rule]) -> bool {
        let of_rules = |table: &str, chain: &str| {
            wanted.iter().filter(|rule| rule.table.name() == table && rule.chain == chain).count()
        };
        let of_saved =
            |table: &str, chain: &str| self.rules.iter().filter(|(t, c, _)| t == table && c == chain).count();
        let wanted_chains = wanted.iter().filter(|rule| rule.in_own_chain()).map(|r| (r.table.name(), &*r.chain));
        let all_there = wanted_chains.clone().all(|(t, c)| self.chains.iter().any(|(st, sc)| st == t && sc == c));
        all_there && self.chains.iter().all(|(t, c)| of_rules(t, c) == of_saved(t, c) && of_rules(t, c) > 0)
    }
}

/// The text that takes a family from what is there to what is wanted: every jump to our chains, the stray rules and our
/// chains go, the new ones come, nothing else is touched, and each table changes at once.
pub(super) fn transaction(saved: &Saved, stray: &[Rule], wanted: &[Rule]) -> String {
    let new = bodies(wanted);
    let mut both = BTreeMap::new();
    for table in ["filter", "mangle", "nat", "raw", "security"] {
        let lines = removal(saved, stray, table) + new.get(table).map_or("", String::as_str);
        if !lines.is_empty() {
            both.insert(table, lines);
        }
    }
    blocks(&both)
}

fn removal(saved: &Saved, stray: &[Rule], table: &str) -> String {
    let mut lines = String::new();
    for (_, chain, rule) in saved.rules.iter().filter(|(t, chain, _)| t == table && !is_ours(chain)) {
        if jumps_to_us(rule) {
            lines.push_str(&format!("-D {chain} {rule}\n"));
        }
    }
    for rule in stray.iter().filter(|rule| rule.table.name() == table) {
        lines.push_str(&format!("-D {} {}\n", rule.chain, rule.args.join(" ")));
    }
    // All are emptied before one is deleted: they jump to each other.
    for flag in ["-F", "-X"] {
        for (_, chain) in saved.chains.iter().filter(|(t, _)| t == table) {
            lines.push_str(&format!("{flag} {chain}\n"));
        }
    }
    lines
}

fn jumps_to_us(rule: &str) -> bool {
    let mut words = rule.split_ascii_whitespace().skip_while(|word| !matches!(*word, "-j" | "-g"));
    words.nth(1).is_some_and(is_ours)
}

#[cfg(test)]
mod tests {
    use super::super::rules::{Family, Table, rules};
    use super::super::settings::Settings;
    use super::*;

    const SAVED: &str = "# Generated\n*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:ISTIO_OUTPUT - [0:0]\n\
        :DOCKER - [0:0]\n-A PREROUTING -p tcp -j DOCKER\n-A OUTPUT -j ISTIO_OUTPUT\n\
        -A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n";

    #[test]
    fn only_ours_is_removed() {
        let expected = "* nat\n-D OUTPUT -j ISTIO_OUTPUT\n-F ISTIO_OUTPUT\n-X ISTIO_OUTPUT\nCOMMIT\n";
        assert_eq!(transaction(&Saved::parse(SAVED), &[], &[]), expected);
        assert_eq!(transaction(&Saved::parse("*nat\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"), &[], &[]), "");
    }

    #[test]
    fn a_stray_rule_goes_with_the_chains() {
        let args = vec!["-i".to_owned(), "eth7".to_owned(), "-j".to_owned(), "RETURN".to_owned()];
        let stray = Rule { table: Table::Nat, chain: "PREROUTING".to_owned(), position: None, args };
        assert!(transaction(&Saved::parse(SAVED), &[stray], &[]).contains("-D PREROUTING -i eth7 -j RETURN\n"));
    }

    #[test]
    fn counts_tell_other_rules() {
        let wanted = rules(&Settings::default(), Family::V4);
        assert!(!Saved::parse(SAVED).counts_match(&wanted));
        let mut text = "*nat\n".to_owned();
        for chain in ["ISTIO_INBOUND", "ISTIO_REDIRECT", "ISTIO_IN_REDIRECT", "ISTIO_OUTPUT"] {
            text.push_str(&format!(":{chain} - [0:0]\n"));
        }
        for rule in &wanted {
            text.push_str(&format!("-A {} {}\n", rule.chain, rule.args.join(" ")));
        }
        assert!(Saved::parse(&text).counts_match(&wanted));
        assert!(!Saved::parse(&text.replace(":ISTIO_OUTPUT", ":ISTIO_OTHER")).counts_match(&wanted));
    }
}
