//! The agent of a node, and the worker that runs a job's calls.
//!
//! The [`Agent`] does what main_service orders on its node's control queue: so many workers for this
//! job, none for that one. A [`WorkerHost`] starts workers, each in a slot. A worker takes inputs
//! from the job's queue, has a runtime child run them, and puts results and log lines into the
//! job's other queues.

mod agent;
mod channel;
mod command;
mod files;
mod host;
mod keeper;
mod logs;
mod outbox;
mod reenter;
mod runtime;
mod scratch;
mod shared;
mod worker;

pub use agent::{Agent, Config};
pub use host::{Slot, Started, Tasks, WorkerHost};
pub use reenter::{Reenter, reenter};
pub use scratch::Scratch;
