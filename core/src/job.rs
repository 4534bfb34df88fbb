//! The description of a job that client, main_service, agent and worker share.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// What to run on every input, and on what.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// What each input is given to.
    pub function: Function,
    /// The files that travel with the function, as a tar archive; none if there are no files.
    pub bundle: Option<Blob>,
    /// CPUs that one call has to itself; fractions share one.
    pub cpu: f64,
    /// Bytes of memory that one call may use; no limit if absent.
    pub ram: Option<u64>,
    /// At most so many calls at once; as many as there are slots if absent.
    pub max_parallelism: Option<u32>,
    /// How often a call that raised, failed or timed out is repeated.
    pub retries: u32,
    /// How long one call may take, from the moment the function starts.
    pub timeout: Option<Duration>,
    /// Environment variables of the call, beside the few that every call has.
    pub env: BTreeMap<String, String>,
    /// Whether inputs are names of files that travel along ([`crate::envelope::InputHeader::files`]).
    pub files: bool,
}

/// What a job calls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Function {
    /// A Python function; inputs and results are JSON.
    Python {
        /// The interpreter to start.
        interpreter: PathBuf,
        /// Folders of the bundle that come first on `sys.path`, relative to its root.
        path: Vec<String>,
        /// Where the function is.
        source: PythonSource,
        /// The function's name in it; dots reach into classes.
        name: String,
        /// What the user typed, for messages.
        spelled: String,
        /// The folder on the user's machine that the bundle's root stands for, for tracebacks.
        origin: String,
    },
    /// A command; inputs and results are bytes. `{}` in an argument becomes the input; without
    /// any, the input and a newline go to its stdin.
    Command {
        /// The program, then its arguments.
        argv: Vec<String>,
    },
}

/// Where a Python function is defined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PythonSource {
    /// A file, relative to the bundle's root.
    File(String),
    /// A module to import.
    Module(String),
}

/// A content-addressed object: `blobs/<sha256>`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blob {
    /// The content's SHA-256, in lower-case hexadecimal.
    pub sha256: String,
    /// Its length in bytes.
    pub len: u64,
}

impl Blob {
    /// The object's key.
    #[must_use]
    pub fn key(&self) -> String {
        format!("blobs/{}", self.sha256)
    }
}

/// The queues of one job, made ahead, used once, deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSet {
    /// Client to workers.
    pub inputs: String,
    /// Workers to client: results.
    pub results: String,
    /// Workers to client: what the calls print.
    pub logs: String,
}
