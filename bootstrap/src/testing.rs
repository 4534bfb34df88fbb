//! What the tests share: seams that fail on demand, on paused time.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use burla_core::{
    clock::{Clock, Millis},
    control::{Capacity, Control, Error, JobStatus, Reply, Request},
    envelope::Orders,
    ids::{JobId, NodeId},
    job::{Function, JobSpec},
    queue::{self, Delivery, Queue, Receipt},
    store::{self, ETag, Entry, Object, ObjectStore, ObjectStoreExt, When},
    wire,
};
use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    names,
    provider::{self, Launch, NodeProvider},
    service::MainService,
    spec::{ClusterSpec, Pool},
    state::State,
};

/// A job that asks for so much.
pub(crate) fn job_spec(cpu: f64, ram: Option<u64>, max_parallelism: Option<u32>) -> JobSpec {
    JobSpec {
        function: Function::Command { argv: vec!["true".into()] },
        bundle: None,
        cpu,
        ram,
        max_parallelism,
        retries: 0,
        timeout: None,
        env: Default::default(),
        files: false,
    }
}

/// Tokio's time, which tests pause.
pub(crate) struct TokioClock(Instant);

impl Clock for TokioClock {
    fn now(&self) -> Millis {
        Millis(1_000_000).plus(self.0.elapsed())
    }
}

/// How many of the next calls fail.
#[derive(Default)]
pub(crate) struct Faults(AtomicU32);

impl Faults {
    pub(crate) fn set(&self, calls: u32) {
        self.0.store(calls, Ordering::Relaxed);
    }

    fn strikes(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
    }
}

/// The embedded queues, but for failures; remembers which there are.
#[derive(Default)]
pub(crate) struct TestQueue {
    inner: queue::Embedded,
    pub(crate) names: Mutex<BTreeSet<String>>,
    pub(crate) faults: Faults,
}

impl TestQueue {
    fn fail(&self) -> Result<(), queue::Error> {
        // Not `Unavailable`: senders would try that again by themselves.
        if self.faults.strikes() { Err(queue::Error::NoQueue("on demand".into())) } else { Ok(()) }
    }
}

#[async_trait]
impl Queue for TestQueue {
    async fn create(&self, queue: &str) -> Result<(), queue::Error> {
        self.fail()?;
        self.names.lock().unwrap().insert(queue.into());
        self.inner.create(queue).await
    }

    async fn delete(&self, queue: &str) -> Result<(), queue::Error> {
        self.fail()?;
        self.names.lock().unwrap().remove(queue);
        self.inner.delete(queue).await
    }

    async fn send(&self, queue: &str, bodies: &[Bytes]) -> Result<Vec<bool>, queue::Error> {
        self.fail()?;
        self.inner.send(queue, bodies).await
    }

    async fn receive(
        &self,
        queue: &str,
        max: usize,
        lease: Duration,
        wait: Duration,
    ) -> Result<Vec<Delivery>, queue::Error> {
        self.inner.receive(queue, max, lease, wait).await
    }

    async fn acknowledge(&self, queue: &str, receipts: &[Receipt]) -> Result<Vec<bool>, queue::Error> {
        self.inner.acknowledge(queue, receipts).await
    }

    async fn extend(
        &self,
        queue: &str,
        receipts: &[Receipt],
        lease: Duration,
    ) -> Result<Vec<bool>, queue::Error> {
        self.inner.extend(queue, receipts, lease).await
    }
}

/// The embedded store, but that a read takes time, so that services race, and that writes happen
/// and fail nevertheless.
#[derive(Default)]
pub(crate) struct TestStore {
    inner: store::Embedded,
    pub(crate) conflicts: AtomicU32,
    pub(crate) faults: Faults,
}

#[async_trait]
impl ObjectStore for TestStore {
    async fn put(&self, key: &str, content: Bytes, when: When) -> Result<ETag, store::Error> {
        let etag = self.inner.put(key, content, when).await;
        if let Err(store::Error::Precondition(_)) = etag {
            self.conflicts.fetch_add(1, Ordering::Relaxed);
        }
        if self.faults.strikes() { Err(store::Error::Unavailable("on demand".into())) } else { etag }
    }

    async fn upload(&self, key: &str, from: &Path) -> Result<(), store::Error> {
        self.inner.upload(key, from).await
    }

    async fn get(&self, key: &str, range: Option<Range<u64>>) -> Result<Object, store::Error> {
        let object = self.inner.get(key, range).await;
        tokio::task::yield_now().await;
        object
    }

    async fn download(&self, key: &str, to: &Path) -> Result<(), store::Error> {
        self.inner.download(key, to).await
    }

    async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Entry>, store::Error> {
        self.inner.list(prefix, after).await
    }

    async fn delete(&self, keys: &[String]) -> Result<(), store::Error> {
        self.inner.delete(keys).await
    }
}

/// Machines on paper.
#[derive(Default)]
pub(crate) struct TestProvider {
    /// By intent, with how many nodes.
    pub(crate) launched: Mutex<BTreeMap<String, u32>>,
    pub(crate) running: Mutex<BTreeSet<NodeId>>,
    pub(crate) faults: Faults,
}

impl TestProvider {
    fn fail(&self) -> Result<(), provider::Error> {
        if self.faults.strikes() { Err(provider::Error::NoCapacity("on demand".into())) } else { Ok(()) }
    }
}

#[async_trait]
impl NodeProvider for TestProvider {
    async fn launch(&self, launch: &Launch) -> Result<(), provider::Error> {
        self.fail()?;
        if self.launched.lock().unwrap().insert(launch.intent.clone(), launch.count).is_none() {
            let nodes = (0..launch.count).map(|i| names::node_id(&launch.intent, &i.to_string()));
            self.running.lock().unwrap().extend(nodes);
        }
        Ok(())
    }

    async fn list(&self) -> Result<Vec<NodeId>, provider::Error> {
        Ok(self.running.lock().unwrap().iter().cloned().collect())
    }

    async fn terminate(&self, node: &NodeId) -> Result<(), provider::Error> {
        self.fail()?;
        self.running.lock().unwrap().remove(node);
        Ok(())
    }
}

/// A cluster whose nodes are played by the test.
pub(crate) struct TestCluster {
    pub(crate) queue: Arc<TestQueue>,
    pub(crate) store: Arc<TestStore>,
    pub(crate) provider: Arc<TestProvider>,
    clock: Arc<TokioClock>,
    pub(crate) spec: ClusterSpec,
    pub(crate) service: MainService,
}

impl TestCluster {
    /// Of nodes with four CPUs.
    pub(crate) fn new(max_nodes: u32) -> Self {
        let node = Capacity { cpus: 4.0, memory: 8 << 30 };
        let pool = Pool { name: "only".into(), min_nodes: 0, max_nodes, idle: 300, node };
        let spec = ClusterSpec { name: "test".into(), pools: vec![pool] };
        let (queue, provider) = (Arc::<TestQueue>::default(), Arc::<TestProvider>::default());
        let (store, clock) = (Arc::new(TestStore::default()), Arc::new(TokioClock(Instant::now())));
        let service =
            MainService::new(queue.clone(), store.clone(), provider.clone(), clock.clone(), spec.clone(), 1);
        Self { queue, store, provider, clock, spec, service }
    }

    /// Another service on the same queues and objects.
    pub(crate) fn another(&self, seed: u64) -> MainService {
        let (queue, store) = (self.queue.clone(), self.store.clone());
        MainService::new(queue, store, self.provider.clone(), self.clock.clone(), self.spec.clone(), seed)
    }

    pub(crate) async fn start(&self, job: &str) -> Result<JobStatus, Error> {
        start(&self.service, job).await
    }

    pub(crate) async fn ping(&self, job: &str) -> Result<JobStatus, Error> {
        self.service.call(Request::Ping { job: JobId(job.into()) }).await.map(status)
    }

    pub(crate) async fn ready(&self, node: &NodeId) -> Result<Reply, Error> {
        let capacity = self.spec.pools[0].node;
        self.service.call(Request::NodeReady { node: node.clone(), capacity }).await
    }

    /// Lets every node that was launched report.
    pub(crate) async fn all_ready(&self) -> Vec<NodeId> {
        let nodes = self.provider.list().await.unwrap();
        for node in &nodes {
            self.ready(node).await.unwrap();
        }
        nodes
    }

    /// The slots in the newest orders that wait for a node, by job; `None` if none wait.
    pub(crate) async fn orders(&self, node: &NodeId) -> Option<Vec<(String, u32)>> {
        let queue = names::node_queue("test", node);
        let minute = Duration::from_secs(60);
        let mut newest: Option<Orders> = None;
        loop {
            let got = self.queue.receive(&queue, 10, minute, Duration::ZERO).await.unwrap();
            if got.is_empty() {
                let slots = |orders: Orders| orders.assignments.into_iter().map(|a| (a.job.0, a.slots));
                return newest.map(|orders| slots(orders).collect());
            }
            let receipts: Vec<Receipt> = got.iter().map(|delivery| delivery.receipt.clone()).collect();
            self.queue.acknowledge(&queue, &receipts).await.unwrap();
            for delivery in got {
                let (orders, _): (Orders, _) = wire::decode(&delivery.body).unwrap();
                assert_eq!(orders.node, *node);
                if newest.as_ref().is_none_or(|newest| orders.generation > newest.generation) {
                    newest = Some(orders);
                }
            }
        }
    }

    pub(crate) async fn state(&self) -> State {
        serde_json::from_slice(&self.store.get(names::STATE, None).await.unwrap().content).unwrap()
    }

    pub(crate) async fn job_objects(&self) -> Vec<String> {
        self.store.keys("jobs/").await.unwrap()
    }
}

pub(crate) async fn start(service: &MainService, job: &str) -> Result<JobStatus, Error> {
    let start = Request::Start { job: JobId(job.into()), spec: job_spec(1.0, None, None) };
    service.call(start).await.map(status)
}

fn status(reply: Reply) -> JobStatus {
    match reply {
        Reply::Job(status) => status,
        Reply::Done => panic!("no status"),
    }
}
