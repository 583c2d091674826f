//! JWT authentication, compiled: providers with their keys, and what is required of which path. A pure decision: it says
//! what a request's tokens are worth and what follows, and changes nothing.
//!
//! As Envoy has it: of one provider every token that is found must be good; of several, one good provider is enough, and
//! where no token is required a bad one still is no "none". Where Envoy changes the request before the whole is decided, we
//! do so only for what is accepted in the end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use http::header::{ACCESS_CONTROL_REQUEST_METHOD, HeaderName, HeaderValue, ORIGIN};
use http::{HeaderMap, Method};
use proxy_config::model::{self, JwksSource, JwtRequirement};
use smallvec::SmallVec;
use tokio::sync::Notify;

use super::jwks::Keys;
use super::jwt_cache::JwtCache;
use super::jwt_claims::Claims;
use super::jwt_place::{Place, Places};
use super::jwt_token::{Denied, Token};
use super::matcher::url_path;
use super::metadata::Metadata;
use super::{Name, RequestView};

/// Seconds that clocks may differ, when configuration does not say.
const CLOCK_SKEW: u64 = 60;
/// The filter.
#[derive(Debug)]
pub struct Jwt {
    providers: Box<[Provider]>,
    rules: Box<[(Box<str>, Need)]>,
    bypass_cors_preflight: bool,
    /// Headers that only we may write.
    own_headers: Box<[HeaderName]>,
    bell: Arc<KeyBell>,
}

/// Rings when keys are missing that may have been published since.
#[derive(Debug, Default)]
pub struct KeyBell(Notify);

impl KeyBell {
    /// Waits until somebody rings.
    pub async fn rung(&self) {
        self.0.notified().await;
    }
}

/// Keys that are fetched.
#[derive(Debug)]
pub struct KeySource {
    /// Where.
    pub uri: Name,
    /// The cluster that leads there; empty: straight.
    pub cluster: Name,
    /// They are there.
    pub fetched: bool,
    asked: AtomicBool,
}

impl KeySource {
    /// Whether it is this one.
    pub fn is_of(&self, uri: &str, cluster: &str) -> bool {
        *self.uri == *uri && *self.cluster == *cluster
    }

    /// Whether a token asked for a key that is not there.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// The question is answered; the next one rings again.
    pub fn answered(&self) {
        self.asked.store(false, Ordering::Relaxed);
    }
}

/// One provider.
#[derive(Debug)]
struct Provider {
    /// Unique in the process, so that what was verified with other keys is never taken for verified.
    id: u64,
    name: Name,
    issuer: Box<str>,
    audiences: Box<[Box<str>]>,
    keys: Result<Keys, Denied>,
    source: Option<Arc<KeySource>>,
    places: Places,
    forward: bool,
    clock_skew: u64,
    claims: Claims,
}

/// A compiled [`JwtRequirement`]; numbers are providers.
#[derive(Debug)]
enum Need {
    Provider(usize, Option<Box<[Box<str>]>>),
    /// Without any good one: `missing` lets tokenless requests pass, `failed` all.
    Any {
        of: Box<[Self]>,
        missing: bool,
        failed: bool,
    },
    All(Box<[Self]>),
    AllowMissing,
    AllowMissingOrFailed,
}

/// What a good token brings.
#[derive(Debug, Default)]
pub struct Verified {
    /// Headers for the application, in order.
    pub headers: Box<[(HeaderName, HeaderValue)]>,
    /// Dynamic metadata for policies and routes.
    pub metadata: Option<Arc<Metadata>>,
    not_before: u64,
    expires: Option<u64>,
}

/// A good token in a request.
#[derive(Debug, Clone)]
pub struct Grant {
    /// The provider's name.
    pub provider: Name,
    /// Where it was.
    pub place: Place,
    /// It stays there.
    pub forward: bool,
    /// What it brings.
    pub verified: Arc<Verified>,
}

impl Jwt {
    /// Compiles. The error is what makes the filter unusable; warnings say which keys are left out.
    pub(super) fn compile(said: &model::JwtAuthn, bell: &Arc<KeyBell>) -> Result<(Self, Vec<String>), String> {
        let mut warnings = Vec::new();
        let mut providers = Vec::new();
        for (name, provider) in &said.providers {
            let compiled = Provider::compile(name, provider, &mut warnings);
            providers.push(compiled.map_err(|why| format!("provider {name}: {why}"))?);
        }
        let names: Vec<&String> = said.providers.keys().collect();
        let rules = said.rules.iter().map(|(prefix, need)| Ok((prefix.as_str().into(), Need::compile(need, &names)?)));
        let jwt = Self {
            rules: rules.collect::<Result<_, String>>()?,
            own_headers: own_headers(said)?,
            providers: providers.into(),
            bypass_cors_preflight: said.bypass_cors_preflight,
            bell: Arc::clone(bell),
        };
        Ok((jwt, warnings))
    }

    /// Headers that tell claims or payloads to the application. They are never the client's own: take them out before
    /// anything is decided.
    pub fn own_headers(&self) -> &[HeaderName] {
        &self.own_headers
    }

    /// Keys that are fetched.
    pub fn sources(&self) -> impl Iterator<Item = &Arc<KeySource>> {
        self.providers.iter().filter_map(|provider| provider.source.as_ref())
    }

    /// What a request's tokens are worth. `now` is seconds since 1970.
    ///
    /// # Errors
    /// Why the request must not pass.
    pub fn check(&self, request: &RequestView<'_>, now: u64, cache: &mut JwtCache) -> Result<Vec<Grant>, Denied> {
        if self.bypass_cors_preflight && is_preflight(request.method, request.headers) {
            return Ok(Vec::new());
        }
        let path = url_path(request.path);
        let Some((_, need)) = self.rules.iter().find(|(prefix, _)| path.starts_with(&**prefix)) else {
            return Ok(Vec::new());
        };
        let known = self.providers.iter().map(|_| None).collect();
        Check { jwt: self, request, now, cache, known }.need(need)
    }
}

/// Envoy's idea of a CORS preflight.
fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    let has = |name: HeaderName| headers.get(name).is_some_and(|value| !value.is_empty());
    method == Method::OPTIONS && has(ORIGIN) && has(ACCESS_CONTROL_REQUEST_METHOD)
}

fn own_headers(said: &model::JwtAuthn) -> Result<Box<[HeaderName]>, String> {
    let mut names = Vec::new();
    for provider in said.providers.values() {
        let claims = provider.claim_to_headers.iter().map(|(header, _)| header);
        for text in claims.chain([&provider.forward_payload_header]).filter(|text| !text.is_empty()) {
            let name = HeaderName::from_bytes(text.as_bytes()).map_err(|_| format!("{text:?} is no header name"))?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    Ok(names.into())
}

impl Provider {
    fn compile(name: &str, said: &model::JwtProvider, warnings: &mut Vec<String>) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (text, otherwise, source) = match &said.jwks {
            JwksSource::None => (None, Denied::NoKeys, None),
            JwksSource::Inline(text) => (Some(text.as_str()), Denied::NoKeys, None),
            JwksSource::Remote { uri, cluster, keys, .. } => {
                // Straight from the issuer is istiod's part, which gives Envoy keys that verify nothing meanwhile.
                let otherwise = if cluster.is_empty() { Denied::Signature } else { Denied::NotFetched };
                let source = KeySource {
                    uri: uri.as_str().into(),
                    cluster: Arc::clone(cluster),
                    fetched: keys.is_some(),
                    asked: AtomicBool::new(false),
                };
                (keys.as_deref(), otherwise, Some(Arc::new(source)))
            }
        };
        let keys = match text.map(Keys::parse) {
            None => Err(otherwise),
            Some(Ok((keys, left_out))) => {
                warnings.extend(left_out.into_iter().map(|why| format!("provider {name}: a key is left out: {why}")));
                Ok(keys)
            }
            Some(Err(why)) => {
                warnings.push(format!("provider {name}: its tokens are refused: {why}"));
                Err(Denied::NoKeys)
            }
        };
        Ok(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name: name.into(),
            issuer: said.issuer.as_str().into(),
            audiences: audiences(&said.audiences),
            keys,
            source,
            places: Places::compile(said)?,
            forward: said.forward,
            clock_skew: said.clock_skew.map_or(CLOCK_SKEW, |skew| skew.as_secs()),
            claims: Claims::compile(said)?,
        })
    }

    /// Without scheme and closing slash, as Envoy compares.
    fn accepts(&self, token: &Token<'_>, audiences: Option<&[Box<str>]>) -> bool {
        let accepted = audiences.unwrap_or(&self.audiences);
        accepted.is_empty() || token.audiences().any(|said| accepted.iter().any(|known| **known == *bare(said)))
    }

    fn on_time(&self, (not_before, expires): (u64, Option<u64>), now: u64) -> Result<(), Denied> {
        if now.saturating_add(self.clock_skew) < not_before {
            return Err(Denied::NotYetValid);
        }
        if expires.is_some_and(|expires| now > expires.saturating_add(self.clock_skew)) {
            return Err(Denied::Expired);
        }
        Ok(())
    }
}

fn audiences(said: &[String]) -> Box<[Box<str>]> {
    said.iter().map(|audience| bare(audience).into()).collect()
}

fn bare(audience: &str) -> &str {
    let rest = audience.strip_prefix("http://").or_else(|| audience.strip_prefix("https://")).unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

impl Need {
    fn compile(said: &JwtRequirement, names: &[&String]) -> Result<Self, String> {
        let provider = |name: &String| {
            names.iter().position(|known| *known == name).ok_or_else(|| format!("there is no provider {name}"))
        };
        let all = |of: &[JwtRequirement]| of.iter().map(|need| Self::compile(need, names)).collect::<Result<_, _>>();
        Ok(match said {
            JwtRequirement::Provider(name) => Self::Provider(provider(name)?, None),
            JwtRequirement::ProviderAndAudiences(name, accepted) => {
                let own = (!accepted.is_empty()).then(|| audiences(accepted));
                Self::Provider(provider(name)?, own)
            }
            JwtRequirement::Any(of) => {
                let missing = of.contains(&JwtRequirement::AllowMissing);
                let failed = of.contains(&JwtRequirement::AllowMissingOrFailed);
                let lax = |need: &&JwtRequirement| {
                    matches!(need, JwtRequirement::AllowMissing | JwtRequirement::AllowMissingOrFailed)
                };
                let strict: Vec<JwtRequirement> = of.iter().filter(|need| !lax(need)).cloned().collect();
                match (strict.is_empty(), missing, failed) {
                    (true, _, true) => Self::AllowMissingOrFailed,
                    (true, true, false) => Self::AllowMissing,
                    _ => Self::Any { of: all(&strict)?, missing, failed },
                }
            }
            JwtRequirement::All(of) => Self::All(all(of)?),
            JwtRequirement::AllowMissing => Self::AllowMissing,
            JwtRequirement::AllowMissingOrFailed => Self::AllowMissingOrFailed,
        })
    }
}

type Outcome = Result<Vec<Grant>, Denied>;

/// One request being judged.
struct Check<'c, 'r> {
    jwt: &'c Jwt,
    request: &'c RequestView<'r>,
    now: u64,
    cache: &'c mut JwtCache,
    /// Providers that were asked already; an expression may name one several times.
    known: SmallVec<[Option<Outcome>; 2]>,
}

impl Check<'_, '_> {
    fn need(&mut self, need: &Need) -> Outcome {
        match need {
            Need::Provider(index, audiences) => self.provider(*index, audiences.as_deref()),
            Need::All(of) => {
                let mut grants = Vec::new();
                for need in of {
                    grants.extend(self.need(need)?);
                }
                Ok(grants)
            }
            Need::Any { of, missing, failed } => {
                let mut why = Denied::Missing;
                for need in of {
                    match self.need(need) {
                        Ok(grants) => return Ok(grants),
                        Err(denied) => why = worse(why, denied),
                    }
                }
                if *failed || (*missing && why == Denied::Missing) { Ok(Vec::new()) } else { Err(why) }
            }
            Need::AllowMissing => self.lenient(),
            Need::AllowMissingOrFailed => Ok(self.lenient().unwrap_or_default()),
        }
    }

    /// Tokens of any provider; each must be good for one of them.
    fn lenient(&mut self) -> Outcome {
        let mut grants = Vec::new();
        let mut why = Denied::Missing;
        for index in 0..self.jwt.providers.len() {
            match self.provider(index, None) {
                Ok(more) => grants.extend(more),
                Err(denied) => why = worse(why, denied),
            }
        }
        match why {
            Denied::Missing => Ok(grants),
            // Other providers' tokens may stand in the same place.
            Denied::Issuer if !grants.is_empty() => Ok(grants),
            why => Err(why),
        }
    }

    fn provider(&mut self, index: usize, audiences: Option<&[Box<str>]>) -> Outcome {
        if let Some(known) = self.known[index].as_ref().filter(|_| audiences.is_none()) {
            return known.clone();
        }
        let outcome = self.tokens_of(&self.jwt.providers[index], audiences);
        if audiences.is_none() {
            self.known[index] = Some(outcome.clone());
        }
        outcome
    }

    /// All tokens at a provider's places, the last one first.
    fn tokens_of(&mut self, provider: &Provider, audiences: Option<&[Box<str>]>) -> Outcome {
        let found = provider.places.find(self.request);
        if found.is_empty() {
            return Err(Denied::Missing);
        }
        let mut grants = Vec::with_capacity(found.len());
        for (place, token) in found.into_iter().rev() {
            let verified = self.token(provider, &token, audiences)?;
            grants.push(Grant { provider: Arc::clone(&provider.name), place, forward: provider.forward, verified });
        }
        Ok(grants)
    }

    fn token(
        &mut self,
        provider: &Provider,
        text: &str,
        audiences: Option<&[Box<str>]>,
    ) -> Result<Arc<Verified>, Denied> {
        // Audiences of a rule are not the provider's, so what is remembered of it does not answer for them.
        let remembers = audiences.is_none();
        if let Some(known) = remembers.then(|| self.cache.get(provider.id, text)).flatten() {
            provider.on_time((known.not_before, known.expires), self.now)?;
            return Ok(known);
        }
        let token = Token::parse(text)?;
        if !provider.issuer.is_empty() && *provider.issuer != *token.issuer() {
            return Err(Denied::Issuer);
        }
        provider.on_time((token.not_before, token.expires), self.now)?;
        if !provider.accepts(&token, audiences) {
            return Err(Denied::Audience);
        }
        let verdict = provider.keys.as_ref().map_err(|denied| *denied).and_then(|keys| keys.verify(&token));
        if let Err(denied) = verdict {
            self.ask_for_keys(provider, &token, denied);
            return Err(denied);
        }
        let (headers, metadata) = provider.claims.of(&token);
        let verified = Verified { headers, metadata, not_before: token.not_before, expires: token.expires };
        let verified = Arc::new(verified);
        if remembers {
            self.cache.insert(provider.id, text, &verified);
        }
        Ok(verified)
    }

    /// The issuer may sign with a key that it published after we asked. One ring until the answer is there.
    fn ask_for_keys(&self, provider: &Provider, token: &Token<'_>, denied: Denied) {
        let Some(source) = &provider.source else { return };
        let may_be_new = provider.keys.is_err() || denied == Denied::NoSuchKey || token.kid.is_empty();
        if may_be_new && !source.asked.swap(true, Ordering::Relaxed) {
            self.jwt.bell.0.notify_one();
        }
    }
}

/// Which reason is told: "missing" only when nothing else is known, "another issuer" only before better ones.
fn worse(known: Denied, denied: Denied) -> Denied {
    let says_much = !matches!(denied, Denied::Missing | Denied::Issuer);
    if says_much || known == Denied::Missing { denied } else { known }
}

/// Metadata of several tokens in one; `None` where none brings any.
pub fn metadata_of(grants: &[Grant]) -> Option<Arc<Metadata>> {
    let mut all = grants.iter().filter_map(|grant| grant.verified.metadata.as_ref());
    let mut merged = Arc::clone(all.next()?);
    for more in all {
        let into = Arc::make_mut(&mut merged);
        for (filter, said) in more.iter() {
            let at = into.entry(filter.clone()).or_insert_with(|| serde_json::json!({}));
            if let (Some(at), Some(said)) = (at.as_object_mut(), said.as_object()) {
                at.extend(said.iter().map(|(key, value)| (key.clone(), value.clone())));
            }
        }
    }
    Some(merged)
}
