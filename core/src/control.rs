//! What is asked of main_service, and its answers: JSON, because people read it.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    ids::{JobId, NodeId},
    job::{JobSpec, QueueSet},
};

/// The version of the requests; main_service accepts this one and the one before.
pub const VERSION: u32 = 1;

/// How long a job's lease lasts unless the client pings.
pub const JOB_LEASE: Duration = Duration::from_secs(60);

/// How often a client pings: four times within a lease, so that three may be lost.
pub const PING_INTERVAL: Duration = Duration::from_secs(15);

/// A request to main_service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
#[expect(clippy::large_enum_variant, reason = "requests are few, and never kept in a collection")]
pub enum Request {
    /// Starts a job. Sent again with the same id it does nothing new.
    Start {
        /// The id that the client chose.
        job: JobId,
        /// What to run.
        spec: JobSpec,
    },
    /// Renews the job's lease and asks how it stands.
    Ping {
        /// The job.
        job: JobId,
    },
    /// The client has every result: the job ends.
    Finish {
        /// The job.
        job: JobId,
    },
    /// Stops the job; what it was running is killed.
    Cancel {
        /// The job.
        job: JobId,
    },
    /// A node is up and takes orders.
    NodeReady {
        /// Which node.
        node: NodeId,
        /// What it has.
        capacity: Capacity,
    },
    /// Mends what is left of requests and machines that died in the middle.
    Sweep,
}

/// What main_service answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// How a job stands.
    Job(JobStatus),
    /// Done, and nothing to tell.
    Done,
}

/// How a job stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobStatus {
    /// Its queues.
    pub queues: QueueSet,
    /// How many workers are assigned to it now.
    pub slots: u32,
    /// What it waits for, in one line; absent if nothing.
    pub waits_for: Option<String>,
    /// Whether somebody cancelled it.
    pub cancelled: bool,
}

/// What a node can give to calls.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// CPUs.
    pub cpus: f64,
    /// Memory in bytes.
    pub memory: u64,
}

impl Capacity {
    /// How many calls fit at once: `floor(cpus / cpu)`, bounded by memory if `ram` is asked for.
    #[must_use]
    pub fn slots(&self, cpu: f64, ram: Option<u64>) -> u32 {
        // A tenth of a CPU taken ten times is one CPU, whatever floating point says.
        let by_cpu = (self.cpus / cpu + 1e-9).floor();
        let by_ram = ram.map_or(f64::INFINITY, |ram| (self.memory / ram.max(1)) as f64);
        by_cpu.min(by_ram).min(f64::from(u32::MAX)) as u32
    }
}

/// Why main_service did not do what it was asked.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "error", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Error {
    /// The job asks for what no node of the cluster can ever give.
    #[error("{message}")]
    Impossible {
        /// What is asked for and what there is.
        message: String,
    },
    /// There is no such job (any more).
    #[error("job {job} is not known to the cluster")]
    UnknownJob {
        /// Which.
        job: JobId,
    },
    /// Queues, objects or machines did not answer; worth trying again.
    #[error("main_service failed: {message}")]
    Unavailable {
        /// What failed.
        message: String,
    },
}

/// A way to main_service.
///
/// # Contract
///
/// A request may be delivered twice (a retried invoke); every request is idempotent.
#[async_trait]
pub trait Control: Send + Sync + 'static {
    /// Sends a request and waits for its reply.
    async fn call(&self, request: Request) -> Result<Reply, Error>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_bounded_by_cpu_and_memory() {
        let node = Capacity { cpus: 4.0, memory: 10 << 30 };
        assert_eq!(node.slots(1.0, None), 4);
        assert_eq!(node.slots(0.1, None), 40);
        assert_eq!(node.slots(3.0, None), 1);
        assert_eq!(node.slots(5.0, None), 0);
        assert_eq!(node.slots(1.0, Some(4 << 30)), 2);
        assert_eq!(node.slots(1.0, Some(11 << 30)), 0);
    }
}
