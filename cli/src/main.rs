//! The command `burla`.

mod args;
mod inputs;
mod map;
mod output;
mod report;
mod usage;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    burla::init();
    let args::Cli { command } = args::Cli::parse();
    match command {
        args::Command::Map(arguments) => map::main(&arguments),
    }
}
