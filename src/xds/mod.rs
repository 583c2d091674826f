//! Speaks with istiod: the aggregated discovery stream.
//!
//! [`Ads`] decides what is asked for and answered, as a value without I/O; [`start`] carries its messages. Neither decides
//! about traffic: what they give out is a model, whole and warm, that `control` compiles and publishes.

mod ads;
mod check;
mod codec;
#[cfg(test)]
mod fixture;
mod kept;
mod kind;
mod messages;
mod pace;
mod received;
mod refs;
mod run;
mod store;
#[cfg(test)]
mod tests;
mod warm;
mod wire;

pub use ads::{Ads, Health, Options, Step};
pub use check::Checks;
pub use kept::Kept;
pub use kind::{HEALTH, Kind};
pub use messages::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, Request, Resource, Response, Status,
};
pub use received::{Received, Record, Refusal, Version};
pub use run::{Ask, News, Settings, Stream, start};
pub use warm::Update;
