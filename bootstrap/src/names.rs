//! Names of queues and objects. Whatever makes one or looks for one gets its name here.

use burla_core::{
    ids::{JobId, NodeId},
    job::QueueSet,
};

/// The object that holds [`crate::state::State`].
pub const STATE: &str = "cluster/state";

/// The queue on which a node gets its [`burla_core::envelope::Orders`].
#[must_use]
pub fn node_queue(cluster: &str, node: &NodeId) -> String {
    format!("burla-{cluster}-node-{node}")
}

/// The three queues of the queue set named `set`.
#[must_use]
pub fn queue_set(cluster: &str, set: &str) -> QueueSet {
    let name = |what| format!("burla-{cluster}-{set}-{what}");
    QueueSet { inputs: name("inputs"), results: name("results"), logs: name("logs") }
}

/// What the keys of a job's objects begin with.
#[must_use]
pub fn job_prefix(job: &JobId) -> String {
    format!("jobs/{job}/")
}

/// The object that each ping of a job overwrites with the new end of the job's lease: an object
/// of its own, so that pings don't compete for the state.
#[must_use]
pub fn lease_key(job: &JobId) -> String {
    format!("jobs/{job}/lease")
}

/// The name of a node: the intent that it was launched for, and what tells it from its siblings
/// (on EC2 the instance's id, which nobody knows before the launch).
#[must_use]
pub fn node_id(intent: &str, suffix: &str) -> NodeId {
    NodeId(format!("{intent}-{suffix}"))
}

/// The intent that a node was launched for.
#[must_use]
pub fn intent_of(node: &NodeId) -> &str {
    node.0.split_once('-').map_or(node.0.as_str(), |(intent, _)| intent)
}

/// Whether a foreign id may stand in a queue's name and in an object's key.
pub(crate) fn is_safe(id: &str) -> bool {
    (1..=40).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}
