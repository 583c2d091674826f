//! Names. It asks the resolvers of the host for addresses, and decides nothing about who gets traffic: what a cluster
//! makes of an answer is `control`'s affair.
//!
//! ```ignore
//! let resolver = Resolver::system();
//! let answer = resolver.addresses("db.example.com", Family::V4Only).await?;
//! assert!(answer.addresses.iter().all(IpAddr::is_ipv4));
//! ```

#[cfg(test)]
pub(crate) mod fixture;
mod resolve;

pub use resolve::{Answer, Error, Family, Resolver};
