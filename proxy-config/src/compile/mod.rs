//! istiod's job for one proxy: objects in, [`crate::Model`] out, one file per output.

pub mod assemble;
pub mod authz;
pub mod authz_provider;
mod authz_rule;
mod cluster_inbound;
mod cluster_outbound;
mod cluster_policy;
mod cluster_tls;
pub mod clusters;
pub mod destination_rule_check;
pub mod destination_rules;
mod endpoints;
#[cfg(test)]
mod fixture;
pub(crate) mod hosts;
mod http;
pub mod inbound;
pub mod jwt;
pub mod listener;
mod locality;
mod networks;
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
