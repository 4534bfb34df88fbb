//! The agent: does on one node what main_service orders.

use std::{
    collections::HashMap,
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use burla_core::{
    clock::Clock,
    control::{Capacity, Control, Request},
    envelope::{Assignment, Orders},
    ids::{JobId, NodeId, WorkerId},
    queue::{self, Delivery, LONGEST_POLL, Queue, QueueExt},
    wire,
};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::host::{Slot, Started, WorkerHost};

/// How long a control message is hidden while it is read. It is acknowledged at once.
const LEASE: Duration = Duration::from_secs(30);

/// How often the agent looks whether its workers live and its orders hold.
const LOOK: Duration = Duration::from_secs(1);

/// For how long orders must have been over before the agent follows them no more. A machine that slept
/// wakes up with orders that are over, and gets new ones.
const LEASE_GRACE: Duration = Duration::from_secs(45);

/// What an agent is told when it is started.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its node.
    pub node: NodeId,
    /// The node's control queue.
    pub control_queue: String,
    /// What the node has.
    pub capacity: Capacity,
}

/// Does on one node what main_service orders. Dropping it ends its workers.
pub struct Agent {
    config: Config,
    queue: Arc<dyn Queue>,
    control: Arc<dyn Control>,
    clock: Arc<dyn Clock>,
    host: Arc<dyn WorkerHost>,
    orders: Option<Orders>,
    /// Since when the orders are over, on the clock that stands still while the machine sleeps.
    over_since: Option<Instant>,
    workers: HashMap<JobId, Vec<Box<dyn Started>>>,
    incarnations: u64,
}

impl Agent {
    /// An agent that has not said yet that it is there.
    pub fn new(
        config: Config,
        queue: Arc<dyn Queue>,
        control: Arc<dyn Control>,
        clock: Arc<dyn Clock>,
        host: Arc<dyn WorkerHost>,
    ) -> Self {
        let workers = HashMap::new();
        Self { config, queue, control, clock, host, orders: None, over_since: None, workers, incarnations: 0 }
    }

    /// Reports for duty, then follows orders until the control queue is gone or `shutdown` is ready. Then
    /// it ends its workers, with all that they started.
    pub async fn run(mut self, shutdown: impl Future<Output = ()> + Send) {
        self.serve(pin!(shutdown)).await;
        self.follow(Vec::new()).await;
    }

    /// Returns only between two steps: workers that are being ended are not left half-way.
    async fn serve(&mut self, mut shutdown: Pin<&mut (impl Future<Output = ()> + Send)>) {
        let ready = Request::NodeReady { node: self.config.node.clone(), capacity: self.config.capacity };
        let report = async {
            while self.control.call(ready.clone()).await.is_err() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            biased;
            () = &mut shutdown => return,
            () = report => {}
        }
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (queue, name) = (self.queue.clone(), self.config.control_queue.clone());
        let poll = || {
            let (queue, name) = (queue.clone(), name.clone());
            Box::pin(async move { queue.receive(&name, 10, LEASE, LONGEST_POLL).await })
        };
        let mut polled = poll();
        loop {
            tokio::select! {
                biased;
                () = &mut shutdown => return,
                deliveries = &mut polled => {
                    match deliveries {
                        Ok(deliveries) => self.on_messages(deliveries).await,
                        Err(queue::Error::NoQueue(_)) => break,
                        Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
                    }
                    polled = poll();
                }
                _ = look.tick() => self.on_look().await,
            }
        }
    }

    async fn on_messages(&mut self, deliveries: Vec<Delivery>) {
        for delivery in &deliveries {
            // What does not decode is of another version: this node is on its way out.
            if let Ok((orders, _)) = wire::decode::<Orders>(&delivery.body) {
                self.on_orders(orders).await;
            }
        }
        let receipts: Vec<_> = deliveries.into_iter().map(|delivery| delivery.receipt).collect();
        // One that comes again does no harm: its generation is not newer.
        let _ = self.queue.acknowledge_all(&self.config.control_queue, &receipts).await;
    }

    async fn on_orders(&mut self, orders: Orders) {
        let newer = self.orders.as_ref().is_none_or(|known| orders.generation > known.generation);
        if orders.node != self.config.node || !newer {
            return;
        }
        self.orders = Some(orders.clone());
        self.follow(orders.assignments).await;
    }

    /// Starts what is missing and kills what is not wanted any more.
    async fn follow(&mut self, assignments: Vec<Assignment>) {
        let wanted: HashMap<&JobId, u32> =
            assignments.iter().map(|assignment| (&assignment.job, assignment.slots)).collect();
        let mut dismissed = Vec::new();
        for (job, workers) in &mut self.workers {
            let keep = wanted.get(job).map_or(0, |slots| *slots as usize).min(workers.len());
            dismissed.extend(workers.drain(keep..));
        }
        self.workers.retain(|_, workers| !workers.is_empty());
        kill(dismissed).await;
        for assignment in assignments {
            let have = self.workers.get(&assignment.job).map_or(0, Vec::len);
            for _ in have..assignment.slots as usize {
                self.start(&assignment).await;
            }
        }
    }

    async fn start(&mut self, assignment: &Assignment) {
        let worker = WorkerId(format!("{}.{}", self.config.node, self.incarnations));
        self.incarnations += 1;
        let slot = Slot { worker, assignment: assignment.clone() };
        // A slot that could not be started is tried again at the next look.
        if let Ok(started) = self.host.start(slot).await {
            self.workers.entry(assignment.job.clone()).or_default().push(started);
        }
    }

    /// Replaces workers that ended, and stops all when nobody renewed the orders.
    async fn on_look(&mut self) {
        let Some(orders) = self.orders.clone() else { return };
        if self.clock.now() <= orders.lease {
            self.over_since = None;
        } else if self.over_since.get_or_insert_with(Instant::now).elapsed() >= LEASE_GRACE {
            return self.follow(Vec::new()).await;
        }
        for workers in self.workers.values_mut() {
            let mut alive = Vec::new();
            for mut worker in workers.drain(..) {
                if tokio::time::timeout(Duration::ZERO, worker.ended()).await.is_err() {
                    alive.push(worker);
                }
            }
            *workers = alive;
        }
        self.follow(orders.assignments).await;
    }
}

/// Kills workers, all at the same time.
async fn kill(workers: Vec<Box<dyn Started>>) {
    let mut tasks = tokio::task::JoinSet::new();
    for mut worker in workers {
        tasks.spawn(async move { worker.kill().await });
    }
    while tasks.join_next().await.is_some() {}
}
