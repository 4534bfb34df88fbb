//! Reads and writes `cluster/state`, against others who do the same.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use burla_core::{
    clock::{Clock, Millis},
    control,
    ids::{self, JobId},
    store::{self, ObjectStore, When},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::{
    names,
    state::{State, VERSION},
};

/// How often a change is tried; with the pauses between, some five seconds.
const TRIES: u32 = 30;

/// The state, in its object.
pub struct Ledger {
    store: Arc<dyn ObjectStore>,
    clock: Arc<dyn Clock>,
    rng: Mutex<StdRng>,
}

impl Ledger {
    /// `seed` decides the pauses between tries, and the name of a state that does not exist yet:
    /// no two services may have the same one.
    #[must_use]
    pub fn new(store: Arc<dyn ObjectStore>, clock: Arc<dyn Clock>, seed: u64) -> Self {
        Self { store, clock, rng: Mutex::new(StdRng::seed_from_u64(seed)) }
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> Millis {
        self.clock.now()
    }

    /// Changes the state, and gives back the new one with what `change` answered. `change` is
    /// repeated on what others wrote as long as they are faster; if it changes nothing, nothing is
    /// written, and if it fails, the state stays.
    pub async fn update<T>(
        &self,
        mut change: impl FnMut(&mut State, Millis) -> Result<T, control::Error>,
    ) -> Result<(State, T), control::Error> {
        for attempt in 0..TRIES {
            let (before, version) = self.load().await?;
            let mut state = before.clone();
            let answer = change(&mut state, self.clock.now())?;
            if state == before || self.swap(&state, version).await? {
                return Ok((state, answer));
            }
            tokio::time::sleep(self.pause(attempt)).await;
        }
        Err(unavailable("too many others write the cluster's state"))
    }

    /// The state, and under which condition it may be replaced.
    async fn load(&self) -> Result<(State, When), control::Error> {
        let object = match self.store.get(names::STATE, None).await {
            Ok(object) => object,
            Err(store::Error::NotFound(_)) => return Ok((State::new(self.name()), When::Absent)),
            Err(error) => return Err(unavailable(error)),
        };
        let mut state: State = serde_json::from_slice(&object.content)
            .map_err(|error| unavailable(format!("{} is damaged: {error}", names::STATE)))?;
        if state.version != VERSION {
            let found = state.version;
            let message = format!("{} is of version {found}, this program reads {VERSION}", names::STATE);
            return Err(unavailable(message));
        }
        self.renew_leases(&mut state).await?;
        Ok((state, When::Matches(object.etag)))
    }

    /// Pings don't write the state; so a lease that looks over may have been renewed.
    async fn renew_leases(&self, state: &mut State) -> Result<(), control::Error> {
        let now = self.clock.now();
        for (id, job) in state.jobs.iter_mut().filter(|(_, job)| !job.is_active(now)) {
            match self.store.get(&names::lease_key(id), None).await {
                Ok(object) => {
                    let until = serde_json::from_slice(&object.content).unwrap_or_default();
                    job.lease = job.lease.max(until);
                }
                Err(store::Error::NotFound(_)) => {}
                Err(error) => return Err(unavailable(error)),
            }
        }
        Ok(())
    }

    /// Writes down until when a job's client is taken to be there.
    pub async fn put_lease(&self, job: &JobId, until: Millis) -> Result<(), control::Error> {
        let content = until.0.to_string().into();
        self.store.put(&names::lease_key(job), content, When::Always).await.map_err(unavailable)?;
        Ok(())
    }

    /// Takes back what [`Ledger::put_lease`] wrote for a job that turned out to have ended.
    pub async fn delete_lease(&self, job: &JobId) -> Result<(), control::Error> {
        self.store.delete(&[names::lease_key(job)]).await.map_err(unavailable)
    }

    /// Whether nobody else was first.
    async fn swap(&self, state: &State, when: When) -> Result<bool, control::Error> {
        let json = serde_json::to_vec(state).map_err(|error| control::Error::Impossible {
            message: format!("the request can't be written down: {error}"),
        })?;
        match self.store.put(names::STATE, json.into(), when).await {
            Ok(_) => Ok(true),
            Err(store::Error::Precondition(_)) => Ok(false),
            Err(error) => Err(unavailable(error)),
        }
    }

    fn name(&self) -> String {
        let mut name = ids::random_name(&mut *self.rng.lock().expect("nobody panics with it"));
        name.truncate(8);
        name
    }

    /// Up to 5 ms, doubling, to a third of a second.
    fn pause(&self, attempt: u32) -> Duration {
        let longest = 5_000 << attempt.min(6);
        Duration::from_micros(self.rng.lock().expect("nobody panics with it").random_range(0..longest))
    }
}

/// An error that is worth another try.
pub(crate) fn unavailable(error: impl ToString) -> control::Error {
    control::Error::Unavailable { message: error.to_string() }
}
