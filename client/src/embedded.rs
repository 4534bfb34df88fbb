//! A cluster in this process: the same main_service, agent and workers, on queues and objects in
//! memory. The one place that names their crates.

use std::{
    collections::HashMap,
    io,
    sync::{
        Arc, Mutex, OnceLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use burla_agent::{Agent, Config, Reenter, Scratch, Tasks};
use burla_bootstrap::{
    names,
    provider::{Error as ProviderError, Launch, NodeProvider},
    service::MainService,
    spec::{ClusterSpec, Pool},
};
use burla_core::{
    clock::Steady,
    control::{Capacity, Control, Request},
    ids::NodeId,
    queue::{self, Queue},
    store::{self, ObjectStore},
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{sync::watch, task::JoinHandle};

use crate::{cluster::Cluster, job::StartError};

/// The cluster's name in its queues' names.
const NAME: &str = "embedded";

/// How often main_service mends what was left undone.
const SWEEP: Duration = Duration::from_secs(60);

/// Whether [`init`] was called.
static INITIALISED: AtomicBool = AtomicBool::new(false);

/// To be called before anything else in `main`: the small processes of an embedded job are this
/// same program, and end in here.
pub fn init() {
    burla_agent::reenter();
    raise_descriptor_limit();
    INITIALISED.store(true, Ordering::Relaxed);
}

/// Every slot takes a few descriptors of this process, and the usual limit of 1024 is for programs
/// that call `select`. What calls start gets the old limit back.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    // Without it, a machine with very many slots says that there are too many open files.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// What runs in this process.
pub(crate) struct Services {
    nodes: Arc<Nodes>,
    sweep: JoinHandle<()>,
}

impl Services {
    /// Ends it all, and waits until it is gone.
    pub(crate) async fn shutdown(self) {
        self.nodes.stop.send_replace(true);
        let agents: Vec<JoinHandle<()>> =
            self.nodes.agents().drain().filter_map(|(_, agent)| agent).collect();
        for agent in agents {
            // One that panicked is gone as well.
            let _ = agent.await;
        }
        self.nodes.scratch.remove();
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        self.sweep.abort();
        self.nodes.stop.send_replace(true);
    }
}

impl Cluster {
    /// This machine: jobs run in this process and its children.
    pub async fn embedded() -> Result<Self, StartError> {
        if !INITIALISED.load(Ordering::Relaxed) {
            let message =
                "call burla::init() first of all in main: the processes of a job are this same program";
            return Err(StartError::Unavailable(message.into()));
        }
        let failed = |error: io::Error| StartError::Unavailable(error.to_string());
        let capacity = capacity().map_err(failed)?;
        let queue: Arc<dyn Queue> = Arc::new(queue::Embedded::new());
        let store: Arc<dyn ObjectStore> = Arc::new(store::Embedded::new());
        let clock = Arc::new(Steady::new());
        let nodes = Arc::new(Nodes {
            clock: clock.clone(),
            queue: queue.clone(),
            store: store.clone(),
            scratch: Arc::new(Scratch::new().map_err(failed)?),
            capacity,
            control: OnceLock::new(),
            agents: Mutex::default(),
            stop: watch::Sender::new(false),
        });
        // The one node is this machine: it never goes for lack of work.
        let pool = Pool { name: "here".into(), min_nodes: 1, max_nodes: 1, idle: 0, node: capacity };
        let spec = ClusterSpec { name: NAME.into(), pools: vec![pool] };
        let service = MainService::new(queue.clone(), store.clone(), nodes.clone(), clock.clone(), spec, 0);
        let control: Arc<dyn Control> = Arc::new(service);
        let _ = nodes.control.set(Arc::downgrade(&control));
        let sweep = tokio::spawn(sweep(Arc::downgrade(&control)));
        let embedded = Some(Services { nodes, sweep });
        let alive = watch::Sender::new(());
        Ok(Self { place: NAME, capacity: Some(capacity), queue, store, control, alive, embedded })
    }
}

async fn sweep(control: Weak<dyn Control>) {
    while let Some(control) = control.upgrade() {
        // A sweep that fails is made up for by the next.
        let _ = control.call(Request::Sweep).await;
        drop(control);
        tokio::time::sleep(SWEEP).await;
    }
}

/// What this machine has: the CPUs that this process may use, and the memory.
fn capacity() -> io::Result<Capacity> {
    let cpus = std::thread::available_parallelism()?.get() as f64;
    let info = rustix::system::sysinfo();
    let memory = info.totalram as u64 * u64::from(info.mem_unit.max(1));
    Ok(Capacity { cpus, memory: memory_limits().fold(memory, u64::min) })
}

/// Memory limits of the cgroups that this process is in: a container has less than its machine.
fn memory_limits() -> impl Iterator<Item = u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own: Vec<String> =
        groups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).map(str::to_owned).collect();
    let files = own.into_iter().chain([String::new()]).flat_map(|path| {
        let path = path.trim_matches('/').to_owned();
        [
            format!("/sys/fs/cgroup/{path}/memory.max"),
            format!("/sys/fs/cgroup/memory/{path}/memory.limit_in_bytes"),
        ]
    });
    files.filter_map(|file| std::fs::read_to_string(file).ok()?.trim().parse().ok())
}

/// The machines of an embedded cluster: agents as tasks of this process.
struct Nodes {
    queue: Arc<dyn Queue>,
    store: Arc<dyn ObjectStore>,
    scratch: Arc<Scratch>,
    capacity: Capacity,
    clock: Arc<Steady>,
    /// The service that the nodes are launched by: known only after it was made with them.
    control: OnceLock<Weak<dyn Control>>,
    /// Every node that was ever launched, so that none is launched twice; with its agent while it lives.
    agents: Mutex<HashMap<NodeId, Option<JoinHandle<()>>>>,
    /// Says that all of them are to end.
    stop: watch::Sender<bool>,
}

impl Nodes {
    fn agents(&self) -> std::sync::MutexGuard<'_, HashMap<NodeId, Option<JoinHandle<()>>>> {
        self.agents.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn agent(&self, node: &NodeId) -> Option<Agent> {
        let control = self.control.get()?.upgrade()?;
        let config = Config {
            node: node.clone(),
            control_queue: names::node_queue(NAME, node),
            capacity: self.capacity,
        };
        let host = Tasks {
            queue: self.queue.clone(),
            store: self.store.clone(),
            scratch: self.scratch.clone(),
            reenter: Reenter::default(),
        };
        Some(Agent::new(config, self.queue.clone(), control, self.clock.clone(), Arc::new(host)))
    }
}

#[async_trait]
impl NodeProvider for Nodes {
    async fn launch(&self, launch: &Launch) -> Result<(), ProviderError> {
        for number in 0..launch.count {
            let node = names::node_id(&launch.intent, &number.to_string());
            let mut stop = self.stop.subscribe();
            let stopped = async move { drop(stop.wait_for(|stop| *stop).await) };
            let start = || self.agent(&node).map(|agent| tokio::spawn(agent.run(stopped)));
            self.agents().entry(node.clone()).or_insert_with(start);
        }
        Ok(())
    }

    async fn list(&self) -> Result<Vec<NodeId>, ProviderError> {
        let agents = self.agents();
        let alive =
            agents.iter().filter(|(_, agent)| agent.as_ref().is_some_and(|agent| !agent.is_finished()));
        Ok(alive.map(|(node, _)| node.clone()).collect())
    }

    async fn terminate(&self, node: &NodeId) -> Result<(), ProviderError> {
        let agent = self.agents().get_mut(node).and_then(Option::take);
        if let Some(agent) = agent {
            agent.abort();
        }
        Ok(())
    }
}
