//! Runs a function on all of many inputs at once and gives the results as if it had run here.
//!
//! A [`Cluster`] is where jobs run; [`Cluster::embedded`] is this machine. A [`Prepared`] function and
//! [`Options`] make a job: [`Cluster::start`] gives a [`Submitter`] for its inputs, which may be
//! without end, and a [`Job`], a stream of [`Event`]s: results as they finish, or in the order of the
//! inputs, and what the calls print. [`blocking`] is the same without `async`.
//!
//! ```no_run
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     burla::init();
//!     let cluster = burla::blocking::Cluster::embedded()?;
//!     let function = burla::python("stats.py:word_count", None, &[])?;
//!     let (inputs, job) = cluster.start(function, burla::Options::default())?;
//!     std::thread::spawn(move || {
//!         for text in ["to be", "or not to be"] {
//!             inputs.push_blocking(burla::Input::Json(serde_json::to_string(text)?.as_bytes()))?;
//!         }
//!         inputs.close();
//!         Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
//!     });
//!     for event in job {
//!         if let burla::Event::Finished(finished) = event? {
//!             println!("{}: {:?}", finished.index, finished.outcome);
//!         }
//!     }
//!     Ok(())
//! }
//! ```
//!
//! A job that runs here starts small processes of its own, which are this same program: a program that
//! uses [`Cluster::embedded`] calls [`init`] first of all.

pub mod blocking;
mod bundle;
mod cluster;
mod driver;
#[cfg(feature = "embedded")]
mod embedded;
mod error;
mod function;
mod job;
mod logs;
mod order;
mod packer;
mod python;

pub use burla_core::{
    envelope::{MAX_LINE, Stream},
    record::{Failure, FailureKind},
};
pub use cluster::Cluster;
#[cfg(feature = "embedded")]
pub use embedded::init;
pub use error::PrepareError;
pub use function::{Prepared, command, python};
pub use job::{Error, Event, Finished, Job, Line, Options, Outcome, Progress, StartError, Wait};
pub use packer::{Input, PushError, Submitter};
