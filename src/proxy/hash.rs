//! The hash that consistent balancing chooses a host by.

use std::fmt::Write;
use std::net::IpAddr;
use std::time::Duration;

use http::HeaderValue;
use http::header::COOKIE;
use twox_hash::XxHash64;

use super::head::Head;
use crate::snapshot::action::{HashPolicy, HashSource};
use crate::snapshot::query;

/// A hash, and the cookie that has to be set so that the next request finds the same host.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Hashed {
    pub(super) hash: Option<u64>,
    pub(super) set_cookie: Option<HeaderValue>,
}

/// Hashes a request by the route's policies. `random` makes the value of a new cookie.
pub(super) fn of(policies: &[HashPolicy], head: &Head, client: IpAddr, random: impl Fn() -> u64) -> Hashed {
    let mut all = Hashed::default();
    for policy in policies {
        let one = match &policy.source {
            HashSource::Header(name) => header(head, name),
            HashSource::SourceIp => Some(hash(client.to_string().as_bytes())),
            HashSource::Query(name) => parameter(head.path.as_str(), name).map(|v| hash(v.as_bytes())),
            HashSource::Cookie { name, path, ttl } => match (cookie(head, name), ttl) {
                (Some(value), _) => Some(hash(value.as_bytes())),
                (None, Some(ttl)) => {
                    let value = format!("{:016x}", random());
                    all.set_cookie = set_cookie(name, &value, path, *ttl);
                    Some(hash(value.as_bytes()))
                }
                (None, None) => None,
            },
        };
        if let Some(one) = one {
            all.hash = Some(all.hash.unwrap_or(0).rotate_left(1) ^ one);
            if policy.terminal {
                break;
            }
        }
    }
    all
}

fn hash(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// Several lines are sorted, so that their order plays no part.
fn header(head: &Head, name: &http::HeaderName) -> Option<u64> {
    let mut lines: Vec<&[u8]> = head.headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    match &mut lines[..] {
        [] => None,
        [only] => Some(hash(only)),
        many => {
            many.sort_unstable();
            Some(hash(&many.concat()))
        }
    }
}

fn parameter<'a>(path: &'a str, name: &str) -> Option<&'a str> {
    query(path)
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .find(|(n, _)| *n == name)
        .map(|(_, v)| v)
}

fn cookie<'a>(head: &'a Head, name: &str) -> Option<&'a str> {
    let lines = head.headers.get_all(COOKIE).iter().filter_map(|line| line.to_str().ok());
    let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(n, _)| *n == name).map(|(_, value)| value.trim_matches('"')).filter(|value| !value.is_empty())
}

fn set_cookie(name: &str, value: &str, path: &str, ttl: Duration) -> Option<HeaderValue> {
    let mut text = format!("{name}=\"{value}\"");
    if !ttl.is_zero() {
        write!(text, "; Max-Age={}", ttl.as_secs()).expect("writing to a string cannot fail");
    }
    if !path.is_empty() {
        write!(text, "; Path={path}").expect("writing to a string cannot fail");
    }
    text.push_str("; HttpOnly");
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
mod tests {
    use super::super::head::tests::head;
    use super::*;

    fn policy(source: HashSource, terminal: bool) -> HashPolicy {
        HashPolicy { source, terminal }
    }

    #[test]
    fn sources() {
        let ip = IpAddr::from([10, 0, 0, 1]);
        let request =
            head("GET", "/p?u=alice&u=bob", &[("host", "a"), ("x-user", "alice"), ("cookie", "a=b; s=\"alice\"")]);
        let alice = Some(hash(b"alice"));
        let cookie = |ttl| HashSource::Cookie { name: "s".into(), path: "/".into(), ttl };
        for source in [
            HashSource::Header(http::HeaderName::from_static("x-user")),
            HashSource::Query("u".into()),
            cookie(None),
            cookie(Some(Duration::from_secs(5))),
        ] {
            let hashed = of(&[policy(source.clone(), false)], &request, ip, || 7);
            assert_eq!(hashed, Hashed { hash: alice, set_cookie: None }, "{source:?}");
        }
        assert_eq!(of(&[policy(HashSource::SourceIp, false)], &request, ip, || 7).hash, Some(hash(b"10.0.0.1")));
    }

    #[test]
    fn cookies_are_made_when_they_have_a_lifetime() {
        let request = head("GET", "/", &[("host", "a")]);
        let source = |ttl| HashSource::Cookie { name: "s".into(), path: "/p".into(), ttl };
        let none = of(&[policy(source(None), false)], &request, IpAddr::from([1; 4]), || 7);
        assert_eq!(none, Hashed::default());
        let made = of(&[policy(source(Some(Duration::from_secs(9))), false)], &request, IpAddr::from([1; 4]), || 7);
        assert_eq!(made.hash, Some(hash(b"0000000000000007")));
        assert_eq!(made.set_cookie.unwrap(), "s=\"0000000000000007\"; Max-Age=9; Path=/p; HttpOnly");
    }

    #[test]
    fn policies_combine_until_a_terminal_one() {
        let request = head("GET", "/", &[("host", "a"), ("x", "1")]);
        let ip = IpAddr::from([1; 4]);
        let x = |terminal| policy(HashSource::Header(http::HeaderName::from_static("x")), terminal);
        let absent = policy(HashSource::Query("q".into()), true);
        let both = of(&[absent.clone(), x(false), policy(HashSource::SourceIp, false)], &request, ip, || 7).hash;
        assert_eq!(both, Some(hash(b"1").rotate_left(1) ^ hash(b"1.1.1.1")));
        assert_eq!(of(&[x(true), policy(HashSource::SourceIp, false)], &request, ip, || 7).hash, Some(hash(b"1")));
    }
}
