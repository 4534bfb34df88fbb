//! `cluster/state`: the one object that says which node works for which job.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use burla_core::{
    clock::Millis,
    control::{Capacity, JOB_LEASE},
    envelope::{Assignment, Orders},
    ids::{JobId, NodeId},
    job::JobSpec,
};
use serde::{Deserialize, Serialize};

use crate::{names, plan::Action};

/// The version of [`State`] that this program writes and the only one that it reads.
pub const VERSION: u32 = 1;

/// How long ended jobs are remembered, so that a late ping learns how its job ended and a late
/// repetition of a start does not bring it back.
pub const ENDED_KEPT: Duration = Duration::from_secs(3600);

/// How many ended jobs are remembered at most: the state is read and written whole.
pub const ENDED_MOST: usize = 256;

/// All that main_service knows between two requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// See [`VERSION`].
    pub version: u32,
    /// Random, chosen when the state was first written: what its ids begin with, so that a cluster
    /// that is made anew under the same name meets nothing of the old one.
    pub name: String,
    /// Grows with every id, generation and place in the line of jobs that is given out.
    pub serial: u64,
    /// Nodes that take orders.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Launches that were decided and have not all come up; each counts as so many nodes.
    pub intents: BTreeMap<String, Intent>,
    /// Jobs that have not ended.
    pub jobs: BTreeMap<JobId, Job>,
    /// Jobs that have, the latest last.
    pub ended: VecDeque<Ended>,
    /// Queue sets made ahead.
    pub spare: VecDeque<String>,
    /// What was decided and is not known to be done.
    pub errands: BTreeSet<Errand>,
}

/// A node that takes orders.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its pool.
    pub pool: String,
    /// What it has.
    pub capacity: Capacity,
    /// When it first reported.
    pub ready_since: Millis,
    /// Since when it has had no work; means nothing while it has.
    pub idle_since: Millis,
    /// Of its latest orders; 0 before the first.
    pub generation: u64,
    /// Until when its latest orders hold.
    pub lease: Millis,
    /// Its latest orders: how many slots each job has on it.
    pub slots: BTreeMap<JobId, u32>,
}

/// A launch that was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    /// The pool of the nodes.
    pub pool: String,
    /// How many were asked for.
    pub count: u32,
    /// How many of them have reported.
    pub up: u32,
    /// What has not come by then is given up.
    pub expires: Millis,
    /// Why the last attempt to launch failed, if it did.
    pub problem: Option<String>,
}

impl Intent {
    /// How many of its nodes are still to come.
    #[must_use]
    pub fn coming(&self) -> u32 {
        self.count.saturating_sub(self.up)
    }
}

/// A job that has not ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// What it runs.
    pub spec: JobSpec,
    /// The name of its queue set, see [`names::queue_set`].
    pub set: String,
    /// Its place in the line: jobs get slots in the order in which they came.
    pub number: u64,
    /// Until when its client is taken to be there. Once it is over the job is parked: it keeps
    /// its queues and objects and has no slots.
    pub lease: Millis,
}

impl Job {
    /// Whether its client is there.
    #[must_use]
    pub fn is_active(&self, now: Millis) -> bool {
        self.lease > now
    }

    /// How many slots it would use.
    #[must_use]
    pub fn wanted(&self) -> u32 {
        self.spec.max_parallelism.unwrap_or(u32::MAX)
    }
}

/// What is left of a job that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Which job.
    pub job: JobId,
    /// The name of the queue set that it had.
    pub set: String,
    /// When it ended.
    pub at: Millis,
    /// Whether it was cancelled, by somebody or because its client stayed away.
    pub cancelled: bool,
}

/// Something to do outside of the state. It may be done any number of times.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "errand", rename_all = "snake_case")]
pub enum Errand {
    /// Make the queues of a set.
    MakeQueueSet {
        /// Its name.
        set: String,
    },
    /// Make a node's control queue.
    MakeNodeQueue {
        /// The node.
        node: NodeId,
    },
    /// Launch what an intent asks for.
    Launch {
        /// The intent.
        intent: String,
    },
    /// Send a node its orders.
    Orders {
        /// The node.
        node: NodeId,
        /// Their generation; an errand for an earlier one is dropped.
        generation: u64,
    },
    /// End a node and delete its control queue.
    Terminate {
        /// The node.
        node: NodeId,
    },
    /// Delete what an ended job leaves behind: its queues and objects.
    CleanUp {
        /// The job.
        job: JobId,
        /// Its queue set.
        set: String,
    },
}

impl State {
    /// The state of a cluster in which nothing has happened.
    #[must_use]
    pub fn new(name: String) -> Self {
        Self {
            version: VERSION,
            name,
            serial: 0,
            nodes: BTreeMap::new(),
            intents: BTreeMap::new(),
            jobs: BTreeMap::new(),
            ended: VecDeque::new(),
            spare: VecDeque::new(),
            errands: BTreeSet::new(),
        }
    }

    /// The id that the next thing to be named gets. It has no dash, so that a node's id can be
    /// taken apart again.
    #[must_use]
    pub fn next_id(&self) -> String {
        format!("{}{}", self.name, self.serial + 1)
    }

    /// Puts a job at the end of the line, with a queue set of its own. One that is parked goes on,
    /// and one that has ended stays as it is.
    pub fn start(&mut self, id: &JobId, spec: &JobSpec, now: Millis) {
        if let Some(job) = self.jobs.get_mut(id) {
            if !job.is_active(now) {
                job.lease = now.plus(JOB_LEASE);
            }
            return;
        }
        if self.ended(id).is_some() {
            return;
        }
        if self.spare.is_empty() {
            self.make_queue_set(self.next_id());
        }
        let set = self.spare.pop_front().expect("one was made just now");
        self.serial += 1;
        let job = Job { spec: spec.clone(), set, number: self.serial, lease: now.plus(JOB_LEASE) };
        self.jobs.insert(id.clone(), job);
    }

    /// Ends a job, if it has not ended. Its slots are taken from it by the next plan.
    pub fn end(&mut self, id: &JobId, cancelled: bool, now: Millis) {
        let Some(job) = self.jobs.remove(id) else { return };
        self.errands.insert(Errand::CleanUp { job: id.clone(), set: job.set.clone() });
        self.ended.push_back(Ended { job: id.clone(), set: job.set, at: now, cancelled });
        let old = |ended: &Ended| now.since(ended.at) > ENDED_KEPT;
        while self.ended.len() > ENDED_MOST || self.ended.front().is_some_and(old) {
            self.ended.pop_front();
        }
    }

    /// What is remembered of a job that has ended.
    #[must_use]
    pub fn ended(&self, id: &JobId) -> Option<&Ended> {
        self.ended.iter().find(|ended| ended.job == *id)
    }

    /// Takes in a node that reports. Answers whether it was asked for; if not, it is ended.
    pub fn node_ready(&mut self, id: &NodeId, capacity: Capacity, now: Millis) -> bool {
        if let Some(node) = self.nodes.get_mut(id) {
            if node.capacity != capacity {
                node.capacity = capacity;
                node.slots.clear();
            }
            // Its agent may have restarted and know nothing.
            let generation = node.generation;
            self.errands.insert(Errand::MakeNodeQueue { node: id.clone() });
            self.errands.insert(Errand::Orders { node: id.clone(), generation });
            return true;
        }
        let Some(intent) = self.intents.get_mut(names::intent_of(id)) else {
            self.errands.insert(Errand::Terminate { node: id.clone() });
            return false;
        };
        intent.up += 1;
        let pool = intent.pool.clone();
        if intent.coming() == 0 {
            self.drop_intent(names::intent_of(id));
        }
        self.errands.insert(Errand::MakeNodeQueue { node: id.clone() });
        let node = Node {
            pool,
            capacity,
            ready_since: now,
            idle_since: now,
            generation: 0,
            lease: now,
            slots: BTreeMap::new(),
        };
        self.nodes.insert(id.clone(), node);
        true
    }

    /// How many nodes of a pool there are or will be.
    #[must_use]
    pub fn nodes_of(&self, pool: &str) -> u32 {
        let up = self.nodes.values().filter(|node| node.pool == pool).count() as u32;
        let coming = self.intents.values().filter(|intent| intent.pool == pool).map(Intent::coming);
        up + coming.sum::<u32>()
    }

    /// How many slots a job has.
    #[must_use]
    pub fn slots_of(&self, job: &JobId) -> u32 {
        self.nodes.values().filter_map(|node| node.slots.get(job)).sum()
    }

    /// The latest orders of a node.
    #[must_use]
    pub fn orders(&self, id: &NodeId, cluster: &str) -> Option<Orders> {
        let node = self.nodes.get(id)?;
        let assignments = node.slots.iter().filter_map(|(id, &slots)| {
            let job = self.jobs.get(id)?;
            let queues = names::queue_set(cluster, &job.set);
            Some(Assignment { job: id.clone(), spec: job.spec.clone(), queues, slots })
        });
        Some(Orders {
            node: id.clone(),
            generation: node.generation,
            lease: node.lease,
            assignments: assignments.collect(),
        })
    }

    /// Writes down what an action decides.
    pub fn apply(&mut self, action: &Action, now: Millis) {
        match action {
            Action::EndJob { job } => self.end(job, true, now),
            Action::DropIntent { intent } => self.drop_intent(intent),
            Action::MakeQueueSet { set } => self.make_queue_set(set.clone()),
            Action::Launch { intent, pool, count, expires } => {
                self.serial += 1;
                let entry =
                    Intent { pool: pool.clone(), count: *count, up: 0, expires: *expires, problem: None };
                self.intents.insert(intent.clone(), entry);
                self.errands.insert(Errand::Launch { intent: intent.clone() });
            }
            Action::Terminate { node } => {
                self.nodes.remove(node);
                self.errands.retain(|errand| errand.node() != Some(node));
                self.errands.insert(Errand::Terminate { node: node.clone() });
            }
            Action::Orders { node, generation, lease, slots } => {
                self.serial += 1;
                let Some(entry) = self.nodes.get_mut(node) else { return };
                if slots.is_empty() && !entry.slots.is_empty() {
                    entry.idle_since = now;
                }
                (entry.generation, entry.lease) = (*generation, *lease);
                entry.slots.clone_from(slots);
                self.errands.retain(|errand| !matches!(errand, Errand::Orders { node: n, .. } if n == node));
                self.errands.insert(Errand::Orders { node: node.clone(), generation: *generation });
            }
        }
    }

    fn make_queue_set(&mut self, set: String) {
        self.serial += 1;
        self.errands.insert(Errand::MakeQueueSet { set: set.clone() });
        self.spare.push_back(set);
    }

    fn drop_intent(&mut self, intent: &str) {
        self.intents.remove(intent);
        self.errands.retain(|errand| !matches!(errand, Errand::Launch { intent: i } if i == intent));
    }
}

impl Errand {
    /// The node that it is about, if it is about one.
    #[must_use]
    pub fn node(&self) -> Option<&NodeId> {
        match self {
            Self::MakeNodeQueue { node } | Self::Orders { node, .. } | Self::Terminate { node } => Some(node),
            Self::MakeQueueSet { .. } | Self::Launch { .. } | Self::CleanUp { .. } => None,
        }
    }
}
