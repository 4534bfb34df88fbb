//! Log lines of many workers, each worker's in order and once, out of a queue that promises neither.

use std::collections::{BTreeMap, HashMap};

use burla_core::{
    envelope::{LogBatch, LogLine, Stream},
    ids::WorkerId,
};
use bytes::Bytes;

use crate::job::Line;

/// Puts log batches back in order.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    workers: HashMap<WorkerId, Worker>,
}

#[derive(Debug, Default)]
struct Worker {
    /// Number of the next line to be told.
    next: u64,
    /// What came too early.
    early: BTreeMap<u64, Vec<LogLine>>,
    /// Lines of which the end has not come yet.
    parts: HashMap<Stream, Vec<u8>>,
    /// Lines below this are known to exist.
    expected: u64,
}

impl Logs {
    /// Takes a batch and gives the lines whose turn it is now.
    pub(crate) fn push(&mut self, batch: LogBatch) -> Vec<Line> {
        let worker = self.workers.entry(batch.worker).or_default();
        if batch.sequence >= worker.next {
            worker.early.insert(batch.sequence, batch.lines);
        }
        let mut lines = Vec::new();
        while let Some(batch) = worker.early.remove(&worker.next) {
            worker.next += batch.len() as u64;
            lines.extend(batch.into_iter().filter_map(|line| join(&mut worker.parts, line)));
        }
        lines
    }

    /// Lines of `worker` below `watermark` belong to results that are there.
    pub(crate) fn expect(&mut self, worker: &WorkerId, watermark: u64) {
        if watermark > 0 {
            let worker = self.workers.entry(worker.clone()).or_default();
            worker.expected = worker.expected.max(watermark);
        }
    }

    /// How many lines that belong to results have not come.
    pub(crate) fn missing(&self) -> u64 {
        self.workers.values().map(|worker| worker.expected.saturating_sub(worker.next)).sum()
    }
}

/// Joins a line that travelled in parts.
fn join(parts: &mut HashMap<Stream, Vec<u8>>, line: LogLine) -> Option<Line> {
    if line.part {
        parts.entry(line.stream).or_default().extend(line.text);
        return None;
    }
    let text = match parts.remove(&line.stream) {
        Some(mut text) => {
            text.extend(line.text);
            text
        }
        None => line.text,
    };
    Some(Line { index: line.index, stream: line.stream, text: Bytes::from(text), split: line.split })
}

#[cfg(test)]
mod tests {
    use burla_core::ids::JobId;

    use super::*;

    fn batch(sequence: u64, lines: &[(&str, bool)]) -> LogBatch {
        let line = |(text, part): &(&str, bool)| LogLine {
            index: Some(1),
            stream: Stream::Stdout,
            text: text.as_bytes().into(),
            split: false,
            part: *part,
        };
        let lines = lines.iter().map(line).collect();
        LogBatch { job: JobId("j".into()), worker: WorkerId("w".into()), sequence, lines }
    }

    #[test]
    fn lines_come_once_in_order_and_whole() {
        let mut logs = Logs::default();
        logs.expect(&WorkerId("w".into()), 5);
        let first = batch(0, &[("a", false), ("b", true)]);
        let mut told = logs.push(batch(3, &[("c", false)]));
        assert_eq!(logs.missing(), 5);
        told.extend(logs.push(first.clone()));
        told.extend(logs.push(first));
        told.extend(logs.push(batch(2, &[("bb", false)])));
        let texts: Vec<&[u8]> = told.iter().map(|line| &line.text[..]).collect();
        assert_eq!(texts, [b"a" as &[u8], b"bbb", b"c"]);
        assert_eq!(logs.missing(), 1);
    }
}
