//! A job, as its caller sees it.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use burla_core::{
    envelope::Stream,
    record::{self, Failure},
};
use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use crate::order::{Chunk, Content};

/// How a job runs.
#[derive(Clone, Debug)]
pub struct Options {
    /// CPUs that each call has to itself; fractions share one. 1 unless told otherwise.
    pub cpu: f64,
    /// Bytes of memory that a call may use; no limit if absent.
    pub ram: Option<u64>,
    /// At most so many calls at once; as many as there are slots if absent.
    pub max_parallelism: Option<u32>,
    /// How often a call that raised, failed or timed out is repeated; 0 unless told otherwise.
    pub retries: u32,
    /// How long one call may take, from the moment the function starts.
    pub timeout: Option<Duration>,
    /// Environment variables of the calls.
    pub env: BTreeMap<String, String>,
    /// Whether every input is a file: then the function gets a path to a copy of it.
    pub files: bool,
    /// Whether results come in the order of the inputs, or as they finish.
    pub ordered: bool,
    /// Whether [`Finished::input`] is given.
    pub with_input: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            cpu: 1.0,
            ram: None,
            max_parallelism: None,
            retries: 0,
            timeout: None,
            env: BTreeMap::new(),
            files: false,
            ordered: true,
            with_input: false,
        }
    }
}

/// Why a job did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It asks for what no machine of the cluster has.
    #[error("{0}")]
    Impossible(String),
    /// The cluster did not answer.
    #[error("failed to start the job: {0}")]
    Unavailable(String),
}

/// Why a job ended without all its results.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The function can't be run at all: it does not load, or where it is to run there is no such program.
    #[error("{message}")]
    Unable {
        /// What went wrong, in a sentence.
        message: String,
        /// What to do about it.
        hint: Option<String>,
        /// The traceback, if there is one.
        traceback: Option<String>,
        /// Whether the function is at fault, and not the place where it was to run.
        usage: bool,
    },
    /// It was cancelled, but not by its caller.
    #[error("the job was cancelled from elsewhere")]
    CancelledElsewhere,
    /// The cluster did not answer, or a local file could not be used.
    #[error("the job failed: {0}")]
    Unavailable(String),
}

/// What a job tells.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A call failed for good. It is told at once; its [`Event::Finished`] comes when it is its turn.
    Failed {
        /// The input's index.
        index: u64,
        /// Why.
        failure: Box<Failure>,
    },
    /// An input is done with.
    Finished(Finished),
    /// A call wrote a line.
    Line(Line),
}

/// The end of one input.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Finished {
    /// Its index: 0 is the first input.
    pub index: u64,
    /// What came of it.
    pub outcome: Outcome,
    /// How often its function was called.
    pub attempts: u32,
    /// How long the last call took, in seconds.
    pub seconds: f32,
    /// Who ran it; empty if nobody did.
    pub worker: Arc<str>,
    /// The input as it was submitted, with [`Options::with_input`].
    pub input: Option<Bytes>,
}

/// What came of an input.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// Its call returned.
    Ok {
        /// The result: JSON of a Python function, or what a command wrote to its stdout.
        result: Bytes,
        /// Whether NaN or infinities in it were replaced by null.
        nulled: bool,
    },
    /// Its call failed.
    Failed {
        /// Why.
        failure: Box<Failure>,
        /// What a failed command wrote to its stdout.
        output: Bytes,
    },
    /// The job was cancelled before it was done.
    Cancelled,
}

/// A line that a call wrote.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Line {
    /// The index of the call's input; none if no call had run yet.
    pub index: Option<u64>,
    /// Where it was written.
    pub stream: Stream,
    /// Its bytes, without the line's end.
    pub text: Bytes,
    /// Whether the line is longer than [`crate::MAX_LINE`] and goes on in the next one.
    pub split: bool,
}

/// How a job stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Inputs that were submitted so far.
    pub submitted: u64,
    /// How many there are in all; not known while inputs are still coming.
    pub total: Option<u64>,
    /// Inputs that have a result.
    pub done: u64,
    /// Those of them that failed.
    pub failed: u64,
    /// Workers that work on the job.
    pub slots: u32,
    /// What it waits for, if it waits.
    pub wait: Option<Wait>,
    /// Lines that calls wrote and that did not arrive.
    pub lines_missing: u64,
}

/// What a job waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wait {
    /// Machines or slots, in main_service's words.
    Cluster(String),
    /// The result of this input, while so many later ones are there already.
    Input {
        /// The input's index.
        index: u64,
        /// How many results wait behind it.
        behind: u64,
    },
}

/// What passes from a job's driver to its caller.
#[derive(Debug)]
pub(crate) enum Output {
    Results(Chunk),
    Lines(Vec<Line>),
    Failures(Vec<(u64, Box<Failure>)>),
    Error(Error),
}

/// A running job: a stream of what it tells. Dropping it cancels the job.
#[derive(Debug)]
pub struct Job {
    pub(crate) outputs: mpsc::Receiver<Output>,
    pub(crate) cancel: watch::Sender<bool>,
    pub(crate) progress: Arc<Mutex<Progress>>,
    pub(crate) current: Current,
}

/// What was received and not yet told.
#[derive(Debug, Default)]
pub(crate) struct Current {
    chunk: Option<Chunk>,
    lines: std::vec::IntoIter<Line>,
    failures: std::vec::IntoIter<(u64, Box<Failure>)>,
}

impl Job {
    /// What happens next; none at the job's end. An error is the last thing before that. Cancel-safe.
    pub async fn next(&mut self) -> Option<Result<Event, Error>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`Job::next`]; none also if nothing is there right now.
    pub fn try_next(&mut self) -> Option<Result<Event, Error>> {
        match self.poll_next(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        }
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Event, Error>>> {
        loop {
            if let Some(event) = self.current.next() {
                return Poll::Ready(Some(event));
            }
            match std::task::ready!(self.outputs.poll_recv(context)) {
                None => return Poll::Ready(None),
                Some(Output::Results(chunk)) => self.current.chunk = Some(chunk),
                Some(Output::Lines(lines)) => self.current.lines = lines.into_iter(),
                Some(Output::Failures(failures)) => self.current.failures = failures.into_iter(),
                Some(Output::Error(error)) => return Poll::Ready(Some(Err(error))),
            }
        }
    }

    /// Stops the job: no input is begun any more, calls that run are killed. Results that are there
    /// are still told; then every input that was submitted and has none is told as cancelled.
    pub fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// How the job stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress.lock().expect("nothing panics while it holds this lock").clone()
    }
}

impl futures_core::Stream for Job {
    type Item = Result<Event, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_next(context)
    }
}

impl Current {
    fn next(&mut self) -> Option<Result<Event, Error>> {
        if let Some(line) = self.lines.next() {
            return Some(Ok(Event::Line(line)));
        }
        if let Some((index, failure)) = self.failures.next() {
            return Some(Ok(Event::Failed { index, failure }));
        }
        let chunk = self.chunk.as_mut()?;
        if chunk.count == 0 {
            self.chunk = None;
            return None;
        }
        let (outcome, seconds) = match &mut chunk.content {
            Content::Cancelled => (Outcome::Cancelled, 0.0),
            Content::Records(bytes) => match record::take(bytes) {
                Ok(record) => (record.outcome.into(), record.seconds),
                Err(error) => {
                    self.chunk = None;
                    return Some(Err(Error::Unavailable(error.to_string())));
                }
            },
        };
        let finished = Finished {
            index: chunk.first,
            outcome,
            attempts: chunk.attempts,
            seconds,
            worker: chunk.worker.clone(),
            input: chunk.inputs.pop_front(),
        };
        chunk.first += 1;
        chunk.count -= 1;
        Some(Ok(Event::Finished(finished)))
    }
}

impl From<record::Outcome> for Outcome {
    fn from(outcome: record::Outcome) -> Self {
        match outcome {
            record::Outcome::Ok { result, nulled } => Self::Ok { result, nulled },
            record::Outcome::Failed { failure, output } => Self::Failed { failure, output },
        }
    }
}
