//! Notices that files may have changed. What changed is the reader's question; this only says "look again".

use std::path::PathBuf;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

/// A folder of several files is written file by file; one look after the last is enough.
const QUIET: Duration = Duration::from_millis(20);
/// Under constant writing a look is taken after this time all the same.
const AT_MOST: Duration = Duration::from_millis(200);
/// Network file systems and replaced folders do not tell; looking at the files' stamps costs some stat calls.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// Why to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wake {
    /// Something was written.
    Event,
    /// It is time.
    Time,
}

/// Watches folders.
pub(super) struct Watcher {
    inner: Option<RecommendedWatcher>,
    events: mpsc::Receiver<()>,
}

impl Watcher {
    /// Watches; where the system refuses (no inotify instances left), only the regular look remains.
    pub(super) fn new(folders: &[PathBuf]) -> Self {
        let (sender, events) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // A full channel has a wake-up in it already. Errors wake too: events may have been lost.
            if event.map_or(true, |e| is_change(e.kind)) {
                let _ = sender.try_send(());
            }
        });
        let inner = watcher.inspect_err(|e| tracing::warn!("files are only looked at every {LOOK_AGAIN:?}: {e}")).ok();
        let mut watching = Self { inner, events };
        watching.again(folders);
        watching
    }

    /// Watches these folders; those that are watched stay so, a replaced one is found again.
    pub(super) fn again(&mut self, folders: &[PathBuf]) {
        let Some(inner) = &mut self.inner else { return };
        for folder in folders {
            if let Err(e) = inner.watch(folder, RecursiveMode::NonRecursive) {
                tracing::debug!("{}: {e}", folder.display());
            }
        }
    }

    /// Waits until there is a reason to look.
    pub(super) async fn wake(&mut self) -> Wake {
        tokio::select! {
            event = self.events.recv(), if self.inner.is_some() => {
                if event.is_none() {
                    // The watcher's thread is gone; from now on only time wakes.
                    self.inner = None;
                }
            }
            () = sleep(LOOK_AGAIN) => return Wake::Time,
        }
        let latest = Instant::now() + AT_MOST;
        while let Ok(Some(())) = timeout_at(latest.min(Instant::now() + QUIET), self.events.recv()).await {
            if Instant::now() >= latest {
                break;
            }
        }
        Wake::Event
    }
}

/// Our own reading is no change.
fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_swapped_link_wakes() {
        let dir = tempfile::tempdir().unwrap();
        for version in ["..v1", "..v2"] {
            std::fs::create_dir(dir.path().join(version)).unwrap();
        }
        std::os::unix::fs::symlink("..v1", dir.path().join("..data")).unwrap();
        let mut watcher = Watcher::new(&[dir.path().to_owned()]);
        // As the kubelet does it: a new link under another name, renamed over the old one.
        std::os::unix::fs::symlink("..v2", dir.path().join("..data_tmp")).unwrap();
        std::fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
        assert_eq!(watcher.wake().await, Wake::Event);
    }

    #[tokio::test(start_paused = true)]
    async fn time_wakes_where_nothing_tells() {
        let mut watcher = Watcher { inner: None, events: mpsc::channel(1).1 };
        let start = Instant::now();
        assert_eq!(watcher.wake().await, Wake::Time);
        assert_eq!(start.elapsed(), LOOK_AGAIN);
    }

    #[tokio::test(start_paused = true)]
    async fn constant_writing_is_cut_off() {
        let (sender, events) = mpsc::channel(1);
        let dir = tempfile::tempdir().unwrap();
        let mut watcher = Watcher { events, ..Watcher::new(&[dir.path().to_owned()]) };
        let writer = tokio::spawn(async move {
            while sender.send(()).await.is_ok() {
                sleep(Duration::from_millis(10)).await;
            }
        });
        let start = Instant::now();
        assert_eq!(watcher.wake().await, Wake::Event);
        let took = start.elapsed();
        assert!(took >= AT_MOST - QUIET && took <= AT_MOST + QUIET, "{took:?}");
        writer.abort();
    }
}
