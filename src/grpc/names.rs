//! Addresses of a server's name.

use std::net::SocketAddr;

use crate::dns::{Family, Resolver};

/// Addresses of `host:port`, asked for now: a control plane moves.
pub(super) async fn resolve(address: &str) -> Result<Vec<SocketAddr>, String> {
    let (host, port) = split(address)?;
    let answer = Resolver::system().addresses(host, Family::All).await.map_err(|e| e.to_string())?;
    if answer.addresses.is_empty() {
        return Err(format!("{host} has no address"));
    }
    Ok(answer.addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
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

    #[tokio::test]
    async fn literals_need_nobody() {
        assert_eq!(resolve("10.0.0.1:15012").await.unwrap(), ["10.0.0.1:15012".parse().unwrap()]);
        assert_eq!(resolve("[::1]:15012").await.unwrap(), ["[::1]:15012".parse().unwrap()]);
    }
}
