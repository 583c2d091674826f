//! Bytes in, bytes out: sockets, streams, inspection of first bytes, copying. No policy is decided here.
//!
//! The only place for `socket2`. A worked example, one opaque connection from accept to end:
//!
//! ```ignore
//! let (socket, peer) = listener.accept().await?;
//! let destination = net::original_dst(&socket).unwrap_or(socket.local_addr()?);
//! let mut client = Stream::from(socket);
//! let mut sniffer = Sniffer::new(Inspectors { tls: true, http: true });
//! sniffer.run(&mut client).await?;
//! let seen = sniffer.finish();
//! let mut client = client.replay(seen.prefix);
//! let mut app = net::connect(&Target::new(destination)).await?;
//! net::copy::both(&mut client, &mut app, &counters, None).await;
//! ```

mod client_hello;
mod connect;
pub mod copy;
mod frames;
mod gather;
pub mod grpc;
mod heads;
pub mod interfaces;
mod listen;
mod orig_dst;
pub mod proxy_protocol;
pub mod sniff;
mod stream;

pub use connect::{Keepalive, Target, connect, connect_unix};
pub use frames::{Flood, Frames};
pub use gather::{Gather, Turn};
pub use heads::Heads;
pub use listen::{ListenOptions, listen, probe_free};
pub use orig_dst::original_dst;
pub use stream::{Io, Stream};
