//! The seam to message queues.

mod embedded;

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

pub use embedded::{Embedded, Weather};

/// A service of named queues.
///
/// # Contract
///
/// - **At least once, unordered.** What `send` accepted is received at least once, in any order,
///   until it is acknowledged; it may be received twice without cause.
/// - **Leases.** A received message is hidden until its lease ends; then it is received again
///   unless it was acknowledged. `extend` sets a lease anew, counted from now; zero gives the
///   message back at once.
/// - **A stale receipt does nothing**: acknowledging or extending with the receipt of an earlier
///   delivery returns `false` for it and leaves the message as it is.
/// - **Limits.** A call takes at most [`BATCH_MESSAGES`] messages of together [`BATCH_BYTES`];
///   more is [`Error::TooLarge`] and sends nothing. Within a call single messages may fail.
/// - **Long polls.** `receive` returns as soon as there is a message, and with none after `wait`.
/// - `send` may take as long as it likes, for instance until a full queue has room.
/// - A queue that does not exist, or does no more, is [`Error::NoQueue`].
/// - Dropping a future loses nothing: what it had received comes back when its lease ends.
#[async_trait]
pub trait Queue: Send + Sync + 'static {
    /// Makes a queue; one of that name that exists is left as it is.
    async fn create(&self, queue: &str) -> Result<(), Error>;

    /// Deletes a queue with all that is in it. None of that name is fine.
    async fn delete(&self, queue: &str) -> Result<(), Error>;

    /// Sends messages. The answer tells for each whether it was accepted.
    async fn send(&self, queue: &str, bodies: &[Bytes]) -> Result<Vec<bool>, Error>;

    /// Receives at most `max` (and never more than [`BATCH_MESSAGES`]) messages, waiting at most
    /// `wait` for the first, each leased for `lease`.
    async fn receive(
        &self,
        queue: &str,
        max: usize,
        lease: Duration,
        wait: Duration,
    ) -> Result<Vec<Delivery>, Error>;

    /// Deletes messages. The answer tells for each receipt whether it still held.
    async fn acknowledge(&self, queue: &str, receipts: &[Receipt]) -> Result<Vec<bool>, Error>;

    /// Leases messages anew. The answer tells for each receipt whether it still held.
    async fn extend(&self, queue: &str, receipts: &[Receipt], lease: Duration) -> Result<Vec<bool>, Error>;
}

/// Most messages in one call.
pub const BATCH_MESSAGES: usize = 10;

/// Most bytes in one message and in one call: SQS takes 1 MiB of text, which is 768 KiB before base64.
pub const BATCH_BYTES: usize = 768 << 10;

/// The longest poll that SQS allows.
pub const LONGEST_POLL: Duration = Duration::from_secs(20);

/// One delivery of a message.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The message.
    pub body: Bytes,
    /// Stands for this delivery.
    pub receipt: Receipt,
}

/// Stands for one delivery of one message.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receipt(pub String);

/// Why a queue did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no queue of that name.
    #[error("queue {0} does not exist")]
    NoQueue(String),
    /// More than one call may carry.
    #[error("{messages} messages of {bytes} bytes are more than one call to a queue takes")]
    TooLarge {
        /// How many messages.
        messages: usize,
        /// Of how many bytes together.
        bytes: usize,
    },
    /// The service did not answer, or refused for now; worth trying again.
    #[error("queue service is unavailable: {0}")]
    Unavailable(String),
}

/// What every user of a [`Queue`] wants, on top of what an implementation has to give.
#[async_trait]
pub trait QueueExt: Queue {
    /// Sends all of `bodies`, in as many calls as the limits ask for, and repeats what was
    /// refused, with growing pauses, at most eight times.
    async fn send_all(&self, queue: &str, bodies: &[Bytes]) -> Result<(), Error> {
        let mut left: Vec<Bytes> = bodies.to_vec();
        for pause in pauses() {
            let mut refused = Vec::new();
            for call in calls(&left) {
                match self.send(queue, call).await {
                    Ok(accepted) => {
                        refused
                            .extend(call.iter().zip(accepted).filter(|(_, ok)| !ok).map(|(b, _)| b.clone()));
                    }
                    Err(Error::Unavailable(_)) => refused.extend(call.iter().cloned()),
                    Err(error) => return Err(error),
                }
            }
            if refused.is_empty() {
                return Ok(());
            }
            left = refused;
            tokio::time::sleep(pause).await;
        }
        Err(Error::Unavailable(format!("{} messages to {queue} were refused again and again", left.len())))
    }

    /// Deletes any number of messages. Stale receipts are left alone.
    async fn acknowledge_all(&self, queue: &str, receipts: &[Receipt]) -> Result<(), Error> {
        for call in receipts.chunks(BATCH_MESSAGES) {
            self.acknowledge(queue, call).await?;
        }
        Ok(())
    }
}

impl<Q: Queue + ?Sized> QueueExt for Q {}

/// Pauses between tries: 20 ms, doubling, eight of them, five seconds in all.
fn pauses() -> impl Iterator<Item = Duration> {
    (0..8).map(|n| Duration::from_millis(20 << n))
}

/// Splits `bodies` into runs that one call takes. A body over the limit is a run of its own, which the service refuses.
fn calls(bodies: &[Bytes]) -> Vec<&[Bytes]> {
    let (mut calls, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, body) in bodies.iter().enumerate() {
        if i > start && (i - start == BATCH_MESSAGES || bytes + body.len() > BATCH_BYTES) {
            calls.push(&bodies[start..i]);
            (start, bytes) = (i, 0);
        }
        bytes += body.len();
    }
    if start < bodies.len() {
        calls.push(&bodies[start..]);
    }
    calls
}

/// Refuses what one call may not carry.
pub fn check_limits(bodies: &[Bytes]) -> Result<(), Error> {
    let bytes = bodies.iter().map(Bytes::len).sum();
    if bodies.len() > BATCH_MESSAGES || bytes > BATCH_BYTES {
        return Err(Error::TooLarge { messages: bodies.len(), bytes });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_respect_both_limits_and_keep_the_order() {
        let body = |len: usize| Bytes::from(vec![0; len]);
        let bodies: Vec<Bytes> =
            [vec![body(1); 23], vec![body(500 << 10); 2], vec![body(200 << 10), body(1 << 20)]].concat();
        let lens: Vec<Vec<usize>> =
            calls(&bodies).iter().map(|call| call.iter().map(Bytes::len).collect()).collect();
        assert_eq!(lens.concat(), bodies.iter().map(Bytes::len).collect::<Vec<_>>());
        assert_eq!(lens.iter().map(Vec::len).collect::<Vec<_>>(), [10, 10, 4, 2, 1]);
        assert!(calls(&bodies)[..4].iter().all(|call| check_limits(call).is_ok()));
        assert!(check_limits(calls(&bodies)[4]).is_err());
    }
}
