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
    /// A limit of so many bytes for what `start` starts and its descendants.
    pub(super) fn around<T>(bytes: u64, start: impl FnOnce() -> T) -> (Self, T) {
        let group = Group::new(bytes);
        // What is started is in the group from its first moment, because it inherits it from us.
        if let Some(group) = &group {
            group.enter();
        }
        let started = start();
        if let Some(group) = &group {
            group.leave();
        }
        (Self { bytes, peak: 0, tree: Tree::default(), group }, started)
    }

    /// The most memory that was measured, if it is more than is allowed.
    pub(super) fn exceeded(&mut self) -> Option<u64> {
        if let Some(group) = &self.group {
            return group.exceeded().then(|| group.peak().max(self.bytes));
        }
        let pids = self.tree.descendants();
        // What is resident counts pages twice that forked processes share, but it is cheap: the exact
        // figure is asked for only when this one is too high.
        let sum = |file: &str, fields: [&str; 2]| -> u64 {
            let of = |pid: &Pid| fields.iter().filter_map(|name| field(*pid, file, name)).sum::<u64>();
            pids.iter().map(of).sum()
        };
        let resident = sum("status", ["RssAnon:", "RssShmem:"]);
        let used =
            if resident > self.bytes { sum("smaps_rollup", ["Pss_Anon:", "Pss_Shmem:"]) } else { resident };
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
    parent: PathBuf,
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
    /// What is written where so that the kernel does not pick one process of the call to kill, which
    /// would look like the call's own failure: version 1 lets all of them wait, version 2 kills all.
    whole: (&'static str, &'static str),
}

const V1: Names = Names {
    limit: "memory.limit_in_bytes",
    swap: "memory.memsw.limit_in_bytes",
    swap_counts_memory: true,
    peak: "memory.max_usage_in_bytes",
    events: "memory.oom_control",
    whole: ("memory.oom_control", "1"),
};

const V2: Names = Names {
    limit: "memory.max",
    swap: "memory.swap.max",
    swap_counts_memory: false,
    peak: "memory.peak",
    events: "memory.events",
    whole: ("memory.oom.group", "1"),
};

impl Group {
    /// An empty group; none where cgroups are not ours to make.
    fn new(bytes: u64) -> Option<Self> {
        let (parent, names) = parent()?;
        let path = parent.join(format!("burla-{}", getpid().as_raw_nonzero()));
        fs::create_dir(&path).ok()?;
        let group = Self { path, parent, names };
        fs::write(group.path.join(names.limit), bytes.to_string()).ok()?;
        let swap = if names.swap_counts_memory { bytes } else { 0 };
        let _ = fs::write(group.path.join(names.swap), swap.to_string());
        fs::write(group.path.join(names.whole.0), names.whole.1).ok()?;
        // Whether we may move between the two is known only by trying.
        group.enter();
        group.leave().then_some(group)
    }

    fn enter(&self) -> bool {
        fs::write(self.path.join("cgroup.procs"), getpid().as_raw_nonzero().to_string()).is_ok()
    }

    fn leave(&self) -> bool {
        fs::write(self.parent.join("cgroup.procs"), getpid().as_raw_nonzero().to_string()).is_ok()
    }

    /// Whether it wanted more memory than it may have.
    fn exceeded(&self) -> bool {
        let events = fs::read_to_string(self.path.join(self.names.events)).unwrap_or_default();
        let count = |name| events.lines().find_map(|line| line.strip_prefix(name));
        ["oom_kill ", "under_oom "].into_iter().filter_map(count).any(|count| count.trim() != "0")
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
