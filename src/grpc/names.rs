//! Addresses of a server's name.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

const HOSTS: &str = "/etc/hosts";

/// Addresses of `host:port`. Literals and the lines of `/etc/hosts` are all that is known here.
pub(super) async fn resolve(address: &str) -> Result<Vec<SocketAddr>, String> {
    let (host, port) = split(address)?;
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, port)]);
    }
    let found = in_hosts(&std::fs::read_to_string(Path::new(HOSTS)).unwrap_or_default(), host);
    if found.is_empty() {
        return Err(format!("{host}: neither an address nor a name in {HOSTS}; other names are not resolved yet"));
    }
    Ok(found.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
}

/// Host and port; a v6 literal stands in brackets.
pub(super) fn split(address: &str) -> Result<(&str, u16), String> {
    let expected = || format!("{address:?}: expected host:port");
    let (host, port) = address.rsplit_once(':').ok_or_else(expected)?;
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if host.is_empty() {
        return Err(expected());
    }
    Ok((host, port.parse().map_err(|_| expected())?))
}

fn in_hosts(text: &str, name: &str) -> Vec<IpAddr> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let ip = words.next()?.parse().ok()?;
            words.any(|word| word.eq_ignore_ascii_case(name)).then_some(ip)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_host_and_a_port() {
        assert_eq!(split("istiod.istio-system.svc:15012").unwrap(), ("istiod.istio-system.svc", 15012));
        assert_eq!(split("[fd00::1]:15012").unwrap(), ("fd00::1", 15012));
        for bad in ["istiod", ":15012", "istiod:", "istiod:99999", ""] {
            assert!(split(bad).unwrap_err().contains("expected host:port"), "{bad}");
        }
    }

    #[test]
    fn hosts_files_have_comments_and_several_names() {
        let text = "# x istiod\n10.0.0.1 web istiod.istio-system.svc # old\nfd00::1\tISTIOD.istio-system.svc\n10.0.0.2 other\n";
        let found = in_hosts(text, "istiod.istio-system.svc");
        assert_eq!(found, ["10.0.0.1".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert!(in_hosts(text, "istiod").is_empty());
    }

    #[tokio::test]
    async fn literals_need_nobody_and_unknown_names_are_told() {
        assert_eq!(resolve("10.0.0.1:15012").await.unwrap(), ["10.0.0.1:15012".parse().unwrap()]);
        assert!(resolve("nowhere.invalid:1").await.unwrap_err().starts_with("nowhere.invalid: neither"));
    }
}
