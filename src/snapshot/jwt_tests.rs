//! Tokens signed by keys of every kind, against the compiled filter.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, ECDSA_P521_SHA512_FIXED_SIGNING, EcdsaKeyPair,
    Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384,
    RSA_PSS_SHA512, RsaEncoding, RsaKeyPair,
};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as B64;
use http::header::HeaderName;
use http::{HeaderMap, HeaderValue, Method};
use proxy_config::model::{JwksSource, JwtAuthn, JwtProvider, JwtRequirement};
use serde_json::{Value, json};

use super::jwks::Keys;
use super::jwt_token::Token;
use super::metadata::MetadataMatch;
use super::*;

const NOW: u64 = 1_000_000;

static RSA: LazyLock<RsaKeyPair> = LazyLock::new(|| RsaKeyPair::generate(KeySize::Rsa2048).unwrap());
static OTHER_RSA: LazyLock<RsaKeyPair> = LazyLock::new(|| RsaKeyPair::generate(KeySize::Rsa2048).unwrap());

fn unsigned(header: &Value, payload: &Value) -> String {
    format!("{}.{}", B64.encode(header.to_string()), B64.encode(payload.to_string()))
}

fn with_signature(signed: &str, signature: &[u8]) -> String {
    format!("{signed}.{}", B64.encode(signature))
}

fn rsa_signature(key: &RsaKeyPair, how: &'static dyn RsaEncoding, signed: &str) -> Vec<u8> {
    let mut signature = vec![0; key.public_modulus_len()];
    key.sign(how, &SystemRandom::new(), signed.as_bytes(), &mut signature).unwrap();
    signature
}

/// An RS256 token.
fn rs256(key: &RsaKeyPair, kid: &str, payload: &Value) -> String {
    let mut header = json!({"alg": "RS256"});
    if !kid.is_empty() {
        header["kid"] = kid.into();
    }
    let signed = unsigned(&header, payload);
    with_signature(&signed, &rsa_signature(key, &RSA_PKCS1_SHA256, &signed))
}

fn rsa_jwk(key: &RsaKeyPair, kid: &str, alg: &str) -> Value {
    let public = key.public_key();
    let n = B64.encode(public.modulus().big_endian_without_leading_zero());
    let e = B64.encode(public.exponent().big_endian_without_leading_zero());
    let mut jwk = json!({"kty": "RSA", "n": n, "e": e});
    for (name, value) in [("kid", kid), ("alg", alg)] {
        if !value.is_empty() {
            jwk[name] = value.into();
        }
    }
    jwk
}

fn set(keys: &[Value]) -> String {
    json!({"keys": keys}).to_string()
}

fn ec_jwk(crv: &str, point: &[u8]) -> Value {
    let (x, y) = point[1..].split_at(point.len() / 2);
    json!({"kty": "EC", "crv": crv, "x": B64.encode(x), "y": B64.encode(y)})
}

/// An algorithm, its public key as JWK, and a signer.
type Algorithm = (&'static str, Value, Box<dyn Fn(&str) -> Vec<u8>>);

/// Every algorithm.
fn all() -> Vec<Algorithm> {
    let mut out: Vec<Algorithm> = Vec::new();
    let rsa: [(&str, &'static dyn RsaEncoding); 6] = [
        ("RS256", &RSA_PKCS1_SHA256),
        ("RS384", &RSA_PKCS1_SHA384),
        ("RS512", &RSA_PKCS1_SHA512),
        ("PS256", &RSA_PSS_SHA256),
        ("PS384", &RSA_PSS_SHA384),
        ("PS512", &RSA_PSS_SHA512),
    ];
    for (alg, how) in rsa {
        out.push((alg, rsa_jwk(&RSA, "", ""), Box::new(move |signed| rsa_signature(&RSA, how, signed))));
    }
    for (alg, crv, how) in [
        ("ES256", "P-256", &ECDSA_P256_SHA256_FIXED_SIGNING),
        ("ES384", "P-384", &ECDSA_P384_SHA384_FIXED_SIGNING),
        ("ES512", "P-521", &ECDSA_P521_SHA512_FIXED_SIGNING),
    ] {
        let key = EcdsaKeyPair::generate(how).unwrap();
        let jwk = ec_jwk(crv, key.public_key().as_ref());
        out.push((
            alg,
            jwk,
            Box::new(move |s| key.sign(&SystemRandom::new(), s.as_bytes()).unwrap().as_ref().to_vec()),
        ));
    }
    let key = Ed25519KeyPair::generate().unwrap();
    let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": B64.encode(key.public_key().as_ref())});
    out.push(("EdDSA", jwk, Box::new(move |signed| key.sign(signed.as_bytes()).as_ref().to_vec())));
    let secret = b"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    for (alg, how) in [
        ("HS256", aws_lc_rs::hmac::HMAC_SHA256),
        ("HS384", aws_lc_rs::hmac::HMAC_SHA384),
        ("HS512", aws_lc_rs::hmac::HMAC_SHA512),
    ] {
        let key = aws_lc_rs::hmac::Key::new(how, secret);
        let jwk = json!({"kty": "oct", "k": B64.encode(secret)});
        out.push((alg, jwk, Box::new(move |s| aws_lc_rs::hmac::sign(&key, s.as_bytes()).as_ref().to_vec())));
    }
    out
}

fn verdict(keys: &str, token: &str) -> Result<(), Denied> {
    Keys::parse(keys).unwrap().0.verify(&Token::parse(token)?)
}

#[test]
fn every_algorithm_verifies_with_its_own_key_and_no_other() {
    let all = all();
    for (alg, jwk, sign) in &all {
        let signed = unsigned(&json!({"alg": alg}), &json!({"iss": "i"}));
        let token = with_signature(&signed, &sign(&signed));
        assert_eq!(verdict(&set(std::slice::from_ref(jwk)), &token), Ok(()), "{alg}");
        let others: Vec<Value> = all
            .iter()
            .filter(|(_, other, _)| other["kty"] != jwk["kty"] || other["crv"] != jwk["crv"])
            .map(|(_, j, _)| j.clone())
            .collect();
        let expected = if *alg == "EdDSA" { Denied::Signature } else { Denied::SignatureLength };
        let refused = verdict(&set(&others), &token).unwrap_err();
        assert!(refused == Denied::Signature || refused == expected, "{alg}: {refused:?}");
        let mut bad = sign(&signed);
        *bad.last_mut().unwrap() ^= 1;
        assert_eq!(
            verdict(&set(std::slice::from_ref(jwk)), &with_signature(&signed, &bad)),
            Err(Denied::Signature),
            "{alg}"
        );
        // The same signature under every other algorithm's name.
        for (other, _, _) in all.iter().filter(|(other, _, _)| other != alg) {
            let renamed = unsigned(&json!({"alg": other}), &json!({"iss": "i"}));
            let token = with_signature(&renamed, &sign(&renamed));
            assert!(verdict(&set(std::slice::from_ref(jwk)), &token).is_err(), "{alg} as {other}");
        }
    }
}

#[test]
fn a_public_key_is_no_secret() {
    let public = RSA.public_key();
    let n = public.modulus().big_endian_without_leading_zero();
    let der = public.as_ref();
    let pem = format!(
        "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n",
        base64::prelude::BASE64_STANDARD.encode(der)
    );
    let keys = set(&[rsa_jwk(&RSA, "k", "")]);
    for secret in [n, der, pem.as_bytes(), keys.as_bytes(), b"".as_slice()] {
        let signed = unsigned(&json!({"alg": "HS256", "kid": "k"}), &json!({"iss": "i"}));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret);
        let tag = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
        assert_eq!(verdict(&keys, &with_signature(&signed, tag.as_ref())), Err(Denied::Signature));
        let strict = set(&[rsa_jwk(&RSA, "k", "RS256")]);
        assert_eq!(verdict(&strict, &with_signature(&signed, tag.as_ref())), Err(Denied::NoSuchKey));
    }
    for none in ["none", "None", "NONE", ""] {
        let signed = unsigned(&json!({"alg": none}), &json!({"iss": "i"}));
        assert_eq!(verdict(&keys, &format!("{signed}.")), Err(Denied::Format));
        assert_eq!(verdict(&keys, &format!("{signed}.AA")), Err(Denied::Algorithm));
    }
}

#[test]
fn keys_are_chosen_by_name_and_algorithm() {
    let payload = json!({"iss": "i"});
    let [mine, other] = [&*RSA, &*OTHER_RSA];
    let both = set(&[rsa_jwk(other, "k2", "RS256"), rsa_jwk(mine, "k1", "RS256")]);
    for (keys, kid, expected) in [
        (&both, "k1", Ok(())),
        (&both, "", Ok(())),
        (&both, "k2", Err(Denied::Signature)),
        (&both, "k3", Err(Denied::NoSuchKey)),
        (&set(&[rsa_jwk(mine, "", "")]), "k3", Ok(())),
        (&set(&[rsa_jwk(mine, "k1", "RS384")]), "k1", Err(Denied::NoSuchKey)),
        (&set(&[rsa_jwk(other, "", ""), rsa_jwk(mine, "k1", "")]), "k1", Ok(())),
    ] {
        assert_eq!(verdict(keys, &rs256(mine, kid, &payload)), expected, "{keys} {kid}");
    }
}

#[test]
fn sets_of_keys() {
    let good = rsa_jwk(&RSA, "k", "RS256");
    let without = |name: &str| {
        let mut jwk = good.clone();
        jwk.as_object_mut().unwrap().remove(name);
        jwk
    };
    let with = |name: &str, value: Value| {
        let mut jwk = good.clone();
        jwk[name] = value;
        jwk
    };
    for (bad, expected) in [
        (without("kty"), "kty"),
        (without("n"), "n is missing"),
        (with("n", "AQAB".into()), "2048"),
        (with("n", "!".into()), "n: "),
        (with("e", "Ag".into()), "e is neither"),
        (with("kty", "x".into()), "not supported"),
        (with("alg", "ES256".into()), "not one of an RSA key"),
        (json!({"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}), "no point"),
        (json!({"kty": "EC", "crv": "P-256K", "x": "AA", "y": "AA"}), "not supported"),
        (json!({"kty": "EC", "alg": "ES256", "crv": "P-384"}), "does not go"),
        (json!({"kty": "OKP", "crv": "X25519", "x": "AA"}), "not supported"),
        (json!({"kty": "OKP", "crv": "Ed25519", "x": "AA"}), "32 are expected"),
        (json!({"kty": "oct", "k": ""}), "empty"),
        (json!(1), "invalid type"),
    ] {
        let (keys, left_out) = Keys::parse(&set(&[bad.clone(), good.clone()])).unwrap();
        assert!(left_out.len() == 1 && left_out[0].contains(expected), "{bad}: {left_out:?}");
        assert!(keys.verify(&Token::parse(&rs256(&RSA, "k", &json!({}))).unwrap()).is_ok());
        assert!(Keys::parse(&set(&[bad])).is_err());
    }
    for text in ["", "{}", "[]", "{\"keys\": 1}", "{\"keys\": []}", "{\"k\": \"x\"}", "nul"] {
        assert!(check_jwks(text).is_err(), "{text}");
    }
    assert!(check_jwks(&set(&[good])).is_ok());
}

/// A provider with RSA as its key.
fn provider(issuer: &str) -> JwtProvider {
    JwtProvider {
        issuer: issuer.into(),
        jwks: JwksSource::Inline(set(&[rsa_jwk(&RSA, "k", "")])),
        payload_in_metadata: "payload".into(),
        ..JwtProvider::default()
    }
}

/// As istiod asks for these providers.
fn istio(providers: Vec<JwtProvider>) -> JwtAuthn {
    let names: Vec<String> = (0..providers.len()).map(|i| format!("origins-{i}")).collect();
    let one = |n: &String| JwtRequirement::Provider(n.clone());
    let or_missing = |n: &String| JwtRequirement::Any(vec![one(n), JwtRequirement::AllowMissing]);
    let requirement = match &names[..] {
        [only] => or_missing(only),
        many => {
            let mut any: Vec<_> = many.iter().map(one).collect();
            any.push(JwtRequirement::All(many.iter().map(or_missing).collect()));
            JwtRequirement::Any(any)
        }
    };
    JwtAuthn {
        providers: names.into_iter().zip(providers).collect(),
        rules: vec![("/".into(), requirement)],
        bypass_cors_preflight: true,
    }
}

struct Filter {
    jwt: Jwt,
    cache: JwtCache,
    bell: Arc<KeyBell>,
}

impl Filter {
    fn new(said: &JwtAuthn) -> Self {
        let bell = Arc::default();
        Self { jwt: Jwt::compile(said, &bell).unwrap().0, cache: JwtCache::default(), bell }
    }

    fn check_at(&mut self, now: u64, path: &str, headers: &[(&str, &str)]) -> Result<Vec<Grant>, Denied> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        let method = if map.contains_key("origin") { Method::OPTIONS } else { Method::GET };
        let request = RequestView { method: &method, scheme: "http", authority: "a", path, headers: &map };
        self.jwt.check(&request, now, &mut self.cache)
    }

    fn check(&mut self, path: &str, headers: &[(&str, &str)]) -> Result<usize, Denied> {
        self.check_at(NOW, path, headers).map(|grants| grants.len())
    }

    fn bearer(&mut self, token: &str) -> Result<usize, Denied> {
        self.check("/", &[("authorization", &format!("Bearer {token}"))])
    }
}

#[test]
fn one_issuer() {
    let mut filter = Filter::new(&istio(vec![provider("i")]));
    let good = rs256(&RSA, "k", &json!({"iss": "i"}));
    let bearer = format!("Bearer {good}");
    assert_eq!(filter.check("/", &[]), Ok(0), "nobody asks for a token");
    assert_eq!(filter.bearer(&good), Ok(1));
    assert_eq!(filter.bearer("abc"), Err(Denied::Format));
    assert_eq!(filter.bearer(&rs256(&RSA, "k", &json!({"iss": "j"}))), Err(Denied::Issuer));
    assert_eq!(filter.bearer(&rs256(&RSA, "k", &json!({}))), Err(Denied::Issuer));
    assert_eq!(filter.check(&format!("/?access_token={good}"), &[("authorization", &bearer)]), Ok(2));
    assert_eq!(filter.check("/?access_token=abc", &[("authorization", &bearer)]), Err(Denied::Format));
    assert_eq!(
        filter.check(&format!("/?access_token={good}"), &[("authorization", "Bearer a.b.c")]),
        Err(Denied::HeaderBase64)
    );
    assert_eq!(
        filter.check(&format!("/?access_token={good}&access_token=x"), &[]),
        Err(Denied::Format),
        "all that is found"
    );
    let preflight = [("origin", "o"), ("access-control-request-method", "GET"), ("authorization", "Bearer abc")];
    assert_eq!(filter.check("/", &preflight), Ok(0));
    let anybody = &mut Filter::new(&istio(vec![provider("")]));
    assert_eq!(anybody.bearer(&rs256(&RSA, "k", &json!({"iss": "whoever"}))), Ok(1));
}

#[test]
fn several_issuers() {
    let second = JwtProvider { from_headers: vec![("x-token".into(), "T ".into())], ..provider("two") };
    let mut filter = Filter::new(&istio(vec![provider("one"), second]));
    let token = |issuer: &str| rs256(&RSA, "k", &json!({"iss": issuer}));
    let (one, two) = (format!("Bearer {}", token("one")), format!("T {}", token("two")));
    for (authorization, x_token, expected) in [
        ("", "", Ok(0)),
        (&*one, "", Ok(1)),
        ("", &*two, Ok(1)),
        (&*one, &*two, Ok(1)),
        (&*one, "T abc", Ok(1)),
        ("Bearer abc", &*two, Ok(1)),
        ("Bearer abc", "", Err(Denied::Format)),
        ("", "T abc", Err(Denied::Format)),
        (&*format!("Bearer {}", token("two")), "", Err(Denied::Issuer)),
    ] {
        let headers = [("authorization", authorization), ("x-token", x_token)];
        let said: Vec<_> = headers.into_iter().filter(|(_, value)| !value.is_empty()).collect();
        assert_eq!(filter.check("/", &said), expected, "{authorization:.12} {x_token:.8}");
    }
    // The same place for both: the issuer decides, and a stranger's token is no "none".
    let mut same = Filter::new(&istio(vec![provider("one"), provider("two")]));
    assert_eq!((same.bearer(&token("one")), same.bearer(&token("two"))), (Ok(1), Ok(1)));
    assert_eq!(same.bearer(&token("three")), Err(Denied::Issuer));
    let expired = rs256(&RSA, "k", &json!({"iss": "two", "exp": 1}));
    assert_eq!(same.bearer(&expired), Err(Denied::Expired), "the better reason is told");
}

#[test]
fn other_expressions() {
    let two = || -> BTreeMap<String, JwtProvider> {
        let second = JwtProvider { from_params: vec!["t".into()], ..provider("two") };
        [("a".to_owned(), provider("one")), ("b".to_owned(), second)].into()
    };
    let of = |need: JwtRequirement| {
        Filter::new(&JwtAuthn { providers: two(), rules: vec![("/api".into(), need)], bypass_cors_preflight: false })
    };
    let named = |name: &str| JwtRequirement::Provider(name.to_owned());
    let one = format!("Bearer {}", rs256(&RSA, "k", &json!({"iss": "one"})));
    let two = format!("/api?t={}", rs256(&RSA, "k", &json!({"iss": "two"})));
    let none: &[(&str, &str)] = &[];
    let with: &[(&str, &str)] = &[("authorization", &one)];
    let bad: &[(&str, &str)] = &[("authorization", "Bearer abc")];
    for (need, path, headers, expected) in [
        (named("a"), "/other", bad, Ok(0)),
        (named("a"), "/api", none, Err(Denied::Missing)),
        (named("a"), "/api", with, Ok(1)),
        (JwtRequirement::All(vec![named("a"), named("b")]), "/api", with, Err(Denied::Missing)),
        (JwtRequirement::All(vec![named("a"), named("b")]), &*two, with, Ok(2)),
        (JwtRequirement::All(Vec::new()), "/api", bad, Ok(0)),
        (JwtRequirement::AllowMissing, "/api", none, Ok(0)),
        (JwtRequirement::AllowMissing, "/api", with, Ok(1)),
        (JwtRequirement::AllowMissing, &*two, bad, Err(Denied::Format)),
        (JwtRequirement::AllowMissingOrFailed, "/api", bad, Ok(0)),
        (JwtRequirement::Any(vec![JwtRequirement::AllowMissingOrFailed]), "/api", bad, Ok(0)),
        (JwtRequirement::Any(vec![JwtRequirement::AllowMissing]), "/api", bad, Err(Denied::Format)),
        (JwtRequirement::Any(vec![named("a"), JwtRequirement::AllowMissingOrFailed]), "/api", bad, Ok(0)),
        (JwtRequirement::ProviderAndAudiences("a".into(), vec!["x".into()]), "/api", with, Err(Denied::Audience)),
    ] {
        assert_eq!(of(need.clone()).check(path, headers), expected, "{need:?} {path:.9} {headers:.20?}");
    }
    let unknown = JwtAuthn { rules: vec![("/".into(), named("x"))], ..JwtAuthn::default() };
    assert_eq!(Jwt::compile(&unknown, &Arc::default()).unwrap_err(), "there is no provider x");
}

#[test]
fn times_count_also_for_what_is_remembered() {
    let mut filter = Filter::new(&istio(vec![provider("i")]));
    let token = rs256(&RSA, "k", &json!({"iss": "i", "nbf": NOW, "exp": NOW + 100}));
    let header = format!("Bearer {token}");
    let mut at = |now: u64| filter.check_at(now, "/", &[("authorization", &header)]).map(|grants| grants.len());
    for (now, expected) in [
        (NOW - 61, Err(Denied::NotYetValid)),
        (NOW - 60, Ok(1)),
        (NOW + 160, Ok(1)),
        (NOW + 161, Err(Denied::Expired)),
        (NOW, Ok(1)),
        (NOW - 61, Err(Denied::NotYetValid)),
    ] {
        assert_eq!(at(now), expected, "{now}");
    }
    let strict = JwtProvider { clock_skew: Some(Duration::from_secs(1)), ..provider("i") };
    let mut strict = Filter::new(&istio(vec![strict]));
    assert_eq!(strict.check_at(NOW + 102, "/", &[("authorization", &header)]).unwrap_err(), Denied::Expired);
    assert_eq!(strict.bearer(&rs256(&RSA, "k", &json!({"iss": "i", "exp": 0}))), Err(Denied::Expired));
    assert_eq!(strict.bearer(&rs256(&RSA, "k", &json!({"iss": "i"}))), Ok(1), "without exp it does not end");
}

#[test]
fn audiences() {
    let said = JwtProvider { audiences: vec!["https://api/".into(), "b".into()], ..provider("i") };
    let mut filter = Filter::new(&istio(vec![said]));
    for (aud, expected) in [
        (json!("api"), Ok(1)),
        (json!("http://api"), Ok(1)),
        (json!(["x", "b"]), Ok(1)),
        (json!("x"), Err(Denied::Audience)),
        (json!([]), Err(Denied::Audience)),
        (json!("API"), Err(Denied::Audience)),
    ] {
        assert_eq!(filter.bearer(&rs256(&RSA, "k", &json!({"iss": "i", "aud": aud}))), expected, "{aud}");
    }
    assert_eq!(filter.bearer(&rs256(&RSA, "k", &json!({"iss": "i"}))), Err(Denied::Audience));
}

#[test]
fn missing_keys_are_asked_for_once() {
    let remote = |cluster: &str, keys: Option<&str>| JwtProvider {
        jwks: JwksSource::Remote {
            uri: "http://k/".into(),
            cluster: cluster.into(),
            timeout: None,
            cache: None,
            keys: keys.map(Into::into),
        },
        ..provider("i")
    };
    let token = rs256(&RSA, "k", &json!({"iss": "i"}));
    assert_eq!(Filter::new(&istio(vec![remote("c", None)])).bearer(&token), Err(Denied::NotFetched));
    assert_eq!(Filter::new(&istio(vec![remote("", None)])).bearer(&token), Err(Denied::Signature), "as under istiod");
    assert_eq!(Filter::new(&istio(vec![remote("", Some("{}"))])).bearer(&token), Err(Denied::NoKeys));
    let keys = set(&[rsa_jwk(&RSA, "k", "")]);
    let mut filter = Filter::new(&istio(vec![remote("", Some(&keys))]));
    assert_eq!(filter.bearer(&token), Ok(1));
    assert!(!filter.jwt.sources().any(|source| source.is_asked()));
    for _ in 0..3 {
        assert_eq!(filter.bearer(&rs256(&OTHER_RSA, "new", &json!({"iss": "i"}))), Err(Denied::NoSuchKey));
    }
    assert_eq!(filter.bearer(&rs256(&RSA, "other", &json!({"iss": "stranger"}))), Err(Denied::Issuer));
    let source = filter.jwt.sources().next().unwrap();
    assert!(source.is_asked() && source.fetched && source.is_of("http://k/", "") && !source.is_of("http://k/", "c"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        filter.bell.rung().await;
        let again = tokio::time::timeout(Duration::from_secs(1), filter.bell.rung());
        assert!(again.await.is_err(), "three tokens, one ring");
    });
    source.answered();
    assert!(!source.is_asked());
}

#[test]
fn what_is_remembered_is_bounded_and_belongs_to_its_keys() {
    let said = istio(vec![provider("i")]);
    let mut filter = Filter::new(&said);
    let token = rs256(&RSA, "k", &json!({"iss": "i"}));
    let first = filter.check_at(NOW, "/", &[("authorization", &format!("Bearer {token}"))]).unwrap();
    let again = filter.check_at(NOW, "/", &[("authorization", &format!("Bearer {token}"))]).unwrap();
    assert!(Arc::ptr_eq(&first[0].verified, &again[0].verified));
    // Another compilation has other keys, whatever the name.
    let mut changed = said.clone();
    changed.providers.get_mut("origins-0").unwrap().jwks = JwksSource::Inline(set(&[rsa_jwk(&OTHER_RSA, "k", "")]));
    filter.jwt = Jwt::compile(&changed, &filter.bell).unwrap().0;
    assert_eq!(filter.bearer(&token), Err(Denied::Signature));
    let long = rs256(&RSA, "k", &json!({"iss": "i", "x": "x".repeat(20_000)}));
    assert_eq!(Filter::new(&said).bearer(&long), Ok(1));
}

#[test]
fn metadata_of_several_tokens_is_one() {
    let second = JwtProvider { payload_in_metadata: "more".into(), from_params: vec!["t".into()], ..provider("two") };
    let said = JwtAuthn {
        providers: [("a".to_owned(), provider("one")), ("b".to_owned(), second)].into(),
        rules: vec![(
            "/".into(),
            JwtRequirement::All(vec![JwtRequirement::Provider("a".into()), JwtRequirement::Provider("b".into())]),
        )],
        bypass_cors_preflight: false,
    };
    let one = format!("Bearer {}", rs256(&RSA, "k", &json!({"iss": "one", "sub": "s"})));
    let path = format!("/?t={}", rs256(&RSA, "k", &json!({"iss": "two"})));
    let grants = Filter::new(&said).check_at(NOW, &path, &[("authorization", &one)]).unwrap();
    let merged = metadata_of(&grants).unwrap();
    let told = &merged["envoy.filters.http.jwt_authn"];
    assert_eq!((&told["payload"]["sub"], &told["more"]["iss"]), (&json!("s"), &json!("two")));
    assert!(metadata_of(&[]).is_none());
}

#[test]
fn routes_follow_claims() {
    use proxy_config::model::{MetadataMatcher, StringMatcher, ValueMatcher};
    let claim = MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: vec!["payload".into(), "group".into()],
        value: ValueMatcher::String(StringMatcher::exact("dev")),
        invert: false,
    };
    let matcher = MetadataMatch::compile(&claim).unwrap();
    let mut filter = Filter::new(&istio(vec![provider("i")]));
    let header = format!("Bearer {}", rs256(&RSA, "k", &json!({"iss": "i", "group": "dev"})));
    let grants = filter.check_at(NOW, "/", &[("authorization", &header)]).unwrap();
    assert!(matcher.matches(metadata_of(&grants).as_deref()) && !matcher.matches(None));
}

proptest::proptest! {
    #[test]
    fn a_changed_token_is_no_token(at in 0_usize..600, to in proptest::char::any()) {
        let token = rs256(&RSA, "k", &json!({"iss": "i", "sub": "alice"}));
        let mut filter = Filter::new(&istio(vec![provider("i")]));
        assert_eq!(filter.bearer(&token), Ok(1));
        let at = at % token.len();
        let changed: String = token.char_indices().map(|(i, c)| if i == at { to } else { c }).collect();
        let last = token.len() - 1;
        // The last character of a signature has bits that mean nothing.
        if changed != token && at != last && changed.chars().all(|c| c.is_ascii_graphic()) {
            let path = format!("/?access_token={}", changed.replace('%', "%25").replace('&', "%26").replace('#', "%23"));
            assert!(filter.check(&path, &[]).is_err(), "{changed}");
        }
        let cut = &token[..at];
        assert!(filter.check(&format!("/?access_token={cut}"), &[]).is_err());
    }
}
