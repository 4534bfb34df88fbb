//! The one place that reads the wall clock.

use std::time::{Duration, UNIX_EPOCH};

/// Milliseconds since the Unix epoch, as leases and heartbeats carry them between machines.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Millis(pub u64);

impl Millis {
    /// This moment plus `duration`.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }

    /// How long ago `earlier` was, zero if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(earlier.0))
    }
}

/// Tells the time. A simulation gives its own, so that paused tokio time and leases agree.
pub trait Clock: Send + Sync + 'static {
    /// The time now.
    fn now(&self) -> Millis;
}

/// Wall time as of its making, then a clock that stands still while the machine sleeps: a lease
/// between parts of one process does not end because a lid was closed.
#[derive(Clone, Copy, Debug)]
pub struct Steady {
    wall: Millis,
    since: tokio::time::Instant,
}

impl Steady {
    /// A clock that is right now.
    #[must_use]
    pub fn new() -> Self {
        Self { wall: Wall.now(), since: tokio::time::Instant::now() }
    }
}

impl Default for Steady {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for Steady {
    fn now(&self) -> Millis {
        self.wall.plus(self.since.elapsed())
    }
}

/// The machine's wall clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wall;

impl Clock for Wall {
    #[expect(clippy::disallowed_methods, reason = "this is the one place")]
    fn now(&self) -> Millis {
        let since = std::time::SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Millis::default().plus(since)
    }
}
