//! istiod's job for one proxy: objects in, [`crate::Model`] out, one file per output.

pub mod authz;
mod authz_rule;
pub mod peer_auth;
mod route_action;
mod route_match;
pub mod trust_domain;
