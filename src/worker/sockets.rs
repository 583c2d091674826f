//! Which sockets are open: one per listener and worker, opened in one place so that a failure is known at once.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use proxy_config::model::Direction;
use tokio::sync::mpsc::UnboundedSender;

use super::{Command, Way};
use crate::net::{self, ListenOptions};
use crate::snapshot::{Listener, Snapshot};

/// Open sockets.
pub(super) struct Sockets {
    workers: Arc<[UnboundedSender<Command>]>,
    open: BTreeMap<SocketAddr, Kind>,
}

/// What a socket has to be reopened for.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    transparent: bool,
    way: Way,
}

impl Sockets {
    pub(super) fn new(workers: Arc<[UnboundedSender<Command>]>) -> Self {
        Self { workers, open: BTreeMap::new() }
    }

    /// Opens what is new and closes what is gone; what cannot be opened.
    pub(super) fn follow(&mut self, snapshot: &Snapshot) -> Vec<(SocketAddr, io::Error)> {
        let wanted: BTreeMap<SocketAddr, Kind> = snapshot.bound().iter().flat_map(|l| wanted(l)).collect();
        let gone: Vec<SocketAddr> =
            self.open.iter().filter(|(at, kind)| wanted.get(at) != Some(kind)).map(|(at, _)| *at).collect();
        for address in gone {
            self.open.remove(&address);
            self.tell(|| Some(Command::Close(address)));
        }
        let mut failed = Vec::new();
        for (address, kind) in wanted {
            if self.open.contains_key(&address) {
                continue;
            }
            match self.listen(address, kind) {
                Ok(()) => {
                    self.open.insert(address, kind);
                }
                Err(e) => failed.push((address, e)),
            }
        }
        failed
    }

    fn listen(&self, address: SocketAddr, kind: Kind) -> io::Result<()> {
        let options = ListenOptions {
            reuse_port: true,
            transparent: kind.transparent,
            dual_stack: address.ip().is_unspecified(),
        };
        net::probe_free(address, options)?;
        let opened: Vec<std::net::TcpListener> =
            self.workers.iter().map(|_| net::listen(address, options)?.into_std()).collect::<io::Result<_>>()?;
        let mut opened = opened.into_iter();
        self.tell(|| Some(Command::Listen(address, kind.way, opened.next()?)));
        Ok(())
    }

    fn tell(&self, mut command: impl FnMut() -> Option<Command>) {
        for worker in &*self.workers {
            if let Some(command) = command() {
                // A worker that is gone takes the process with it.
                let _ = worker.send(command);
            }
        }
    }
}

fn wanted(listener: &Listener) -> impl Iterator<Item = (SocketAddr, Kind)> {
    let way = if listener.direction == Direction::Outbound { Way::Outbound } else { Way::Inbound };
    let kind = Kind { transparent: listener.transparent, way };
    listener.address.iter().chain(&listener.additional).map(move |address| (*address, kind))
}
