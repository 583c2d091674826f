//! YAML as Kubernetes reads it: documents with places, values with field paths.
//!
//! [`tree`] parses text into nodes that know their line and column; [`de`] hands a node to serde and notes the fields
//! that no type asks for. Scalars follow YAML 1.1: an unquoted `off` is a boolean, and a text field that holds one is
//! an error that says to quote it.

pub(crate) mod de;
pub(crate) mod tree;

pub(crate) use de::{Failure, Notes, Scalar, read, scalar};
pub(crate) use tree::{Data, Node, parse};
