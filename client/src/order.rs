//! Results on their way to the caller: in the order of the inputs, or as they come.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    sync::Arc,
};

use burla_core::{
    record,
    spill::{self, Extent, Spill},
};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes of results that wait in memory for an earlier one; more go to a temporary file.
const IN_MEMORY: u64 = 48 << 20;

/// What one waiting chunk costs beside its records.
const OVERHEAD: u64 = 256;

/// Ends of consecutive inputs.
#[derive(Debug)]
pub(crate) struct Chunk {
    pub(crate) first: u64,
    pub(crate) count: u64,
    pub(crate) attempts: u32,
    pub(crate) worker: Arc<str>,
    pub(crate) content: Content,
    /// The inputs, if they are asked for.
    pub(crate) inputs: VecDeque<Bytes>,
}

#[derive(Debug)]
pub(crate) enum Content {
    /// As in [`burla_core::record`].
    Records(Bytes),
    Cancelled,
}

impl Chunk {
    /// The part of it that is `from..to`, which lies within it.
    pub(crate) fn part(&self, from: u64, to: u64) -> Result<Self, record::Damaged> {
        let content = match &self.content {
            Content::Cancelled => Content::Cancelled,
            Content::Records(bytes) if (from, to) == (self.first, self.first + self.count) => {
                Content::Records(bytes.clone())
            }
            Content::Records(bytes) => {
                let start = skip(bytes, from - self.first)?;
                let end = start + skip(&bytes[start..], to - from)?;
                Content::Records(bytes.slice(start..end))
            }
        };
        let (skipped, wanted) = ((from - self.first) as usize, (to - from) as usize);
        Ok(Self {
            first: from,
            count: to - from,
            attempts: self.attempts,
            worker: self.worker.clone(),
            content,
            inputs: self.inputs.iter().skip(skipped).take(wanted).cloned().collect(),
        })
    }

    fn len(&self) -> u64 {
        let records = match &self.content {
            Content::Records(bytes) => bytes.len(),
            Content::Cancelled => 0,
        };
        (records + self.inputs.iter().map(Bytes::len).sum::<usize>()) as u64 + OVERHEAD
    }
}

/// Bytes of the first `count` records.
fn skip(bytes: &[u8], count: u64) -> Result<usize, record::Damaged> {
    (0..count).try_fold(0, |at, _| {
        let len = record::first_len(&bytes[at..]).ok_or(record::Damaged("a record is missing"))?;
        Ok(at + len)
    })
}

/// Holds chunks back until it is their turn.
#[derive(Debug)]
pub(crate) struct Order {
    /// In order: the next index to be told. Otherwise none.
    next: Option<u64>,
    waiting: BTreeMap<u64, Waiting>,
    waiting_count: u64,
    in_memory: u64,
    spill: Option<Spill>,
    spilled: u64,
    spill_limit: u64,
}

#[derive(Debug)]
enum Waiting {
    Memory(Chunk),
    /// Without its bytes; where its records and its inputs are.
    Spilled(Chunk, [Extent; 2]),
}

impl Order {
    pub(crate) fn new(ordered: bool) -> Self {
        Self {
            next: ordered.then_some(0),
            waiting: BTreeMap::new(),
            waiting_count: 0,
            in_memory: 0,
            spill: None,
            spilled: 0,
            spill_limit: u64::MAX,
        }
    }

    /// Takes a chunk whose inputs have had no result before.
    pub(crate) fn push(&mut self, chunk: Chunk) -> io::Result<()> {
        self.waiting_count += chunk.count;
        let (first, len) = (chunk.first, chunk.len());
        let held = self.next.is_some_and(|next| first != next) && self.in_memory + len > IN_MEMORY;
        let waiting = if held {
            self.spilled += len;
            self.spill(chunk)?
        } else {
            self.in_memory += len;
            Waiting::Memory(chunk)
        };
        self.waiting.insert(first, waiting);
        Ok(())
    }

    fn spill(&mut self, mut chunk: Chunk) -> io::Result<Waiting> {
        let spill = match &self.spill {
            Some(spill) => spill,
            None => {
                self.spill_limit = free_space()? / 2;
                self.spill.insert(Spill::new()?)
            }
        };
        let mut parts = [Bytes::new(), pack(&chunk.inputs)];
        chunk.inputs = VecDeque::new();
        if let Content::Records(bytes) = &mut chunk.content {
            parts[0] = std::mem::take(bytes);
        }
        let extents = [spill.write(&parts[0])?, spill.write(&parts[1])?];
        Ok(Waiting::Spilled(chunk, extents))
    }

    /// The next chunk to be told, if it is there.
    pub(crate) fn pop(&mut self) -> io::Result<Option<Chunk>> {
        let Some(entry) = self.waiting.first_entry() else { return Ok(None) };
        if self.next.is_some_and(|next| *entry.key() != next) {
            return Ok(None);
        }
        let chunk = match entry.remove() {
            Waiting::Memory(chunk) => {
                self.in_memory -= chunk.len();
                chunk
            }
            Waiting::Spilled(chunk, extents) => {
                let chunk = self.unspill(chunk, extents)?;
                self.spilled -= chunk.len();
                chunk
            }
        };
        self.waiting_count -= chunk.count;
        if let Some(next) = &mut self.next {
            *next += chunk.count;
        }
        Ok(Some(chunk))
    }

    fn unspill(&self, mut chunk: Chunk, [records, inputs]: [Extent; 2]) -> io::Result<Chunk> {
        let spill = self.spill.as_ref().ok_or_else(|| io::Error::other("nothing was put aside"))?;
        if let Content::Records(bytes) = &mut chunk.content {
            *bytes = spill.read(records)?;
        }
        chunk.inputs = unpack(spill.read(inputs)?);
        spill.free(records);
        spill.free(inputs);
        Ok(chunk)
    }

    /// The input that results wait for, and how many of them.
    pub(crate) fn waits_for(&self) -> Option<(u64, u64)> {
        self.next
            .filter(|next| !self.waiting.is_empty() && !self.waiting.contains_key(next))
            .map(|next| (next, self.waiting_count))
    }

    /// Whether so much is put aside that no more should be asked for.
    pub(crate) fn full(&self) -> bool {
        self.spilled > self.spill_limit
    }
}

/// Each input behind its length.
fn pack(inputs: &VecDeque<Bytes>) -> Bytes {
    let mut packed = BytesMut::new();
    for input in inputs {
        packed.put_u64_le(input.len() as u64);
        packed.put_slice(input);
    }
    packed.freeze()
}

fn unpack(mut packed: Bytes) -> VecDeque<Bytes> {
    let mut inputs = VecDeque::new();
    while packed.has_remaining() {
        let len = packed.get_u64_le() as usize;
        inputs.push_back(packed.split_to(len));
    }
    inputs
}

fn free_space() -> io::Result<u64> {
    let space = rustix::fs::statvfs(spill::directory())?;
    Ok(space.f_bavail.saturating_mul(space.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;
    use burla_core::record::{Outcome, Record};

    fn chunk(first: u64, count: u64, len: usize) -> Chunk {
        let mut bytes = BytesMut::new();
        for index in first..first + count {
            let result = vec![index as u8; len].into();
            Record { seconds: 0.0, outcome: Outcome::Ok { result, nulled: false } }.write(&mut bytes);
        }
        let inputs = (first..first + count).map(|index| index.to_string().into()).collect();
        let content = Content::Records(bytes.freeze());
        Chunk { first, count, attempts: 1, worker: "w".into(), content, inputs }
    }

    fn check(chunk: Chunk) -> std::ops::Range<u64> {
        let Content::Records(mut bytes) = chunk.content else { panic!("not records") };
        for index in chunk.first..chunk.first + chunk.count {
            let Outcome::Ok { result, .. } = record::take(&mut bytes).unwrap().outcome else {
                panic!("failed")
            };
            assert!(result.iter().all(|byte| *byte == index as u8));
            assert_eq!(chunk.inputs[(index - chunk.first) as usize], index.to_string());
        }
        assert!(bytes.is_empty());
        chunk.first..chunk.first + chunk.count
    }

    #[test]
    fn what_waits_for_an_earlier_one_goes_to_disk_and_comes_back_in_order() {
        let mut order = Order::new(true);
        for first in (1..200).rev() {
            order.push(chunk(first, 1, 1 << 20)).unwrap();
        }
        assert!(order.pop().unwrap().is_none());
        assert_eq!(order.waits_for(), Some((0, 199)));
        assert!(order.in_memory <= IN_MEMORY && order.spilled > 100 << 20);
        order.push(chunk(0, 1, 10)).unwrap();
        let told: Vec<u64> = std::iter::from_fn(|| order.pop().unwrap()).flat_map(check).collect();
        assert_eq!(told, (0..200).collect::<Vec<_>>());
        assert!(order.waiting.is_empty() && order.in_memory == 0 && order.spilled == 0);
        assert_eq!(order.waits_for(), None);
    }

    #[test]
    fn parts_have_their_own_records_and_inputs() {
        let whole = chunk(10, 5, 3);
        assert_eq!(check(whole.part(11, 14).unwrap()), 11..14);
        assert_eq!(check(whole.part(10, 15).unwrap()), 10..15);
        let cut_short = Content::Records(Bytes::from_static(b"\x01"));
        assert!(Chunk { content: cut_short, ..chunk(10, 5, 3) }.part(11, 12).is_err());
    }
}
