//! The keeper's own side: one thread, one loop.

use std::{
    fs::File,
    io::{self, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use burla_core::wire;
use bytes::Bytes;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, FdFlags, fcntl_setfd},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recvmsg, send},
    process::{
        Pid, PidfdFlags, Resource, Rlimit, getpid, getrlimit, pidfd_open, set_child_subreaper, setrlimit,
        setsid,
    },
};

use super::{FDS, Order, Program, Report, limit::Limit, tree};
use crate::scratch;

/// How often memory is looked at.
const SAMPLE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// How often orphans that ended are reaped while nothing else happens.
const REAP: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Keeps what the worker on descriptor 0 asks for, until the worker says so or is gone.
pub(crate) fn main(scratch: &Path) -> io::Result<()> {
    let _ = setsid();
    lower_descriptor_limit();
    set_child_subreaper(Some(getpid()))?;
    let socket = rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    let mut kept: Option<Kept> = None;
    loop {
        match next(&socket, kept.as_ref())? {
            Next::Order(Order::Start, fds) => match start(fds) {
                Ok(started) => kept = Some(started),
                Err(error) => report(&socket, &Report::NotStarted(error.to_string())),
            },
            Next::Order(Order::Kill, _) => {
                if let Some(kept) = kept.take() {
                    end(&socket, kept, None);
                }
            }
            Next::Order(Order::Leave, _) => {
                tree::kill_all(None);
                drop(kept);
                // The worker's process goes on, or removes it itself, unless it died since.
                scratch::remove_abandoned(scratch);
                return Ok(());
            }
            Next::Gone => {
                tree::kill_all(None);
                drop(kept);
                // A dying process closes its sockets a moment before it lets go of its locks, or after.
                for _ in 0..500 {
                    if scratch::remove_abandoned(scratch) {
                        break;
                    }
                    tree::pause(Duration::from_millis(2));
                }
                return Ok(());
            }
            Next::Look => {
                let exceeded = kept.as_mut().and_then(|kept| kept.limit.as_mut()?.exceeded());
                if exceeded.is_some()
                    && let Some(kept) = kept.take()
                {
                    end(&socket, kept, exceeded);
                } else if let Some(status) = tree::reap(kept.as_ref().map(|kept| kept.pid))
                    && let Some(kept) = kept.take()
                {
                    end(&socket, Kept { status: Some(status), ..kept }, None);
                }
            }
        }
    }
}

/// The worker's process may have raised its limit, which is not for what calls start: programs that
/// call `select` rely on the usual one.
fn lower_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let usual = limit.current.map(|current| current.min(1024));
    let _ = setrlimit(Resource::Nofile, Rlimit { current: usual.or(Some(1024)), maximum: limit.maximum });
}

/// The runtime child.
struct Kept {
    pid: Pid,
    pidfd: OwnedFd,
    limit: Option<Limit>,
    /// Its status, once it was reaped.
    status: Option<i32>,
}

enum Next {
    Order(Order, Vec<OwnedFd>),
    /// The worker is gone.
    Gone,
    /// Something may have ended, or it is time for a sample.
    Look,
}

/// Waits for whatever comes first.
fn next(socket: &OwnedFd, kept: Option<&Kept>) -> io::Result<Next> {
    let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
    if let Some(kept) = kept {
        fds.push(PollFd::new(&kept.pidfd, PollFlags::IN));
    }
    let sampled = kept.is_some_and(|kept| kept.limit.is_some());
    let timeout = if sampled { &SAMPLE } else { &REAP };
    match poll(&mut fds, kept.map(|_| timeout)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    if fds[0].revents().is_empty() { Ok(Next::Look) } else { receive(socket) }
}

fn receive(socket: &OwnedFd) -> io::Result<Next> {
    let mut buffer = vec![0; 64];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [io::IoSliceMut::new(&mut buffer)];
    let len = match recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
        Ok(received) if received.bytes > 0 => received.bytes,
        Ok(_) | Err(Errno::CONNRESET) => return Ok(Next::Gone),
        Err(Errno::INTR) => return Ok(Next::Look),
        Err(error) => return Err(error.into()),
    };
    let fds = ancillary
        .drain()
        .flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<_>>(),
            _ => Vec::new(),
        })
        .collect();
    let (order, _) = wire::decode(&Bytes::from(buffer).slice(..len)).map_err(io::Error::other)?;
    Ok(Next::Order(order, fds))
}

fn start(fds: Vec<OwnedFd>) -> io::Result<Kept> {
    let [stdin, stdout, stderr, shared, described]: [OwnedFd; FDS] =
        fds.try_into().map_err(|_| io::Error::other("the worker sent no descriptors"))?;
    let mut program = Vec::new();
    File::from(described).read_to_end(&mut program)?;
    let (program, _): (Program, _) = wire::decode(&program.into()).map_err(io::Error::other)?;
    // This process has one thread, so nobody else can inherit it meanwhile.
    fcntl_setfd(shared.as_fd(), FdFlags::empty())?;
    let mut command = Command::new(&program.argv[0]);
    command
        .args(&program.argv[1..])
        .env_clear()
        .envs(&program.env)
        .env(&program.shared_variable, shared.as_raw_fd().to_string())
        .current_dir(&program.cwd)
        .process_group(0)
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr));
    let (limit, child) = match program.memory {
        Some(bytes) => {
            let (limit, child) = Limit::around(bytes, || command.spawn());
            (Some(limit), child?)
        }
        None => (None, command.spawn()?),
    };
    let pid = Pid::from_child(&child);
    Ok(Kept { pid, pidfd: pidfd_open(pid, PidfdFlags::empty())?, limit, status: None })
}

/// Ends what is left of `kept` and reports.
fn end(socket: &OwnedFd, mut kept: Kept, exceeded: Option<u64>) {
    let killed = tree::kill_all(Some(kept.pid));
    // The kernel may have killed it for its memory a moment before the counter was looked at.
    let exceeded = exceeded.or_else(|| kept.limit.as_mut()?.exceeded());
    report(socket, &Report::Ended { status: kept.status.or(killed).unwrap_or(9), exceeded });
}

fn report(socket: &OwnedFd, report: &Report) {
    // A worker that can't be told is gone, which the next poll notices.
    let _ = send(socket, &wire::encode(report, &[]), SendFlags::NOSIGNAL);
}
