//! A runtime that is a child process: the Python runner, or the runtime of commands.

use std::{
    collections::VecDeque, io, os::fd::OwnedFd, os::unix::net::UnixStream as StdStream, time::Duration,
};

use async_trait::async_trait;
use burla_core::{
    envelope::{LogLine, Stream},
    record,
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::{
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::{Instant, sleep_until, timeout},
};

use super::{Event, Runtime, View};
use crate::{
    channel::{self, Kind, Reader},
    keeper::{Ended, Keeper, Program},
    logs::{Nonce, Splitter},
    shared::{Cell, Shared},
};

/// How often the shared memory and the log pipes are looked at while a batch runs. A child rings when
/// a call took more than a few milliseconds; this finds what short calls finished before a long one
/// began, and what a call prints while it runs. Nobody is woken up for each line.
const BUSY: Duration = Duration::from_millis(20);

/// How often while no batch runs: something in the background may print.
const IDLE: Duration = Duration::from_millis(100);

/// How soon again when the pipes were so full that whoever prints may have to wait.
const FULL: Duration = Duration::from_millis(1);

/// How long a child may take to end after it closed its channel, so that its own status is told.
const LAST_BREATH: Duration = Duration::from_millis(100);

/// How much a log pipe holds.
const PIPE: usize = 256 << 10;

/// All that a fresh child is started with.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    /// The program.
    pub(crate) program: Program,
    /// The job, as the child's JSON.
    pub(crate) job: String,
    /// What the markers in its logs begin with.
    pub(crate) nonce: Nonce,
}

/// Runs calls in a child process that its keeper keeps.
#[derive(Debug)]
pub(crate) struct ChildRuntime {
    launch: Launch,
    keeper: Keeper,
    child: Option<Child>,
    events: VecDeque<Event>,
    /// Whether the keeper has to be replaced before the next child.
    lost: bool,
    /// How the child ended, while what it left is taken in.
    ending: Option<Ended>,
    look_at: Instant,
}

/// One life of the child.
#[derive(Debug)]
struct Child {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    /// What is still to be written to it: a batch may be larger than it takes at once.
    outgoing: VecDeque<Bytes>,
    /// A batch that came before the function was loaded. No call begins until the worker has read what
    /// was printed by then, which is of no call.
    held: Vec<Bytes>,
    /// How often it said that it is ready: once it is up, once the function is loaded.
    readies: u32,
    /// Index of the batch's first input.
    first: u64,
    /// After it closed its channel: when it is killed.
    closed: Option<Instant>,
    reader: Reader,
    shared: Shared,
    /// Bytes of the window that were taken.
    taken: usize,
    /// What [`Cell::Written`] was at the last look.
    seen: usize,
    busy: bool,
    logs: Logs,
}

/// Its standard streams.
#[derive(Debug)]
struct Logs {
    pipes: [(OwnedFd, Splitter); 2],
    /// Whether the last look found a lot.
    full: bool,
    /// Whose call ran last, for what is written while none runs.
    last: Option<u64>,
}

impl ChildRuntime {
    pub(crate) fn new(launch: Launch, keeper: Keeper) -> Self {
        Self {
            launch,
            keeper,
            child: None,
            events: VecDeque::new(),
            lost: false,
            ending: None,
            look_at: Instant::now(),
        }
    }

    fn on_frame(&mut self, kind: Kind, payload: Bytes) -> io::Result<()> {
        let Some(child) = &mut self.child else { return Ok(()) };
        match kind {
            Kind::Written => child.take(&mut self.events),
            Kind::Full => {
                child.take(&mut self.events);
                child.taken = 0;
                child.seen = 0;
                child.shared.store(Cell::Written, 0);
                child.outgoing.extend(channel::frame(Kind::Continue, &[]));
            }
            Kind::Big => {
                child.take(&mut self.events);
                if record::first_len(&payload) == Some(payload.len()) {
                    self.events.push_back(Event::Records { bytes: payload, count: 1 });
                }
            }
            Kind::Done => {
                child.take(&mut self.events);
                child.busy = false;
                let reached = payload[..].try_into().map(u32::from_le_bytes).map_err(io::Error::other)?;
                if let Some(last) = reached.checked_sub(1) {
                    child.logs.last = Some(child.first + u64::from(last));
                }
                self.events.push_back(Event::Done(reached));
            }
            Kind::Unable => {
                let unable = serde_json::from_slice(&payload)?;
                child.read_logs(&mut self.events);
                self.events.push_back(Event::Unable(unable));
            }
            // What was printed while the function was loaded is of no call.
            Kind::Ready => {
                child.readies += 1;
                if child.loaded() {
                    child.end_logs(&mut self.events);
                    child.outgoing.extend(child.held.drain(..));
                }
            }
            Kind::Job | Kind::Batch | Kind::Continue => {}
        }
        Ok(())
    }

    /// The child and all below it is gone: what it had sent, finished and printed is still there. Cancel-safe.
    async fn take_the_rest(&mut self) {
        while let Some(child) = &mut self.child {
            // The end of the stream comes at once, unless its keeper was lost and something that the child
            // left behind holds it.
            let next = timeout(LAST_BREATH, child.reader.next(&mut child.from)).await;
            let Ok(Ok(Some((kind, payload)))) = next else { break };
            if self.on_frame(kind, payload).is_err() {
                break;
            }
        }
        if let Some(child) = &mut self.child {
            child.take(&mut self.events);
            child.end_logs(&mut self.events);
            child.busy = false;
        }
        if let Some(ended) = self.ending.take() {
            self.lost = ended == Ended::Lost;
            self.events.push_back(Event::Ended(ended));
        }
    }
}

#[async_trait]
impl Runtime for ChildRuntime {
    async fn start(&mut self) -> io::Result<()> {
        self.events.clear();
        if std::mem::take(&mut self.lost) {
            self.keeper.replace()?;
        }
        let (shared, shared_fd) = Shared::new()?;
        let (ours, theirs) = StdStream::pair()?;
        let (out, out_fd) = log_pipe()?;
        let (err, err_fd) = log_pipe()?;
        let fds = [theirs.into(), out_fd, err_fd, shared_fd];
        if self.keeper.run(&self.launch.program, &fds).is_err() {
            // It died while it had nothing to keep.
            self.keeper.replace()?;
            self.keeper.run(&self.launch.program, &fds)?;
        }
        ours.set_nonblocking(true)?;
        let (from, to) = UnixStream::from_std(ours)?.into_split();
        let job = Bytes::from(self.launch.job.clone());
        let outgoing = channel::frame(Kind::Job, &[job]).into();
        let nonce = &self.launch.nonce;
        let pipes =
            [(out, Splitter::new(Stream::Stdout, nonce)), (err, Splitter::new(Stream::Stderr, nonce))];
        let logs = Logs { pipes, full: false, last: None };
        self.child = Some(Child {
            from,
            to,
            outgoing,
            held: Vec::new(),
            readies: 0,
            first: 0,
            closed: None,
            reader: Reader::default(),
            shared,
            taken: 0,
            seen: 0,
            busy: false,
            logs,
        });
        Ok(())
    }

    async fn feed(&mut self, view: &View) -> io::Result<()> {
        let child = self.child.as_mut().ok_or_else(|| io::Error::other("there is no child to feed"))?;
        child.taken = 0;
        child.seen = 0;
        child.shared.store(Cell::Written, 0);
        child.shared.store(Cell::Limit, view.to.into());
        child.busy = true;
        self.look_at = self.look_at.min(Instant::now() + BUSY);
        let mut head = BytesMut::new();
        head.put_u64_le(view.first);
        head.put_u32_le(view.from);
        head.put_u32_le(view.to);
        child.first = view.first;
        let frame = channel::frame(Kind::Batch, &[head.freeze(), view.inputs.clone()]);
        if child.loaded() {
            child.outgoing.extend(frame);
        } else {
            child.held = frame;
        }
        Ok(())
    }

    async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.events.pop_front() {
                return event;
            }
            if self.ending.is_some() {
                self.take_the_rest().await;
                continue;
            }
            let Some(child) = &mut self.child else { return std::future::pending().await };
            let Child { from, to, outgoing, reader, closed, .. } = child;
            let closed = *closed;
            tokio::select! {
                biased;
                frame = reader.next(from), if closed.is_none() => match frame {
                    Ok(Some((kind, payload))) => {
                        if self.on_frame(kind, payload).is_err() {
                            self.keeper.kill();
                        }
                    }
                    // It ended, or it closed what it should not have: either way it is of no use.
                    _ => {
                        child.closed = Some(Instant::now() + LAST_BREATH);
                    }
                },
                ended = self.keeper.ended() => self.ending = Some(ended),
                () = sleep_until(closed.unwrap_or_else(Instant::now)), if closed.is_some() => {
                    child.closed = Some(Instant::now() + LAST_BREATH);
                    self.keeper.kill();
                }
                _ = to.writable(), if !outgoing.is_empty() => child.write(),
                () = sleep_until(self.look_at) => {
                    child.look(&mut self.events);
                    let pause = if child.logs.full { FULL } else if child.busy { BUSY } else { IDLE };
                    self.look_at = Instant::now() + pause;
                }
            }
        }
    }

    fn running(&self) -> Option<u64> {
        self.child.as_ref().and_then(Child::running)
    }

    /// The child says what it runs before it looks at the limit, and the worker looks at what it runs
    /// long after it set the limit, so at least one of them sees the other.
    fn limit(&self, to: u32) {
        if let Some(child) = &self.child {
            child.shared.store(Cell::Limit, to.into());
        }
    }

    fn kill(&mut self) {
        self.keeper.kill();
    }
}

impl Child {
    fn loaded(&self) -> bool {
        self.readies >= 2
    }

    fn running(&self) -> Option<u64> {
        self.shared.load(Cell::Running).checked_sub(1)
    }

    /// Writes as much as it takes now.
    fn write(&mut self) {
        while let Some(part) = self.outgoing.front_mut() {
            match self.to.try_write(part) {
                Ok(written) => part.advance(written),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It is gone, and its keeper says so.
                Err(_) => return self.outgoing.clear(),
            }
            if part.is_empty() {
                self.outgoing.pop_front();
            }
        }
    }

    /// Takes what is finished out of the window, behind the lines that belong to it.
    fn take(&mut self, events: &mut VecDeque<Event>) {
        let written = usize::try_from(self.shared.load(Cell::Written)).unwrap_or(usize::MAX);
        self.read_logs(events);
        if written <= self.taken {
            return;
        }
        let mut bytes = Bytes::from(self.shared.copy(self.taken, written));
        let (mut whole, mut count) = (0, 0);
        while let Some(len) = record::first_len(&bytes[whole..]) {
            whole += len;
            count += 1;
        }
        bytes.truncate(whole);
        self.taken += whole;
        if count > 0 {
            events.push_back(Event::Records { bytes, count });
        }
    }

    /// Finds what the child does not ring for.
    fn look(&mut self, events: &mut VecDeque<Event>) {
        let written = usize::try_from(self.shared.load(Cell::Written)).unwrap_or(usize::MAX);
        // On processors that reorder stores, the records may become visible after the cell that
        // counts them; by the next look they have.
        if written == self.seen {
            self.take(events);
        } else {
            self.seen = written;
            self.read_logs(events);
        }
        let mut lines = Vec::new();
        let running = self.running().or(self.logs.last);
        for (_, splitter) in &mut self.logs.pipes {
            splitter.tick(running, &mut lines);
        }
        push_lines(events, lines);
    }

    /// Reads what is in the log pipes now, and matches it with calls.
    fn read_logs(&mut self, events: &mut VecDeque<Event>) {
        let mut lines = Vec::new();
        // Bytes behind the last marker are of the call that was running both before and after they were
        // read: an earlier one would have left its marker behind them. If calls are too short for
        // that, their markers are on the way.
        for _ in 0..3 {
            let before = self.running();
            self.logs.read(&self.shared, &mut lines);
            if before == self.running() {
                self.logs.last = before.or(self.logs.last);
                let last = self.logs.last;
                for (_, splitter) in &mut self.logs.pipes {
                    splitter.attribute(last, &mut lines);
                }
                break;
            }
        }
        push_lines(events, lines);
    }

    /// Reads what is of no call that will still run.
    fn end_logs(&mut self, events: &mut VecDeque<Event>) {
        let mut lines = Vec::new();
        self.logs.read(&self.shared, &mut lines);
        let last = self.running().or(self.logs.last);
        for (_, splitter) in &mut self.logs.pipes {
            splitter.attribute(last, &mut lines);
            splitter.finish(last, &mut lines);
        }
        push_lines(events, lines);
    }
}

impl Logs {
    /// Reads as much as was there when the reading began: a child that prints without end can't keep us here.
    fn read(&mut self, shared: &Shared, lines: &mut Vec<LogLine>) {
        self.full = false;
        for (pipe, splitter) in &mut self.pipes {
            let mut left = rustix::io::ioctl_fionread(&*pipe).map_or(0, |held| held as usize);
            self.full |= left > PIPE / 4;
            while left > 0 {
                // Told before the read, so that a child that sees its pipe empty knows whether it was read.
                shared.add(Cell::Drained, 1);
                let mut buffer = vec![0; left.min(PIPE)];
                let Ok(read @ 1..) = rustix::io::read(&*pipe, &mut buffer) else { break };
                splitter.push(&buffer[..read], lines);
                left = left.saturating_sub(read);
            }
        }
    }
}

fn push_lines(events: &mut VecDeque<Event>, lines: Vec<LogLine>) {
    if !lines.is_empty() {
        events.push_back(Event::Logs(lines));
    }
}

/// A pipe for a standard stream: our end, and the child's.
fn log_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // Unprivileged users have a bound on the sum of their pipes; the usual size does too.
    let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE);
    Ok((read, write))
}
