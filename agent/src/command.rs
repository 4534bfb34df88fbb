//! The runtime child of commands: one process per input, started from a small process because
//! starting one from a large process is slow. It speaks what the Python runner speaks.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
};

use burla_core::record::{Failure, FailureKind, Outcome, Record};
use bytes::{Buf, Bytes, BytesMut};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{MemfdFlags, memfd_create},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, PidfdFlags, pidfd_open},
};
use serde::{Deserialize, Serialize};

use crate::{
    channel::{Kind, receive_blocking, send_blocking},
    logs::{Nonce, marker},
    reenter,
    runtime::Unable,
    shared::{Cell, Shared},
};

/// The variable that names the shared memory's descriptor.
pub(crate) const SHARED_VARIABLE: &str = "BURLA_SHARED_FD";

/// Records longer than this go over the channel instead of through the window.
const BIG: usize = 256 << 10;

/// What it is to run, as the worker sends it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) argv: Vec<String>,
    /// Where inputs that are files lie.
    pub(crate) files: Option<PathBuf>,
    pub(crate) nonce: String,
}

/// Runs commands until the worker closes the channel.
pub(crate) fn main() -> io::Result<()> {
    let mut runtime = Runtime::inherit()?;
    runtime.send(Kind::Ready, b"{}")?;
    let mut job = None;
    while let Some((kind, payload)) = receive_blocking(&mut runtime.channel)? {
        match kind {
            Kind::Job => {
                let parsed: Job = serde_json::from_slice(&payload)?;
                if let Err(unable) = check(&parsed.argv[0]) {
                    runtime.send(Kind::Unable, &serde_json::to_vec(&unable)?)?;
                } else {
                    runtime.send(Kind::Ready, b"{}")?;
                    job = Some(parsed);
                }
            }
            Kind::Batch => {
                let job = job.as_ref().ok_or_else(|| io::Error::other("a batch came before its job"))?;
                runtime.batch(job, payload)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether there is such a program, before the first input is spent on finding out.
fn check(program: &str) -> Result<(), Unable> {
    let executable =
        |path: &Path| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    let found = if program.contains("{}") {
        true
    } else if program.contains('/') {
        executable(Path::new(program))
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| executable(&folder.join(program)))
    };
    if found {
        return Ok(());
    }
    let exists = program.contains('/') && Path::new(program).exists();
    let message = match exists {
        true => format!("command {program} can't be executed"),
        false => format!("command {program} is not found where the calls run"),
    };
    let hint = match exists {
        true => format!("chmod +x {program}"),
        false => {
            "check its spelling; a program of your own is sent along when it is named by a relative path"
                .to_owned()
        }
    };
    Err(Unable { message, hint: Some(hint), traceback: None, usage: true })
}

struct Runtime {
    channel: UnixStream,
    shared: Shared,
    /// Our own descriptors of the log pipes, which no call can close.
    logs: [OwnedFd; 2],
    written: usize,
}

impl Runtime {
    /// Takes over what the keeper passed down, and leaves /dev/null in its place.
    fn inherit() -> io::Result<Self> {
        let channel = UnixStream::from(rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?);
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        let shared = Shared::inherit(SHARED_VARIABLE)?;
        let logs = [
            rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3)?,
            rustix::io::fcntl_dupfd_cloexec(io::stderr(), 3)?,
        ];
        Ok(Self { channel, shared, logs, written: 0 })
    }

    fn send(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        send_blocking(&mut self.channel, kind, payload)
    }

    fn batch(&mut self, job: &Job, mut payload: Bytes) -> io::Result<()> {
        let (first, from, to) = (payload.get_u64_le(), payload.get_u32_le(), payload.get_u32_le());
        self.shared.store(Cell::Written, 0);
        self.written = 0;
        let mut reached = 0;
        while payload.has_remaining() {
            let len = payload.get_u32_le() as usize;
            let input = payload.split_to(len);
            if (from..to).contains(&reached) {
                let index = first + u64::from(reached);
                self.shared.store(Cell::Running, index + 1);
                if u64::from(reached) >= self.shared.load(Cell::Limit) {
                    break;
                }
                let drained = self.shared.load(Cell::Drained);
                let record = run(job, index, &input);
                self.mark(job, index, drained)?;
                self.finish(&record)?;
            } else if reached >= to {
                break;
            }
            reached += 1;
        }
        self.shared.store(Cell::Running, 0);
        self.send(Kind::Done, &reached.min(to).to_le_bytes())
    }

    /// Marks in the log pipes where the call ended, if it may have written there.
    fn mark(&self, job: &Job, index: u64, drained: u64) -> io::Result<()> {
        let quiet = |pipe: &OwnedFd| rustix::io::ioctl_fionread(pipe).is_ok_and(|held| held == 0);
        if self.logs.iter().all(quiet) && self.shared.load(Cell::Drained) == drained {
            return Ok(());
        }
        let marker = marker(&Nonce(job.nonce.clone()), index);
        for pipe in &self.logs {
            while let Err(error) = rustix::io::write(pipe, &marker) {
                // A command may have made the pipe non-blocking for all of us.
                if error != rustix::io::Errno::AGAIN {
                    return Err(error.into());
                }
                poll(&mut [PollFd::new(pipe, PollFlags::OUT)], None)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, record: &Record) -> io::Result<()> {
        let mut bytes = BytesMut::new();
        record.write(&mut bytes);
        let big = bytes.len() > BIG;
        if self.written > 0 && (big || !self.shared.write(self.written, &bytes)) {
            self.send(Kind::Full, &[])?;
            match receive_blocking(&mut self.channel)? {
                Some((Kind::Continue, _)) => self.written = 0,
                _ => return Err(io::Error::other("the worker did not make room")),
            }
        }
        if big {
            return self.send(Kind::Big, &bytes);
        }
        self.shared.write(self.written, &bytes);
        self.written += bytes.len();
        self.shared.store(Cell::Written, self.written as u64);
        self.send(Kind::Written, &[])
    }
}

/// Runs the command on one input.
#[expect(
    clippy::disallowed_methods,
    reason = "how long a real process takes, in a process without a runtime"
)]
fn run(job: &Job, index: u64, input: &[u8]) -> Record {
    let began = std::time::Instant::now();
    let ended = Call::new(job, index, input).and_then(|call| call.run());
    let seconds = began.elapsed().as_secs_f32();
    let outcome = match ended {
        Ok((status, output)) if status.success() => Outcome::Ok { result: output, nulled: false },
        Ok((status, output)) => Outcome::Failed { failure: failure(describe(status)), output },
        Err(error) => {
            let unfit =
                matches!(error.kind(), io::ErrorKind::ArgumentListTooLong | io::ErrorKind::InvalidInput);
            let hint =
                "the input does not fit into an argument: without any {} it goes to the command's stdin";
            let mut failure = failure(format!("{} could not be started: {error}", job.argv[0]));
            failure.hint = if unfit {
                Some(hint.to_owned())
            } else {
                let shell = job.argv.len() == 1 && job.argv[0].contains(' ');
                shell.then(|| format!("for a shell to read it, write -- sh -c '{}'", job.argv[0]))
            };
            Outcome::Failed { failure, output: Bytes::new() }
        }
    };
    Record { seconds, outcome }
}

fn failure(message: String) -> Box<Failure> {
    Box::new(Failure {
        kind: FailureKind::Exit,
        type_name: "exit".into(),
        fingerprint: message.clone(),
        message,
        traceback: None,
        hint: None,
    })
}

/// A status in words.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}{}", signal_name(signal)),
        (None, None) => "an unknown end".into(),
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        13 => " (SIGPIPE)",
        15 => " (SIGTERM)",
        _ => "",
    }
}

/// A command, about to be started.
struct Call {
    command: Command,
    output: File,
}

impl Call {
    fn new(job: &Job, index: u64, input: &[u8]) -> io::Result<Self> {
        use std::os::unix::ffi::{OsStrExt, OsStringExt};
        let input = match &job.files {
            Some(folder) => {
                let name = std::ffi::OsStr::from_bytes(input);
                folder.join(index.to_string()).join(name).into_os_string().into_vec()
            }
            None => input.to_vec(),
        };
        let mut used = false;
        let mut arguments = job.argv.iter().map(|argument| {
            let parts: Vec<&[u8]> = argument.split("{}").map(str::as_bytes).collect();
            used |= parts.len() > 1;
            std::ffi::OsString::from_vec(parts.join(&input[..]))
        });
        let mut command = Command::new(arguments.next().ok_or_else(|| io::Error::other("no command"))?);
        command.args(arguments);
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        let stdin = if used { Stdio::null() } else { Stdio::from(line(&input)?) };
        command
            .stdin(stdin)
            .stdout(Stdio::from(write))
            .stderr(Stdio::inherit())
            .env_remove(SHARED_VARIABLE)
            .env_remove(reenter::VARIABLE);
        Ok(Self { command, output: File::from(read) })
    }

    /// Starts it, and reads its stdout until it ends. What it leaves running in the background is not waited for.
    fn run(mut self) -> io::Result<(ExitStatus, Bytes)> {
        let mut child = self.command.spawn()?;
        // Our copy of the pipe's end goes, so that the command's end is the pipe's.
        drop(self.command);
        let mut output = Vec::new();
        read_until_exit(&child, &mut self.output, &mut output)?;
        Ok((child.wait()?, output.into()))
    }
}

/// A file that holds the input and a line's end.
fn line(input: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create("stdin", MemfdFlags::CLOEXEC)?);
    file.write_all(input)?;
    file.write_all(b"\n")?;
    file.rewind()?;
    Ok(file.into())
}

fn read_until_exit(child: &Child, output: &mut File, to: &mut Vec<u8>) -> io::Result<()> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let mut chunk = [0; 64 << 10];
    loop {
        let mut fds = [PollFd::new(&*output, PollFlags::IN), PollFd::new(&pidfd, PollFlags::IN)];
        poll(&mut fds, None)?;
        let (readable, exited) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if readable {
            match output.read(&mut chunk)? {
                0 => return Ok(()),
                read => to.extend_from_slice(&chunk[..read]),
            }
        } else if exited {
            return Ok(());
        }
    }
}
