//! Drives one job: sends its inputs, gathers its results and logs, keeps it alive, ends it.
//!
//! One task owns all of a job's state. It takes only what it has room for: while its caller does not
//! take results, it receives none, and while results are missing, it sends only so many inputs.

mod ramp;
mod window;

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use burla_core::{
    control::{Control, Error as ControlError, JobStatus, PING_INTERVAL, Reply, Request},
    envelope::{Body, FromWorker, InputHeader, LogBatch, ResultHeader, Unable},
    ids::JobId,
    interval::IntervalSet,
    job::QueueSet,
    queue::{self, BATCH_BYTES, BATCH_MESSAGES, Delivery, LONGEST_POLL, Queue, QueueExt, Receipt},
    record::{self, Failure},
    store::{ObjectStore, When},
    wire,
};
use bytes::Bytes;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until, timeout},
};

use self::{ramp::Ramp, window::Window};
use crate::{
    cluster::Cluster,
    job::{Current, Error, Job, Line, Options, Output, Progress, Wait},
    logs::Logs,
    order::{Chunk, Content, Order},
    packer::{Batch, Codec, Packer, Submitter},
};

/// How long a received message is hidden while it is taken in.
const LEASE: Duration = Duration::from_secs(60);

/// Bytes of inputs in one message, less room for the header.
const INLINE: usize = BATCH_BYTES - 16 * 1024;

/// Bytes of inputs that are packed into one object, if they are too big for messages.
const PACKED: usize = 8 << 20;

/// Outputs on their way to the caller. Each may be as large as a message's results.
const OUTPUTS: usize = 4;

/// How long the end of a job waits for log lines that have not come.
const LOGS_LATE: Duration = Duration::from_secs(10);

/// How soon after a job's start its slots are asked for again, until there are some.
const FIRST_PING: Duration = Duration::from_millis(2);

/// How long the results of a stopped job are taken in: what workers had told by then is there.
const LAST_RESULTS: Duration = Duration::from_millis(300);

type Poll = Pin<Box<dyn Future<Output = Result<Vec<Delivery>, queue::Error>> + Send>>;

pub(crate) struct Driver {
    job: JobId,
    codec: Codec,
    with_input: bool,
    queues: QueueSet,
    queue: Arc<dyn Queue>,
    store: Arc<dyn ObjectStore>,
    control: Arc<dyn Control>,
    packer: Arc<Packer>,
    progress: Arc<Mutex<Progress>>,
    outputs: mpsc::Sender<Output>,
    cancelled: watch::Receiver<bool>,
    ramp: Ramp,
    window: Window,
    covered: IntervalSet,
    done: u64,
    failed: u64,
    order: Order,
    logs: Logs,
    lines: VecDeque<Vec<Line>>,
    /// Failures that the caller has not been told, whatever results wait for their turn.
    failures: Vec<(u64, Box<Failure>)>,
    /// What the last results said of a worker that can't run the job.
    unable: Option<Error>,
    /// Closed when the cluster is dropped.
    cluster: watch::Receiver<()>,
    /// What the caller is told as soon as it has room for it.
    staged: Option<Output>,
    status: JobStatus,
    ping_at: Instant,
    ping_pause: Duration,
}

impl Driver {
    pub(crate) fn start(
        job: JobId,
        codec: Codec,
        options: Options,
        status: JobStatus,
        cluster: &Cluster,
    ) -> (Submitter, Job) {
        let store = cluster.store.clone();
        let packer = Arc::new(Packer::new(job.clone(), codec, options.files, store.clone()));
        let progress = Arc::new(Mutex::new(Progress::default()));
        let (outputs, received) = mpsc::channel(OUTPUTS);
        let (cancel, cancelled) = watch::channel(false);
        let driver = Self {
            job,
            codec,
            with_input: options.with_input,
            queues: status.queues.clone(),
            queue: cluster.queue.clone(),
            store,
            control: cluster.control.clone(),
            packer: packer.clone(),
            progress: progress.clone(),
            outputs,
            cancelled,
            ramp: Ramp::default(),
            window: Window::default(),
            covered: IntervalSet::default(),
            done: 0,
            failed: 0,
            order: Order::new(options.ordered),
            logs: Logs::default(),
            lines: VecDeque::new(),
            failures: Vec::new(),
            unable: None,
            cluster: cluster.alive.subscribe(),
            staged: None,
            status,
            ping_at: Instant::now() + FIRST_PING,
            ping_pause: FIRST_PING,
        };
        tokio::spawn(driver.run());
        (Submitter::new(packer), Job { outputs: received, cancel, progress, current: Current::default() })
    }

    /// Runs the job to its end, whichever it is, and leaves nothing of it behind.
    async fn run(mut self) {
        let end = self.gather().await;
        let submitted = self.packer.refuse();
        let mut error = None;
        let ended = if let Ok(End::Complete) = end {
            self.control.call(Request::Finish { job: self.job.clone() }).await
        } else {
            error = end.err();
            if let Err(late) = self.take_what_is_there().await {
                error.get_or_insert(late);
            }
            let ended = self.control.call(Request::Cancel { job: self.job.clone() }).await;
            if let Err(late) = self.cover_as_cancelled(submitted) {
                error.get_or_insert(late);
            }
            ended
        };
        // A caller that dropped the job hears nothing any more, which is fine.
        if let Err(late) = self.tell_the_rest().await {
            error.get_or_insert(late);
        }
        self.note_progress(true);
        if let Err(late) = ended {
            error.get_or_insert(Error::Unavailable(late.to_string()));
        }
        if let Some(error) = error {
            let _ = self.outputs.send(Output::Error(error)).await;
        }
    }

    /// Everything from the first input to the last result.
    async fn gather(&mut self) -> Result<End, Error> {
        let mut results = self.poll(&self.queues.results);
        let mut logs = self.poll(&self.queues.logs);
        let mut late: Option<Instant> = None;
        let packer = self.packer.clone();
        let outputs = self.outputs.clone();
        let mut cancelled = self.cancelled.clone();
        let mut cluster = self.cluster.clone();
        loop {
            self.submit().await?;
            self.stage()?;
            self.note_progress(false);
            let idle = self.staged.is_none();
            if idle && self.complete() {
                let deadline = *late.get_or_insert_with(|| Instant::now() + LOGS_LATE);
                if self.logs.missing() == 0 || Instant::now() >= deadline {
                    return Ok(End::Complete);
                }
            }
            tokio::select! {
                biased;
                () = said(&mut cancelled) => return Ok(End::Cancelled),
                _ = cluster.changed() => return Err(unavailable("the cluster was shut down")),
                permit = outputs.reserve(), if !idle => match (permit, self.staged.take()) {
                    (Ok(permit), Some(output)) => permit.send(output),
                    _ => return Ok(End::Cancelled),
                },
                () = outputs.closed() => return Ok(End::Cancelled),
                deliveries = &mut results, if idle => {
                    self.on_results(deliveries.map_err(unavailable)?).await?;
                    if let Some(unable) = self.unable.take() {
                        return Err(unable);
                    }
                    results = self.poll(&self.queues.results);
                }
                deliveries = &mut logs, if idle => {
                    self.on_logs(deliveries.map_err(unavailable)?).await?;
                    logs = self.poll(&self.queues.logs);
                }
                () = packer.filled.notified() => {}
                () = sleep_until(self.ping_at) => self.ping().await?,
                () = sleep_until(late.unwrap_or_else(Instant::now)), if late.is_some() && idle => {}
            }
        }
    }

    fn poll(&self, queue: &str) -> Poll {
        let (service, queue) = (self.queue.clone(), queue.to_owned());
        Box::pin(async move { service.receive(&queue, BATCH_MESSAGES, LEASE, LONGEST_POLL).await })
    }

    /// Whether every input has a result, and there will be no more inputs.
    fn complete(&self) -> bool {
        let (waiting, more) = self.packer.waiting();
        !more && waiting == 0 && self.window.is_empty()
    }

    /// Sends inputs, as far as there are some and the window is open.
    async fn submit(&mut self) -> Result<(), Error> {
        let slots = self.status.slots.max(1) as usize;
        let mut messages = Vec::new();
        while !self.order.full() && self.window.open(slots) {
            let (waiting, more) = self.packer.waiting();
            let count = self.ramp.size(slots, waiting, more);
            let Some(batch) = self.packer.cut(count, INLINE, PACKED) else { break };
            messages.push(self.message(&batch).await?);
            self.window.sent(batch);
        }
        if messages.is_empty() {
            return Ok(());
        }
        self.queue.send_all(&self.queues.inputs, &messages).await.map_err(unavailable)
    }

    /// The message that carries a batch, or points at the object that does.
    async fn message(&self, batch: &Batch) -> Result<Bytes, Error> {
        let len = batch.inputs.len() + batch.contents.iter().map(Bytes::len).sum::<usize>();
        let names: usize = batch.files.iter().map(|file| file.name.len() + 64).sum();
        let inline = len + names <= INLINE;
        let key = Window::key(&self.job, batch.first);
        let count = u32::try_from(batch.ends.len()).map_err(unavailable)?;
        let header = InputHeader {
            job: self.job.clone(),
            first: batch.first,
            count,
            from: 0,
            to: count,
            attempts: 0,
            inputs_len: batch.inputs.len() as u64,
            files: batch.files.clone(),
            body: if inline { Body::Inline } else { Body::Object { key: key.clone(), len: len as u64 } },
        };
        let parts: Vec<&[u8]> =
            std::iter::once(&batch.inputs).chain(&batch.contents).map(|part| &part[..]).collect();
        if inline {
            return Ok(wire::encode(&header, &parts));
        }
        let object =
            if let [inputs] = &parts[..] { batch.inputs.slice_ref(inputs) } else { parts.concat().into() };
        self.store.put(&key, object, When::Always).await.map_err(unavailable)?;
        Ok(wire::encode(&header, &[]))
    }

    async fn on_results(&mut self, deliveries: Vec<Delivery>) -> Result<(), Error> {
        let mut receipts: Vec<Receipt> = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            let (message, tail): (FromWorker, Bytes) = wire::decode(&delivery.body).map_err(unavailable)?;
            receipts.push(delivery.receipt);
            if *message.job() != self.job {
                continue;
            }
            match message {
                FromWorker::Results(header) => self.on_result(header, tail).await?,
                FromWorker::Unable(Unable { message, hint, traceback, usage, .. }) => {
                    self.unable = Some(Error::Unable { message, hint, traceback, usage });
                }
            }
        }
        self.queue.acknowledge_all(&self.queues.results, &receipts).await.map_err(unavailable)
    }

    async fn on_result(&mut self, header: ResultHeader, tail: Bytes) -> Result<(), Error> {
        self.logs.expect(&header.worker, header.log_watermark);
        let range = header.first..header.first + u64::from(header.count);
        if self.covered.missing(range.clone()).is_empty() {
            return Ok(());
        }
        let bytes = match &header.body {
            Body::Inline => tail,
            Body::Object { key, .. } => {
                let content = self.store.get(key, None).await.map_err(unavailable)?.content;
                self.store.delete(std::slice::from_ref(key)).await.map_err(unavailable)?;
                content
            }
        };
        self.measure(&bytes);
        let whole = Chunk {
            first: header.first,
            count: header.count.into(),
            attempts: header.attempts,
            worker: header.worker.0.as_str().into(),
            content: Content::Records(bytes),
            inputs: VecDeque::new(),
        };
        for fresh in self.covered.insert(range) {
            let chunk = whole.part(fresh.start, fresh.end).map_err(unavailable)?;
            self.accept(chunk)?;
        }
        let objects = self.window.take_objects(&self.job);
        if !objects.is_empty() {
            self.store.delete(&objects).await.map_err(unavailable)?;
        }
        Ok(())
    }

    /// Puts results that are new in line for the caller.
    fn accept(&mut self, mut chunk: Chunk) -> Result<(), Error> {
        if let Content::Records(bytes) = &chunk.content {
            self.note_failures(chunk.first, bytes.clone())?;
            self.done += chunk.count;
        }
        let wanted = self.with_input.then_some(self.codec);
        let (inputs, finished) = self.window.cover(chunk.first, chunk.count, wanted);
        chunk.inputs = inputs;
        finished.into_iter().for_each(|count| self.ramp.proved(count));
        self.order.push(chunk).map_err(unavailable)
    }

    fn note_failures(&mut self, first: u64, mut bytes: Bytes) -> Result<(), Error> {
        let mut index = first;
        while let Some(len) = record::first_len(&bytes) {
            let failed = record::first_failed(&bytes);
            let mut record = bytes.split_to(len);
            if failed
                && let record::Outcome::Failed { failure, .. } =
                    record::take(&mut record).map_err(unavailable)?.outcome
            {
                self.failed += 1;
                self.failures.push((index, failure));
            }
            index += 1;
        }
        Ok(())
    }

    /// Learns how long calls take.
    fn measure(&mut self, bytes: &[u8]) {
        let (mut at, mut seconds, mut count) = (0, 0.0, 0);
        while let Some(len) = record::first_len(&bytes[at..]) {
            seconds += f64::from(record::first_seconds(&bytes[at..]));
            count += 1;
            at += len;
        }
        self.ramp.measured(seconds, bytes.len(), count);
    }

    async fn on_logs(&mut self, deliveries: Vec<Delivery>) -> Result<(), Error> {
        let mut receipts: Vec<Receipt> = Vec::with_capacity(deliveries.len());
        for delivery in deliveries {
            let (batch, _): (LogBatch, Bytes) = wire::decode(&delivery.body).map_err(unavailable)?;
            receipts.push(delivery.receipt);
            if batch.job == self.job {
                self.lines.push_back(self.logs.push(batch));
            }
        }
        self.queue.acknowledge_all(&self.queues.logs, &receipts).await.map_err(unavailable)
    }

    /// Readies what the caller is told next.
    fn stage(&mut self) -> Result<(), Error> {
        if self.staged.is_none() {
            self.staged = self.next_output()?;
        }
        Ok(())
    }

    fn next_output(&mut self) -> Result<Option<Output>, Error> {
        while let Some(lines) = self.lines.pop_front() {
            if !lines.is_empty() {
                return Ok(Some(Output::Lines(lines)));
            }
        }
        if !self.failures.is_empty() {
            return Ok(Some(Output::Failures(std::mem::take(&mut self.failures))));
        }
        Ok(self.order.pop().map_err(unavailable)?.map(Output::Results))
    }

    /// Takes in what workers had told already when the job was stopped.
    async fn take_what_is_there(&mut self) -> Result<(), Error> {
        let drain = async {
            // No input is begun any more: those that wait are hidden from the workers.
            let hide = || self.queue.receive(&self.queues.inputs, BATCH_MESSAGES, LEASE, Duration::ZERO);
            while !hide().await.map_err(unavailable)?.is_empty() {}
            loop {
                let results = self.queue.receive(&self.queues.results, BATCH_MESSAGES, LEASE, Duration::ZERO);
                let results = results.await.map_err(unavailable)?;
                let logs = self.queue.receive(&self.queues.logs, BATCH_MESSAGES, LEASE, Duration::ZERO);
                let logs = logs.await.map_err(unavailable)?;
                if results.is_empty() && logs.is_empty() {
                    return Ok(());
                }
                self.on_results(results).await?;
                self.on_logs(logs).await?;
            }
        };
        // Workers go on telling until they are stopped, which must not take long.
        timeout(LAST_RESULTS, drain).await.unwrap_or(Ok(()))
    }

    /// Inputs that have no result will have none.
    fn cover_as_cancelled(&mut self, submitted: u64) -> Result<(), Error> {
        for fresh in self.covered.insert(0..submitted) {
            let (first, count) = (fresh.start, fresh.end - fresh.start);
            let content = Content::Cancelled;
            let chunk =
                Chunk { first, count, attempts: 0, worker: "".into(), content, inputs: VecDeque::new() };
            self.accept(chunk)?;
        }
        Ok(())
    }

    async fn tell_the_rest(&mut self) -> Result<(), Error> {
        loop {
            self.stage()?;
            let Some(output) = self.staged.take() else { return Ok(()) };
            if self.outputs.send(output).await.is_err() {
                return Ok(());
            }
        }
    }

    /// Keeps the job alive, and asks how it stands: often until it has slots.
    async fn ping(&mut self) -> Result<(), Error> {
        match self.control.call(Request::Ping { job: self.job.clone() }).await {
            Ok(Reply::Job(status)) if status.cancelled => return Err(Error::CancelledElsewhere),
            Ok(Reply::Job(status)) => self.status = status,
            Err(ControlError::UnknownJob { .. }) => return Err(Error::CancelledElsewhere),
            // The next ping may be luckier; until then the job says what it waits for.
            Ok(Reply::Done) => {}
            Err(error) => self.status.waits_for = Some(error.to_string()),
        }
        self.ping_pause =
            if self.status.slots == 0 { (self.ping_pause * 2).min(PING_INTERVAL) } else { PING_INTERVAL };
        self.ping_at = Instant::now() + self.ping_pause;
        Ok(())
    }

    fn note_progress(&mut self, ended: bool) {
        let (_, more) = self.packer.waiting();
        let submitted = if ended { self.progress().submitted } else { self.packer.submitted() };
        let cluster = self.status.waits_for.clone().filter(|_| self.status.slots == 0).map(Wait::Cluster);
        let input = || self.order.waits_for().map(|(index, behind)| Wait::Input { index, behind });
        *self.progress() = Progress {
            submitted,
            total: (!more).then_some(submitted),
            done: self.done,
            failed: self.failed,
            slots: self.status.slots,
            wait: cluster.or_else(input),
            lines_missing: self.logs.missing(),
        };
    }

    fn progress(&self) -> std::sync::MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// Waits until it is said, or nobody is left to say it.
async fn said(cancelled: &mut watch::Receiver<bool>) {
    let _ = cancelled.wait_for(|cancelled| *cancelled).await;
}

enum End {
    Complete,
    Cancelled,
}

fn unavailable(error: impl std::fmt::Display) -> Error {
    Error::Unavailable(error.to_string())
}
