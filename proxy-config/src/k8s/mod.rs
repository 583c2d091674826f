//! Kubernetes kinds, as far as a mesh reads them. What a type leaves out has no effect on traffic here.

mod endpoint_slice;
mod meta;
mod pod;
mod service;

pub use endpoint_slice::{
    Conditions, EndpointPort, EndpointSlice, Endpoints, SliceEndpoint, Subset, SubsetAddress, TargetRef,
};
pub use meta::{Meta, Owner};
pub use pod::{Container, ContainerPort, Pod, PodCondition, PodIp, PodSpec, PodStatus};
pub use service::{IntOrString, Port, Service, ServiceSpec};
