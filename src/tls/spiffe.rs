//! SPIFFE identities: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.

use std::fmt;
use std::str::FromStr;

const SCHEME: &str = "spiffe://";
/// Longest identity that the SPIFFE standard lets implementations rely on.
const MAX_LENGTH: usize = 2048;

/// A SPIFFE identity, kept as it was written: comparison is by bytes, as Envoy compares.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: Box<str>,
    /// Where the path begins in `text`.
    path: usize,
}

impl SpiffeId {
    /// The identity of a Kubernetes service account.
    pub fn of_service_account(trust_domain: &str, namespace: &str, account: &str) -> Result<Self, String> {
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{account}").parse()
    }

    /// `cluster.local`
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.path]
    }

    /// The path with its leading slash; may be empty.
    pub fn path(&self) -> &str {
        &self.text[self.path..]
    }

    /// Namespace, if the path is Istio's.
    pub fn namespace(&self) -> Option<&str> {
        self.istio_path().map(|(namespace, _)| namespace)
    }

    /// Service account, if the path is Istio's.
    pub fn service_account(&self) -> Option<&str> {
        self.istio_path().map(|(_, account)| account)
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    fn istio_path(&self) -> Option<(&str, &str)> {
        let (namespace, account) = self.path().strip_prefix("/ns/")?.split_once("/sa/")?;
        let plain = |segment: &str| !segment.is_empty() && !segment.contains('/');
        (plain(namespace) && plain(account)).then_some((namespace, account))
    }
}

impl FromStr for SpiffeId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = |why: &str| Err(format!("{text:?} is not a SPIFFE identity: {why}"));
        let Some(rest) = text.strip_prefix(SCHEME) else { return bad("it does not begin with spiffe://") };
        if text.len() > MAX_LENGTH {
            return bad("it is longer than 2048 bytes");
        }
        let domain = rest.split('/').next().unwrap_or_default();
        if domain.is_empty() || !domain.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) {
            return bad("the trust domain is empty or has other characters than letters, digits, '.', '_', '-'");
        }
        let path = &rest[domain.len()..];
        if !path.bytes().all(|b| b.is_ascii_graphic() && !b"?#".contains(&b)) {
            return bad("the path has a query, a fragment, blanks or characters beyond ASCII");
        }
        if path.split('/').skip(1).any(|segment| matches!(segment, "" | "." | "..")) {
            return bad("the path has empty or dot segments");
        }
        Ok(Self { text: text.into(), path: SCHEME.len() + domain.len() })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn parts_of_an_istio_identity() {
        let id: SpiffeId = "spiffe://cluster.local/ns/payments/sa/payment-service-sa".parse().unwrap();
        assert_eq!((id.trust_domain(), id.namespace()), ("cluster.local", Some("payments")));
        assert_eq!(id.service_account(), Some("payment-service-sa"));
    }

    #[test]
    fn other_paths_are_identities_without_account() {
        for text in ["spiffe://td", "spiffe://td/x", "spiffe://td/ns/a/sa/b/c", "spiffe://td/ns/a", "spiffe://td/sa/b"]
        {
            let id: SpiffeId = text.parse().unwrap();
            assert_eq!((id.namespace(), id.service_account()), (None, None), "{text}");
        }
    }

    #[test]
    fn what_is_no_identity() {
        for text in [
            "",
            "spiffe://",
            "spiffe:///ns/a/sa/b",
            "SPIFFE://td/x",
            "https://td/x",
            "spiffe://td:80/x",
            "spiffe://u@td/x",
            "spiffe://td/a//b",
            "spiffe://td/",
            "spiffe://td/../x",
            "spiffe://td/x?y",
            "spiffe://td/x#y",
            "spiffe://td/\u{e4}",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,60}") {
            let _ = text.parse::<SpiffeId>();
            let _ = format!("{SCHEME}{text}").parse::<SpiffeId>();
        }

        #[test]
        fn printing_and_parsing_is_the_identity(
            td in "[a-zA-Z0-9._-]{1,20}", ns in "[a-z0-9-]{1,20}", sa in "[a-z0-9.-]{0,18}[a-z]",
        ) {
            let id = SpiffeId::of_service_account(&td, &ns, &sa).unwrap();
            prop_assert_eq!(id.to_string().parse::<SpiffeId>().unwrap(), id.clone());
            prop_assert_eq!((id.trust_domain(), id.namespace(), id.service_account()), (&*td, Some(&*ns), Some(&*sa)));
        }
    }
}
