//! The embedded sides of the seams pass the suites that the AWS sides pass, calm and in all weathers.

use std::{
    collections::HashSet,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex},
    time::Duration,
};

use burla_core::{
    conformance,
    queue::{self, Queue, QueueExt, Receipt, Weather},
    store::{self, ETag, ObjectStore, When},
};
use bytes::Bytes;
use tokio::{task::JoinSet, time::Instant};

const SECOND: Duration = Duration::from_secs(1);

/// Runs on one thread and on time that passes only while all wait.
fn paused<T>(future: impl Future<Output = T>) -> T {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().start_paused(true).build().unwrap().block_on(future)
}

/// Runs a test for many weathers and names those in which it fails.
fn in_all_weathers(seeds: u64, weather: impl Fn(u64) -> Weather, test: impl AsyncFn(queue::Embedded)) {
    let fails = |seed: &u64| {
        let run = || paused(test(queue::Embedded::with_weather(weather(*seed))));
        catch_unwind(AssertUnwindSafe(run)).is_err()
    };
    let failed: Vec<u64> = (0..seeds).filter(fails).collect();
    assert!(failed.is_empty(), "failed with the seeds {failed:?}, for the reasons above");
}

#[tokio::test(start_paused = true)]
async fn calm_queues_conform_on_paused_time() {
    conformance::queue(&queue::Embedded::new(), "calm").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn calm_queues_conform_in_real_time() {
    conformance::queue(&queue::Embedded::new(), "real").await;
}

#[test]
fn queues_conform_in_rough_weather() {
    in_all_weathers(200, Weather::rough, async |queue| conformance::queue(&queue, "rough").await);
}

#[test]
fn queues_conform_in_one_bad_weather_at_a_time() {
    let weather = |seed| {
        let calm = Weather { seed, longest_delay: 2 * SECOND, ..Weather::default() };
        match seed % 8 {
            0 => Weather { duplicate: 0.3, ..calm },
            1 => Weather { reorder: 1.0, ..calm },
            2 => Weather { delay: 0.8, ..calm },
            3 => Weather { redeliver: 0.3, ..calm },
            4 => Weather { refuse: 0.3, ..calm },
            5 => Weather { partial: 1.0, ..calm },
            6 => Weather { unavailable: 0.1, ..calm },
            _ => Weather { latency: SECOND / 5, ..calm },
        }
    };
    in_all_weathers(80, weather, async |queue| conformance::queue(&queue, "bad").await);
}

#[tokio::test(start_paused = true)]
async fn stores_conform_on_paused_time() {
    conformance::store(&store::Embedded::new(), "calm").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn stores_conform_in_real_time() {
    conformance::store(&store::Embedded::new(), "real").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn stores_without_memory_conform() {
    conformance::store(&store::Embedded::with_budget(0), "disk").await;
}

/// What four clients of a queue see, and when.
fn trace(seed: u64) -> Vec<String> {
    let trace = Mutex::new(Vec::new());
    paused(async {
        let queue = queue::Embedded::with_weather(Weather::rough(seed));
        let start = Instant::now();
        let note = |what: String| trace.lock().unwrap().push(format!("{:?} {what}", start.elapsed()));
        while queue.create("q").await.is_err() {}
        let send = async {
            for i in 0..50 {
                note(format!("send {:?}", queue.send("q", &[format!("{i}").into(), "x".into()]).await));
            }
        };
        let receive = async |name: &str| {
            for i in 0..60 {
                let got = queue.receive("q", 3, 2 * SECOND, SECOND).await;
                note(format!("{name} {got:?}"));
                let receipts: Vec<Receipt> = got.unwrap_or_default().into_iter().map(|d| d.receipt).collect();
                if i % 3 == 0 {
                    note(format!("{name} {:?}", queue.extend("q", &receipts, SECOND).await));
                } else {
                    note(format!("{name} {:?}", queue.acknowledge("q", &receipts).await));
                }
            }
        };
        tokio::join!(send, receive("a"), receive("b"), receive("c"));
    });
    trace.into_inner().unwrap()
}

#[test]
fn the_same_seed_gives_the_same_run() {
    for seed in 0..20 {
        let (first, second) = (trace(seed), trace(seed));
        assert_eq!(first, second, "seed {seed}");
        assert_ne!(first, trace(seed + 1), "another seed");
    }
}

#[test]
fn rough_weather_does_all_that_it_says() {
    let traces: Vec<String> = (0..20).flat_map(trace).collect();
    for what in ["request was lost", "answer was lost", "send Ok([false", "send Ok([true", "a Ok([])"] {
        assert!(traces.iter().any(|line| line.contains(what)), "nobody saw {what}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn threads_share_a_queue_and_in_calm_weather_each_message_comes_once() {
    const SENDERS: usize = 4;
    const EACH: usize = 5000;
    let queue: Arc<dyn Queue> = Arc::new(queue::Embedded::new());
    queue.create("q").await.unwrap();
    let mut receivers = JoinSet::new();
    for _ in 0..8 {
        let queue = queue.clone();
        receivers.spawn(async move {
            let mut seen = Vec::new();
            loop {
                let got = queue.receive("q", 3, 60 * SECOND, 60 * SECOND).await.unwrap();
                let receipts: Vec<Receipt> = got.iter().map(|delivery| delivery.receipt.clone()).collect();
                assert!(queue.acknowledge("q", &receipts).await.unwrap().into_iter().all(|held| held));
                let stop = got.iter().any(|delivery| delivery.body.is_empty());
                seen.extend(got.into_iter().map(|delivery| delivery.body));
                if stop {
                    return seen;
                }
            }
        });
    }
    let mut senders = JoinSet::new();
    for sender in 0..SENDERS {
        let queue = queue.clone();
        senders.spawn(async move {
            for i in 0..EACH {
                queue.send("q", &[format!("{sender} {i}").into()]).await.unwrap();
                if i % 16 == 0 {
                    tokio::task::yield_now().await;
                }
            }
        });
    }
    senders.join_all().await;
    // A receiver that takes several of the empty messages stops once: send until all have.
    let mut seen = Vec::new();
    while !receivers.is_empty() {
        queue.send("q", &[Bytes::new()]).await.unwrap();
        seen.extend(receivers.join_next().await.unwrap().unwrap());
    }
    seen.retain(|body| !body.is_empty());
    assert_eq!(seen.len(), SENDERS * EACH);
    assert_eq!(seen.into_iter().collect::<HashSet<_>>().len(), SENDERS * EACH);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn receivers_that_are_aborted_at_any_moment_cost_no_message() {
    let queue = Arc::new(queue::Embedded::new());
    queue.create("q").await.unwrap();
    let bodies: Vec<Bytes> = (0..2000).map(|i| format!("{i}").into()).collect();
    let (sender, all) = (queue.clone(), bodies.clone());
    let sending = tokio::spawn(async move {
        for call in all.chunks(5) {
            sender.send_all("q", call).await.unwrap();
            tokio::task::yield_now().await;
        }
    });
    for _ in 0..2000 {
        let queue = queue.clone();
        let receiver = tokio::spawn(async move { queue.receive("q", 1, SECOND, SECOND).await });
        tokio::task::yield_now().await;
        receiver.abort();
    }
    sending.await.unwrap();
    let mut missing: HashSet<Bytes> = bodies.into_iter().collect();
    while !missing.is_empty() {
        let got = queue.receive("q", 10, 60 * SECOND, 5 * SECOND).await.unwrap();
        assert!(!got.is_empty(), "{} messages were lost", missing.len());
        for delivery in got {
            missing.remove(&delivery.body);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn threads_that_compare_and_swap_lose_no_update() {
    for store in [store::Embedded::new(), store::Embedded::with_budget(0)] {
        // Long enough that it does not fit in the second one's memory.
        let encode = |n: u32| Bytes::from(format!("{n:8000}"));
        store.put("counter", encode(0), When::Absent).await.unwrap();
        let mut tasks = JoinSet::new();
        for _ in 0..8 {
            let store = store.clone();
            tasks.spawn(async move {
                let mut done = 0;
                while done < 50 {
                    let object = store.get("counter", None).await.unwrap();
                    let n: u32 = std::str::from_utf8(&object.content).unwrap().trim().parse().unwrap();
                    let put = store.put("counter", encode(n + 1), When::Matches(object.etag)).await;
                    match put {
                        Ok(ETag(_)) => done += 1,
                        Err(store::Error::Precondition(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        tasks.join_all().await;
        assert_eq!(store.get("counter", None).await.unwrap().content, encode(400));
    }
}
