//! What a worker has to tell its client, until it is durably in the queues.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use burla_core::{
    envelope::{Body, FromWorker, LogBatch, LogLine, ResultHeader, Unable},
    ids::{JobId, WorkerId},
    job::QueueSet,
    queue::{self, BATCH_BYTES, Queue, QueueExt},
    record,
    store::{self, ObjectStore, When},
    wire,
};
use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

/// What is told is told at most so often, but for the first time.
const PAUSE: Duration = Duration::from_millis(30);

/// Bytes of results that are told at once, however short ago the last were.
const PLENTY: usize = 1 << 20;

/// Bytes of records in one message: what a call takes, less room for the header.
const INLINE: usize = BATCH_BYTES - 1024;

/// Bytes of a log line in one message. Several fit in one call.
const LINE_PART: usize = 128 << 10;

/// Bytes of lines that wait while others are being sent. At more, the calls that print have to wait.
const FULL: usize = 4 << 20;

type Sending = Pin<Box<dyn Future<Output = Result<(), queue::Error>> + Send>>;

/// Collects results and log lines and sends them in batches.
pub(crate) struct Outbox {
    job: JobId,
    worker: WorkerId,
    queues: QueueSet,
    queue: Arc<dyn Queue>,
    store: Arc<dyn ObjectStore>,
    pieces: Vec<Piece>,
    pieces_len: usize,
    lines: Vec<LogLine>,
    lines_len: usize,
    /// Lines on their way. Nothing else waits for them: whoever reads them may be slow.
    sending: Option<Sending>,
    /// Number of the first line in `lines`.
    sequence: u64,
    objects: u64,
    results_told: Option<Instant>,
    lines_told: Option<Instant>,
}

/// Records of consecutive inputs.
struct Piece {
    first: u64,
    count: u32,
    attempts: u32,
    log_watermark: u64,
    bytes: BytesMut,
}

/// Why something could not be told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Queue(#[from] queue::Error),
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl Outbox {
    pub(crate) fn new(
        job: JobId,
        worker: WorkerId,
        queues: QueueSet,
        queue: Arc<dyn Queue>,
        store: Arc<dyn ObjectStore>,
    ) -> Self {
        Self {
            job,
            worker,
            queues,
            queue,
            store,
            pieces: Vec::new(),
            pieces_len: 0,
            lines: Vec::new(),
            lines_len: 0,
            sending: None,
            sequence: 0,
            objects: 0,
            results_told: None,
            lines_told: None,
        }
    }

    /// Takes records of the inputs from `first` on.
    pub(crate) fn records(&mut self, first: u64, count: u32, attempts: u32, bytes: &[u8]) {
        self.pieces_len += bytes.len();
        let log_watermark = self.sequence + self.lines.len() as u64;
        if let Some(last) = self.pieces.last_mut()
            && last.first + u64::from(last.count) == first
            && last.attempts == attempts
            && last.bytes.len() + bytes.len() <= INLINE
        {
            last.count += count;
            last.log_watermark = log_watermark;
            last.bytes.extend_from_slice(bytes);
            return;
        }
        self.pieces.push(Piece { first, count, attempts, log_watermark, bytes: bytes.into() });
    }

    /// Takes lines that calls wrote.
    pub(crate) fn log(&mut self, lines: Vec<LogLine>) {
        for mut line in lines {
            self.lines_len += line.text.len() + 32;
            while line.text.len() > LINE_PART {
                let rest = line.text.split_off(LINE_PART);
                self.lines.push(LogLine { part: true, ..line.clone() });
                line.text = rest;
            }
            self.lines.push(line);
        }
    }

    /// When something in it is due to be sent; none if it is empty.
    pub(crate) fn due(&self) -> Option<Instant> {
        let due = |empty: bool, told: Option<Instant>, plenty: bool| {
            (!empty).then(|| told.filter(|_| !plenty).map_or_else(Instant::now, |told| told + PAUSE))
        };
        let results = due(self.pieces.is_empty(), self.results_told, self.pieces_len >= PLENTY);
        let lines =
            due(self.lines.is_empty() || self.sending.is_some(), self.lines_told, self.lines_len >= PLENTY);
        results.into_iter().chain(lines).min()
    }

    /// Whether so many lines wait that no more should be read.
    pub(crate) fn full(&self) -> bool {
        self.lines_len >= FULL
    }

    /// Sends the results there are, and begins to send the lines. Should it fail, the input message is
    /// not acknowledged, so its inputs run again.
    pub(crate) async fn flush(&mut self) -> Result<(), Error> {
        self.begin_lines();
        self.flush_results().await
    }

    /// Waits until the lines on their way are sent; for ever if there are none. Cancel-safe.
    pub(crate) async fn sent(&mut self) -> Result<(), queue::Error> {
        let Some(sending) = &mut self.sending else { return std::future::pending().await };
        let sent = sending.await;
        self.sending = None;
        sent
    }

    fn begin_lines(&mut self) {
        if self.lines.is_empty() || self.sending.is_some() {
            return;
        }
        self.lines_told = Some(Instant::now());
        let lines = std::mem::take(&mut self.lines);
        self.lines_len = 0;
        let mut messages = Vec::new();
        let mut batch = Vec::new();
        let mut len = 0;
        for line in lines {
            if len + line.text.len() > INLINE / 2 {
                messages.push(self.log_message(std::mem::take(&mut batch)));
                len = 0;
            }
            len += line.text.len() + 32;
            batch.push(line);
        }
        messages.push(self.log_message(batch));
        let (queue, logs) = (self.queue.clone(), self.queues.logs.clone());
        self.sending = Some(Box::pin(async move { queue.send_all(&logs, &messages).await }));
    }

    fn log_message(&mut self, lines: Vec<LogLine>) -> Bytes {
        let sequence = self.sequence;
        self.sequence += lines.len() as u64;
        let batch = LogBatch { job: self.job.clone(), worker: self.worker.clone(), sequence, lines };
        wire::encode(&batch, &[])
    }

    async fn flush_results(&mut self) -> Result<(), Error> {
        if self.pieces.is_empty() {
            return Ok(());
        }
        self.results_told = Some(Instant::now());
        self.pieces_len = 0;
        let mut messages = Vec::new();
        for piece in std::mem::take(&mut self.pieces) {
            self.result_messages(piece, &mut messages).await?;
        }
        Ok(self.queue.send_all(&self.queues.results, &messages).await?)
    }

    /// A message for each part of `piece` that fits in one, or one that points at an object.
    async fn result_messages(&mut self, piece: Piece, messages: &mut Vec<Bytes>) -> Result<(), Error> {
        let Piece { first, count, attempts, log_watermark, bytes } = piece;
        let header = |first, count, body| {
            let (job, worker) = (self.job.clone(), self.worker.clone());
            FromWorker::Results(ResultHeader { job, worker, first, count, attempts, log_watermark, body })
        };
        if bytes.len() <= INLINE {
            messages.push(wire::encode(&header(first, count, Body::Inline), &[&bytes]));
            return Ok(());
        }
        let parts = parts(&bytes);
        if parts.iter().all(|(_, len)| *len <= INLINE) {
            let (mut index, mut at) = (first, 0);
            for (count, len) in parts {
                messages.push(wire::encode(&header(index, count, Body::Inline), &[&bytes[at..at + len]]));
                index += u64::from(count);
                at += len;
            }
            return Ok(());
        }
        let key = format!("jobs/{}/results/{}/{}", self.job, self.worker, self.objects);
        self.objects += 1;
        let body = Body::Object { key: key.clone(), len: bytes.len() as u64 };
        messages.push(wire::encode(&header(first, count, body), &[]));
        self.store.put(&key, bytes.freeze(), When::Always).await?;
        Ok(())
    }

    /// Tells that this worker can't run the job.
    pub(crate) async fn unable(&mut self, why: crate::runtime::Unable) -> Result<(), Error> {
        self.flush().await?;
        while self.sending.is_some() {
            self.sent().await?;
            self.begin_lines();
        }
        let crate::runtime::Unable { message, hint, traceback, usage } = why;
        let (job, worker) = (self.job.clone(), self.worker.clone());
        let unable = FromWorker::Unable(Unable { job, worker, message, hint, traceback, usage });
        Ok(self.queue.send_all(&self.queues.results, &[wire::encode(&unable, &[])]).await?)
    }
}

/// Splits records into runs of at most [`INLINE`] bytes: how many records and bytes each has.
fn parts(bytes: &[u8]) -> Vec<(u32, usize)> {
    let mut parts: Vec<(u32, usize)> = Vec::new();
    let mut at = 0;
    while let Some(len) = record::first_len(&bytes[at..]) {
        at += len;
        match parts.last_mut() {
            Some((count, total)) if *total + len <= INLINE => {
                *count += 1;
                *total += len;
            }
            _ => parts.push((1, len)),
        }
    }
    parts
}
