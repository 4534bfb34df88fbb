//! The decision: what follows from how things stand.

use std::{collections::BTreeMap, time::Duration};

use burla_core::{
    clock::Millis,
    control::Capacity,
    ids::{JobId, NodeId},
    job::JobSpec,
};

use crate::{
    names,
    spec::{ClusterSpec, Pool},
    state::{Errand, Job, State},
};

/// How long a node's orders hold. They are renewed when half of it is over, so a node writes to
/// the state once a minute at most, however often clients ping.
pub const ORDERS_LEASE: Duration = Duration::from_secs(120);

/// How long a launched node may take until it reports.
pub const LAUNCH_TIME: Duration = Duration::from_secs(600);

/// How long a parked job waits for its client until it is cancelled.
pub const GRACE: Duration = Duration::from_secs(2 * 3600);

/// For so long a node that reported may be missing from the provider's list.
pub const LIST_LAG: Duration = Duration::from_secs(120);

/// How many queue sets are kept ready.
pub const SPARE_SETS: usize = 2;

/// All that a decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Snapshot<'a> {
    /// How things stand.
    pub state: &'a State,
    /// What the owner wants.
    pub spec: &'a ClusterSpec,
    /// The time.
    pub now: Millis,
    /// The provider's list, taken before the state was read; none if nobody asked for it.
    pub instances: Option<&'a [NodeId]>,
}

/// A decision. [`State::apply`] writes it down, together with the errand that it makes necessary.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Cancel a job whose client stayed away for too long.
    EndJob {
        /// The job.
        job: JobId,
    },
    /// Give up on the nodes that a launch has not brought.
    DropIntent {
        /// The intent.
        intent: String,
    },
    /// Tell a node all that it is to do.
    Orders {
        /// The node.
        node: NodeId,
        /// Greater than that of any orders before.
        generation: u64,
        /// Until when they hold.
        lease: Millis,
        /// How many slots each job has on it.
        slots: BTreeMap<JobId, u32>,
    },
    /// Launch nodes.
    Launch {
        /// The id of the intent.
        intent: String,
        /// Of which pool.
        pool: String,
        /// How many.
        count: u32,
        /// Until when they have to report.
        expires: Millis,
    },
    /// End a node, or forget one that has ended by itself.
    Terminate {
        /// The node.
        node: NodeId,
    },
    /// Make a queue set ahead.
    MakeQueueSet {
        /// Its name.
        set: String,
    },
}

/// Decides what is to be done. No IO, no clock and no chance; with its actions applied, the same
/// snapshot asks for nothing more.
#[must_use]
pub fn plan(snapshot: &Snapshot<'_>) -> Vec<Action> {
    let mut planner = Planner {
        spec: snapshot.spec,
        now: snapshot.now,
        state: snapshot.state.clone(),
        actions: Vec::new(),
    };
    planner.end_abandoned_jobs();
    planner.drop_expired_intents();
    if let Some(instances) = snapshot.instances {
        planner.compare_with(instances);
    }
    planner.give_out_slots();
    planner.launch_missing_nodes();
    planner.end_idle_nodes();
    planner.make_spare_queue_sets();
    planner.actions
}

struct Planner<'a> {
    spec: &'a ClusterSpec,
    now: Millis,
    /// As it will be once `actions` are applied.
    state: State,
    actions: Vec<Action>,
}

impl Planner<'_> {
    fn act(&mut self, action: Action) {
        self.state.apply(&action, self.now);
        self.actions.push(action);
    }

    fn end_abandoned_jobs(&mut self) {
        let abandoned = |job: &Job| self.now >= job.lease.plus(GRACE);
        let jobs: Vec<JobId> =
            self.state.jobs.iter().filter(|(_, job)| abandoned(job)).map(|(id, _)| id.clone()).collect();
        jobs.into_iter().for_each(|job| self.act(Action::EndJob { job }));
    }

    fn drop_expired_intents(&mut self) {
        let expired = self.state.intents.iter().filter(|(_, intent)| intent.expires <= self.now);
        let expired: Vec<String> = expired.map(|(id, _)| id.clone()).collect();
        expired.into_iter().for_each(|intent| self.act(Action::DropIntent { intent }));
    }

    /// Ends machines that nobody asked for (any more), and forgets nodes that are gone.
    fn compare_with(&mut self, instances: &[NodeId]) {
        let state = &self.state;
        let known = |node: &NodeId| {
            state.nodes.contains_key(node)
                || state.intents.contains_key(names::intent_of(node))
                || state.errands.contains(&Errand::Terminate { node: node.clone() })
        };
        let stray = instances.iter().filter(|node| !known(node));
        let settled = state.nodes.iter().filter(|(_, node)| self.now.since(node.ready_since) > LIST_LAG);
        let gone = settled.map(|(id, _)| id).filter(|id| !instances.contains(id));
        let nodes: Vec<NodeId> = stray.chain(gone).cloned().collect();
        nodes.into_iter().for_each(|node| self.act(Action::Terminate { node }));
    }

    /// Jobs keep the slots that they have; what is free goes to jobs in the order in which they
    /// came, and a parked job has none.
    fn give_out_slots(&mut self) {
        let mut slots_on: BTreeMap<NodeId, BTreeMap<JobId, u32>> = BTreeMap::new();
        for (id, node) in &self.state.nodes {
            let mut slots = node.slots.clone();
            slots.retain(|job, _| self.state.jobs.get(job).is_some_and(|job| job.is_active(self.now)));
            slots_on.insert(id.clone(), slots);
        }
        let mut free = self.free(&slots_on);
        for (id, job) in active_jobs(&self.state, self.now) {
            let has: u32 = slots_on.values().filter_map(|slots| slots.get(id)).sum();
            let mut wants = job.wanted().saturating_sub(has);
            for (node, slots) in &mut slots_on {
                let got = take(free.get_mut(node).expect("has the same nodes"), &job.spec, wants);
                if got > 0 {
                    *slots.entry(id.clone()).or_default() += got;
                    wants -= got;
                }
            }
        }
        self.order(slots_on);
    }

    fn free(&self, slots_on: &BTreeMap<NodeId, BTreeMap<JobId, u32>>) -> BTreeMap<NodeId, Capacity> {
        let free = |(node, slots): (&NodeId, &BTreeMap<JobId, u32>)| {
            let mut free = self.state.nodes[node].capacity;
            for (job, &count) in slots {
                take(&mut free, &self.state.jobs[job].spec, count);
            }
            (node.clone(), free)
        };
        slots_on.iter().map(free).collect()
    }

    /// Sends orders to nodes whose work changes, or whose orders are about to run out.
    fn order(&mut self, slots_on: BTreeMap<NodeId, BTreeMap<JobId, u32>>) {
        for (node, slots) in slots_on {
            let entry = &self.state.nodes[&node];
            let runs_out = !slots.is_empty() && entry.lease.since(self.now) < ORDERS_LEASE / 2;
            if slots != entry.slots || runs_out {
                let generation = self.state.serial + 1;
                self.act(Action::Orders { node, generation, lease: self.now.plus(ORDERS_LEASE), slots });
            }
        }
    }

    /// Fills every pool up to its floor, then launches what jobs lack and nodes on their way
    /// won't bring.
    fn launch_missing_nodes(&mut self) {
        let pools = &self.spec.pools;
        let mut counts: Vec<u32> = pools.iter().map(|pool| self.state.nodes_of(&pool.name)).collect();
        let mut launches: Vec<u32> =
            pools.iter().zip(&counts).map(|(pool, &count)| pool.min_nodes.saturating_sub(count)).collect();
        let mut coming = Vec::new();
        for (i, pool) in pools.iter().enumerate() {
            counts[i] += launches[i];
            let on_their_way = self.state.intents.values().filter(|intent| intent.pool == pool.name);
            let on_their_way: u32 = on_their_way.map(|intent| intent.coming()).sum();
            coming.extend(std::iter::repeat_n(pool.node, (on_their_way + launches[i]) as usize));
        }
        for (id, job) in active_jobs(&self.state, self.now) {
            let mut wants = job.wanted().saturating_sub(self.state.slots_of(id));
            for free in &mut coming {
                wants -= take(free, &job.spec, wants);
            }
            let fits = |(i, pool): (usize, &Pool), counts: &[u32]| {
                counts[i] < pool.max_nodes && pool.node.slots(job.spec.cpu, job.spec.ram) > 0
            };
            while wants > 0
                && let Some(i) = pools.iter().enumerate().position(|pool| fits(pool, &counts))
            {
                (counts[i], launches[i]) = (counts[i] + 1, launches[i] + 1);
                coming.push(pools[i].node);
                wants -= take(coming.last_mut().expect("pushed just now"), &job.spec, wants);
            }
        }
        for (pool, count) in pools.iter().zip(launches).filter(|(_, count)| *count > 0) {
            let (intent, expires) = (self.state.next_id(), self.now.plus(LAUNCH_TIME));
            self.act(Action::Launch { intent, pool: pool.name.clone(), count, expires });
        }
    }

    fn end_idle_nodes(&mut self) {
        let mut up: BTreeMap<&str, u32> = BTreeMap::new();
        for node in self.state.nodes.values() {
            *up.entry(&node.pool).or_default() += 1;
        }
        let mut idle = Vec::new();
        for (id, node) in self.state.nodes.iter().filter(|(_, node)| node.slots.is_empty()) {
            let pool = self.spec.pool(&node.pool);
            let (stays, least) = pool.map_or((Duration::ZERO, 0), |pool| (pool.idle(), pool.min_nodes));
            let up = up.get_mut(node.pool.as_str()).expect("counted above");
            if *up > least && self.now.since(node.idle_since) >= stays {
                *up -= 1;
                idle.push(id.clone());
            }
        }
        idle.into_iter().for_each(|node| self.act(Action::Terminate { node }));
    }

    fn make_spare_queue_sets(&mut self) {
        while self.state.spare.len() < SPARE_SETS {
            self.act(Action::MakeQueueSet { set: self.state.next_id() });
        }
    }
}

/// Jobs whose client is there, in the order in which they came.
fn active_jobs(state: &State, now: Millis) -> Vec<(&JobId, &Job)> {
    let mut jobs: Vec<_> = state.jobs.iter().filter(|(_, job)| job.is_active(now)).collect();
    jobs.sort_by_key(|(_, job)| job.number);
    jobs
}

/// Takes at most `most` slots for `job` out of what is free, and answers how many.
fn take(free: &mut Capacity, job: &JobSpec, most: u32) -> u32 {
    let slots = free.slots(job.cpu, job.ram).min(most);
    free.cpus -= f64::from(slots) * job.cpu;
    free.memory = free.memory.saturating_sub(u64::from(slots).saturating_mul(job.ram.unwrap_or(0)));
    slots
}

#[cfg(test)]
mod tests {
    use burla_core::control::JOB_LEASE;

    use super::*;
    use crate::testing::job_spec;

    const GIB: u64 = 1 << 30;

    /// A cluster on paper: actions are applied as soon as they are planned.
    struct Paper {
        state: State,
        spec: ClusterSpec,
        now: Millis,
    }

    impl Paper {
        fn new(min_nodes: u32, max_nodes: u32) -> Self {
            let node = Capacity { cpus: 4.0, memory: 8 * GIB };
            let pool = Pool { name: "only".into(), min_nodes, max_nodes, idle: 300, node };
            let spec = ClusterSpec { name: "test".into(), pools: vec![pool] };
            Self { state: State::new("s".into()), spec, now: Millis(1_000_000) }
        }

        fn snapshot<'a>(&'a self, instances: Option<&'a [NodeId]>) -> Snapshot<'a> {
            Snapshot { state: &self.state, spec: &self.spec, now: self.now, instances }
        }

        /// Plans, leaving out the spare queue sets, and checks that planning again adds nothing.
        fn step_with(&mut self, instances: Option<&[NodeId]>) -> Vec<Action> {
            let mut actions = plan(&self.snapshot(instances));
            for action in &actions {
                self.state.apply(action, self.now);
            }
            assert_eq!(plan(&self.snapshot(instances)), [], "after {actions:?}");
            actions.retain(|action| !matches!(action, Action::MakeQueueSet { .. }));
            actions
        }

        fn step(&mut self) -> Vec<Action> {
            self.step_with(None)
        }

        fn start(&mut self, id: &str, cpu: f64, ram: Option<u64>, most: Option<u32>) -> JobId {
            let job = JobId(id.into());
            self.state.start(&job, &job_spec(cpu, ram, most), self.now);
            job
        }

        /// Lets a node of the only intent report.
        fn ready(&mut self, suffix: &str) -> NodeId {
            let intent = self.state.intents.keys().next().unwrap();
            let node = names::node_id(intent, suffix);
            assert!(self.state.node_ready(&node, self.spec.pools[0].node, self.now));
            node
        }

        /// A cluster of one ready node, before anything runs on it.
        fn with_node(max_nodes: u32) -> (Self, NodeId) {
            let mut paper = Self::new(1, max_nodes);
            paper.step();
            let node = paper.ready("0");
            (paper, node)
        }

        fn wait(&mut self, duration: Duration) {
            self.now = self.now.plus(duration);
        }

        fn ping(&mut self, job: &JobId) {
            self.state.jobs.get_mut(job).unwrap().lease = self.now.plus(JOB_LEASE);
        }
    }

    /// The slots in the only action, which has to be orders.
    fn slots(actions: &[Action]) -> Vec<(&str, u32)> {
        match actions {
            [Action::Orders { slots, .. }] => slots.iter().map(|(job, n)| (job.0.as_str(), *n)).collect(),
            other => panic!("not just orders: {other:?}"),
        }
    }

    fn launched(actions: &[Action]) -> u32 {
        actions.iter().map(|action| if let Action::Launch { count, .. } = action { *count } else { 0 }).sum()
    }

    #[test]
    fn a_fresh_cluster_launches_what_the_job_needs() {
        for (max_parallelism, max_nodes, expected) in
            [(Some(1), 4, 1), (Some(4), 4, 1), (Some(5), 4, 2), (Some(100), 4, 4), (None, 3, 3)]
        {
            let mut paper = Paper::new(0, max_nodes);
            assert_eq!(paper.step(), []);
            paper.start("a", 1.0, None, max_parallelism);
            assert_eq!(launched(&paper.step()), expected, "{max_parallelism:?}");
        }
    }

    #[test]
    fn a_node_that_reports_gets_orders_and_its_intent_ends_with_the_last() {
        let mut paper = Paper::new(0, 2);
        paper.start("a", 1.0, None, None);
        assert_eq!(launched(&paper.step()), 2);
        let first = paper.ready("0");
        assert_eq!(slots(&paper.step()), [("a", 4)]);
        assert_eq!(paper.state.nodes_of("only"), 2);
        paper.ready("1");
        assert_eq!(slots(&paper.step()), [("a", 4)]);
        assert!(paper.state.intents.is_empty());
        let orders = paper.state.orders(&first, "test").unwrap();
        assert_eq!((orders.assignments[0].slots, orders.assignments.len()), (4, 1));
        assert!(orders.assignments[0].queues.inputs.starts_with("burla-test-s"));
    }

    #[test]
    fn slots_are_bounded_by_cpu_memory_and_max_parallelism() {
        for (cpu, ram, most, expected) in [
            (1.0, None, None, 4),
            (0.5, None, None, 8),
            (3.0, None, None, 1),
            (0.1, None, None, 40),
            (1.0, Some(3 * GIB), None, 2),
            (1.0, Some(8 * GIB), None, 1),
            (1.0, None, Some(3), 3),
        ] {
            let (mut paper, _) = Paper::with_node(1);
            paper.start("a", cpu, ram, most);
            assert_eq!(slots(&paper.step()), [("a", expected)], "{cpu} {ram:?} {most:?}");
        }
    }

    #[test]
    fn jobs_share_first_come_first_served_and_the_end_of_one_frees_its_slots() {
        let (mut paper, _) = Paper::with_node(1);
        let z = paper.start("z", 1.0, Some(3 * GIB), Some(1));
        assert_eq!(slots(&paper.step()), [("z", 1)]);
        paper.start("a", 1.0, Some(2 * GIB), None);
        paper.start("b", 0.5, None, None);
        assert_eq!(slots(&paper.step()), [("a", 2), ("b", 2), ("z", 1)]);
        paper.state.end(&z, false, paper.now);
        assert_eq!(slots(&paper.step()), [("a", 3), ("b", 2)]);
    }

    #[test]
    fn a_job_that_gets_nothing_launches_a_node_if_there_may_be_one() {
        let (mut paper, _) = Paper::with_node(2);
        paper.start("a", 1.0, None, Some(4));
        paper.step();
        paper.start("b", 1.0, None, Some(1));
        assert_eq!(launched(&paper.step()), 1);
        paper.start("c", 1.0, None, Some(1));
        assert_eq!(paper.step(), [], "the node on its way has room for it");
        paper.start("d", 1.0, None, Some(10));
        assert_eq!(paper.step(), [], "max_nodes is reached");
    }

    #[test]
    fn a_job_goes_to_the_first_pool_that_fits() {
        let mut paper = Paper::new(0, 1);
        let node = Capacity { cpus: 16.0, memory: 64 * GIB };
        paper.spec.pools.push(Pool { name: "large".into(), node, ..paper.spec.pools[0].clone() });
        paper.start("a", 8.0, None, Some(1));
        assert!(matches!(&paper.step()[..], [Action::Launch { pool, count: 1, .. }] if pool == "large"));
        paper.start("b", 1.0, None, Some(4));
        assert_eq!(paper.step(), [], "the large node has room for it");
        paper.start("c", 1.0, None, Some(8));
        assert!(matches!(&paper.step()[..], [Action::Launch { pool, count: 1, .. }] if pool == "only"));
    }

    #[test]
    fn idle_nodes_end_and_min_nodes_stay() {
        let mut paper = Paper::new(1, 3);
        let job = paper.start("a", 1.0, None, None);
        assert_eq!(launched(&paper.step()), 3);
        for suffix in ["0", "1", "2"] {
            paper.ready(suffix);
        }
        paper.step();
        paper.state.end(&job, false, paper.now);
        assert!(paper.step().iter().all(|action| matches!(action, Action::Orders { .. })));
        paper.wait(Duration::from_secs(299));
        assert_eq!(paper.step(), []);
        paper.wait(Duration::from_secs(1));
        let ended = paper.step();
        assert!(ended.len() == 2 && ended.iter().all(|action| matches!(action, Action::Terminate { .. })));
        paper.wait(Duration::from_secs(1000));
        assert_eq!(paper.step(), []);
    }

    #[test]
    fn a_lost_client_parks_its_job_and_grace_ends_it() {
        let (mut paper, _) = Paper::with_node(1);
        let job = paper.start("a", 1.0, None, None);
        paper.step();
        paper.wait(JOB_LEASE);
        assert_eq!(slots(&paper.step()), []);
        assert!(paper.state.jobs.contains_key(&job), "it keeps its queues");
        paper.ping(&job);
        assert_eq!(slots(&paper.step()), [("a", 4)], "the client is back");

        paper.wait(JOB_LEASE + GRACE - Duration::from_secs(1));
        assert_eq!(slots(&paper.step()), []);
        paper.wait(Duration::from_secs(1));
        assert_eq!(paper.step(), [Action::EndJob { job: job.clone() }]);
        assert!(paper.state.ended(&job).unwrap().cancelled);
        let cleans_up = |errand: &Errand| matches!(errand, Errand::CleanUp { job: j, .. } if *j == job);
        assert!(paper.state.errands.iter().any(cleans_up));
    }

    #[test]
    fn orders_are_renewed_before_they_run_out_and_no_generation_comes_twice() {
        let (mut paper, _) = Paper::with_node(1);
        let job = paper.start("a", 1.0, None, None);
        let mut generations = Vec::new();
        for _ in 0..40 {
            for action in paper.step() {
                let Action::Orders { generation, lease, .. } = action else { panic!("{action:?}") };
                assert_eq!(lease, paper.now.plus(ORDERS_LEASE));
                generations.push(generation);
            }
            paper.wait(Duration::from_secs(15));
            paper.ping(&job);
        }
        assert!((8..=11).contains(&generations.len()), "about once a minute: {generations:?}");
        assert!(generations.is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn a_generation_outlives_its_node() {
        let mut paper = Paper::new(0, 2);
        paper.start("a", 1.0, None, None);
        paper.step();
        let node = paper.ready("0");
        paper.step();
        let before = paper.state.nodes[&node].generation;
        paper.wait(LIST_LAG + Duration::from_secs(1));
        paper.ping(&JobId("a".into()));
        paper.step_with(Some(&[]));
        assert!(!paper.state.nodes.contains_key(&node), "it is gone from the list");
        paper.ready("0");
        paper.step();
        assert!(paper.state.nodes[&node].generation > before);
    }

    #[test]
    fn the_list_may_lag_behind_and_strays_are_ended() {
        let (mut paper, node) = Paper::with_node(2);
        paper.start("a", 1.0, None, None);
        assert_eq!(launched(&paper.step()), 1);
        let coming = names::node_id(paper.state.intents.keys().next().unwrap(), "0");
        let stray = names::node_id("old", "0");
        let actions = paper.step_with(Some(&[coming.clone(), stray.clone()]));
        assert_eq!(actions, [Action::Terminate { node: stray }], "{node} reported a moment ago");
        paper.wait(LIST_LAG + Duration::from_secs(1));
        paper.ping(&JobId("a".into()));
        let actions = paper.step_with(Some(&[coming]));
        assert_eq!(actions[0], Action::Terminate { node });
        assert_eq!(launched(&actions), 1, "its place is taken");
    }

    #[test]
    fn nodes_that_never_come_are_asked_for_anew() {
        let mut paper = Paper::new(1, 1);
        assert_eq!(launched(&paper.step()), 1);
        paper.wait(LAUNCH_TIME);
        let actions = paper.step();
        assert!(matches!(actions[0], Action::DropIntent { .. }));
        assert_eq!(launched(&actions), 1);
        assert_eq!(paper.state.errands.iter().filter(|e| matches!(e, Errand::Launch { .. })).count(), 1);
    }

    #[test]
    fn spare_queue_sets_are_used_once() {
        let mut paper = Paper::new(0, 1);
        paper.step();
        assert_eq!(paper.state.spare.len(), SPARE_SETS);
        let sets: Vec<String> = (0..4)
            .map(|i| {
                let job = paper.start(&i.to_string(), 1.0, None, None);
                if i % 2 == 0 {
                    paper.step();
                }
                paper.state.jobs[&job].set.clone()
            })
            .collect();
        assert_eq!(sets.iter().collect::<std::collections::BTreeSet<_>>().len(), 4);
    }
}
