//! istiod's job for one proxy: objects in, [`crate::Model`] out, one file per output.

pub mod assemble;
pub mod authz;
pub mod authz_provider;
mod authz_rule;
pub mod clusters;
pub mod destination_rules;
#[cfg(test)]
mod fixture;
mod hosts;
mod http;
pub mod inbound;
pub mod jwt;
pub mod listener;
mod outbound_chain;
pub mod peer_auth;
pub mod policies;
pub mod route;
mod route_action;
mod route_match;
pub mod settings;
mod tls;
pub mod tracing;
pub mod trust_domain;
pub mod view;
mod virtual_host;
pub mod virtual_service_check;
pub mod virtual_services;
