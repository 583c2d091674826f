//! What is counted of the stream with a control plane: rare events, through the facade.

use std::time::{SystemTime, UNIX_EPOCH};

/// The stream is there, or not: `control_plane_connected`.
pub fn connected(is: bool) {
    ::metrics::gauge!("control_plane_connected").set(if is { 1.0 } else { 0.0 });
}

/// What a response came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// Something that is held says something else.
    Changed,
    /// It said what was known.
    Same,
    /// Some of it cannot be served.
    Refused,
}

/// A response came at this time: `control_plane_pushes_total`, `control_plane_last_push_seconds`; and of those,
/// `control_plane_unchanged_total` and `control_plane_refused_total`.
pub fn pushed(at: SystemTime, came: Came) {
    ::metrics::counter!("control_plane_pushes_total").increment(1);
    ::metrics::counter!("control_plane_unchanged_total").increment(u64::from(came == Came::Same));
    ::metrics::counter!("control_plane_refused_total").increment(u64::from(came == Came::Refused));
    let seconds = at.duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
    ::metrics::gauge!("control_plane_last_push_seconds").set(seconds);
}
