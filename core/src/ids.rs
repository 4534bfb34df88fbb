//! Names of jobs, nodes and workers: short text that can stand in a queue's name or an object's key.

use std::fmt;

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub String);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A job: one call of `remote_parallel_map`. It prefixes the job's objects and names its queues.
    JobId
);
id!(
    /// A node: one machine that runs an agent.
    NodeId
);
id!(
    /// One life of one worker, `node/slot.incarnation`. Log sequences count within it.
    WorkerId
);

impl JobId {
    /// A new name, from 60 random bits: enough that two of a million jobs meet with a chance of 1 in two million.
    pub fn random(rng: &mut impl Rng) -> Self {
        Self(random_name(rng))
    }
}

/// Twelve characters of base32, without those that look alike.
pub fn random_name(rng: &mut impl Rng) -> String {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    (0..12).map(|_| char::from(LETTERS[rng.random_range(0..LETTERS.len())])).collect()
}
