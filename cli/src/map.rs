//! `burla map`: from the plan to the exit code.

use std::{io, process::ExitCode, time::Duration};

use burla::{Cluster, Error, Event, Job, Outcome, StartError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::{oneshot, watch},
    time::{MissedTickBehavior, interval, timeout},
};

use crate::{
    args::{Map, Plan, Stop},
    inputs::{Source, Stopped},
    output::Output,
    report::Report,
    usage::Usage,
};

/// Exit codes, as `--help` lists them.
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const CLUSTER: u8 = 3;
const CANCELLED: u8 = 5;
const INTERRUPTED: u8 = 130;
const CLOSED: u8 = 141;
const TERMINATED: u8 = 143;

/// If the first so many inputs all fail alike, the others would too.
const ALIKE: u64 = 100;

/// How often progress is shown, and a closed stdout noticed that nothing is written to.
const TICK: Duration = Duration::from_millis(100);

/// How many events are taken before what they wrote is let out and signals are looked at.
const AT_ONCE: usize = 4096;

/// How long an interrupted job may take to end.
const PATIENCE: Duration = Duration::from_millis(800);

pub(crate) fn main(arguments: &Map) -> ExitCode {
    let plan = match arguments.plan() {
        Ok(plan) => plan,
        Err(usage) => return refuse(&usage),
    };
    let opened = plan.inputs.open().and_then(|source| Ok((source, Output::open(&plan)?)));
    let (source, output) = match opened {
        Ok(opened) => opened,
        Err(usage) => return refuse(&usage),
    };
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return refuse(&Usage { message: format!("failed to start: {error}"), hint: None }),
    };
    let code = runtime.block_on(run(plan, source, output));
    // A thread may still wait for inputs that nobody needs any more.
    runtime.shutdown_background();
    ExitCode::from(code)
}

fn refuse(usage: &Usage) -> ExitCode {
    Report::new(true, false, false).error(&usage.message, usage.hint.as_deref());
    ExitCode::from(USAGE)
}

async fn run(plan: Plan, source: Source, output: Output) -> u8 {
    let interrupted = watch_signals();
    let lines_match = plan.options.ordered && !plan.is_command;
    let mut report = Report::new(plan.quiet, plan.show_index, lines_match);
    let cluster = match Cluster::embedded().await {
        Ok(cluster) => cluster,
        Err(error) => return start_failed(&mut report, &error),
    };
    let place = cluster.place(&plan.options);
    let (submitter, job) = match cluster.start(plan.function, plan.options).await {
        Ok(started) => started,
        Err(error) => return start_failed(&mut report, &error),
    };
    report.remark(&place);
    plan.notes.iter().for_each(|note| report.remark(note));
    report.flush();
    let (stopped, read) = oneshot::channel();
    std::thread::spawn(move || {
        // The submitter closes when it is dropped, which is after this.
        let _ = stopped.send(source.submit(&submitter).err());
    });
    let to_stdout = plan.output.is_none();
    let mut run = Run { report, output, stop: plan.stop, to_stdout, failed: false, code: None };
    let ended = run.follow(job, interrupted).await;
    let code = run.end(ended, read).await;
    cluster.shutdown().await;
    code
}

fn start_failed(report: &mut Report, error: &StartError) -> u8 {
    match error {
        StartError::Impossible(_) => {
            report.error(&error.to_string(), Some("ask for less with --cpu and --ram"));
            USAGE
        }
        _ => {
            report.error(&error.to_string(), None);
            CLUSTER
        }
    }
}

/// A job that is being followed.
struct Run {
    report: Report,
    output: Output,
    stop: Stop,
    to_stdout: bool,
    failed: bool,
    /// The exit code, once something decided it.
    code: Option<u8>,
}

/// How following a job ended.
struct Ended {
    error: Option<Error>,
    progress: burla::Progress,
}

impl Run {
    /// Tells all that the job tells, until its end.
    async fn follow(&mut self, mut job: Job, mut interrupted: watch::Receiver<Option<u8>>) -> Ended {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut error = None;
        loop {
            let mut ended = false;
            tokio::select! {
                biased;
                code = signalled(&mut interrupted), if self.code.is_none() => {
                    self.code = Some(code);
                    job.cancel();
                }
                event = job.next() => match event {
                    Some(event) => self.take(event, &mut job, &mut error),
                    None => ended = true,
                },
                _ = tick.tick() => {
                    if self.to_stdout && self.code.is_none() && stdout_closed() {
                        self.code = Some(CLOSED);
                        job.cancel();
                    }
                }
            }
            for _ in 0..AT_ONCE {
                let Some(event) = job.try_next() else { break };
                self.take(event, &mut job, &mut error);
            }
            let Self { report, output, .. } = self;
            if let Err(failed) = report.around(|| output.flush()) {
                self.on_write_error(&failed, &job);
            }
            let progress = job.progress();
            self.report.show(&progress);
            if ended {
                return Ended { error, progress };
            }
        }
    }

    fn take(&mut self, event: Result<Event, Error>, job: &mut Job, error: &mut Option<Error>) {
        match event {
            Ok(Event::Line(line)) => self.report.line(&line),
            Ok(Event::Failed { index, failure }) => {
                let alike = self.report.failed(index, &failure);
                self.judge(alike, job);
            }
            Ok(Event::Finished(finished)) => {
                if let Outcome::Ok { nulled: true, .. } = finished.outcome {
                    self.report.nulled(finished.index);
                }
                if self.code != Some(CLOSED)
                    && let Err(failed) = self.output.write(&finished)
                {
                    self.on_write_error(&failed, job);
                }
            }
            Ok(_) => {}
            Err(failed) => *error = Some(failed),
        }
    }

    /// Decides whether the job goes on after a failure, the `alike`-th of its kind.
    fn judge(&mut self, alike: u64, job: &Job) {
        self.failed = true;
        let stop = match self.stop {
            Stop::AtFirst => true,
            Stop::IfAllAlike => alike >= ALIKE && job.progress().done == alike,
            Stop::Never => false,
        };
        if stop && self.code.is_none() {
            self.code = Some(FAILED);
            if self.stop == Stop::IfAllAlike {
                self.report.say(&format!(
                    "the first {ALIKE} inputs have all failed alike: stopping (--keep-going goes on)"
                ));
            }
            job.cancel();
        }
    }

    fn on_write_error(&mut self, error: &io::Error, job: &Job) {
        if self.code.is_some() {
            return;
        }
        if error.kind() == io::ErrorKind::BrokenPipe {
            self.code = Some(CLOSED);
        } else {
            self.code = Some(FAILED);
            self.report.error(&format!("failed to write the results: {error}"), None);
        }
        job.cancel();
    }

    /// Says how it ended, and finds the exit code.
    async fn end(&mut self, ended: Ended, read: oneshot::Receiver<Option<Stopped>>) -> u8 {
        let Ended { error, progress } = ended;
        // Inputs that ended too early closed the job, so the answer is there; else nobody waits for it.
        let stopped = match (self.code, &error) {
            (None, None) => read.await.unwrap_or_else(|_| {
                let message = "the inputs could not be read to their end".into();
                Some(Stopped::Usage(Usage { message, hint: None }))
            }),
            _ => None,
        };
        let quiet_end = matches!(self.code, Some(CLOSED));
        if !quiet_end {
            let cancelled = self.code.is_some() || error.is_some();
            self.report.end(&progress, cancelled, self.output.failures());
        }
        if let Some(code) = self.code {
            return code;
        }
        if let Some(error) = error {
            return self.job_failed(&error);
        }
        if let Some(Stopped::Usage(usage)) = stopped {
            self.report.error(&usage.message, usage.hint.as_deref());
            return USAGE;
        }
        if self.failed { FAILED } else { 0 }
    }

    fn job_failed(&mut self, error: &Error) -> u8 {
        match error {
            Error::Unable { message, hint, traceback, usage } => {
                let traceback = traceback.as_ref().map(|text| format!("\n{}", text.trim_end()));
                let text = format!("{message}{}", traceback.unwrap_or_default());
                self.report.error(&text, hint.as_deref());
                if *usage { USAGE } else { CLUSTER }
            }
            Error::CancelledElsewhere => {
                self.report.error(&error.to_string(), None);
                CANCELLED
            }
            _ => {
                self.report.error(&error.to_string(), None);
                CLUSTER
            }
        }
    }
}

/// Tells of the signal that ends the job. If that takes long, or there is a second signal, this
/// process ends on the spot; its keepers end what it had started.
fn watch_signals() -> watch::Receiver<Option<u8>> {
    let (tell, told) = watch::channel(None);
    // On a thread of its own: the others may all be held up by what is slow to end.
    std::thread::spawn(move || {
        if let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() {
            let code = runtime.block_on(last_signal(&tell));
            std::process::exit(code.into());
        }
    });
    told
}

/// Tells the first signal, and waits for the second, or until patience ends.
async fn last_signal(tell: &watch::Sender<Option<u8>>) -> u8 {
    let of = |kind| signal(kind).ok();
    let mut signals = (of(SignalKind::interrupt()), of(SignalKind::terminate()));
    let first = next_signal(&mut signals).await;
    tell.send_replace(Some(first));
    // Whether it comes or not makes no difference.
    let _ = timeout(PATIENCE, next_signal(&mut signals)).await;
    first
}

async fn next_signal((interrupt, terminate): &mut (Option<Signal>, Option<Signal>)) -> u8 {
    tokio::select! {
        biased;
        () = received(interrupt) => INTERRUPTED,
        () = received(terminate) => TERMINATED,
    }
}

/// Waits for the code that a signal asks for.
async fn signalled(interrupted: &mut watch::Receiver<Option<u8>>) -> u8 {
    match interrupted.wait_for(Option::is_some).await.map(|code| *code) {
        Ok(Some(code)) => code,
        _ => std::future::pending().await,
    }
}

async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether whoever reads stdout has gone away.
fn stdout_closed() -> bool {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::ERR)
}
