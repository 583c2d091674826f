//! How much a silent connection holds. A future has room for the largest thing that it ever does, so what is done rarely
//! has to be boxed, or ten thousand silent clients pay for it.

/// As large as a worker's seat.
type Seat = [usize; 4];

use super::super::{conn, http, http1, serve, tcp};

/// Size of what a function with so many arguments returns; it is never called.
macro_rules! size_of_future {
    ($name:path, $($argument:ident),+) => {{
        fn size<$($argument,)+ F>(_: impl FnOnce($($argument),+) -> F) -> usize {
            size_of::<F>()
        }
        size($name)
    }};
}

#[test]
fn silence_holds_little() {
    for (name, size, most) in [
        ("a connection", size_of_future!(serve::<Seat>, A, B, C, D, E, G, H), 0),
        ("its opening", size_of_future!(conn::open, A, B), 0),
        ("HTTP", size_of_future!(http::serve, A, B, C), 0),
        ("HTTP/1", size_of_future!(http1::serve, A, B), 0),
        ("silence", size_of_future!(http1::silence, A, B), 0),
        ("TCP", size_of_future!(tcp::serve, A, B, C, D), 0),
    ] {
        assert!(size <= most, "{name}: {size} bytes, at most {most}");
    }
}
