//! Host names: short names, wildcards and which one is the most specific.

/// Whether the name is `*` or `*suffix`.
pub(super) fn is_wildcard(host: &str) -> bool {
    host.starts_with('*')
}

/// Whether two names, each possibly a wildcard, can mean the same host.
pub(crate) fn matches(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (Some(x), Some(y)) => x.ends_with(y) || y.ends_with(x),
        (Some(suffix), None) => b.ends_with(suffix),
        (None, Some(suffix)) => a.ends_with(suffix),
        (None, None) => a == b,
    }
}

/// Whether every host that `a` means is also meant by `b`.
pub(crate) fn subset_of(a: &str, b: &str) -> bool {
    match (a.strip_prefix('*'), b.strip_prefix('*')) {
        (Some(x), Some(y)) => x.ends_with(y),
        (Some(_), None) => false,
        (None, Some(suffix)) => a.ends_with(suffix),
        (None, None) => a == b,
    }
}

/// A name without a dot is a service of the object's own namespace; everything else is complete as it stands.
pub(crate) fn resolve(host: &str, namespace: &str, domain: &str) -> String {
    if host.is_empty() || host == "*" || host.contains(['.', ':']) {
        return host.to_owned();
    }
    format!("{host}.{namespace}.svc.{domain}")
}

/// `host:port`, with brackets around an IPv6 address.
pub(super) fn with_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// The pattern that names `host` most closely: itself, else the longest wildcard that covers it.
pub(super) fn most_specific<'p>(host: &str, patterns: impl Iterator<Item = &'p str>) -> Option<&'p str> {
    let mut best: Option<&str> = None;
    for pattern in patterns {
        if pattern == host {
            return Some(pattern);
        }
        if is_wildcard(pattern) && subset_of(host, pattern) && best.is_none_or(|b| pattern.len() > b.len()) {
            best = Some(pattern);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards() {
        assert!(matches("*.b.c", "a.b.c") && matches("a.b.c", "*.b.c") && matches("*.c", "*.b.c") && matches("*", "x"));
        assert!(!matches("*.b.c", "b.c") && !matches("a", "b"));
        assert!(subset_of("*.b.c", "*.c") && !subset_of("*.c", "*.b.c") && !subset_of("*.c", "a.c"));
        assert_eq!(most_specific("a.b.c", ["*", "*.c", "*.b.c"].into_iter()), Some("*.b.c"));
        assert_eq!(most_specific("a.b.c", ["*.b.c", "a.b.c"].into_iter()), Some("a.b.c"));
        assert_eq!(most_specific("x", ["*.b"].into_iter()), None);
    }

    #[test]
    fn short_names() {
        assert_eq!(resolve("a", "n", "cluster.local"), "a.n.svc.cluster.local");
        assert_eq!(resolve("a.n", "m", "cluster.local"), "a.n");
        assert_eq!(resolve("*", "m", "cluster.local"), "*");
    }
}
