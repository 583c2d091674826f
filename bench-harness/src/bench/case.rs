//! What is measured: the cases, and what they have in common.

/// The caller's address.
pub(super) const A: &str = "10.1.0.9";
/// The service's address.
pub(super) const B: &str = "10.1.0.2";
/// Where the service listens.
pub(super) const PORT: u16 = 8080;
/// Virtual hosts on the caller's side.
pub(super) const HOSTS: usize = 20;
/// Who may call.
pub(super) const PRINCIPAL: &str = "cluster.local/ns/frontend/sa/frontend-sa";
/// Who is called.
pub(super) const SERVER: &str = "cluster.local/ns/apps/sa/payment-sa";

/// One case.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case {
    /// Name in the table.
    pub(super) name: &'static str,
    /// The measured proxy of `b` takes mutual TLS only.
    pub(super) mtls: bool,
    /// A proxy beside the caller as well.
    pub(super) pair: bool,
    /// HTTP/2 between the two.
    pub(super) h2_inside: bool,
    /// Also without a proxy.
    pub(super) direct: bool,
}

/// All cases.
pub(super) const CASES: [Case; 4] = [
    Case { name: "h1-sidecar", mtls: false, pair: false, h2_inside: false, direct: true },
    Case { name: "mtls-sidecar", mtls: true, pair: false, h2_inside: false, direct: false },
    Case { name: "pair-sidecar-h1", mtls: true, pair: true, h2_inside: false, direct: false },
    Case { name: "pair-sidecar-h2", mtls: true, pair: true, h2_inside: true, direct: false },
];

/// One ALLOW policy.
#[derive(Debug)]
pub(super) struct Rule {
    /// Method.
    pub(super) method: Option<&'static str>,
    /// Paths; a star at the end is a prefix.
    pub(super) paths: &'static [&'static str],
    /// Range of source addresses.
    pub(super) block: Option<&'static str>,
    /// Header and value.
    pub(super) header: Option<(&'static str, &'static str)>,
}

/// Five policies; the load's requests meet the last one.
pub(super) const RULES: [Rule; 5] = [
    Rule { method: Some("GET"), paths: &["/admin*"], block: None, header: Some(("x-role", "admin")) },
    Rule { method: None, paths: &["/internal/*"], block: Some("192.168.0.0/16"), header: None },
    Rule { method: None, paths: &["/health", "/ready"], block: None, header: None },
    Rule { method: Some("POST"), paths: &["/api/v1/*"], block: None, header: None },
    Rule { method: Some("GET"), paths: &["/api/v2/*"], block: None, header: Some(("x-tenant", "bench")) },
];

/// Name of a virtual host; `b` is reached by any.
pub(super) fn host(n: usize) -> String {
    format!("svc-{n}.apps.svc.cluster.local")
}

/// The service's virtual address.
pub(super) fn vip(n: usize) -> String {
    format!("10.96.0.{}", 10 + n)
}
