//! Files that are inputs, laid out where the calls run.

use std::{
    io,
    ops::Range,
    path::{Component, Path, PathBuf},
};

use burla_core::{
    envelope::{FileContent, InputHeader},
    store::{self, ObjectStore},
};
use bytes::Bytes;

/// The folder in which the files of a slot's inputs lie, each as `index/name`.
#[derive(Debug)]
pub(crate) struct Files {
    root: PathBuf,
}

impl Files {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Writes the files of the inputs that are to be run.
    pub(crate) async fn lay(
        &self,
        header: &InputHeader,
        mut packed: Bytes,
        store: &dyn ObjectStore,
    ) -> Result<(), store::Error> {
        for (position, entry) in (0..).zip(&header.files) {
            let wanted = (header.from..header.to).contains(&position);
            let path = self.path(header.first + u64::from(position), &entry.name)?;
            match &entry.content {
                FileContent::Packed(len) => {
                    let len = usize::try_from(*len).unwrap_or(usize::MAX).min(packed.len());
                    let content = packed.split_to(len);
                    if wanted {
                        // Here and not on a thread of its own, which would go on when this worker is
                        // killed; packed files are small.
                        let written = make_parent(&path).and_then(|()| std::fs::write(&path, &content));
                        written.map_err(|error| failed(&path, error))?;
                        tokio::task::yield_now().await;
                    }
                }
                FileContent::Object { key } if wanted => {
                    make_parent(&path).map_err(|error| failed(&path, error))?;
                    store.download(key, &path).await?;
                }
                FileContent::Object { .. } => {}
            }
        }
        Ok(())
    }

    /// Removes the files of inputs that are done.
    pub(crate) async fn clear(&self, first: u64, range: Range<u32>) {
        let root = self.root.clone();
        let cleared = tokio::task::spawn_blocking(move || {
            for position in range {
                // An input without a file has no folder.
                let _ = std::fs::remove_dir_all(root.join((first + u64::from(position)).to_string()));
            }
        });
        let _ = cleared.await;
    }

    /// Where the file of an input lies. Its name comes from another machine: it stays below our folder.
    fn path(&self, index: u64, name: &str) -> Result<PathBuf, store::Error> {
        let plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
        let path = self.root.join(index.to_string()).join(name);
        if plain { Ok(path) } else { Err(failed(&path, io::Error::other("its name leads elsewhere"))) }
    }
}

fn make_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)
}

fn failed(path: &Path, source: io::Error) -> store::Error {
    store::Error::File { path: path.display().to_string(), source }
}
