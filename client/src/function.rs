//! What a job calls, checked and packed before anything is launched.

use std::path::{Path, PathBuf};

use burla_core::job::{Blob, Function, PythonSource};
use bytes::Bytes;

use crate::{
    bundle::{self, Bundle},
    error::PrepareError,
    packer::Codec,
    python as source,
};

/// A function or command, with the files that travel with it.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub(crate) function: Function,
    pub(crate) blob: Option<Blob>,
    pub(crate) bundle: Option<Bytes>,
}

impl Prepared {
    fn new(function: Function, bundle: Bundle) -> Result<Self, PrepareError> {
        let packed = bundle.pack()?;
        let (blob, bundle) = packed.unzip();
        Ok(Self { function, blob, bundle })
    }

    pub(crate) fn codec(&self) -> Codec {
        match self.function {
            Function::Python { .. } => Codec::Json,
            Function::Command { .. } => Codec::Raw,
        }
    }
}

/// A Python function: `path/to/file.py:name` or `package.module:name`. The modules that it imports
/// from beside its file (or from the working directory) travel along, and so does all in `include`.
///
/// It runs in `interpreter`, a path or a name on `PATH`; in `python3` if absent.
pub fn python(
    spelled: &str,
    interpreter: Option<&Path>,
    include: &[PathBuf],
) -> Result<Prepared, PrepareError> {
    let (place, name) = split(spelled)?;
    let interpreter = source::interpreter(interpreter)?;
    let here = std::env::current_dir().map_err(|error| PrepareError {
        message: format!("failed to find the working directory: {error}"),
        hint: None,
    })?;
    let is_file = place.ends_with(".py") || place.contains('/');
    let (origin, import_root, source, start) = if is_file {
        let file = existing_file(&here, place)?;
        let folder = file.parent().unwrap_or(&here).to_owned();
        let origin = if file.starts_with(&here) { here.clone() } else { folder.clone() };
        let relative = bundle::relative(&file, &origin)?;
        (origin, folder, PythonSource::File(relative), vec![file])
    } else {
        let start = source::resolve(&here, place);
        (here.clone(), here.clone(), PythonSource::Module(place.to_owned()), start)
    };
    let mut bundle = Bundle::new(origin.clone());
    for file in source::imported(&import_root, start) {
        bundle.add(&file)?;
    }
    bundle.include(&here, include)?;
    let path = bundle::relative(&import_root, &origin)?;
    let function = Function::Python {
        interpreter,
        path: vec![path],
        source,
        name: name.to_owned(),
        spelled: spelled.to_owned(),
        origin: origin.display().to_string(),
    };
    Prepared::new(function, bundle)
}

/// A command: a program and its arguments. `{}` in an argument becomes the input; without any, the
/// input goes to its stdin. A program that is named by a relative path travels along, and so does all
/// in `include`.
pub fn command(argv: Vec<String>, include: &[PathBuf]) -> Result<Prepared, PrepareError> {
    let Some(program) = argv.first() else {
        return Err(PrepareError::new("there is no command", "write one behind --"));
    };
    let here = std::env::current_dir().map_err(|error| PrepareError {
        message: format!("failed to find the working directory: {error}"),
        hint: None,
    })?;
    let mut bundle = Bundle::new(here.clone());
    let mut include = include.to_vec();
    let mut argv = argv.clone();
    if program.contains('/') && !program.contains("{}") {
        let path = Path::new(program);
        if !here.join(path).is_file() {
            return Err(PrepareError::new(
                format!("command {program} does not exist"),
                "a command with a slash in it is a file; check the path",
            ));
        }
        if path.is_relative() {
            include.push(path.to_owned());
            // Where it runs, it lies at the same place, or by its name if it came from outside.
            argv[0] = format!("./{}", bundle::arrives_at(&here, path)?);
        }
    }
    bundle.include(&here, &include)?;
    Prepared::new(Function::Command { argv }, bundle)
}

fn split(spelled: &str) -> Result<(&str, &str), PrepareError> {
    let hint = "write it as path/to/file.py:name or package.module:name; a command goes behind --";
    let Some((place, name)) = spelled.rsplit_once(':') else {
        return Err(PrepareError::new(format!("{spelled} names no function"), hint));
    };
    let identifier = |part: &str| {
        !part.is_empty()
            && !part.starts_with(|c: char| c.is_ascii_digit())
            && part.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    if place.is_empty() || !name.split('.').all(identifier) {
        return Err(PrepareError::new(format!("{spelled} names no function"), hint));
    }
    Ok((place, name))
}

fn existing_file(here: &Path, place: &str) -> Result<PathBuf, PrepareError> {
    let path = here.join(place);
    if !path.is_file() {
        let what = if path.is_dir() { "is a folder" } else { "does not exist" };
        return Err(PrepareError::new(
            format!("{place} {what}"),
            "the function is written as path/to/file.py:name, relative to the working directory",
        ));
    }
    // Links are followed: the modules beside the file are those beside its real place, as in a plain run.
    path.canonicalize()
        .map_err(|error| PrepareError { message: format!("{place} can't be read: {error}"), hint: None })
}
