//! The keeper: a small process between a worker and what it runs.
//!
//! All that a call starts is a descendant of its slot's keeper, and stays one: the keeper is a
//! subreaper, so that whatever outlives its parent, or calls `setsid`, becomes the keeper's child.
//! So it can end all of it, and it does when the runtime child ends, when the worker says so and when
//! the worker is gone, however it died. It is a session of its own and never gets a terminal's
//! signals. It also watches the memory of all it keeps.
//!
//! The worker's side is [`Keeper`]; the process's is [`process::main`].

mod limit;
pub(crate) mod process;
mod tree;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Seek, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use burla_core::wire;
use bytes::Bytes;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    recv, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};
use tokio::{io::Interest, net::UnixStream};

use crate::reenter::{Reenter, Role};

/// Descriptors that come with [`Order::Start`].
const FDS: usize = 5;

/// What a worker tells its keeper.
#[derive(Debug, Serialize, Deserialize)]
enum Order {
    /// Start the runtime child. Descriptors come along: stdin, stdout, stderr, shared memory, and a file
    /// with the [`Program`], whose environment may be longer than a message.
    Start,
    /// Kill all that was started.
    Kill,
    /// End: the worker ends in good order.
    Leave,
}

/// A program to start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    /// The program and its arguments.
    pub(crate) argv: Vec<String>,
    /// The whole environment.
    pub(crate) env: BTreeMap<String, String>,
    /// The variable that tells the shared memory's descriptor.
    pub(crate) shared_variable: String,
    /// Where it starts.
    pub(crate) cwd: PathBuf,
    /// Bytes of memory that it and its descendants may use together.
    pub(crate) memory: Option<u64>,
}

/// What a keeper tells its worker.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    /// The runtime child could not be started.
    NotStarted(String),
    /// The runtime child, and all that it left behind, is gone.
    Ended {
        /// As `wait` gives it.
        status: i32,
        /// With a memory limit that was exceeded: the most that was measured.
        exceeded: Option<u64>,
    },
}

/// How a runtime child ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It never ran.
    NotStarted(String),
    /// It exited, or was killed by a signal.
    Status(ExitStatus),
    /// It was killed because it used so many bytes of memory.
    Memory(u64),
    /// Its keeper died.
    Lost,
}

/// A worker's hold on its keeper. Dropping it ends all that the keeper keeps.
#[derive(Debug)]
pub(crate) struct Keeper {
    /// Of sequenced packets, whatever its type says: tokio has none for those.
    socket: Option<UnixStream>,
    process: std::process::Child,
    reenter: Reenter,
    scratch: PathBuf,
    /// What stands in the environment of all that is kept, should the keeper be gone before it.
    mark: String,
}

impl Keeper {
    /// Starts a keeper, which removes `scratch` should this process have died.
    pub(crate) fn start(reenter: &Reenter, scratch: &Path, mark: &str) -> io::Result<Self> {
        let (socket, process) = Self::launch(reenter, scratch)?;
        Ok(Self {
            socket: Some(socket),
            process,
            reenter: reenter.clone(),
            scratch: scratch.to_owned(),
            mark: mark.to_owned(),
        })
    }

    /// Starts another one in the place of one that was lost.
    pub(crate) fn replace(&mut self) -> io::Result<()> {
        let (socket, process) = Self::launch(&self.reenter, &self.scratch)?;
        self.socket = Some(socket);
        let mut lost = std::mem::replace(&mut self.process, process);
        let _ = lost.kill();
        lost.wait().map(drop)
    }

    fn launch(reenter: &Reenter, scratch: &Path) -> io::Result<(UnixStream, std::process::Child)> {
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        let ours = std::os::unix::net::UnixStream::from(ours);
        ours.set_nonblocking(true)?;
        let process = reenter
            .command(Role::Keeper)
            .arg(scratch)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            // It may outlive this process for a moment: whoever reads our stderr shall not wait for it.
            .stderr(Stdio::null())
            .spawn()?;
        Ok((UnixStream::from_std(ours)?, process))
    }

    /// Starts the runtime child.
    pub(crate) fn run(&self, program: &Program, fds: &[OwnedFd; 4]) -> io::Result<()> {
        let mut described = File::from(memfd_create("program", MemfdFlags::CLOEXEC)?);
        described.write_all(&wire::encode(program, &[]))?;
        described.rewind()?;
        let [stdin, stdout, stderr, shared] = fds.each_ref().map(AsFd::as_fd);
        let fds = [stdin, stdout, stderr, shared, described.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        self.send(&Order::Start, &mut ancillary)
    }

    /// Kills all that was started. What is left to [`Keeper::ended`] is to tell when it is gone.
    pub(crate) fn kill(&self) {
        // A keeper that can't be told is gone, and `ended` says so.
        let _ = self.send(&Order::Kill, &mut SendAncillaryBuffer::default());
    }

    fn send(&self, order: &Order, ancillary: &mut SendAncillaryBuffer<'_, '_, '_>) -> io::Result<()> {
        let message = wire::encode(order, &[]);
        let parts = [io::IoSlice::new(&message)];
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        sendmsg(socket, &parts, ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Waits until the runtime child and all its descendants are gone. Cancel-safe.
    pub(crate) async fn ended(&self) -> Ended {
        match self.report().await {
            Ok(Report::NotStarted(why)) => Ended::NotStarted(why),
            Ok(Report::Ended { exceeded: Some(bytes), .. }) => Ended::Memory(bytes),
            Ok(Report::Ended { status, exceeded: None }) => Ended::Status(ExitStatus::from_raw(status)),
            Err(_) => {
                // What it kept is nobody's now, but still carries the slot's mark.
                tree::kill_marked(&self.mark);
                Ended::Lost
            }
        }
    }

    async fn report(&self) -> io::Result<Report> {
        let mut buffer = vec![0; 4096];
        let socket = self.socket.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let len = loop {
            socket.readable().await?;
            let read = socket.try_io(Interest::READABLE, || {
                let (len, _) = recv(socket, &mut buffer, RecvFlags::empty())?;
                Ok(len)
            });
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                read => break read?,
            }
        };
        let (report, _) = wire::decode(&Bytes::from(buffer).slice(..len)).map_err(io::Error::other)?;
        Ok(report)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.send(&Order::Leave, &mut SendAncillaryBuffer::default());
        // It sees the end even if it did not get the word.
        self.socket = None;
        // It kills what it keeps and ends, which takes a few milliseconds, unless the kernel holds on
        // to something: then it gives up after five seconds.
        for _ in 0..1500 {
            if !matches!(self.process.try_wait(), Ok(None)) {
                return;
            }
            tree::pause(Duration::from_millis(4));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
