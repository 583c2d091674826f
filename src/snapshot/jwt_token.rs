//! A token taken apart, and why one does not count. Texts are Envoy's: they reach clients and logs.

use std::borrow::Cow;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value};

/// Base64url with or without padding. Loose bits at the end are let be: the signature covers the text, not the bytes.
const BASE64URL: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true),
);

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denied {
    /// There is no token.
    Missing,
    /// `nbf` lies ahead.
    NotYetValid,
    /// `exp` has passed.
    Expired,
    /// Not three parts with two dots.
    Format,
    /// The header is no base64url.
    HeaderBase64,
    /// The header is no JSON object.
    HeaderJson,
    /// No `alg`, or it is no text.
    NoAlgorithm,
    /// An `alg` that nobody serves; `none` is one.
    Algorithm,
    /// `kid` is no text.
    KeyId,
    /// The payload is no base64url.
    PayloadBase64,
    /// The payload is no JSON object.
    PayloadJson,
    /// A claim that must be text is something else.
    NotText(&'static str),
    /// A time that is no number.
    NotInteger(&'static str),
    /// A time that is negative or too large.
    OutOfRange(&'static str),
    /// `aud` is neither text nor a list of texts.
    AudienceType,
    /// The signature is no base64url.
    SignatureBase64,
    /// An Ed25519 signature of another length.
    SignatureLength,
    /// The provider has another issuer.
    Issuer,
    /// None of the audiences is accepted.
    Audience,
    /// No key made this signature.
    Signature,
    /// No key has the token's `kid` and `alg`.
    NoSuchKey,
    /// The provider has no key at all.
    NoKeys,
    /// The provider's keys did not come.
    NotFetched,
}

impl Denied {
    /// What the client reads.
    pub fn text(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::Missing => "Jwt is missing",
            Self::NotYetValid => "Jwt not yet valid",
            Self::Expired => "Jwt is expired",
            Self::Format => "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections",
            Self::HeaderBase64 => "Jwt header is an invalid Base64url encoded",
            Self::HeaderJson => "Jwt header is an invalid JSON",
            Self::NoAlgorithm => "Jwt header [alg] field is required and must be a string",
            Self::Algorithm => "Jwt header [alg] is not supported",
            Self::KeyId => "Jwt header [kid] field is not a string",
            Self::PayloadBase64 => "Jwt payload is an invalid Base64url encoded",
            Self::PayloadJson => "Jwt payload is an invalid JSON",
            Self::NotText(claim) => return format!("Jwt payload [{claim}] field is not a string").into(),
            Self::NotInteger(claim) => return format!("Jwt payload [{claim}] field is not an integer").into(),
            Self::OutOfRange(claim) => {
                return format!("Jwt payload [{claim}] field is not a positive 64 bit integer").into();
            }
            Self::AudienceType => "Jwt payload [aud] field is not a string or string list",
            Self::SignatureBase64 => "Jwt signature is an invalid Base64url encoded",
            Self::SignatureLength => "Jwt ED25519 signature is wrong length",
            Self::Issuer => "Jwt issuer is not configured",
            Self::Audience => "Audiences in Jwt are not allowed",
            Self::Signature => "Jwt verification fails",
            Self::NoSuchKey => "Jwks doesn't have key to match kid or alg from Jwt",
            Self::NoKeys => "Jwks doesn't have any valid public key",
            Self::NotFetched => "Jwks remote fetch is failed",
        })
    }

    /// `%RESPONSE_CODE_DETAILS%`
    pub fn details(self) -> String {
        format!("jwt_authn_access_denied{{{}}}", self.text().replace(' ', "_"))
    }

    /// A token for others is 403, everything else 401.
    pub fn status(self) -> u16 {
        if self == Self::Audience { 403 } else { 401 }
    }
}

/// Signature algorithms that are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Algorithm {
    Es256,
    Es384,
    Es512,
    Hs256,
    Hs384,
    Hs512,
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Ps384,
    Ps512,
    EdDsa,
}

impl Algorithm {
    const ALL: [(&str, Self); 13] = [
        ("ES256", Self::Es256),
        ("ES384", Self::Es384),
        ("ES512", Self::Es512),
        ("HS256", Self::Hs256),
        ("HS384", Self::Hs384),
        ("HS512", Self::Hs512),
        ("RS256", Self::Rs256),
        ("RS384", Self::Rs384),
        ("RS512", Self::Rs512),
        ("PS256", Self::Ps256),
        ("PS384", Self::Ps384),
        ("PS512", Self::Ps512),
        ("EdDSA", Self::EdDsa),
    ];

    fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, algorithm)| *algorithm)
    }

    /// As a header writes it.
    pub(super) fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, algorithm)| *algorithm == self).map_or("", |(name, _)| name)
    }
}

/// A token whose parts are sound. Nothing in it is true before its signature is.
#[derive(Debug)]
pub(super) struct Token<'t> {
    pub(super) algorithm: Algorithm,
    /// Empty: none.
    pub(super) kid: String,
    pub(super) payload: Map<String, Value>,
    /// As sent.
    pub(super) payload_text: &'t str,
    /// What is signed.
    pub(super) signed: &'t str,
    pub(super) signature: Vec<u8>,
    pub(super) not_before: u64,
    /// `None`: it never expires.
    pub(super) expires: Option<u64>,
}

impl<'t> Token<'t> {
    /// Takes a token apart. Exactly three parts: RFC 7515 §7.1.
    pub(super) fn parse(text: &'t str) -> Result<Self, Denied> {
        let mut parts = text.split('.');
        let (Some(header), Some(body), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Denied::Format);
        };
        if header.is_empty() || body.is_empty() || signature.is_empty() {
            return Err(Denied::Format);
        }
        let (algorithm, kid) = read_header(header)?;
        let bytes = BASE64URL.decode(body).map_err(|_| Denied::PayloadBase64)?;
        let payload: Map<String, Value> = serde_json::from_slice(&bytes).map_err(|_| Denied::PayloadJson)?;
        text_claim(&payload, "iss")?;
        text_claim(&payload, "sub")?;
        seconds(&payload, "iat")?;
        let not_before = seconds(&payload, "nbf")?.unwrap_or(0);
        let expires = seconds(&payload, "exp")?;
        text_claim(&payload, "jti")?;
        if audiences(&payload).any(|audience| audience.is_none()) {
            return Err(Denied::AudienceType);
        }
        let signature = BASE64URL.decode(signature).map_err(|_| Denied::SignatureBase64)?;
        let signed = &text[..header.len() + 1 + body.len()];
        Ok(Self { algorithm, kid, payload, payload_text: body, signed, signature, not_before, expires })
    }

    /// `iss`; empty: none.
    pub(super) fn issuer(&self) -> &str {
        self.payload.get("iss").and_then(Value::as_str).unwrap_or_default()
    }

    /// `aud`, one or many.
    pub(super) fn audiences(&self) -> impl Iterator<Item = &str> {
        audiences(&self.payload).flatten()
    }
}

fn read_header(text: &str) -> Result<(Algorithm, String), Denied> {
    let bytes = BASE64URL.decode(text).map_err(|_| Denied::HeaderBase64)?;
    let header: Map<String, Value> = serde_json::from_slice(&bytes).map_err(|_| Denied::HeaderJson)?;
    let name = header.get("alg").and_then(Value::as_str).ok_or(Denied::NoAlgorithm)?;
    let algorithm = Algorithm::named(name).ok_or(Denied::Algorithm)?;
    let kid = match header.get("kid") {
        None => String::new(),
        Some(Value::String(kid)) => kid.clone(),
        Some(_) => return Err(Denied::KeyId),
    };
    Ok((algorithm, kid))
}

fn text_claim(payload: &Map<String, Value>, claim: &'static str) -> Result<(), Denied> {
    if payload.get(claim).is_some_and(|value| !value.is_string()) { Err(Denied::NotText(claim)) } else { Ok(()) }
}

/// A time in seconds since 1970; fractions are cut off.
fn seconds(payload: &Map<String, Value>, claim: &'static str) -> Result<Option<u64>, Denied> {
    /// 2^64, the first number that is too large.
    const LIMIT: f64 = 18_446_744_073_709_551_616.0;
    let Some(value) = payload.get(claim) else { return Ok(None) };
    if let Some(whole) = value.as_u64() {
        return Ok(Some(whole));
    }
    let number = value.as_f64().ok_or(Denied::NotInteger(claim))?;
    if !(0.0..LIMIT).contains(&number) {
        return Err(Denied::OutOfRange(claim));
    }
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range was checked")]
    Ok(Some(number as u64))
}

/// `None` stands for what is no text.
fn audiences(payload: &Map<String, Value>) -> impl Iterator<Item = Option<&str>> {
    let said = payload.get("aud");
    let many = said.and_then(Value::as_array);
    let one = said.filter(|_| many.is_none());
    one.into_iter().chain(many.into_iter().flatten()).map(Value::as_str)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A token of these parts.
    pub(crate) fn joined(header: &str, payload: &str, signature: &[u8]) -> String {
        let part = |bytes: &[u8]| base64::prelude::BASE64_URL_SAFE_NO_PAD.encode(bytes);
        format!("{}.{}.{}", part(header.as_bytes()), part(payload.as_bytes()), part(signature))
    }

    fn denied(header: &str, payload: &str) -> Denied {
        Token::parse(&joined(header, payload, b"s")).map(|_| ()).unwrap_err()
    }

    #[test]
    fn forms() {
        for text in ["", "abc", "a.b", "a..c", ".b.c", "a.b.", "a.b.c.d", "....", "a.b.c."] {
            assert_eq!(Token::parse(text).unwrap_err(), Denied::Format, "{text:?}");
        }
        assert_eq!(Token::parse("a.b.c").unwrap_err(), Denied::HeaderBase64);
        let sound = joined(r#"{"alg":"RS256","kid":"k"}"#, r#"{"iss":"i","exp":7.9,"aud":["a","b"]}"#, b"sig");
        let token = Token::parse(&sound).unwrap();
        assert_eq!((token.algorithm, &*token.kid, token.expires), (Algorithm::Rs256, "k", Some(7)));
        assert_eq!((token.issuer(), token.audiences().collect::<Vec<_>>()), ("i", vec!["a", "b"]));
        assert_eq!(format!("{}.{}", token.signed, "c2ln"), sound);
    }

    #[test]
    fn headers() {
        for (header, expected) in [
            ("x", Denied::HeaderJson),
            ("[]", Denied::HeaderJson),
            ("{}", Denied::NoAlgorithm),
            (r#"{"alg":1}"#, Denied::NoAlgorithm),
            (r#"{"alg":"none"}"#, Denied::Algorithm),
            (r#"{"alg":"rs256"}"#, Denied::Algorithm),
            (r#"{"alg":"RS256","kid":1}"#, Denied::KeyId),
            (r#"{"alg":"RS256","kid":null}"#, Denied::KeyId),
        ] {
            assert_eq!(denied(header, "{}"), expected, "{header}");
        }
    }

    #[test]
    fn claims() {
        let header = r#"{"alg":"RS256"}"#;
        for (payload, expected) in [
            ("1", Denied::PayloadJson),
            (r#"{"iss":1}"#, Denied::NotText("iss")),
            (r#"{"sub":null}"#, Denied::NotText("sub")),
            (r#"{"jti":[]}"#, Denied::NotText("jti")),
            (r#"{"iat":"1"}"#, Denied::NotInteger("iat")),
            (r#"{"nbf":-1}"#, Denied::OutOfRange("nbf")),
            (r#"{"exp":1e30}"#, Denied::OutOfRange("exp")),
            (r#"{"exp":true}"#, Denied::NotInteger("exp")),
            (r#"{"aud":1}"#, Denied::AudienceType),
            (r#"{"aud":["a",1]}"#, Denied::AudienceType),
        ] {
            assert_eq!(denied(header, payload), expected, "{payload}");
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(denied(header, &deep), Denied::PayloadJson, "nesting is bounded");
    }

    #[test]
    fn answers() {
        assert_eq!(
            Denied::NotText("iss").details(),
            "jwt_authn_access_denied{Jwt_payload_[iss]_field_is_not_a_string}"
        );
        assert_eq!((Denied::Audience.status(), Denied::Missing.status()), (403, 401));
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(text in "[A-Za-z0-9_.=-]{0,80}", raw in ".{0,40}") {
            let _ = Token::parse(&text);
            let _ = Token::parse(&raw);
            let _ = Token::parse(&joined(&raw, &raw, raw.as_bytes()));
        }
    }
}
