//! What was sent and has no result yet.

use std::collections::{BTreeMap, VecDeque};

use burla_core::ids::JobId;
use bytes::Bytes;

use super::INLINE;
use crate::packer::{Batch, Codec};

/// Messages that are under way for each slot: one that is run, one that the worker holds ready, one in
/// the queue.
const MESSAGES: usize = 3;

/// Bytes of inputs that are under way, but for the first two messages. An embedded queue takes more than
/// that without waiting, so a driver that sends never waits for workers that wait for the driver.
const BYTES: usize = 48 << 20;

/// Keeps the inputs that are under way: they can be sent again until they have results.
#[derive(Default)]
pub(super) struct Window {
    sent: BTreeMap<u64, Sent>,
    bytes: usize,
    /// Batches that are done, of which an object may be left.
    done: Vec<(u64, bool)>,
}

struct Sent {
    batch: Batch,
    bytes: usize,
    missing: u64,
}

impl Window {
    /// The key of the object that holds the batch from `first` on, if it does not fit in a message.
    pub(super) fn key(job: &JobId, first: u64) -> String {
        format!("jobs/{job}/inputs/{first}")
    }

    /// Whether more may be sent.
    pub(super) fn open(&self, slots: usize) -> bool {
        self.sent.len() < 2 || (self.sent.len() < MESSAGES * slots && self.bytes < BYTES)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.sent.is_empty()
    }

    pub(super) fn sent(&mut self, batch: Batch) {
        let bytes = batch.inputs.len() + batch.contents.iter().map(Bytes::len).sum::<usize>();
        self.bytes += bytes;
        let missing = batch.ends.len() as u64;
        self.sent.insert(batch.first, Sent { batch, bytes, missing });
    }

    /// So many inputs from `first` on have results now. Gives them, if `wanted`, and the sizes of
    /// batches that are done by that.
    pub(super) fn cover(
        &mut self,
        first: u64,
        count: u64,
        wanted: Option<Codec>,
    ) -> (VecDeque<Bytes>, Vec<usize>) {
        let (mut inputs, mut finished) = (VecDeque::new(), Vec::new());
        let mut at = first;
        while at < first + count {
            let Some((&start, sent)) = self.sent.range_mut(..=at).next_back() else { break };
            let end = start + sent.batch.ends.len() as u64;
            let covered = end.min(first + count).saturating_sub(at);
            if covered == 0 {
                break;
            }
            if let Some(codec) = wanted {
                inputs
                    .extend((at - start..at - start + covered).map(|i| sent.batch.input(codec, i as usize)));
            }
            sent.missing -= covered;
            if sent.missing == 0
                && let Some(sent) = self.sent.remove(&start)
            {
                self.bytes -= sent.bytes;
                self.done.push((start, !sent.batch.files.is_empty() || sent.bytes > INLINE));
                finished.push(sent.batch.ends.len());
            }
            at += covered;
        }
        (inputs, finished)
    }

    /// Objects that nobody needs any more.
    pub(super) fn take_objects(&mut self, job: &JobId) -> Vec<String> {
        self.done.drain(..).filter(|(_, object)| *object).map(|(first, _)| Self::key(job, first)).collect()
    }
}
