//! The folder of a node's temporary files: bundles, and a folder for each slot.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
};

use burla_core::{
    ids::WorkerId,
    job::Blob,
    spill,
    store::{self, ObjectStore},
};
use rustix::{
    fs::{FlockOperation, flock},
    process::getuid,
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::sync::{Mutex, OnceCell};

/// A node's temporary files. They go when it is dropped; when the process dies, its keepers remove them.
#[derive(Debug)]
pub struct Scratch {
    folder: TempDir,
    /// The folder, locked for as long as this process lives.
    _lock: File,
    bundles: Mutex<HashMap<String, Arc<OnceCell<PathBuf>>>>,
}

/// The folders of one slot.
#[derive(Debug)]
pub(crate) struct SlotFolders {
    /// All of them lie below this one, and go with it.
    root: PathBuf,
    /// Where the calls run. What the bundle holds is there too.
    pub(crate) work: PathBuf,
    /// Where files lie that are inputs.
    pub(crate) files: PathBuf,
    /// Where calls put their own temporary files.
    pub(crate) temporary: PathBuf,
}

impl Drop for SlotFolders {
    fn drop(&mut self) {
        // What can't be removed now goes with the whole scratch folder.
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Scratch {
    /// A new, empty folder in [`spill::directory`]. Those that processes left there which were killed
    /// before they had a keeper are removed.
    pub fn new() -> io::Result<Self> {
        let place = spill::directory();
        sweep(&place);
        loop {
            let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&place)?;
            // Somebody else's sweep may have been faster.
            if let Some(lock) = lock(folder.path()) {
                return Ok(Self { folder, _lock: lock, bundles: Mutex::default() });
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Removes it, once nothing uses it any more.
    pub fn remove(&self) {
        // A file that was being written may appear while its folder is emptied.
        for _ in 0..3 {
            if fs::remove_dir_all(self.path()).is_ok() {
                return;
            }
        }
    }

    /// The Python runner's file.
    pub(crate) fn runner(&self) -> io::Result<PathBuf> {
        let folder = self.path().join("runner");
        let file = folder.join("burla_runner.py");
        if !file.exists() {
            fs::create_dir_all(&folder)?;
            // Renamed into place, so that nobody starts half of it.
            let part = tempfile::NamedTempFile::new_in(&folder)?;
            fs::write(&part, include_str!("runner.py"))?;
            part.persist(&file)?;
        }
        Ok(file)
    }

    /// The folder into which a bundle is unpacked, once for all slots.
    pub(crate) async fn bundle(&self, blob: &Blob, store: &dyn ObjectStore) -> Result<PathBuf, store::Error> {
        let cell = self.bundles.lock().await.entry(blob.sha256.clone()).or_default().clone();
        let folder = cell.get_or_try_init(|| self.unpack(blob, store)).await?;
        Ok(folder.clone())
    }

    async fn unpack(&self, blob: &Blob, store: &dyn ObjectStore) -> Result<PathBuf, store::Error> {
        let content = store.get(&blob.key(), None).await?.content;
        let folder = self.path().join("bundles").join(&blob.sha256);
        let (expected, to) = (blob.sha256.clone(), folder.clone());
        let unpacked = tokio::task::spawn_blocking(move || {
            if hex(&Sha256::digest(&content)) != expected {
                return Err(io::Error::other("the bundle's content does not have its hash"));
            }
            fs::create_dir_all(&to)?;
            tar::Archive::new(&content[..]).unpack(&to)
        });
        let failed = |source| store::Error::File { path: folder.display().to_string(), source };
        unpacked.await.map_err(io::Error::other).and_then(|unpacked| unpacked).map_err(failed)?;
        Ok(folder)
    }

    /// The folders of a slot. The bundle's top level is linked into the one where the calls run.
    pub(crate) fn slot(&self, worker: &WorkerId, bundle: Option<&Path>) -> io::Result<SlotFolders> {
        let root = self.path().join("slots").join(worker.0.replace('/', "-"));
        let folders = SlotFolders {
            work: root.join("work"),
            files: root.join("files"),
            temporary: root.join("tmp"),
            root,
        };
        for folder in [&folders.work, &folders.files, &folders.temporary] {
            fs::create_dir_all(folder)?;
        }
        if let Some(bundle) = bundle {
            for entry in fs::read_dir(bundle)? {
                let entry = entry?;
                symlink(entry.path(), folders.work.join(entry.file_name()))?;
            }
        }
        Ok(folders)
    }
}

/// What the names of scratch folders begin with.
const PREFIX: &str = "burla-";

/// The lock of a scratch folder; none if another process has it, or has removed the folder.
fn lock(folder: &Path) -> Option<File> {
    let file = File::open(folder).ok()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).ok()?;
    let (ours, there) = (file.metadata().ok()?, fs::metadata(folder).ok()?);
    ((ours.dev(), ours.ino()) == (there.dev(), there.ino())).then_some(file)
}

/// Removes a scratch folder whose process is gone. Tells whether it is not there any more.
pub(crate) fn remove_abandoned(folder: &Path) -> bool {
    if lock(folder).is_some() {
        let _ = fs::remove_dir_all(folder);
    }
    !folder.exists()
}

/// Removes scratch folders of this user that nobody has locked.
fn sweep(place: &Path) {
    let own = getuid().as_raw();
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let named = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        let ours = entry.metadata().is_ok_and(|metadata| metadata.is_dir() && metadata.uid() == own);
        if named && ours {
            remove_abandoned(&entry.path());
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
