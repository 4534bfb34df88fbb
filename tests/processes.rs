//! The processes that run the calls: how they die, how they are stopped, and that nothing of them stays.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use burla_tests::{Burla, LIMIT, Live, Output, Run, Signal, binary, eventually, wait_until};
use rustix::process::Pid;

/// What functions use to meet the test and each other: files in the test's own folder.
const HELPERS: &str = r#"
import os, signal, subprocess, sys, time

def note(name, text):
    fd = os.open(f"{HERE}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(fd, f"{text}\n".encode())
    os.close(fd)

def exists(name):
    return os.path.exists(f"{HERE}/{name}")

def first(name):
    try:
        os.close(os.open(f"{HERE}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.002)
"#;

/// What is to be gone with the job: a child, its child, and a daemon that left the session, the group
/// and its parents, and does not listen.
const LEAVE: &str = r#"
def leave():
    note("pids", os.getpid())
    child = subprocess.Popen(["sh", "-c", f"sleep 1000 & echo $! >> {HERE}/pids; wait"])
    note("pids", child.pid)
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for ignored in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(ignored, signal.SIG_IGN)
            note("pids", os.getpid())
            os.close(write)
            for fd in range(3):
                os.close(fd)
            time.sleep(1000)
        os._exit(0)
    os.close(write)
    os.read(read, 1)
    os.wait()
    with open("/proc/self/cgroup") as groups:
        note("cgroup", groups.read())
    wait_for(lambda: len(open(f"{HERE}/pids").read().splitlines()) >= 4)
"#;

/// A folder with `f.py`, and one for temporary files.
fn with(source: &str) -> Burla {
    let burla = Burla::new();
    let here = burla.path("");
    burla.file("f.py", format!("HERE = {here:?}\n{HELPERS}{source}"));
    fs::create_dir(burla.path("tmp")).expect("make a folder");
    burla
}

fn map(burla: &Burla, args: &[&str]) -> Run {
    burla.map(args).env("TMPDIR", burla.path("tmp"))
}

fn numbers(count: u64) -> String {
    (0..count).map(|i| format!("{i}\n")).collect()
}

/// The numbers as results, but null for those that failed.
fn numbers_without(count: u64, failed: &[u64]) -> String {
    (0..count).map(|i| if failed.contains(&i) { "null\n".into() } else { format!("{i}\n") }).collect()
}

#[track_caller]
fn expect(output: &Output, code: i32, stdout: &str) {
    assert_eq!((output.code, output.stdout.as_str()), (code, stdout), "{}", output.stderr);
}

#[track_caller]
fn says(output: &Output, what: &str) {
    assert!(output.stderr.contains(what), "{what:?} is not in:\n{}", output.stderr);
}

/// How often each input was called, for those that were not called once.
fn not_once(burla: &Burla, count: u64) -> BTreeMap<u64, usize> {
    let mut calls: BTreeMap<u64, usize> = (0..count).map(|i| (i, 0)).collect();
    for line in burla.read("calls").lines() {
        *calls.entry(line.parse().expect("a number")).or_default() += 1;
    }
    calls.retain(|_, calls| *calls != 1);
    calls
}

/// Waits until nothing is left of a job: no temporary file, no process, no cgroup that calls noted.
#[track_caller]
fn nothing_is_left(burla: &Burla) {
    let limit = Duration::from_secs(20);
    wait_until("all processes are gone", limit, || pids(burla).iter().all(|pid| gone(*pid)));
    wait_until("temporary files are gone", limit, || names(&burla.path("tmp")).is_empty());
    wait_until("cgroups are gone", limit, || cgroups(burla).iter().all(|path| !path.exists()));
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("list a folder");
    entries.map(|entry| entry.expect("list").file_name().to_string_lossy().into_owned()).collect()
}

/// The processes that calls noted.
fn pids(burla: &Burla) -> Vec<i32> {
    let noted = fs::read_to_string(burla.path("pids")).unwrap_or_default();
    noted.lines().map(|line| line.parse().expect("a process id")).collect()
}

/// The cgroups of ours that calls noted to be in.
fn cgroups(burla: &Burla) -> Vec<PathBuf> {
    let noted = fs::read_to_string(burla.path("cgroup")).unwrap_or_default();
    let mut found = Vec::new();
    for line in noted.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let Some((_, name)) = path.rsplit_once("/burla-") else { continue };
        let root = Path::new("/sys/fs/cgroup").join(controllers);
        found.push(root.join(path.trim_start_matches('/')));
        found.push(root.join(format!("burla-{name}")));
    }
    found
}

fn stat(pid: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Whether a process has ended, be it that its parent has not looked yet.
fn gone(pid: i32) -> bool {
    stat(pid).is_none_or(|(state, _)| matches!(state, 'Z' | 'X'))
}

fn parent(pid: i32) -> i32 {
    stat(pid).expect("it runs").1
}

fn children(of: u32) -> Vec<i32> {
    let all = names(Path::new("/proc")).into_iter().filter_map(|name| name.parse::<i32>().ok());
    all.filter(|pid| stat(*pid).is_some_and(|(_, parent)| i64::from(parent) == i64::from(of))).collect()
}

fn send(pid: i32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(pid).expect("a process id"), signal).expect("send a signal");
}

#[expect(clippy::disallowed_methods, reason = "real processes live in real time")]
fn now() -> Instant {
    Instant::now()
}

#[expect(clippy::print_stderr, reason = "a test that could not look has to say so")]
fn skipped(why: &str) {
    eprintln!("skipped: {why}");
}

fn cores() -> usize {
    std::thread::available_parallelism().expect("the number of cores").get()
}

// The process that runs the calls dies

#[test]
fn of_many_fast_calls_only_the_one_that_died_is_repeated() {
    for death in ["os._exit(9)", "os.kill(os.getpid(), 9)", "__import__('ctypes').string_at(0)"] {
        let burla = with(&format!(
            "def f(x):\n    note('calls', x)\n    if x == 1234 and first('died'):\n        {death}\n    return x\n"
        ));
        let output = map(&burla, &["f.py:f"]).stdin(numbers(2000)).run();
        expect(&output, 0, &numbers(2000));
        assert_eq!(not_once(&burla, 2000), [(1234, 2)].into(), "{death}");
        nothing_is_left(&burla);
    }
}

#[test]
fn several_calls_that_die_are_each_repeated_alone() {
    let burla = with(
        "def f(x):\n    note('calls', x)\n    if x % 150 == 149 and first(f'died{x}'):\n        os._exit(1)\n    return x\n",
    );
    expect(&map(&burla, &["f.py:f"]).stdin(numbers(1500)).run(), 0, &numbers(1500));
    let expected: BTreeMap<u64, usize> = (0..10).map(|i| (150 * i + 149, 2)).collect();
    assert_eq!(not_once(&burla, 1500), expected);
}

#[test]
fn after_three_deaths_an_input_fails_with_the_reason() {
    let deaths = [
        ("os._exit(7)", "exit status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9 (SIGKILL)"),
        ("__import__('ctypes').string_at(0)", "signal 11 (SIGSEGV)"),
        ("os.abort()", "signal 6 (SIGABRT)"),
    ];
    for (death, reason) in deaths {
        let burla = with(&format!(
            "def f(x):\n    note('calls', x)\n    if x == 77:\n        {death}\n    return x\n"
        ));
        let output = map(&burla, &["f.py:f"]).stdin(numbers(300)).run();
        expect(&output, 1, &numbers_without(300, &[77]));
        says(&output, reason);
        says(&output, "1 failed: input 77 (output line 78)");
        assert_eq!(not_once(&burla, 300), [(77, 3)].into(), "{death}");
    }
}

#[test]
fn records_tell_how_often_a_call_that_died_was_tried() {
    let burla =
        with("def f(x):\n    if x == 1 or x == 2 and first('died'):\n        os._exit(5)\n    return x\n");
    let output = map(&burla, &["f.py:f", "--output-format", "records"]).stdin(numbers(4)).run();
    let records: Vec<serde_json::Value> =
        output.stdout.lines().map(|line| serde_json::from_str(line).expect("a record")).collect();
    let told: Vec<_> =
        records.iter().map(|r| (r["status"].as_str().expect("text"), r["attempts"].as_u64())).collect();
    assert_eq!(told, [("ok", Some(1)), ("failed", Some(3)), ("ok", Some(2)), ("ok", Some(1))]);
    let error = records[1]["error"].to_string();
    assert!(error.contains("exit status 5"), "{error}");
}

#[test]
fn a_death_in_the_middle_of_printing_loses_nothing_that_was_printed() {
    let burla = with(
        "def f(x):\n    for i in range(50):\n        print(f'{x}:{i}', flush=True)\n    if x == 3:\n        \
         print('half', end='', flush=True)\n        os.kill(os.getpid(), 9)\n    return x\n",
    );
    let output = map(&burla, &["f.py:f"]).stdin(numbers(6)).run();
    expect(&output, 1, &numbers_without(6, &[3]));
    for x in 0..6 {
        let found: Vec<&str> =
            output.stderr.lines().filter_map(|line| line.strip_prefix(&format!("[{x}] "))).collect();
        let mut call: Vec<String> = (0..50).map(|i| format!("{x}:{i}")).collect();
        if x == 3 {
            call.push("half".into());
            call = [&call[..], &call, &call].concat();
        }
        assert_eq!(found, call);
    }
}

#[test]
fn a_death_while_the_function_is_loaded_ends_the_job() {
    let burla = with("os._exit(3)\ndef f(x):\n    return x\n");
    let output = map(&burla, &["f.py:f"]).stdin(numbers(100)).run();
    expect(&output, 2, "");
    says(&output, "ended before the function was loaded: exit status 3");
    nothing_is_left(&burla);

    let burla = with("import ctypes\nctypes.string_at(0)\ndef f(x):\n    return x\n");
    let output = map(&burla, &["f.py:f"]).stdin(numbers(100)).run();
    expect(&output, 2, "");
    says(&output, "SIGSEGV");
}

#[test]
fn a_process_that_dies_between_calls_costs_no_call() {
    // A thread of the first call ends the process when nothing runs.
    let burla = with(
        "import threading\ndef f(x):\n    note('calls', x)\n    note('pids', os.getpid())\n    if x == 0:\n        \
         threading.Timer(0.2, os._exit, [4]).start()\n    return x\n",
    );
    let mut live = map(&burla, &["f.py:f", "--max-parallelism", "1"]).spawn();
    live.write("0\n");
    wait_until("the first result", LIMIT, || live.stdout() == "0\n");
    wait_until("the process died", LIMIT, || gone(pids(&burla)[0]));
    live.write(&numbers(10)[2..]);
    expect(&live.wait(), 0, &numbers(10));
    assert_eq!(not_once(&burla, 10), BTreeMap::new());
}

// Time

#[test]
fn a_call_that_takes_too_long_is_stopped_and_its_slot_works_on() {
    let burla = with(
        "def f(x):\n    note('calls', x)\n    if x == 2:\n        while True: pass\n    if x == 4:\n        time.sleep(1000)\n    \
         if x == 6:\n        __import__('ctypes').PyDLL(None).sleep(1000)\n    return x\n",
    );
    let args = ["f.py:f", "--timeout", "0.3s", "--max-parallelism", "1"];
    let output = map(&burla, &args).stdin(numbers(20)).run();
    expect(&output, 1, &numbers_without(20, &[2, 4, 6]));
    assert_eq!(not_once(&burla, 20), BTreeMap::new());
    says(&output, "took longer than 300ms");
    says(&output, "3 failed: input 2, 4, 6 (output line 3, 5, 7)");
    nothing_is_left(&burla);
}

#[test]
fn what_a_stopped_call_had_started_is_stopped_too() {
    let burla = with(&format!(
        "{LEAVE}\ndef f(x):\n    if x == 0:\n        leave()\n        time.sleep(1000)\n    wait_for(lambda: exists('go'))\n    return x\n"
    ));
    let live =
        map(&burla, &["f.py:f", "--timeout", "5s", "--max-parallelism", "1"]).stdin(numbers(2)).spawn();
    wait_until("the call has started all", LIMIT, || pids(&burla).len() == 4);
    wait_until("the call is stopped", LIMIT, || pids(&burla).into_iter().all(gone));
    // The job itself goes on.
    burla.file("go", "");
    expect(&live.wait(), 1, "null\n1\n");
}

#[test]
fn a_call_that_took_too_long_is_repeated_only_if_asked() {
    let burla = with(
        "def f(x):\n    note('calls', x)\n    if x == 1 or x == 2 and first('slow'):\n        while True: pass\n    return x\n",
    );
    let output = map(&burla, &["f.py:f", "--timeout", "0.3s", "--retries", "2"]).stdin(numbers(4)).run();
    expect(&output, 1, &numbers_without(4, &[1]));
    assert_eq!(not_once(&burla, 4), [(1, 3), (2, 2)].into());
}

#[test]
fn the_time_of_a_call_begins_with_the_function() {
    // The import takes longer than a call may.
    let burla = with("time.sleep(1.2)\ndef f(x):\n    return x\n");
    expect(&map(&burla, &["f.py:f", "--timeout", "1s"]).stdin(numbers(4)).run(), 0, &numbers(4));
}

#[test]
fn a_call_is_not_charged_with_the_time_of_the_one_before() {
    // Some calls end about when their time is up: whatever becomes of those, those behind them are innocent.
    let burla = with("def f(x):\n    time.sleep(0 if x % 4 else 0.19 + x % 7 * 0.004)\n    return x\n");
    let output = map(&burla, &["f.py:f", "--timeout", "0.2s"]).stdin(numbers(48)).run();
    for (x, line) in output.stdout.lines().enumerate() {
        assert!(
            line == x.to_string() || line == "null" && x % 4 == 0,
            "input {x}: {line}\n{}",
            output.stderr
        );
    }
    assert_eq!(output.stdout.lines().count(), 48, "{}", output.stderr);
}

#[test]
fn a_command_that_takes_too_long_is_stopped() {
    let burla = with("");
    let args = ["--timeout", "0.3s", "--max-parallelism", "1", "--", "sh", "-c"];
    let script = "echo $$ >> \"$0/pids\"; echo {}; test {} != 1 || sleep 1000";
    let run = map(&burla, &args).args([script]).args([burla.path("")]);
    let output = run.stdin(numbers(4)).run();
    assert_eq!(output.code, 1, "{}", output.stderr);
    let printed: Vec<&str> = output.stdout.lines().filter(|line| *line != "1").collect();
    assert_eq!(printed, ["0", "2", "3"], "{}", output.stderr);
    says(&output, "took longer than 300ms");
    assert_eq!(pids(&burla).len(), 4);
    nothing_is_left(&burla);
}

// Memory

/// Input 3 takes memory until it is stopped; another holds less than it may, meanwhile.
const MEMORY: &str = r#"
def grow():
    taken = []
    while True:
        taken.append(b"x" * (1 << 20))
        note("grown", len(taken))

def f(x):
    note("calls", x)
    with open("/proc/self/cgroup") as groups:
        note("cgroup", groups.read())
    if x == 3:
        grow()
    if x == 4:
        held = b"x" * (60 << 20)
        wait_for(lambda: exists("grown") and os.path.getsize(f"{HERE}/grown") > 400)
        return len(held) >> 20
    return x

def below(x):
    note("calls", x)
    if x == 3:
        subprocess.run([sys.executable, "-c", "taken = []\nwhile True: taken.append(b'x' * (1 << 20))"])
    return x
"#;

#[track_caller]
fn memory_is_limited(burla: &Burla, run: impl Fn(&[&str]) -> Run, peaks: std::ops::Range<u64>) {
    let output = run(&["f.py:f", "--ram", "200M"]).stdin(numbers(8)).run();
    expect(&output, 1, &numbers_without(8, &[3]).replace('4', "60"));
    assert_eq!(not_once(burla, 8), [(3, 2)].into(), "{}", output.stderr);
    let told = output.stderr.split_once(" MiB").and_then(|(before, _)| before.rsplit(' ').next());
    let peak = told.and_then(|peak| peak.parse::<u64>().ok());
    assert!(peak.is_some_and(|peak| peaks.contains(&peak)), "{}", output.stderr);
    nothing_is_left(burla);

    fs::remove_file(burla.path("calls")).expect("remove a file");
    let output = run(&["f.py:below", "--ram", "200M"]).stdin(numbers(8)).run();
    expect(&output, 1, &numbers_without(8, &[3]));
    assert_eq!(not_once(burla, 8), [(3, 2)].into(), "{}", output.stderr);
    says(&output, "that a call may use");
    nothing_is_left(burla);
}

#[test]
fn a_call_with_too_much_memory_is_repeated_once_and_fails_with_the_peak() {
    let burla = with(MEMORY);
    memory_is_limited(&burla, |args| map(&burla, args), 195..205);
}

#[test]
fn memory_is_limited_without_cgroups() {
    let hide = "mount -t tmpfs none /sys/fs/cgroup && exec \"$@\"";
    let tried =
        Command::new("unshare").args(["-m", "sh", "-c", hide, "sh", "true"]).stderr(Stdio::null()).status();
    if !tried.is_ok_and(|status| status.success()) {
        return skipped("hiding the cgroups takes a mount namespace, which is not permitted here");
    }
    let burla = with(MEMORY);
    let hidden = |args: &[&str]| {
        let run = burla.program("unshare").args(["-m", "sh", "-c", hide, "sh"]);
        run.args([binary()]).args(["map"]).args(args).env("TMPDIR", burla.path("tmp"))
    };
    memory_is_limited(&burla, hidden, 200..600);
}

#[test]
fn memory_that_is_within_the_limit_is_no_matter() {
    let burla = with(
        "def f(x):\n    held = b'x' * (100 << 20)\n    return len(held) >> 20\n\ndef forked(x):\n    \
         held = b'x' * (100 << 20)\n    for i in range(3):\n        if os.fork() == 0:\n            time.sleep(0.2)\n            os._exit(0)\n    \
         for i in range(3):\n        os.wait()\n    return x\n",
    );
    let output = map(&burla, &["f.py:f", "--ram", "200M"]).stdin(numbers(20)).run();
    expect(&output, 0, &"100\n".repeat(20));
    // Pages that forked processes share count once.
    expect(&map(&burla, &["f.py:forked", "--ram", "200M"]).stdin(numbers(3)).run(), 0, &numbers(3));
}

#[test]
fn a_limit_too_small_to_load_the_function_says_so() {
    let burla = with("def f(x):\n    return x\n");
    let output = map(&burla, &["f.py:f", "--ram", "4M"]).stdin(numbers(4)).run();
    expect(&output, 2, "");
    says(&output, " MiB of memory");
    assert!(
        output.stderr.lines().any(|line| line.starts_with("hint: ") && line.contains("--ram")),
        "{}",
        output.stderr
    );
    nothing_is_left(&burla);
}

#[test]
fn memory_bounds_the_slots() {
    let burla = with("def f(x):\n    return x\n");
    let total = fs::read_to_string("/proc/meminfo").expect("the memory of this machine");
    let kib: u64 = total.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    let ram = format!("{}K", kib * 6 / 10);
    let output = map(&burla, &["f.py:f", "--ram", &ram]).stdin(numbers(10)).run();
    expect(&output, 0, &numbers(10));
    assert_eq!(output.stderr.lines().next(), Some("burla: embedded, 1 slot"));
}

// Slots and the surroundings of a call

/// Calls that meet: each waits until so many have begun at once, and fails where there are more.
const MEET: &str = r#"
def f(x):
    wanted = int(os.environ["WANTED"])
    mine = next((i for i in range(wanted) if first(f"slot{i}")), None)
    if mine is None:
        raise RuntimeError("more calls run at once than were asked for")
    note("met", x)
    wait_for(lambda: exists(f"slot{wanted - 1}") or os.path.getsize(f"{HERE}/met") >= 2 * wanted)
    time.sleep(0.01)
    os.remove(f"{HERE}/slot{mine}")
    return x
"#;

#[test]
fn as_many_calls_run_at_once_as_there_are_slots() {
    let half = 2 * cores();
    for (args, wanted) in [
        (&["--cpu", "0.5"][..], half),
        (&[], cores()),
        (&["--cpu", "0.5", "--max-parallelism", "3"], 3.min(half)),
        (&["--max-parallelism", "1"], 1),
    ] {
        let burla = with(MEET);
        let env = format!("WANTED={wanted}");
        let output = map(&burla, &["f.py:f", "--env", &env]).args(args).stdin(numbers(30)).run();
        expect(&output, 0, &numbers(30));
    }
}

#[test]
fn no_input_waits_behind_a_long_call() {
    if cores() < 2 {
        return skipped("with one slot, inputs do wait behind a long call");
    }
    // The first call ends when all others have.
    for count in [3, 10, 500] {
        let burla = with(&format!(
            "def f(x):\n    if x == 0:\n        wait_for(lambda: exists('calls') and len(open(f'{{HERE}}/calls').readlines()) == {})\n    \
             else:\n        note('calls', x)\n    return x\n",
            count - 1
        ));
        expect(&map(&burla, &["f.py:f"]).stdin(numbers(count)).run(), 0, &numbers(count));
    }
}

const THREADS: &str = "def f(names):\n    return [os.environ.get(name) for name in names]\n";

#[test]
fn thread_pools_follow_the_cpus_of_a_call_unless_told_otherwise() {
    let names = r#"["OMP_NUM_THREADS","OPENBLAS_NUM_THREADS","MKL_NUM_THREADS","NUMEXPR_NUM_THREADS","POLARS_MAX_THREADS","RAYON_NUM_THREADS"]"#;
    let burla = with(THREADS);
    let all = |n: usize| format!("[{}]\n", vec![format!("\"{n}\""); 6].join(", "));
    expect(&map(&burla, &["f.py:f"]).stdin(names).run(), 0, &all(1));
    expect(&map(&burla, &["f.py:f", "--cpu", "0.5"]).stdin(names).run(), 0, &all(1));
    if cores() > 1 {
        expect(&map(&burla, &["f.py:f", "--cpu", "2"]).stdin(names).run(), 0, &all(2));
    }
    let set = map(&burla, &["f.py:f", "--env", "OMP_NUM_THREADS=7"]).env("MKL_NUM_THREADS", "5");
    expect(&set.stdin(names).run(), 0, &all(1).replacen('1', "7", 1));
}

#[test]
fn the_environment_and_the_working_folder_stay_with_the_user() {
    let burla = with(
        "def f(names):\n    return [os.environ.get(name) for name in names] + [os.getcwd() == HERE, os.path.exists('data.txt')]\n",
    );
    burla.file("data.txt", "");
    let run = |args: &[&str]| {
        let run = map(&burla, args)
            .env("SECRET", "hush")
            .env("PYTHONPATH", "/nowhere")
            .stdin("[\"SECRET\", \"PYTHONPATH\", \"K\"]");
        run.run()
    };
    expect(&run(&["f.py:f"]), 0, "[null, null, null, false, false]\n");
    let passed = run(&["f.py:f", "--env", "SECRET", "--env", "K=a=b c"]);
    expect(&passed, 0, "[\"hush\", null, \"a=b c\", false, false]\n");
    let command = map(&burla, &["--env", "K=v", "--", "sh", "-c", "echo {} $SECRET $K; ls data.txt 2>&1"]);
    let output = command.env("SECRET", "hush").stdin("x\n").run();
    assert!(output.stdout.starts_with("x v\n") && output.code == 1, "{output:?}");
}

#[test]
fn calls_are_in_a_session_of_their_own() {
    let burla =
        with("def f(x):\n    note('sid', os.getsid(0))\n    wait_for(lambda: exists('go'))\n    return x\n");
    for args in [&["f.py:f"][..], &["--", "sh", "-c", "ps -o sid= -p $$ >> \"$0/sid\"; cat"]] {
        let mut run = map(&burla, args);
        if args.len() > 1 {
            run = run.args([burla.path("")]);
        }
        let live = run.stdin("0\n").spawn();
        let whose =
            |pid: Option<Pid>| rustix::process::getsid(pid).expect("a session").as_raw_nonzero().get();
        let burlas = whose(Pid::from_raw(live.pid().cast_signed()));
        wait_until("the call tells its session", LIMIT, || burla.path("sid").exists());
        wait_until("the call tells all", LIMIT, || burla.read("sid").ends_with('\n'));
        let theirs: i32 = burla.read("sid").trim().parse().expect("a session");
        assert_ne!(theirs, burlas);
        assert_ne!(theirs, whose(None));
        burla.file("go", "");
        expect(&live.wait(), 0, "0\n");
        fs::remove_file(burla.path("sid")).expect("remove a file");
    }
}

#[test]
fn two_jobs_in_one_folder_do_not_meet() {
    // Each waits for the other in the middle.
    let burla = with(
        "def f(x):\n    me = os.environ['ME']\n    note(me, x)\n    wait_for(lambda: exists('one') and exists('two'))\n    \
         with open('kept', 'a') as file:\n        file.write(me)\n    assert set(open('kept').read().split('|')) == {me} or \
         open('kept').read() in (me * n for n in range(1, 400))\n    print(me)\n    return f'{me} {x}'\n",
    );
    let start = |me: &str| map(&burla, &["f.py:f", "--env", &format!("ME={me}")]).stdin(numbers(300)).spawn();
    let (one, two) = (start("one"), start("two"));
    for (me, live) in [("one", one), ("two", two)] {
        let output = live.wait();
        let results: String = (0..300).map(|i| format!("\"{me} {i}\"\n")).collect();
        expect(&output, 0, &results);
        let printed = output.stderr.lines().filter(|line| line.starts_with('['));
        assert!(printed.clone().all(|line| line.ends_with(me)), "{}", output.stderr);
        assert_eq!(printed.count(), 300);
    }
    nothing_is_left(&burla);
}

// All is gone with burla

fn leaving(end: &str) -> Burla {
    with(&format!("{LEAVE}\ndef f(x):\n    leave()\n    {end}\n    return x\n"))
}

fn start_leaving(burla: &Burla, args: &[&str]) -> Live {
    let live = map(burla, &["f.py:f"]).args(args).stdin("0\n").spawn();
    wait_until("the call has started all", LIMIT, || pids(burla).len() == 4 && burla.path("cgroup").exists());
    assert!(pids(burla).into_iter().all(|pid| !gone(pid)), "{}", live.stderr());
    live
}

#[test]
fn after_a_job_nothing_is_left_of_what_calls_started() {
    for args in [&[][..], &["--ram", "1G"]] {
        let burla = leaving("");
        expect(&start_leaving(&burla, args).wait(), 0, "0\n");
        // Not only soon: burla waits for it.
        assert!(pids(&burla).into_iter().all(gone));
        assert_eq!(names(&burla.path("tmp")), [""; 0]);
        nothing_is_left(&burla);
    }
}

#[test]
fn interrupted_it_ends_within_a_second_and_leaves_nothing() {
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        for waiting in
            ["time.sleep(1000)", "while True: pass", "__import__('ctypes').PyDLL(None).sleep(1000)"]
        {
            let burla = leaving(waiting);
            let live = start_leaving(&burla, &["--ram", "1G"]);
            let began = now();
            live.signal(signal);
            let output = live.wait();
            assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
            assert_eq!(output.code, code, "{}", output.stderr);
            assert!(pids(&burla).into_iter().all(gone));
            nothing_is_left(&burla);
        }
    }
}

#[test]
fn killed_it_leaves_nothing() {
    for (args, signal) in [(&[][..], Signal::KILL), (&["--ram", "1G"], Signal::KILL), (&[], Signal::HUP)] {
        for waiting in ["time.sleep(1000)", "while True: pass"] {
            let burla = leaving(waiting);
            let live = start_leaving(&burla, args);
            live.signal(signal);
            let _ = live.wait();
            nothing_is_left(&burla);
        }
    }
}

#[test]
fn killed_while_it_starts_it_leaves_nothing() {
    let burla = with("note('pids', os.getpid())\ntime.sleep(1000)\ndef f(x):\n    return x\n");
    let live = map(&burla, &["f.py:f"]).stdin("0\n").spawn();
    wait_until("the file is being loaded", LIMIT, || !pids(&burla).is_empty());
    live.signal(Signal::KILL);
    let _ = live.wait();
    nothing_is_left(&burla);
}

#[test]
fn an_interrupt_while_the_function_is_loaded_ends_it() {
    let burla = with("note('pids', os.getpid())\ntime.sleep(1000)\ndef f(x):\n    return x\n");
    let live = map(&burla, &["f.py:f"]).stdin("0\n").spawn();
    wait_until("the file is being loaded", LIMIT, || !pids(&burla).is_empty());
    let began = now();
    live.signal(Signal::INT);
    assert_eq!(live.wait().code, 130);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    nothing_is_left(&burla);
}

#[test]
fn an_interrupt_keeps_the_results_that_were_there() {
    let burla = with(
        "def f(x):\n    note('pids', os.getpid())\n    if x >= 20:\n        wait_for(lambda: False)\n    return x\n",
    );
    let live = map(&burla, &["f.py:f", "-o", "out"]).stdin(numbers(40)).spawn();
    wait_until("the results that can be there", LIMIT, || {
        fs::read_to_string(burla.path("out")).is_ok_and(|out| out.starts_with(&numbers(20)))
    });
    live.signal(Signal::INT);
    let output = live.wait();
    assert_eq!(output.code, 130, "{}", output.stderr);
    assert_eq!(
        burla.read("out").lines().take(20).collect::<Vec<_>>(),
        numbers(20).lines().collect::<Vec<_>>()
    );
    nothing_is_left(&burla);
}

#[test]
fn an_interrupt_is_heard_while_nobody_reads_the_results() {
    let burla = with("def f(x):\n    note('pids', os.getpid())\n    return 'x' * 10000\n");
    let mut child = Command::new(binary())
        .args(["map", "f.py:f"])
        .current_dir(burla.path(""))
        .env("TMPDIR", burla.path("tmp"))
        .stdin(fs::File::open(burla.file("in", numbers(2000))).expect("open a file"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("start burla");
    let pid = child.id();
    // The pipe holds a few of them, and then burla waits for room.
    let stdout = child.stdout.take().expect("a pipe");
    wait_until("the pipe is full", LIMIT, || {
        rustix::io::ioctl_fionread(&stdout).is_ok_and(|held| held > 50_000)
    });
    send(pid.cast_signed(), Signal::INT);
    let ended = eventually(Duration::from_secs(3), || child.try_wait().expect("wait").is_some());
    let _ = child.kill();
    assert!(ended, "it did not end");
    assert_eq!(child.wait().expect("wait").code(), Some(130));
    nothing_is_left(&burla);
}

/// Interrupts burla while its keepers do not answer, which keeps it from ending in good order.
fn interrupt_without_keepers(mut interrupt: impl FnMut(&Live)) {
    let burla = leaving("time.sleep(1000)");
    let mut live = start_leaving(&burla, &[]);
    let keepers = children(live.pid());
    keepers.iter().for_each(|pid| send(*pid, Signal::STOP));
    live.signal(Signal::INT);
    let ended = eventually(Duration::from_secs(3), || {
        interrupt(&live);
        live.ended()
    });
    for pid in keepers.into_iter().filter(|pid| !gone(*pid)) {
        send(pid, Signal::CONT);
    }
    assert!(ended, "it did not end");
    assert_eq!(live.wait().code, 130);
    nothing_is_left(&burla);
}

#[test]
fn a_second_interrupt_ends_it_at_once() {
    interrupt_without_keepers(|live| live.signal(Signal::INT));
}

#[test]
fn an_interrupt_ends_it_although_its_processes_do_not_end() {
    interrupt_without_keepers(|_| {});
}

#[test]
fn thousands_of_processes_and_files_do_not_stay() {
    // So many that burla may not see the end of them before it has to end itself.
    let burla = with(
        r#"
def f(x):
    for i in range(1500):
        if os.fork() == 0:
            if i % 2:
                os.setsid()
            time.sleep(1000)
    note("pids", os.getpid())
    while True:
        os.makedirs(f"{os.environ['TMPDIR']}/{time.time()}/a/b", exist_ok=True)
"#,
    );
    let live = map(&burla, &["f.py:f"]).stdin(numbers(2)).spawn();
    let slots = cores().min(2);
    wait_until("the calls have started all", LIMIT, || pids(&burla).len() == slots);
    let began = now();
    live.signal(Signal::INT);
    // Its end, and that of its pipes: what it leaves to its keepers to end does not hold them.
    assert_eq!(live.wait().code, 130);
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    nothing_is_left(&burla);
}

#[test]
fn the_death_of_a_keeper_does_not_stop_the_job() {
    let burla = with(&format!(
        "{LEAVE}\ndef f(x):\n    if x == 5 and first('lost'):\n        leave()\n        note('ready', os.getppid())\n        \
         time.sleep(1000)\n    return x\n"
    ));
    let mut live = map(&burla, &["f.py:f"]).stdin(numbers(200)).spawn();
    wait_until("the call runs", LIMIT, || {
        burla.path("ready").exists() && burla.read("ready").ends_with('\n')
    });
    let keeper: i32 = burla.read("ready").trim().parse().expect("a process id");
    assert_eq!(i64::from(parent(keeper)), i64::from(live.pid()), "the keeper is burla's own child");
    send(keeper, Signal::KILL);
    live.close_stdin();
    wait_until("the job ends", Duration::from_secs(20), || live.ended());
    expect(&live.wait(), 0, &numbers(200));
    nothing_is_left(&burla);
}

// Commands

#[test]
fn a_command_may_leave_a_process_behind_which_ends_with_the_job() {
    let burla = with("");
    // The process holds the command's stdout and stderr.
    let script = "sleep 1000 & echo $! >> \"$0/pids\"; echo {}";
    let output = map(&burla, &["--", "sh", "-c", script]).args([burla.path("")]).stdin(numbers(10)).run();
    expect(&output, 0, &numbers(10));
    assert_eq!(pids(&burla).len(), 10);
    nothing_is_left(&burla);
}

#[test]
fn a_command_that_dies_by_a_signal_has_failed() {
    let burla = with("");
    let script = "echo {}; test {} != 1 || kill -SEGV $$; test {} != 2 || exit 9";
    let output = map(&burla, &["--", "sh", "-c", script]).stdin(numbers(4)).run();
    expect(&output, 1, &numbers(4));
    says(&output, "signal 11 (SIGSEGV)");
    says(&output, "exit status 9");
    says(&output, "2 failed: input 1, 2");
}

#[test]
fn the_death_of_the_process_that_starts_commands_is_survived() {
    let burla = with("");
    // The first time, a command kills its parent.
    let script = "echo {} >> \"$0/calls\"; test {} != 5 || ! mkdir \"$0/died\" 2>/dev/null || kill -KILL $PPID; echo {}";
    let output = map(&burla, &["--", "sh", "-c", script]).args([burla.path("")]).stdin(numbers(50)).run();
    expect(&output, 0, &numbers(50));
    assert_eq!(not_once(&burla, 50), [(5, 2)].into());
}

#[test]
fn commands_and_functions_read_an_empty_stdin() {
    let burla = with("def f(x):\n    return [sys.stdin.read(), os.read(0, 10).decode()]\n");
    expect(&map(&burla, &["f.py:f"]).stdin(numbers(2)).run(), 0, "[\"\", \"\"]\n[\"\", \"\"]\n");
    expect(&map(&burla, &["--", "sh", "-c", "cat; echo {}"]).stdin(numbers(3)).run(), 0, &numbers(3));
}

// Functions that do as they please

#[test]
fn functions_may_fork() {
    let burla = with(
        "def f(x):\n    note('calls', x)\n    if os.fork() == 0:\n        return 'the child'\n    os.wait()\n    return x\n\n\
         def raises(x):\n    if os.fork() == 0:\n        raise ValueError('the child')\n    os.wait()\n    return x\n\n\
         def stays(x):\n    if os.fork() == 0:\n        return 'the child'\n    return x\n",
    );
    expect(&map(&burla, &["f.py:f"]).stdin(numbers(100)).run(), 0, &numbers(100));
    assert_eq!(not_once(&burla, 100), BTreeMap::new());
    expect(&map(&burla, &["f.py:raises"]).stdin(numbers(20)).run(), 0, &numbers(20));
    expect(&map(&burla, &["f.py:stays"]).stdin(numbers(100)).run(), 0, &numbers(100));
}

#[test]
fn functions_may_use_a_pool() {
    let burla = with(
        "import multiprocessing\n\ndef double(x):\n    print('in the pool')\n    return 2 * x\n\ndef f(method):\n    \
         with multiprocessing.get_context(method).Pool(2) as pool:\n        return pool.map(double, range(5))\n",
    );
    let output = map(&burla, &["f.py:f"]).stdin("\"fork\"\n\"spawn\"\n\"forkserver\"\n").run();
    expect(&output, 0, &"[0, 2, 4, 6, 8]\n".repeat(3));
    for index in 0..3 {
        // Two processes print at the same time: their texts and line ends may come between each other.
        let own = output.stderr.lines().filter(|line| line.starts_with(&format!("[{index}] ")));
        let count: usize = own.map(|line| line.matches("in the pool").count()).sum();
        assert_eq!(count, 5, "{}", output.stderr);
    }
}

#[test]
fn functions_may_close_their_descriptors() {
    let burla = with(
        "def f(x):\n    for fd in (0, 1, 2):\n        try:\n            os.close(fd)\n        except OSError:\n            pass\n    return x\n\n\
         def all(x):\n    os.closerange(3, 60)\n    return x\n\ndef streams(x):\n    sys.stdout.close()\n    sys.stderr.close()\n    return x\n",
    );
    for name in ["f", "all", "streams"] {
        let output = map(&burla, &[&format!("f.py:{name}")]).stdin(numbers(50)).run();
        expect(&output, 0, &numbers(50));
    }
}

#[test]
fn functions_may_change_signals_the_folder_and_the_environment() {
    let burla = with(
        "def f(x):\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n    \
         signal.alarm(0)\n    os.chdir('/')\n    os.environ.clear()\n    sys.path.clear()\n    return x\n",
    );
    expect(&map(&burla, &["f.py:f"]).stdin(numbers(200)).run(), 0, &numbers(200));
    nothing_is_left(&burla);
}

#[test]
fn functions_may_do_their_worst() {
    // Whatever it is, it costs that one input at most, and never the job.
    let worst = [
        "os.killpg(0, signal.SIGKILL)",
        "os.closerange(3, 4096)",
        "os._exit(0)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "sys.exit()",
        "raise KeyboardInterrupt",
        "[os.set_blocking(fd, False) for fd in range(3, 200) if os.path.exists(f'/proc/self/fd/{fd}')]",
        "__import__('threading').Thread(target=time.sleep, args=[1000]).start()",
        "[subprocess.Popen(['sh', '-c', 'while :; do sleep 0.05 & done']) for i in range(2)]; time.sleep(0.3); os._exit(1)",
    ];
    for act in worst {
        let burla = with(&format!(
            "def f(x):\n    note('pids', os.getpid())\n    if x == 3:\n        {act}\n    return x\n"
        ));
        let output = map(&burla, &["f.py:f", "--timeout", "5s"]).stdin(numbers(30)).run();
        let others: String = numbers_without(30, &[3]);
        assert!(output.stdout == numbers(30) || output.stdout == others, "{act}: {}", output.stderr);
        assert_eq!(output.code, i32::from(output.stdout == others), "{act}: {}", output.stderr);
        nothing_is_left(&burla);
    }
}

#[test]
fn one_process_runs_many_inputs() {
    let burla = with("def f(x):\n    return os.getpid()\n");
    let output = map(&burla, &["f.py:f", "--max-parallelism", "2"]).stdin(numbers(500)).run();
    assert_eq!(output.code, 0, "{}", output.stderr);
    let processes: std::collections::BTreeSet<&str> = output.stdout.lines().collect();
    assert!(processes.len() <= 2, "{processes:?}");
    let mut told = String::new();
    processes.iter().for_each(|pid| write!(told, "{pid} ").expect("write to a string"));
    assert!(!told.contains("null"), "{told}");
}
