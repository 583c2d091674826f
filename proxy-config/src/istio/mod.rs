//! Istio kinds as they are written, one file a kind.

pub mod authorization_policy;
pub mod common;
pub mod mesh_config;
pub mod peer_authentication;
pub mod proxy_config;
pub mod request_authentication;
pub mod virtual_service;
