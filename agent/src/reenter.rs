//! Small processes that run this same program: the keeper of a slot, and the runtime of commands.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{command, keeper};

/// The variable that makes a program that calls [`reenter`] one of the small processes.
pub(crate) const VARIABLE: &str = "BURLA_REENTER";

/// How to start this program once more, so that it calls [`reenter`] first of all.
#[derive(Clone, Debug)]
pub struct Reenter {
    /// The program.
    pub program: PathBuf,
    /// Arguments that come first.
    pub args: Vec<OsString>,
}

impl Default for Reenter {
    /// This very executable, also if its file was replaced or deleted meanwhile.
    fn default() -> Self {
        Self { program: "/proc/self/exe".into(), args: Vec::new() }
    }
}

/// What a small process is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Keeper,
    Command,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Keeper => "keeper",
            Self::Command => "command",
        }
    }
}

impl Reenter {
    /// The command that starts it, with an environment of its own.
    pub(crate) fn command(&self, role: Role) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).env_clear().env(VARIABLE, role.name());
        // Where the program itself may find its libraries.
        command.envs(std::env::vars_os().filter(|(name, _)| name == "LD_LIBRARY_PATH" || name == "PATH"));
        command
    }

    /// The same for a process that somebody else starts.
    pub(crate) fn argv(&self) -> Vec<String> {
        let parts = std::iter::once(self.program.clone().into_os_string()).chain(self.args.iter().cloned());
        parts.map(|part| part.to_string_lossy().into_owned()).collect()
    }

    /// The variable that a process has to have to take `role`.
    pub(crate) fn variable(role: Role) -> (String, String) {
        (VARIABLE.into(), role.name().into())
    }
}

/// Becomes one of the small processes, and does not return, if this process was started as one.
/// To be called before anything else in `main`.
pub fn reenter() {
    let Some(role) = std::env::var_os(VARIABLE) else { return };
    let ended = if role == Role::Keeper.name() {
        let scratch = std::env::args_os().next_back().unwrap_or_default();
        keeper::process::main(Path::new(&scratch))
    } else if role == Role::Command.name() {
        command::main()
    } else {
        return;
    };
    std::process::exit(i32::from(ended.is_err()));
}
