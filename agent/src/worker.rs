//! The worker: takes input messages of one job, has its runtime run them, and tells the results.
//!
//! It decides what happens to a call that did not return: who is charged, what is repeated, when it
//! is given up. An input message is deleted only after all its results are in the result queue.

use std::{collections::VecDeque, future::Future, pin::Pin, sync::Arc, time::Duration};

use burla_core::{
    envelope::{Body, InputHeader},
    ids::JobId,
    job::{Function, JobSpec},
    queue::{self, Delivery, LONGEST_POLL, Queue, QueueExt, Receipt},
    record::{self, Failure, FailureKind, Outcome, Record},
    store::{self, ObjectStore},
    wire,
};
use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::{
    command::describe,
    files::Files,
    keeper::Ended,
    outbox::{self, Outbox},
    runtime::{Event, Runtime, Unable, View},
};

/// How long an input message is hidden from the other workers, unless it is renewed.
const LEASE: Duration = Duration::from_secs(30);

/// When leases are renewed: two renewals may fail before the message is given to somebody else.
const RENEW: Duration = Duration::from_secs(10);

/// How often the running call is looked at.
const TICK: Duration = Duration::from_millis(20);

/// A view that has run for so long, while there are no more messages, is shared with workers that have none.
const SHARE_AFTER: Duration = Duration::from_millis(100);

/// How long a worker that has shared takes no message: the others are to have it.
const RESTRAINT: Duration = Duration::from_millis(200);
const LONGEST_RESTRAINT: Duration = Duration::from_secs(10);

/// How often a call whose process dies is repeated.
const CRASH_REPEATS: u32 = 2;

/// How often a call that used too much memory is repeated.
const MEMORY_REPEATS: u32 = 1;

/// How often a process may die between calls, one after another.
const IDLE_DEATHS: u32 = 3;

/// One slot's work on one job.
pub(crate) struct Worker {
    pub(crate) job: JobId,
    pub(crate) spec: JobSpec,
    pub(crate) inputs: String,
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) runtime: Box<dyn Runtime>,
    pub(crate) outbox: Outbox,
    pub(crate) files: Files,
    pub(crate) state: State,
}

/// Where a worker stands.
#[derive(Default)]
pub(crate) struct State {
    /// The message that it works on.
    message: Option<Message>,
    /// The one that it works on next.
    prefetched: Option<Delivery>,
    /// The view that its runtime is running.
    running: Option<Running>,
    started: bool,
    /// Whether some call has begun: until then, a death is the loading's.
    begun: bool,
    idle_deaths: u32,
    /// No message is taken before.
    restraint: Option<Instant>,
    /// How long the next restraint takes, while the same message is being worked on.
    pause: Option<Duration>,
}

/// An input message that is being worked on.
struct Message {
    receipt: Receipt,
    header: InputHeader,
    /// What came behind the header.
    tail: Bytes,
    first: u64,
    inputs: Bytes,
    todo: VecDeque<Task>,
    renewed: Instant,
}

/// Inputs of a batch that are to be run, and what was charged to the first of them.
#[derive(Clone, Debug)]
struct Task {
    from: u32,
    to: u32,
    /// How often it was called.
    calls: u32,
    /// How often it failed of itself.
    failures: u32,
    crashes: u32,
    over_memory: u32,
}

impl Task {
    fn fresh(from: u32, to: u32) -> Self {
        Self { from, to, calls: 0, failures: 0, crashes: 0, over_memory: 0 }
    }
}

struct Running {
    task: Task,
    /// How many of its inputs have a record.
    done: u32,
    /// The call that is running, and since when it was seen.
    call: Option<(u64, Instant)>,
    /// The call that was stopped because it took too long.
    timed_out: Option<u64>,
    began: Instant,
    /// From where on the view is to be left to others, once it is certain that it stops there.
    offer: Option<u32>,
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Queue(#[from] queue::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error("failed to reach the process that runs the calls: {0}")]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Wire(#[from] wire::Error),
}

impl From<outbox::Error> for Error {
    fn from(error: outbox::Error) -> Self {
        match error {
            outbox::Error::Queue(error) => error.into(),
            outbox::Error::Store(error) => error.into(),
        }
    }
}

type Poll = Pin<Box<dyn Future<Output = Result<Vec<Delivery>, queue::Error>> + Send>>;

impl Worker {
    /// Works until the job's queues are gone. Dropping it kills what it runs.
    pub(crate) async fn run(mut self) -> Result<(), Error> {
        let ended = self.work().await;
        if ended.is_err() {
            // Somebody else may fare better.
            let _ = self.give_back().await;
        }
        ended
    }

    async fn work(&mut self) -> Result<(), Error> {
        let mut poll = Some(self.poll());
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let due = self.outbox.due();
            tokio::select! {
                biased;
                event = self.runtime.next(), if self.state.started && !self.outbox.full() => {
                    self.on_event(event).await?;
                }
                sent = self.outbox.sent() => sent?,
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.outbox.flush().await?,
                deliveries = received(&mut poll), if self.state.prefetched.is_none() => {
                    match deliveries {
                        Ok(deliveries) => self.state.prefetched = deliveries.into_iter().next(),
                        Err(queue::Error::NoQueue(_)) => return Ok(()),
                        Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                    }
                    poll = Some(self.poll());
                }
                _ = tick.tick(), if self.state.message.is_some() => self.on_tick(&mut poll).await?,
                () = sleep_until(self.state.restraint.unwrap_or_else(Instant::now)), if poll.is_none() => {
                    self.state.restraint = None;
                    poll = Some(self.poll());
                }
            }
            if self.state.message.is_none()
                && let Some(delivery) = self.state.prefetched.take()
            {
                self.begin(delivery).await?;
            }
        }
    }

    fn poll(&self) -> Poll {
        let (queue, inputs) = (self.queue.clone(), self.inputs.clone());
        Box::pin(async move { queue.receive(&inputs, 1, LEASE, LONGEST_POLL).await })
    }

    /// Takes a message up.
    async fn begin(&mut self, delivery: Delivery) -> Result<(), Error> {
        let (header, tail): (InputHeader, Bytes) = wire::decode(&delivery.body)?;
        if header.job != self.job {
            // Not ours to read, nor to delete.
            return Ok(());
        }
        if !self.state.started {
            self.runtime.start().await?;
            self.state.started = true;
        }
        let body = match &header.body {
            Body::Inline => tail.clone(),
            Body::Object { key, .. } => match self.store.get(key, None).await {
                // The client deletes a batch when all of it has results: this delivery came late.
                Err(store::Error::NotFound(_)) => {
                    self.queue.acknowledge(&self.inputs, &[delivery.receipt]).await?;
                    return Ok(());
                }
                object => object?.content,
            },
        };
        let inputs = body.slice(..usize::try_from(header.inputs_len).unwrap_or(usize::MAX).min(body.len()));
        self.files.lay(&header, body.slice(inputs.len()..), &*self.store).await?;
        let first = Task { calls: header.attempts, ..Task::fresh(header.from, header.to) };
        self.state.message = Some(Message {
            receipt: delivery.receipt,
            first: header.first,
            header,
            tail,
            inputs,
            todo: [first].into(),
            renewed: Instant::now(),
        });
        self.feed().await
    }

    /// Gives the runtime its next view, or ends the message.
    async fn feed(&mut self) -> Result<(), Error> {
        let Some(message) = &mut self.state.message else { return Ok(()) };
        let Some(mut task) = message.todo.pop_front() else { return self.finish().await };
        if task.calls > 0 && task.to > task.from + 1 {
            // Only the first was called before: the others are views of their own.
            message.todo.push_front(Task::fresh(task.from + 1, task.to));
            task.to = task.from + 1;
        }
        let view =
            View { first: message.first, from: task.from, to: task.to, inputs: message.inputs.clone() };
        let began = Instant::now();
        self.state.running = Some(Running { task, done: 0, call: None, timed_out: None, began, offer: None });
        match self.runtime.feed(&view).await {
            // It died meanwhile, and says so next.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            fed => Ok(fed?),
        }
    }

    /// All inputs of the message have results: tell them, then delete it.
    async fn finish(&mut self) -> Result<(), Error> {
        self.outbox.flush().await?;
        if let Some(message) = self.state.message.take() {
            self.state.pause = None;
            self.state.restraint = self.state.restraint.map(|_| Instant::now());
            self.queue.acknowledge(&self.inputs, &[message.receipt]).await?;
            if self.spec.files {
                self.files.clear(message.first, message.header.from..message.header.to).await;
            }
        }
        Ok(())
    }

    async fn on_event(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Logs(lines) => self.outbox.log(lines),
            Event::Records { bytes, count } => self.on_records(bytes, count),
            Event::Done(reached) => {
                self.state.idle_deaths = 0;
                let running = self.state.running.take();
                if let (Some(running), Some(message)) = (running, &mut self.state.message)
                    && reached < running.task.to
                {
                    message.todo.push_front(Task::fresh(reached, running.task.to));
                }
                self.feed().await?;
            }
            Event::Unable(why) => self.give_up(why).await?,
            Event::Ended(ended) => self.on_ended(ended).await?,
        }
        Ok(())
    }

    /// Records of the next `count` inputs of the running view.
    fn on_records(&mut self, mut bytes: Bytes, count: u32) {
        let (Some(message), Some(running)) = (&mut self.state.message, &mut self.state.running) else {
            return;
        };
        self.state.begun = true;
        let task = &running.task;
        let mut position = task.from + running.done;
        running.done += count;
        let attempts = task.calls + 1;
        if task.failures >= self.spec.retries {
            self.outbox.records(message.first + u64::from(position), count, attempts, &bytes);
            return;
        }
        while let Some(len) = record::first_len(&bytes) {
            let record = bytes.split_to(len);
            if record::first_failed(&record) {
                let again = Task { from: position, to: position + 1, calls: attempts, ..task.clone() };
                message.todo.push_back(Task { failures: task.failures + 1, ..again });
            } else {
                self.outbox.records(message.first + u64::from(position), 1, attempts, &record);
            }
            position += 1;
        }
    }

    /// The process that ran the calls is gone: one call is charged, the others run again elsewhere.
    async fn on_ended(&mut self, ended: Ended) -> Result<(), Error> {
        if let Ended::NotStarted(why) = &ended {
            let message = format!("the program that runs the calls could not be started: {why}");
            return self.give_up(Unable { message, hint: None, traceback: None, usage: false }).await;
        }
        let running = self.state.running.take();
        // The child may have died between two calls, or after it had left a call's record.
        let next = running.as_ref().zip(self.state.message.as_ref());
        let next = next.map(|(running, message)| message.first + u64::from(running.task.from + running.done));
        let called = self.runtime.running().filter(|index| Some(*index) == next);
        let deliberate = running.as_ref().is_some_and(|running| running.timed_out.is_some());
        if called.is_none() && !deliberate {
            self.state.idle_deaths += 1;
            if !self.state.begun || self.state.idle_deaths > IDLE_DEATHS {
                return self.give_up(self.unable_to_stay(&ended)).await;
            }
        }
        if let (Some(running), Some(message)) = (running, &mut self.state.message) {
            let at = running.task.from + running.done;
            if at < running.task.to {
                if called.is_none() && running.done == 0 {
                    // Not begun again: what was charged to it stays charged.
                    message.todo.push_front(running.task.clone());
                } else {
                    let rest = at + u32::from(called.is_some());
                    if rest < running.task.to {
                        message.todo.push_front(Task::fresh(rest, running.task.to));
                    }
                }
                if called.is_some() {
                    self.state.begun = true;
                    self.charge(&running, at, &ended);
                }
            }
        }
        self.runtime.start().await?;
        self.feed().await
    }

    /// The process ends without a call that could be charged.
    fn unable_to_stay(&self, ended: &Ended) -> Unable {
        let who = match &self.spec.function {
            Function::Python { interpreter, .. } => interpreter.display().to_string(),
            Function::Command { .. } => "the process that runs the commands".into(),
        };
        let when = if self.state.begun { "between calls" } else { "before the function was loaded" };
        let message = format!("{who} ended {when}: {}", why(ended));
        let hint = match ended {
            Ended::Memory(_) => "give it more with --ram",
            _ => {
                "check that it is a working Python 3.9 or later (--python names another), and that the function's \
                 file does not end the process when it is imported"
            }
        };
        Unable { message, hint: Some(hint.into()), traceback: None, usage: true }
    }

    /// Charges the end of its process to the call at position `at`: it is repeated, or has failed.
    fn charge(&mut self, running: &Running, at: u32, ended: &Ended) {
        let Some(message) = &mut self.state.message else { return };
        // What was charged so far is the first input's of the view alone.
        let before = if running.done == 0 { running.task.clone() } else { Task::fresh(at, at + 1) };
        let mut task = Task { from: at, to: at + 1, calls: before.calls + 1, ..before };
        let (kind, again, why) = if running.timed_out == Some(message.first + u64::from(at)) {
            task.failures += 1;
            let limit = self.spec.timeout.unwrap_or_default();
            (FailureKind::Timeout, task.failures <= self.spec.retries, format!("took longer than {limit:?}"))
        } else if let Ended::Memory(peak) = ended {
            task.over_memory += 1;
            let limit = self.spec.ram.unwrap_or_default();
            let why = match *peak > limit {
                true => format!(
                    "used {}, more than the {} of memory that a call may use",
                    mebibytes(*peak),
                    mebibytes(limit)
                ),
                // The kernel let it have no more.
                false => format!("used {} of memory, all that a call may use", mebibytes(limit)),
            };
            (FailureKind::Memory, task.over_memory <= MEMORY_REPEATS, why)
        } else {
            task.crashes += 1;
            let why = format!("its process ended, {} times: {}", task.crashes, why(ended));
            (FailureKind::Crashed, task.crashes <= CRASH_REPEATS, why)
        };
        if again {
            message.todo.push_front(task);
            return;
        }
        let seconds = running.call.map_or(0.0, |(_, since)| since.elapsed().as_secs_f32());
        let alike = if kind == FailureKind::Crashed { self::why(ended) } else { String::new() };
        let failure = Box::new(failure(kind, why, &alike));
        let outcome = Outcome::Failed { failure, output: Bytes::new() };
        let mut bytes = BytesMut::new();
        Record { seconds, outcome }.write(&mut bytes);
        self.outbox.records(message.first + u64::from(at), 1, task.calls, &bytes);
    }

    /// This worker can't run the job: the client is told, and the message is somebody else's.
    async fn give_up(&mut self, why: Unable) -> Result<(), Error> {
        self.outbox.unable(why).await?;
        self.give_back().await?;
        // Until the client ends the job, or somebody else stops this worker.
        std::future::pending().await
    }

    /// Gives messages that it has not finished back at once.
    async fn give_back(&mut self) -> Result<(), Error> {
        let held = self.state.message.take().map(|message| message.receipt);
        let prefetched = self.state.prefetched.take().map(|delivery| delivery.receipt);
        for receipt in held.into_iter().chain(prefetched) {
            self.queue.extend(&self.inputs, &[receipt], Duration::ZERO).await?;
        }
        Ok(())
    }

    async fn on_tick(&mut self, poll: &mut Option<Poll>) -> Result<(), Error> {
        self.watch_call();
        self.share(poll).await?;
        match &self.state.message {
            Some(message) if message.renewed.elapsed() >= RENEW => self.renew().await.map(drop),
            _ => Ok(()),
        }
    }

    /// Renews the leases of what it holds. Tells whether that of the message still held: if not,
    /// somebody else runs the inputs too, and the client takes whichever result comes first.
    async fn renew(&mut self) -> Result<bool, Error> {
        let Some(message) = &mut self.state.message else { return Ok(false) };
        message.renewed = Instant::now();
        let held = std::iter::once(&message.receipt);
        let receipts: Vec<Receipt> =
            held.chain(self.state.prefetched.iter().map(|delivery| &delivery.receipt)).cloned().collect();
        let renewed = self.queue.extend(&self.inputs, &receipts, LEASE).await?;
        Ok(renewed.first() == Some(&true))
    }

    /// Leaves half of what it has not begun to others, if that takes long and the queue is empty.
    ///
    /// First the runtime is told to stop half-way; a look later, if it has not come that far, it is
    /// certain that it will stop there, and the rest is a message of its own. The original is deleted
    /// only after all that remained of it has results.
    async fn share(&mut self, poll: &mut Option<Poll>) -> Result<(), Error> {
        let (Some(message), Some(running)) = (&self.state.message, &mut self.state.running) else {
            return Ok(());
        };
        if running.began.elapsed() >= SHARE_AFTER
            && let Some(delivery) = self.state.prefetched.take()
        {
            // It would wait here, while others may have nothing to do.
            self.queue.extend(&self.inputs, &[delivery.receipt], Duration::ZERO).await?;
            self.restrain(poll);
            return Ok(());
        }
        let Some((index, _)) = running.call else { return Ok(()) };
        let next = u32::try_from(index - message.first).unwrap_or(u32::MAX).saturating_add(1);
        let Some(from) = running.offer.take() else {
            let left = running.task.to.saturating_sub(next);
            // An empty poll is what says that others may have nothing to do.
            if left > 0 && self.state.prefetched.is_none() && running.began.elapsed() >= SHARE_AFTER {
                let from = next + left / 2;
                running.offer = Some(from);
                self.runtime.limit(from);
            }
            return Ok(());
        };
        if next > from {
            // It was faster: the rest comes back with `Done` and is run here.
            return Ok(());
        }
        let to = std::mem::replace(&mut running.task.to, from);
        running.began = Instant::now();
        let header = InputHeader { from, to, attempts: 0, ..message.header.clone() };
        let offered = wire::encode(&header, &[&message.tail]);
        if self.renew().await? {
            self.queue.send_all(&self.inputs, &[offered]).await?;
            self.restrain(poll);
        } else if let Some(message) = &mut self.state.message {
            message.todo.push_back(Task::fresh(from, to));
        }
        Ok(())
    }

    /// Takes no message for a while, each time a longer one, so that others get what was left to them.
    fn restrain(&mut self, poll: &mut Option<Poll>) {
        *poll = None;
        let pause = self.state.pause.unwrap_or(RESTRAINT);
        self.state.restraint = Some(Instant::now() + pause);
        self.state.pause = Some((2 * pause).min(LONGEST_RESTRAINT));
    }

    /// Notes which call runs, and stops one that takes too long.
    fn watch_call(&mut self) {
        let Some(running) = &mut self.state.running else { return };
        let index = self.runtime.running();
        if running.call.map(|(index, _)| index) != index {
            running.call = index.map(|index| (index, Instant::now()));
        }
        if let (Some(limit), Some((_, since))) = (self.spec.timeout, running.call)
            && since.elapsed() >= limit
            && running.timed_out.is_none()
        {
            running.timed_out = index;
            self.runtime.kill();
        }
    }
}

async fn received(poll: &mut Option<Poll>) -> Result<Vec<Delivery>, queue::Error> {
    match poll {
        Some(poll) => poll.await,
        None => std::future::pending().await,
    }
}

fn why(ended: &Ended) -> String {
    match ended {
        Ended::Status(status) => describe(*status),
        Ended::Memory(peak) => format!("it used {} of memory", mebibytes(*peak)),
        Ended::NotStarted(why) => why.clone(),
        Ended::Lost => "it was lost together with the process that watches it".into(),
    }
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

fn failure(kind: FailureKind, message: String, alike: &str) -> Failure {
    let type_name = match kind {
        FailureKind::Timeout => "timeout",
        FailureKind::Memory => "memory",
        _ => "crashed",
    };
    Failure {
        kind,
        type_name: type_name.into(),
        fingerprint: format!("{type_name} {alike}").trim_end().to_owned(),
        message,
        traceback: None,
        hint: None,
    }
}
