//! The files that travel with a function, as one archive that is the same for the same files.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Component, Path, PathBuf},
};

use burla_core::job::Blob;
use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::error::PrepareError;

/// Collects files by where they arrive.
#[derive(Debug)]
pub(crate) struct Bundle {
    /// The folder that the archive's root stands for.
    origin: PathBuf,
    files: BTreeMap<String, PathBuf>,
}

impl Bundle {
    pub(crate) fn new(origin: PathBuf) -> Self {
        Self { origin, files: BTreeMap::new() }
    }

    /// Adds a file that lies below the origin.
    pub(crate) fn add(&mut self, file: &Path) -> Result<(), PrepareError> {
        self.files.insert(relative(file, &self.origin)?, file.to_owned());
        Ok(())
    }

    /// Adds files and whole folders that the user named.
    pub(crate) fn include(&mut self, here: &Path, paths: &[PathBuf]) -> Result<(), PrepareError> {
        for path in paths {
            let to = arrives_at(here, path)?;
            let from = here.join(path);
            if !from.exists() {
                let message = format!("{} does not exist", path.display());
                return Err(PrepareError::new(message, "--include takes files and folders"));
            }
            self.walk(&from, &to)?;
        }
        Ok(())
    }

    fn walk(&mut self, from: &Path, to: &str) -> Result<(), PrepareError> {
        if !from.is_dir() {
            // Sockets, pipes and links that lead nowhere have no content to send.
            if from.is_file() {
                self.files.insert(to.to_owned(), from.to_owned());
            }
            return Ok(());
        }
        for entry in fs::read_dir(from).map_err(|error| unreadable(from, &error))? {
            let entry = entry.map_err(|error| unreadable(from, &error))?;
            let name = entry.file_name().into_string().map_err(|_| not_text(&entry.path()))?;
            // A link to a folder may lead back here.
            if name == "__pycache__" || (entry.path().is_symlink() && entry.path().is_dir()) {
                continue;
            }
            self.walk(&entry.path(), &if to.is_empty() { name } else { format!("{to}/{name}") })?;
        }
        Ok(())
    }

    /// The archive and its hash; none if there are no files. Owners and times are left out, so that equal
    /// files make equal archives.
    pub(crate) fn pack(&self) -> Result<Option<(Blob, Bytes)>, PrepareError> {
        if self.files.is_empty() {
            return Ok(None);
        }
        let mut archive = tar::Builder::new(Vec::new());
        for (name, path) in &self.files {
            let content = fs::read(path).map_err(|error| unreadable(path, &error))?;
            let mode = fs::metadata(path).map_err(|error| unreadable(path, &error))?.permissions().mode();
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(if mode & 0o111 == 0 { 0o644 } else { 0o755 });
            archive.append_data(&mut header, name, &content[..]).map_err(|error| unreadable(path, &error))?;
        }
        let content = archive.into_inner().map_err(|error| unreadable(&self.origin, &error))?;
        let sha256 = Sha256::digest(&content).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Some((Blob { sha256, len: content.len() as u64 }, content.into())))
    }
}

/// Where a file or folder that the user named arrives: at the same place relative to the working
/// directory, or by its last name if it lies outside.
pub(crate) fn arrives_at(here: &Path, path: &Path) -> Result<String, PrepareError> {
    let full = normal(&here.join(path));
    if full.starts_with(here) {
        return relative(&full, here);
    }
    let name = full.file_name().ok_or_else(|| {
        PrepareError::new(
            format!("{} can't be sent along", path.display()),
            "name a file or a folder that is not the root",
        )
    })?;
    name.to_str().map(str::to_owned).ok_or_else(|| not_text(path))
}

/// A path without `.` and `..`, as far as text alone can tell.
fn normal(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                normal.pop();
            }
            Component::CurDir => {}
            part => normal.push(part),
        }
    }
    normal
}

/// A path relative to a folder above it.
pub(crate) fn relative(path: &Path, origin: &Path) -> Result<String, PrepareError> {
    let relative = path.strip_prefix(origin).unwrap_or(path);
    relative.to_str().map(str::to_owned).ok_or_else(|| not_text(path))
}

fn unreadable(path: &Path, error: &std::io::Error) -> PrepareError {
    PrepareError { message: format!("failed to read {}: {error}", path.display()), hint: None }
}

fn not_text(path: &Path) -> PrepareError {
    PrepareError::new(format!("the path {} is not UTF-8", path.display()), "rename it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_files_arrive_where_they_were_or_by_their_name() {
        let here = Path::new("/home/me/project");
        let to = |path: &str| arrives_at(here, Path::new(path)).unwrap();
        assert_eq!(to("data/a.txt"), "data/a.txt");
        assert_eq!(to("./data/../b.txt"), "b.txt");
        assert_eq!(to("/home/me/project/c"), "c");
        assert_eq!(to("../other/d.txt"), "d.txt");
        assert_eq!(to("."), "");
        assert!(arrives_at(here, Path::new("/")).is_err());
    }
}
