//! Network namespaces on one bridge: machines of a small network, with real addresses and real iptables.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// A network of namespaces. Dropping it ends what runs inside and takes everything away again.
#[derive(Debug)]
pub struct Lab {
    tag: String,
    hub: String,
    spaces: Vec<String>,
}

/// One machine of the network.
#[derive(Debug, Clone)]
pub struct Space {
    name: String,
}

impl Lab {
    /// An empty network. Its names hold this process's id, so that runs do not meet; what runs that are over left
    /// behind is removed first.
    ///
    /// # Errors
    /// Without the privilege to make namespaces, or without `ip`.
    pub fn new(tag: &str) -> Result<Self> {
        for old in namespaces()?.into_iter().filter(|name| is_left_behind(name)) {
            remove(&old);
        }
        let tag = format!("{}-{tag}", std::process::id());
        let hub = format!("istio-{tag}-hub");
        let lab = Self { tag, hub: hub.clone(), spaces: Vec::new() };
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "br0", "up"])?;
        Ok(lab)
    }

    /// Adds a machine with these addresses (`10.0.1.5/8`).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn space(&mut self, name: &str, addresses: &[&str]) -> Result<Space> {
        let full = format!("istio-{}-{name}", self.tag);
        let port = format!("p{}", self.spaces.len());
        ip(&["netns", "add", &full])?;
        self.spaces.push(full.clone());
        let hub = &self.hub;
        ip(&["-n", hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &full])?;
        ip(&["-n", hub, "link", "set", &port, "master", "br0", "up"])?;
        ip(&["-n", &full, "link", "set", "lo", "up"])?;
        for address in addresses {
            // Nobody else has it; without this an IPv6 address cannot be used for a second or two.
            let sure: &[&str] = if address.contains(':') { &["nodad"] } else { &[] };
            ip(&[&["-n", &full, "address", "add", address, "dev", "eth0"], sure].concat())?;
        }
        ip(&["-n", &full, "link", "set", "eth0", "up"])?;
        Ok(Space { name: full })
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for name in self.spaces.iter().chain([&self.hub]) {
            remove(name);
        }
    }
}

impl Space {
    /// Its name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A command that runs inside, as root.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).stdin(Stdio::null());
        command
    }

    /// A command that runs inside under the proxy's own user, whose traffic the redirect rules leave alone.
    pub fn command_as_proxy(&self, program: &str) -> Command {
        let mut command = self.command("setpriv");
        command.args(["--reuid=1337", "--regid=1337", "--clear-groups", program]);
        command
    }

    /// Names that resolve inside, as lines of a hosts file.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn hosts(&self, lines: &str) -> Result<()> {
        self.file("hosts", lines)
    }

    /// The resolver that is asked for names inside.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn resolver(&self, ip: &str) -> Result<()> {
        self.file("resolv.conf", &format!("nameserver {ip}\noptions timeout:1 attempts:1\n"))
    }

    /// What a file below `/etc` says inside, for commands that are started from now on.
    fn file(&self, name: &str, text: &str) -> Result<()> {
        let folder = PathBuf::from("/etc/netns").join(&self.name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        fs::write(folder.join(name), text).with_context(|| format!("cannot write a namespace's {name}"))
    }

    /// Whether something listens on a TCP port inside.
    pub fn listens(&self, port: u16) -> bool {
        let filter = format!("( sport = :{port} )");
        let out = self.command("ss").args(["-Hltn", &filter]).output();
        out.is_ok_and(|out| !out.stdout.is_empty())
    }
}

/// Waits until something holds; the wait between two looks is short, the limit generous.
///
/// # Errors
/// Names `what` when the limit is over.
pub fn wait_for(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Result<()> {
    let step = Duration::from_millis(20);
    let mut left = limit;
    while !holds() {
        ensure!(left > step, "{what} did not happen within {} s", limit.as_secs());
        left -= step;
        std::thread::sleep(step);
    }
    Ok(())
}

fn ip(args: &[&str]) -> Result<()> {
    let out = Command::new("ip").args(args).output().context("cannot run ip (package iproute2)")?;
    let told = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "ip {}: {}", args.join(" "), told.trim());
    Ok(())
}

fn namespaces() -> Result<Vec<String>> {
    let out = Command::new("ip").args(["netns", "list"]).output().context("cannot run ip (package iproute2)")?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    Ok(text.lines().filter_map(|l| l.split_whitespace().next()).map(str::to_owned).collect())
}

/// Whether a namespace is of a run whose process is gone.
fn is_left_behind(name: &str) -> bool {
    let pid = name.strip_prefix("istio-").and_then(|rest| rest.split('-').next());
    let pid = pid.filter(|pid| !pid.is_empty() && pid.bytes().all(|b| b.is_ascii_digit()));
    pid.is_some_and(|pid| !PathBuf::from("/proc").join(pid).exists())
}

/// Ends every process inside and removes the namespace. Best effort: it runs while things fail.
fn remove(name: &str) {
    if let Ok(out) = Command::new("ip").args(["netns", "pids", name]).output() {
        for pid in String::from_utf8_lossy(&out.stdout).split_whitespace() {
            if let Err(error) = Command::new("kill").args(["-9", pid]).output() {
                eprintln!("cannot end process {pid}: {error}");
            }
        }
    }
    if let Err(error) = ip(&["netns", "del", name]) {
        eprintln!("cannot remove namespace {name}: {error}");
    }
    let folder = PathBuf::from("/etc/netns").join(name);
    if folder.exists()
        && let Err(error) = fs::remove_dir_all(&folder)
    {
        eprintln!("cannot remove {}: {error}", folder.display());
    }
}
