//! Inputs on their way from whoever makes them to the messages that carry them.

use std::{
    collections::VecDeque,
    io,
    path::{Component, Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use burla_core::{
    envelope::{FileContent, FileEntry},
    ids::JobId,
    store::ObjectStore,
};
use bytes::{BufMut, Bytes, BytesMut};
use serde::de::IgnoredAny;
use tokio::sync::Notify;

/// Bytes of inputs that wait to be sent. Whoever makes more waits.
const CAPACITY: usize = 16 << 20;

/// How many inputs wait to be sent.
const CAPACITY_COUNT: usize = 1 << 20;

/// Files up to this size are packed together; a larger one is an object of its own.
const PACKED_FILE: u64 = 128 << 10;

/// How a job's inputs are encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    /// JSON values, each followed by a comma.
    Json,
    /// Bytes, each input behind its length (`u32`, little-endian).
    Raw,
}

/// An input, as it is submitted.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// JSON text, for a Python function.
    Json(&'a [u8]),
    /// Text or bytes: for a command as they are, for a Python function as a string.
    Text(&'a [u8]),
    /// A file that travels along ([`crate::Options::files`]).
    File(&'a Path),
}

/// Why an input was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The job has ended, or was cancelled.
    #[error("the job takes no more inputs")]
    Closed,
    /// It is not JSON.
    #[error("not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    /// It is not UTF-8.
    #[error("not UTF-8 text")]
    NotText,
    /// It can't be given to this kind of function.
    #[error("{0}")]
    Unsuitable(&'static str),
    /// It is longer than 4 GiB.
    #[error("longer than 4 GiB")]
    TooLong,
    /// Its file can't be read.
    #[error("failed to read {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its file could not be put into the object store.
    #[error("{0}")]
    Store(String),
}

/// Takes a job's inputs. Dropping it without [`Submitter::close`] closes it as well.
pub struct Submitter {
    packer: Arc<Packer>,
}

impl Submitter {
    pub(crate) fn new(packer: Arc<Packer>) -> Self {
        Self { packer }
    }

    /// Submits the next input. Waits while there are too many that are not sent yet.
    pub async fn push(&self, input: Input<'_>) -> Result<(), PushError> {
        self.packer.check(input)?;
        loop {
            let room = self.packer.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.packer.lock().has_room()? {
                break;
            }
            room.await;
        }
        match input {
            Input::File(path) => {
                let file = self.packer.file(path).await?;
                let name = file.0.name.clone();
                self.packer.append(Input::Text(name.as_bytes()), Some(file))
            }
            input => self.packer.append(input, None),
        }
    }

    /// As [`Submitter::push`], on a thread that may wait. Not to be called from async code.
    pub fn push_blocking(&self, input: Input<'_>) -> Result<(), PushError> {
        self.packer.check(input)?;
        // The usual case is not worth a runtime's machinery.
        if matches!(input, Input::File(_)) || !self.packer.lock().has_room()? {
            return self.packer.runtime.block_on(self.push(input));
        }
        self.packer.append(input, None)
    }

    /// There are no more inputs.
    pub fn close(self) {}
}

impl Drop for Submitter {
    fn drop(&mut self) {
        self.packer.lock().closed = true;
        self.packer.filled.notify_one();
    }
}

/// Inputs that were submitted and not yet cut into messages.
pub(crate) struct Packer {
    job: JobId,
    codec: Codec,
    takes_files: bool,
    store: Arc<dyn ObjectStore>,
    runtime: tokio::runtime::Handle,
    state: Mutex<State>,
    /// There are inputs, or no more will come.
    pub(crate) filled: Notify,
    room: Notify,
}

#[derive(Default)]
struct State {
    buffer: BytesMut,
    /// Where each input in the buffer ends, counted from the job's first byte.
    ends: VecDeque<u64>,
    /// How many bytes were cut off so far.
    cut: u64,
    /// How many inputs were cut off so far.
    count: u64,
    files: VecDeque<(FileEntry, Bytes)>,
    files_len: usize,
    file_objects: u64,
    closed: bool,
    refused: bool,
}

impl State {
    fn has_room(&self) -> Result<bool, PushError> {
        if self.refused {
            return Err(PushError::Closed);
        }
        Ok(self.buffer.len() + self.files_len < CAPACITY && self.ends.len() < CAPACITY_COUNT)
    }
}

/// Consecutive inputs, cut off to travel together.
pub(crate) struct Batch {
    /// Index of the first.
    pub(crate) first: u64,
    pub(crate) inputs: Bytes,
    /// Where each ends.
    pub(crate) ends: Vec<u32>,
    pub(crate) files: Vec<FileEntry>,
    pub(crate) contents: Vec<Bytes>,
}

impl Packer {
    pub(crate) fn new(job: JobId, codec: Codec, files: bool, store: Arc<dyn ObjectStore>) -> Self {
        Self {
            job,
            codec,
            takes_files: files,
            store,
            runtime: tokio::runtime::Handle::current(),
            state: Mutex::default(),
            filled: Notify::new(),
            room: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Whether this kind of input goes with this job.
    fn check(&self, input: Input<'_>) -> Result<(), PushError> {
        match (input, self.takes_files) {
            (Input::File(_), false) => Err(PushError::Unsuitable("this job's inputs are not files")),
            (Input::Json(_) | Input::Text(_), true) => {
                Err(PushError::Unsuitable("this job's inputs are files"))
            }
            _ => Ok(()),
        }
    }

    /// Adds an input behind the others.
    fn append(&self, input: Input<'_>, file: Option<(FileEntry, Bytes)>) -> Result<(), PushError> {
        let mut state = self.lock();
        if state.refused {
            return Err(PushError::Closed);
        }
        let before = state.buffer.len();
        if let Err(error) = encode(self.codec, input, &mut state.buffer) {
            state.buffer.truncate(before);
            return Err(error);
        }
        let end = state.cut + state.buffer.len() as u64;
        let was_empty = state.ends.is_empty();
        state.ends.push_back(end);
        if let Some(file) = file {
            state.files_len += file.1.len();
            state.files.push_back(file);
        }
        drop(state);
        // One that waits is told once; it takes all there is.
        if was_empty {
            self.filled.notify_one();
        }
        Ok(())
    }

    /// A file's name where it will run, and its content or where that was put.
    async fn file(&self, path: &Path) -> Result<(FileEntry, Bytes), PushError> {
        let failed = |source| PushError::File { path: path.into(), source };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::other("not a regular file")));
        }
        let name = travelling_name(path).ok_or_else(|| failed(io::Error::other("its name is not UTF-8")))?;
        if metadata.len() <= PACKED_FILE {
            let content = Bytes::from(std::fs::read(path).map_err(failed)?);
            let content_len = FileContent::Packed(content.len() as u64);
            return Ok((FileEntry { name, content: content_len }, content));
        }
        let number = {
            let mut state = self.lock();
            state.file_objects += 1;
            state.file_objects
        };
        let key = format!("jobs/{}/files/{number}", self.job);
        self.store.upload(&key, path).await.map_err(|error| PushError::Store(error.to_string()))?;
        Ok((FileEntry { name, content: FileContent::Object { key } }, Bytes::new()))
    }

    /// How many inputs wait, and whether more may come.
    pub(crate) fn waiting(&self) -> (usize, bool) {
        let state = self.lock();
        (state.ends.len(), !state.closed)
    }

    /// How many inputs were submitted.
    pub(crate) fn submitted(&self) -> u64 {
        let state = self.lock();
        state.count + state.ends.len() as u64
    }

    /// Takes no more inputs, and forgets those that wait. Tells how many were submitted.
    pub(crate) fn refuse(&self) -> u64 {
        let mut state = self.lock();
        let submitted = state.count + state.ends.len() as u64;
        state.refused = true;
        state.closed = true;
        state.buffer.clear();
        state.ends.clear();
        state.files.clear();
        drop(state);
        self.room.notify_waiters();
        submitted
    }

    /// Cuts off the first inputs: at most `count`, of at most `small` bytes, or of at most `large`
    /// bytes if already the first is no small one. The first is cut off however long it is.
    pub(crate) fn cut(&self, count: usize, small: usize, large: usize) -> Option<Batch> {
        let mut state = self.lock();
        let start = state.cut;
        let size = |state: &State, position: usize| {
            let packed = state.files.get(position).map_or(0, travelling_len);
            (state.ends[position] - start) as usize + packed
        };
        if state.ends.is_empty() {
            return None;
        }
        let limit = if size(&state, 0) > small / 6 { large } else { small };
        let (mut taken, mut packed) = (1, state.files.front().map_or(0, travelling_len));
        while taken < count.min(state.ends.len()) {
            if size(&state, taken) + packed > limit {
                break;
            }
            packed += state.files.get(taken).map_or(0, travelling_len);
            taken += 1;
        }
        let ends: Vec<u32> = state.ends.drain(..taken).map(|end| (end - start) as u32).collect();
        let len = *ends.last()? as usize;
        let inputs = state.buffer.split_to(len).freeze();
        let files_taken = taken.min(state.files.len());
        let (files, contents) = state.files.drain(..files_taken).unzip::<_, _, Vec<_>, Vec<Bytes>>();
        state.files_len -= contents.iter().map(Bytes::len).sum::<usize>();
        state.cut += len as u64;
        let first = state.count;
        state.count += taken as u64;
        drop(state);
        self.room.notify_waiters();
        Some(Batch { first, inputs, ends, files, contents })
    }
}

impl Batch {
    /// The input at `position`, as it was submitted.
    pub(crate) fn input(&self, codec: Codec, position: usize) -> Bytes {
        let start = position.checked_sub(1).map_or(0, |before| self.ends[before] as usize);
        let end = self.ends[position] as usize;
        match codec {
            Codec::Json => self.inputs.slice(start..end - 1),
            Codec::Raw => self.inputs.slice(start + 4..end),
        }
    }
}

/// Bytes that a file adds to its message: its content, and its entry in the header.
fn travelling_len((entry, content): &(FileEntry, Bytes)) -> usize {
    entry.name.len() + 64 + content.len()
}

fn encode(codec: Codec, input: Input<'_>, to: &mut BytesMut) -> Result<(), PushError> {
    match (codec, input) {
        (Codec::Json, Input::Json(text)) => {
            check_json(text)?;
            to.reserve(text.len() + 1);
            to.put_slice(text);
            to.put_u8(b',');
        }
        (Codec::Json, Input::Text(text)) => {
            let text = std::str::from_utf8(text).map_err(|_| PushError::NotText)?;
            to.reserve(text.len() + 3);
            serde_json::to_writer(to.writer(), text)?;
            to.put_u8(b',');
        }
        (Codec::Raw, Input::Text(text)) => put_raw(text, to)?,
        (Codec::Raw, Input::Json(text)) => {
            check_json(text)?;
            // A string is given to a command as the text that it is; anything else as JSON.
            match serde_json::from_slice::<String>(text) {
                Ok(string) => put_raw(string.as_bytes(), to)?,
                Err(_) => put_raw(text.trim_ascii(), to)?,
            }
        }
        (_, Input::File(_)) => return Err(PushError::Unsuitable("a file travels by its name and content")),
    }
    // Positions within a batch are counted in 32 bits.
    if to.len() > u32::MAX as usize { Err(PushError::TooLong) } else { Ok(()) }
}

fn check_json(text: &[u8]) -> Result<(), PushError> {
    // Whole numbers are what is mapped over most.
    let digits = text.len() < 20 && text.iter().all(u8::is_ascii_digit);
    if digits && (text.len() == 1 || text.first().is_some_and(|digit| *digit != b'0')) {
        return Ok(());
    }
    std::str::from_utf8(text).map_err(|_| PushError::NotText)?;
    serde_json::from_slice::<IgnoredAny>(text)?;
    Ok(())
}

fn put_raw(text: &[u8], to: &mut BytesMut) -> Result<(), PushError> {
    to.reserve(text.len() + 4);
    to.put_u32_le(u32::try_from(text.len()).map_err(|_| PushError::TooLong)?);
    to.put_slice(text);
    Ok(())
}

/// The name under which a file travels: its path, without what leads out of a folder.
fn travelling_name(path: &Path) -> Option<String> {
    let parts = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_str()),
        _ => None,
    });
    Some(parts.collect::<Option<Vec<_>>>()?.join("/"))
}

#[cfg(test)]
mod tests {
    use burla_core::store::Embedded;

    use super::*;

    fn packer(codec: Codec) -> (Submitter, Arc<Packer>) {
        let packer = Arc::new(Packer::new(JobId("j".into()), codec, false, Arc::new(Embedded::new())));
        (Submitter::new(packer.clone()), packer)
    }

    #[tokio::test]
    async fn batches_respect_count_and_bytes_and_know_their_inputs() {
        let (submitter, packer) = packer(Codec::Json);
        for i in 0..100u32 {
            submitter.push(Input::Json(i.to_string().as_bytes())).await.unwrap();
        }
        submitter.push(Input::Text(&[b'x'; 5000])).await.unwrap();
        let batch = packer.cut(10, 1000, 9000).unwrap();
        assert_eq!((batch.first, &batch.inputs[..]), (0, &b"0,1,2,3,4,5,6,7,8,9,"[..]));
        assert_eq!(batch.input(Codec::Json, 0), "0");
        assert_eq!(batch.input(Codec::Json, 9), "9");
        let batch = packer.cut(1000, 60, 9000).unwrap();
        assert_eq!((batch.first, batch.ends.len()), (10, 20));
        let batch = packer.cut(1000, 1000, 9000).unwrap();
        assert_eq!((batch.first, batch.ends.len()), (30, 70));
        let batch = packer.cut(1000, 1000, 9000).unwrap();
        assert_eq!((batch.first, batch.inputs.len()), (100, 5003));
        assert!(packer.cut(1, 1, 1).is_none());
        assert_eq!((packer.submitted(), packer.waiting()), (101, (0, true)));
        drop(submitter);
        assert_eq!(packer.waiting(), (0, false));
    }

    #[tokio::test]
    async fn commands_get_text_and_bad_json_leaves_no_trace() {
        let (submitter, packer) = packer(Codec::Raw);
        submitter.push(Input::Json(br#""a b""#)).await.unwrap();
        assert!(matches!(submitter.push(Input::Json(b"{")).await, Err(PushError::NotJson(_))));
        assert!(matches!(submitter.push(Input::Json(b"\"\xff\"")).await, Err(PushError::NotText)));
        assert!(matches!(submitter.push(Input::Json(b"007")).await, Err(PushError::NotJson(_))));
        submitter.push(Input::Json(br#" {"a": 1}"#)).await.unwrap();
        submitter.push(Input::Text(b"\xff")).await.unwrap();
        let batch = packer.cut(10, 1000, 1000).unwrap();
        let inputs: Vec<Bytes> = (0..3).map(|position| batch.input(Codec::Raw, position)).collect();
        assert_eq!(inputs, [&b"a b"[..], br#"{"a": 1}"#, b"\xff"]);
    }

    #[tokio::test]
    async fn whoever_waits_for_room_gets_it_or_is_told_that_the_job_is_over() {
        let (submitter, packer) = packer(Codec::Raw);
        let big = vec![b'x'; CAPACITY];
        submitter.push(Input::Text(&big)).await.unwrap();
        let waiting = tokio::spawn(async move {
            let first = submitter.push(Input::Text(&big)).await;
            (first, submitter.push(Input::Text(&big)).await)
        });
        tokio::task::yield_now().await;
        packer.cut(1, 1, 1).unwrap();
        tokio::task::yield_now().await;
        packer.refuse();
        let (first, second) = waiting.await.unwrap();
        assert!(first.is_ok() && matches!(second, Err(PushError::Closed)));
    }

    #[test]
    fn names_keep_their_folders_and_lead_nowhere_else() {
        let name = |path: &str| travelling_name(Path::new(path)).unwrap();
        assert_eq!(name("/usr/lib/a.py"), "usr/lib/a.py");
        assert_eq!(name("../data/./b.txt"), "data/b.txt");
    }
}
