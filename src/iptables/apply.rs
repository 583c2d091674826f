//! Asks the kernel what it holds and brings it to what the rules say, one transaction for each family.
//!
//! Rules live in one of two kernels' worth of tables, `legacy` and `nft`. The one that holds rules is used, so that ours
//! and everybody else's meet; an empty table that a mere look has created does not count.

use std::io::Write;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::rules::{Family, Rule, is_ours, restore_text, rules};
use super::saved::{Saved, transaction};
use super::settings::{Host, IptablesArgs, Settings};

/// How long to wait for somebody else's transaction.
const WAIT: &str = "--wait=30";

/// Does what the arguments say. `env` reads a variable; the house reads them in `main` only.
pub fn run(args: &IptablesArgs, env: &dyn Fn(&str) -> Option<String>) -> Result<()> {
    let user = env("ENVOY_USER").unwrap_or_else(|| "istio-proxy".to_owned());
    let settings = Settings::resolve(args, env, &host(&user)?).map_err(|e| anyhow!(e))?;
    for warning in &settings.warnings {
        eprintln!("warning: {warning}");
    }
    if settings.dry_run {
        print!("{}", dry_run(&settings));
        return Ok(());
    }
    if settings.cleanup_only {
        return cleanup(&settings);
    }
    if !settings.skip_rule_apply {
        apply(&settings)?;
    }
    Ok(())
}

/// Families that get rules.
fn families(settings: &Settings) -> &'static [Family] {
    if settings.ipv6 { &[Family::V4, Family::V6] } else { &[Family::V4] }
}

/// The restore texts, as they would be applied.
pub fn dry_run(settings: &Settings) -> String {
    families(settings).iter().map(|family| restore_text(&rules(settings, *family))).collect()
}

fn apply(settings: &Settings) -> Result<()> {
    let backend = Backend::choose(settings.force_binary.as_deref())?;
    for &family in families(settings) {
        let wanted = rules(settings, family);
        let saved = backend.saved(family)?;
        let residue = saved.has_our_chains();
        if residue && !settings.force_apply && backend.holds(family, &saved, &wanted) {
            continue;
        }
        ensure!(
            !residue || settings.reconcile || settings.force_apply,
            "other ISTIO_ rules are there ({}); --reconcile replaces them, --cleanup-only removes them",
            saved.our_chains().join(", "),
        );
        let stray = if residue { backend.stray(family, &wanted) } else { Vec::new() };
        backend.restore(family, &transaction(&saved, &stray, &wanted))?;
        let after = backend.saved(family)?;
        ensure!(backend.holds(family, &after, &wanted), "the kernel does not hold the rules that it accepted");
    }
    if settings.ipv6 {
        ip(&["-6", "addr", "replace", "::6/128", "dev", "lo"])?;
    }
    if settings.tproxy {
        add_routes(settings)?;
    }
    Ok(())
}

/// Removes what is ours from every backend, whichever flags made it, and nothing else.
fn cleanup(settings: &Settings) -> Result<()> {
    for backend in Backend::installed() {
        for family in [Family::V4, Family::V6] {
            // A family that the kernel does not have holds nothing.
            let Ok(saved) = backend.saved(family) else { continue };
            if !saved.has_our_chains() {
                continue;
            }
            let stray = backend.stray(family, &rules(settings, family));
            backend.restore(family, &transaction(&saved, &stray, &[]))?;
        }
    }
    remove_routes(settings);
    Ok(())
}

/// One implementation of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Backend {
    /// `-nft`, `-legacy` or nothing for a system that has only one.
    suffix: &'static str,
}

impl Backend {
    const NFT: Self = Self { suffix: "-nft" };
    const LEGACY: Self = Self { suffix: "-legacy" };
    const PLAIN: Self = Self { suffix: "" };

    fn installed() -> Vec<Self> {
        let named: Vec<Self> = [Self::NFT, Self::LEGACY].into_iter().filter(Self::works).collect();
        if named.is_empty() { [Self::PLAIN].into_iter().filter(Self::works).collect() } else { named }
    }

    fn choose(forced: Option<&str>) -> Result<Self> {
        match forced {
            Some("nft") => return Ok(Self::NFT),
            Some("legacy") => return Ok(Self::LEGACY),
            Some("") | None => {}
            Some(other) => bail!("--force-iptables-binary: {other:?} is neither legacy nor nft"),
        }
        let installed = Self::installed();
        let holding = installed.iter().find(|backend| backend.has_rules());
        let chosen = holding.or_else(|| installed.first());
        chosen.copied().ok_or_else(|| anyhow!("no usable iptables; install iptables (its -save and -restore too)"))
    }

    fn works(&self) -> bool {
        self.saved(Family::V4).is_ok()
    }

    fn has_rules(&self) -> bool {
        [Family::V4, Family::V6].iter().any(|family| self.saved(*family).is_ok_and(|saved| saved.has_rules()))
    }

    fn program(&self, family: Family, tool: &str) -> String {
        let base = if family == Family::V4 { "iptables" } else { "ip6tables" };
        format!("{base}{}{tool}", self.suffix)
    }

    fn saved(&self, family: Family) -> Result<Saved> {
        let output = output(&self.program(family, "-save"), &[])?;
        Ok(Saved::parse(&output))
    }

    fn restore(&self, family: Family, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        feed(&self.program(family, "-restore"), &["--noflush", WAIT], text)
            .with_context(|| format!("these rules were refused:\n{text}"))
    }

    /// Whether exactly these rules are in our chains and these among the others. Order is not compared: the kernel
    /// prints rules in its own words, so each is asked for by `-C`.
    fn holds(&self, family: Family, saved: &Saved, wanted: &[Rule]) -> bool {
        saved.counts_match(wanted) && wanted.iter().all(|rule| self.has(family, rule))
    }

    fn has(&self, family: Family, rule: &Rule) -> bool {
        let mut args = vec![WAIT, "-t", rule.table.name(), "-C", &rule.chain];
        args.extend(rule.args.iter().map(String::as_str));
        output(&self.program(family, ""), &args).is_ok()
    }

    /// Rules of these settings in built-in chains that do not jump to a chain of ours, as far as they are there.
    fn stray(&self, family: Family, wanted: &[Rule]) -> Vec<Rule> {
        let mut found: Vec<Rule> = Vec::new();
        for rule in wanted {
            let jumps_to_us = rule.args.iter().any(|arg| is_ours(arg));
            if !rule.in_own_chain() && !jumps_to_us && !found.contains(rule) && self.has(family, rule) {
                found.push(rule.clone());
            }
        }
        found
    }
}

/// Marked packets of TPROXY are delivered locally. Asked for first: the kernel would keep every duplicate.
fn add_routes(settings: &Settings) -> Result<()> {
    for (family, everything) in routed(settings) {
        let rule = [family, "rule", "list", "fwmark", &settings.tproxy_mark, "lookup", &settings.tproxy_route_table];
        if output("ip", &rule).map_or(true, |found| found.trim().is_empty()) {
            ip(&[family, "rule", "add", "fwmark", &settings.tproxy_mark, "lookup", &settings.tproxy_route_table])?;
        }
        ip(&[family, "route", "replace", "local", everything, "dev", "lo", "table", &settings.tproxy_route_table])?;
    }
    Ok(())
}

/// What is not there cannot be removed, and that is as good.
fn remove_routes(settings: &Settings) {
    if !settings.tproxy {
        return;
    }
    for (family, everything) in routed(settings) {
        let _ = ip(&[family, "rule", "del", "fwmark", &settings.tproxy_mark, "lookup", &settings.tproxy_route_table]);
        let _ = ip(&[family, "route", "del", "local", everything, "dev", "lo", "table", &settings.tproxy_route_table]);
    }
}

fn routed(settings: &Settings) -> impl Iterator<Item = (&'static str, &'static str)> {
    families(settings).iter().map(|family| match family {
        Family::V4 => ("-4", "0.0.0.0/0"),
        Family::V6 => ("-6", "::/0"),
    })
}

/// The facts that decide about rules.
fn host(user: &str) -> Result<Host> {
    let addresses = output("ip", &["-o", "addr", "show", "up"])?;
    // A host without these files has neither resolvers nor users.
    let resolv = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    Ok(Host { addresses: usable(&addresses), dns_servers: resolvers(&resolv), proxy_uid: uid_of(&passwd, user) })
}

/// Addresses in the output of `ip -o addr`, without loopback and link-local ones.
fn usable(listing: &str) -> Vec<IpAddr> {
    let address = |line: &str| -> Option<IpAddr> {
        let mut words = line.split_ascii_whitespace().skip_while(|word| !matches!(*word, "inet" | "inet6"));
        words.nth(1)?.split('/').next()?.parse().ok()
    };
    let link_local = |ip: &IpAddr| match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    listing.lines().filter_map(address).filter(|ip| !ip.is_loopback() && !link_local(ip)).collect()
}

fn resolvers(resolv_conf: &str) -> Vec<String> {
    let server = |line: &str| -> Option<String> {
        let rest = line.trim().strip_prefix("nameserver")?;
        let address = rest.trim().split('%').next()?;
        (rest.starts_with(char::is_whitespace) && address.parse::<IpAddr>().is_ok()).then(|| address.to_owned())
    };
    resolv_conf.lines().filter_map(server).collect()
}

fn uid_of(passwd: &str, user: &str) -> Option<u32> {
    let mut fields = passwd.lines().map(|line| line.split(':'));
    fields.find_map(|mut f| (f.next() == Some(user)).then(|| f.nth(1)?.parse().ok())?)
}

fn ip(args: &[&str]) -> Result<()> {
    output("ip", args).map(drop)
}

fn output(program: &str, args: &[&str]) -> Result<String> {
    let done = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program} cannot be run"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{program} {}: {}", args.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn feed(program: &str, args: &[&str], text: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("{program} cannot be run"))?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    // A program that stops reading has an error to tell, which is the better message.
    let _ = stdin.write_all(text.as_bytes());
    drop(stdin);
    let done = child.wait_with_output()?;
    ensure!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_count() {
        let listing = "1: lo    inet 127.0.0.1/8 scope host lo\\ valid_lft forever\n\
            2: eth0    inet 10.0.1.5/24 brd 10.0.1.255 scope global eth0\\ valid_lft forever\n\
            2: eth0    inet6 fe80::1/64 scope link \\ valid_lft forever\n\
            2: eth0    inet6 2001:db8::5/64 scope global \\ valid_lft forever\n";
        let expected: Vec<IpAddr> = vec!["10.0.1.5".parse().unwrap(), "2001:db8::5".parse().unwrap()];
        assert_eq!(usable(listing), expected);
    }

    #[test]
    fn resolvers_and_users() {
        let servers = resolvers("search a\nnameserver 10.0.0.10\n nameserver\tfe80::1%eth0\nnameserverx 1.1.1.1\n");
        assert_eq!(servers, ["10.0.0.10", "fe80::1"]);
        let passwd = "root:x:0:0::/:/bin/sh\nistio-proxy:x:1998:1998::/:/bin/false\n";
        assert_eq!(uid_of(passwd, "istio-proxy"), Some(1998));
        assert_eq!(uid_of(passwd, "nobody"), None);
    }

    fn all_captured(words: &[(&str, &str)]) -> Settings {
        let env = |name: &str| {
            let all = [("ISTIO_INBOUND_PORTS", "*"), ("ISTIO_SERVICE_CIDR", "*")];
            words.iter().chain(&all).find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())
        };
        let host = Host { addresses: vec![IpAddr::from([10, 0, 0, 1])], ..Host::default() };
        Settings::resolve(&IptablesArgs::default(), &env, &host).unwrap()
    }

    /// Run it with `unshare -n`.
    #[test]
    #[ignore = "needs root, iptables and a network namespace of its own"]
    fn the_kernel_takes_keeps_and_loses_the_rules() {
        let first = all_captured(&[]);
        apply(&first).unwrap();
        apply(&first).unwrap();
        let other = all_captured(&[("PROXY_UID", "7")]);
        assert!(apply(&other).unwrap_err().to_string().contains("--reconcile"));
        apply(&Settings { reconcile: true, ..other.clone() }).unwrap();
        let tproxy = all_captured(&[("ISTIO_INBOUND_INTERCEPTION_MODE", "TPROXY"), ("RECONCILE", "true")]);
        apply(&tproxy).unwrap();
        let backend = Backend::choose(None).unwrap();
        output(&backend.program(Family::V4, ""), &["-t", "nat", "-A", "OUTPUT", "-p", "icmp", "-j", "RETURN"]).unwrap();
        cleanup(&tproxy).unwrap();
        let left = backend.saved(Family::V4).unwrap();
        assert!(!left.has_our_chains());
        assert_eq!(left.rules.len(), 1, "{:?}", left.rules);
    }
}
