//! Sizes that many connections and requests are multiplied with. A future has room for the largest thing that it ever
//! does, so what is done rarely has to be boxed, or ten thousand silent clients pay for it.

use super::super::{conn, http, http1, request, serve, tcp};

/// As large as a worker's seat.
type Seat = [usize; 4];

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
fn futures_stay_small() {
    let sizes = [
        ("a connection", size_of_future!(serve::<Seat>, A, B, C, D, E, G), 512),
        ("its opening", size_of_future!(conn::open, A, B), 1024),
        ("HTTP", size_of_future!(http::serve, A, B, C), 320),
        ("HTTP/1", size_of_future!(http1::serve, A, B), 256),
        ("silence", size_of_future!(http1::silence, A, B), 1024),
        ("TCP", size_of_future!(tcp::serve, A, B, C, D), 2 * 1024),
        ("a request", size_of_future!(request::handle, A, B), 6 * 1024),
    ];
    let large: Vec<_> = sizes.into_iter().filter(|(_, size, most)| size > most).collect();
    assert!(large.is_empty(), "bytes, at most: {large:?}");
}
