//! One loop on the control thread: inputs → model → snapshot → publish.
//!
//! It decides when what was said becomes what is served, and never touches a connection: workers see only a pointer that
//! changes. What cannot be understood leaves what was understood last; what cannot be read leaves everything as it was.
//!
//! ```ignore
//! let mut control = Control::start(settings)?;       // nothing usable at start-up is an error
//! let (publish, published) = watch::channel(control.published());
//! control::run(control, publish, asked).await;        // until dropped
//! ```

pub mod heal;
pub mod health;
mod identity;
mod jwks;
pub mod last_good;
mod names;
mod stream;
#[cfg(test)]
mod tests;
mod watch;
mod xds_dir;
pub mod yaml;

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Result;
use proxy_config::model::Shared;
use proxy_config::registry::Proxy;
use proxy_config::xds::Secret;
use proxy_config::{Inputs, Loaded, Model, Name, Reject, Severity, WhoAmI};
use tokio::sync::mpsc;
use tokio::sync::watch as channel;

pub use identity::Certs;
pub use stream::CHECKS;

use crate::dns::Resolver;
use crate::snapshot::{self, Snapshot};
use crate::tls::Secrets;
use crate::xds;
use names::Names;
use watch::{Wake, Watcher};

/// Where configuration comes from.
#[derive(Debug, Clone)]
pub enum Input {
    /// Istio and Kubernetes YAML.
    Yaml(yaml::Paths),
    /// A folder of recorded discovery responses.
    XdsDir(PathBuf),
    /// istiod's stream.
    Stream(xds::Stream),
}

/// What the control loop is told at start-up.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Configuration.
    pub input: Input,
    /// Whose.
    pub who: WhoAmI,
    /// The workload's certificate.
    pub certs: Certs,
    /// Folder that gets this workload's own WorkloadEntry.
    pub publish_health: Option<PathBuf>,
}

/// What is served at one moment, with what it was made from; sent to everybody over a `watch` channel.
#[derive(Clone)]
pub struct Published {
    /// Counts up from 1 (the snapshot's number); 0 is "nothing yet".
    pub version: u64,
    /// What was said.
    pub model: Arc<Model>,
    /// What workers read.
    pub snapshot: Arc<Snapshot>,
    /// Every object that is not served as it was said, of all stages.
    pub rejects: Arc<[Reject]>,
    /// Whose configuration it is.
    pub proxy: Arc<Proxy>,
    /// What `--publish-health` writes and how the application is asked; `None` for everybody but members of a
    /// WorkloadGroup.
    pub health: Option<Arc<health::Spec>>,
    /// What came from a control plane, as it came, now and not at the moment of this publication.
    pub received: Arc<xds::Received>,
    /// What is missing of the workload's certificate; `None`: nothing, or none is needed.
    pub awaited: Option<String>,
    /// When an earlier process wrote what is served, while no control plane has spoken yet; see [`last_good`].
    pub kept: Option<SystemTime>,
}

impl Published {
    /// Nothing yet, for this proxy.
    pub fn nothing(proxy: Arc<Proxy>) -> Self {
        Self {
            version: 0,
            model: Arc::default(),
            snapshot: Arc::default(),
            rejects: Arc::from([]),
            proxy,
            health: None,
            received: Arc::default(),
            awaited: None,
            kept: None,
        }
    }

    /// Why this must not get traffic yet, one reason a line; empty: nothing in the configuration speaks against it.
    /// `now` is seconds since 1970.
    pub fn unready(&self, now: i64) -> Vec<String> {
        if self.version == 0 {
            return vec!["no configuration yet".to_owned()];
        }
        let mut reasons: Vec<String> = self.awaited.iter().cloned().collect();
        for listener in self.snapshot.listeners() {
            for chain in listener.all_chains() {
                let Some(why) = &chain.unusable else { continue };
                let reason = format!("{} {}: {why}", listener.name, chain.name);
                if !reasons.contains(&reason) {
                    reasons.push(reason);
                }
            }
        }
        for (name, identity) in self.snapshot.secrets().identities() {
            if identity.info.iter().any(|certificate| certificate.not_after <= now) {
                reasons.push(format!("certificate {name} has expired"));
            }
        }
        reasons
    }
}

impl std::fmt::Debug for Published {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Published")
            .field("version", &self.version)
            .field("rejects", &self.rejects.len())
            .finish_non_exhaustive()
    }
}

/// The state of the loop.
pub struct Control {
    settings: Settings,
    /// Last understood YAML, whose objects stand in for broken ones.
    loaded: Option<Loaded>,
    /// What was said; names are not resolved in it.
    model: Arc<Model>,
    names: Names,
    proxy: Arc<Proxy>,
    /// Hash of the texts that `model` was made from.
    said: u64,
    secrets: Secrets,
    published: Arc<Published>,
    stamps: Vec<Stamp>,
    /// Key material that came over the stream.
    streamed: Shared<BTreeMap<Name, Arc<Secret>>>,
    /// Keys of tokens that are fetched.
    keys: jwks::Fetches,
    /// What is served is kept here for the next process.
    keeper: Option<last_good::Keeper>,
    /// When the model was written, while it is an earlier process's.
    kept: Option<SystemTime>,
}

/// What tells that a file was changed without reading it.
type Stamp = (PathBuf, Option<(SystemTime, u64)>);

impl Control {
    /// Takes everything in for the first time.
    ///
    /// # Errors
    /// What makes serving pointless: no identity, no readable input, a certificate folder without a certificate.
    pub fn start(settings: Settings) -> Result<Self> {
        let proxy = Arc::new(Proxy::default());
        let secrets = settings.certs.renewed(&Secrets::new())?;
        let roots = match &settings.input {
            Input::Yaml(paths) => paths.jwks_roots.clone(),
            _ => None,
        };
        let mut control = Self {
            settings,
            loaded: None,
            model: Arc::default(),
            names: Names::new(Resolver::system()),
            said: 0,
            secrets,
            published: Arc::new(Published::nothing(Arc::clone(&proxy))),
            proxy,
            stamps: Vec::new(),
            streamed: Shared::default(),
            keys: jwks::Fetches::new(roots),
            keeper: None,
            kept: None,
        };
        control.take_in()?;
        if control.awaits_stream() {
            control.published = Arc::new(Published::nothing(Arc::clone(&control.proxy)));
        } else {
            control.publish(Vec::new());
        }
        Ok(control)
    }

    /// Folder that gets this workload's own WorkloadEntry.
    pub fn publish_health(&self) -> Option<PathBuf> {
        self.settings.publish_health.clone()
    }

    /// What is served now.
    pub fn published(&self) -> Arc<Published> {
        Arc::clone(&self.published)
    }

    /// Looks at everything again; the news, if there are any.
    pub fn reload(&mut self) -> Option<Arc<Published>> {
        let mut trouble = Vec::new();
        let old_model = Arc::clone(&self.model);
        if let Err(e) = self.take_in() {
            trouble.push(trouble_with("Configuration", &e));
        }
        match self.settings.certs.renewed(&self.secrets) {
            Ok(secrets) => self.secrets = secrets,
            Err(e) => trouble.push(trouble_with("Certificates", &e)),
        }
        if let Some(why) = self.settings.certs.trouble() {
            trouble.push(trouble_with("Certificates", &anyhow::anyhow!(why)));
        }
        if self.awaits_stream() {
            return None;
        }
        let (secrets, _) = self.with_files();
        let same = Arc::ptr_eq(&old_model, &self.model) && secrets == *self.published.snapshot.secrets();
        let told = trouble.iter().all(|reject| self.published.rejects.contains(reject));
        let healed = trouble.is_empty() && self.published.rejects.iter().any(is_trouble);
        if same && told && !healed {
            return None;
        }
        self.publish(trouble);
        Some(self.published())
    }

    /// Waits a little for the first answers to names that nobody asked for before; the news, if an answer came.
    pub async fn warm(&mut self) -> Option<Arc<Published>> {
        self.names.warm().await.then(|| self.with_answers())
    }

    /// The same configuration with what is known of its names and keys now.
    fn with_answers(&mut self) -> Arc<Published> {
        let trouble = self.published.rejects.iter().filter(|reject| is_trouble(reject)).cloned().collect();
        // Files may have changed meanwhile; whoever looks for that has to see it.
        let stamps = std::mem::take(&mut self.stamps);
        self.publish(trouble);
        self.stamps = stamps;
        self.published()
    }

    /// Reads the input and, if its text is new, makes a new model of it.
    fn take_in(&mut self) -> Result<()> {
        match &self.settings.input {
            Input::Yaml(paths) => {
                let inputs = paths.read(&self.settings.who)?;
                let said = hash(|h| texts(&inputs, h));
                if said == self.said {
                    return Ok(());
                }
                let mut loaded =
                    proxy_config::from_yaml(&inputs, self.loaded.as_ref()).map_err(|rejects| all(&rejects))?;
                self.said = said;
                for field in &loaded.unread {
                    tracing::info!("{field} has no effect here");
                }
                // The next reload asks for the objects only.
                self.model = Arc::new(std::mem::take(&mut loaded.model));
                self.proxy = Arc::new(loaded.proxy.clone());
                self.loaded = Some(loaded);
            }
            Input::XdsDir(folder) => {
                let responses = xds_dir::read(folder)?;
                let said = hash(|h| responses.hash(h));
                if said == self.said {
                    return Ok(());
                }
                let (model, proxy) = xds_dir::load(&responses, &self.settings.who)?;
                self.said = said;
                self.model = Arc::new(model);
                self.proxy = Arc::new(proxy);
            }
            Input::Stream(stream) => {
                let (update, said) = {
                    let news = stream.news.borrow();
                    (news.update.clone(), news.updates)
                };
                // The first look is about who we are; nothing else is known then.
                if self.proxy.namespace.is_empty() {
                    self.proxy = Arc::new(xds_dir::proxy(&self.settings.who)?);
                }
                if said == self.said {
                    return Ok(());
                }
                self.said = said;
                if let Some(update) = update {
                    self.kept = None;
                    self.model = Arc::new(update.model.clone());
                    self.streamed = update.secrets.clone();
                }
            }
        }
        Ok(())
    }

    /// Nothing has come over the stream yet: there is nothing to serve, and that is no configuration.
    fn awaits_stream(&self) -> bool {
        let silent = matches!(&self.settings.input, Input::Stream(stream) if stream.news.borrow().update.is_none());
        silent && self.kept.is_none()
    }

    /// Compiles and makes it the current one.
    fn publish(&mut self, mut rejects: Vec<Reject>) {
        let (secrets, unreadable) = self.with_files();
        self.secrets = secrets;
        let prev = (self.published.version > 0).then_some(&*self.published.snapshot);
        let (model, unfetched) = self.keys.fill(&self.names.put_into(&self.model));
        let (snapshot, uncompiled) = snapshot::compile(prev, &model, &self.secrets);
        rejects.extend(model.rejects.iter().cloned().chain(unreadable).chain(uncompiled).chain(unfetched));
        tell(&self.published.rejects, &rejects);
        let health = self.loaded.as_ref().and_then(health::Spec::of).map(Arc::new);
        self.published = Arc::new(Published {
            version: snapshot.version,
            model,
            snapshot: Arc::new(snapshot),
            rejects: rejects.into(),
            proxy: Arc::clone(&self.proxy),
            health,
            received: match &self.settings.input {
                Input::Stream(stream) => Arc::clone(&stream.received),
                Input::Yaml(_) | Input::XdsDir(_) => Arc::default(),
            },
            awaited: self.settings.certs.awaited(&self.secrets),
            kept: self.kept,
        });
        self.offer(true);
        self.stamps = self.stamps_now();
    }

    /// Waits until keys of tokens or addresses of names have changed, and serves them.
    async fn new_answers(&mut self) -> Arc<Published> {
        let snapshot = Arc::clone(&self.published.snapshot);
        tokio::select! {
            () = self.keys.changed(&snapshot) => {}
            () = self.names.changed() => {}
        }
        self.with_answers()
    }

    fn with_files(&self) -> (Secrets, Vec<Reject>) {
        let (secrets, mut rejects) = identity::with_streamed(self.secrets.clone(), &self.streamed);
        let made_up = matches!(self.settings.certs, Certs::MadeUp);
        let (secrets, unreadable) = identity::with_files(secrets, &self.model, made_up);
        rejects.extend(unreadable);
        (secrets, rejects)
    }

    fn folders(&self) -> Vec<PathBuf> {
        let mut folders = match &self.settings.input {
            Input::Yaml(paths) => paths.folders(),
            Input::XdsDir(folder) => vec![folder.clone()],
            Input::Stream(_) => Vec::new(),
        };
        folders.extend(self.settings.certs.files().iter().filter_map(|file| Some(file.parent()?.to_owned())));
        folders.sort();
        folders.dedup();
        folders
    }

    fn stamps_now(&self) -> Vec<Stamp> {
        let mut files = match &self.settings.input {
            Input::Yaml(paths) => paths.files(),
            Input::XdsDir(folder) => xds_dir::files(folder),
            Input::Stream(_) => Vec::new(),
        };
        files.extend(self.settings.certs.files());
        files.extend(identity::files(&self.model));
        let stamp = |file: PathBuf| {
            let seen = std::fs::metadata(&file).and_then(|m| Ok((m.modified()?, m.len())));
            (file, seen.ok())
        };
        files.into_iter().map(stamp).collect()
    }
}

/// Looks again whenever there is a reason to, for ever. `asked` is for those who know of one (SIGHUP).
pub async fn run(mut control: Control, publish: channel::Sender<Arc<Published>>, mut asked: mpsc::Receiver<()>) {
    let mut watcher = Watcher::new(&control.folders());
    let mut issued = control.settings.certs.changes();
    let mut anchors = control.settings.certs.anchors();
    let mut stream = match &control.settings.input {
        Input::Stream(stream) => {
            tokio::spawn(heal::run(publish.subscribe(), stream.asks.clone()));
            Some(stream.news.clone())
        }
        Input::Yaml(_) | Input::XdsDir(_) => None,
    };
    // What was written between the first look and the watch tells nobody.
    let mut look = true;
    loop {
        if look && let Some(news) = control.reload() {
            let news = control.warm().await.unwrap_or(news);
            tracing::info!("configuration {} is served", news.version);
            publish.send_replace(news);
        }
        watcher.again(&control.folders());
        look = tokio::select! {
            news = control.new_answers() => {
                publish.send_replace(news);
                false
            }
            wake = watcher.wake() => wake == Wake::Event || control.stamps != control.stamps_now(),
            Some(()) = asked.recv() => true,
            () = changed(&mut issued) => true,
            () = changed(&mut anchors) => true,
            () = changed(&mut stream) => match control.take_in_endpoints() {
                Some(news) => {
                    publish.send_replace(news);
                    false
                }
                None => true,
            },
        };
    }
}

/// The next change; never, where there is nothing that changes, or nobody who changes it any more.
async fn changed<T>(of: &mut Option<channel::Receiver<T>>) {
    let told = match of {
        Some(news) => news.changed().await.is_ok(),
        None => false,
    };
    if !told {
        std::future::pending::<()>().await;
    }
}

/// An input that cannot be taken in at all; what was served stays.
fn trouble_with(what: &str, error: &anyhow::Error) -> Reject {
    Reject {
        resource: what.to_owned(),
        place: None,
        field: String::new(),
        reason: format!("{error:#}; the last good one stays"),
        severity: Severity::Error,
        code: None,
    }
}

fn is_trouble(reject: &Reject) -> bool {
    reject.resource == "Configuration" || reject.resource == "Certificates"
}

/// Logs what is new and what is over.
fn tell(before: &[Reject], now: &[Reject]) {
    let (known, left): (HashSet<&Reject>, HashSet<&Reject>) = (before.iter().collect(), now.iter().collect());
    for reject in now.iter().filter(|r| !known.contains(r)) {
        match reject.severity {
            Severity::Warning => tracing::warn!("{reject}"),
            Severity::Error | Severity::Security => tracing::error!("{reject}"),
        }
    }
    for reject in before.iter().filter(|r| !left.contains(r)) {
        tracing::info!("settled: {reject}");
    }
}

fn all(rejects: &[Reject]) -> anyhow::Error {
    let lines: Vec<String> = rejects.iter().map(ToString::to_string).collect();
    anyhow::anyhow!(lines.join("\n"))
}

fn hash(of: impl FnOnce(&mut DefaultHasher)) -> u64 {
    let mut hasher = DefaultHasher::new();
    of(&mut hasher);
    hasher.finish()
}

fn texts(inputs: &Inputs, hasher: &mut DefaultHasher) {
    for source in inputs.sources.iter().chain(&inputs.mesh).chain(&inputs.networks) {
        (&source.name, &source.text).hash(hasher);
    }
    (inputs.mesh.is_some(), inputs.networks.is_some()).hash(hasher);
}
