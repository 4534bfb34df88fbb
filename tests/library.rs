//! The crate `burla`, as a program that is not the command uses it.
//!
//! A job's small processes are this very program, so `main` is its own and calls `burla::init()` first of
//! all. It speaks as much of the test harness's language as cargo and nextest need.
#![expect(clippy::print_stdout, reason = "the verdicts of tests are for people and for tools")]

use std::{
    panic::{self, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use burla::{
    Cluster, Error, Event, FailureKind, Finished, Input, Job, Options, Outcome, Prepared, PushError,
    StartError, blocking,
};
use burla_tests::{Burla, LIMIT, eventually, python, wait_until};

const TESTS: &[(&str, fn())] = &[
    ("results_are_a_stream_in_the_order_of_the_inputs", results_are_a_stream_in_the_order_of_the_inputs),
    ("a_job_is_an_iterator_for_threads_that_wait", a_job_is_an_iterator_for_threads_that_wait),
    ("what_calls_print_comes_before_their_results", what_calls_print_comes_before_their_results),
    ("failures_tell_why", failures_tell_why),
    (
        "a_failure_is_told_at_once_though_its_turn_is_later",
        a_failure_is_told_at_once_though_its_turn_is_later,
    ),
    ("commands_give_bytes", commands_give_bytes),
    ("options_are_followed", options_are_followed),
    ("files_are_inputs", files_are_inputs),
    ("what_cannot_run_is_an_error", what_cannot_run_is_an_error),
    ("a_function_that_does_not_load_ends_the_job", a_function_that_does_not_load_ends_the_job),
    (
        "inputs_that_are_no_json_are_refused_and_change_nothing",
        inputs_that_are_no_json_are_refused_and_change_nothing,
    ),
    ("inputs_without_end_are_taken_as_they_are_needed", inputs_without_end_are_taken_as_they_are_needed),
    ("jobs_of_one_cluster_run_side_by_side", jobs_of_one_cluster_run_side_by_side),
    ("a_cancelled_job_tells_what_became_of_every_input", a_cancelled_job_tells_what_became_of_every_input),
    ("a_dropped_job_leaves_no_process_behind", a_dropped_job_leaves_no_process_behind),
    ("a_dropped_cluster_leaves_no_process_behind", a_dropped_cluster_leaves_no_process_behind),
    ("a_program_without_init_is_told", a_program_without_init_is_told),
];

fn main() -> ExitCode {
    if std::env::args().any(|arg| arg == "--without-init") {
        return without_init();
    }
    burla::init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let before = std::iter::once("").chain(args.iter().map(String::as_str));
    let is_value = |before: &str| ["--format", "--test-threads", "--color"].contains(&before);
    let filters: Vec<&String> = before
        .zip(&args)
        .filter(|(before, arg)| !arg.starts_with('-') && !is_value(before))
        .map(|(_, arg)| arg)
        .collect();
    let wanted = |name: &str| {
        let fits = |filter: &&String| if has("--exact") { name == *filter } else { name.contains(*filter) };
        !has("--ignored") && (filters.is_empty() || filters.iter().any(fits))
    };
    let chosen: Vec<_> = TESTS.iter().filter(|(name, _)| wanted(name)).collect();
    if has("--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    count_panics_elsewhere();
    let mut failed = 0;
    for (name, test) in &chosen {
        let before = PANICS_ELSEWHERE.load(Ordering::Relaxed);
        let _done = watch(name);
        let well = catch_unwind(test).is_ok() && PANICS_ELSEWHERE.load(Ordering::Relaxed) == before;
        failed += usize::from(!well);
        println!("test {name} ... {}", if well { "ok" } else { "FAILED" });
    }
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    let (passed, others) = (chosen.len() - failed, TESTS.len() - chosen.len());
    println!(
        "\ntest result: {verdict}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {others} filtered out\n"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Ends the program if a test takes too long; one that has ended drops what this returns.
fn watch(name: &'static str) -> mpsc::Sender<()> {
    let (done, ended) = mpsc::channel();
    std::thread::spawn(move || {
        if ended.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            println!(
                "test {name} ... FAILED: it took longer than {LIMIT:?}\n\ntest result: FAILED. 0 passed; 1 failed"
            );
            std::process::exit(1);
        }
    });
    done
}

/// Panics of threads that no test waits for: those of the library itself.
static PANICS_ELSEWHERE: AtomicUsize = AtomicUsize::new(0);

fn count_panics_elsewhere() {
    let usual = panic::take_hook();
    let main = std::thread::current().id();
    panic::set_hook(Box::new(move |info| {
        PANICS_ELSEWHERE.fetch_add(usize::from(std::thread::current().id() != main), Ordering::Relaxed);
        usual(info);
    }));
}

/// A function of a file that holds this source; the folder is to be kept.
fn function(source: &str, name: &str) -> (Burla, Prepared) {
    let burla = Burla::new();
    let file = burla.file("f.py", source);
    let prepared =
        burla::python(&format!("{}:{name}", file.display()), Some(python()), &[]).expect("it is there");
    (burla, prepared)
}

fn double() -> (Burla, Prepared) {
    function("def double(x): return 2 * x\n", "double")
}

/// Runs async code as a user's `main` would.
fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Runtime::new().expect("a runtime").block_on(work)
}

fn ok(finished: &Finished) -> &str {
    match &finished.outcome {
        Outcome::Ok { result, .. } => str::from_utf8(result).expect("JSON is text"),
        other => panic!("input {} has no result: {other:?}", finished.index),
    }
}

/// Everything that a job tells until its end.
async fn all(mut job: Job) -> (Vec<Finished>, Vec<(Option<u64>, String)>) {
    let (mut finished, mut lines) = (Vec::new(), Vec::new());
    while let Some(event) = job.next().await {
        match event.expect("the job goes well") {
            Event::Finished(one) => finished.push(one),
            Event::Line(line) => lines.push((line.index, String::from_utf8_lossy(&line.text).into_owned())),
            _ => {}
        }
    }
    (finished, lines)
}

/// Runs one job over these inputs.
fn map(function: Prepared, options: Options, inputs: &[&str]) -> (Vec<Finished>, Vec<(Option<u64>, String)>) {
    run(async {
        let cluster = Cluster::embedded().await.expect("this machine");
        let (submitter, job) = cluster.start(function, options).await.expect("it starts");
        for input in inputs {
            submitter.push(Input::Json(input.as_bytes())).await.expect("it is taken");
        }
        submitter.close();
        let told = all(job).await;
        cluster.shutdown().await;
        told
    })
}

fn results_are_a_stream_in_the_order_of_the_inputs() {
    let (_folder, function) = double();
    run(async {
        let cluster = Cluster::embedded().await.expect("this machine");
        let (submitter, job) = cluster.start(function, Options::default()).await.expect("it starts");
        let pusher = tokio::spawn(async move {
            for i in 0..1000 {
                submitter.push(Input::Json(i.to_string().as_bytes())).await.expect("it is taken");
            }
        });
        // By the trait alone, as combinators of other crates see it.
        let mut job: std::pin::Pin<Box<dyn futures_core::Stream<Item = Result<Event, Error>>>> =
            Box::pin(job);
        let mut next = 0;
        while let Some(event) = std::future::poll_fn(|context| job.as_mut().poll_next(context)).await {
            if let Event::Finished(finished) = event.expect("the job goes well") {
                assert_eq!((finished.index, ok(&finished)), (next, &*(2 * next).to_string()));
                next += 1;
            }
        }
        assert_eq!(next, 1000);
        pusher.await.expect("all were taken");
        cluster.shutdown().await;
    });
}

fn a_job_is_an_iterator_for_threads_that_wait() {
    let (_folder, function) = double();
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let (submitter, job) = cluster.start(function, Options::default()).expect("it starts");
    let pusher = std::thread::spawn(move || {
        for i in 0..1000 {
            submitter.push_blocking(Input::Json(i.to_string().as_bytes())).expect("it is taken");
        }
        submitter.close();
    });
    let mut results = Vec::new();
    let mut job = job;
    for event in &mut job {
        if let Event::Finished(finished) = event.expect("the job goes well") {
            results.push(ok(&finished).to_owned());
        }
    }
    assert_eq!(results, (0..1000).map(|i| (2 * i).to_string()).collect::<Vec<_>>());
    let progress = job.progress();
    assert_eq!(
        (progress.submitted, progress.total, progress.done, progress.failed),
        (1000, Some(1000), 1000, 0)
    );
    pusher.join().expect("all were taken");
}

fn what_calls_print_comes_before_their_results() {
    let source =
        "import sys\ndef f(x):\n    print('out', x)\n    print('err', x, file=sys.stderr)\n    return x\n";
    let (_folder, function) = function(source, "f");
    let (finished, mut lines) = map(function, Options::default(), &["0", "1", "2"]);
    assert_eq!(finished.iter().map(ok).collect::<Vec<_>>(), ["0", "1", "2"]);
    lines.sort();
    let expected: Vec<_> =
        (0..3).flat_map(|i| ["err", "out"].map(|word| (Some(i), format!("{word} {i}")))).collect();
    assert_eq!(lines, expected);
}

fn failures_tell_why() {
    let (_folder, function) =
        function("def f(x):\n    if x == 1: raise ValueError('one')\n    return x\n", "f");
    let (finished, _) = map(function, Options::default(), &["0", "1", "2"]);
    assert_eq!((ok(&finished[0]), ok(&finished[2])), ("0", "2"));
    let Outcome::Failed { failure, .. } = &finished[1].outcome else { panic!("{:?}", finished[1]) };
    assert_eq!(
        (failure.kind, &*failure.type_name, &*failure.message),
        (FailureKind::Exception, "ValueError", "one")
    );
    assert!(failure.traceback.as_ref().is_some_and(|text| text.contains("line 2, in f")), "{failure:?}");
}

fn a_failure_is_told_at_once_though_its_turn_is_later() {
    // The first input ends only when the failure of the second has been heard of.
    let source = "import os, time\ndef f(gate):\n    while not os.path.exists(gate):\n        time.sleep(0.005)\n    \
                  if gate == '/': raise ValueError('at once')\n    return 'late'\n";
    let (folder, function) = function(source, "f");
    let gate = folder.path("gate");
    let cluster = blocking::Cluster::embedded().expect("this machine");
    // Two slots even where there is one CPU.
    let options = Options { cpu: 0.5, ..Options::default() };
    let (submitter, mut job) = cluster.start(function, options).expect("it starts");
    submitter.push_blocking(Input::Text(gate.to_str().expect("text").as_bytes())).expect("it is taken");
    submitter.push_blocking(Input::Text(b"/")).expect("it is taken");
    submitter.close();
    match job.next().expect("it goes on").expect("the job goes well") {
        Event::Failed { index, failure } => assert_eq!((index, &*failure.message), (1, "at once")),
        other => panic!("{other:?}"),
    }
    folder.file("gate", "");
    let indexes: Vec<_> = job
        .map(|event| match event.expect("the job goes well") {
            Event::Finished(finished) => finished.index,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(indexes, [0, 1]);
}

fn commands_give_bytes() {
    let command =
        burla::command(["sh", "-c", "printf 'a\\377{}'; test {} != 2"].map(String::from).to_vec(), &[]);
    run(async {
        let cluster = Cluster::embedded().await.expect("this machine");
        let (submitter, job) =
            cluster.start(command.expect("it is fine"), Options::default()).await.expect("it starts");
        for input in ["1", "2"] {
            submitter.push(Input::Text(input.as_bytes())).await.expect("it is taken");
        }
        submitter.close();
        let (finished, _) = all(job).await;
        let Outcome::Ok { result, .. } = &finished[0].outcome else { panic!("{:?}", finished[0]) };
        assert_eq!(&result[..], b"a\xff1");
        let Outcome::Failed { failure, output } = &finished[1].outcome else { panic!("{:?}", finished[1]) };
        assert_eq!((failure.kind, &output[..]), (FailureKind::Exit, &b"a\xff2"[..]));
        cluster.shutdown().await;
    });
}

fn options_are_followed() {
    let source = "import os, time\ndef f(x):\n    path = os.environ['CALLS'] + str(x)\n    open(path, 'a').write('.')\n    \
                  if os.path.getsize(path) == 1: raise ValueError('the first time')\n    if x == 1: time.sleep(600)\n    return x\n";
    let (folder, function) = function(source, "f");
    let options = Options {
        retries: 1,
        ordered: false,
        with_input: true,
        timeout: Some(Duration::from_millis(300)),
        env: [("CALLS".into(), folder.path("calls").display().to_string())].into(),
        ..Options::default()
    };
    let (mut finished, _) = map(function, options, &["0", "1", "2"]);
    finished.sort_by_key(|one| one.index);
    assert_eq!((ok(&finished[0]), ok(&finished[2])), ("0", "2"));
    let Outcome::Failed { failure, .. } = &finished[1].outcome else { panic!("{:?}", finished[1]) };
    assert_eq!(failure.kind, FailureKind::Timeout);
    for (one, input) in finished.iter().zip(["0", "1", "2"]) {
        assert_eq!((one.attempts, one.input.as_deref()), (2, Some(input.as_bytes())));
    }
}

fn files_are_inputs() {
    let (folder, function) = function("def f(path): return open(path).read()\n", "f");
    let paths = ["a.txt", "b.txt"].map(|name| folder.file(name, name));
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let options = Options { files: true, ..Options::default() };
    let (submitter, job) = cluster.start(function, options).expect("it starts");
    for path in &paths {
        submitter.push_blocking(Input::File(path)).expect("it is taken");
    }
    let missing = submitter.push_blocking(Input::File(&folder.path("none.txt")));
    assert!(missing.is_err_and(|error| error.to_string().contains("none.txt")));
    submitter.close();
    assert_eq!(results(job), ["\"a.txt\"", "\"b.txt\""]);
}

/// The results of a job that goes well.
fn results(job: blocking::Job) -> Vec<String> {
    job.filter_map(|event| match event.expect("the job goes well") {
        Event::Finished(finished) => Some(ok(&finished).to_owned()),
        _ => None,
    })
    .collect()
}

fn what_cannot_run_is_an_error() {
    let error = burla::python("no/such/file.py:f", Some(python()), &[]).expect_err("it is not there");
    assert_eq!(error.message, "no/such/file.py does not exist");
    assert!(error.hint.is_some());
    let (_folder, function) = double();
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let options = Options { cpu: 1e6, ..Options::default() };
    match cluster.start(function.clone(), options) {
        Err(StartError::Impossible(message)) => assert!(message.contains("1000000 CPUs"), "{message}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("a million CPUs"),
    }
    // That was no harm to the cluster.
    let (submitter, job) = cluster.start(function, Options::default()).expect("it starts");
    submitter.push_blocking(Input::Json(b"21")).expect("it is taken");
    submitter.close();
    assert_eq!(results(job), ["42"]);
}

fn a_function_that_does_not_load_ends_the_job() {
    let (_folder, function) = function("def f(x):\n    return (\n", "f");
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let (submitter, mut job) = cluster.start(function, Options::default()).expect("it starts");
    submitter.push_blocking(Input::Json(b"1")).expect("it is taken");
    let error = job.find_map(Result::err).expect("it can't run");
    let Error::Unable { message, usage, traceback, .. } = error else { panic!("{error}") };
    assert!(message.contains("syntax error on line 2") && usage, "{message}");
    assert!(traceback.is_some_and(|text| text.contains("f.py")));
    assert!(job.next().is_none());
}

fn inputs_that_are_no_json_are_refused_and_change_nothing() {
    let (_folder, function) = double();
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let (submitter, job) = cluster.start(function, Options::default()).expect("it starts");
    submitter.push_blocking(Input::Json(b"1")).expect("it is taken");
    for bad in [&b"nonsense"[..], b"1 2", b"", b"[1", b"1,2", b"1]", b"\"\xff\""] {
        let pushed = submitter.push_blocking(Input::Json(bad));
        assert!(matches!(pushed, Err(PushError::NotJson(_) | PushError::NotText)), "{bad:?}: {pushed:?}");
    }
    assert!(matches!(submitter.push_blocking(Input::Text(b"\xff")), Err(PushError::NotText)));
    submitter.push_blocking(Input::Text(b"ab")).expect("it is taken");
    submitter.push_blocking(Input::Json(b" [2] ")).expect("it is taken");
    submitter.close();
    assert_eq!(results(job), ["2", "\"abab\"", "[2, 2]"]);
}

fn inputs_without_end_are_taken_as_they_are_needed() {
    let (_folder, function) = double();
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let (submitter, mut job) = cluster.start(function, Options::default()).expect("it starts");
    let (tell, told) = mpsc::channel();
    let pusher = std::thread::spawn(move || {
        let mut taken = 0u64;
        while submitter.push_blocking(Input::Json(b"1")).is_ok() {
            taken += 1;
        }
        tell.send(taken).expect("somebody waits");
    });
    for _ in 0..5 {
        let event = job.next().expect("there is no end").expect("the job goes well");
        assert!(matches!(event, Event::Finished(_)), "{event:?}");
    }
    drop(job);
    told.recv_timeout(LIMIT).expect("inputs of a job that is gone are refused");
    pusher.join().expect("it ended");
}

fn jobs_of_one_cluster_run_side_by_side() {
    let (_one, function) = double();
    let (_two, other) = self::function("def f(x): return [x]\n", "f");
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let jobs =
        [function, other].map(|function| cluster.start(function, Options::default()).expect("it starts"));
    for input in ["1", "2", "3"] {
        jobs.iter().for_each(|(submitter, _)| {
            submitter.push_blocking(Input::Json(input.as_bytes())).expect("taken")
        });
    }
    let [one, two] = jobs.map(|(submitter, job)| {
        submitter.close();
        job
    });
    // The second is asked first: neither needs the other to be heard.
    assert_eq!(results(two), ["[1]", "[2]", "[3]"]);
    assert_eq!(results(one), ["2", "4", "6"]);
}

/// A function that tells its process and then does not return.
const STUCK: &str = "import os, subprocess, time\n\
                     def f(x):\n    if x == 0: return 0\n    child = subprocess.Popen(['sleep', '600'])\n    \
                     print(os.getpid(), child.pid, flush=True)\n    time.sleep(600)\n";

/// Waits for a line of `STUCK`, and returns the processes that it names.
fn processes(job: &mut blocking::Job) -> Vec<PathBuf> {
    loop {
        if let Event::Line(line) = job.next().expect("it does not end").expect("the job goes well") {
            let text = String::from_utf8(line.text.to_vec()).expect("numbers");
            let processes: Vec<_> = text.split(' ').map(|pid| Path::new("/proc").join(pid)).collect();
            assert!(processes.len() == 2 && processes.iter().all(|path| path.exists()), "{text}");
            return processes;
        }
    }
}

fn a_cancelled_job_tells_what_became_of_every_input() {
    let (_folder, function) = function(STUCK, "f");
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let (submitter, mut job) = cluster.start(function, Options::default()).expect("it starts");
    for input in [&b"0"[..], b"1", b"2", b"3"] {
        submitter.push_blocking(Input::Json(input)).expect("it is taken");
    }
    let first = job.find_map(|event| match event.expect("the job goes well") {
        Event::Finished(finished) => Some(finished),
        _ => None,
    });
    assert_eq!(first.as_ref().map(ok), Some("0"));
    let processes = processes(&mut job);
    job.cancel();
    let rest: Vec<Finished> = job
        .filter_map(|event| match event.expect("a cancelled job is no error") {
            Event::Finished(finished) => Some(finished),
            _ => None,
        })
        .collect();
    assert_eq!(rest.iter().map(|finished| finished.index).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(rest.iter().all(|finished| matches!(finished.outcome, Outcome::Cancelled)), "{rest:?}");
    wait_until("the end of what was cancelled", LIMIT, || processes.iter().all(|path| !path.exists()));
    drop(cluster);
}

fn a_dropped_job_leaves_no_process_behind() {
    let (_folder, function) = function(STUCK, "f");
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let (submitter, mut job) = cluster.start(function, Options::default()).expect("it starts");
    submitter.push_blocking(Input::Json(b"1")).expect("it is taken");
    let processes = processes(&mut job);
    drop(job);
    wait_until("the end of what was dropped", LIMIT, || processes.iter().all(|path| !path.exists()));
    assert!(matches!(submitter.push_blocking(Input::Json(b"1")), Err(PushError::Closed)));
    // The cluster is as good as new.
    let (_folder, function) = double();
    let (submitter, job) = cluster.start(function, Options::default()).expect("it starts");
    submitter.push_blocking(Input::Json(b"21")).expect("it is taken");
    submitter.close();
    assert_eq!(results(job), ["42"]);
}

fn a_dropped_cluster_leaves_no_process_behind() {
    let (_folder, function) = function(STUCK, "f");
    let cluster = blocking::Cluster::embedded().expect("this machine");
    let (submitter, mut job) = cluster.start(function, Options::default()).expect("it starts");
    submitter.push_blocking(Input::Json(b"1")).expect("it is taken");
    let processes = processes(&mut job);
    drop((submitter, job));
    drop(cluster);
    let gone = eventually(LIMIT, || processes.iter().all(|path| !path.exists()) && children().is_empty());
    assert!(gone, "still there: {:?}", children());

    // So it is in async code, where there is nobody to wait for it.
    let (_folder, function) = self::function(STUCK, "f");
    run(async {
        let cluster = Cluster::embedded().await.expect("this machine");
        let (submitter, mut job) = cluster.start(function, Options::default()).await.expect("it starts");
        submitter.push(Input::Json(b"1")).await.expect("it is taken");
        let event = job.next().await.expect("it does not end").expect("the job goes well");
        assert!(matches!(event, Event::Line(_)), "{event:?}");
        assert_ne!(children(), [] as [String; 0]);
        drop((submitter, job, cluster));
    });
    assert!(eventually(LIMIT, || children().is_empty()), "still there: {:?}", children());
}

/// The processes that this one started and that are not gone.
fn children() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux has it");
    let of = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("children")).ok()
    };
    tasks
        .filter_map(of)
        .flat_map(|pids| pids.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .collect()
}

fn a_program_without_init_is_told() {
    let this = std::env::current_exe().expect("this program has a path");
    let output = Burla::new().program(this).args(["--without-init"]).run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    assert!(output.stdout.contains("call burla::init() first of all in main"), "{}", output.stdout);
}

/// What a program gets that forgot `burla::init()`.
fn without_init() -> ExitCode {
    match blocking::Cluster::embedded() {
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            println!("{error}");
            ExitCode::SUCCESS
        }
    }
}
