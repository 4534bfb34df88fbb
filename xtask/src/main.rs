//! The commands that everyone who works on burla uses: `cargo xtask check`, `test`, `ci`, `demo`, `bench`.
#![expect(clippy::print_stderr, reason = "a command line tool that talks to its user on stderr")]

mod counts;
mod steps;
mod tools;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;

use crate::steps::Steps;
use crate::tools::{cargo, python};

/// The commands that everyone who works on burla uses.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Formatting, clippy, docs, and cargo-deny's checks that need no download.
    Check,
    /// Builds what the tests need, then runs all of them.
    Test {
        /// Only tests whose name contains one of these.
        filters: Vec<String>,
    },
    /// check, then test: what has to pass before a change goes in.
    Ci,
    /// Builds burla and takes a census of this machine's Python standard library with it.
    Demo,
    /// Builds burla and measures it beside GNU parallel, xargs and Python's multiprocessing.
    Bench {
        /// Options of bench/run.py; `cargo xtask bench -- --help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<OsString>,
    },
}

fn main() -> Result<ExitCode> {
    let task = Task::parse();
    let root = root()?;
    std::env::set_current_dir(&root).with_context(|| format!("enter {}", root.display()))?;

    let mut steps = Steps::default();
    match task {
        Task::Check => check(&mut steps),
        Task::Test { filters } => test(&mut steps, &filters)?,
        Task::Ci => {
            check(&mut steps);
            test(&mut steps, &[])?;
        }
        Task::Demo => return demo(),
        Task::Bench { args } => return bench(&args),
    }
    Ok(steps.finish())
}

/// The workspace's folder: cargo tells where the package is that it runs.
fn root() -> Result<PathBuf> {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").context("start this as `cargo xtask`")?;
    Ok(Path::new(&package).parent().context("xtask is in no workspace")?.to_owned())
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

fn check(steps: &mut Steps) {
    steps.run("format", &mut cargo(["fmt", "--all", "--check"]));
    steps.run(
        "clippy",
        &mut cargo("clippy --release --workspace --all-targets --all-features -- -D warnings".split(' ')),
    );
    steps.run(
        "clippy, no default features",
        &mut cargo("clippy --release --package burla --no-default-features -- -D warnings".split(' ')),
    );
    // The command and the library are both called `burla`, and there is one page for a name.
    steps.run(
        "docs",
        cargo("doc --release --workspace --exclude burla-cli --all-features --no-deps".split(' '))
            .env("RUSTDOCFLAGS", "-D warnings"),
    );

    let deny = tools::cargo_deny(&target());
    if deny.is_none() && !steps.run("install cargo-deny", &mut tools::install_cargo_deny(&target())) {
        return;
    }
    let deny = deny.unwrap_or_else(|| tools::installed(&target()));
    // Its view of the dependencies takes in those of other platforms, which no build has fetched.
    if steps.run("fetch", &mut cargo(["fetch", "--locked"])) {
        steps.run("deny", Command::new(deny).args("--offline check bans licenses sources".split(' ')));
    }
}

fn test(steps: &mut Steps, filters: &[String]) -> Result<()> {
    let version = python()?;
    eprintln!("tests run Python functions with python3, here {version}");
    if !steps.run("build burla", &mut build_burla()) {
        return Ok(());
    }
    let (runner, arguments) = if tools::has_nextest() {
        ("tests (nextest)", "nextest run")
    } else {
        ("tests", "test --lib --bins --tests")
    };
    let all = "--release --workspace --features burla-core/conformance --no-fail-fast";
    steps.run_tests(runner, cargo(arguments.split(' ').chain(all.split(' '))).arg("--").args(filters));
    let doc_tests = "test --doc".split(' ').chain(all.split(' '));
    steps.run_tests("doc tests", cargo(doc_tests).arg("--").args(filters));
    Ok(())
}

fn build_burla() -> Command {
    let mut build = Command::new(tools::cargo_program());
    build.args(["build", "--release", "--package", "burla-cli"]);
    build
}

/// What a newcomer runs first, with the commands shown as they would be typed.
fn demo() -> Result<ExitCode> {
    python()?;
    let burla = shown(&mut build_burla()).map(|()| target().join("release/burla"))?;
    let files = tools::standard_library()?;
    let folder = target().join("demo");
    std::fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let results = folder.join("census.jsonl");

    shown(
        Command::new(burla)
            .args(["map", "--files", &files, "--output-format", "records", "--with-input"])
            .args(["examples/census.py:census", "-o"])
            .arg(&results),
    )?;
    shown(Command::new("python3").arg("examples/census.py").arg(&results))?;
    Ok(ExitCode::SUCCESS)
}

fn bench(args: &[OsString]) -> Result<ExitCode> {
    python()?;
    let mut run = Command::new("python3");
    run.arg("bench/run.py");
    // Nothing to build for a --help, for the peers alone, or for a burla from elsewhere.
    if !args.iter().any(|a| ["-h", "--help", "--peers", "--burla"].iter().any(|no_build| a == no_build)) {
        shown(&mut build_burla())?;
        run.arg("--burla").arg(target().join("release/burla"));
    }
    shown(run.args(args))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints a command in the words of a shell, then runs it on this terminal.
fn shown(command: &mut Command) -> Result<()> {
    let program = Path::new(command.get_program());
    // Cargo gives its own whole path; nobody types that.
    let name =
        if program.is_absolute() { program.file_name() } else { None }.unwrap_or(command.get_program());
    let words: Vec<String> =
        std::iter::once(name).chain(command.get_args()).map(|w| quoted(&w.to_string_lossy())).collect();
    eprintln!("$ {}", words.join(" "));
    let status = command.status().with_context(|| format!("start {}", words[0]))?;
    ensure!(status.success(), "{} failed: {status}", words[0]);
    Ok(())
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+%@".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
