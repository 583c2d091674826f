//! Redirects a workload's traffic to the proxy, as `pilot-agent istio-iptables` does: same flags, same variables, same
//! chains. What rules there are is decided in `rules`, purely; `apply` asks the kernel what it holds and changes it in
//! one transaction for each address family.

pub mod apply;
pub mod rules;
mod saved;
mod settings;

pub use settings::{Host, IptablesArgs, Settings};
