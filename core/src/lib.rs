//! What burla's programs say to each other, and the seams through which they say it.
//!
//! [`envelope`] holds the messages between client, agent and worker, [`wire`] is the only place
//! that turns them into bytes and back, [`control`] is the JSON spoken with main_service, and
//! [`job`] is the description of a job that all of them share. [`queue::Queue`] and
//! [`store::ObjectStore`] are the seams to the cloud; each has an embedded side here.

#[cfg(not(target_os = "linux"))]
compile_error!("burla runs on Linux only: it uses memfd, pidfd, subreapers and /proc");

pub mod clock;
#[cfg(feature = "conformance")]
pub mod conformance;
pub mod control;
pub mod envelope;
pub mod ids;
pub mod interval;
pub mod job;
pub mod queue;
pub mod record;
pub mod spill;
pub mod store;
pub mod wire;
