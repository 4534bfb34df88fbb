//! The seam to what a slot is: a task of this process, a process, or a container.

use std::{collections::BTreeMap, io, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use burla_core::{
    envelope::Assignment,
    ids::{WorkerId, random_name},
    job::{Function, JobSpec, PythonSource},
    queue::Queue,
    store::ObjectStore,
};
use rand::{SeedableRng, rngs::StdRng};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::{
    command,
    files::Files,
    keeper::{Keeper, Program},
    logs::Nonce,
    outbox::Outbox,
    reenter::{Reenter, Role},
    runtime::{ChildRuntime, Launch, Unable},
    scratch::{Scratch, SlotFolders},
    worker::Worker,
};

/// What keeps a worker from working may pass: it is tried again after these.
const PAUSES: [Duration; 3] = [Duration::from_millis(100), Duration::from_secs(1), Duration::from_secs(5)];

/// Starts workers and ends them.
///
/// # Contract
///
/// - A started worker works until it ends of itself or is killed; killed, nothing of it is left when
///   `kill` returns.
/// - A worker that can't work at all tells the job's client why, on the job's result queue.
#[async_trait]
pub trait WorkerHost: Send + Sync + 'static {
    /// Starts a worker.
    async fn start(&self, slot: Slot) -> io::Result<Box<dyn Started>>;
}

/// A worker to start.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its name, never used before.
    pub worker: WorkerId,
    /// What it works on.
    pub assignment: Assignment,
}

/// A worker that was started.
#[async_trait]
pub trait Started: Send + Sync {
    /// Waits until it ends of itself. Cancel-safe.
    async fn ended(&mut self);

    /// Ends it, with all that it started.
    async fn kill(&mut self);
}

/// Runs workers as tasks of this process; what they call runs in processes of its own.
pub struct Tasks {
    /// The job's queues.
    pub queue: Arc<dyn Queue>,
    /// The cluster's objects.
    pub store: Arc<dyn ObjectStore>,
    /// Where bundles and slots have their folders.
    pub scratch: Arc<Scratch>,
    /// How this program starts its small processes.
    pub reenter: Reenter,
}

#[async_trait]
impl WorkerHost for Tasks {
    async fn start(&self, slot: Slot) -> io::Result<Box<dyn Started>> {
        let (queue, store) = (self.queue.clone(), self.store.clone());
        let (scratch, reenter) = (self.scratch.clone(), self.reenter.clone());
        Ok(Box::new(Task(tokio::spawn(async move {
            let Slot { worker, assignment } = slot;
            let (job, queues) = (assignment.job.clone(), assignment.queues.clone());
            let outbox = || {
                let (job, worker, queues) = (job.clone(), worker.clone(), queues.clone());
                Outbox::new(job, worker, queues, queue.clone(), store.clone())
            };
            let work = || async {
                let spec = &assignment.spec;
                let bundle = match &spec.bundle {
                    Some(blob) => Some(scratch.bundle(blob, &*store).await?),
                    None => None,
                };
                let folders = scratch.slot(&worker, bundle.as_deref())?;
                let launch = launch(spec, bundle, &folders, &scratch, &reenter)?;
                let keeper =
                    Keeper::start(&reenter, scratch.path(), &format!("{SLOT_VARIABLE}={}", launch.nonce.0))?;
                let runtime = Box::new(ChildRuntime::new(launch, keeper));
                let worker = Worker {
                    job: job.clone(),
                    spec: spec.clone(),
                    inputs: queues.inputs.clone(),
                    queue: queue.clone(),
                    store: store.clone(),
                    runtime,
                    outbox: outbox(),
                    files: Files::new(folders.files.clone()),
                    state: Default::default(),
                };
                // The folders outlive the worker and all that it started.
                let ended = worker.run().await;
                drop(folders);
                anyhow::Ok(ended?)
            };
            for pause in PAUSES {
                if work().await.is_ok() {
                    return;
                }
                tokio::time::sleep(pause).await;
            }
            if let Err(error) = work().await {
                let message = format!("worker {worker} failed again and again: {error}");
                let unable = Unable { message, hint: None, traceback: None, usage: false };
                // A job whose queues are gone has nobody to tell.
                let _ = outbox().unable(unable).await;
            }
        }))))
    }
}

struct Task(JoinHandle<()>);

#[async_trait]
impl Started for Task {
    async fn ended(&mut self) {
        // A worker that panicked has ended too: its messages come back when their leases end.
        let _ = (&mut self.0).await;
    }

    async fn kill(&mut self) {
        self.0.abort();
        if !self.0.is_finished() {
            self.ended().await;
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How to start the process that runs the calls of `spec`.
fn launch(
    spec: &JobSpec,
    bundle: Option<PathBuf>,
    folders: &SlotFolders,
    scratch: &Scratch,
    reenter: &Reenter,
) -> io::Result<Launch> {
    let nonce = Nonce([random_name(&mut system_rng()), random_name(&mut system_rng())].concat());
    let files = spec.files.then(|| folders.files.clone());
    let mut env = environment(spec);
    env.insert(SLOT_VARIABLE.into(), nonce.0.clone());
    env.insert("TMPDIR".into(), folders.temporary.display().to_string());
    let (argv, job) = match &spec.function {
        Function::Python { interpreter, path, source, name, spelled, origin } => {
            let root = bundle.unwrap_or_else(|| folders.work.clone());
            let source = match source {
                PythonSource::File(file) => json!({ "file": file }),
                PythonSource::Module(module) => json!({ "module": module }),
            };
            let job = json!({
                "root": root,
                "path": path.iter().map(|folder| root.join(folder)).collect::<Vec<_>>(),
                "source": source,
                "name": name,
                "spelled": spelled,
                "cwd": folders.work,
                "files": files,
                "nonce": nonce.0,
                "origin": origin,
            });
            // A bundle may be shared with other slots, and is not ours to write into.
            env.entry("PYTHONDONTWRITEBYTECODE".into()).or_insert_with(|| "1".into());
            (vec![text(interpreter)?, text(&scratch.runner()?)?], job.to_string())
        }
        Function::Command { argv } => {
            let (variable, role) = Reenter::variable(Role::Command);
            env.insert(variable, role);
            let job = command::Job { argv: argv.clone(), files, nonce: nonce.0.clone() };
            (reenter.argv(), serde_json::to_string(&job)?)
        }
    };
    let shared_variable = command::SHARED_VARIABLE.into();
    let program = Program { argv, env, shared_variable, cwd: folders.work.clone(), memory: spec.ram };
    Ok(Launch { program, job, nonce })
}

fn text(path: &std::path::Path) -> io::Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| io::Error::other(format!("the path {} is not UTF-8", path.display())))
}

fn system_rng() -> StdRng {
    StdRng::try_from_rng(&mut rand::rngs::SysRng).unwrap_or_else(|_| StdRng::seed_from_u64(0))
}

/// The variables that libraries size their thread pools by.
const THREADS: [&str; 6] = [
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
];

/// Marks all processes of a slot.
const SLOT_VARIABLE: &str = "BURLA_SLOT";

/// What a call sees of this machine's environment: where programs, the home and the language are.
const KEPT: [&str; 8] = ["PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH"];

fn environment(spec: &JobSpec) -> BTreeMap<String, String> {
    let kept = |name: &str| KEPT.contains(&name) || name.starts_with("LC_");
    let mut env: BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| kept(name))
        .collect();
    // A call with a part of a CPU still needs a thread.
    let threads = (spec.cpu.floor() as u64).max(1).to_string();
    env.extend(THREADS.map(|name| (name.to_owned(), threads.clone())));
    env.extend(spec.env.clone());
    env
}
