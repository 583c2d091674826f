//! A request's head as we work on it: pseudo-headers apart from headers, checked before anything looks at it.

use http::header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::request::Parts;
use http::uri::{PathAndQuery, Scheme};
use http::{Extensions, HeaderMap, HeaderValue, Method, Version};

use crate::snapshot::RequestView;

/// A request without its body.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) method: Method,
    pub(super) version: Version,
    /// What `:scheme` says or will say.
    pub(super) scheme: Scheme,
    /// `:authority` or `Host`; visible ASCII, may be empty.
    pub(super) authority: HeaderValue,
    /// Path with query, never a fragment.
    pub(super) path: PathAndQuery,
    /// Without `Host`.
    pub(super) headers: HeaderMap,
    pub(super) extensions: Extensions,
}

/// Why a head is refused before routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Malformed {
    /// 400 `http1.codec_error`.
    Codec,
    /// 400 `http1.invalid_url`.
    Url,
    /// 400 `http.invalid_authority`.
    Authority,
    /// 400 `missing_host_header`, no body.
    NoHost,
    /// 404 `absolute_path_rejected`, no body.
    Asterisk,
    /// 404 `route_not_found`, no body.
    Connect,
    /// 426 `low_version`.
    Version,
    /// 501 `http1.invalid_transfer_encoding`.
    TransferEncoding,
    /// 400 `query_missing_content_type`.
    QueryContentType,
    /// 400 `http1.unexpected_underscore`.
    Underscore,
}

/// Where the connection stands in what a head may say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Accepts<'a> {
    /// HTTP/1.0 is served.
    pub(super) http_10: bool,
    /// The connection is TLS.
    pub(super) tls: bool,
    /// Host of an HTTP/1.0 request without one.
    pub(super) default_host: &'a HeaderValue,
}

impl Head {
    /// Takes a head apart. A refused one comes back as far as it was understood, for the log.
    pub(super) fn new(parts: Parts, accepts: Accepts<'_>) -> (Self, Result<(), Malformed>) {
        let uri = parts.uri.into_parts();
        let has_path = uri.path_and_query.is_some();
        let mut headers = parts.headers;
        let hosts = headers.get_all(HOST).iter().count();
        let host = if hosts > 0 { headers.remove(HOST) } else { None };
        let said = uri.authority.as_ref().and_then(|a| HeaderValue::from_str(a.as_str()).ok());
        let has_host = said.is_some() || host.is_some();
        let mut head = Self {
            method: parts.method,
            version: parts.version,
            scheme: Scheme::HTTP,
            authority: said.or(host).unwrap_or(HeaderValue::from_static("")),
            path: uri.path_and_query.map_or(PathAndQuery::from_static("/"), |path| rooted(path, parts.version)),
            headers,
            extensions: parts.extensions,
        };
        head.scheme = head.scheme_for(uri.scheme, accepts.tls);
        let mut checked = head.check(hosts, (has_host, has_path), accepts);
        if checked == Err(Malformed::NoHost) && head.version == Version::HTTP_10 {
            head.authority = accepts.default_host.clone();
            checked = Ok(());
        }
        (head, checked)
    }

    /// An HTTP/2 client names its scheme; for HTTP/1 the proxy in front or the connection does.
    fn scheme_for(&self, said: Option<Scheme>, tls: bool) -> Scheme {
        if let (Version::HTTP_2, Some(said)) = (self.version, said) {
            return said;
        }
        match self.headers.get("x-forwarded-proto").map(HeaderValue::as_bytes) {
            Some(b"https") => Scheme::HTTPS,
            Some(b"http") => Scheme::HTTP,
            _ if tls => Scheme::HTTPS,
            _ => Scheme::HTTP,
        }
    }

    fn check(&self, hosts: usize, (has_host, has_path): (bool, bool), accepts: Accepts<'_>) -> Result<(), Malformed> {
        let is_http2 = self.version == Version::HTTP_2;
        if self.version < Version::HTTP_11 && !accepts.http_10 {
            return Err(Malformed::Version);
        }
        if !is_http2
            && (!is_known(&self.method) || hosts > 1 || self.headers.get_all(CONTENT_LENGTH).iter().count() > 1)
        {
            return Err(Malformed::Codec);
        }
        if let Some(coding) = self.headers.get(TRANSFER_ENCODING) {
            let only = self.headers.get_all(TRANSFER_ENCODING).iter().count() == 1;
            if !only || !coding.as_bytes().eq_ignore_ascii_case(b"chunked") {
                return Err(Malformed::TransferEncoding);
            }
        }
        if self.method == Method::CONNECT {
            return Err(if has_path { Malformed::Url } else { Malformed::Connect });
        }
        if !has_path {
            return Err(Malformed::Url);
        }
        if self.path.as_str() == "*" {
            return Err(if self.method == Method::OPTIONS { Malformed::Asterisk } else { Malformed::Url });
        }
        if !self.path.as_str().starts_with('/') {
            return Err(Malformed::Asterisk);
        }
        if !self.path.as_str().is_ascii() {
            return Err(Malformed::Codec);
        }
        if !has_host {
            return Err(Malformed::NoHost);
        }
        if !self.authority.as_bytes().iter().all(|b| is_authority(*b)) {
            return Err(Malformed::Authority);
        }
        if self.method.as_str() == "QUERY" && !self.headers.contains_key(http::header::CONTENT_TYPE) {
            return Err(Malformed::QueryContentType);
        }
        Ok(())
    }

    /// The authority as text.
    pub(super) fn authority(&self) -> &str {
        self.authority.to_str().unwrap_or_default()
    }

    /// As the pure functions see it.
    pub(super) fn view(&self) -> RequestView<'_> {
        RequestView {
            method: &self.method,
            scheme: self.scheme.as_str(),
            authority: self.authority(),
            path: self.path.as_str(),
            headers: &self.headers,
        }
    }

    /// Whether the client speaks gRPC, and so wants its errors as trailers.
    pub(super) fn is_grpc(&self) -> bool {
        is_grpc(&self.headers)
    }
}

/// `http://host?query` asks for the root. The slash is written when the request goes upstream, so policy has to see it;
/// in HTTP/2 such a path is malformed and stays as it is, to be refused.
fn rooted(path: PathAndQuery, version: Version) -> PathAndQuery {
    if version == Version::HTTP_2 || !path.as_str().starts_with('?') {
        return path;
    }
    PathAndQuery::try_from(format!("/{}", path.as_str())).unwrap_or(path)
}

/// `application/grpc` or `application/grpc+…`, not `application/grpc-web`.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(http::header::CONTENT_TYPE) else { return false };
    match kind.as_bytes().strip_prefix(b"application/grpc") {
        Some(rest) => matches!(rest.first(), None | Some(b'+')),
        None => false,
    }
}

/// Characters of a host with port and user information.
fn is_authority(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@[]%".contains(&byte)
}

/// Methods of the HTTP/1 parser that mesh peers run; others are 400 there, before any policy, and so they are here.
fn is_known(method: &Method) -> bool {
    const KNOWN: [&str; 36] = [
        "GET",
        "HEAD",
        "POST",
        "PUT",
        "DELETE",
        "CONNECT",
        "OPTIONS",
        "TRACE",
        "PATCH",
        "COPY",
        "LOCK",
        "MKCOL",
        "MOVE",
        "PROPFIND",
        "PROPPATCH",
        "SEARCH",
        "UNLOCK",
        "BIND",
        "REBIND",
        "UNBIND",
        "ACL",
        "REPORT",
        "MKACTIVITY",
        "CHECKOUT",
        "MERGE",
        "M-SEARCH",
        "NOTIFY",
        "SUBSCRIBE",
        "UNSUBSCRIBE",
        "PURGE",
        "MKCALENDAR",
        "LINK",
        "UNLINK",
        "SOURCE",
        "QUERY",
        "PRI",
    ];
    KNOWN.contains(&method.as_str())
}

#[cfg(test)]
pub(super) mod tests {
    use http::Request;

    use super::*;

    pub(crate) fn head(method: &str, uri: &str, headers: &[(&str, &str)]) -> Head {
        parse(method, uri, Version::HTTP_11, headers).0
    }

    fn parse(method: &str, uri: &str, version: Version, headers: &[(&str, &str)]) -> (Head, Result<(), Malformed>) {
        let mut request = Request::builder().method(method).uri(uri).version(version);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let host = HeaderValue::from_static("fallback");
        let accepts = Accepts { http_10: version == Version::HTTP_10, tls: false, default_host: &host };
        Head::new(request.body(()).unwrap().into_parts().0, accepts)
    }

    #[test]
    fn refusals_as_observed() {
        use Malformed::{Asterisk, Authority, Codec, Connect, NoHost, QueryContentType, TransferEncoding, Url};
        for (method, uri, headers, expected) in [
            ("GET", "/", &[("host", "a")][..], Ok(())),
            ("GET", "/", &[("host", "")], Ok(())),
            ("GET", "/", &[("host", "u:p@a")], Ok(())),
            ("GET", "http://b/x", &[("host", "a")], Ok(())),
            ("PURGE", "/", &[("host", "a")], Ok(())),
            ("POST", "/", &[("host", "a"), ("transfer-encoding", "Chunked")], Ok(())),
            ("GET", "/", &[], Err(NoHost)),
            ("GET", "/", &[("host", "a"), ("host", "a")], Err(Codec)),
            ("get", "/", &[("host", "a")], Err(Codec)),
            ("FOO", "/", &[("host", "a")], Err(Codec)),
            ("POST", "/", &[("host", "a"), ("content-length", "1"), ("content-length", "1")], Err(Codec)),
            ("POST", "/", &[("host", "a"), ("transfer-encoding", "gzip, chunked")], Err(TransferEncoding)),
            ("GET", "/", &[("host", "a b")], Err(Authority)),
            ("GET", "/", &[("host", "a/b")], Err(Authority)),
            ("GET", "*", &[("host", "a")], Err(Url)),
            ("OPTIONS", "*", &[("host", "a")], Err(Asterisk)),
            ("GET", "admin", &[("host", "a")], Err(Url)),
            ("CONNECT", "a:443", &[("host", "a:443")], Err(Connect)),
            ("CONNECT", "/x", &[("host", "a:443")], Err(Url)),
            ("QUERY", "/", &[("host", "a")], Err(QueryContentType)),
        ] {
            let (_, checked) = parse(method, uri, Version::HTTP_11, headers);
            assert_eq!(checked, expected, "{method} {uri} {headers:?}");
        }
        assert_eq!(parse("GET", "/", Version::HTTP_2, &[("host", "a"), ("x", "y")]).1, Ok(()));
        assert_eq!(parse("g", "/", Version::HTTP_2, &[("host", "a")]).1, Ok(()));
        let unrooted = parse("GET", "http://a?x", Version::HTTP_2, &[]).1;
        assert_eq!(unrooted, Err(Asterisk), "policy would see no path");
    }

    #[test]
    fn hosts_and_schemes() {
        let absolute = head("GET", "https://b:1/x?y", &[("host", "a")]);
        assert_eq!((absolute.authority(), absolute.path.as_str(), absolute.scheme.as_str()), ("b:1", "/x?y", "http"));
        assert!(absolute.headers.get(HOST).is_none());
        assert_eq!(head("GET", "http://b", &[]).path, "/");
        assert_eq!(head("GET", "http://b?x", &[]).path.as_str(), "/?x", "as the upstream will see it");
        assert_eq!(head("GET", "/", &[("host", "a"), ("x-forwarded-proto", "https")]).scheme, Scheme::HTTPS);
        assert_eq!(head("GET", "/", &[("host", "a"), ("x-forwarded-proto", "gopher")]).scheme, Scheme::HTTP);
        let (old, checked) = parse("GET", "/", Version::HTTP_10, &[]);
        assert_eq!((old.authority(), checked), ("fallback", Ok(())));
    }

    #[test]
    fn grpc_is_told_by_its_content_type() {
        for (kind, expected) in [
            ("application/grpc", true),
            ("application/grpc+proto", true),
            ("application/grpc-web", false),
            ("a", false),
        ] {
            assert_eq!(head("POST", "/", &[("content-type", kind)]).is_grpc(), expected, "{kind}");
        }
    }
}
