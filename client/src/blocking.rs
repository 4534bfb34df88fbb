//! The same without `async`, for threads that may wait. Not to be used from within async code.

use tokio::runtime::Runtime;

use crate::{
    function::Prepared,
    job::{Error, Event, Options, Progress, StartError},
    packer::Submitter,
};

/// A place to run jobs in, with a runtime of its own.
pub struct Cluster {
    inner: Option<crate::Cluster>,
    runtime: std::sync::Arc<Runtime>,
}

/// A running job: an iterator over what it tells. Dropping it cancels the job.
pub struct Job {
    inner: crate::Job,
    runtime: std::sync::Arc<Runtime>,
}

impl Cluster {
    /// This machine: jobs run in this process and its children.
    #[cfg(feature = "embedded")]
    pub fn embedded() -> Result<Self, StartError> {
        let runtime = Runtime::new().map_err(|error| StartError::Unavailable(error.to_string()))?;
        let inner = Some(runtime.block_on(crate::Cluster::embedded())?);
        Ok(Self { inner, runtime: runtime.into() })
    }

    /// Starts a job. Its inputs go into the submitter, from another thread if there are many, and
    /// what comes of them out of the job.
    pub fn start(&self, function: Prepared, options: Options) -> Result<(Submitter, Job), StartError> {
        let gone = || StartError::Unavailable("the cluster was shut down".into());
        let inner = self.inner.as_ref().ok_or_else(gone)?;
        let (submitter, inner) = self.runtime.block_on(inner.start(function, options))?;
        Ok((submitter, Job { inner, runtime: self.runtime.clone() }))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            self.runtime.block_on(inner.shutdown());
        }
    }
}

impl Job {
    /// Stops the job, as [`crate::Job::cancel`] does.
    pub fn cancel(&self) {
        self.inner.cancel();
    }

    /// How the job stands.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.inner.progress()
    }
}

impl Iterator for Job {
    type Item = Result<Event, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let runtime = self.runtime.clone();
        runtime.block_on(self.inner.next())
    }
}
