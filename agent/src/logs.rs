//! From the bytes that calls write to their standard streams to lines, each with its call.
//!
//! Bytes and calls are matched by markers that the runtime child writes into the same pipe after a
//! call that wrote something: all between two markers belongs to the later one's call. What a
//! call wrote so far, before its marker, is matched by [`Splitter::attribute`] as soon as it is certain.

use std::time::Duration;

use burla_core::envelope::{LogLine, MAX_LINE, Stream};
use memchr::{memchr2, memmem};
use tokio::time::Instant;

/// Of the states of a progress bar (lines that end in `\r`) only the last in so long is kept.
const PROGRESS: Duration = Duration::from_millis(200);

/// What markers of one child begin with; a secret of the worker and the child.
#[derive(Clone, Debug)]
pub(crate) struct Nonce(pub(crate) String);

impl Nonce {
    fn prefix(&self) -> Vec<u8> {
        [b"\0burla:", self.0.as_bytes(), b":"].concat()
    }
}

/// A marker, as the runtime child writes it after the call of input `index`.
pub(crate) fn marker(nonce: &Nonce, index: u64) -> Vec<u8> {
    [&nonce.prefix()[..], index.to_string().as_bytes(), b"\n"].concat()
}

/// Takes one stream apart.
#[derive(Debug)]
pub(crate) struct Splitter {
    stream: Stream,
    prefix: Vec<u8>,
    /// Read, and not yet matched with a call.
    raw: Vec<u8>,
    lines: Lines,
}

impl Splitter {
    pub(crate) fn new(stream: Stream, nonce: &Nonce) -> Self {
        Self { stream, prefix: nonce.prefix(), raw: Vec::new(), lines: Lines::default() }
    }

    /// Takes bytes in; lines that a marker matches with their call go to `out`.
    pub(crate) fn push(&mut self, bytes: &[u8], out: &mut Vec<LogLine>) {
        self.raw.extend_from_slice(bytes);
        let mut raw = std::mem::take(&mut self.raw);
        let mut at = 0;
        while let Some((start, end, index)) = next_marker(&raw[at..], &self.prefix) {
            self.write(&raw[at..at + start], Some(index), out);
            self.finish(Some(index), out);
            at += end;
        }
        raw.drain(..at);
        self.raw = raw;
    }

    /// All bytes that are not matched yet are of the call of `index`: whole lines of them go out.
    pub(crate) fn attribute(&mut self, index: Option<u64>, out: &mut Vec<LogLine>) {
        let mut raw = std::mem::take(&mut self.raw);
        // A marker that is cut in two stays until its rest is there.
        let keep = partial_marker(&raw, &self.prefix);
        let rest = raw.split_off(raw.len() - keep);
        self.write(&raw, index, out);
        self.raw = rest;
    }

    /// A call is over: what it left without a line's end is a line too.
    pub(crate) fn finish(&mut self, index: Option<u64>, out: &mut Vec<LogLine>) {
        self.lines.finish(|text, split| out.push(line(index, self.stream, text, split)));
    }

    /// Lets out a progress bar's state that has waited long enough.
    pub(crate) fn tick(&mut self, index: Option<u64>, out: &mut Vec<LogLine>) {
        let now = Instant::now();
        self.lines.tick(now, |text, split| out.push(line(index, self.stream, text, split)));
    }

    fn write(&mut self, bytes: &[u8], index: Option<u64>, out: &mut Vec<LogLine>) {
        let now = Instant::now();
        self.lines.write(bytes, now, |text, split| out.push(line(index, self.stream, text, split)));
    }
}

fn line(index: Option<u64>, stream: Stream, text: Vec<u8>, split: bool) -> LogLine {
    LogLine { index, stream, text, split, part: false }
}

/// The first whole marker: where it begins, where it ends, whose it is.
fn next_marker(bytes: &[u8], prefix: &[u8]) -> Option<(usize, usize, u64)> {
    let start = memmem::find(bytes, prefix)?;
    let digits = &bytes[start + prefix.len()..];
    let len = memchr::memchr(b'\n', digits)?;
    let index = std::str::from_utf8(&digits[..len]).ok()?.parse().ok()?;
    Some((start, start + prefix.len() + len + 1, index))
}

/// How many bytes at the end may be the beginning of a marker.
fn partial_marker(bytes: &[u8], prefix: &[u8]) -> usize {
    if let Some(start) = memmem::rfind(bytes, prefix) {
        return bytes.len() - start;
    }
    let longest = prefix.len().saturating_sub(1).min(bytes.len());
    (1..=longest).rev().find(|len| bytes.ends_with(&prefix[..*len])).unwrap_or(0)
}

/// Lines of one stream and one call at a time.
#[derive(Debug, Default)]
struct Lines {
    partial: Vec<u8>,
    /// A state of a progress bar that waits whether a newer one replaces it.
    progress: Option<Vec<u8>>,
    progress_told: Option<Instant>,
    /// What stood before a `\r` that was the last byte: whether a `\n` follows decides what it is.
    returned: Option<Vec<u8>>,
    /// It was let out already; a `\n` that follows belongs to it.
    after_return: bool,
}

impl Lines {
    fn write(&mut self, mut bytes: &[u8], now: Instant, mut out: impl FnMut(Vec<u8>, bool)) {
        while let Some(first) = bytes.first() {
            let returned = self.returned.take();
            let line_feed = *first == b'\n' && (returned.is_some() || self.after_return);
            self.after_return = false;
            match returned {
                Some(line) if line_feed => {
                    self.flush_progress(&mut out);
                    out(line, false);
                }
                Some(line) => self.progress(line, now, &mut out),
                None => {}
            }
            if line_feed {
                bytes = &bytes[1..];
                continue;
            }
            let Some(end) = memchr2(b'\n', b'\r', bytes) else {
                self.partial.extend_from_slice(bytes);
                return self.split(&mut out);
            };
            self.partial.extend_from_slice(&bytes[..end]);
            self.split(&mut out);
            let line = std::mem::take(&mut self.partial);
            if bytes[end] == b'\n' {
                self.flush_progress(&mut out);
                out(line, false);
            } else {
                self.returned = Some(line);
            }
            bytes = &bytes[end + 1..];
        }
    }

    /// A new state of a progress bar.
    fn progress(&mut self, line: Vec<u8>, now: Instant, out: &mut impl FnMut(Vec<u8>, bool)) {
        if !line.is_empty() {
            self.progress = Some(line);
            self.let_out(now, out);
        }
    }

    /// Lets out what is longer than a line may be.
    fn split(&mut self, out: &mut impl FnMut(Vec<u8>, bool)) {
        while self.partial.len() > MAX_LINE {
            let rest = self.partial.split_off(MAX_LINE);
            out(std::mem::replace(&mut self.partial, rest), true);
        }
    }

    fn tick(&mut self, now: Instant, mut out: impl FnMut(Vec<u8>, bool)) {
        if self.returned.as_ref().is_some_and(|line| !line.is_empty()) {
            self.progress = self.returned.take();
            self.after_return = true;
        }
        self.let_out(now, &mut out);
    }

    fn let_out(&mut self, now: Instant, out: &mut impl FnMut(Vec<u8>, bool)) {
        let due = self.progress_told.is_none_or(|told| now - told >= PROGRESS);
        if due && let Some(line) = self.progress.take() {
            self.progress_told = Some(now);
            out(line, false);
        }
    }

    fn flush_progress(&mut self, out: &mut impl FnMut(Vec<u8>, bool)) {
        if let Some(line) = self.progress.take() {
            out(line, false);
        }
    }

    fn finish(&mut self, mut out: impl FnMut(Vec<u8>, bool)) {
        self.after_return = false;
        if let Some(line) = self.returned.take().filter(|line| !line.is_empty()) {
            self.progress = Some(line);
        }
        self.flush_progress(&mut out);
        if !self.partial.is_empty() {
            out(std::mem::take(&mut self.partial), false);
        }
        self.progress_told = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonce() -> Nonce {
        Nonce("0123456789abcdef".into())
    }

    fn text(lines: &[LogLine]) -> Vec<(Option<u64>, String)> {
        lines.iter().map(|line| (line.index, String::from_utf8_lossy(&line.text).into_owned())).collect()
    }

    fn of(index: u64, line: &str) -> (Option<u64>, String) {
        (Some(index), line.into())
    }

    #[test]
    fn markers_match_lines_with_calls_wherever_reads_cut_them() {
        let mut bytes = b"a\nb".to_vec();
        bytes.extend(marker(&nonce(), 7));
        bytes.extend(marker(&nonce(), 8));
        bytes.extend(b"c\n\0burla:not ours:1\n");
        bytes.extend(marker(&nonce(), 9));
        let expected = [of(7, "a"), of(7, "b"), of(9, "c"), of(9, "\0burla:not ours:1")];
        for size in 1..bytes.len() {
            let (mut splitter, mut out) = (Splitter::new(Stream::Stdout, &nonce()), Vec::new());
            bytes.chunks(size).for_each(|chunk| splitter.push(chunk, &mut out));
            assert_eq!(text(&out), expected, "cut every {size} bytes");
        }
    }

    #[test]
    fn a_running_call_shows_its_whole_lines_and_keeps_the_rest() {
        let (mut splitter, mut out) = (Splitter::new(Stream::Stderr, &nonce()), Vec::new());
        splitter.push(b"one\ntw", &mut out);
        splitter.attribute(Some(3), &mut out);
        assert_eq!(text(&out), [of(3, "one")]);
        let marker = marker(&nonce(), 3);
        splitter.push(&[b"o", &marker[..20]].concat(), &mut out);
        splitter.attribute(Some(3), &mut out);
        assert_eq!(text(&out), [of(3, "one")], "half a marker is not a line");
        splitter.push(&marker[20..], &mut out);
        assert_eq!(text(&out), [of(3, "one"), of(3, "two")]);
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_progress_bar_the_last_state_in_a_while_is_kept() {
        let (mut splitter, mut out) = (Splitter::new(Stream::Stderr, &nonce()), Vec::new());
        for percent in 0..50 {
            splitter.push(format!("\r{percent}%").as_bytes(), &mut out);
            splitter.attribute(Some(1), &mut out);
            tokio::time::advance(Duration::from_millis(10)).await;
            splitter.tick(Some(1), &mut out);
        }
        splitter.push(&marker(&nonce(), 1), &mut out);
        let shown = text(&out);
        assert!((3..=6).contains(&shown.len()), "{shown:?}");
        assert_eq!(shown.last(), Some(&of(1, "49%")));
    }

    #[test]
    fn dos_line_ends_are_ends_of_lines() {
        let bytes = b"a\r\n\r\nb\r\nc\n";
        for size in 1..bytes.len() {
            let (mut splitter, mut out) = (Splitter::new(Stream::Stdout, &nonce()), Vec::new());
            for chunk in bytes.chunks(size) {
                splitter.push(chunk, &mut out);
                splitter.attribute(Some(0), &mut out);
            }
            splitter.finish(Some(0), &mut out);
            let shown: Vec<String> = text(&out).into_iter().map(|(_, line)| line).collect();
            assert_eq!(shown, ["a", "", "b", "c"], "cut every {size} bytes");
        }
    }

    #[test]
    fn a_line_without_end_is_split_and_marked() {
        let (mut splitter, mut out) = (Splitter::new(Stream::Stdout, &nonce()), Vec::new());
        splitter.push(&vec![b'x'; 2 * MAX_LINE + 5], &mut out);
        splitter.attribute(Some(0), &mut out);
        splitter.finish(Some(0), &mut out);
        let lens: Vec<(usize, bool)> = out.iter().map(|line| (line.text.len(), line.split)).collect();
        assert_eq!(lens, [(MAX_LINE, true), (MAX_LINE, true), (5, false)]);
    }
}
