//! The folder of a node's temporary files: bundles, and a folder for each slot.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
};

use burla_core::{
    ids::WorkerId,
    job::Blob,
    spill,
    store::{self, ObjectStore},
};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tokio::sync::{Mutex, OnceCell};

/// A node's temporary files. They go when it is dropped; when the process dies, its keepers remove them.
#[derive(Debug)]
pub struct Scratch {
    folder: TempDir,
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
    /// A new, empty folder in [`spill::directory`].
    pub fn new() -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("burla-").tempdir_in(spill::directory())?;
        Ok(Self { folder, bundles: Mutex::default() })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Removes it, once nothing uses it any more.
    pub fn remove(&self) {
        // What can't be removed is not ours.
        let _ = fs::remove_dir_all(self.path());
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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
