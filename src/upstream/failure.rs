//! What hyper's errors mean.

use h2::Reason;

use crate::error::{Error, Kind};

/// The failure of a request or a response body. `client_failed`: the request body broke off. `answered`: a part of a
/// response head had come.
pub(super) fn classify(error: hyper::Error, client_failed: bool, answered: bool) -> Error {
    if client_failed {
        return Error::downstream(Kind::DownstreamReset).because(error);
    }
    let kind = match source::<h2::Error>(&error) {
        Some(h2) => of_stream(h2),
        None if error.is_parse() => Kind::UpstreamProtocol,
        // A head that ends in the middle is no HTTP; nothing at all is a closed connection.
        None if error.is_incomplete_message() && answered => Kind::UpstreamProtocol,
        None => Kind::UpstreamClosed,
    };
    Error::upstream(kind).because(error)
}

fn of_stream(error: &h2::Error) -> Kind {
    if error.is_go_away() && error.is_remote() {
        // A peer that leaves in peace names the streams that it has not begun.
        return if error.reason() == Some(Reason::NO_ERROR) { Kind::UpstreamRefused } else { Kind::UpstreamClosed };
    }
    match error.reason() {
        Some(Reason::REFUSED_STREAM) if error.is_remote() => Kind::UpstreamRefused,
        Some(Reason::PROTOCOL_ERROR) => Kind::UpstreamProtocol,
        Some(_) if error.is_library() => Kind::UpstreamProtocol,
        Some(_) => Kind::UpstreamReset,
        None => Kind::UpstreamClosed,
    }
}

fn source<T: std::error::Error + 'static>(error: &hyper::Error) -> Option<&T> {
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}
