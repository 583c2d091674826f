//! One thread: a runtime, its sockets, its connections.
//!
//! It decides which worker takes a connection and nothing about what happens on it. Workers share only the counts by which
//! they balance; a connection lives and ends on the thread that took it.
//!
//! ```ignore
//! let mut workers = Workers::start(2, &settings)?;
//! let failed = workers.sockets(&snapshot);            // opens what is new, closes what is gone
//! workers.handles()[0].spawn(readiness);
//! match workers.ended().await { _ => {} }                  // a worker that ends untold ends the process
//! ```

mod accept;
mod balance;
mod sockets;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::drain::{Phase, Watch};
use crate::proxy::{self, Env, Node};
use crate::snapshot::Snapshot;
use crate::telemetry::{Logs, Telemetry};
use crate::upstream::View;
use accept::Arrival;
pub use balance::Load;
use balance::{Limit, Loads};
use sockets::Sockets;

/// How often a worker looks whether its loop is late.
const LAG_PERIOD: Duration = Duration::from_secs(1);

/// What all workers are given.
#[derive(Clone)]
pub struct Settings {
    /// The current configuration.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// When to say goodbye.
    pub drain: Watch,
    /// Who we are.
    pub node: Node,
    /// Counters; each worker gets a shard.
    pub telemetry: Arc<Telemetry>,
    /// Access logs; each worker gets a sink.
    pub logs: Arc<Logs>,
    /// Connections of all workers; more wait in the kernel until one ends.
    pub connections: usize,
    /// Connections of all workers that somebody said are enough (`globalDownstreamConnectionLimit`); more are closed at
    /// once and counted, as Envoy does it.
    pub refuse_above: Option<usize>,
}

/// All workers.
pub struct Workers {
    handles: Vec<Handle>,
    sockets: Sockets,
    ended: mpsc::UnboundedReceiver<usize>,
}

/// One worker, from outside.
#[derive(Clone)]
pub struct Handle {
    index: usize,
    loads: Loads,
    runtime: tokio::runtime::Handle,
}

/// What a worker is told. The channel has no bound: whoever tells cannot wait, and the number of connections is bounded by
/// the file descriptors.
enum Command {
    /// Serve a connection that another worker accepted.
    Take(std::net::TcpStream, Arrival),
    /// Accept from a socket that was opened for this worker.
    Listen(SocketAddr, Way, std::net::TcpListener),
    /// Close it.
    Close(SocketAddr),
}

/// Until when a socket accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Peers have to go elsewhere once we close.
    Inbound,
    /// The local application needs its upstreams to the end.
    Outbound,
}

impl Workers {
    /// Starts `count` threads, at least one.
    pub fn start(count: usize, settings: &Settings) -> io::Result<Self> {
        let count = count.max(1);
        let loads: Loads = (0..count).map(|_| Default::default()).collect();
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::unbounded_channel()).unzip();
        let senders: Arc<[_]> = senders.into();
        let (told, ended) = mpsc::unbounded_channel();
        let limit = settings.refuse_above.map(|most| Arc::new(Limit::new(most)));
        let mut handles = Vec::with_capacity(count);
        for (index, commands) in receivers.into_iter().enumerate() {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
            handles.push(Handle { index, loads: Arc::clone(&loads), runtime: runtime.handle().clone() });
            let worker = Start {
                index,
                loads: Arc::clone(&loads),
                peers: Arc::clone(&senders),
                settings: settings.clone(),
                limit: limit.clone(),
            };
            let told = Told(index, told.clone());
            thread(index, move || {
                let _told = told;
                runtime.block_on(worker.run(commands));
                // Connections that are cut still tell their logs; only then it is over.
                drop(runtime);
            })?;
        }
        Ok(Self { handles, sockets: Sockets::new(senders), ended })
    }

    /// Each worker.
    pub fn handles(&self) -> &[Handle] {
        &self.handles
    }

    /// Opens the sockets of new listeners on every worker and closes those of listeners that are gone. What cannot be
    /// opened is returned and tried again with the next call.
    pub fn sockets(&mut self, snapshot: &Snapshot) -> Vec<(SocketAddr, io::Error)> {
        self.sockets.follow(snapshot)
    }

    /// Waits until a worker ends; which one.
    pub async fn ended(&mut self) -> usize {
        // Each thread holds a sender until it ends, so an empty channel means that all have.
        self.ended.recv().await.unwrap_or(0)
    }

    /// Waits until all have ended.
    pub async fn all_ended(&mut self) {
        while self.ended.recv().await.is_some() {}
    }
}

impl Handle {
    /// Runs something on the worker's thread.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) -> tokio::task::JoinHandle<()> {
        self.runtime.spawn(future)
    }

    /// Number of the worker.
    pub fn index(&self) -> usize {
        self.index
    }

    /// What it carries now.
    pub fn load(&self) -> &Load {
        &self.loads[self.index]
    }
}

/// Tells on drop, so that a panic is an end as well.
struct Told(usize, mpsc::UnboundedSender<usize>);

impl Drop for Told {
    fn drop(&mut self) {
        // Nobody listens once the process is on its way out.
        let _ = self.1.send(self.0);
    }
}

fn thread(index: usize, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(format!("worker-{index}")).spawn(run)
}

/// What a worker begins with.
struct Start {
    index: usize,
    loads: Loads,
    peers: Arc<[mpsc::UnboundedSender<Command>]>,
    settings: Settings,
    limit: Option<Arc<Limit>>,
}

/// A worker, on its own thread.
struct Worker {
    index: usize,
    loads: Loads,
    peers: Arc<[mpsc::UnboundedSender<Command>]>,
    drain: Watch,
    env: Arc<Env>,
    /// See [`Settings::connections`].
    connections: usize,
    /// See [`Settings::refuse_above`].
    limit: Option<Arc<Limit>>,
}

impl Start {
    async fn run(mut self, commands: mpsc::UnboundedReceiver<Command>) {
        let snap = Arc::clone(&self.settings.snapshots.borrow_and_update());
        let shard = self.settings.telemetry.shard();
        let env = Env::new(proxy::Settings {
            worker: self.index,
            view: Arc::new(View::counted(snap, Arc::clone(&shard), None)),
            drain: self.settings.drain.clone(),
            node: self.settings.node.clone(),
        });
        let env = Arc::new(env.with_telemetry(shard, self.settings.logs.sink()));
        let snapshots = self.settings.snapshots.clone();
        tokio::spawn(follow(self.settings.snapshots, Arc::clone(&env)));
        tokio::spawn(proxy::export(Arc::clone(&env)));
        tokio::spawn(measure_lag(Arc::clone(&self.loads), self.index));
        let worker = Worker {
            index: self.index,
            loads: self.loads,
            peers: self.peers,
            drain: self.settings.drain,
            env,
            connections: self.settings.connections,
            limit: self.limit,
        };
        Arc::new(worker).run(commands, snapshots).await;
    }
}

impl Worker {
    /// Obeys until the end; what still runs then is dropped with the runtime.
    async fn run(
        self: Arc<Self>,
        mut commands: mpsc::UnboundedReceiver<Command>,
        mut snapshots: watch::Receiver<Arc<Snapshot>>,
    ) {
        let mut accepting: HashMap<SocketAddr, AbortHandle> = HashMap::new();
        let (failed, mut failures) = mpsc::channel(1);
        let mut drain = self.drain.clone();
        loop {
            let command = tokio::select! {
                () = drain.reached(Phase::Gone) => return,
                failure = failures.recv() => {
                    tracing::error!("worker {} cannot accept any more: {failure:?}", self.index);
                    return;
                }
                command = commands.recv() => command,
            };
            match command {
                Some(Command::Take(tcp, arrival)) => match tokio::net::TcpStream::from_std(tcp) {
                    Ok(tcp) => self.serve(tcp, arrival),
                    Err(e) => tracing::warn!("a connection was lost between workers: {e}"),
                },
                Some(Command::Listen(address, way, socket)) => {
                    // Published before the order was given; without it the first clients would meet an unknown listener.
                    take_over(&mut snapshots, &self.env);
                    let worker = Arc::clone(&self);
                    let failed = failed.clone();
                    let task = tokio::spawn(async move {
                        if let Err(e) = worker.accept(address, way, socket).await {
                            // One failure is enough to end the worker.
                            let _ = failed.try_send((address, e));
                        }
                    });
                    accepting.insert(address, task.abort_handle());
                }
                Some(Command::Close(address)) => {
                    // Accepting holds nothing between two connections, so it can end anywhere.
                    accepting.remove(&address).into_iter().for_each(|task| task.abort());
                }
                None => return,
            }
        }
    }
}

/// Builds a view of each snapshot and makes it current.
async fn follow(mut snapshots: watch::Receiver<Arc<Snapshot>>, env: Arc<Env>) {
    while snapshots.changed().await.is_ok() {
        take_over(&mut snapshots, &env);
    }
}

/// Makes the newest snapshot current, unless it is.
fn take_over(snapshots: &mut watch::Receiver<Arc<Snapshot>>, env: &Env) {
    let snap = Arc::clone(&snapshots.borrow_and_update());
    let view = env.view();
    if !Arc::ptr_eq(&view.snap, &snap) {
        env.swap(Arc::new(View::new(snap, Some(&view))));
    }
}

/// How late a timer is says how long others had to wait for the thread.
async fn measure_lag(loads: Loads, index: usize) {
    loop {
        let due = Instant::now() + LAG_PERIOD;
        tokio::time::sleep_until(due).await;
        let late = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX);
        loads[index].lag_micros.store(late, Ordering::Relaxed);
    }
}
