//! main_service itself: answers requests, and does what was decided.

use std::sync::Arc;

use async_trait::async_trait;
use burla_core::{
    clock::{Clock, Millis},
    control::{Capacity, Control, Error, JOB_LEASE, JobStatus, Reply, Request},
    ids::{JobId, NodeId},
    job::JobSpec,
    queue::Queue,
    store::ObjectStore,
};

use crate::{
    errands::{Hands, Outcome},
    ledger::{Ledger, unavailable},
    names,
    plan::{Snapshot, plan},
    provider::NodeProvider,
    spec::ClusterSpec,
    state::{Errand, Intent, State},
};

/// Answers requests. Any number of them may run on one cluster's queues and objects at once.
pub struct MainService {
    spec: ClusterSpec,
    ledger: Ledger,
    hands: Hands,
}

impl MainService {
    /// A service on these seams. `seed` has to differ from that of every other service.
    #[must_use]
    pub fn new(
        queue: Arc<dyn Queue>,
        store: Arc<dyn ObjectStore>,
        provider: Arc<dyn NodeProvider>,
        clock: Arc<dyn Clock>,
        spec: ClusterSpec,
        seed: u64,
    ) -> Self {
        let ledger = Ledger::new(store.clone(), clock, seed);
        let hands = Hands { cluster: spec.name.as_str().into(), queue, store, provider };
        Self { spec, ledger, hands }
    }

    /// Only what this job needs at once is done before the reply, and it is not noted as done:
    /// that would be one more round trip before the first result. The next ping does both.
    async fn start(&self, job: &JobId, spec: &JobSpec) -> Result<Reply, Error> {
        if !names::is_safe(&job.0) {
            let message = format!("{:?} is no job id: at most 40 letters, digits, - and _", job.0);
            return Err(Error::Impossible { message });
        }
        if let Some(message) = self.spec.refusal(spec) {
            return Err(Error::Impossible { message });
        }
        let (mut state, ()) = self.decide(None, |state, now| state.start(job, spec, now)).await?;
        let needed = state.errands.iter().filter(|errand| is_for(errand, job, &state)).cloned().collect();
        let outcome = self.hands.run(&state, needed).await;
        if !outcome.launch_problems().is_empty() {
            state = self.note(&outcome).await?;
        }
        outcome.check()?;
        self.status(&state, job)
    }

    /// The lease is written first and taken back if the job has ended: the other way round, one
    /// written just after the end would stay for ever.
    async fn ping(&self, job: &JobId, now: Millis) -> Result<Reply, Error> {
        if !names::is_safe(&job.0) {
            return Err(Error::UnknownJob { job: job.clone() });
        }
        let until = now.plus(JOB_LEASE);
        self.ledger.put_lease(job, until).await?;
        let (state, ()) = self.decide(None, |_, _| ()).await?;
        if !state.jobs.contains_key(job) {
            self.ledger.delete_lease(job).await?;
        }
        let (state, _) = self.finish_errands(state).await?;
        self.status(&state, job)
    }

    /// What can't be deleted now is left to the sweep: for the client, the job has ended.
    async fn end(&self, job: &JobId, cancelled: bool) -> Result<Reply, Error> {
        let end = |state: &mut State, now| {
            let known = state.jobs.contains_key(job) || state.ended(job).is_some();
            state.end(job, cancelled, now);
            known
        };
        let (state, known) = self.decide(None, end).await?;
        self.finish_errands(state).await?;
        if known { Ok(Reply::Done) } else { Err(Error::UnknownJob { job: job.clone() }) }
    }

    async fn node_ready(&self, node: &NodeId, capacity: Capacity) -> Result<Reply, Error> {
        if !names::is_safe(&node.0) || !capacity.cpus.is_finite() {
            return Err(Error::Impossible { message: format!("{:?} is no node of this cluster", node.0) });
        }
        let (state, known) = self.decide(None, |state, now| state.node_ready(node, capacity, now)).await?;
        let (_, failures) = self.finish_errands(state).await?;
        if !known {
            let message = format!("node {node} was not asked for, or came too late; it is ended");
            return Err(Error::Impossible { message });
        }
        let own = failures.into_iter().find(|(errand, _)| errand.node() == Some(node));
        own.map_or(Ok(Reply::Done), |(_, error)| Err(unavailable(error)))
    }

    async fn sweep(&self) -> Result<Reply, Error> {
        let instances = self.hands.provider.list().await.map_err(unavailable)?;
        let (state, ()) = self.decide(Some(&instances), |_, _| ()).await?;
        let (_, failures) = self.finish_errands(state).await?;
        failures.into_iter().next().map_or(Ok(Reply::Done), |(_, error)| Err(unavailable(error)))
    }

    /// Changes the state, plans, and writes down what follows, all in one.
    async fn decide<T>(
        &self,
        instances: Option<&[NodeId]>,
        mut change: impl FnMut(&mut State, Millis) -> T,
    ) -> Result<(Arc<State>, T), Error> {
        let decision = |state: &mut State, now| {
            let answer = change(state, now);
            let actions = plan(&Snapshot { state, spec: &self.spec, now, instances });
            actions.iter().for_each(|action| state.apply(action, now));
            Ok(answer)
        };
        let (state, answer) = self.ledger.update(decision).await?;
        Ok((Arc::new(state), answer))
    }

    /// Runs every errand that is left, whoever left it, and notes those that are done. Answers the
    /// state after that and those that failed.
    async fn finish_errands(&self, state: Arc<State>) -> Result<(Arc<State>, Vec<(Errand, String)>), Error> {
        if state.errands.is_empty() {
            return Ok((state, Vec::new()));
        }
        let outcome = self.hands.run(&state, state.errands.clone()).await;
        let state = self.note(&outcome).await?;
        Ok((state, outcome.failed))
    }

    async fn note(&self, outcome: &Outcome) -> Result<Arc<State>, Error> {
        let problems = outcome.launch_problems();
        let note = |state: &mut State, _| {
            state.errands.retain(|errand| !outcome.done.contains(errand));
            for (id, intent) in &mut state.intents {
                if outcome.done.contains(&Errand::Launch { intent: id.clone() }) {
                    intent.problem = None;
                } else if let Some(problem) = problems.get(id.as_str()) {
                    intent.problem = Some((*problem).into());
                }
            }
            Ok(())
        };
        Ok(Arc::new(self.ledger.update(note).await?.0))
    }

    fn status(&self, state: &State, id: &JobId) -> Result<Reply, Error> {
        let (set, slots, waits_for, cancelled) = if state.jobs.contains_key(id) {
            let slots = state.slots_of(id);
            let waits_for = if slots == 0 { Some(waits_for(state, id)) } else { None };
            (&state.jobs[id].set, slots, waits_for, false)
        } else {
            let ended = state.ended(id).ok_or_else(|| Error::UnknownJob { job: id.clone() })?;
            (&ended.set, 0, None, ended.cancelled)
        };
        let queues = names::queue_set(&self.spec.name, set);
        Ok(Reply::Job(JobStatus { queues, slots, waits_for, cancelled }))
    }
}

#[async_trait]
impl Control for MainService {
    async fn call(&self, request: Request) -> Result<Reply, Error> {
        match request {
            Request::Start { job, spec } => self.start(&job, &spec).await,
            Request::Ping { job } => self.ping(&job, self.ledger.now()).await,
            Request::Finish { job } => self.end(&job, false).await,
            Request::Cancel { job } => self.end(&job, true).await,
            Request::NodeReady { node, capacity } => self.node_ready(&node, capacity).await,
            Request::Sweep => self.sweep().await,
        }
    }
}

/// Whether a job can't begin before this is done.
fn is_for(errand: &Errand, id: &JobId, state: &State) -> bool {
    match errand {
        Errand::MakeQueueSet { set } => state.jobs.get(id).is_some_and(|job| job.set == *set),
        Errand::Launch { .. } => true,
        Errand::Orders { node, .. } => state.nodes[node].slots.contains_key(id),
        Errand::MakeNodeQueue { .. } | Errand::Terminate { .. } | Errand::CleanUp { .. } => false,
    }
}

/// Why a job that is known has no slots, in one line.
fn waits_for(state: &State, id: &JobId) -> String {
    let up = state.nodes.len();
    let coming: u32 = state.intents.values().map(Intent::coming).sum();
    if coming > 0 {
        let problem = state.intents.values().find_map(|intent| intent.problem.as_ref());
        let problem = problem.map_or_else(String::new, |problem| format!(": {problem}"));
        return format!("{up} of {} nodes up{problem}", up + coming as usize);
    }
    let spec = &state.jobs[id].spec;
    let slots: u32 = state.nodes.values().map(|node| node.capacity.slots(spec.cpu, spec.ram)).sum();
    if slots > 0 {
        format!("{slots} of {slots} slots are busy with other jobs")
    } else {
        "no node that is up is large enough, and the cluster spec allows no more nodes".into()
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::Ordering, time::Duration};

    use burla_core::store::When;
    use tokio::task::JoinSet;

    use super::*;
    use crate::{
        plan::{GRACE, SPARE_SETS},
        testing::{TestCluster, job_spec, start},
    };

    fn finish(job: &str) -> Request {
        Request::Finish { job: JobId(job.into()) }
    }

    fn cancel(job: &str) -> Request {
        Request::Cancel { job: JobId(job.into()) }
    }

    fn slots(job: &str, n: u32) -> Option<Vec<(String, u32)>> {
        Some(vec![(job.into(), n)])
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_from_start_to_finish_leaves_nothing() {
        let cluster = TestCluster::new(1);
        let status = cluster.start("a").await.unwrap();
        assert_eq!((status.slots, status.waits_for.as_deref()), (0, Some("0 of 1 nodes up")));
        let node = cluster.all_ready().await.remove(0);
        assert_eq!(cluster.orders(&node).await, slots("a", 4));
        let status = cluster.ping("a").await.unwrap();
        assert_eq!((status.slots, status.waits_for), (4, None));
        cluster.store.put("jobs/a/inputs/0", "x".into(), When::Always).await.unwrap();

        assert_eq!(cluster.service.call(finish("a")).await, Ok(Reply::Done));
        assert_eq!(cluster.service.call(finish("a")).await, Ok(Reply::Done));
        assert_eq!(cluster.orders(&node).await, Some(vec![]));
        assert_eq!(cluster.job_objects().await, Vec::<String>::new());
        let state = cluster.state().await;
        assert!(state.jobs.is_empty() && state.errands.is_empty());
        assert_eq!(cluster.queue.names.lock().unwrap().len(), 3 * SPARE_SETS + 1);

        tokio::time::sleep(Duration::from_secs(300)).await;
        cluster.service.call(Request::Sweep).await.unwrap();
        assert!(cluster.provider.running.lock().unwrap().is_empty());
        assert_eq!(cluster.queue.names.lock().unwrap().len(), 3 * SPARE_SETS);
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_or_a_node_that_comes_twice_does_nothing_new() {
        let cluster = TestCluster::new(1);
        let first = cluster.start("a").await.unwrap();
        assert_eq!(cluster.start("a").await.unwrap(), first);
        let node = cluster.all_ready().await.remove(0);
        let status = cluster.start("a").await.unwrap();
        assert_eq!((status.slots, &status.queues), (4, &first.queues));
        assert_eq!(cluster.provider.launched.lock().unwrap().len(), 1);
        cluster.orders(&node).await;
        cluster.ready(&node).await.unwrap();
        assert_eq!(cluster.orders(&node).await, slots("a", 4), "a restarted agent is told again");
        cluster.service.call(finish("a")).await.unwrap();
        assert_eq!(cluster.start("a").await.unwrap().slots, 0, "a late repetition");
        assert!(cluster.state().await.jobs.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_warm_start_writes_the_state_once() {
        let cluster = TestCluster::new(1);
        cluster.start("a").await.unwrap();
        let node = cluster.all_ready().await.remove(0);
        cluster.service.call(finish("a")).await.unwrap();
        cluster.orders(&node).await;
        let before = cluster.state().await;
        assert_eq!(cluster.start("b").await.unwrap().slots, 4);
        assert_eq!(cluster.orders(&node).await, slots("b", 4));
        let set = &cluster.state().await.jobs[&JobId("b".into())].set;
        assert!(before.spare.contains(set));
        assert!(!cluster.state().await.errands.is_empty(), "left to the next ping");
        cluster.ping("b").await.unwrap();
        assert!(cluster.state().await.errands.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn services_that_race_launch_once() {
        for seed in 0..20 {
            let cluster = TestCluster::new(1);
            let services: Vec<_> = (0..4).map(|i| cluster.another(100 * seed + i)).collect();
            let mut tasks = JoinSet::new();
            for (i, service) in services.into_iter().enumerate() {
                tasks.spawn(async move { start(&service, &format!("job{}", i % 3)).await.unwrap() });
            }
            let sets: Vec<_> =
                tasks.join_all().await.into_iter().map(|status| status.queues.inputs).collect();
            assert_eq!(sets.iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
            assert_eq!(cluster.provider.launched.lock().unwrap().len(), 1);
            assert_eq!(cluster.state().await.jobs.len(), 3);
            assert!(cluster.store.conflicts.load(Ordering::Relaxed) >= 3, "they did race");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_swap_whose_answer_is_lost_is_not_repeated() {
        let cluster = TestCluster::new(1);
        cluster.store.faults.set(1);
        assert!(matches!(cluster.start("a").await, Err(Error::Unavailable { .. })));
        let before = cluster.state().await;
        cluster.start("a").await.unwrap();
        assert_eq!(cluster.state().await, before);
        assert_eq!(cluster.provider.launched.lock().unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_launch_that_fails_is_told_and_tried_again() {
        let cluster = TestCluster::new(1);
        cluster.provider.faults.set(1);
        let waits_for = cluster.start("a").await.unwrap().waits_for.unwrap();
        assert_eq!(waits_for, "0 of 1 nodes up: no capacity: on demand");
        cluster.service.call(Request::Sweep).await.unwrap();
        assert_eq!(cluster.provider.running.lock().unwrap().len(), 1);
        assert_eq!(cluster.ping("a").await.unwrap().waits_for.unwrap(), "0 of 1 nodes up");
    }

    /// Whatever call fails after the swap, the next request does what is left.
    #[tokio::test(start_paused = true)]
    async fn what_a_crash_leaves_over_is_mended() {
        let cluster = TestCluster::new(1);
        cluster.queue.faults.set(1);
        assert!(cluster.start("a").await.is_err(), "its queues could not be made");
        let status = cluster.start("a").await.unwrap();
        assert!(cluster.queue.names.lock().unwrap().contains(&status.queues.inputs));

        let node = cluster.provider.running.lock().unwrap().first().unwrap().clone();
        cluster.queue.faults.set(100);
        assert!(cluster.ready(&node).await.is_err(), "its queue could not be made");
        assert!(cluster.service.call(Request::Sweep).await.is_err());
        cluster.queue.faults.set(0);
        cluster.service.call(Request::Sweep).await.unwrap();
        assert_eq!(cluster.orders(&node).await, slots("a", 4));

        cluster.queue.faults.set(100);
        assert_eq!(cluster.service.call(cancel("a")).await, Ok(Reply::Done));
        assert!(cluster.queue.names.lock().unwrap().contains(&status.queues.inputs));
        cluster.queue.faults.set(0);
        cluster.service.call(Request::Sweep).await.unwrap();
        assert!(!cluster.queue.names.lock().unwrap().contains(&status.queues.inputs));
        assert_eq!(cluster.orders(&node).await, Some(vec![]));
        assert!(cluster.state().await.errands.is_empty());
    }

    /// A request whose caller goes away right after the swap has sent nothing.
    #[tokio::test(start_paused = true)]
    async fn a_decision_without_deeds_is_mended() {
        let cluster = TestCluster::new(1);
        let (job, spec) = (JobId("a".into()), job_spec(1.0, None, None));
        cluster.service.decide(None, |state, now| state.start(&job, &spec, now)).await.unwrap();
        assert!(cluster.provider.running.lock().unwrap().is_empty());
        cluster.service.call(Request::Sweep).await.unwrap();
        let node = cluster.all_ready().await.remove(0);
        assert_eq!(cluster.orders(&node).await, slots("a", 4));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_job_is_known_as_such() {
        let cluster = TestCluster::new(1);
        let queues = cluster.start("a").await.unwrap().queues;
        let node = cluster.all_ready().await.remove(0);
        assert_eq!(cluster.orders(&node).await, slots("a", 4));
        cluster.service.call(cancel("a")).await.unwrap();
        assert_eq!(cluster.orders(&node).await, Some(vec![]));
        let status = cluster.ping("a").await.unwrap();
        assert_eq!(status, JobStatus { queues, slots: 0, waits_for: None, cancelled: true });
        assert_eq!(cluster.job_objects().await, Vec::<String>::new(), "the ping left no lease");
        let unknown = Err(Error::UnknownJob { job: JobId("b".into()) });
        assert_eq!(cluster.service.call(cancel("b")).await, unknown);
        assert_eq!(cluster.ping("b").await.map(Reply::Job), unknown);
        assert_eq!(cluster.job_objects().await, Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn pings_keep_a_job_and_its_absence_parks_and_ends_it() {
        let cluster = TestCluster::new(1);
        cluster.start("a").await.unwrap();
        let node = cluster.all_ready().await.remove(0);
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_secs(15)).await;
            assert_eq!(cluster.ping("a").await.unwrap().slots, 4);
        }
        cluster.orders(&node).await;
        tokio::time::sleep(JOB_LEASE).await;
        cluster.service.call(Request::Sweep).await.unwrap();
        assert_eq!(cluster.orders(&node).await, Some(vec![]), "parked");
        assert_eq!(cluster.ping("a").await.unwrap().slots, 4, "and back");
        tokio::time::sleep(JOB_LEASE + GRACE).await;
        cluster.service.call(Request::Sweep).await.unwrap();
        assert!(cluster.ping("a").await.unwrap().cancelled);
        assert_eq!(cluster.job_objects().await, Vec::<String>::new());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_told_for_what() {
        let cluster = TestCluster::new(1);
        cluster.start("a").await.unwrap();
        cluster.all_ready().await;
        let waits_for = cluster.start("b").await.unwrap().waits_for;
        assert_eq!(waits_for.as_deref(), Some("4 of 4 slots are busy with other jobs"));
        cluster.service.call(finish("a")).await.unwrap();
        assert_eq!(cluster.ping("b").await.unwrap().slots, 4);
    }

    #[tokio::test(start_paused = true)]
    async fn what_makes_no_sense_is_refused_and_writes_nothing() {
        let cluster = TestCluster::new(1);
        let start = |id: &str, cpu| Request::Start {
            job: JobId(id.into()),
            spec: job_spec(cpu, Some(1 << 30), None),
        };
        let error = cluster.service.call(start("a", 64.0)).await.unwrap_err();
        let expected = "a call asks for 64 CPUs and 1 GiB; the largest node has 4 CPUs and 8 GiB";
        assert_eq!(error, Error::Impossible { message: expected.into() });
        assert!(cluster.service.call(start("../b", 1.0)).await.is_err());
        assert!(cluster.service.call(start("", 1.0)).await.is_err());
        assert!(cluster.store.get(names::STATE, None).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_nobody_asked_for_is_ended() {
        let cluster = TestCluster::new(1);
        let stray = names::node_id("stray", "0");
        cluster.provider.running.lock().unwrap().insert(stray.clone());
        assert!(matches!(cluster.ready(&stray).await, Err(Error::Impossible { .. })));
        assert!(cluster.provider.running.lock().unwrap().is_empty());
        assert!(cluster.state().await.nodes.is_empty());
    }

    #[tokio::test]
    async fn a_warm_start_and_finish_take_less_than_a_millisecond() {
        let cluster = TestCluster::new(1);
        cluster.start("a").await.unwrap();
        cluster.all_ready().await;
        cluster.service.call(finish("a")).await.unwrap();
        let (begin, mut starting) = (tokio::time::Instant::now(), Duration::ZERO);
        for i in 0..300 {
            let start = tokio::time::Instant::now();
            cluster.start(&i.to_string()).await.unwrap();
            starting += start.elapsed();
            cluster.service.call(finish(&i.to_string())).await.unwrap();
        }
        let (start, both) = (starting / 300, begin.elapsed() / 300);
        // Five times that, because the machine may be busy and this is not a benchmark.
        assert!(both < Duration::from_millis(5), "start {start:?}, with finish {both:?}");
    }
}
