//! What stands on the command line, and what it means.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use burla::{Options, Prepared};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{
    inputs::{Format, Inputs, Layout},
    usage::Usage,
};

const EXIT_CODES: &str = "\
Exit codes:
  0    every input has a result
  1    some inputs failed, or the results could not be written
  2    the command line, the function or the inputs are not usable
  3    the cluster, or credentials for it, are not usable
  4    the job would cost more than it may
  5    the job was cancelled from elsewhere
  130  interrupted
  141  whoever reads the results went away
  143  terminated";

/// Run a function on all of many inputs at once, and get the results as if it had run here.
#[derive(Debug, Parser)]
#[command(name = "burla", version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Map(Box<Map>),
}

/// Map a Python function or a command over inputs.
///
/// FUNCTION is path/to/file.py:name or package.module:name. Its inputs are JSON values, one argument each;
/// its results are printed as one JSON value a line, in the order of the inputs, null for one that failed.
///
/// Behind -- stands a command instead: {} in an argument becomes the input; without any {}, the
/// input goes to its stdin. What it writes to stdout is printed as it is, in the order of the inputs.
///
/// What the calls print appears on stderr, live, behind [INDEX] of its input.
#[derive(Args, Debug)]
#[command(
    after_help = EXIT_CODES,
    override_usage = "burla map [OPTIONS] FUNCTION [INPUTS]\n       burla map [OPTIONS] [INPUTS] -- COMMAND [ARG]..."
)]
pub(crate) struct Map {
    /// The function, then the file with the inputs; - or nothing for stdin
    #[arg(value_names = ["FUNCTION", "INPUTS"], num_args = 0..)]
    positional: Vec<String>,

    /// A command to run on each input, instead of a function
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,

    /// Inputs: jsonl (a JSON value a line), json (one array), lines (text), csv (with a header; a
    /// row is an object); with .gz behind it if compressed
    ///
    /// If not given, the ending of the file decides; for stdin it is jsonl for a function and lines for a command.
    #[arg(long, value_name = "FORMAT", help_heading = "Inputs")]
    input_format: Option<Format>,

    /// Make each matching file an input: it travels along, and the function gets a path to it
    #[arg(long, value_name = "GLOB", help_heading = "Inputs")]
    files: Vec<String>,

    /// Send a file or folder along; it lies at the same relative path where the calls run
    #[arg(long, value_name = "PATH", help_heading = "Inputs")]
    include: Vec<PathBuf>,

    /// Write the results to FILE instead of stdout
    #[arg(short, long, value_name = "FILE", help_heading = "Results")]
    output: Option<PathBuf>,

    /// Write a record for each input that failed to FILE [default: OUTPUT.failed.jsonl, with -o]
    #[arg(long, value_name = "FILE", help_heading = "Results")]
    errors: Option<PathBuf>,

    /// Print results as they finish, not in the order of the inputs
    #[arg(long, help_heading = "Results")]
    unordered: bool,

    /// What to print for each input: its value, or a record that tells how it went (docs/record.schema.json)
    #[arg(long, value_name = "FORMAT", default_value = "values", help_heading = "Results")]
    output_format: OutputFormat,

    /// Add the input to each record
    #[arg(long, help_heading = "Results")]
    with_input: bool,

    /// What stands before a line that a call printed: its input's index in brackets, or nothing
    #[arg(long, value_name = "PREFIX", default_value = "index", help_heading = "Messages")]
    log_prefix: LogPrefix,

    /// No progress, no summary: only what the calls print, and errors
    #[arg(short, long, help_heading = "Messages")]
    quiet: bool,

    /// Go on when the first 100 inputs have all failed alike
    #[arg(long, conflicts_with = "fail_fast", help_heading = "Failures")]
    keep_going: bool,

    /// Stop at the first input that fails
    #[arg(long, help_heading = "Failures")]
    fail_fast: bool,

    /// Repeat a call that raised, failed or timed out, at most N times
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Failures")]
    retries: u32,

    /// Stop a call that takes longer, counted from the start of the function: 90, 90s, 5m, 1h 30m
    #[arg(long, value_name = "DURATION", value_parser = duration, help_heading = "Failures")]
    timeout: Option<Duration>,

    /// CPUs for each call; fractions share one
    ///
    /// The thread pools of OpenMP, OpenBLAS, MKL, NumExpr, Polars and Rayon follow it unless --env sets them.
    #[arg(long, value_name = "N", default_value = "1", value_parser = cpus, help_heading = "Resources")]
    cpu: f64,

    /// Memory for each call: 512M, 4GiB; embedded there is no limit if not given
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Resources")]
    ram: Option<u64>,

    /// At most N calls at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Resources")]
    max_parallelism: Option<u32>,

    /// The interpreter, a path or a name on PATH [default: python3]
    #[arg(long, value_name = "PATH", help_heading = "Environment")]
    python: Option<PathBuf>,

    /// Set an environment variable for the calls; K alone passes its value on
    #[arg(long, value_name = "K[=V]", help_heading = "Environment")]
    env: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputFormat {
    Values,
    Records,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LogPrefix {
    Index,
    None,
}

/// What is to be done: checked, but for what only reading the inputs can tell.
pub(crate) struct Plan {
    pub(crate) function: Prepared,
    pub(crate) is_command: bool,
    pub(crate) options: Options,
    pub(crate) inputs: Inputs,
    pub(crate) output: Option<PathBuf>,
    pub(crate) errors: Option<PathBuf>,
    pub(crate) output_format: OutputFormat,
    pub(crate) show_index: bool,
    pub(crate) quiet: bool,
    pub(crate) stop: Stop,
    /// What the user may not have meant.
    pub(crate) notes: Vec<String>,
}

/// When a job is stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    AtFirst,
    IfAllAlike,
    Never,
}

impl Map {
    /// Checks what was asked for, before anything is launched.
    pub(crate) fn plan(&self) -> Result<Plan, Usage> {
        let is_command = !self.command.is_empty();
        let mut positional = self.positional.iter();
        let function = if is_command {
            if self.python.is_some() {
                return Err(Usage::new("--python goes with a function, not with a command", "leave it out"));
            }
            burla::command(self.command.clone(), &self.include)?
        } else {
            let Some(spelled) = positional.next() else {
                let hint =
                    "burla map path/to/file.py:name inputs.jsonl, or burla map inputs.txt -- COMMAND {}";
                return Err(Usage::new("there is neither a function nor a command", hint));
            };
            burla::python(spelled, self.python.as_deref(), &self.include)?
        };
        let file = positional.next();
        if let Some(extra) = positional.next() {
            return Err(Usage::new(
                format!("{extra} is one argument too many"),
                "a command goes behind --; several files go with --files 'GLOB' (in quotes)",
            ));
        }
        let inputs = self.inputs(file.map(String::as_str), is_command)?;
        self.check_outputs(&inputs)?;
        if self.with_input
            && self.output_format != OutputFormat::Records
            && self.errors.is_none()
            && self.output.is_none()
        {
            return Err(Usage::new("--with-input adds to records only", "add --output-format records"));
        }
        Ok(Plan {
            function,
            is_command,
            options: self.options()?,
            inputs,
            output: self.output.clone(),
            errors: self.errors.clone(),
            output_format: self.output_format,
            show_index: self.log_prefix == LogPrefix::Index,
            quiet: self.quiet,
            notes: self.notes(),
            stop: match (self.fail_fast, self.keep_going) {
                (true, _) => Stop::AtFirst,
                (_, true) => Stop::Never,
                _ => Stop::IfAllAlike,
            },
        })
    }

    /// Arguments of a command that are files here, and will not be where it runs.
    fn notes(&self) -> Vec<String> {
        let stays = |argument: &&String| {
            let path = Path::new(argument);
            path.is_relative()
                && path.is_file()
                && !self.include.iter().any(|included| path.starts_with(included))
        };
        let note =
            |argument: &String| format!("note: {argument} is not sent along; --include {argument} does that");
        self.command.iter().skip(1).filter(stays).map(note).collect()
    }

    /// What is written must not be what is read.
    fn check_outputs(&self, inputs: &Inputs) -> Result<(), Usage> {
        let read = match inputs {
            Inputs::File(path, _) => identity(&std::fs::metadata(path)),
            Inputs::Stdin(_) => identity(&std::fs::metadata("/dev/stdin")),
            Inputs::Files(_) => None,
        };
        for written in self.output.iter().chain(&self.errors) {
            let found = identity(&std::fs::metadata(written));
            if found.is_some() && found == read {
                let message = format!("{} holds the inputs", written.display());
                return Err(Usage::new(message, "write the results to another file"));
            }
        }
        if self.output.is_some() && self.output == self.errors {
            return Err(Usage::new(
                "--output and --errors name the same file",
                "write the errors to another one",
            ));
        }
        Ok(())
    }

    fn inputs(&self, file: Option<&str>, is_command: bool) -> Result<Inputs, Usage> {
        let usual = Format { layout: if is_command { Layout::Lines } else { Layout::Jsonl }, gzip: false };
        if !self.files.is_empty() {
            if let Some(file) = file {
                return Err(Usage::new(
                    format!("inputs come from --files and from {file}"),
                    "name one of them; a GLOB goes in quotes, so that the shell leaves it alone",
                ));
            }
            if self.input_format.is_some() {
                return Err(Usage::new("--input-format does not go with --files", "leave it out"));
            }
            return Ok(Inputs::Files(self.files.clone()));
        }
        match file {
            None | Some("-") => {
                if std::io::IsTerminal::is_terminal(&std::io::stdin()) {
                    return Err(Usage::new(
                        "there are no inputs",
                        "name a file with inputs, use --files 'GLOB', or pipe them in",
                    ));
                }
                Ok(Inputs::Stdin(self.input_format.unwrap_or(usual)))
            }
            Some(file) => {
                let path = Path::new(file);
                if !path.exists() {
                    return Err(Usage::new(
                        format!("{file} does not exist"),
                        "INPUTS is a file with the inputs, or - for stdin",
                    ));
                }
                if path.is_dir() {
                    return Err(Usage::new(
                        format!("{file} is a folder"),
                        format!("--files '{}/*' makes each file in it an input", file.trim_end_matches('/')),
                    ));
                }
                let format = self.input_format.or_else(|| Format::of(path)).unwrap_or(usual);
                Ok(Inputs::File(path.to_owned(), format))
            }
        }
    }

    fn options(&self) -> Result<Options, Usage> {
        let mut env = BTreeMap::new();
        for variable in &self.env {
            let (name, value) = match variable.split_once('=') {
                Some((name, value)) => (name, value.to_owned()),
                None => (variable.as_str(), self::variable(variable)?),
            };
            if name.is_empty() {
                return Err(Usage::new("--env needs a name before =", "--env NAME=VALUE"));
            }
            env.insert(name.to_owned(), value);
        }
        Ok(Options {
            cpu: self.cpu,
            ram: self.ram,
            max_parallelism: self.max_parallelism,
            retries: self.retries,
            timeout: self.timeout,
            env,
            files: !self.files.is_empty(),
            ordered: !self.unordered,
            with_input: self.with_input,
        })
    }
}

/// What tells a regular file from all others.
fn identity(metadata: &std::io::Result<std::fs::Metadata>) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    metadata
        .as_ref()
        .ok()
        .filter(|metadata| metadata.is_file())
        .map(|metadata| (metadata.dev(), metadata.ino()))
}

/// The value of a variable of our own environment, to be passed on.
fn variable(name: &str) -> Result<String, Usage> {
    std::env::var(name).map_err(|error| match error {
        std::env::VarError::NotPresent => {
            Usage::new(format!("{name} is not set here"), format!("--env {name}=VALUE gives it a value"))
        }
        std::env::VarError::NotUnicode(_) => {
            Usage::new(format!("the value of {name} is not UTF-8"), "give it another")
        }
    })
}

fn cpus(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(cpus) if cpus.is_finite() && cpus >= 0.001 => Ok(cpus),
        _ => Err("it is a number of CPUs above 0, for instance 2 or 0.5".into()),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let duration = seconds.or_else(|| humantime::parse_duration(text).ok());
    duration
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "it is a duration above 0, for instance 90, 90s, 5m or 1h 30m".into())
}

/// Bytes, with K, M, G or T for powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || "it is a size above 0, for instance 512M, 4GiB or 1.5G".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let power = match unit {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err(wrong()),
    };
    let bytes = number.parse::<f64>().map_err(|_| wrong())? * 1024f64.powi(power);
    if bytes >= 1.0 && bytes < 2f64.powi(63) { Ok(bytes as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn sizes_and_durations() {
        for (text, bytes) in
            [("512M", 512 << 20), ("4GiB", 4 << 30), ("1.5g", 3 << 29), ("100", 100), ("2 KB", 2048)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1G", "4 apples", "0", "1e30", "NaN"] {
            assert!(size(text).is_err(), "{text}");
        }
        assert_eq!(duration("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("1h 30m"), Ok(Duration::from_secs(5400)));
        assert!(duration("0").is_err() && duration("soon").is_err() && duration("-3").is_err());
        assert!(cpus("0").is_err() && cpus("inf").is_err() && cpus("0.25") == Ok(0.25));
    }
}
