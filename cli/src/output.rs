//! Results, written where the user wants them.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use burla::{Finished, Outcome};
use serde_json::value::RawValue;

use crate::{
    args::{OutputFormat, Plan},
    usage::Usage,
};

/// Where results go.
pub(crate) struct Output {
    to: Box<dyn Write>,
    format: OutputFormat,
    is_command: bool,
    /// Lines of inputs that were cancelled: they are written only if a result follows.
    owed: u64,
    failures: Option<Failures>,
}

/// The records of inputs that failed.
struct Failures {
    path: PathBuf,
    file: Option<BufWriter<File>>,
    any: bool,
}

impl Output {
    /// Opens the files, so that what can't be written is known before anything is launched.
    pub(crate) fn open(plan: &Plan) -> Result<Self, Usage> {
        let to: Box<dyn Write> = match &plan.output {
            Some(path) => Box::new(BufWriter::with_capacity(1 << 20, create(path)?)),
            // Written through the descriptor: std's own stdout would flush at every line.
            None => Box::new(BufWriter::with_capacity(1 << 16, duplicate_stdout()?)),
        };
        let failures = match (&plan.errors, &plan.output) {
            (Some(path), _) => {
                Some(Failures { path: path.clone(), file: Some(BufWriter::new(create(path)?)), any: false })
            }
            // Beside /dev/null there is no place for it.
            (None, Some(output)) if output.is_file() => {
                let mut path = output.clone().into_os_string();
                path.push(".failed.jsonl");
                // What an earlier run left there is not true any more.
                let _ = fs::remove_file(&path);
                Some(Failures { path: path.into(), file: None, any: false })
            }
            _ => None,
        };
        Ok(Self { to, format: plan.output_format, is_command: plan.is_command, owed: 0, failures })
    }

    /// Writes what came of one input.
    pub(crate) fn write(&mut self, finished: &Finished) -> io::Result<()> {
        if let (Outcome::Failed { .. }, Some(failures)) = (&finished.outcome, &mut self.failures) {
            let file = match &mut failures.file {
                Some(file) => file,
                None => failures.file.insert(BufWriter::new(File::create(&failures.path)?)),
            };
            writeln!(file, "{}", record(finished, self.is_command))?;
            failures.any = true;
        }
        if self.format == OutputFormat::Records {
            return writeln!(self.to, "{}", record(finished, self.is_command));
        }
        match &finished.outcome {
            Outcome::Cancelled => self.owed += 1,
            _ if self.is_command => {}
            _ => {
                for _ in 0..std::mem::take(&mut self.owed) {
                    self.to.write_all(b"null\n")?;
                }
            }
        }
        match &finished.outcome {
            Outcome::Ok { result, .. } if self.is_command => self.to.write_all(result),
            Outcome::Failed { output, .. } if self.is_command => self.to.write_all(output),
            Outcome::Ok { result, .. } => {
                self.to.write_all(result)?;
                self.to.write_all(b"\n")
            }
            Outcome::Failed { .. } => self.to.write_all(b"null\n"),
            _ => Ok(()),
        }
    }

    /// Lets out all that was written.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        if let Some(file) = self.failures.as_mut().and_then(|failures| failures.file.as_mut()) {
            file.flush()?;
        }
        self.to.flush()
    }

    /// The file with the records of inputs that failed, if there is one.
    pub(crate) fn failures(&self) -> Option<&Path> {
        self.failures.as_ref().filter(|failures| failures.any).map(|failures| failures.path.as_path())
    }
}

fn create(path: &Path) -> Result<File, Usage> {
    File::create(path).map_err(|error| Usage {
        message: format!("failed to write {}: {error}", path.display()),
        hint: None,
    })
}

fn duplicate_stdout() -> Result<File, Usage> {
    let failed = |error| Usage { message: format!("stdout is not usable: {error}"), hint: None };
    Ok(rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3).map_err(failed)?.into())
}

/// One object that tells all about one input: docs/record.schema.json describes it.
#[derive(serde::Serialize)]
struct Record<'a> {
    v: u32,
    index: u64,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Value<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Error<'a>>,
    attempts: u32,
    seconds: f64,
    worker: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<Value<'a>>,
}

#[derive(serde::Serialize)]
struct Error<'a> {
    #[serde(flatten)]
    failure: &'a burla::Failure,
    #[serde(skip_serializing_if = "Option::is_none")]
    stdout: Option<Value<'a>>,
}

/// JSON as it is, or text.
#[derive(serde::Serialize)]
#[serde(untagged)]
enum Value<'a> {
    Json(&'a RawValue),
    Text(std::borrow::Cow<'a, str>),
}

impl<'a> Value<'a> {
    fn new(bytes: &'a [u8], is_text: bool) -> Self {
        match serde_json::from_slice(bytes) {
            Ok(json) if !is_text => Self::Json(json),
            _ => Self::Text(String::from_utf8_lossy(bytes)),
        }
    }
}

fn record(finished: &Finished, is_command: bool) -> String {
    let (status, result, error) = match &finished.outcome {
        Outcome::Ok { result, .. } => ("ok", Some(Value::new(result, is_command)), None),
        Outcome::Failed { failure, output } => {
            let stdout = is_command.then(|| Value::new(output, true));
            ("failed", None, Some(Error { failure, stdout }))
        }
        _ => ("cancelled", None, None),
    };
    let record = Record {
        v: 1,
        index: finished.index,
        status,
        result,
        error,
        attempts: finished.attempts,
        // Microseconds are all that a 32-bit float knows.
        seconds: (f64::from(finished.seconds) * 1e6).round() / 1e6,
        worker: &finished.worker,
        input: finished.input.as_ref().map(|input| Value::new(input, is_command)),
    };
    serde_json::to_string(&record).unwrap_or_default()
}
