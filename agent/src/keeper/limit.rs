//! The memory limit of all that a keeper keeps: a cgroup where one can be made, else samples.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, getpid};

use super::tree::{Tree, pause};

/// Watches the memory of a keeper's descendants.
#[derive(Debug)]
pub(super) struct Limit {
    bytes: u64,
    peak: u64,
    tree: Tree,
    group: Option<Group>,
}

impl Limit {
    /// A limit of so many bytes for `main` and its descendants.
    pub(super) fn new(bytes: u64, main: Pid) -> Self {
        Self { bytes, peak: 0, tree: Tree::default(), group: Group::new(bytes, main) }
    }

    /// The most memory that was measured, if it is more than is allowed.
    pub(super) fn exceeded(&mut self) -> Option<u64> {
        if let Some(group) = &self.group {
            return group.killed().then(|| group.peak().max(self.bytes));
        }
        let pids = self.tree.descendants();
        // What is resident counts pages twice that forked processes share, but it is cheap: the exact
        // figure is asked for only when this one is too high.
        let resident: u64 = pids.iter().filter_map(|pid| field(*pid, "status", "RssAnon:")).sum();
        let used = if resident > self.bytes {
            pids.iter().filter_map(|pid| field(*pid, "smaps_rollup", "Pss_Anon:")).sum()
        } else {
            resident
        };
        self.peak = self.peak.max(used);
        (used > self.bytes).then_some(self.peak)
    }
}

/// A field of a file in /proc/PID that is given in kB, in bytes.
fn field(pid: Pid, file: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{}/{file}", pid.as_raw_nonzero())).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    Some(value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// A memory cgroup of our own, version 1 or 2, below the one that this process is in.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    names: &'static Names,
}

#[derive(Debug)]
struct Names {
    limit: &'static str,
    /// The limit of swap, where swap is counted.
    swap: &'static str,
    /// Whether that limit is of memory and swap together.
    swap_counts_memory: bool,
    peak: &'static str,
    events: &'static str,
}

const V1: Names = Names {
    limit: "memory.limit_in_bytes",
    swap: "memory.memsw.limit_in_bytes",
    swap_counts_memory: true,
    peak: "memory.max_usage_in_bytes",
    events: "memory.oom_control",
};

const V2: Names = Names {
    limit: "memory.max",
    swap: "memory.swap.max",
    swap_counts_memory: false,
    peak: "memory.peak",
    events: "memory.events",
};

impl Group {
    /// A group with `main` in it; none where cgroups are not ours to make.
    fn new(bytes: u64, main: Pid) -> Option<Self> {
        let (parent, names) = parent()?;
        let path = parent.join(format!("burla-{}", getpid().as_raw_nonzero()));
        fs::create_dir(&path).ok()?;
        let group = Self { path, names };
        fs::write(group.path.join(names.limit), bytes.to_string()).ok()?;
        let swap = if names.swap_counts_memory { bytes } else { 0 };
        let _ = fs::write(group.path.join(names.swap), swap.to_string());
        fs::write(group.path.join("cgroup.procs"), main.as_raw_nonzero().to_string()).ok()?;
        Some(group)
    }

    /// Whether the kernel had to kill something in it.
    fn killed(&self) -> bool {
        let events = fs::read_to_string(self.path.join(self.names.events)).unwrap_or_default();
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|kills| kills.trim() != "0")
    }

    fn peak(&self) -> u64 {
        let peak = fs::read_to_string(self.path.join(self.names.peak)).unwrap_or_default();
        peak.trim().parse().unwrap_or(0)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // All that was in it has been killed and reaped, but the kernel takes a moment to notice.
        for _ in 0..500 {
            match fs::remove_dir(&self.path) {
                Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                    pause(Duration::from_millis(2))
                }
                _ => return,
            }
        }
    }
}

/// The memory cgroup that this process is in.
fn parent() -> Option<(PathBuf, &'static Names)> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let of = |line: &str, root: &str| {
        let path = Path::new(root).join(line.splitn(3, ':').nth(2)?.trim_start_matches('/'));
        // In a container the path may be that of the host, where only the root is visible.
        Some(if path.is_dir() { path } else { root.into() })
    };
    for line in groups.lines() {
        let controllers = line.split(':').nth(1)?;
        if controllers.split(',').any(|name| name == "memory") {
            return Some((of(line, "/sys/fs/cgroup/memory")?, &V1));
        }
    }
    let line = groups.lines().find(|line| line.starts_with("0::"))?;
    let path = of(line, "/sys/fs/cgroup")?;
    let offered = fs::read_to_string(path.join("cgroup.subtree_control")).unwrap_or_default();
    offered.split_whitespace().any(|name| name == "memory").then_some((path, &V2))
}
