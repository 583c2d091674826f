//! gRPC as a client, over connections of our own: sockets from `net`, handshakes from `tls`, HTTP/2 by hyper, messages and
//! statuses by tonic. It carries calls and decides nothing about them: who is asked, again or elsewhere, is for callers.
//!
//! ```ignore
//! let server = Server::from(&bootstrap.xds);
//! let channel = Channel::connect(&server.endpoint(now)?, DIAL_LIMIT).await?;      // files are read anew for each connection
//! let mut grpc = tonic::client::Grpc::new(channel.clone());
//! let request = Credentials::from(&bootstrap.xds).sign(tonic::Request::new(message));                   // the token is read anew for each call
//! let reply = grpc.unary(request, PATH, tonic_prost::ProstCodec::default()).await?;
//! ```
//!
//! A channel is one connection. It ends when it breaks, when the peer says goodbye, or with its last user; nothing is
//! reconnected behind anybody's back.

mod channel;
mod names;
mod server;

pub use channel::{Channel, ConnectError, Endpoint, Keepalive};
pub use server::{Credentials, Server};
