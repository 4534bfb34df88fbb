//! What the user is told on stderr: where the job runs, what calls print, how it goes, how it ended.

use std::{
    collections::{BTreeSet, HashMap},
    io::{self, IsTerminal, Write},
    time::Duration,
};

use burla::{Failure, Line, Progress, Wait};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::Instant;

/// When progress is told where there is no terminal: soon, then rarely.
const FIRST_TOLD: Duration = Duration::from_secs(5);
const TOLD_EVERY: Duration = Duration::from_secs(30);

/// How many failed inputs the summary names one by one.
const NAMED: usize = 10;

/// How many kinds of failures are shown in full.
const SHOWN: usize = 20;

/// Tells the user how a job goes.
pub(crate) struct Report {
    bar: Option<ProgressBar>,
    quiet: bool,
    show_index: bool,
    /// Whether line i of the output is input i.
    lines_match: bool,
    began: Instant,
    told: Instant,
    told_once: bool,
    /// Written to stderr together.
    pending: Vec<u8>,
    kinds: HashMap<String, Kind>,
    order: Vec<String>,
    /// The first of them, by index.
    failed: BTreeSet<u64>,
    failed_count: u64,
    nulled: bool,
}

/// Failures that are alike.
struct Kind {
    what: String,
    count: u64,
}

impl Report {
    pub(crate) fn new(quiet: bool, show_index: bool, lines_match: bool) -> Self {
        let bar = (!quiet && io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            let style = ProgressStyle::with_template("{bar:20} {wide_msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸ "));
            bar
        });
        let now = Instant::now();
        Self {
            bar,
            quiet,
            show_index,
            lines_match,
            began: now,
            told: now,
            told_once: false,
            pending: Vec::new(),
            kinds: HashMap::new(),
            order: Vec::new(),
            failed: BTreeSet::new(),
            failed_count: 0,
            nulled: false,
        }
    }

    /// A remark that is not needed.
    pub(crate) fn remark(&mut self, text: &str) {
        if !self.quiet {
            self.say(text);
        }
    }

    /// A remark that the user has to know.
    pub(crate) fn say(&mut self, text: &str) {
        self.pending.extend_from_slice(format!("burla: {text}\n").as_bytes());
    }

    /// A line that a call wrote.
    pub(crate) fn line(&mut self, line: &Line) {
        if let (Some(index), true) = (line.index, self.show_index) {
            self.pending.extend_from_slice(format!("[{index}] ").as_bytes());
        }
        self.pending.extend_from_slice(&line.text);
        self.pending.extend_from_slice(if line.split { b" [line goes on]\n" } else { b"\n" });
    }

    /// Results held what JSON has no word for.
    pub(crate) fn nulled(&mut self, index: u64) {
        if !std::mem::replace(&mut self.nulled, true) {
            self.say(&format!(
                "warning: NaN or infinity in the result of input {index} became null, and so will others"
            ));
        }
    }

    /// An input failed: the first of its kind is shown, the others are counted. Tells how many of its kind there are.
    pub(crate) fn failed(&mut self, index: u64, failure: &Failure) -> u64 {
        self.failed_count += 1;
        self.failed.insert(index);
        if self.failed.len() > NAMED {
            self.failed.pop_last();
        }
        let key = format!("{:?} {} {}", failure.kind, failure.type_name, failure.fingerprint);
        if let Some(kind) = self.kinds.get_mut(&key) {
            kind.count += 1;
            return kind.count;
        }
        let what = match failure.kind {
            burla::FailureKind::Exception if failure.message.is_empty() => failure.type_name.clone(),
            burla::FailureKind::Exception => format!("{}: {}", failure.type_name, failure.message),
            _ => failure.message.clone(),
        };
        if self.order.len() < SHOWN {
            let what = match &failure.traceback {
                Some(traceback) => traceback.trim_end().to_owned(),
                None => what.clone(),
            };
            self.say(&format!("input {index} failed:\n{}", indent(&what)));
            if let Some(hint) = &failure.hint {
                self.hint(hint);
            }
        }
        self.order.push(key.clone());
        self.kinds.insert(key, Kind { what, count: 1 });
        1
    }

    /// Writes out what there is to say, and draws the progress.
    pub(crate) fn show(&mut self, progress: &Progress) {
        if let Some(bar) = &self.bar {
            if let Some(total) = progress.total {
                bar.set_length(total);
            }
            bar.set_position(progress.done);
            bar.set_message(self.status(progress));
        } else if !self.quiet {
            let pause = if self.told_once { TOLD_EVERY } else { FIRST_TOLD };
            if self.told.elapsed() >= pause {
                self.told = Instant::now();
                self.told_once = true;
                let status = self.status(progress);
                self.say(&status);
            }
        }
        self.flush();
    }

    /// Does what may write to the terminal that the bar is on.
    pub(crate) fn around<T>(&self, write: impl FnOnce() -> T) -> T {
        match &self.bar {
            Some(bar) if io::stdout().is_terminal() => bar.suspend(write),
            _ => write(),
        }
    }

    /// Writes out what there is to say.
    pub(crate) fn flush(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let pending = std::mem::take(&mut self.pending);
        // Nobody is left to be told that stderr is closed.
        let write = || drop(io::stderr().write_all(&pending));
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    fn status(&self, progress: &Progress) -> String {
        let Progress { done, failed, .. } = *progress;
        let total = progress.total.map_or("?".into(), |total| total.to_string());
        let running = (progress.submitted - done.min(progress.submitted)).min(progress.slots.into());
        let seconds = self.began.elapsed().as_secs_f64();
        let rate = done as f64 / seconds.max(0.001);
        let mut status = format!("{done}/{total} done, {running} running, {failed} failed, {rate:.1}/s");
        if let Some(left) = progress.total.map(|total| total - done)
            && done > 0
            && left > 0
        {
            status += &format!(", {} left", clock(left as f64 / rate));
        }
        match &progress.wait {
            Some(Wait::Cluster(what)) => status += &format!("; waiting: {what}"),
            Some(Wait::Input { index, behind }) => {
                let results = if *behind == 1 { "result waits" } else { "results wait" };
                status += &format!("; {behind} {results} for input {index}");
            }
            _ => {}
        }
        status
    }

    /// The last words.
    pub(crate) fn end(&mut self, progress: &Progress, cancelled: bool, failures: Option<&std::path::Path>) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if progress.lines_missing > 0 {
            self.say(&format!("warning: {} lines that calls printed did not arrive", progress.lines_missing));
        }
        let seconds = self.began.elapsed().as_secs_f64();
        let count = progress.done;
        if self.failed_count > 0 {
            for kind in self.order.iter().filter_map(|key| self.kinds.get(key)).filter(|kind| kind.count > 1)
            {
                let what = kind.what.lines().next().unwrap_or_default();
                let text = format!("{} inputs failed like this: {what}\n", kind.count);
                self.pending.extend_from_slice(format!("burla: {text}").as_bytes());
            }
            let named: Vec<String> = self.failed.iter().map(u64::to_string).collect();
            let lines: Vec<String> = self.failed.iter().map(|index| (index + 1).to_string()).collect();
            let more = self.failed_count - self.failed.len() as u64;
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let records = failures.map_or(String::new(), |path| format!(", see {}", path.display()));
            let named = named.join(", ");
            let lines =
                if self.lines_match { format!(" (output line {})", lines.join(", ")) } else { String::new() };
            let text = format!("{} failed: input {named}{lines}{more}{records}", self.failed_count);
            self.say(&text);
        }
        let plural = if count == 1 { "input" } else { "inputs" };
        let seconds = duration(seconds);
        if cancelled && count > 0 {
            let read = progress.submitted;
            self.remark(&format!("stopped after {count} {plural} of {read} that were read, in {seconds}"));
        } else if !cancelled {
            self.remark(&format!("{count} {plural} in {seconds}"));
        }
        self.flush();
    }

    /// Something ended the job, or kept it from starting.
    pub(crate) fn error(&mut self, message: &str, hint: Option<&str>) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.say(&format!("error: {message}"));
        if let Some(hint) = hint {
            self.hint(hint);
        }
        self.flush();
    }

    fn hint(&mut self, hint: &str) {
        self.pending.extend_from_slice(format!("hint: {hint}\n").as_bytes());
    }
}

fn indent(text: &str) -> String {
    text.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

fn clock(seconds: f64) -> String {
    let seconds = seconds as u64;
    if seconds >= 3600 {
        format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
    } else {
        format!("{}:{:02}", seconds / 60, seconds % 60)
    }
}

fn duration(seconds: f64) -> String {
    if seconds < 60.0 { format!("{seconds:.2} s") } else { clock(seconds) }
}
