//! Memory that the worker shares with its runtime child: what the child is running, and the
//! window in which it leaves finished results, so that both outlive the child's death and cost no
//! system call per input.
//!
//! The layout is a page of little-endian `u64` cells, then the window. The child writes
//! [`Cell::Running`] and [`Cell::Written`]; the worker writes the others, and resets `Written` while the
//! child waits.

use std::{
    fs::File,
    io,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    sync::atomic::{AtomicU64, Ordering},
};

use memmap2::MmapRaw;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

const PAGE: usize = 4096;

/// Bytes of the window. Only pages that were written take memory.
pub(crate) const WINDOW: usize = 4 << 20;

/// A cell of the first page.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cell {
    /// Index of the running input, plus one; 0 while none runs.
    Running = 0,
    /// Bytes of whole records in the window.
    Written = 1,
    /// Position in the batch at which the child stops.
    Limit = 2,
    /// Grows before every read from the child's log pipes.
    Drained = 3,
}

/// One side's view of the shared memory.
#[derive(Debug)]
pub(crate) struct Shared {
    map: MmapRaw,
}

impl Shared {
    /// New memory, and the descriptor that the child maps it from.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let fd = memfd_create("burla", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, (PAGE + WINDOW) as u64)?;
        let file = File::from(fd);
        let shared = Self { map: MmapRaw::map_raw(&file)? };
        Ok((shared, file.into()))
    }

    /// The memory that the keeper passed down, whose descriptor the environment names. Mapped, the
    /// descriptor is closed: what this process starts does not get it.
    #[expect(unsafe_code, reason = "a descriptor that is inherited by number has no owner yet")]
    pub(crate) fn inherit(variable: &str) -> io::Result<Self> {
        let number = std::env::var(variable).ok().and_then(|number| number.parse().ok());
        let number: RawFd = number
            .filter(|number| *number > 2)
            .ok_or_else(|| io::Error::other("no shared memory was passed down"))?;
        // SAFETY: the keeper left this descriptor open for us, and nothing else in this process knows it.
        Self::open(&File::from(unsafe { OwnedFd::from_raw_fd(number) }))
    }

    fn open(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() != (PAGE + WINDOW) as u64 {
            return Err(io::Error::other("the shared memory has an unexpected size"));
        }
        Ok(Self { map: MmapRaw::map_raw(file)? })
    }

    #[expect(unsafe_code, reason = "memory shared between processes has no safe type")]
    fn cell(&self, cell: Cell) -> &AtomicU64 {
        // SAFETY: the mapping is at least a page long and page-aligned, so the cell lies inside it
        // and is aligned. It lives as long as `self`. Both processes access cells only atomically
        // (the Python child by single aligned 8-byte stores), and an AtomicU64 may change at any time.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().cast::<u64>().add(cell as usize)) }
    }

    pub(crate) fn load(&self, cell: Cell) -> u64 {
        self.cell(cell).load(Ordering::SeqCst)
    }

    pub(crate) fn store(&self, cell: Cell, value: u64) {
        self.cell(cell).store(value, Ordering::SeqCst);
    }

    pub(crate) fn add(&self, cell: Cell, value: u64) {
        self.cell(cell).fetch_add(value, Ordering::SeqCst);
    }

    /// Copies the window's bytes `from..to` out. A child gone wild may have written any number:
    /// what lies outside the window is not there.
    #[expect(unsafe_code, reason = "memory shared between processes has no safe type")]
    pub(crate) fn copy(&self, from: usize, to: usize) -> Vec<u8> {
        let to = to.min(WINDOW);
        let len = to.saturating_sub(from);
        let mut bytes = Vec::with_capacity(len);
        if len > 0 {
            // SAFETY: `from..to` lies in the window, which lies in the mapping; the destination is
            // fresh memory of that capacity. The child does not write below `Written` until it is
            // told to go on; should it do so all the same, the copied bytes are garbage but valid `u8`s.
            unsafe {
                std::ptr::copy_nonoverlapping(self.map.as_ptr().add(PAGE + from), bytes.as_mut_ptr(), len);
                bytes.set_len(len);
            }
        }
        bytes
    }

    /// Writes `bytes` into the window at `at`; false if they do not fit.
    #[expect(unsafe_code, reason = "memory shared between processes has no safe type")]
    pub(crate) fn write(&self, at: usize, bytes: &[u8]) -> bool {
        if at.saturating_add(bytes.len()) > WINDOW {
            return false;
        }
        // SAFETY: the destination lies in the window, which lies in the mapping. The other process
        // reads it only once `Written` covers it.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.map.as_mut_ptr().add(PAGE + at), bytes.len());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_views_see_the_same_cells_and_window() {
        let (ours, fd) = Shared::new().unwrap();
        let theirs = Shared::open(&File::from(fd)).unwrap();
        theirs.store(Cell::Running, 18);
        ours.add(Cell::Drained, 2);
        assert_eq!((ours.load(Cell::Running), theirs.load(Cell::Drained)), (18, 2));
        assert!(theirs.write(10, b"result"));
        assert_eq!(ours.copy(10, 16), b"result");
    }

    #[test]
    fn nothing_outside_the_window_is_touched() {
        let (shared, _fd) = Shared::new().unwrap();
        assert!(shared.write(WINDOW - 2, b"ab"));
        assert!(!shared.write(WINDOW - 2, b"abc"));
        assert!(!shared.write(usize::MAX, b"a"));
        assert_eq!(shared.copy(WINDOW - 2, usize::MAX), b"ab");
        assert!(shared.copy(WINDOW + 5, WINDOW + 9).is_empty());
    }
}
