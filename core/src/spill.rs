//! Bytes that do not fit in memory, in one temporary file without a name: it is gone when the
//! process is, however it ends.

use std::{fs::File, io, os::unix::fs::FileExt, path::PathBuf, sync::Mutex};

use bytes::{Bytes, BytesMut};
use rustix::fs::{FallocateFlags, fallocate};

/// Where temporary files go: `TMPDIR` if it is set, else `/var/tmp`, because `/tmp` is often kept
/// in memory, else `/tmp`.
#[must_use]
pub fn directory() -> PathBuf {
    let usable =
        |dir: &PathBuf| dir.is_dir() && rustix::fs::access(dir, rustix::fs::Access::WRITE_OK).is_ok();
    std::env::var_os("TMPDIR")
        .map(PathBuf::from)
        .into_iter()
        .chain([PathBuf::from("/var/tmp")])
        .find(usable)
        .unwrap_or_else(|| "/tmp".into())
}

/// A file to put bytes aside. Space that is given back is punched out of it.
#[derive(Debug)]
pub struct Spill {
    file: File,
    end: Mutex<u64>,
}

/// Where some bytes lie in a [`Spill`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where they begin.
    pub start: u64,
    /// How many there are.
    pub len: u64,
}

impl Spill {
    /// An empty file in [`directory`].
    pub fn new() -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile_in(directory())?, end: Mutex::new(0) })
    }

    /// Sets `len` bytes aside for whoever writes them.
    pub fn reserve(&self, len: u64) -> Extent {
        let mut end = self.end.lock().expect("nothing panics while it holds this lock");
        let extent = Extent { start: *end, len };
        *end += len;
        extent
    }

    /// Writes `bytes` and tells where.
    pub fn write(&self, bytes: &[u8]) -> io::Result<Extent> {
        let extent = self.reserve(bytes.len() as u64);
        self.file.write_all_at(bytes, extent.start)?;
        Ok(extent)
    }

    /// Reads what lies at `extent`.
    pub fn read(&self, extent: Extent) -> io::Result<Bytes> {
        let mut bytes = BytesMut::zeroed(usize::try_from(extent.len).map_err(io::Error::other)?);
        self.file.read_exact_at(&mut bytes, extent.start)?;
        Ok(bytes.freeze())
    }

    /// Gives the space at `extent` back to the file system.
    pub fn free(&self, extent: Extent) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if extent.len > 0 {
            // A file system that can't punch holes keeps the space until the process ends.
            let _ = fallocate(&self.file, flags, extent.start, extent.len);
        }
    }

    /// The file itself, to copy from and to.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn bytes_come_back_and_freed_space_is_given_back() {
        let spill = Spill::new().unwrap();
        let extents: Vec<_> = (0..8u8).map(|i| spill.write(&vec![i; 1 << 20]).unwrap()).collect();
        spill.file.sync_all().unwrap();
        let before = spill.file.metadata().unwrap().blocks();
        for (i, extent) in extents.iter().enumerate().step_by(2) {
            assert_eq!(spill.read(*extent).unwrap(), vec![i as u8; 1 << 20]);
            spill.free(*extent);
        }
        assert_eq!(spill.read(extents[3]).unwrap(), vec![3; 1 << 20]);
        assert!(spill.file.metadata().unwrap().blocks() <= before / 2 + 64);
    }
}
