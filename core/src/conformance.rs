//! What every implementation of a seam has to pass: the contracts of [`crate::queue::Queue`] and
//! [`crate::store::ObjectStore`], sentence by sentence.
//!
//! The suites ask for no more than AWS promises, and take as long on it as leases of one or two
//! seconds do. They panic with the name of the queue or key, which tells the check that failed.

mod queue;
mod store;

use std::{future::poll_fn, pin::Pin, task::Poll};

pub use queue::queue;
pub use store::store;

/// Runs futures side by side within this task and returns their outputs in order.
async fn together<'a, T>(futures: impl IntoIterator<Item = Pin<Box<dyn Future<Output = T> + 'a>>>) -> Vec<T> {
    let mut running: Vec<_> = futures.into_iter().map(|future| (future, None)).collect();
    poll_fn(|context| {
        let mut all_done = true;
        for (future, output) in &mut running {
            if output.is_none() {
                match future.as_mut().poll(context) {
                    Poll::Ready(done) => *output = Some(done),
                    Poll::Pending => all_done = false,
                }
            }
        }
        if all_done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    running.into_iter().filter_map(|(_, output)| output).collect()
}
