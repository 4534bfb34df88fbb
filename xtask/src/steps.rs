//! Runs the steps of a task one after another, and says at the end how each went and how long it took.

use std::io::{BufRead, BufReader, IsTerminal as _, Read, Write};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::counts::Counts;

/// The steps taken so far.
#[derive(Default)]
pub(crate) struct Steps {
    taken: Vec<Step>,
    counts: Option<Counts>,
}

struct Step {
    name: String,
    took: Duration,
    failure: Option<String>,
}

impl Steps {
    /// Runs one step and tells whether it went well; a failed one does not keep others from being tried.
    pub(crate) fn run(&mut self, name: &str, command: &mut Command) -> bool {
        self.take(name, || match command.status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(status.to_string()),
            Err(error) => Err(format!("it did not start: {error}")),
        })
    }

    /// Runs a step made of tests, and adds up the summaries that it prints.
    pub(crate) fn run_tests(&mut self, name: &str, command: &mut Command) -> bool {
        let counts = Arc::new(Mutex::new(self.counts.take().unwrap_or_default()));
        let well = self.take(name, || run_counted(command, &counts));
        self.counts = Some(*counts.lock().unwrap_or_else(PoisonError::into_inner));
        well
    }

    fn take(&mut self, name: &str, work: impl FnOnce() -> Result<(), String>) -> bool {
        eprintln!("\n==> {name}");
        let start = now();
        let failure = work().err();
        let well = failure.is_none();
        self.taken.push(Step { name: name.to_owned(), took: start.elapsed(), failure });
        well
    }

    /// Prints the table of steps, and the counts of tests as the last line.
    pub(crate) fn finish(self) -> ExitCode {
        eprintln!();
        let width = self.taken.iter().map(|s| s.name.len()).max().unwrap_or(0);
        for Step { name, took, failure } in &self.taken {
            let verdict = failure.as_ref().map_or_else(|| "ok".to_owned(), |why| format!("FAILED ({why})"));
            eprintln!("{name:width$}  {:8.1} s  {verdict}", took.as_secs_f64());
        }
        let total: Duration = self.taken.iter().map(|s| s.took).sum();
        eprintln!("{:width$}  {:8.1} s", "total", total.as_secs_f64());
        if let Some(counts) = self.counts {
            eprintln!("{counts}");
        }
        let well = self.taken.iter().all(|s| s.failure.is_none());
        if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn run_counted(command: &mut Command, counts: &Arc<Mutex<Counts>>) -> Result<(), String> {
    if std::io::stderr().is_terminal() {
        command.env("CARGO_TERM_COLOR", "always");
    }
    let started = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = started.map_err(|error| format!("it did not start: {error}"))?;

    let (open, closed) = mpsc::channel::<()>();
    if let Some(stdout) = child.stdout.take() {
        forward(stdout, std::io::stdout(), counts.clone(), open.clone());
    }
    if let Some(stderr) = child.stderr.take() {
        forward(stderr, std::io::stderr(), counts.clone(), open);
    }
    let status = child.wait().map_err(|error| error.to_string())?;
    // Both pipes end with the child, unless a process that some test left behind holds them.
    if closed.recv_timeout(Duration::from_secs(5)) == Err(mpsc::RecvTimeoutError::Timeout) {
        return Err("the tests left a process behind".to_owned());
    }
    if status.success() { Ok(()) } else { Err(status.to_string()) }
}

/// Copies lines as they come, on a thread that holds `open` until there are no more.
fn forward(
    from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    counts: Arc<Mutex<Counts>>,
    open: mpsc::Sender<()>,
) {
    std::thread::spawn(move || {
        let _open = open;
        let mut from = BufReader::new(from);
        let mut line = Vec::new();
        while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            // Nobody reading is no reason to stop the tests.
            let _ = to.write_all(&line).and_then(|()| to.flush());
            counts.lock().unwrap_or_else(PoisonError::into_inner).add(&String::from_utf8_lossy(&line));
            line.clear();
        }
    });
}

#[expect(clippy::disallowed_methods, reason = "these are durations for people; no simulation runs this")]
fn now() -> Instant {
    Instant::now()
}
