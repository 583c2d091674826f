//! Trust domain aliases in policy values.

/// The mesh's trust domain followed by its aliases; empty strings never match and never replace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustDomains(Vec<String>);

impl TrustDomains {
    /// The bundle of a mesh.
    pub fn new(domain: &str, aliases: &[String]) -> Self {
        Self(std::iter::once(domain.to_owned()).chain(aliases.iter().cloned()).collect())
    }

    /// Own domain first, then aliases.
    pub fn all(&self) -> &[String] {
        &self.0
    }

    /// `td/ns/N/sa/S` values of a known domain, or of `cluster.local`, stand for the same identity in all domains.
    pub fn expand_principals(&self, values: &[String]) -> Vec<String> {
        values.iter().flat_map(|v| self.expand_principal(v)).collect()
    }

    fn expand_principal(&self, principal: &str) -> Vec<String> {
        let unchanged = || vec![principal.to_owned()];
        let parts: Vec<&str> = principal.split('/').collect();
        if self.0.is_empty() || parts.len() != 5 || parts[0] == "*" {
            return unchanged();
        }
        let named = parts[0];
        if named != "cluster.local" && !self.0.iter().any(|known| pattern_matches(named, known)) {
            return unchanged();
        }
        let rest = parts[1..].join("/");
        let mut out: Vec<String> = Vec::with_capacity(self.0.len());
        for known in &self.0 {
            // A `*suffix` that covers this domain already says so; keeping it avoids a list of equal rules.
            let candidate =
                if covers_by_suffix(named, known) { principal.to_owned() } else { format!("{known}/{rest}") };
            if !out.contains(&candidate) {
                out.push(candidate);
            }
        }
        out
    }

    /// Bare trust domains: a known one stands for all.
    pub fn expand_domains(&self, values: &[String]) -> Vec<String> {
        let mut out: Vec<String> = Vec::new();
        for value in values {
            let group = if self.0.contains(value) { self.0.as_slice() } else { std::slice::from_ref(value) };
            for domain in group {
                if !out.contains(domain) {
                    out.push(domain.clone());
                }
            }
        }
        out
    }
}

/// Equal, or one of them is a `*suffix` or `prefix*` pattern of the other.
fn pattern_matches(named: &str, known: &str) -> bool {
    named == known
        || covers_by_suffix(named, known)
        || covers_by_suffix(known, named)
        || covers_by_prefix(named, known)
        || covers_by_prefix(known, named)
}

fn covers_by_suffix(pattern: &str, domain: &str) -> bool {
    pattern.strip_prefix('*').is_some_and(|suffix| domain.ends_with(suffix))
}

fn covers_by_prefix(pattern: &str, domain: &str) -> bool {
    pattern.strip_suffix('*').is_some_and(|prefix| domain.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(domain: &str, aliases: &[&str]) -> TrustDomains {
        TrustDomains::new(domain, &aliases.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    fn expand(b: &TrustDomains, v: &str) -> Vec<String> {
        b.expand_principals(&[v.to_owned()])
    }

    #[test]
    fn a_known_domain_stands_for_all() {
        let b = bundle("td1", &["cluster.local", "some-td"]);
        assert_eq!(expand(&b, "some-td/ns/a/sa/b"), ["td1/ns/a/sa/b", "cluster.local/ns/a/sa/b", "some-td/ns/a/sa/b"]);
        assert_eq!(expand(&b, "other/ns/a/sa/b"), ["other/ns/a/sa/b"]);
        assert_eq!(expand(&b, "*/ns/a/sa/b"), ["*/ns/a/sa/b"]);
        assert_eq!(expand(&b, "sa/b"), ["sa/b"]);
    }

    #[test]
    fn cluster_local_is_always_an_alias() {
        assert_eq!(expand(&bundle("corp", &[]), "cluster.local/ns/a/sa/b"), ["corp/ns/a/sa/b"]);
    }

    #[test]
    fn a_suffix_pattern_is_kept_for_the_domains_it_covers() {
        let b = bundle("new-td", &["old-td", "some-trustdomain"]);
        assert_eq!(expand(&b, "*-td/ns/a/sa/b"), ["*-td/ns/a/sa/b", "some-trustdomain/ns/a/sa/b"]);
    }

    #[test]
    fn without_a_bundle_nothing_changes() {
        assert_eq!(expand(&TrustDomains::default(), "cluster.local/ns/a/sa/b"), ["cluster.local/ns/a/sa/b"]);
    }
}
