//! The right to use a connection for one request.

use std::sync::Arc;

use hyper::client::conn::{http1, http2};

use super::body::Body;
use super::conn::Line;
use super::pool::Pool;

/// The right to send one request.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) pool: Arc<Pool>,
    pub(super) line: Arc<Line>,
    /// The connection has served before.
    pub(super) reused: bool,
    pub(super) held: Option<Held>,
    /// Nothing of a request or response is left on the connection.
    clean: bool,
}

/// The sending half.
pub(super) enum Held {
    H1 { sender: http1::SendRequest<Body>, served: u32 },
    H2 { sender: http2::SendRequest<Body> },
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::H1 { .. } => "h1",
            Self::H2 { .. } => "h2",
        })
    }
}

impl Lease {
    pub(super) fn h1(pool: &Arc<Pool>, line: Arc<Line>, sender: http1::SendRequest<Body>, served: u32) -> Self {
        let held = Some(Held::H1 { sender, served });
        Self { pool: Arc::clone(pool), line, reused: served > 0, held, clean: true }
    }

    pub(super) fn h2(pool: &Arc<Pool>, line: Arc<Line>, sender: http2::SendRequest<Body>, reused: bool) -> Self {
        Self { pool: Arc::clone(pool), line, reused, held: Some(Held::H2 { sender }), clean: true }
    }

    /// Whether the connection is still there after the event loop has looked at its sockets once. A peer's FIN may have
    /// arrived while this worker was busy; its driver sees it only then. Costs one turn of the loop, and only for
    /// connections that were idle for a while.
    pub(super) async fn is_alive_after_a_look(&self) -> bool {
        tokio::task::yield_now().await;
        match &self.held {
            Some(Held::H1 { sender, .. }) => !sender.is_closed() && sender.is_ready(),
            Some(Held::H2 { sender }) => !sender.is_closed(),
            None => false,
        }
    }

    /// Sends the request. What hyper hands back was never written.
    pub(super) async fn send(
        &mut self,
        request: http::Request<Body>,
    ) -> Result<http::Response<hyper::body::Incoming>, (hyper::Error, Option<http::Request<Body>>)> {
        self.clean = false;
        let result = match &mut self.held {
            Some(Held::H1 { sender, served }) => {
                *served += 1;
                sender.try_send_request(request).await
            }
            Some(Held::H2 { sender }) => sender.try_send_request(request).await,
            None => unreachable!("a lease holds its connection until it is dropped"),
        };
        result.map_err(|mut error| {
            let unsent = error.take_message();
            (error.into_error(), unsent)
        })
    }

    /// The exchange is complete: the connection may serve another request.
    pub(super) fn finish(mut self) {
        self.clean = true;
    }

    /// Whether it is HTTP/2.
    pub(super) fn is_h2(&self) -> bool {
        self.pool.key.h2
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        match self.held.take() {
            None => {}
            Some(Held::H2 { sender }) => {
                drop(sender);
                self.pool.end_stream(&self.line);
            }
            Some(Held::H1 { mut sender, served }) => {
                let done = served >= self.pool.requests_per_connection();
                if done {
                    self.pool.place.metrics.cx_max_requests.inc();
                }
                if !self.clean || done || sender.is_closed() {
                    return;
                }
                let (pool, line) = (Arc::clone(&self.pool), Arc::clone(&self.line));
                if sender.is_ready() {
                    return pool.put(Self::h1(&pool, line, sender, served));
                }
                // The driver has to run once more before the connection can take a request. Without a runtime there is
                // nobody left to use it.
                if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                    runtime.spawn(async move {
                        if sender.ready().await.is_ok() {
                            pool.put(Self::h1(&pool, line, sender, served));
                        }
                    });
                }
            }
        }
    }
}
