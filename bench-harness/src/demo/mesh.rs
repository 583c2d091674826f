//! The guide's mesh: pods and machines with real addresses, each behind its own sidecar, traffic redirected by iptables.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::child::Running;
use crate::netns::{Lab, Space, wait_for};

/// Names that resolve everywhere: no name server runs in the demo.
const HOSTS: &str = "127.0.0.1 localhost
10.96.0.10 payment-service.payments payment-service.payments.svc.cluster.local
10.96.0.20 legacy-database.hybrid-app legacy-database.hybrid-app.svc.cluster.local
";

/// One workload.
struct Workload {
    name: &'static str,
    address: &'static str,
    namespace: &'static str,
    account: &'static str,
    /// WorkloadGroup, for a virtual machine.
    group: Option<&'static str>,
    http: &'static [u16],
    tcp: &'static [u16],
}

const WORKLOADS: &[Workload] = &[
    Workload {
        name: "frontend-1",
        address: "10.1.0.9",
        namespace: "frontend",
        account: "frontend-sa",
        group: None,
        http: &[],
        tcp: &[],
    },
    Workload {
        name: "api-1",
        address: "10.1.0.20",
        namespace: "hybrid-app",
        account: "api-sa",
        group: None,
        http: &[],
        tcp: &[],
    },
    Workload {
        name: "payment-v2-0",
        address: "10.1.0.2",
        namespace: "payments",
        account: "payment-service-sa",
        group: None,
        http: &[8080, 9090],
        tcp: &[],
    },
    Workload {
        name: "payment-v2-1",
        address: "10.1.0.3",
        namespace: "payments",
        account: "payment-service-sa",
        group: None,
        http: &[8080, 9090],
        tcp: &[],
    },
    Workload {
        name: "payment-vm",
        address: "10.0.1.5",
        namespace: "payments",
        account: "payment-service-sa",
        group: Some("legacy-payment-service"),
        http: &[8080, 9090, 9091],
        tcp: &[],
    },
    Workload {
        name: "database-vm",
        address: "10.0.2.20",
        namespace: "hybrid-app",
        account: "legacy-db-sa",
        group: Some("legacy-database"),
        http: &[9187],
        tcp: &[5432],
    },
];

/// What the mesh is made of.
#[derive(Debug, Clone)]
pub struct Options {
    /// The proxy's binary.
    pub proxy: PathBuf,
    /// Folder of Istio YAML.
    pub config: PathBuf,
    /// Prefix of the namespaces' names.
    pub tag: String,
}

/// A workload that runs.
pub(super) struct Machine {
    /// Workload name.
    pub name: &'static str,
    /// Its namespace.
    pub space: Space,
    /// Its sidecar.
    pub sidecar: Running,
    access_log: PathBuf,
    /// The application, for who serves.
    _app: Option<Running>,
}

/// The running mesh. Dropping it takes everything away.
pub(super) struct Mesh {
    machines: Vec<Machine>,
    /// A machine without a sidecar.
    pub outsider: Space,
    /// Watched folder of YAML.
    pub config: PathBuf,
    switches: PathBuf,
    // Last: processes go before their namespaces, files after them.
    _lab: Lab,
    folder: tempfile::TempDir,
}

impl Mesh {
    /// Starts everything and waits until every sidecar is ready.
    ///
    /// # Errors
    /// When something cannot be started; says what it printed.
    pub(super) fn start(options: &Options) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("istio-demo-").tempdir()?;
        let root = folder.path();
        let config = root.join("config");
        let switches = root.join("switches");
        for dir in [&config, &switches, &root.join("logs")] {
            fs::create_dir_all(dir)?;
        }
        let proxy = root.join("istio-proxy");
        fs::copy(&options.proxy, &proxy).with_context(|| format!("cannot copy {}", options.proxy.display()))?;
        copy_yaml(&options.config, &config)?;
        certificates(&proxy, root)?;
        give_to_proxy(root)?;
        let mut lab = Lab::new(&options.tag)?;
        let outsider = lab.space("outside", &["10.3.0.7/8"])?;
        outsider.hosts(HOSTS)?;
        let mut machines = Vec::new();
        for workload in WORKLOADS {
            println!("  {:<14} {:<11} {}/{}", workload.name, workload.address, workload.namespace, workload.account);
            machines.push(machine(workload, &mut lab, root, &proxy)?);
        }
        let mut mesh = Self { machines, outsider, config, switches, _lab: lab, folder };
        mesh.wait_until_ready()?;
        Ok(mesh)
    }

    /// A machine by its workload's name.
    pub(super) fn machine(&self, name: &str) -> &Machine {
        self.machines.iter().find(|m| m.name == name).expect("the demo's own machines")
    }

    /// All machines.
    pub(super) fn machines(&mut self) -> impl Iterator<Item = &mut Machine> {
        self.machines.iter_mut()
    }

    /// Where files of this run lie.
    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Makes an application fail (`fail`) or report sick (`sick`), or stops that.
    ///
    /// # Errors
    /// When the switch cannot be written.
    pub(super) fn switch(&self, app: &str, what: &str, on: bool) -> Result<()> {
        let path = self.switches.join(format!("{app}.{what}"));
        if on {
            fs::write(path, "")?
        } else {
            fs::remove_file(path)?
        }
        Ok(())
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        for machine in &mut self.machines {
            let ready =
                wait_for("readiness", Duration::from_secs(20), || !machine.sidecar.is_alive() || machine.is_ready());
            let printed = machine.sidecar.printed();
            ensure!(machine.sidecar.is_alive(), "the sidecar of {} ended:\n{printed}", machine.name);
            ready.with_context(|| format!("the sidecar of {} printed:\n{printed}", machine.name))?;
        }
        Ok(())
    }
}

impl Machine {
    fn is_ready(&self) -> bool {
        let url = "http://127.0.0.1:15021/healthz/ready";
        self.space.command("curl").args(["-s", "-f", "-m", "1", url]).output().is_ok_and(|out| out.status.success())
    }

    /// Its access log: one object a line.
    pub(super) fn access_log(&self) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(&self.access_log).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }
}

fn copy_yaml(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let path = entry?.path();
        if let (Some("yaml" | "yml"), Some(name)) = (path.extension().and_then(|e| e.to_str()), path.file_name()) {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

fn certificates(proxy: &Path, root: &Path) -> Result<()> {
    for workload in WORKLOADS {
        let id = format!("spiffe://cluster.local/ns/{}/sa/{}", workload.namespace, workload.account);
        let mut command = Command::new(proxy);
        command.args(["ca", "--id", &id, "--root"]).arg(root.join("ca"));
        let out = command.arg("--dir").arg(root.join("certs").join(workload.name)).output()?;
        ensure!(out.status.success(), "istio-proxy ca: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}

/// The proxy's user reads all of it and writes its logs and the published health.
fn give_to_proxy(root: &Path) -> Result<()> {
    let out = Command::new("chown").args(["-R", "1337:1337"]).arg(root).output()?;
    ensure!(out.status.success(), "chown: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}

fn machine(workload: &Workload, lab: &mut Lab, root: &Path, proxy: &Path) -> Result<Machine> {
    let space = lab.space(workload.name, &[&format!("{}/8", workload.address)])?;
    space.hosts(HOSTS)?;
    let out = space
        .command(&proxy.to_string_lossy())
        .args(["istio-iptables", "-i", "*", "-b", "*", "-d", "15090,15021,15020"])
        .output()?;
    ensure!(out.status.success(), "istio-iptables: {}", String::from_utf8_lossy(&out.stderr).trim());
    let app = app(workload, &space, root)?;
    let access_log = root.join("logs").join(format!("{}.access.jsonl", workload.name));
    let mut command = space.command_as_proxy(&proxy.to_string_lossy());
    command.args(["proxy", "--concurrency", "1", "--config"]).arg(root.join("config"));
    command.arg("--certs").arg(root.join("certs").join(workload.name)).arg("--access-log").arg(&access_log);
    command.env("POD_NAMESPACE", workload.namespace).env("INSTANCE_IP", workload.address);
    command.env("SERVICE_ACCOUNT", workload.account).env("POD_NAME", workload.name);
    if let Some(group) = workload.group {
        command.env("ISTIO_META_AUTO_REGISTER_GROUP", group);
        command.arg("--publish-health").arg(root.join("config"));
    }
    let sidecar = Running::start(command, &root.join("logs").join(format!("{}.log", workload.name)))?;
    Ok(Machine { name: workload.name, space, sidecar, access_log, _app: app })
}

fn app(workload: &Workload, space: &Space, root: &Path) -> Result<Option<Running>> {
    let (Some(first), own) = (workload.http.first(), std::env::current_exe()?) else { return Ok(None) };
    let mut command = space.command(&own.to_string_lossy());
    command.args(["app", "--name", workload.name, "--switches"]).arg(root.join("switches"));
    for port in workload.http {
        command.args(["--http", &format!("0.0.0.0:{port}")]);
    }
    for port in workload.tcp {
        command.args(["--tcp", &format!("0.0.0.0:{port}")]);
    }
    let running = Running::start(command, &root.join("logs").join(format!("{}.app.log", workload.name)))?;
    wait_for("an application that listens", Duration::from_secs(5), || space.listens(*first))?;
    Ok(Some(running))
}
