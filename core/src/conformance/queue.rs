//! The suite for queues.
//!
//! A queue may deliver twice, late and in any order, and may be unavailable for a moment. So a
//! check tells two things apart: what must never happen (it panics), and what ought to happen but
//! may be prevented by a queue that is allowed to be odd now and then ([`Odd`]: the check is tried
//! again on a fresh queue, and fails if the oddity is the rule).

use std::{collections::BTreeMap, fmt::Display, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};

use super::together;
use crate::queue::{BATCH_BYTES, BATCH_MESSAGES, Delivery, Error, LONGEST_POLL, Queue, QueueExt, Receipt};

/// How often a check is tried before an oddity counts as the rule.
const TRIES: usize = 40;

/// After so long a message that was not seen is lost.
const LOST: Duration = Duration::from_secs(180);

const SECOND: Duration = Duration::from_secs(1);

/// The lease of what [`gather`] receives.
const GATHER_LEASE: Duration = Duration::from_secs(4);

/// Something that an implementation may do now and then, but not always.
struct Odd(String);

type Check = Result<(), Odd>;

impl From<Error> for Odd {
    fn from(error: Error) -> Self {
        match error {
            Error::Unavailable(_) => Self(error.to_string()),
            other => panic!("a queue may be unavailable now and then, but this is another error: {other}"),
        }
    }
}

fn expect(holds: bool, otherwise: impl Display) -> Check {
    if holds { Ok(()) } else { Err(Odd(otherwise.to_string())) }
}

/// Checks `queue` against the contract of [`Queue`]. It makes and deletes queues whose names begin
/// with `name_prefix`, which should be short and fresh: AWS takes names of 80 characters, and none
/// that was deleted a minute ago.
///
/// # Panics
///
/// If a sentence of the contract does not hold; the message names the queue and thereby the check.
pub async fn queue<Q: Queue + ?Sized>(queue: &Q, name_prefix: &str) {
    macro_rules! side_by_side {
        ($($check:ident),* $(,)?) => {
            together::<()>([$(
                Box::pin(check(queue, format!("{name_prefix}-{}", stringify!($check)), async |name| {
                    $check(queue, name).await
                })) as _,
            )*]).await
        };
    }
    side_by_side![
        what_was_sent_is_received_until_acknowledged,
        many_receivers_share_a_queue,
        queues_are_separate,
        an_unacknowledged_message_comes_back,
        extending_a_lease_keeps_a_message_hidden,
        a_lease_of_zero_gives_a_message_back_at_once,
        a_stale_receipt_does_nothing,
        answers_are_given_for_each_receipt,
        more_than_the_limits_sends_nothing,
        the_limits_themselves_are_fine,
        a_receive_returns_no_more_than_asked,
        a_poll_ends_when_a_message_arrives,
        a_poll_ends_when_a_lease_does,
        a_poll_of_an_empty_queue_ends_with_none,
        creating_a_queue_again_leaves_it_as_it_is,
        a_queue_that_does_not_exist_is_an_error,
        a_deleted_queue_does_no_more,
        a_dropped_receive_loses_nothing,
        a_dropped_poll_leaves_the_message_to_others,
    ];
}

/// Tries a check, each time on a fresh queue.
async fn check<Q: Queue + ?Sized>(queue: &Q, name: String, check: impl AsyncFn(&str) -> Check) {
    let mut odd = String::new();
    for attempt in 0..TRIES {
        let name = format!("{name}-{attempt}");
        assert!(name.len() <= 80, "{name} is too long for AWS");
        steady(&name, async || queue.create(&name).await).await;
        let result = check(&name).await;
        steady(&name, async || queue.delete(&name).await).await;
        match result {
            Ok(()) => return,
            Err(Odd(what)) => odd = what,
        }
    }
    panic!("{name}: again and again, {odd}");
}

/// Repeats a call that finds the service unavailable.
async fn steady<T>(name: &str, call: impl AsyncFn() -> Result<T, Error>) -> T {
    for _ in 0..TRIES {
        match call().await {
            Err(Error::Unavailable(_)) => sleep(SECOND / 10).await,
            other => return other.unwrap_or_else(|error| panic!("{name}: {error}")),
        }
    }
    panic!("{name}: the service is never available");
}

async fn send<Q: Queue + ?Sized>(queue: &Q, name: &str, bodies: &[Bytes]) {
    steady(name, async || queue.send_all(name, bodies).await).await;
}

/// Receives one message, which must be there or come back soon.
async fn take<Q: Queue + ?Sized>(queue: &Q, name: &str, lease: Duration) -> Delivery {
    let start = Instant::now();
    loop {
        let mut got = steady(name, async || queue.receive(name, 1, lease, 5 * SECOND).await).await;
        if let Some(delivery) = got.pop() {
            return delivery;
        }
        assert!(start.elapsed() < LOST, "{name}: a message was lost");
    }
}

/// Receives and acknowledges until each of `bodies` was seen. Nothing else may come.
async fn gather<Q: Queue + ?Sized>(queue: &Q, name: &str, bodies: &[Bytes]) {
    let mut missing: BTreeMap<&Bytes, bool> = bodies.iter().map(|body| (body, true)).collect();
    let start = Instant::now();
    while missing.values().any(|missing| *missing) {
        let got =
            steady(name, async || queue.receive(name, BATCH_MESSAGES, GATHER_LEASE, SECOND).await).await;
        for delivery in &got {
            match missing.get_mut(&delivery.body) {
                Some(missing) => *missing = false,
                None => panic!("{name}: {} bytes were received that nobody sent", delivery.body.len()),
            }
        }
        let receipts: Vec<Receipt> = got.into_iter().map(|delivery| delivery.receipt).collect();
        if !receipts.is_empty() {
            steady(name, async || queue.acknowledge_all(name, &receipts).await).await;
        }
        let lost = missing.values().filter(|missing| **missing).count();
        assert!(start.elapsed() < LOST, "{name}: {lost} of {} messages were lost", bodies.len());
    }
}

/// Expects that nothing is received for `wait`.
async fn quiet<Q: Queue + ?Sized>(queue: &Q, name: &str, wait: Duration, because: &str) -> Check {
    let got = queue.receive(name, BATCH_MESSAGES, SECOND, wait).await?;
    expect(got.is_empty(), format!("{} messages were received though {because}", got.len()))
}

fn bodies(count: usize) -> Vec<Bytes> {
    (0..count).map(|i| format!("message {i}").into()).collect()
}

fn one() -> Bytes {
    Bytes::from_static(b"the message")
}

fn receipt_of(delivery: &Delivery) -> &[Receipt] {
    std::slice::from_ref(&delivery.receipt)
}

async fn what_was_sent_is_received_until_acknowledged<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let mut bodies = bodies(30);
    bodies.push((0..=255u8).collect::<Vec<u8>>().into());
    bodies.push(Bytes::from_static(b"\0"));
    bodies.push(Bytes::from_static(b"\xff\xfe\x80 is not UTF-8"));
    bodies.push(vec![0xd7; 300 << 10].into());
    send(queue, name, &bodies).await;
    // Seen, but not acknowledged: each has to come again.
    let seen = steady(name, async || queue.receive(name, BATCH_MESSAGES, SECOND, SECOND).await).await;
    assert!(seen.iter().all(|delivery| bodies.contains(&delivery.body)), "{name}: a body has changed");
    gather(queue, name, &bodies).await;
    // Past the last lease. A straggler or two may come, but acknowledging has to put an end to it.
    sleep(GATHER_LEASE).await;
    for _ in 0..30 {
        let got = queue.receive(name, BATCH_MESSAGES, SECOND, 2 * SECOND).await?;
        if got.is_empty() {
            return Ok(());
        }
        let receipts: Vec<Receipt> = got.into_iter().map(|delivery| delivery.receipt).collect();
        queue.acknowledge(name, &receipts).await?;
    }
    Err(Odd("messages are received after they were acknowledged".into()))
}

async fn many_receivers_share_a_queue<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let bodies = bodies(100);
    let receiver = async || {
        let mut seen = Vec::new();
        let mut empty = 0;
        while empty < 3 {
            let got = steady(name, async || queue.receive(name, 3, 2 * SECOND, 2 * SECOND).await).await;
            empty = if got.is_empty() { empty + 1 } else { 0 };
            let receipts: Vec<Receipt> = got.iter().map(|delivery| delivery.receipt.clone()).collect();
            if !receipts.is_empty() {
                steady(name, async || queue.acknowledge_all(name, &receipts).await).await;
            }
            seen.extend(got.into_iter().map(|delivery| delivery.body));
        }
        seen
    };
    let sender = async || {
        for call in bodies.chunks(7) {
            send(queue, name, call).await;
        }
        Vec::new()
    };
    let mut seen: BTreeMap<Bytes, u32> = BTreeMap::new();
    let all = together((0..9).map(|i| -> std::pin::Pin<Box<dyn Future<Output = Vec<Bytes>> + '_>> {
        if i == 0 { Box::pin(sender()) } else { Box::pin(receiver()) }
    }));
    for body in all.await.concat() {
        *seen.entry(body).or_default() += 1;
    }
    for body in &bodies {
        assert!(seen.contains_key(body), "{name}: {body:?} was lost");
    }
    assert_eq!(seen.len(), bodies.len(), "{name}: something was received that nobody sent");
    let again = seen.values().filter(|times| **times > 1).count();
    expect(again < 50, format!("{again} of 100 messages were received more than once"))
}

async fn queues_are_separate<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let other = format!("{name}-b");
    steady(name, async || queue.create(&other).await).await;
    send(queue, name, &[one()]).await;
    for wait in [Duration::ZERO, 2 * SECOND] {
        let got = steady(name, async || queue.receive(&other, 1, SECOND, wait).await).await;
        assert!(got.is_empty(), "{other}: received what was sent to {name}");
    }
    steady(name, async || queue.delete(&other).await).await;
    gather(queue, name, &[one()]).await;
    Ok(())
}

async fn an_unacknowledged_message_comes_back<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &[one()]).await;
    let first = take(queue, name, 3 * SECOND).await;
    let taken = Instant::now();
    quiet(queue, name, SECOND, "the message is leased").await?;
    let second = take(queue, name, 3 * SECOND).await;
    let away = taken.elapsed();
    assert_eq!(second.body, one(), "{name}: the body has changed");
    assert_ne!(first.receipt, second.receipt, "{name}: two deliveries have one receipt");
    expect(away > 2 * SECOND && away < 10 * SECOND, format!("a lease of 3 s lasted {away:?}"))
}

async fn extending_a_lease_keeps_a_message_hidden<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &[one()]).await;
    let delivery = take(queue, name, 2 * SECOND).await;
    sleep(SECOND).await;
    // Anew, counted from now: three times from one second to the next, past the first lease's end.
    for _ in 0..3 {
        let held = queue.extend(name, receipt_of(&delivery), 2 * SECOND).await?;
        expect(held == [true], "a lease that holds was not extended")?;
        quiet(queue, name, SECOND, "its lease was extended").await?;
    }
    let held = queue.acknowledge(name, receipt_of(&delivery)).await?;
    expect(held == [true], "a receipt did not hold after its lease was extended")?;
    quiet(queue, name, 3 * SECOND, "it was acknowledged").await?;

    // A lease may be made shorter, too.
    send(queue, name, &[one()]).await;
    let delivery = take(queue, name, 20 * SECOND).await;
    let held = queue.extend(name, receipt_of(&delivery), SECOND).await?;
    let start = Instant::now();
    expect(held == [true], "a lease that holds was not extended")?;
    take(queue, name, SECOND).await;
    expect(start.elapsed() < 10 * SECOND, "a lease that was set to 1 s went on")
}

async fn a_lease_of_zero_gives_a_message_back_at_once<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &[one()]).await;
    let first = take(queue, name, 20 * SECOND).await;
    let held = queue.extend(name, receipt_of(&first), Duration::ZERO).await?;
    let start = Instant::now();
    expect(held == [true], "a lease that holds could not be given up")?;
    let second = take(queue, name, 20 * SECOND).await;
    assert_ne!(first.receipt, second.receipt, "{name}: two deliveries have one receipt");
    expect(start.elapsed() < 10 * SECOND, "a message that was given back did not come at once")
}

async fn a_stale_receipt_does_nothing<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &[one()]).await;
    let stale = take(queue, name, SECOND).await;
    let taken = Instant::now();
    let holds = take(queue, name, 5 * SECOND).await;
    expect(taken.elapsed() >= SECOND, "a message was received twice within one lease")?;
    // Would make it visible at once, and then gone, if the receipt still counted.
    let held = queue.extend(name, receipt_of(&stale), Duration::ZERO).await?;
    assert_eq!(held, [false], "{name}: the receipt of an earlier delivery extended a lease");
    quiet(queue, name, SECOND, "only a stale receipt was used").await?;
    let held = queue.acknowledge(name, receipt_of(&stale)).await?;
    assert_eq!(held, [false], "{name}: the receipt of an earlier delivery was acknowledged");
    let held = queue.extend(name, receipt_of(&holds), SECOND).await?;
    expect(held == [true], "the receipt of the last delivery did not hold")?;
    let again = take(queue, name, 10 * SECOND).await;
    let held = queue.acknowledge(name, receipt_of(&again)).await?;
    expect(held == [true], "the receipt of the last delivery did not hold")
}

async fn answers_are_given_for_each_receipt<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &bodies(2)).await;
    let (first, second) =
        (take(queue, name, 20 * SECOND).await.receipt, take(queue, name, 20 * SECOND).await.receipt);
    let receipts = [first.clone(), Receipt("not a receipt".into()), second.clone()];
    let held = queue.extend(name, &receipts, 20 * SECOND).await?;
    assert_eq!(held.len(), 3, "{name}: not one answer for each receipt");
    assert!(!held[1], "{name}: a receipt that never was is said to hold");
    expect(held == [true, false, true], "a receipt did not hold within its lease")?;
    let held = queue.acknowledge(name, &receipts).await?;
    assert_eq!(held.len(), 3, "{name}: not one answer for each receipt");
    assert!(!held[1], "{name}: a receipt that never was is said to hold");
    expect(held == [true, false, true], "a receipt did not hold within its lease")?;
    let many = vec![first; BATCH_MESSAGES + 1];
    for refused in [queue.extend(name, &many, SECOND).await, queue.acknowledge(name, &many).await] {
        assert!(matches!(refused, Err(Error::TooLarge { .. })), "{name}: 11 receipts gave {refused:?}");
    }
    Ok(())
}

async fn more_than_the_limits_sends_nothing<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let sized = |len: usize| Bytes::from(vec![b'x'; len]);
    let calls = [
        bodies(BATCH_MESSAGES + 1),
        vec![sized(BATCH_BYTES + 1)],
        vec![sized(BATCH_BYTES / 2 + 1), sized(BATCH_BYTES / 2)],
    ];
    for call in &calls {
        let refused = queue.send(name, call).await;
        let (count, total) = (call.len(), call.iter().map(Bytes::len).sum::<usize>());
        assert!(
            matches!(refused, Err(Error::TooLarge { messages, bytes }) if messages == count && bytes == total),
            "{name}: {count} messages of {total} bytes gave {refused:?}"
        );
    }
    for _ in 0..2 {
        let got = steady(name, async || queue.receive(name, BATCH_MESSAGES, SECOND, SECOND).await).await;
        assert!(got.is_empty(), "{name}: a call that was refused has sent something");
    }
    Ok(())
}

async fn the_limits_themselves_are_fine<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let large = Bytes::from((0..BATCH_BYTES).map(|i| (i / 3) as u8).collect::<Vec<u8>>());
    // Ten that fill a call, each of its own content.
    let tenths: Vec<Bytes> = (0..BATCH_MESSAGES).map(|i| vec![i as u8; BATCH_BYTES / 10].into()).collect();
    for call in [std::slice::from_ref(&large), &tenths] {
        let accepted = queue.send(name, call).await?;
        assert_eq!(accepted.len(), call.len(), "{name}: not one answer for each message");
        let refused = call.iter().zip(&accepted).filter(|(_, accepted)| !**accepted);
        let refused: Vec<Bytes> = refused.map(|(body, _)| body.clone()).collect();
        send(queue, name, &refused).await;
    }
    gather(queue, name, &[std::slice::from_ref(&large), &tenths].concat()).await;
    Ok(())
}

async fn a_receive_returns_no_more_than_asked<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &bodies(25)).await;
    for (asked, most) in [(1, 1), (3, 3), (10, 10), (1000, BATCH_MESSAGES)] {
        let got = queue.receive(name, asked, SECOND, 2 * SECOND).await?;
        assert!(got.len() <= most, "{name}: asked for {asked}, got {}", got.len());
        expect(!got.is_empty(), "a queue with messages gave none")?;
    }
    gather(queue, name, &bodies(25)).await;
    Ok(())
}

async fn a_poll_ends_when_a_message_arrives<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let start = Instant::now();
    let late = async {
        sleep(SECOND).await;
        send(queue, name, &[one()]).await;
    };
    let (got, ()) = tokio::join!(queue.receive(name, 1, SECOND, LONGEST_POLL), late);
    let waited = start.elapsed();
    gather(queue, name, &[one()]).await;
    expect(got?.len() == 1, "a long poll ended without the message that arrived")?;
    expect(waited < 8 * SECOND, format!("a long poll noticed after {waited:?} what was sent after 1 s"))
}

async fn a_poll_ends_when_a_lease_does<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &[one()]).await;
    take(queue, name, 2 * SECOND).await;
    let start = Instant::now();
    let got = queue.receive(name, 1, SECOND, LONGEST_POLL).await?;
    let waited = start.elapsed();
    expect(got.len() == 1, "a long poll ended without the message whose lease ended")?;
    expect(waited < 10 * SECOND, format!("a long poll noticed after {waited:?} a lease's end after 2 s"))
}

async fn a_poll_of_an_empty_queue_ends_with_none<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    for wait in [Duration::ZERO, 2 * SECOND] {
        let start = Instant::now();
        let got = queue.receive(name, BATCH_MESSAGES, SECOND, wait).await?;
        let waited = start.elapsed();
        assert!(got.is_empty(), "{name}: received what was never sent");
        assert!(waited < wait + 20 * SECOND, "{name}: a poll of {wait:?} took {waited:?}");
        expect(waited + SECOND / 2 > wait, format!("a poll of {wait:?} ended after {waited:?}"))?;
        expect(waited < wait + 3 * SECOND, format!("a poll of {wait:?} took {waited:?}"))?;
    }
    Ok(())
}

async fn creating_a_queue_again_leaves_it_as_it_is<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &bodies(2)).await;
    let leased = take(queue, name, 20 * SECOND).await;
    steady(name, async || queue.create(name).await).await;
    let held = queue.extend(name, receipt_of(&leased), SECOND).await?;
    gather(queue, name, &bodies(2)).await;
    expect(held == [true], "creating a queue again ended a lease")
}

async fn a_queue_that_does_not_exist_is_an_error<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let missing = format!("{name}-x");
    let receipts = [Receipt("1".into())];
    let calls = [
        queue.send(&missing, &[one()]).await.err(),
        queue.receive(&missing, 1, SECOND, SECOND).await.err(),
        queue.acknowledge(&missing, &receipts).await.err(),
        queue.extend(&missing, &receipts, SECOND).await.err(),
    ];
    for error in calls {
        match error {
            Some(Error::NoQueue(named)) => assert_eq!(named, missing, "the error names another queue"),
            Some(Error::Unavailable(what)) => return Err(Odd(what)),
            other => panic!("{missing}: a queue that does not exist gave {other:?}"),
        }
    }
    steady(name, async || queue.delete(&missing).await).await;
    Ok(())
}

async fn a_deleted_queue_does_no_more<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    send(queue, name, &bodies(3)).await;
    steady(name, async || queue.delete(name).await).await;
    // AWS takes up to a minute.
    let start = Instant::now();
    loop {
        match queue.receive(name, 1, SECOND, Duration::ZERO).await {
            Err(Error::NoQueue(_)) => break,
            Ok(_) | Err(Error::Unavailable(_)) => sleep(SECOND).await,
            Err(error) => panic!("{name}: a deleted queue gave {error}"),
        }
        assert!(start.elapsed() < LOST, "{name}: a deleted queue goes on");
    }
    let sent = queue.send(name, &[one()]).await;
    match sent {
        Err(Error::NoQueue(_)) => Ok(()),
        Err(Error::Unavailable(what)) => Err(Odd(what)),
        other => panic!("{name}: sending to a deleted queue gave {other:?}"),
    }
}

async fn a_dropped_receive_loses_nothing<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let bodies = bodies(20);
    let sender = async {
        for call in bodies.chunks(2) {
            send(queue, name, call).await;
            sleep(Duration::from_millis(7)).await;
        }
    };
    let dropper = async {
        for patience in 0..40 {
            let receive = queue.receive(name, 2, SECOND, 5 * SECOND);
            // What it received, if anything, is dropped as well.
            let _ = timeout(Duration::from_millis(patience), receive).await;
        }
    };
    tokio::join!(sender, dropper);
    gather(queue, name, &bodies).await;
    Ok(())
}

async fn a_dropped_poll_leaves_the_message_to_others<Q: Queue + ?Sized>(queue: &Q, name: &str) -> Check {
    let start = Instant::now();
    // The first gives up at the moment at which the message is sent.
    let gives_up = timeout(SECOND, queue.receive(name, 1, 2 * SECOND, 20 * SECOND));
    let stays = async {
        sleep(SECOND / 10).await;
        queue.receive(name, 1, 2 * SECOND, 20 * SECOND).await
    };
    let sender = async {
        sleep(SECOND).await;
        send(queue, name, &[one()]).await;
    };
    let (_, got, ()) = tokio::join!(gives_up, stays, sender);
    let waited = start.elapsed();
    gather(queue, name, &[one()]).await;
    expect(got?.len() == 1, "a poll missed a message because another poll was dropped")?;
    expect(waited < 10 * SECOND, format!("the message was noticed after {waited:?}"))
}
