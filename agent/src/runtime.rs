//! The seam between a worker and what runs the calls.

mod child;

use async_trait::async_trait;
use burla_core::envelope::LogLine;
use bytes::Bytes;

pub(crate) use child::{ChildRuntime, Launch};

/// Runs the calls of one slot, one at a time.
///
/// # Contract
///
/// - After `feed`, `next` tells what comes of it: records in the order of the inputs, each once,
///   then `Done` or, if the process that runs the calls is gone, `Ended`. Records of calls that
///   had returned come before `Ended`, whatever the end was.
/// - Lines that a call wrote come before its record.
/// - `running` is the index of the call that is running; after `Ended`, of the one that was.
/// - `next` is cancel-safe.
#[async_trait]
pub(crate) trait Runtime: Send {
    /// Makes a fresh process, without waiting until it is up. The one before is gone already.
    async fn start(&mut self) -> std::io::Result<()>;

    /// Gives it a view of a batch to run. To be called again only after `Done`.
    async fn feed(&mut self, view: &View) -> std::io::Result<()>;

    /// What happens next.
    async fn next(&mut self) -> Event;

    /// The index of the running call.
    fn running(&self) -> Option<u64>;

    /// It is to stop before the input at position `to` of its view. If, 20 ms later, it is not
    /// running that one or a later one, it will stop there, and `Done` tells so.
    fn limit(&self, to: u32);

    /// Kills it: `next` will tell `Ended`.
    fn kill(&mut self);
}

/// A view of a batch: the inputs at positions `from..to` are to be run.
#[derive(Clone, Debug)]
pub(crate) struct View {
    /// Index of the batch's first input.
    pub(crate) first: u64,
    /// First position to run.
    pub(crate) from: u32,
    /// One past the last position to run.
    pub(crate) to: u32,
    /// The whole batch, in the job's codec.
    pub(crate) inputs: Bytes,
}

/// What a runtime tells.
#[derive(Debug)]
pub(crate) enum Event {
    /// Records of the next inputs.
    Records {
        /// As in [`burla_core::record`].
        bytes: Bytes,
        /// How many.
        count: u32,
    },
    /// Lines that calls wrote.
    Logs(Vec<LogLine>),
    /// The view was run up to this position.
    Done(u32),
    /// It can't run this job at all.
    Unable(Unable),
    /// The process that runs the calls is gone.
    Ended(crate::keeper::Ended),
}

/// Why a runtime can't run a job, as the runtime child tells it.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Unable {
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    pub(crate) traceback: Option<String>,
    pub(crate) usage: bool,
}
