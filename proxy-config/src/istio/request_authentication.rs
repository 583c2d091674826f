//! `RequestAuthentication` (`security.istio.io`).

use serde::Deserialize;

use super::common::{IstioDuration, Selector, TargetRef};

/// Which tokens the selected workloads verify.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RequestAuthentication {
    /// Workloads; absent selects the whole namespace.
    pub selector: Option<Selector>,
    /// Gateway-style attachment: such an object never applies to a sidecar.
    pub target_ref: Option<TargetRef>,
    /// Gateway-style attachment: such an object never applies to a sidecar.
    pub target_refs: Vec<TargetRef>,
    /// One for each issuer.
    pub jwt_rules: Vec<JwtRule>,
}

/// `JWTRule`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JwtRule {
    /// `iss`; empty accepts any.
    pub issuer: String,
    /// Accepted `aud`; empty accepts any.
    pub audiences: Vec<String>,
    /// Where the keys are.
    #[serde(alias = "jwks_uri")]
    pub jwks_uri: String,
    /// The keys themselves.
    pub jwks: String,
    /// Headers that carry the token.
    pub from_headers: Vec<JwtHeader>,
    /// Query parameters that carry the token.
    pub from_params: Vec<String>,
    /// Cookies that carry the token.
    pub from_cookies: Vec<String>,
    /// Header that gets the payload.
    pub output_payload_to_header: String,
    /// The token stays in the request.
    pub forward_original_token: bool,
    /// Headers that get claims.
    pub output_claim_to_headers: Vec<ClaimToHeader>,
    /// Limit on fetching the keys.
    pub timeout: Option<IstioDuration>,
    /// Claims that hold several words.
    pub space_delimited_claims: Vec<String>,
}

/// `JWTHeader`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct JwtHeader {
    /// Header name.
    pub name: String,
    /// Text before the token.
    pub prefix: String,
}

/// `ClaimToHeader`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClaimToHeader {
    /// Header name.
    pub header: String,
    /// Claim, dots descend.
    pub claim: String,
}
