//! A future beside a busier one.
//!
//! A connection waits for its codec and, beside it, for reasons to say goodbye. The codec is woken several times for each
//! request; asking the timer and the drain each time would cost more than routing does. This wrapper asks only when one
//! of them has called.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// A future that is polled only when it was woken itself.
pub(super) struct Quiet<F> {
    inner: Pin<Box<F>>,
    call: Arc<Call>,
    waker: Waker,
}

struct Call {
    called: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Call {
    fn wake(self: Arc<Self>) {
        self.called.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl<F: Future> Quiet<F> {
    pub(super) fn new(inner: F) -> Self {
        let call = Arc::new(Call { called: AtomicBool::new(true), task: AtomicWaker::new() });
        Self { inner: Box::pin(inner), waker: Waker::from(Arc::clone(&call)), call }
    }
}

impl<F: Future> Future for Quiet<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.get_mut();
        // Registered before looking, so that a call in between is not lost.
        this.call.task.register(cx.waker());
        if !this.call.called.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        this.inner.as_mut().poll(&mut Context::from_waker(&this.waker))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[tokio::test]
    async fn it_is_asked_only_when_it_called() {
        let (sender, receiver) = tokio::sync::oneshot::channel::<u8>();
        let mut asked = 0;
        let mut receiver = Box::pin(receiver);
        let counted = poll_fn(move |cx| {
            asked += 1;
            receiver.as_mut().poll(cx).map(|got| (asked, got.unwrap()))
        });
        let mut quiet = Quiet::new(counted);
        for _ in 0..5 {
            assert!(poll_fn(|cx| Poll::Ready(Pin::new(&mut quiet).poll(cx).is_pending())).await);
        }
        sender.send(7).unwrap();
        assert_eq!(quiet.await, (2, 7));
    }
}
