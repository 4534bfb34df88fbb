//! Objects of one process: in memory while they are few, beyond that in a temporary file.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    ops::{Bound, Range},
    os::unix::fs::FileExt,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::task::spawn_blocking;

use super::{ETag, Entry, Error, Object, ObjectStore, PAGE, When};
use crate::spill::{Extent, Spill};

/// Bytes of objects that are kept in memory unless told otherwise.
const BUDGET: u64 = 128 << 20;

/// An object up to this size stays in memory whatever the budget: the file system could not take
/// back the space of one that is smaller than its blocks.
const SMALL: u64 = 4 << 10;

/// Objects in memory, shared and never copied, up to a budget; beyond it, and what is uploaded
/// from files, in a temporary file that goes with the process.
#[derive(Clone, Debug)]
pub struct Embedded {
    inner: Arc<Inner>,
}

impl Embedded {
    /// An empty store that keeps 128 MiB in memory.
    #[must_use]
    pub fn new() -> Self {
        Self::with_budget(BUDGET)
    }

    /// An empty store that keeps `budget` bytes in memory.
    #[must_use]
    pub fn with_budget(budget: u64) -> Self {
        let inner = Inner { budget, used: Arc::default(), spill: Mutex::default(), shelf: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    /// Runs what waits for a disk where it keeps no task from running.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = self.inner.clone();
        let done = spawn_blocking(move || work(&inner)).await;
        done.unwrap_or_else(|stopped| Err(Error::Unavailable(stopped.to_string())))
    }

    /// Gives space in the temporary file back.
    async fn discard(&self, spilled: impl Send + 'static) -> Result<(), Error> {
        self.blocking(move |_| {
            drop(spilled);
            Ok(())
        })
        .await
    }
}

impl Default for Embedded {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl ObjectStore for Embedded {
    async fn put(&self, key: &str, content: Bytes, when: When) -> Result<ETag, Error> {
        let Some(resident) = self.inner.resident(&content) else {
            self.inner.shelf().check(key, &when)?;
            let key = key.to_string();
            return self
                .blocking(move |inner| {
                    let slot = inner.slot(content.len() as u64)?;
                    slot.spill.file().write_all_at(&content, slot.extent.start).map_err(spill_failed)?;
                    let (etag, _old) = inner.shelf().put(key, Content::Spilled(Arc::new(slot)), &when)?;
                    Ok(etag)
                })
                .await;
        };
        let (etag, old) = self.inner.shelf().put(key.into(), Content::Memory(resident), &when)?;
        if let Some(Content::Spilled(old)) = old {
            self.discard(old).await?;
        }
        Ok(etag)
    }

    async fn upload(&self, key: &str, from: &Path) -> Result<(), Error> {
        let (key, from) = (key.to_string(), from.to_path_buf());
        self.blocking(move |inner| {
            let failed = |source| file_failed(&from, source);
            let file = File::open(&from).map_err(failed)?;
            let metadata = file.metadata().map_err(failed)?;
            if !metadata.is_file() {
                return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
            }
            let slot = inner.slot(metadata.len())?;
            copy(&file, 0, slot.spill.file(), slot.extent.start, slot.extent.len).map_err(failed)?;
            let (_etag, _old) = inner.shelf().put(key, Content::Spilled(Arc::new(slot)), &When::Always)?;
            Ok(())
        })
        .await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Object, Error> {
        let (content, etag) = self.inner.shelf().get(key)?;
        let range = range.unwrap_or(0..u64::MAX);
        let end = range.end.min(content.len());
        let start = range.start.min(end);
        let content = match content {
            // No more than the length, which is one of memory.
            Content::Memory(resident) => resident.content.slice(start as usize..end as usize),
            Content::Spilled(slot) => {
                self.blocking(move |_| {
                    let part = Extent { start: slot.extent.start + start, len: end - start };
                    slot.spill.read(part).map_err(spill_failed)
                })
                .await?
            }
        };
        Ok(Object { content, etag })
    }

    async fn download(&self, key: &str, to: &Path) -> Result<(), Error> {
        let (content, _) = self.inner.shelf().get(key)?;
        let to = to.to_path_buf();
        self.blocking(move |_| {
            let failed = |source| file_failed(&to, source);
            let file = File::create_new(&to).map_err(failed)?;
            let written = match content {
                Content::Memory(resident) => file.write_all_at(&resident.content, 0),
                Content::Spilled(slot) => {
                    copy(slot.spill.file(), slot.extent.start, &file, 0, slot.extent.len)
                }
            };
            written.map_err(|source| {
                // The file is ours and not whole; that it stays is the lesser of two failures.
                let _ = std::fs::remove_file(&to);
                failed(source)
            })
        })
        .await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Entry>, Error> {
        let from = match after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let shelf = self.inner.shelf();
        let objects = shelf.objects.range::<str, _>((from, Bound::Unbounded));
        Ok(objects
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(PAGE)
            .map(|(key, stored)| Entry { key: key.clone(), len: stored.content.len() })
            .collect())
    }

    async fn delete(&self, keys: &[String]) -> Result<(), Error> {
        let spilled: Vec<Content> = {
            let mut shelf = self.inner.shelf();
            let removed =
                keys.iter().filter_map(|key| shelf.objects.remove(key)).map(|stored| stored.content);
            removed.filter(|content| matches!(content, Content::Spilled(_))).collect()
        };
        if spilled.is_empty() { Ok(()) } else { self.discard(spilled).await }
    }
}

#[derive(Debug)]
struct Inner {
    budget: u64,
    /// How much of the budget is taken.
    used: Arc<AtomicU64>,
    /// Made when it is first needed.
    spill: Mutex<Option<Arc<Spill>>>,
    shelf: Mutex<Shelf>,
}

impl Inner {
    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for `content` in memory, if there is any left.
    fn resident(&self, content: &Bytes) -> Option<Resident> {
        let len = content.len() as u64;
        let take = |used: u64| (len <= SMALL || used + len <= self.budget).then_some(used + len);
        self.used.try_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        Some(Resident { content: content.clone(), _share: Arc::new(Share { len, used: self.used.clone() }) })
    }

    /// Room for `len` bytes in the temporary file.
    fn slot(&self, len: u64) -> Result<Slot, Error> {
        let mut spill = self.spill.lock().unwrap_or_else(PoisonError::into_inner);
        let spill = match &mut *spill {
            Some(spill) => spill,
            none => none.insert(Arc::new(Spill::new().map_err(spill_failed)?)),
        };
        Ok(Slot { extent: spill.reserve(len), spill: spill.clone() })
    }
}

#[derive(Debug, Default)]
struct Shelf {
    objects: BTreeMap<String, Stored>,
    /// How many puts there were; the last one's ETag.
    version: u64,
}

#[derive(Debug)]
struct Stored {
    content: Content,
    version: u64,
}

impl Shelf {
    fn check(&self, key: &str, when: &When) -> Result<(), Error> {
        let stored = self.objects.get(key);
        let fits = match when {
            When::Always => true,
            When::Absent => stored.is_none(),
            When::Matches(etag) => stored.is_some_and(|stored| etag_of(stored.version) == *etag),
        };
        if fits { Ok(()) } else { Err(Error::Precondition(key.into())) }
    }

    /// Puts an object and returns the one that was there, to be dropped outside of the lock.
    fn put(&mut self, key: String, content: Content, when: &When) -> Result<(ETag, Option<Content>), Error> {
        self.check(&key, when)?;
        self.version += 1;
        let old = self.objects.insert(key, Stored { content, version: self.version });
        Ok((etag_of(self.version), old.map(|stored| stored.content)))
    }

    fn get(&self, key: &str) -> Result<(Content, ETag), Error> {
        let stored = self.objects.get(key).ok_or_else(|| Error::NotFound(key.into()))?;
        Ok((stored.content.clone(), etag_of(stored.version)))
    }
}

#[derive(Clone, Debug)]
enum Content {
    Memory(Resident),
    Spilled(Arc<Slot>),
}

impl Content {
    fn len(&self) -> u64 {
        match self {
            Self::Memory(resident) => resident.content.len() as u64,
            Self::Spilled(slot) => slot.extent.len,
        }
    }
}

/// Bytes in memory, with their share of the budget.
#[derive(Clone, Debug)]
struct Resident {
    content: Bytes,
    _share: Arc<Share>,
}

/// A share of the budget, given back on drop.
#[derive(Debug)]
struct Share {
    len: u64,
    used: Arc<AtomicU64>,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.used.fetch_sub(self.len, Ordering::Relaxed);
    }
}

/// A place in the temporary file, given back when the object and all who read it are gone.
#[derive(Debug)]
struct Slot {
    extent: Extent,
    spill: Arc<Spill>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.spill.free(self.extent);
    }
}

fn etag_of(version: u64) -> ETag {
    ETag(version.to_string())
}

fn file_failed(path: &Path, source: io::Error) -> Error {
    Error::File { path: path.display().to_string(), source }
}

fn spill_failed(error: io::Error) -> Error {
    Error::Unavailable(format!(
        "failed to use a temporary file in {}: {error}",
        crate::spill::directory().display()
    ))
}

/// Copies `len` bytes between files, within the kernel if the file systems can.
fn copy(from: &File, mut at: u64, to: &File, mut to_at: u64, mut len: u64) -> io::Result<()> {
    while len > 0 {
        let most = usize::try_from(len).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut to_at), most) {
            // Not possible between these two, or said to be the end of the file: read and see.
            Ok(0) | Err(_) => break,
            Ok(copied) => len -= copied as u64,
        }
    }
    let mut buffer = vec![0; len.min(1 << 20) as usize];
    while len > 0 {
        let part = len.min(buffer.len() as u64);
        let buffer = &mut buffer[..part as usize];
        from.read_exact_at(buffer, at)?;
        to.write_all_at(buffer, to_at)?;
        (at, to_at, len) = (at + part, to_at + part, len - part);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIB: usize = 1 << 20;

    impl Embedded {
        fn blocks(&self) -> u64 {
            let spill = self.inner.spill.lock().unwrap();
            spill.as_ref().map_or(0, |spill| {
                spill.file().sync_all().unwrap();
                spill.file().metadata().unwrap().blocks()
            })
        }
    }

    #[tokio::test]
    async fn what_exceeds_the_budget_is_on_disk_and_deleting_gives_its_room_back() {
        let store = Embedded::with_budget(4 * MIB as u64);
        let key = |i: usize| format!("k{i}");
        for i in 0..12 {
            store.put(&key(i), vec![i as u8; MIB].into(), When::Always).await.unwrap();
        }
        assert_eq!(store.inner.used.load(Ordering::Relaxed), 4 * MIB as u64);
        assert!(store.blocks() >= 8 * 2048);
        for i in 0..12 {
            assert_eq!(store.get(&key(i), None).await.unwrap().content, vec![i as u8; MIB]);
        }
        store.put(&key(11), Bytes::from_static(b"small"), When::Always).await.unwrap();
        store.delete(&(0..11).map(key).collect::<Vec<_>>()).await.unwrap();
        assert_eq!(store.inner.used.load(Ordering::Relaxed), 5);
        assert!(store.blocks() < 64, "{} blocks are left", store.blocks());
    }

    #[tokio::test]
    async fn content_in_memory_is_not_copied() {
        let store = Embedded::new();
        let content = Bytes::from(vec![7; MIB]);
        store.put("k", content.clone(), When::Always).await.unwrap();
        assert_eq!(store.get("k", Some(10..20)).await.unwrap().content.as_ptr(), content[10..].as_ptr());
        assert_eq!(store.blocks(), 0);
    }

    #[tokio::test]
    async fn a_put_that_loses_leaves_nothing_behind() {
        let store = Embedded::with_budget(0);
        let content = Bytes::from(vec![7; MIB]);
        store.put("k", content.clone(), When::Absent).await.unwrap();
        let blocks = store.blocks();
        // Past the first look at the condition, as in a race.
        let slot = store.inner.slot(MIB as u64).unwrap();
        slot.spill.file().write_all_at(&content, slot.extent.start).unwrap();
        let lost = store.inner.shelf().put("k".into(), Content::Spilled(Arc::new(slot)), &When::Absent);
        assert!(matches!(lost, Err(Error::Precondition(_))));
        assert!(store.blocks() <= blocks + 64);
    }

    #[test]
    fn files_are_copied_whole_and_a_shorter_one_is_noticed() {
        let files: Vec<File> = (0..2).map(|_| tempfile::tempfile().unwrap()).collect();
        let bytes: Vec<u8> = (0..3 * MIB + 5).map(|i| (i / 7) as u8).collect();
        files[0].write_all_at(&bytes, 0).unwrap();
        copy(&files[0], 3, &files[1], 1, bytes.len() as u64 - 3).unwrap();
        let mut copied = vec![0; bytes.len() - 3];
        files[1].read_exact_at(&mut copied, 1).unwrap();
        assert!(copied == bytes[3..]);
        let error = copy(&files[0], 0, &files[1], 0, bytes.len() as u64 + 1).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        // /proc has files that the kernel does not copy.
        let status = File::open("/proc/self/status").unwrap();
        copy(&status, 0, &files[1], 0, 5).unwrap();
        files[1].read_exact_at(&mut copied[..5], 0).unwrap();
        assert_eq!(&copied[..5], b"Name:");
    }
}
