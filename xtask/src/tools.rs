//! The programs that the tasks need: where they are, and how they come here.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

const CARGO_DENY: &str = "0.20.2";

/// The cargo that runs this task.
pub(crate) fn cargo_program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

pub(crate) fn cargo(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Command {
    let mut command = Command::new(cargo_program());
    command.args(args);
    command
}

/// The version of the python3 on PATH.
pub(crate) fn python() -> Result<String> {
    ask_python("import platform; print(platform.python_version())")
        .context("python3 is needed to run Python functions\nhint: on Debian, `apt-get install python3`")
}

/// A pattern for the source files of Python's standard library.
///
/// Some installations keep added packages inside of it; then only its top level is the library for sure.
pub(crate) fn standard_library() -> Result<String> {
    let folder = ask_python("import sysconfig; print(sysconfig.get_path('stdlib'))")?;
    let added = Path::new(&folder).join("site-packages").exists();
    Ok(format!("{folder}/{}", if added { "*.py" } else { "**/*.py" }))
}

fn ask_python(program: &str) -> Result<String> {
    let output = Command::new("python3")
        .args(["-c", program])
        .stderr(Stdio::inherit())
        .output()
        .context("failed to start python3")?;
    ensure!(output.status.success(), "python3 failed: {}", output.status);
    Ok(String::from_utf8(output.stdout).context("python3 printed something unreadable")?.trim().to_owned())
}

pub(crate) fn has_nextest() -> bool {
    version_of(Path::new("cargo-nextest"), &["nextest", "--version"]).is_some()
}

/// The pinned cargo-deny, if it is on PATH or was installed under `target` before.
pub(crate) fn cargo_deny(target: &Path) -> Option<PathBuf> {
    [PathBuf::from("cargo-deny"), installed(target)].into_iter().find(|program| {
        version_of(program, &["--version"])
            .is_some_and(|v| v.split_whitespace().any(|word| word == CARGO_DENY))
    })
}

/// The command that brings cargo-deny to where `installed` looks for it.
pub(crate) fn install_cargo_deny(target: &Path) -> Command {
    let mut install = cargo(["install", "cargo-deny", "--locked", "--version", CARGO_DENY, "--root"]);
    install.arg(target.join("tools"));
    // It runs for a second, and is compiled on every new machine: how long that takes is what counts.
    install.env("CARGO_PROFILE_RELEASE_LTO", "off").env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0");
    install.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
    install
}

pub(crate) fn installed(target: &Path) -> PathBuf {
    target.join("tools/bin/cargo-deny")
}

fn version_of(program: &Path, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
