//! Flags, variables and facts about the host, resolved into plain settings.

use std::net::IpAddr;

use clap::Args;
use ipnet::IpNet;

/// Arguments of `istio-proxy istio-iptables`. Every long flag has a variable of the same name in upper case; a flag
/// beats a variable. Values are kept as text until both are known.
#[derive(Debug, Clone, Default, Args)]
pub struct IptablesArgs {
    /// Port of the outbound listener [default: 15001; no variable].
    #[arg(short = 'p', long)]
    pub envoy_port: Option<String>,
    /// Port of the inbound listener [default: 15006].
    #[arg(short = 'z', long)]
    pub inbound_capture_port: Option<String>,
    /// Port that is never redirected inbound [default: 15008].
    #[arg(short = 'e', long)]
    pub inbound_tunnel_port: Option<String>,
    /// Users of the proxy, whose traffic is not captured [default: the user istio-proxy, else 1337].
    #[arg(short = 'u', long)]
    pub proxy_uid: Option<String>,
    /// Groups of the proxy [default: the same numbers as the users].
    #[arg(short = 'g', long)]
    pub proxy_gid: Option<String>,
    /// REDIRECT or TPROXY.
    #[arg(short = 'm', long)]
    pub istio_inbound_interception_mode: Option<String>,
    /// Inbound ports to capture, * for all [default: none].
    #[arg(short = 'b', long)]
    pub istio_inbound_ports: Option<String>,
    /// Inbound ports to leave alone when all are captured.
    #[arg(short = 'd', long)]
    pub istio_local_exclude_ports: Option<String>,
    /// Destinations to capture, * for all [default: none].
    #[arg(short = 'i', long)]
    pub istio_service_cidr: Option<String>,
    /// Destinations to leave alone.
    #[arg(short = 'x', long)]
    pub istio_service_exclude_cidr: Option<String>,
    /// Outbound ports to capture whatever the destination.
    #[arg(short = 'q', long)]
    pub istio_outbound_ports: Option<String>,
    /// Outbound ports to leave alone.
    #[arg(short = 'o', long)]
    pub istio_local_outbound_ports_exclude: Option<String>,
    /// Interfaces of virtual machines behind this workload; their traffic counts as outbound.
    #[arg(short = 'k', long)]
    pub kube_virt_interfaces: Option<String>,
    /// Interfaces to leave alone.
    #[arg(short = 'c', long)]
    pub istio_exclude_interfaces: Option<String>,
    /// Packet mark of TPROXY [default: 1337].
    #[arg(short = 't', long)]
    pub istio_inbound_tproxy_mark: Option<String>,
    /// Routing table of TPROXY [default: 133].
    #[arg(short = 'r', long)]
    pub istio_inbound_tproxy_route_table: Option<String>,
    /// Print what would be done and do nothing.
    #[arg(short = 'n', long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub dry_run: Option<String>,
    /// Capture DNS to the resolvers of /etc/resolv.conf (variable ISTIO_META_DNS_CAPTURE too).
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub redirect_dns: Option<String>,
    /// Capture DNS to any resolver.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub capture_all_dns: Option<String>,
    /// Drop packets that conntrack calls invalid (variable INVALID_DROP too).
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub drop_invalid: Option<String>,
    /// Make IPv6 rules when there is any IPv6 address (variable ISTIO_DUAL_STACK too).
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub dual_stack: Option<String>,
    /// Replace rules of other settings.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub reconcile: Option<String>,
    /// Remove every ISTIO_ chain and every jump to one, in all backends, and make no rules.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub cleanup_only: Option<String>,
    /// Make the rules even if the same ones are there.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub force_apply: Option<String>,
    /// Do not touch the rules.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub skip_rule_apply: Option<String>,
    /// legacy or nft instead of what is found.
    #[arg(long)]
    pub force_iptables_binary: Option<String>,
    /// Ignored: further words, as scripts in the field pass them.
    #[arg(hide = true)]
    pub words: Vec<String>,
}

/// Facts about the host that are no flags.
#[derive(Debug, Clone, Default)]
pub struct Host {
    /// Addresses of the interfaces, in order, without loopback and link-local ones.
    pub addresses: Vec<IpAddr>,
    /// Resolvers of /etc/resolv.conf, as written there.
    pub dns_servers: Vec<String>,
    /// User id of the proxy's user, if that user exists.
    pub proxy_uid: Option<u32>,
}

/// Everything that decides about rules.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the flags of `IptablesArgs`, where each is described")]
pub struct Settings {
    pub proxy_port: String,
    pub inbound_port: String,
    pub tunnel_port: String,
    pub proxy_uids: Vec<String>,
    pub proxy_gids: Vec<String>,
    pub tproxy: bool,
    pub tproxy_mark: String,
    pub tproxy_route_table: String,
    pub inbound_ports: Vec<String>,
    pub inbound_ports_exclude: Vec<String>,
    pub owner_groups: Vec<String>,
    pub owner_groups_exclude: Vec<String>,
    pub outbound_ports: Vec<String>,
    pub outbound_ports_exclude: Vec<String>,
    pub outbound_cidrs: Vec<String>,
    pub outbound_cidrs_exclude: Vec<String>,
    pub virtual_interfaces: Vec<String>,
    pub exclude_interfaces: Vec<String>,
    pub redirect_dns: bool,
    pub capture_all_dns: bool,
    pub dns_servers: Vec<String>,
    pub drop_invalid: bool,
    pub ipv6: bool,
    pub loopback_cidr: String,
    pub dry_run: bool,
    pub reconcile: bool,
    pub cleanup_only: bool,
    pub force_apply: bool,
    pub skip_rule_apply: bool,
    pub force_binary: Option<String>,
    /// Things the user should know.
    pub warnings: Vec<String>,
}

/// The flags' defaults, without any capture.
impl Default for Settings {
    fn default() -> Self {
        let resolved = Self::resolve(&IptablesArgs::default(), &|_| None, &Host::v4_only());
        resolved.expect("the defaults are valid")
    }
}

impl Host {
    fn v4_only() -> Self {
        Self { addresses: vec![IpAddr::from([10, 0, 0, 1])], ..Self::default() }
    }
}

/// Most groups that may be named (a rule has one match for each).
const MAX_GROUPS: usize = 64;
const DEFAULT_UID: u32 = 1337;

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Settings {
    /// Resolves flags, then variables, then defaults. The error says which value is wrong.
    pub fn resolve(args: &IptablesArgs, env: Env<'_>, host: &Host) -> Result<Self, String> {
        let text = |flag: &Option<String>, name: &str, default: &str| -> String {
            flag.clone().or_else(|| env(name)).unwrap_or_else(|| default.to_owned())
        };
        let list = |flag: &Option<String>, name: &str| split(&text(flag, name, ""));
        let mut warnings = Vec::new();
        let uids = text(&args.proxy_uid, "PROXY_UID", "");
        let uids = if uids.is_empty() { host.proxy_uid.unwrap_or(DEFAULT_UID).to_string() } else { uids };
        let gids = text(&args.proxy_gid, "PROXY_GID", "");
        let gids = if gids.is_empty() { uids.clone() } else { gids };
        let loopback_cidr = env("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR").unwrap_or_else(|| "127.0.0.1/32".to_owned());
        check_loopback(&loopback_cidr)?;
        let dual_stack = flag(&args.dual_stack, env, &["ISTIO_DUAL_STACK", "DUAL_STACK"]);
        let capture_all_dns = flag(&args.capture_all_dns, env, &["CAPTURE_ALL_DNS"]);
        let mut redirect_dns = flag(&args.redirect_dns, env, &["ISTIO_META_DNS_CAPTURE", "REDIRECT_DNS"]);
        if redirect_dns && !capture_all_dns && host.dns_servers.is_empty() {
            warnings.push("DNS is not captured: /etc/resolv.conf names no resolver".to_owned());
            redirect_dns = false;
        }
        let groups = env("ISTIO_OUTBOUND_OWNER_GROUPS").unwrap_or_else(|| "*".to_owned());
        let settings = Self {
            proxy_port: args.envoy_port.clone().unwrap_or_else(|| "15001".to_owned()),
            inbound_port: text(&args.inbound_capture_port, "INBOUND_CAPTURE_PORT", "15006"),
            tunnel_port: text(&args.inbound_tunnel_port, "INBOUND_TUNNEL_PORT", "15008"),
            proxy_uids: split(&uids),
            proxy_gids: split(&gids),
            tproxy: text(&args.istio_inbound_interception_mode, "ISTIO_INBOUND_INTERCEPTION_MODE", "") == "TPROXY",
            tproxy_mark: text(&args.istio_inbound_tproxy_mark, "ISTIO_INBOUND_TPROXY_MARK", "1337"),
            tproxy_route_table: text(&args.istio_inbound_tproxy_route_table, "ISTIO_INBOUND_TPROXY_ROUTE_TABLE", "133"),
            inbound_ports: list(&args.istio_inbound_ports, "ISTIO_INBOUND_PORTS"),
            inbound_ports_exclude: list(&args.istio_local_exclude_ports, "ISTIO_LOCAL_EXCLUDE_PORTS"),
            owner_groups: split(&groups),
            owner_groups_exclude: split(&env("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE").unwrap_or_default()),
            outbound_ports: list(&args.istio_outbound_ports, "ISTIO_OUTBOUND_PORTS"),
            outbound_ports_exclude: list(
                &args.istio_local_outbound_ports_exclude,
                "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE",
            ),
            outbound_cidrs: list(&args.istio_service_cidr, "ISTIO_SERVICE_CIDR"),
            outbound_cidrs_exclude: list(&args.istio_service_exclude_cidr, "ISTIO_SERVICE_EXCLUDE_CIDR"),
            virtual_interfaces: list(&args.kube_virt_interfaces, "KUBE_VIRT_INTERFACES"),
            exclude_interfaces: list(&args.istio_exclude_interfaces, "ISTIO_EXCLUDE_INTERFACES"),
            redirect_dns,
            capture_all_dns: redirect_dns && capture_all_dns,
            dns_servers: host.dns_servers.clone(),
            drop_invalid: flag(&args.drop_invalid, env, &["INVALID_DROP", "DROP_INVALID"]),
            ipv6: wants_ipv6(host, dual_stack)?,
            loopback_cidr,
            dry_run: flag(&args.dry_run, env, &["DRY_RUN"]),
            reconcile: flag(&args.reconcile, env, &["RECONCILE"]),
            cleanup_only: flag(&args.cleanup_only, env, &["CLEANUP_ONLY"]),
            force_apply: flag(&args.force_apply, env, &["FORCE_APPLY"]),
            skip_rule_apply: flag(&args.skip_rule_apply, env, &["SKIP_RULE_APPLY"]),
            force_binary: args.force_iptables_binary.clone().or_else(|| env("FORCE_IPTABLES_BINARY")),
            warnings,
        };
        settings.check()?;
        Ok(settings)
    }

    /// Whether an included range is of the loopback network, so that calls of the application to itself are captured.
    pub fn captures_loopback(&self) -> bool {
        self.outbound_cidrs.iter().filter_map(|cidr| cidr.parse::<IpNet>().ok()).any(|net| net.addr().is_loopback())
    }

    fn check(&self) -> Result<(), String> {
        if self.outbound_cidrs_exclude.iter().any(|cidr| cidr == "*") {
            return Err("--istio-service-exclude-cidr: * would exclude everything; name the ranges".to_owned());
        }
        for cidr in self.outbound_cidrs.iter().filter(|cidr| *cidr != "*").chain(&self.outbound_cidrs_exclude) {
            if cidr.parse::<IpNet>().is_err() && cidr.parse::<IpAddr>().is_err() {
                return Err(format!("{cidr:?} is not a CIDR such as 10.0.0.0/8"));
            }
        }
        let ports = [&self.inbound_ports, &self.inbound_ports_exclude, &self.outbound_ports]
            .into_iter()
            .chain([&self.outbound_ports_exclude])
            .flatten()
            .filter(|port| *port != "*");
        for port in ports.chain([&self.proxy_port, &self.inbound_port, &self.tunnel_port]) {
            port.parse::<u16>().map_err(|_| format!("{port:?} is not a port"))?;
        }
        if self.owner_groups.len() > MAX_GROUPS {
            return Err(format!("more than {MAX_GROUPS} groups in ISTIO_OUTBOUND_OWNER_GROUPS"));
        }
        let names = [&self.proxy_uids, &self.proxy_gids, &self.owner_groups, &self.owner_groups_exclude]
            .into_iter()
            .chain([&self.virtual_interfaces, &self.exclude_interfaces])
            .flatten();
        for name in names.chain([&self.tproxy_mark, &self.tproxy_route_table]) {
            if name.starts_with('-') || name.contains(|c: char| c.is_whitespace() || c.is_control()) {
                return Err(format!("{name:?} is not a name or number"));
            }
        }
        Ok(())
    }
}

/// A boolean flag, else the first variable that is set to something Go calls a boolean, else false.
fn flag(said: &Option<String>, env: Env<'_>, names: &[&str]) -> bool {
    let parse = |text: &str| match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    };
    if let Some(value) = said.as_deref().and_then(parse) {
        return value;
    }
    names.iter().find_map(|name| parse(&env(name)?)).unwrap_or(false)
}

fn split(list: &str) -> Vec<String> {
    list.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

/// The first address decides; an IPv4-first host gets no IPv6 rules unless dual stack is asked for.
fn wants_ipv6(host: &Host, dual_stack: bool) -> Result<bool, String> {
    let first = host.addresses.first().ok_or("no usable address on any interface")?;
    Ok(first.is_ipv6() || (dual_stack && host.addresses.iter().any(IpAddr::is_ipv6)))
}

fn check_loopback(cidr: &str) -> Result<(), String> {
    match cidr.parse::<IpNet>() {
        Ok(IpNet::V4(net)) if net.addr().is_loopback() && net.prefix_len() >= 8 => Ok(()),
        _ => Err(format!("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR: {cidr:?} is not within 127.0.0.0/8")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: IptablesArgs,
    }

    fn resolve(args: &[&str], env: &[(&str, &str)], host: &Host) -> Result<Settings, String> {
        let cli = Cli::parse_from([&["x"], args].concat());
        let env = |name: &str| env.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned());
        Settings::resolve(&cli.args, &env, host)
    }

    #[test]
    fn flags_beat_variables_beat_defaults() {
        let env = [("ISTIO_INBOUND_PORTS", "1,2"), ("PROXY_UID", "7"), ("ENVOY_PORT", "9")];
        let said = resolve(&["-b", "80, 81,,", "-p", "15002"], &env, &Host::v4_only()).unwrap();
        assert_eq!(said.inbound_ports, ["80", "81"]);
        assert_eq!((said.proxy_uids, said.proxy_gids), (vec!["7".to_owned()], vec!["7".to_owned()]));
        assert_eq!(said.proxy_port, "15002");
        assert_eq!(resolve(&[], &env, &Host::v4_only()).unwrap().proxy_port, "15001");
    }

    #[test]
    fn booleans_as_go_reads_them() {
        let on = |args: &[&str], env: &[(&str, &str)]| resolve(args, env, &Host::v4_only()).unwrap().drop_invalid;
        assert!(on(&["--drop-invalid"], &[]));
        assert!(on(&[], &[("INVALID_DROP", "T")]));
        assert!(!on(&["--drop-invalid=false"], &[("INVALID_DROP", "true")]));
        assert!(!on(&[], &[("INVALID_DROP", "yes")]));
        assert!(on(&[], &[("INVALID_DROP", "bad"), ("DROP_INVALID", "1")]));
    }

    #[test]
    fn the_first_address_decides_about_ipv6() {
        let v6: IpAddr = "2001:db8::1".parse().unwrap();
        let v4: IpAddr = "10.0.0.1".parse().unwrap();
        let host = |addresses: &[IpAddr]| Host { addresses: addresses.to_vec(), ..Host::default() };
        assert!(resolve(&[], &[], &host(&[v6, v4])).unwrap().ipv6);
        assert!(!resolve(&[], &[], &host(&[v4, v6])).unwrap().ipv6);
        assert!(resolve(&["--dual-stack"], &[], &host(&[v4, v6])).unwrap().ipv6);
        assert!(resolve(&[], &[], &host(&[])).is_err());
    }

    #[test]
    fn dns_without_resolvers_is_off_with_a_warning() {
        let said = resolve(&["--redirect-dns"], &[], &Host::v4_only()).unwrap();
        assert!(!said.redirect_dns && said.warnings.len() == 1);
        let said = resolve(
            &[],
            &[("ISTIO_META_DNS_CAPTURE", "true")],
            &Host { dns_servers: vec!["10.0.0.10".to_owned()], ..Host::v4_only() },
        );
        assert!(said.unwrap().redirect_dns);
    }

    #[test]
    fn wrong_values_are_named() {
        for (args, word) in [
            (&["-x", "*"][..], "exclude"),
            (&["-i", "10.0.0.0/40"], "CIDR"),
            (&["-b", "http"], "port"),
            (&["-p", "70000"], "port"),
            (&["-u=-j ACCEPT"], "name"),
        ] {
            let error = resolve(args, &[], &Host::v4_only()).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        assert!(resolve(&[], &[("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "10.0.0.0/8")], &Host::v4_only()).is_err());
    }
}
