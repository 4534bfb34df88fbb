//! The messages between client, agents and workers.
//!
//! A message is a header, encoded by [`crate::wire`], and a tail of opaque bytes: the encoded
//! inputs or result records, which only the runtime child and the caller's front end decode.

use serde::{Deserialize, Serialize};

use crate::{
    clock::Millis,
    ids::{JobId, NodeId, WorkerId},
    job::{JobSpec, QueueSet},
};

/// Where a message's bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// In the message, behind the header.
    Inline,
    /// In the object store: the message points at the object.
    Object {
        /// Its key.
        key: String,
        /// How many bytes it has.
        len: u64,
    },
}

/// A view of an immutable batch of inputs: which of them are to run. A split, a retry or a crash
/// sends the same bytes with another range.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputHeader {
    /// The job it belongs to; a foreign one is not decoded further.
    pub job: JobId,
    /// Index of the batch's first input in the job.
    pub first: u64,
    /// How many inputs the batch holds.
    pub count: u32,
    /// First input to run, counted within the batch.
    pub from: u32,
    /// One past the last input to run, counted within the batch.
    pub to: u32,
    /// Attempts that were charged to the input `from` already; the others have none.
    pub attempts: u32,
    /// How many bytes of the body are the inputs; the files' contents follow.
    pub inputs_len: u64,
    /// With [`JobSpec::files`], one entry for each input of the batch; else empty.
    pub files: Vec<FileEntry>,
    /// Where the batch is.
    pub body: Body,
}

/// A file that travels as an input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its path as the caller named it, relative: it keeps its folders where it runs.
    pub name: String,
    /// Where its content is.
    pub content: FileContent,
}

/// Where a file's content is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileContent {
    /// The next so many bytes of the body, after the inputs and the files before it.
    Packed(u64),
    /// An object of its own.
    Object {
        /// Its key.
        key: String,
    },
}

/// What a worker tells the client on the result queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromWorker {
    /// Results of consecutive inputs; the tail or object holds their [`crate::record`]s.
    Results(ResultHeader),
    /// The worker can't run this job at all, for instance because the function can't be loaded.
    Unable(Unable),
}

impl FromWorker {
    /// The job it belongs to.
    #[must_use]
    pub fn job(&self) -> &JobId {
        match self {
            Self::Results(header) => &header.job,
            Self::Unable(unable) => &unable.job,
        }
    }
}

/// Results of the inputs `first .. first + count`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultHeader {
    /// The job they belong to.
    pub job: JobId,
    /// Who ran them.
    pub worker: WorkerId,
    /// Index of the first.
    pub first: u64,
    /// How many there are.
    pub count: u32,
    /// How many attempts each took.
    pub attempts: u32,
    /// Log lines of this worker with a number below this belong to these calls or earlier ones.
    pub log_watermark: u64,
    /// Where the records are.
    pub body: Body,
}

/// Why a worker can't run a job at all.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unable {
    /// The job.
    pub job: JobId,
    /// Who says so.
    pub worker: WorkerId,
    /// What went wrong, one sentence.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// The traceback, if there is one.
    pub traceback: Option<String>,
    /// Whether the user's function or file is at fault (and not the place where it runs).
    pub usage: bool,
}

/// Log lines of one worker, in the order in which they were read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogBatch {
    /// The job they belong to.
    pub job: JobId,
    /// Whose they are.
    pub worker: WorkerId,
    /// Number of the first line; lines of one worker are numbered from 0 without gaps.
    pub sequence: u64,
    /// The lines.
    pub lines: Vec<LogLine>,
}

/// One line that a call wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// The input whose call wrote it; none if no call had run yet.
    pub index: Option<u64>,
    /// Where it was written.
    pub stream: Stream,
    /// Its bytes, without the line's end.
    #[serde(with = "serde_bytes_compat")]
    pub text: Vec<u8>,
    /// Whether the line goes on in the next one: it was longer than [`MAX_LINE`].
    pub split: bool,
    /// Whether only a part of the line travels here, because messages are short, and the rest follows:
    /// whoever reads it joins them.
    pub part: bool,
}

/// A line longer than this many bytes is split.
pub const MAX_LINE: usize = 1 << 20;

/// A standard stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Stream {
    /// Descriptor 1.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

/// A control message: everything that one node is to do. It carries the whole desired state, so
/// that one that comes late, twice or out of order does no harm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Orders {
    /// For which node.
    pub node: NodeId,
    /// Grows with every change; an agent ignores an older one.
    pub generation: u64,
    /// Until when they hold unless they are renewed.
    pub lease: Millis,
    /// What to work on; anything else is stopped.
    pub assignments: Vec<Assignment>,
}

/// So many slots of a node for a job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// The job.
    pub job: JobId,
    /// What it runs.
    pub spec: JobSpec,
    /// Its queues.
    pub queues: QueueSet,
    /// How many workers the node runs for it.
    pub slots: u32,
}

mod serde_bytes_compat {
    //! `Vec<u8>` as one byte string: derived serde would go through it element by element.

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        bytes::Bytes::deserialize(from).map(Vec::from)
    }
}
