//! Runs the real `burla` as a user would: in a folder of its own, with a clean environment.
//!
//! ```no_run
//! use burla_tests::Burla;
//!
//! let burla = Burla::new();
//! burla.file("f.py", "def double(x): return 2 * x\n");
//! let output = burla.map(["f.py:double"]).stdin("1\n2\n").run();
//! assert_eq!((output.code, output.stdout.as_str()), (0, "2\n4\n"));
//! ```

use std::{
    ffi::OsStr,
    fs,
    io::{Read, Write},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, OnceLock},
    thread,
    time::{Duration, Instant},
};

pub use rustix::process::Signal;

/// No single run takes longer, however busy the machine is.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A folder to run `burla` in. It is gone when this is dropped.
#[derive(Debug)]
pub struct Burla {
    folder: tempfile::TempDir,
}

/// A command line that is being put together.
#[derive(Debug)]
pub struct Run {
    command: Command,
    stdin: Vec<u8>,
}

/// What a process left: bytes that are not UTF-8 are only in the `_bytes` fields.
#[derive(Clone, Debug)]
pub struct Output {
    /// The exit code; 128 + N after signal N.
    pub code: i32,
    /// All of stdout, as text.
    pub stdout: String,
    /// All of stderr, as text.
    pub stderr: String,
    /// All of stdout, as it was.
    pub stdout_bytes: Vec<u8>,
}

/// A process that runs. It is killed when this is dropped.
#[derive(Debug)]
pub struct Live {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Collected,
    stderr: Collected,
}

/// What a process wrote so far, read by a thread.
#[derive(Debug)]
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Burla {
    /// A new, empty folder.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "this makes a folder; nobody wants one by default")]
    pub fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("user-").tempdir().expect("a temporary folder");
        Self { folder }
    }

    /// The folder, or what lies in it under this name: `path("")` is the folder itself.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        let folder = self.folder.path();
        if name.is_empty() { folder.to_owned() } else { folder.join(name) }
    }

    /// Writes a file, making the folders above it, and returns where it is.
    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a file lies in a folder")).expect("make a folder");
        fs::write(&path, content).expect("write a file");
        path
    }

    /// Writes an executable file.
    pub fn script(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.file(name, content);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&path, mode).expect("make a file executable");
        path
    }

    /// A file's content, as text.
    #[must_use]
    pub fn read(&self, name: &str) -> String {
        let path = self.path(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
    }

    /// `burla ARGS`, to be run in the folder.
    pub fn burla<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Run {
        self.program(binary()).args(args)
    }

    /// `burla map ARGS`, to be run in the folder.
    pub fn map<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Run {
        self.burla(["map"]).args(args)
    }

    /// Any other program, run as `burla` is.
    pub fn program(&self, program: impl AsRef<OsStr>) -> Run {
        let mut command = Command::new(program);
        command.current_dir(self.folder.path()).env_clear();
        command.env("PATH", search_path()).env("HOME", self.folder.path());
        Run { command, stdin: Vec::new() }
    }
}

impl Run {
    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of its environment, which is otherwise all but empty.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs it in another folder.
    #[must_use]
    pub fn within(mut self, folder: impl AsRef<Path>) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// What it reads from stdin: nothing unless told otherwise.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Runs it to its end.
    #[must_use]
    pub fn run(mut self) -> Output {
        let bytes = std::mem::take(&mut self.stdin);
        let mut live = self.spawn();
        if let Some(mut stdin) = live.stdin.take() {
            // A process that ends without reading its stdin is no concern of ours.
            thread::spawn(move || drop(stdin.write_all(&bytes)));
        }
        live.wait()
    }

    /// Starts it, with an open pipe as its stdin.
    #[must_use]
    pub fn spawn(mut self) -> Live {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self
            .command
            .spawn()
            .unwrap_or_else(|error| panic!("start {}: {error}", self.command.get_program().display()));
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let stdout = Collected::new(stdout.expect("stdout is a pipe"));
        let stderr = Collected::new(stderr.expect("stderr is a pipe"));
        let mut live = Live { child, stdin, stdout, stderr };
        if !self.stdin.is_empty() {
            live.write(&self.stdin);
        }
        live
    }
}

impl Live {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its stdin.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().expect("stdin is open");
        stdin.write_all(bytes.as_ref()).and_then(|()| stdin.flush()).expect("write to the process");
    }

    /// Closes its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("send a signal");
    }

    /// What it wrote to stdout so far.
    #[must_use]
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// What it wrote to stderr so far.
    #[must_use]
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().expect("wait for the process").is_some()
    }

    /// Closes its stdin and waits for its end, and for that of all that hold its stdout or stderr.
    #[must_use]
    pub fn wait(mut self) -> Output {
        self.close_stdin();
        let mut status = None;
        let so_far = || format!("stderr so far:\n{}", self.stderr.text());
        if !eventually(LIMIT, || {
            status = self.child.try_wait().expect("wait for the process");
            status.is_some()
        }) {
            panic!("the process did not end; {}", so_far());
        }
        if !eventually(LIMIT, || self.stdout.ended() && self.stderr.ended()) {
            panic!("a process that was left behind holds stdout or stderr; {}", so_far());
        }
        let stdout_bytes = self.stdout.take();
        let stdout = String::from_utf8_lossy(&stdout_bytes).into_owned();
        Output { code: code(status.expect("it ended")), stdout, stderr: self.stderr.text(), stdout_bytes }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Collected {
    fn new(mut from: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let shared = bytes.clone();
        let reader = thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                shared.lock().expect("nobody panics with it").extend_from_slice(&buffer[..n]);
            }
        });
        Self { bytes, reader: Some(reader) }
    }

    fn ended(&self) -> bool {
        self.reader.as_ref().is_none_or(thread::JoinHandle::is_finished)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().expect("nobody panics with it")).into_owned()
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut *self.bytes.lock().expect("nobody panics with it"))
    }
}

/// Waits until the condition holds; panics, saying `what` did not come about, if it does not within the limit.
#[track_caller]
pub fn wait_until(what: &str, limit: Duration, condition: impl FnMut() -> bool) {
    assert!(eventually(limit, condition), "not within {limit:?}: {what}");
}

/// Asks until the condition holds, and tells whether it did within the limit.
#[expect(clippy::disallowed_methods, reason = "real processes live in real time")]
pub fn eventually(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if began.elapsed() > limit {
            return condition();
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// The `burla` that was built beside the tests.
#[must_use]
pub fn binary() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    let profile = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
    let binary = profile.join("burla");
    assert!(binary.exists(), "build it first: cargo build --release -p burla-cli, or cargo xtask test");
    binary
}

/// The interpreter that `python3` stands for, past any shim.
#[must_use]
pub fn python() -> &'static Path {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let asked = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output();
        let asked = asked.expect("python3 is on PATH");
        String::from_utf8(asked.stdout).expect("the path is text").trim().into()
    })
}

/// PATH, with the interpreter's own folder first.
fn search_path() -> std::ffi::OsString {
    let usual = std::env::var_os("PATH").unwrap_or_default();
    let first = python().parent().expect("an interpreter lies in a folder").to_owned();
    std::env::join_paths(std::iter::once(first).chain(std::env::split_paths(&usual))).expect("a PATH")
}

fn code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).expect("it ended somehow")
}
