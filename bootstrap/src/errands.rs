//! Does what was decided.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use burla_core::{
    control::Error,
    ids::NodeId,
    queue::{Queue, QueueExt},
    store::{ObjectStore, ObjectStoreExt},
    wire,
};
use tokio::task::JoinSet;

use crate::{
    ledger::unavailable,
    names,
    provider::{Launch, NodeProvider},
    state::{Errand, State},
};

/// So many errands are under way at once.
const AT_ONCE: usize = 64;

/// The seams that errands reach through.
#[derive(Clone)]
pub(crate) struct Hands {
    pub(crate) cluster: Arc<str>,
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) provider: Arc<dyn NodeProvider>,
}

/// What became of some errands.
#[derive(Default)]
pub(crate) struct Outcome {
    pub(crate) done: BTreeSet<Errand>,
    pub(crate) failed: Vec<(Errand, String)>,
}

impl Outcome {
    /// Why launches failed, by intent.
    pub(crate) fn launch_problems(&self) -> BTreeMap<&str, &str> {
        self.failed
            .iter()
            .filter_map(|(errand, problem)| match errand {
                Errand::Launch { intent } => Some((intent.as_str(), problem.as_str())),
                _ => None,
            })
            .collect()
    }

    /// The first failure. A failed launch is none: it is waited for, and the client told why.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let failed = self.failed.iter().find(|(errand, _)| !matches!(errand, Errand::Launch { .. }));
        failed.map_or(Ok(()), |(_, error)| Err(unavailable(error)))
    }
}

impl Hands {
    /// Does errands, those of one kind at the same time, and the kinds in their order: queues are
    /// made before a node is told of them, and deleted after it was told to leave them.
    pub(crate) async fn run(&self, state: &Arc<State>, errands: BTreeSet<Errand>) -> Outcome {
        let mut outcome = Outcome::default();
        let errands: Vec<Errand> = errands.into_iter().collect();
        let same_kind = |a: &Errand, b: &Errand| std::mem::discriminant(a) == std::mem::discriminant(b);
        for some in errands.chunk_by(same_kind).flat_map(|kind| kind.chunks(AT_ONCE)) {
            let mut tasks = JoinSet::new();
            for errand in some {
                let (hands, state, errand) = (self.clone(), state.clone(), errand.clone());
                tasks.spawn(async move { (hands.run_one(&state, &errand).await, errand) });
            }
            while let Some(ended) = tasks.join_next().await {
                match ended {
                    Ok((Ok(()), errand)) => drop(outcome.done.insert(errand)),
                    Ok((Err(error), errand)) => outcome.failed.push((errand, error.to_string())),
                    // Cancelled, because this whole process is ending: it was not done.
                    Err(_) => {}
                }
            }
        }
        outcome
    }

    async fn run_one(&self, state: &State, errand: &Errand) -> Result<(), Failure> {
        match errand {
            Errand::MakeQueueSet { set } => {
                for queue in self.queues_of(set) {
                    self.queue.create(&queue).await?;
                }
            }
            Errand::MakeNodeQueue { node } => self.queue.create(&self.node_queue(node)).await?,
            Errand::Launch { intent: id } => {
                if let Some(intent) = state.intents.get(id) {
                    let (pool, count) = (intent.pool.clone(), intent.count);
                    self.provider.launch(&Launch { intent: id.clone(), pool, count }).await?;
                }
            }
            Errand::Orders { node, .. } => {
                if let Some(orders) = state.orders(node, &self.cluster) {
                    self.queue.send_all(&self.node_queue(node), &[wire::encode(&orders, &[])]).await?;
                }
            }
            Errand::Terminate { node } => {
                self.provider.terminate(node).await?;
                self.queue.delete(&self.node_queue(node)).await?;
            }
            Errand::CleanUp { job, set } => {
                for queue in self.queues_of(set) {
                    self.queue.delete(&queue).await?;
                }
                self.store.delete_prefix(&names::job_prefix(job)).await?;
            }
        }
        Ok(())
    }

    fn node_queue(&self, node: &NodeId) -> String {
        names::node_queue(&self.cluster, node)
    }

    fn queues_of(&self, set: &str) -> [String; 3] {
        let queues = names::queue_set(&self.cluster, set);
        [queues.inputs, queues.results, queues.logs]
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;
