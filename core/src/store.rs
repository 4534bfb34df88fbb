//! The seam to object storage.

mod embedded;

use std::{ops::Range, path::Path};

use async_trait::async_trait;
use bytes::Bytes;

pub use embedded::Embedded;

/// A bucket of objects.
///
/// # Contract
///
/// - **Strong read-after-write**, for single objects and for lists.
/// - A put is whole or not at all; of conditional puts that race, one wins and the others get
///   [`Error::Precondition`].
/// - Every put gives the object a new [`ETag`], also one of equal content.
/// - Lists are in the order of the keys' bytes, a page at a time.
/// - Deleting what does not exist is fine.
#[async_trait]
pub trait ObjectStore: Send + Sync + 'static {
    /// Puts an object.
    async fn put(&self, key: &str, content: Bytes, when: When) -> Result<ETag, Error>;

    /// Puts a file's content, which need not fit in memory, over whatever is there.
    async fn upload(&self, key: &str, from: &Path) -> Result<(), Error>;

    /// Gets an object, or the part of it in `range`; a range past the end is cut short.
    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Object, Error>;

    /// Writes an object's content, which need not fit in memory, into a new file.
    async fn download(&self, key: &str, to: &Path) -> Result<(), Error>;

    /// Lists objects whose key begins with `prefix`, from the first key past `after` on, at most
    /// [`PAGE`] of them. Fewer than that means that there are no more.
    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Entry>, Error>;

    /// Deletes objects.
    async fn delete(&self, keys: &[String]) -> Result<(), Error>;
}

/// Entries of one list page.
pub const PAGE: usize = 1000;

/// When a put is to happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// Only if there is no such object.
    Absent,
    /// Only if the object is still this one.
    Matches(ETag),
}

/// Stands for one version of one object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ETag(pub String);

/// An object, or a part of it.
#[derive(Clone, Debug)]
pub struct Object {
    /// Its content.
    pub content: Bytes,
    /// Its version.
    pub etag: ETag,
}

/// A line of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The object's key.
    pub key: String,
    /// Its length in bytes.
    pub len: u64,
}

/// Why a store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no such object.
    #[error("object {0} does not exist")]
    NotFound(String),
    /// Somebody else was first.
    #[error("object {0} has changed meanwhile")]
    Precondition(String),
    /// A local file could not be read or written.
    #[error("failed to transfer {path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The service did not answer, or refused for now; worth trying again.
    #[error("object store is unavailable: {0}")]
    Unavailable(String),
}

/// What every user of an [`ObjectStore`] wants, on top of what an implementation has to give.
#[async_trait]
pub trait ObjectStoreExt: ObjectStore {
    /// All keys that begin with `prefix`.
    async fn keys(&self, prefix: &str) -> Result<Vec<String>, Error> {
        let mut keys: Vec<String> = Vec::new();
        loop {
            let page = self.list(prefix, keys.last().map(String::as_str)).await?;
            let last = page.len() < PAGE;
            keys.extend(page.into_iter().map(|entry| entry.key));
            if last {
                return Ok(keys);
            }
        }
    }

    /// Deletes every object whose key begins with `prefix`.
    async fn delete_prefix(&self, prefix: &str) -> Result<(), Error> {
        for page in self.keys(prefix).await?.chunks(PAGE) {
            self.delete(page).await?;
        }
        Ok(())
    }
}

impl<S: ObjectStore + ?Sized> ObjectStoreExt for S {}
