//! JSON Web Key Sets, parsed when a snapshot is compiled: which keys verify which signatures.
//!
//! A key belongs to one family of algorithms by its own type, so a token cannot choose how it is read: an RSA key never
//! serves as an HMAC secret, and no key at all serves `none`.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ECDSA_P521_SHA512_FIXED, ParsedPublicKey,
};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jsonwebtoken::DecodingKey;
use serde::Deserialize;
use serde_json::Value;
use x509_parser::pem::Pem;

use super::jwt_token::{Algorithm, Denied, Token};

/// Bytes of an Ed25519 public key.
const ED25519_KEY: usize = 32;
/// Bytes of an Ed25519 signature.
const ED25519_SIGNATURE: usize = 64;
/// Bytes of RSA moduli that the library verifies with.
const RSA_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// The usable keys of a set, at least one.
pub(super) struct Keys(Box<[Key]>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.kid)).finish()
    }
}

struct Key {
    /// Empty fits every token.
    kid: Box<str>,
    /// Empty fits every token.
    algorithm: Box<str>,
    material: Material,
}

enum Material {
    Rsa(DecodingKey),
    P256(DecodingKey),
    P384(DecodingKey),
    /// The one curve that `jsonwebtoken` does not know.
    P521(Box<ParsedPublicKey>),
    Ed25519(DecodingKey),
    Secret(DecodingKey),
}

#[derive(Deserialize)]
struct Said {
    kty: String,
    #[serde(default)]
    kid: Value,
    #[serde(default)]
    alg: Value,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
    k: Option<String>,
}

/// Where a key stands in a set, and the key or why it is none.
type Entry = (String, Result<Key, String>);

impl Keys {
    /// The keys of a set, and why others are left out. An error when none remains.
    pub(super) fn parse(text: &str) -> Result<(Self, Vec<String>), String> {
        let value: Value = serde_json::from_str(text).map_err(|e| format!("no JSON: {e}"))?;
        let mut left_out = Vec::new();
        let mut keys = Vec::new();
        let entries: Vec<Entry> = match value.get("keys") {
            Some(Value::Array(list)) => {
                list.iter().enumerate().map(|(i, said)| (format!("keys[{i}]"), Key::read(said))).collect()
            }
            Some(_) => return Err("\"keys\" is no list".to_owned()),
            None => certificates(&value)?,
        };
        for (at, entry) in entries {
            match entry {
                Ok(key) => keys.push(key),
                Err(why) => left_out.push(format!("{at}: {why}")),
            }
        }
        if keys.is_empty() {
            let why = if left_out.is_empty() { "it is empty".to_owned() } else { left_out.join("; ") };
            return Err(format!("no usable key: {why}"));
        }
        Ok((Self(keys.into()), left_out))
    }

    /// Whether one of the keys made the signature. A token with `kid` asks for keys of that name or without one.
    pub(super) fn verify(&self, token: &Token<'_>) -> Result<(), Denied> {
        let mut fits = false;
        for key in &self.0 {
            let same_name = token.kid.is_empty() || key.kid.is_empty() || *key.kid == *token.kid;
            if !same_name || (!key.algorithm.is_empty() && &*key.algorithm != token.algorithm.name()) {
                continue;
            }
            fits = true;
            if matches!(key.material, Material::Ed25519(_)) && token.signature.len() != ED25519_SIGNATURE {
                return Err(Denied::SignatureLength);
            }
            if key.material.made(token) {
                return Ok(());
            }
        }
        Err(if fits { Denied::Signature } else { Denied::NoSuchKey })
    }
}

/// Whether a text is a set with a usable key.
///
/// # Errors
/// Why it is not.
pub fn check(text: &str) -> Result<(), String> {
    Keys::parse(text).map(|_| ())
}

/// `{"kid": "-----BEGIN CERTIFICATE-----…"}`, as some providers publish their RSA keys.
fn certificates(value: &Value) -> Result<Vec<Entry>, String> {
    let missing = || "there is no \"keys\"".to_owned();
    let map = value.as_object().filter(|map| !map.is_empty()).ok_or_else(missing)?;
    let mut out = Vec::new();
    for (kid, text) in map {
        let pem = text.as_str().filter(|t| t.starts_with("-----BEGIN CERTIFICATE-----")).ok_or_else(missing)?;
        out.push((kid.clone(), from_certificate(pem).map(|material| Key::new(kid, "", material))));
    }
    Ok(out)
}

fn from_certificate(pem: &str) -> Result<Material, String> {
    let (pem, _) = Pem::read(std::io::Cursor::new(pem.as_bytes())).map_err(|e| format!("certificate: {e}"))?;
    let certificate = pem.parse_x509().map_err(|e| format!("certificate: {e}"))?;
    match certificate.public_key().parsed() {
        Ok(x509_parser::public_key::PublicKey::RSA(rsa)) => {
            let modulus: Vec<u8> = rsa.modulus.iter().copied().skip_while(|b| *b == 0).collect();
            rsa_key(&modulus, rsa.exponent)
        }
        _ => Err("the certificate has no RSA key".to_owned()),
    }
}

impl Key {
    fn new(kid: &str, algorithm: &str, material: Material) -> Self {
        Self { kid: kid.into(), algorithm: algorithm.into(), material }
    }

    fn read(said: &Value) -> Result<Self, String> {
        let said: Said = Said::deserialize(said).map_err(|e| e.to_string())?;
        let (kid, alg) = (said.kid.as_str().unwrap_or_default(), said.alg.as_str().unwrap_or_default());
        let material = match &*said.kty {
            "RSA" => said.rsa(alg),
            "EC" => said.ec(alg),
            "OKP" => said.okp(alg),
            "oct" => said.secret(alg),
            other => Err(format!("kty {other:?} is not supported")),
        }?;
        Ok(Self::new(kid, alg, material))
    }
}

impl Said {
    fn rsa(&self, alg: &str) -> Result<Material, String> {
        if !alg.is_empty() && !alg.starts_with("RS") && !alg.starts_with("PS") {
            return Err(format!("alg {alg:?} is not one of an RSA key"));
        }
        let modulus: Vec<u8> = bytes(self.n.as_ref(), "n")?.into_iter().skip_while(|b| *b == 0).collect();
        rsa_key(&modulus, &bytes(self.e.as_ref(), "e")?)
    }

    fn ec(&self, alg: &str) -> Result<Material, String> {
        let by_alg = match alg {
            "ES256" => Some("P-256"),
            "ES384" => Some("P-384"),
            "ES512" => Some("P-521"),
            "" => None,
            other => return Err(format!("alg {other:?} is not one of an EC key")),
        };
        let curve = self.crv.as_deref().filter(|crv| !crv.is_empty()).or(by_alg).unwrap_or("P-256");
        if by_alg.is_some_and(|by_alg| by_alg != curve) {
            return Err(format!("alg {alg:?} does not go with crv {curve:?}"));
        }
        let size = match curve {
            "P-256" => 32,
            "P-384" => 48,
            "P-521" => 66,
            other => return Err(format!("crv {other:?} is not supported")),
        };
        let mut point = vec![4];
        for (name, said) in [("x", &self.x), ("y", &self.y)] {
            let coordinate = bytes(said.as_ref(), name)?;
            let missing = size_of_zeros(size, &coordinate).ok_or_else(|| format!("{name} is too long"))?;
            point.resize(point.len() + missing, 0);
            point.extend(&coordinate);
        }
        let algorithm = match curve {
            "P-256" => &ECDSA_P256_SHA256_FIXED,
            "P-384" => &ECDSA_P384_SHA384_FIXED,
            _ => &ECDSA_P521_SHA512_FIXED,
        };
        let parsed = ParsedPublicKey::new(algorithm, &point).map_err(|_| "x and y are no point of the curve")?;
        Ok(match curve {
            "P-256" => Material::P256(DecodingKey::from_ec_der(&point)),
            "P-384" => Material::P384(DecodingKey::from_ec_der(&point)),
            _ => Material::P521(Box::new(parsed)),
        })
    }

    fn okp(&self, alg: &str) -> Result<Material, String> {
        if !matches!(alg, "" | "EdDSA") {
            return Err(format!("alg {alg:?} is not one of an OKP key"));
        }
        match self.crv.as_deref() {
            Some("Ed25519") => {}
            other => return Err(format!("crv {:?} is not supported", other.unwrap_or_default())),
        }
        let key = bytes(self.x.as_ref(), "x")?;
        if key.len() != ED25519_KEY {
            return Err(format!("x has {} bytes, {ED25519_KEY} are expected", key.len()));
        }
        Ok(Material::Ed25519(DecodingKey::from_ed_der(&key)))
    }

    fn secret(&self, alg: &str) -> Result<Material, String> {
        if !matches!(alg, "" | "HS256" | "HS384" | "HS512") {
            return Err(format!("alg {alg:?} is not one of a secret"));
        }
        let key = bytes(self.k.as_ref(), "k")?;
        if key.is_empty() {
            return Err("k is empty".to_owned());
        }
        Ok(Material::Secret(DecodingKey::from_secret(&key)))
    }
}

fn rsa_key(modulus: &[u8], exponent: &[u8]) -> Result<Material, String> {
    let exponent: Vec<u8> = exponent.iter().copied().skip_while(|b| *b == 0).collect();
    if !matches!(*exponent, [3] | [1, 0, 1]) {
        return Err("e is neither 3 nor 65537".to_owned());
    }
    if !RSA_BYTES.contains(&modulus.len()) {
        return Err(format!("RSA keys have 2048 to 8192 bits, this one {}", modulus.len() * 8));
    }
    Ok(Material::Rsa(DecodingKey::from_rsa_raw_components(modulus, &exponent)))
}

fn bytes(said: Option<&String>, name: &str) -> Result<Vec<u8>, String> {
    let text = said.ok_or_else(|| format!("{name} is missing"))?;
    BASE64_URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|e| format!("{name}: {e}"))
}

/// Zeros that are missing in front; some write numbers instead of coordinates.
fn size_of_zeros(size: usize, coordinate: &[u8]) -> Option<usize> {
    size.checked_sub(coordinate.len())
}

impl Material {
    /// Whether this key made the token's signature by the token's algorithm.
    fn made(&self, token: &Token<'_>) -> bool {
        use jsonwebtoken::Algorithm as Library;
        let (key, algorithm) = match (self, token.algorithm) {
            (Self::Rsa(key), Algorithm::Rs256) => (key, Library::RS256),
            (Self::Rsa(key), Algorithm::Rs384) => (key, Library::RS384),
            (Self::Rsa(key), Algorithm::Rs512) => (key, Library::RS512),
            (Self::Rsa(key), Algorithm::Ps256) => (key, Library::PS256),
            (Self::Rsa(key), Algorithm::Ps384) => (key, Library::PS384),
            (Self::Rsa(key), Algorithm::Ps512) => (key, Library::PS512),
            (Self::P256(key), Algorithm::Es256) => (key, Library::ES256),
            (Self::P384(key), Algorithm::Es384) => (key, Library::ES384),
            (Self::P521(key), Algorithm::Es512) => {
                return key.verify_sig(token.signed.as_bytes(), &token.signature).is_ok();
            }
            (Self::Ed25519(key), Algorithm::EdDsa) => (key, Library::EdDSA),
            (Self::Secret(key), Algorithm::Hs256) => (key, Library::HS256),
            (Self::Secret(key), Algorithm::Hs384) => (key, Library::HS384),
            (Self::Secret(key), Algorithm::Hs512) => (key, Library::HS512),
            _ => return false,
        };
        let signature = BASE64_URL_SAFE_NO_PAD.encode(&token.signature);
        jsonwebtoken::crypto::verify(&signature, token.signed.as_bytes(), key, algorithm).unwrap_or(false)
    }
}
