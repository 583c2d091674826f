//! The rules, as pure data: settings in, rules of one address family out, and the text for `iptables-restore`.
//!
//! Names of chains are a contract: other tools look for `ISTIO_*`.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::settings::Settings;

const INBOUND: &str = "ISTIO_INBOUND";
const OUTPUT: &str = "ISTIO_OUTPUT";
const OUTPUT_DNS: &str = "ISTIO_OUTPUT_DNS";
const REDIRECT: &str = "ISTIO_REDIRECT";
const IN_REDIRECT: &str = "ISTIO_IN_REDIRECT";
const DIVERT: &str = "ISTIO_DIVERT";
const TPROXY: &str = "ISTIO_TPROXY";
const DROP: &str = "ISTIO_DROP";
/// Where the agent's DNS proxy listens.
const DNS_PORT: &str = "15053";
/// Mark of packets from the proxy to the application's own address (TPROXY).
const OUTBOUND_MARK: &str = "1338";

/// An address family; each has its own tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Source address of the proxy's connections to the application.
    pub fn passthrough_source(self) -> &'static str {
        match self {
            Self::V4 => "127.0.0.6/32",
            Self::V6 => "::6/128",
        }
    }

    /// Whether a CIDR or address is of this family.
    pub fn owns(self, cidr: &str) -> bool {
        cidr.contains(':') == (self == Self::V6)
    }

    fn host(self, address: &str) -> String {
        match self {
            Self::V4 => format!("{address}/32"),
            Self::V6 => format!("{address}/128"),
        }
    }
}

/// A kernel table. The order is the order of the restore text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Table {
    /// Marks and TPROXY.
    Mangle,
    /// Redirection.
    Nat,
    /// Connection-tracking zones.
    Raw,
}

impl Table {
    /// The kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mangle => "mangle",
            Self::Nat => "nat",
            Self::Raw => "raw",
        }
    }
}

/// One rule in one chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The table.
    pub table: Table,
    /// The chain, built-in or ours.
    pub chain: String,
    /// Inserted at this position (from 1); `None` appends.
    pub position: Option<u32>,
    /// Match and target, one argument each.
    pub args: Vec<String>,
}

impl Rule {
    /// Whether the chain is one of ours.
    pub fn in_own_chain(&self) -> bool {
        is_ours(&self.chain)
    }
}

/// Whether a chain name is one of ours.
pub fn is_ours(chain: &str) -> bool {
    chain.starts_with("ISTIO_")
}

/// All rules of a family, in the order in which they are made.
pub fn rules(settings: &Settings, family: Family) -> Vec<Rule> {
    let mut made = Maker { settings, family, rules: Vec::new() };
    made.drop_invalid();
    made.interfaces();
    made.redirect_chains();
    made.inbound();
    made.outbound();
    made.tproxy_marks();
    made.rules
}

/// The text for `iptables-restore --noflush`: one block for each table, new chains first.
pub fn restore_text(rules: &[Rule]) -> String {
    blocks(&bodies(rules))
}

/// For each table the lines that make its chains and rules.
pub(super) fn bodies(rules: &[Rule]) -> BTreeMap<&'static str, String> {
    let mut tables: BTreeMap<Table, Vec<&Rule>> = BTreeMap::new();
    for rule in rules {
        tables.entry(rule.table).or_default().push(rule);
    }
    tables.into_iter().map(|(table, rules)| (table.name(), body(&rules))).collect()
}

fn body(rules: &[&Rule]) -> String {
    let mut chains: Vec<&str> = Vec::new();
    let mut lines = String::new();
    for rule in rules {
        if rule.in_own_chain() && !chains.contains(&&*rule.chain) {
            chains.push(&rule.chain);
        }
        let written = match rule.position {
            None => writeln!(lines, "-A {} {}", rule.chain, rule.args.join(" ")),
            Some(at) => writeln!(lines, "-I {} {at} {}", rule.chain, rule.args.join(" ")),
        };
        written.expect("writing to a string cannot fail");
    }
    let new: String = chains.iter().map(|chain| format!("-N {chain}\n")).collect();
    new + &lines
}

/// One transaction for each table.
pub(super) fn blocks(bodies: &BTreeMap<&'static str, String>) -> String {
    bodies.iter().map(|(table, body)| format!("* {table}\n{body}COMMIT\n")).collect()
}

struct Maker<'a> {
    settings: &'a Settings,
    family: Family,
    rules: Vec<Rule>,
}

impl Maker<'_> {
    /// `args` is split at blanks: no argument of ours holds one.
    fn add(&mut self, table: Table, chain: &str, args: &str) {
        self.push(table, chain, None, args);
    }

    fn insert(&mut self, table: Table, chain: &str, position: u32, args: &str) {
        self.push(table, chain, Some(position), args);
    }

    fn push(&mut self, table: Table, chain: &str, position: Option<u32>, args: &str) {
        let args = args.split_ascii_whitespace().map(str::to_owned).collect();
        self.rules.push(Rule { table, chain: chain.to_owned(), position, args });
    }

    fn loopback(&self) -> String {
        match self.family {
            Family::V4 => self.settings.loopback_cidr.clone(),
            Family::V6 => "::1/128".to_owned(),
        }
    }

    fn drop_invalid(&mut self) {
        if self.settings.drop_invalid {
            self.add(Table::Mangle, "PREROUTING", &format!("-m conntrack --ctstate INVALID -j {DROP}"));
            self.add(Table::Mangle, DROP, "-j DROP");
        }
    }

    fn interfaces(&mut self) {
        let tables: &[Table] = if self.settings.tproxy { &[Table::Nat, Table::Mangle] } else { &[Table::Nat] };
        for interface in &self.settings.exclude_interfaces {
            for table in tables {
                self.add(*table, "PREROUTING", &format!("-i {interface} -j RETURN"));
                self.add(*table, "OUTPUT", &format!("-o {interface} -j RETURN"));
            }
        }
        for interface in &self.settings.virtual_interfaces {
            self.insert(Table::Nat, "PREROUTING", 1, &format!("-i {interface} -j RETURN"));
        }
    }

    fn redirect_chains(&mut self) {
        let said = self.settings;
        self.add(Table::Nat, INBOUND, &format!("-p tcp --dport {} -j RETURN", said.tunnel_port));
        self.add(Table::Nat, REDIRECT, &format!("-p tcp -j REDIRECT --to-ports {}", said.proxy_port));
        self.add(Table::Nat, IN_REDIRECT, &format!("-p tcp -j REDIRECT --to-ports {}", said.inbound_port));
    }

    fn inbound(&mut self) {
        let said = self.settings;
        if said.inbound_ports.is_empty() {
            return;
        }
        let table = if said.tproxy { Table::Mangle } else { Table::Nat };
        if said.tproxy {
            let (mark, loopback) = (&said.tproxy_mark, self.loopback());
            self.add(Table::Mangle, DIVERT, &format!("-j MARK --set-mark {mark}"));
            self.add(Table::Mangle, DIVERT, "-j ACCEPT");
            let to = format!("--tproxy-mark {mark}/0xffffffff --on-port {}", said.inbound_port);
            self.add(Table::Mangle, TPROXY, &format!("! -d {loopback} -p tcp -j TPROXY {to}"));
        }
        self.add(table, "PREROUTING", &format!("-p tcp -j {INBOUND}"));
        if said.inbound_ports.iter().any(|port| port == "*") {
            for port in &said.inbound_ports_exclude {
                self.add(table, INBOUND, &format!("-p tcp --dport {port} -j RETURN"));
            }
            self.capture_inbound("-p tcp");
            return;
        }
        for port in &said.inbound_ports {
            self.capture_inbound(&format!("-p tcp --dport {port}"));
        }
    }

    /// Established connections are diverted to their socket, new ones to the proxy.
    fn capture_inbound(&mut self, matches: &str) {
        if !self.settings.tproxy {
            self.add(Table::Nat, INBOUND, &format!("{matches} -j {IN_REDIRECT}"));
            return;
        }
        let established = "-m conntrack --ctstate RELATED,ESTABLISHED";
        self.add(Table::Mangle, INBOUND, &format!("{matches} {established} -j {DIVERT}"));
        self.add(Table::Mangle, INBOUND, &format!("{matches} -j {TPROXY}"));
    }

    fn outbound(&mut self) {
        let said = self.settings;
        self.add(Table::Nat, "OUTPUT", &format!("-j {OUTPUT}"));
        for port in &said.outbound_ports_exclude {
            self.add(Table::Nat, OUTPUT, &format!("-p tcp --dport {port} -j RETURN"));
            self.add(Table::Nat, OUTPUT, &format!("-p udp --dport {port} -j RETURN"));
        }
        let source = self.family.passthrough_source();
        self.add(Table::Nat, OUTPUT, &format!("-o lo -s {source} -j RETURN"));
        self.proxy_traffic();
        self.owner_groups();
        if said.redirect_dns {
            self.dns();
        }
        let loopback = self.loopback();
        self.add(Table::Nat, OUTPUT, &format!("-d {loopback} -j RETURN"));
        let family = self.family;
        for cidr in said.outbound_cidrs_exclude.iter().filter(|cidr| family.owns(cidr)) {
            self.add(Table::Nat, OUTPUT, &format!("-d {cidr} -j RETURN"));
        }
        for port in &said.outbound_ports {
            self.add(Table::Nat, OUTPUT, &format!("-p tcp --dport {port} -j {REDIRECT}"));
        }
        self.outbound_cidrs();
    }

    /// For each user and group of the proxy: its calls to the workload's own address go through the inbound side, the
    /// application's calls to itself stay local, everything else of the proxy leaves unhindered.
    fn proxy_traffic(&mut self) {
        let said = self.settings;
        let (dns, loopback, tunnel) = (said.redirect_dns, self.loopback(), &said.tunnel_port);
        let owners = said.proxy_uids.iter().map(|id| ("uid", id)).chain(said.proxy_gids.iter().map(|id| ("gid", id)));
        for (kind, id) in owners {
            // DNS of the proxy's user must not loop back to it; the group rule never made that exception.
            let ports = if dns && kind == "uid" {
                format!("-m multiport ! --dports 53,{tunnel}")
            } else {
                format!("! --dport {tunnel}")
            };
            let owner = format!("-m owner --{kind}-owner {id}");
            self.add(Table::Nat, OUTPUT, &format!("-o lo ! -d {loopback} -p tcp {ports} {owner} -j {IN_REDIRECT}"));
            if !said.captures_loopback() {
                let ports = if dns { "-p tcp ! --dport 53 " } else { "" };
                self.add(Table::Nat, OUTPUT, &format!("-o lo {ports}-m owner ! --{kind}-owner {id} -j RETURN"));
            }
            self.add(Table::Nat, OUTPUT, &format!("{owner} -j RETURN"));
        }
    }

    fn owner_groups(&mut self) {
        let said = self.settings;
        if said.owner_groups.iter().any(|group| group == "*") {
            for group in &said.owner_groups_exclude {
                self.add(Table::Nat, OUTPUT, &format!("-m owner --gid-owner {group} -j RETURN"));
            }
            return;
        }
        if said.owner_groups.is_empty() {
            return;
        }
        let none: String = said.owner_groups.iter().map(|group| format!("-m owner ! --gid-owner {group} ")).collect();
        self.add(Table::Nat, OUTPUT, &format!("{none}-j RETURN"));
    }

    fn outbound_cidrs(&mut self) {
        let said = self.settings;
        if said.outbound_cidrs.iter().any(|cidr| cidr == "*") {
            self.add(Table::Nat, OUTPUT, &format!("-j {REDIRECT}"));
            for interface in &said.virtual_interfaces {
                self.insert(Table::Nat, "PREROUTING", 1, &format!("-i {interface} -j {REDIRECT}"));
            }
            return;
        }
        let family = self.family;
        for cidr in said.outbound_cidrs.iter().filter(|cidr| family.owns(cidr)) {
            for interface in &said.virtual_interfaces {
                self.insert(Table::Nat, "PREROUTING", 1, &format!("-i {interface} -d {cidr} -j {REDIRECT}"));
            }
            self.add(Table::Nat, OUTPUT, &format!("-d {cidr} -j {REDIRECT}"));
        }
    }

    /// DNS to the agent. Its own queries and the application's need different conntrack zones: both may use the same
    /// source port towards the same server.
    fn dns(&mut self) {
        let said = self.settings;
        let servers: Vec<String> =
            said.dns_servers.iter().filter(|s| self.family.owns(s)).map(|s| self.family.host(s)).collect();
        let to = |flag: &str, matches: &[String]| -> Vec<String> {
            let all = [String::new()];
            let of = if said.capture_all_dns { &all[..] } else { matches };
            of.iter().map(|m| if m.is_empty() { String::new() } else { format!("{flag} {m} ") }).collect()
        };
        let (destinations, sources) = (to("-d", &servers), to("-s", &servers));
        if !destinations.is_empty() {
            self.add(Table::Nat, OUTPUT, &format!("-j {OUTPUT_DNS}"));
        }
        for d in &destinations {
            let rule = format!("-p tcp --dport 53 {d}-j REDIRECT --to-ports {DNS_PORT}");
            self.add(Table::Nat, OUTPUT_DNS, &rule);
        }
        for d in &destinations {
            let rule = format!("-p udp --dport 53 {d}-j REDIRECT --to-port {DNS_PORT}");
            self.add(Table::Nat, OUTPUT_DNS, &rule);
        }
        self.add(Table::Raw, "OUTPUT", &format!("-j {OUTPUT_DNS}"));
        let owners = said.proxy_uids.iter().map(|id| ("uid", id)).chain(said.proxy_gids.iter().map(|id| ("gid", id)));
        for (kind, id) in owners {
            let owner = format!("-m owner --{kind}-owner {id}");
            self.add(Table::Raw, OUTPUT_DNS, &format!("-p udp --dport 53 {owner} -j CT --zone 1"));
            self.add(Table::Raw, OUTPUT_DNS, &format!("-p udp --sport {DNS_PORT} {owner} -j CT --zone 2"));
        }
        if !destinations.is_empty() {
            self.add(Table::Raw, "PREROUTING", &format!("-j {INBOUND}"));
        }
        for (d, s) in destinations.iter().zip(&sources) {
            self.add(Table::Raw, OUTPUT_DNS, &format!("-p udp --dport 53 {d}-j CT --zone 2"));
            self.add(Table::Raw, INBOUND, &format!("-p udp --sport 53 {s}-j CT --zone 1"));
        }
    }

    /// What keeps TPROXY from catching the proxy's own packets.
    fn tproxy_marks(&mut self) {
        let said = self.settings;
        if !said.tproxy {
            return;
        }
        let (mark, loopback, source) = (&said.tproxy_mark, self.loopback(), self.family.passthrough_source());
        let table = Table::Mangle;
        self.add(table, "PREROUTING", &format!("-p tcp -m mark --mark {mark} -j CONNMARK --save-mark"));
        self.add(table, "OUTPUT", &format!("-p tcp -o lo -m mark --mark {mark} -j RETURN"));
        let owners = said.proxy_uids.iter().map(|id| ("uid", id)).chain(said.proxy_gids.iter().map(|id| ("gid", id)));
        for (kind, id) in owners {
            let set = format!("-m owner --{kind}-owner {id} -j MARK --set-mark {OUTBOUND_MARK}");
            self.add(table, "OUTPUT", &format!("! -d {loopback} -p tcp -o lo {set}"));
        }
        self.add(table, "OUTPUT", &format!("-p tcp -m connmark --mark {mark} -j CONNMARK --restore-mark"));
        self.insert(table, INBOUND, 1, &format!("-p tcp -m mark --mark {mark} -j RETURN"));
        self.insert(table, INBOUND, 2, &format!("-p tcp -s {source} -i lo -j RETURN"));
        self.insert(table, INBOUND, 3, &format!("-p tcp -i lo -m mark ! --mark {OUTBOUND_MARK} -j RETURN"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(change: impl FnOnce(&mut Settings), family: Family) -> String {
        let mut settings = Settings::default();
        change(&mut settings);
        restore_text(&rules(&settings, family))
    }

    #[test]
    fn a_pod_with_everything_captured() {
        let made = text(
            |s| {
                s.inbound_ports = vec!["*".to_owned()];
                s.inbound_ports_exclude = vec!["15090".to_owned()];
                s.outbound_cidrs = vec!["*".to_owned()];
                s.outbound_ports_exclude = vec!["5000".to_owned()];
            },
            Family::V4,
        );
        let expected = "\
* nat
-N ISTIO_INBOUND
-N ISTIO_REDIRECT
-N ISTIO_IN_REDIRECT
-N ISTIO_OUTPUT
-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A ISTIO_INBOUND -p tcp --dport 15090 -j RETURN
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A OUTPUT -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -p tcp --dport 5000 -j RETURN
-A ISTIO_OUTPUT -p udp --dport 5000 -j RETURN
-A ISTIO_OUTPUT -o lo -s 127.0.0.6/32 -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
COMMIT
";
        assert_eq!(made, expected);
    }

    #[test]
    fn lists_go_to_the_family_that_owns_them() {
        let change = |s: &mut Settings| {
            s.outbound_cidrs = vec!["9.9.0.0/16".to_owned(), "2001:db8::/32".to_owned()];
            s.outbound_cidrs_exclude = vec!["1.1.0.0/16".to_owned()];
        };
        let (v4, v6) = (text(change, Family::V4), text(change, Family::V6));
        assert!(v4.contains("-d 9.9.0.0/16 -j ISTIO_REDIRECT") && v4.contains("-d 1.1.0.0/16 -j RETURN"));
        assert!(!v4.contains("2001:db8") && !v6.contains("9.9.0.0") && !v6.contains("1.1.0.0"));
        assert!(v6.contains("-d 2001:db8::/32 -j ISTIO_REDIRECT") && v6.contains("-s ::6/128"));
    }

    #[test]
    fn dns_capture_needs_servers_or_all_of_it() {
        let some = text(
            |s| {
                s.redirect_dns = true;
                s.dns_servers = vec!["127.0.0.53".to_owned()];
            },
            Family::V4,
        );
        assert!(some.contains("-A ISTIO_OUTPUT_DNS -p udp --dport 53 -d 127.0.0.53/32 -j REDIRECT --to-port 15053"));
        assert!(some.contains("* raw\n-N ISTIO_OUTPUT_DNS\n-N ISTIO_INBOUND\n"));
        let all = text(
            |s| {
                s.redirect_dns = true;
                s.capture_all_dns = true;
            },
            Family::V6,
        );
        assert!(all.contains("-A ISTIO_OUTPUT_DNS -p tcp --dport 53 -j REDIRECT --to-ports 15053"));
        assert!(all.contains("-A ISTIO_INBOUND -p udp --sport 53 -j CT --zone 1"));
    }

    #[test]
    fn tables_come_sorted_and_tproxy_leaves_redirection_to_outbound() {
        let made = text(
            |s| {
                s.tproxy = true;
                s.inbound_ports = vec!["80".to_owned()];
            },
            Family::V4,
        );
        let (mangle, nat) = made.split_once("* nat").unwrap();
        assert!(mangle.starts_with("* mangle\n-N ISTIO_DIVERT\n-N ISTIO_TPROXY\n-N ISTIO_INBOUND\n"));
        assert!(mangle.contains("-I ISTIO_INBOUND 3 -p tcp -i lo -m mark ! --mark 1338 -j RETURN"));
        assert!(!nat.contains("PREROUTING"));
    }
}
