//! The seam to machines.

use async_trait::async_trait;
use burla_core::ids::NodeId;

/// A place that nodes come from.
///
/// # Contract
///
/// - **Idempotent.** A launch of an intent that was launched before starts nothing, also when the
///   nodes have ended since; so does a second terminate.
/// - A node's id is [`crate::names::node_id`] of its intent. Once its agent takes orders it sends
///   [`burla_core::control::Request::NodeReady`]; a node that is refused ends itself.
/// - `launch` does not wait for that, and may start fewer nodes than were asked for: what has not
///   come when the intent expires is asked for anew, with another intent.
/// - **The list may lag**: a node may be missing for a while after its launch and be listed for a
///   while after its end.
/// - Terminating a node that does not exist (any more) is fine.
#[async_trait]
pub trait NodeProvider: Send + Sync + 'static {
    /// Starts nodes.
    async fn launch(&self, launch: &Launch) -> Result<(), Error>;

    /// The nodes of this cluster that are starting or running.
    async fn list(&self) -> Result<Vec<NodeId>, Error>;

    /// Ends a node.
    async fn terminate(&self, node: &NodeId) -> Result<(), Error>;
}

/// Nodes to be launched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The id of the intent: the token that makes a repetition harmless.
    pub intent: String,
    /// The pool of the cluster spec that the nodes belong to.
    pub pool: String,
    /// How many.
    pub count: u32,
}

/// Why a provider did not do what it was asked; every one is worth trying again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There are no such machines to be had at the moment.
    #[error("no capacity: {0}")]
    NoCapacity(String),
    /// The service did not answer, or refused.
    #[error("machines are unavailable: {0}")]
    Unavailable(String),
}
