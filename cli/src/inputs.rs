//! Inputs, read from a file, a pipe or a folder as the job takes them.

use std::{
    fmt,
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
    str::FromStr,
};

use burla::{Input, PushError, Submitter};
use flate2::read::MultiGzDecoder;
use serde::de::{Deserializer as _, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::usage::Usage;

/// Bytes that are read at once.
const CHUNK: usize = 256 << 10;

/// Where inputs come from.
pub(crate) enum Inputs {
    Stdin(Format),
    File(PathBuf, Format),
    Files(Vec<String>),
}

/// How inputs are written down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) layout: Layout,
    pub(crate) gzip: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Jsonl,
    Json,
    Lines,
    Csv,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, gzip) = text.strip_suffix(".gz").map_or((text, false), |name| (name, true));
        let layout = match name {
            "jsonl" => Layout::Jsonl,
            "json" => Layout::Json,
            "lines" => Layout::Lines,
            "csv" => Layout::Csv,
            _ => return Err("it is one of jsonl, json, lines, csv, or one of these with .gz".into()),
        };
        Ok(Self { layout, gzip })
    }
}

impl Format {
    /// The format that a file's ending stands for.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?.to_ascii_lowercase();
        let (name, gzip) = name.strip_suffix(".gz").map_or((&name[..], false), |name| (name, true));
        let layout = match name.rsplit_once('.')?.1 {
            "jsonl" | "ndjson" => Layout::Jsonl,
            "json" => Layout::Json,
            "txt" | "lines" => Layout::Lines,
            "csv" => Layout::Csv,
            _ => return None,
        };
        Some(Self { layout, gzip })
    }
}

/// Why the inputs ended before their end.
pub(crate) enum Stopped {
    /// The job takes no more.
    Closed,
    /// The user has to change something.
    Usage(Usage),
}

impl Inputs {
    /// Opens them, so that what can't be read is known before anything is launched.
    pub(crate) fn open(&self) -> Result<Source, Usage> {
        match self {
            Self::Stdin(format) => Ok(Source::read("stdin".into(), Box::new(io::stdin()), *format)),
            Self::File(path, format) => {
                let name = path.display().to_string();
                let file = File::open(path).map_err(|error| Usage {
                    message: format!("failed to open {name}: {error}"),
                    hint: None,
                })?;
                Ok(Source::read(name, Box::new(file), *format))
            }
            Self::Files(globs) => Source::files(globs),
        }
    }
}

/// Inputs that are about to be read.
pub(crate) enum Source {
    Read { name: String, from: Box<dyn Read + Send>, layout: Layout },
    Files(Box<dyn Iterator<Item = glob::GlobResult> + Send>),
}

impl Source {
    fn read(name: String, from: Box<dyn Read + Send>, format: Format) -> Self {
        let from = if format.gzip { Box::new(Gzip(MultiGzDecoder::new(from))) } else { from };
        Self::Read { name, from, layout: format.layout }
    }

    fn files(globs: &[String]) -> Result<Self, Usage> {
        let mut all: Box<dyn Iterator<Item = glob::GlobResult> + Send> = Box::new(std::iter::empty());
        for pattern in globs {
            let bad = |error: glob::PatternError| {
                Usage::new(
                    format!("{pattern} is no glob: {error}"),
                    "* and ? match within a name, ** any folders",
                )
            };
            let is_file = |found: &glob::GlobResult| found.as_ref().map_or(true, |path| path.is_file());
            let mut found = glob::glob(pattern).map_err(bad)?.filter(is_file).peekable();
            if found.peek().is_none() {
                return Err(Usage::new(
                    format!("no file matches {pattern}"),
                    "* and ? match within a name, ** any folders",
                ));
            }
            all = Box::new(all.chain(found));
        }
        Ok(Self::Files(all))
    }

    /// Submits all of them.
    pub(crate) fn submit(self, to: &Submitter) -> Result<(), Stopped> {
        match self {
            Self::Files(found) => {
                for path in found {
                    let path = path.map_err(|error| Usage { message: error.to_string(), hint: None })?;
                    to.push_blocking(Input::File(&path)).map_err(|error| pushed(error, "--files", ""))?;
                }
                Ok(())
            }
            Self::Read { name, from, layout } => {
                let mut from = BufReader::with_capacity(CHUNK, from);
                skip_mark(&mut from).map_err(|error| unreadable(&name, &error))?;
                match layout {
                    Layout::Jsonl => lines(&name, &mut from, true, to),
                    Layout::Lines => lines(&name, &mut from, false, to),
                    Layout::Json => array(&name, from, to),
                    Layout::Csv => rows(&name, from, to),
                }
            }
        }
    }
}

impl From<Usage> for Stopped {
    fn from(usage: Usage) -> Self {
        Self::Usage(usage)
    }
}

/// What a refused input means to the user.
fn pushed(error: PushError, place: &str, hint: &str) -> Stopped {
    let hint = (!hint.is_empty()).then(|| hint.to_owned());
    match error {
        PushError::Closed => Stopped::Closed,
        PushError::NotJson(error) => {
            // The line that it names is always the first: it has seen no other.
            let what = error.to_string().replace(" at line 1 column ", " at column ");
            Usage { message: format!("{place} is not JSON: {what}"), hint }.into()
        }
        PushError::NotText => Usage {
            message: format!("{place} is not UTF-8 text"),
            hint: Some("convert it first, for instance with iconv".into()),
        }
        .into(),
        error => Usage { message: format!("{place}: {error}"), hint: None }.into(),
    }
}

fn unreadable(name: &str, error: &io::Error) -> Stopped {
    if let Some(NotGzip(why)) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
        let hint = "if it is not compressed, name its format with --input-format, without .gz";
        return Usage::new(format!("{name} is not gzip, or is cut short: {why}"), hint).into();
    }
    Usage { message: format!("failed to read {name}: {error}"), hint: None }.into()
}

/// Compressed bytes, of which the errors say that they are about that.
struct Gzip<R>(MultiGzDecoder<R>);

#[derive(Debug)]
struct NotGzip(io::Error);

impl fmt::Display for NotGzip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for NotGzip {}

impl<R: Read> Read for Gzip<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => {
                io::Error::other(NotGzip(error))
            }
            _ => error,
        })
    }
}

/// Skips the byte order mark that some editors write first.
fn skip_mark(from: &mut impl BufRead) -> io::Result<()> {
    const MARK: &[u8] = b"\xef\xbb\xbf";
    if from.fill_buf()?.starts_with(MARK) {
        from.consume(MARK.len());
    }
    Ok(())
}

/// One input a line.
fn lines(name: &str, from: &mut impl BufRead, json: bool, to: &Submitter) -> Result<(), Stopped> {
    let mut line = Vec::new();
    let mut number = 0u64;
    let mut blank: Option<u64> = None;
    loop {
        line.clear();
        if from.read_until(b'\n', &mut line).map_err(|error| unreadable(name, &error))? == 0 {
            return Ok(());
        }
        number += 1;
        if line.last() == Some(&b'\n') {
            line.pop();
            if line.last() == Some(&b'\r') {
                line.pop();
            }
        }
        let hint = if json { "if each line is an input as it is, add --input-format lines" } else { "" };
        if json && line.trim_ascii().is_empty() {
            blank = blank.or(Some(number));
            continue;
        }
        // Empty lines at the end are common and harmless; between inputs they would shift the results.
        if let Some(number) = blank {
            return Err(Usage::new(format!("{name}, line {number} is empty, which is not JSON"), hint).into());
        }
        let input = if json { Input::Json(&line) } else { Input::Text(&line) };
        to.push_blocking(input).map_err(|error| pushed(error, &format!("{name}, line {number}"), hint))?;
    }
}

/// One JSON array.
fn array(name: &str, from: impl Read, to: &Submitter) -> Result<(), Stopped> {
    struct Elements<'a> {
        to: &'a Submitter,
        stopped: Option<PushError>,
    }

    impl<'de> Visitor<'de> for &mut Elements<'_> {
        type Value = ();

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a JSON array of inputs")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
            while let Some(element) = elements.next_element::<Box<RawValue>>()? {
                if let Err(error) = self.to.push_blocking(Input::Json(element.get().as_bytes())) {
                    self.stopped = Some(error);
                    return Err(serde::de::Error::custom("stopped"));
                }
            }
            Ok(())
        }
    }

    let mut elements = Elements { to, stopped: None };
    let mut json = serde_json::Deserializer::from_reader(from);
    let read = json.deserialize_seq(&mut elements).and_then(|()| json.end());
    match (read, elements.stopped) {
        (_, Some(error)) => Err(pushed(error, name, "")),
        (Ok(()), None) => Ok(()),
        (Err(error), None) if error.is_io() => Err(unreadable(name, &error.into())),
        (Err(error), None) => Err(Usage::new(
            format!("{name} is not a JSON array: {error}"),
            "for one JSON value a line add --input-format jsonl, for plain text --input-format lines",
        )
        .into()),
    }
}

/// One object of strings a row.
fn rows(name: &str, from: impl Read, to: &Submitter) -> Result<(), Stopped> {
    let wrong = |error: csv::Error| -> Stopped {
        let line = |position: &Option<csv::Position>| position.as_ref().map_or(0, csv::Position::line);
        match error.into_kind() {
            csv::ErrorKind::Io(error) => unreadable(name, &error),
            csv::ErrorKind::UnequalLengths { pos, expected_len, len } => {
                let fields = if len == 1 { "field" } else { "fields" };
                let message =
                    format!("{name}, line {} has {len} {fields}, the header has {expected_len}", line(&pos));
                Usage::new(message, "a field with commas in it stands in quotes").into()
            }
            csv::ErrorKind::Utf8 { pos, .. } => {
                pushed(PushError::NotText, &format!("{name}, line {}", line(&pos)), "")
            }
            kind => Usage { message: format!("{name} is not CSV: {kind:?}"), hint: None }.into(),
        }
    };
    let mut reader = csv::Reader::from_reader(from);
    let header = reader.headers().map_err(wrong)?.clone();
    for (i, column) in header.iter().enumerate() {
        if header.iter().take(i).any(|before| before == column) {
            return Err(Usage::new(format!("{name} has two columns named {column:?}"), "rename one").into());
        }
    }
    let mut row = csv::StringRecord::new();
    while reader.read_record(&mut row).map_err(wrong)? {
        let mut object = String::from("{");
        for (i, (column, value)) in header.iter().zip(&row).enumerate() {
            let text = |text: &str| serde_json::Value::from(text).to_string();
            object += &format!("{}{}: {}", if i > 0 { ", " } else { "" }, text(column), text(value));
        }
        object.push('}');
        let line = row.position().map_or(0, csv::Position::line);
        let place = || format!("{name}, line {line}");
        to.push_blocking(Input::Json(object.as_bytes())).map_err(|error| pushed(error, &place(), ""))?;
    }
    Ok(())
}
