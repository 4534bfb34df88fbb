//! The processes below this one, as /proc tells.

use std::{collections::HashMap, fs, time::Duration};

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process, wait};
use rustix::{io::Errno, thread::NanosleepRelativeResult, thread::nanosleep};

/// Knows which processes descend from this one. Looks only at those that it has not seen yet,
/// so that it can be asked every few milliseconds.
#[derive(Debug, Default)]
pub(super) struct Tree {
    parents: HashMap<i32, i32>,
}

impl Tree {
    /// All living descendants.
    pub(super) fn descendants(&mut self) -> Vec<Pid> {
        let alive = numeric_entries();
        self.parents.retain(|pid, _| alive.binary_search(pid).is_ok());
        for &pid in &alive {
            if !self.parents.contains_key(&pid)
                && let Some(parent) = parent(pid)
            {
                self.parents.insert(pid, parent);
            }
        }
        let own = getpid().as_raw_nonzero().get();
        let below = |pid: &i32| {
            let mut at = *pid;
            // Whoever lost its parent is the keeper's child by now: read its parent anew.
            for _ in 0..self.parents.len() {
                match self.parents.get(&at).copied() {
                    Some(parent) if parent == own => return true,
                    Some(parent) if self.parents.contains_key(&parent) => at = parent,
                    _ => return parent(at) == Some(own),
                }
            }
            false
        };
        alive.iter().filter(|pid| below(pid)).filter_map(|pid| Pid::from_raw(*pid)).collect()
    }
}

/// Kills every descendant, and those that they start meanwhile, until there are none. Gives the status
/// of `main` if it is among those that ended.
pub(super) fn kill_all(main: Option<Pid>) -> Option<i32> {
    let mut status = None;
    // Killed processes are gone within a millisecond or two, unless the kernel holds them in an
    // uninterruptible wait; five seconds is when to give up on those.
    for _ in 0..2500 {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, ended))) if Some(pid) == main => status = Some(raw(ended)),
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => break,
                Err(_) => return status,
            }
        }
        for pid in Tree::default().descendants() {
            let _ = kill_process(pid, Signal::KILL);
        }
        pause(Duration::from_millis(2));
    }
    status
}

/// Kills every process that has `mark` in its environment.
pub(super) fn kill_marked(mark: &str) {
    for pid in numeric_entries() {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let marked = environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes());
        if let Some(pid) = Pid::from_raw(pid).filter(|_| marked) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Reaps what has ended. Gives the status of `main` if it is among them.
pub(super) fn reap(main: Option<Pid>) -> Option<i32> {
    let mut status = None;
    while let Ok(Some((pid, ended))) = wait(WaitOptions::NOHANG) {
        if Some(pid) == main {
            status = Some(raw(ended));
        }
    }
    status
}

fn raw(status: WaitStatus) -> i32 {
    status.as_raw()
}

pub(super) fn pause(duration: Duration) {
    let request = rustix::time::Timespec {
        tv_sec: duration.as_secs().cast_signed(),
        tv_nsec: duration.subsec_nanos().into(),
    };
    let _: NanosleepRelativeResult = nanosleep(&request);
}

fn numeric_entries() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<i32> =
        entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok())).collect();
    pids.sort_unstable();
    pids
}

fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may hold anything; the parent is the second field after it.
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}
