//! Queues in the memory of one process, and the weather that makes them as unpleasant as SQS may be.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until},
};

use super::{BATCH_MESSAGES, Delivery, Error, Queue, Receipt, check_limits};

/// Bytes of messages that wait in one queue. Whoever sends more waits until some are received: the
/// memory of one machine is not SQS.
const FULL: usize = 64 << 20;

/// Queues in memory. Bodies are shared, never copied; all time is tokio's, so a test may pause it.
#[derive(Debug, Default)]
pub struct Embedded {
    queues: RwLock<HashMap<String, Arc<Named>>>,
    /// Numbers deliveries through all queues, so that no receipt is of use in another queue.
    deliveries: AtomicU64,
    sky: Option<Sky>,
}

impl Embedded {
    /// Queues in calm weather: messages are delivered in order, and once unless a lease ends.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Queues that behave as badly as `weather` says, all of it within [`Queue`]'s contract. On a
    /// runtime of one thread with paused time the same seed gives the same run.
    #[must_use]
    pub fn with_weather(weather: Weather) -> Self {
        let rng = Mutex::new(StdRng::seed_from_u64(weather.seed));
        Self { sky: Some(Sky { weather, rng }), ..Self::default() }
    }

    fn named(&self, queue: &str) -> Result<Arc<Named>, Error> {
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        queues.get(queue).cloned().ok_or_else(|| Error::NoQueue(queue.into()))
    }

    fn next_id(&self) -> u64 {
        self.deliveries.fetch_add(1, Ordering::Relaxed)
    }

    fn chance(&self, of: impl Fn(&Weather) -> f64) -> bool {
        self.sky.as_ref().is_some_and(|sky| sky.chance(of(&sky.weather)))
    }

    /// Puts a message where the next receive finds it, or where the weather blows it.
    fn arrive(&self, state: &mut State, message: Message, now: Instant) {
        match &self.sky {
            Some(sky) if sky.chance(sky.weather.delay) => {
                state.hide(self.next_id(), message, now + sky.up_to(sky.weather.longest_delay));
            }
            sky => {
                state.show(message);
                if let Some(sky) = sky
                    && sky.chance(sky.weather.reorder)
                {
                    let last = state.visible.len() - 1;
                    state.visible.swap(sky.between(0, last), last);
                }
            }
        }
    }

    /// How many of `there` visible messages a receive gets.
    fn portion(&self, there: usize, wait: Duration) -> usize {
        match &self.sky {
            // A poll that does not wait asks only some of SQS's servers and may find none.
            Some(sky) if there > 0 && sky.chance(sky.weather.partial) => {
                sky.between(usize::from(!wait.is_zero()), there)
            }
            _ => there,
        }
    }

    fn deliver(&self, state: &mut State, message: Message, now: Instant, lease: Duration) -> Delivery {
        let id = self.next_id();
        if let Some(older) = message.twin {
            state.release(older);
        }
        if self.chance(|weather| weather.duplicate) {
            self.arrive(state, Message { body: message.body.clone(), twin: Some(id) }, now);
        }
        let body = message.body;
        state.hide(id, Message { body: body.clone(), twin: None }, now + bounded(lease));
        Delivery { body, receipt: Receipt(id.to_string()) }
    }

    /// The way to the service, which the weather may block.
    async fn depart(&self) -> Result<Trip<'_>, Error> {
        let Some(sky) = &self.sky else { return Ok(Trip { sky: None, lost: false }) };
        sky.pause().await;
        let unavailable = sky.chance(sky.weather.unavailable);
        let lost = unavailable && sky.chance(0.5);
        if unavailable && !lost {
            return Err(storm("the request was lost"));
        }
        Ok(Trip { sky: Some(sky), lost })
    }
}

#[async_trait]
impl Queue for Embedded {
    async fn create(&self, queue: &str) -> Result<(), Error> {
        let trip = self.depart().await?;
        self.queues.write().unwrap_or_else(PoisonError::into_inner).entry(queue.into()).or_default();
        trip.back(()).await
    }

    async fn delete(&self, queue: &str) -> Result<(), Error> {
        let trip = self.depart().await?;
        let named = self.queues.write().unwrap_or_else(PoisonError::into_inner).remove(queue);
        if let Some(named) = named {
            *named.lock() = State { deleted: true, ..State::default() };
            named.arrived.notify_one();
            named.received.notify_waiters();
        }
        trip.back(()).await
    }

    async fn send(&self, queue: &str, bodies: &[Bytes]) -> Result<Vec<bool>, Error> {
        check_limits(bodies)?;
        let trip = self.depart().await?;
        let named = self.named(queue)?;
        named.room(queue).await?;
        let accepted = named.change(queue, |state, now| {
            let mut send_one = |body: &Bytes| {
                let accepted = !self.chance(|weather| weather.refuse);
                if accepted {
                    self.arrive(state, Message { body: body.clone(), twin: None }, now);
                }
                accepted
            };
            bodies.iter().map(&mut send_one).collect()
        })?;
        trip.back(accepted).await
    }

    async fn receive(
        &self,
        queue: &str,
        max: usize,
        lease: Duration,
        wait: Duration,
    ) -> Result<Vec<Delivery>, Error> {
        let trip = self.depart().await?;
        let named = self.named(queue)?;
        let max = max.clamp(1, BATCH_MESSAGES);
        let deadline = Instant::now() + bounded(wait);
        let mut timekeeper = None;
        let deliveries = loop {
            let (deliveries, now) = named.change(queue, |state, now| {
                let there = state.visible.len().min(max);
                let portion = self.portion(there, wait);
                let messages: Vec<_> = state.visible.drain(..portion).collect();
                state.bytes -= messages.iter().map(|message| message.body.len()).sum::<usize>();
                let deliver = |message| self.deliver(state, message, now, lease);
                (messages.into_iter().map(deliver).collect::<Vec<_>>(), now)
            })?;
            if !deliveries.is_empty() || now >= deadline {
                break deliveries;
            }
            named.wait(&mut timekeeper, deadline).await;
        };
        drop(timekeeper);
        trip.back(deliveries).await
    }

    async fn acknowledge(&self, queue: &str, receipts: &[Receipt]) -> Result<Vec<bool>, Error> {
        check_receipts(receipts)?;
        let trip = self.depart().await?;
        let held = self.named(queue)?.change(queue, |state, now| {
            let mut acknowledge_one = |receipt: &Receipt| {
                let message = state.release_receipt(receipt);
                let held = message.is_some();
                if let Some(message) = message
                    && self.chance(|weather| weather.redeliver)
                {
                    self.arrive(state, message, now);
                }
                held
            };
            receipts.iter().map(&mut acknowledge_one).collect()
        })?;
        trip.back(held).await
    }

    async fn extend(&self, queue: &str, receipts: &[Receipt], lease: Duration) -> Result<Vec<bool>, Error> {
        check_receipts(receipts)?;
        let trip = self.depart().await?;
        let held = self.named(queue)?.change(queue, |state, now| {
            let mut extend_one = |receipt: &Receipt| match (id_of(receipt), state.release_receipt(receipt)) {
                (Some(_), Some(message)) if lease.is_zero() => {
                    // Before the others, as it was: else what is given back again and again starves.
                    state.bytes += message.body.len();
                    state.visible.push_front(message);
                    true
                }
                (Some(id), Some(message)) => {
                    state.hide(id, message, now + bounded(lease));
                    true
                }
                _ => false,
            };
            receipts.iter().map(&mut extend_one).collect()
        })?;
        trip.back(held).await
    }
}

/// One queue.
///
/// Wake-ups are passed on rather than counted: whoever leaves the lock while messages are visible
/// wakes one waiter, who does the same. [`Notify`] hands the wake-up of a dropped waiter to the
/// next. Of all waiters only one, the timekeeper, has a timer for the next lease that ends.
#[derive(Debug, Default)]
struct Named {
    state: Mutex<State>,
    /// There are visible messages, or the place of the timekeeper is free.
    arrived: Notify,
    /// A lease ends sooner than the timekeeper knows.
    sooner: Notify,
    /// Messages were received, or the queue was deleted: whoever waits to send may look again.
    received: Notify,
}

#[derive(Debug, Default)]
struct State {
    visible: VecDeque<Message>,
    /// Bytes of what is visible.
    bytes: usize,
    /// What is leased or delayed, by the number of its delivery.
    hidden: HashMap<u64, (Instant, Message)>,
    /// When which of them becomes visible.
    ends: BTreeSet<(Instant, u64)>,
    timekept: bool,
    deleted: bool,
}

#[derive(Debug)]
struct Message {
    body: Bytes,
    /// The delivery of which this is a repetition; its receipt goes stale when this is delivered.
    twin: Option<u64>,
}

impl Named {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of others runs under the lock, and a half-done change is not worse than none.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state as of now, then wakes whom it concerns.
    fn change<T>(&self, queue: &str, change: impl FnOnce(&mut State, Instant) -> T) -> Result<T, Error> {
        let now = Instant::now();
        let mut state = self.lock();
        let first = state.ends.first().copied();
        state.reveal(now);
        let result =
            if state.deleted { Err(Error::NoQueue(queue.into())) } else { Ok(change(&mut state, now)) };
        let arrived = state.deleted || !state.visible.is_empty();
        let room = state.deleted || state.bytes < FULL;
        let sooner = state.ends.first().is_some_and(|new| first.is_none_or(|old| *new < old));
        drop(state);
        if arrived {
            self.arrived.notify_one();
        }
        if sooner {
            self.sooner.notify_one();
        }
        if room {
            self.received.notify_waiters();
        }
        result
    }

    /// Waits until the queue is not full.
    async fn room(&self, queue: &str) -> Result<(), Error> {
        loop {
            let received = self.received.notified();
            tokio::pin!(received);
            received.as_mut().enable();
            let full = {
                let state = self.lock();
                if state.deleted {
                    return Err(Error::NoQueue(queue.into()));
                }
                state.bytes >= FULL
            };
            if !full {
                return Ok(());
            }
            received.await;
        }
    }

    /// Waits until looking again is worth it, at the latest until `deadline`.
    async fn wait<'a>(&'a self, timekeeper: &mut Option<Timekeeper<'a>>, deadline: Instant) {
        let until = {
            let mut state = self.lock();
            if !state.timekept {
                state.timekept = true;
                *timekeeper = Some(Timekeeper(self));
            }
            let end = state.ends.first().filter(|_| timekeeper.is_some());
            end.map_or(deadline, |(end, _)| deadline.min(*end))
        };
        // Biased, because tokio would otherwise draw the order from a generator without our seed.
        tokio::select! {
            biased;
            () = self.arrived.notified() => {}
            () = self.sooner.notified(), if timekeeper.is_some() => {}
            () = sleep_until(until) => {}
        }
    }
}

impl State {
    fn show(&mut self, message: Message) {
        self.bytes += message.body.len();
        self.visible.push_back(message);
    }

    fn hide(&mut self, id: u64, message: Message, until: Instant) {
        self.ends.insert((until, id));
        self.hidden.insert(id, (until, message));
    }

    fn release(&mut self, id: u64) -> Option<Message> {
        let (until, message) = self.hidden.remove(&id)?;
        self.ends.remove(&(until, id));
        Some(message)
    }

    fn release_receipt(&mut self, receipt: &Receipt) -> Option<Message> {
        self.release(id_of(receipt)?)
    }

    /// Makes visible what is not to be hidden any more.
    fn reveal(&mut self, now: Instant) {
        while let Some(&(end, id)) = self.ends.first()
            && end <= now
        {
            if let Some(message) = self.release(id) {
                self.show(message);
            }
        }
    }
}

/// Whoever holds it keeps time for all who wait; dropped, it passes the duty on.
struct Timekeeper<'a>(&'a Named);

impl Drop for Timekeeper<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.timekept = false;
        let wanted = !state.ends.is_empty();
        drop(state);
        if wanted {
            self.0.arrived.notify_one();
        }
    }
}

/// How badly an [`Embedded`] queue behaves. Chances are between 0 and 1; the default is calm.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Weather {
    /// What all chances are drawn from.
    pub seed: u64,
    /// The chance that a message is delivered again though its lease holds. The second delivery
    /// makes the first one's receipt stale.
    pub duplicate: f64,
    /// The chance that a message overtakes others.
    pub reorder: f64,
    /// The chance that a message stays invisible for a while after it was sent.
    pub delay: f64,
    /// How long that while is at most.
    pub longest_delay: Duration,
    /// The chance that a message is delivered again though it was acknowledged.
    pub redeliver: f64,
    /// The chance that a message of a batch is refused.
    pub refuse: f64,
    /// The chance that a receive gets fewer messages than there are, or, if it doesn't wait, none.
    pub partial: f64,
    /// The chance that a call is answered with [`Error::Unavailable`]. In half of the cases only
    /// the answer is lost: the call has had its effect.
    pub unavailable: f64,
    /// How long a request, and its answer, are on their way at most.
    pub latency: Duration,
}

impl Weather {
    /// Everything that can go wrong does, often enough that a short test meets all of it.
    #[must_use]
    pub fn rough(seed: u64) -> Self {
        Self {
            seed,
            duplicate: 0.1,
            reorder: 0.3,
            delay: 0.2,
            longest_delay: Duration::from_secs(3),
            redeliver: 0.05,
            refuse: 0.1,
            partial: 0.3,
            unavailable: 0.05,
            latency: Duration::from_millis(20),
        }
    }
}

#[derive(Debug)]
struct Sky {
    weather: Weather,
    rng: Mutex<StdRng>,
}

impl Sky {
    fn rng(&self) -> MutexGuard<'_, StdRng> {
        self.rng.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn chance(&self, of: f64) -> bool {
        self.rng().random_bool(of.clamp(0.0, 1.0))
    }

    fn between(&self, least: usize, most: usize) -> usize {
        self.rng().random_range(least..=most)
    }

    fn up_to(&self, longest: Duration) -> Duration {
        self.rng().random_range(Duration::ZERO..=longest)
    }

    async fn pause(&self) {
        let pause = self.up_to(self.weather.latency);
        if !pause.is_zero() {
            sleep(pause).await;
        }
    }
}

/// One call on its way through the weather.
struct Trip<'a> {
    sky: Option<&'a Sky>,
    lost: bool,
}

impl Trip<'_> {
    async fn back<T>(self, answer: T) -> Result<T, Error> {
        if let Some(sky) = self.sky {
            sky.pause().await;
        }
        if self.lost { Err(storm("the answer was lost")) } else { Ok(answer) }
    }
}

fn storm(what: &str) -> Error {
    Error::Unavailable(format!("{what} in rough weather"))
}

fn id_of(receipt: &Receipt) -> Option<u64> {
    receipt.0.parse().ok()
}

fn check_receipts(receipts: &[Receipt]) -> Result<(), Error> {
    if receipts.len() > BATCH_MESSAGES {
        return Err(Error::TooLarge { messages: receipts.len(), bytes: 0 });
    }
    Ok(())
}

/// A year is as good as any longer time, and can be added to an instant.
fn bounded(duration: Duration) -> Duration {
    duration.min(Duration::from_secs(365 * 24 * 3600))
}

#[cfg(test)]
mod tests {
    use tokio::{task::JoinHandle, time::timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    async fn queue() -> Arc<Embedded> {
        let queue = Arc::new(Embedded::new());
        queue.create("q").await.unwrap();
        queue
    }

    /// A receiver that has begun to wait.
    async fn waiter(queue: &Arc<Embedded>) -> JoinHandle<Result<Vec<Delivery>, Error>> {
        let queue = queue.clone();
        let waiter = tokio::spawn(async move { queue.receive("q", 1, 60 * SECOND, 60 * SECOND).await });
        sleep(Duration::from_millis(1)).await;
        waiter
    }

    #[tokio::test(start_paused = true)]
    async fn every_message_of_a_batch_wakes_a_waiter() {
        let queue = queue().await;
        let mut waiters = Vec::new();
        for _ in 0..10 {
            waiters.push(waiter(&queue).await);
        }
        let sent = Instant::now();
        queue.send("q", &vec![Bytes::from_static(b"x"); 10]).await.unwrap();
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap().unwrap().len(), 1);
        }
        assert_eq!(sent.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_that_is_dropped_after_its_wake_up_passes_it_on() {
        let queue = queue().await;
        let (first, second) = (waiter(&queue).await, waiter(&queue).await);
        // The send wakes the first waiter, which is gone before it runs.
        queue.send("q", &[Bytes::from_static(b"x")]).await.unwrap();
        first.abort();
        let sent = Instant::now();
        assert_eq!(second.await.unwrap().unwrap().len(), 1);
        assert_eq!(sent.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_ends_wakes_a_waiter_even_if_the_timekeeper_left() {
        let queue = queue().await;
        let (first, second) = (waiter(&queue).await, waiter(&queue).await);
        let third = waiter(&queue).await;
        let start = Instant::now();
        queue.send("q", &[Bytes::from_static(b"x")]).await.unwrap();
        let taken = queue.receive("q", 1, 5 * SECOND, Duration::ZERO).await.unwrap();
        assert_eq!(taken.len(), 1, "the waiters have not run yet");
        sleep(SECOND).await;
        first.abort();
        sleep(SECOND).await;
        second.abort();
        assert_eq!(third.await.unwrap().unwrap().len(), 1);
        let waited = start.elapsed();
        assert!(waited >= 5 * SECOND && waited < 6 * SECOND, "{waited:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn deleting_a_queue_ends_every_poll() {
        let queue = queue().await;
        let waiters = [waiter(&queue).await, waiter(&queue).await, waiter(&queue).await];
        queue.delete("q").await.unwrap();
        let deleted = Instant::now();
        for waiter in waiters {
            assert!(matches!(waiter.await.unwrap(), Err(Error::NoQueue(_))));
        }
        assert_eq!(deleted.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_is_not_polling() {
        let queue = queue().await;
        queue.send("q", &[Bytes::from_static(b"x")]).await.unwrap();
        queue.receive("q", 1, 3600 * SECOND, Duration::ZERO).await.unwrap();
        let named = queue.named("q").unwrap();
        let mut timekeeper = None;
        // At most the wake-ups that the calls above left behind.
        for _ in 0..2 {
            let _ = timeout(SECOND, named.wait(&mut timekeeper, Instant::now() + 60 * SECOND)).await;
        }
        let start = Instant::now();
        named.wait(&mut timekeeper, start + 60 * SECOND).await;
        assert_eq!(start.elapsed(), 60 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_is_not_copied() {
        let queue = queue().await;
        let body = Bytes::from(vec![7; 1000]);
        queue.send("q", std::slice::from_ref(&body)).await.unwrap();
        let delivery = queue.receive("q", 1, SECOND, SECOND).await.unwrap().remove(0);
        assert_eq!(delivery.body.as_ptr(), body.as_ptr());
    }
}
