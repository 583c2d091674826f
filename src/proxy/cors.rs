//! Cross-origin requests: preflights are answered here, other responses get the headers that browsers ask for.

use http::Method;
use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD,
    HeaderMap, HeaderName, HeaderValue, ORIGIN,
};

use super::head::Head;
use super::reply::Reply;
use crate::snapshot::action::Cors;

/// What CORS makes of a request.
pub(super) enum Outcome {
    /// Nothing to do.
    Pass,
    /// The response gets [`on_response`] with this origin.
    Mark(HeaderValue),
    /// The answer to a preflight.
    Answer(Reply),
}

/// Judges a request. A preflight needs an origin that may and the method it asks for; the method itself is left to the
/// browser.
pub(super) fn on_request(cors: &Cors, head: &Head) -> Outcome {
    let Some(origin) = head.headers.get(ORIGIN) else { return Outcome::Pass };
    let allowed = cors.allows(origin.as_bytes());
    let is_preflight = head.method == Method::OPTIONS
        && head.headers.get(ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|method| !method.is_empty());
    match (is_preflight, allowed) {
        (true, true) => Outcome::Answer(preflight(cors, Some(origin))),
        (true, false) if !cors.forward_not_matching_preflights => Outcome::Answer(preflight(cors, None)),
        (_, false) => Outcome::Pass,
        (false, true) => Outcome::Mark(origin.clone()),
    }
}

fn preflight(cors: &Cors, origin: Option<&HeaderValue>) -> Reply {
    let mut reply = Reply::new(200, "cors_response", "");
    let mut add = |name: HeaderName, value: Option<&HeaderValue>| {
        reply.headers.extend(value.map(|value| (name, value.clone())));
    };
    let credentials = HeaderValue::from_static("true");
    if origin.is_some() {
        add(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        add(ACCESS_CONTROL_ALLOW_CREDENTIALS, cors.allow_credentials.then_some(&credentials));
    }
    add(ACCESS_CONTROL_ALLOW_METHODS, cors.allow_methods.as_ref());
    if origin.is_some() {
        add(ACCESS_CONTROL_ALLOW_HEADERS, cors.allow_headers.as_ref());
        add(ACCESS_CONTROL_MAX_AGE, cors.max_age.as_ref());
        add(ACCESS_CONTROL_EXPOSE_HEADERS, cors.expose_headers.as_ref());
    }
    reply.plain = true;
    reply
}

/// Marks a response for an origin that may read it.
pub(super) fn on_response(cors: &Cors, origin: HeaderValue, headers: &mut HeaderMap) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    if cors.allow_credentials {
        headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    }
    if let Some(expose) = &cors.expose_headers {
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, expose.clone());
    }
}

#[cfg(test)]
mod tests {
    use proxy_config::model::StringMatcher;

    use super::super::head::tests::head;
    use super::*;
    use crate::snapshot::StringMatch;

    fn cors(forward: bool) -> Cors {
        Cors {
            origins: Box::new([StringMatch::compile(&StringMatcher::exact("https://good")).unwrap()]),
            allow_methods: Some(HeaderValue::from_static("GET,PUT")),
            allow_headers: None,
            expose_headers: Some(HeaderValue::from_static("x-e")),
            max_age: Some(HeaderValue::from_static("1")),
            allow_credentials: true,
            forward_not_matching_preflights: forward,
        }
    }

    fn shown(cors: &Cors, method: &str, origin: &str, asked: &str) -> String {
        let head = head(method, "/", &[("host", "a"), ("origin", origin), ("access-control-request-method", asked)]);
        match on_request(cors, &head) {
            Outcome::Pass => "pass".to_owned(),
            Outcome::Mark(origin) => format!("mark {}", origin.to_str().unwrap()),
            Outcome::Answer(reply) => {
                let names: Vec<_> = reply.headers.iter().map(|(name, _)| &name.as_str()[15..]).collect();
                names.join(" ")
            }
        }
    }

    #[test]
    fn as_observed() {
        let forwards = cors(true);
        let all = "allow-origin allow-credentials allow-methods max-age expose-headers";
        assert_eq!(shown(&forwards, "OPTIONS", "https://good", "PATCH"), all);
        assert_eq!(shown(&forwards, "OPTIONS", "https://bad", "GET"), "pass");
        assert_eq!(shown(&forwards, "OPTIONS", "https://good", ""), "mark https://good");
        assert_eq!(shown(&forwards, "GET", "https://good", ""), "mark https://good");
        assert_eq!(shown(&forwards, "GET", "HTTPS://GOOD", ""), "pass");
        assert_eq!(shown(&cors(false), "OPTIONS", "https://bad", "GET"), "allow-methods");
        let mut headers = HeaderMap::new();
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("https://backend"));
        on_response(&forwards, HeaderValue::from_static("https://good"), &mut headers);
        assert_eq!((headers.len(), &headers[ACCESS_CONTROL_ALLOW_ORIGIN]), (3, &"https://good".parse().unwrap()));
    }
}
