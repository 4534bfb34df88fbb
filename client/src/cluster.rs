//! Where jobs run.

use std::{collections::BTreeMap, sync::Arc};

use burla_core::{
    control::{Capacity, Control, Error as ControlError, Reply, Request},
    ids::JobId,
    job::JobSpec,
    queue::Queue,
    store::{ObjectStore, When},
};
use rand::{SeedableRng, rngs::StdRng};
use tokio::sync::watch;

use crate::{
    driver::Driver,
    function::Prepared,
    job::{Job, Options, StartError},
    packer::Submitter,
};

/// A place to run jobs in: the services of a cluster, or the same services in this process.
/// Dropping it ends what runs in this process; jobs should have ended before.
pub struct Cluster {
    pub(crate) place: &'static str,
    /// What its one machine has, where there is only one.
    pub(crate) capacity: Option<Capacity>,
    pub(crate) queue: Arc<dyn Queue>,
    pub(crate) store: Arc<dyn ObjectStore>,
    pub(crate) control: Arc<dyn Control>,
    /// Tells jobs, by being dropped, that the cluster is gone.
    pub(crate) alive: watch::Sender<()>,
    #[cfg(feature = "embedded")]
    pub(crate) embedded: Option<crate::embedded::Services>,
}

impl Cluster {
    /// Where a job with these options would run, in a few words: `embedded, 2 slots`.
    #[must_use]
    pub fn place(&self, options: &Options) -> String {
        match self.capacity.map(|capacity| {
            let slots = capacity.slots(options.cpu, options.ram);
            slots.min(options.max_parallelism.unwrap_or(slots))
        }) {
            Some(1) => format!("{}, 1 slot", self.place),
            Some(slots) => format!("{}, {slots} slots", self.place),
            None => self.place.to_owned(),
        }
    }

    /// Starts a job. Its inputs go into the submitter; what comes of them out of the job.
    pub async fn start(&self, function: Prepared, options: Options) -> Result<(Submitter, Job), StartError> {
        let id = JobId::random(&mut StdRng::try_from_rng(&mut rand::rngs::SysRng).map_err(unavailable)?);
        if let (Some(blob), Some(content)) = (&function.blob, &function.bundle) {
            match self.store.put(&blob.key(), content.clone(), When::Absent).await {
                Ok(_) | Err(burla_core::store::Error::Precondition(_)) => {}
                Err(error) => return Err(unavailable(error)),
            }
        }
        let codec = function.codec();
        let spec = job_spec(function, &options);
        let request = Request::Start { job: id.clone(), spec };
        let status = match self.control.call(request).await {
            Ok(Reply::Job(status)) => status,
            Ok(Reply::Done) => return Err(unavailable("main_service did not describe the job")),
            Err(ControlError::Impossible { message }) => return Err(StartError::Impossible(message)),
            Err(error) => return Err(unavailable(error)),
        };
        Ok(Driver::start(id, codec, options, status, self))
    }

    /// Ends what runs in this process, and waits until it is gone.
    pub async fn shutdown(self) {
        drop(self.alive);
        #[cfg(feature = "embedded")]
        if let Some(services) = self.embedded {
            services.shutdown().await;
        }
    }
}

fn unavailable(error: impl std::fmt::Display) -> StartError {
    StartError::Unavailable(error.to_string())
}

fn job_spec(function: Prepared, options: &Options) -> JobSpec {
    let env: BTreeMap<String, String> = options.env.clone();
    JobSpec {
        function: function.function,
        bundle: function.blob,
        cpu: options.cpu,
        ram: options.ram,
        max_parallelism: options.max_parallelism,
        retries: options.retries,
        timeout: options.timeout,
        env,
        files: options.files,
    }
}
