//! Tokens of a request: the decision is the snapshot's, here it is carried out.

use std::sync::{Arc, PoisonError};
use std::time::SystemTime;

use http::header::{HeaderValue, WWW_AUTHENTICATE};
use http::uri::PathAndQuery;

use super::Env;
use super::head::Head;
use super::reply::Reply;
use crate::error::Kind;
use crate::snapshot::{Denied, Grant, Jwt, Metadata, Place, metadata_of, without_param};

/// Bytes of the path that a refusal repeats.
const REALM_PATH: usize = 256;

/// Judges a request and, if it may pass, makes it what its tokens say: headers added, tokens taken out. The metadata for
/// what comes behind, or the answer.
pub(super) fn check(jwt: &Jwt, head: &mut Head, env: &Env) -> Result<Option<Arc<Metadata>>, Reply> {
    for name in jwt.own_headers() {
        head.headers.remove(name);
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    // Only ever taken on this worker's thread.
    let verdict = jwt.check(&head.view(), now, &mut env.tokens.lock().unwrap_or_else(PoisonError::into_inner));
    let grants = verdict.map_err(|denied| refusal(denied, head))?;
    for grant in &grants {
        for (name, value) in &grant.verified.headers {
            head.headers.append(name, value.clone());
        }
        if !grant.forward {
            take_out(grant, head);
        }
    }
    Ok(metadata_of(&grants))
}

fn take_out(grant: &Grant, head: &mut Head) {
    match &grant.place {
        Place::Header(name) => {
            head.headers.remove(name);
        }
        Place::Param(name) => {
            let path = without_param(head.path.as_str(), name);
            head.path = PathAndQuery::try_from(path).expect("a path of which something was left out");
        }
        // As Envoy: cookies stay.
        Place::Cookie => {}
    }
}

fn refusal(denied: Denied, head: &Head) -> Reply {
    let path = head.path.as_str();
    let path = path.get(..REALM_PATH).unwrap_or(path);
    let error = if denied == Denied::Missing { "" } else { ", error=\"invalid_token\"" };
    let realm = format!("Bearer realm=\"{}://{}{path}\"{error}", head.scheme, head.authority());
    let mut reply = Reply::of(Kind::JwtDenied);
    reply.status = denied.status();
    reply.body = denied.text();
    reply.details = denied.details().into();
    reply.headers.extend(HeaderValue::try_from(realm).ok().map(|realm| (WWW_AUTHENTICATE, realm)));
    reply
}
