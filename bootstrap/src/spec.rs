//! The cluster spec: which nodes there may be.

use std::{collections::BTreeSet, fmt, time::Duration};

use burla_core::{control::Capacity, job::JobSpec};
use serde::{Deserialize, Serialize};

/// The smallest part of a CPU that a call may ask for: a thousand workers for each are plenty.
const LEAST_CPU: f64 = 0.001;

/// What the owner of a cluster asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterSpec {
    /// The cluster's name; it stands in the names of its queues.
    pub name: String,
    /// Kinds of nodes. A job gets nodes of the first pool that fits and has room.
    pub pools: Vec<Pool>,
}

/// Nodes of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// So many nodes are kept even when nothing runs.
    #[serde(default)]
    pub min_nodes: u32,
    /// There are never more nodes than this.
    pub max_nodes: u32,
    /// A node beyond `min_nodes` ends after so many seconds without work.
    #[serde(default = "default_idle")]
    pub idle: u64,
    /// What one node has.
    pub node: Capacity,
}

fn default_idle() -> u64 {
    300
}

/// What is wrong with a cluster spec.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It is not JSON of the right shape.
    #[error("cluster spec: {0}")]
    Json(#[from] serde_json::Error),
    /// A field has a value that makes no sense.
    #[error("cluster spec: {field} {problem}")]
    Field {
        /// Which, as one would write it to get there: `pools[0].max_nodes`.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl ClusterSpec {
    /// Reads and checks a spec.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let spec: Self = serde_json::from_slice(json)?;
        spec.validate()?;
        Ok(spec)
    }

    /// Checks what the types can't say.
    pub fn validate(&self) -> Result<(), Error> {
        let wrong =
            |field: &str, problem: &str| Error::Field { field: field.into(), problem: problem.into() };
        let letters = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        // With a node's id behind it, the name has to fit into the 80 characters of a queue's name.
        if !(1..=24).contains(&self.name.len()) || !self.name.bytes().all(letters) {
            return Err(wrong("name", "must be 1 to 24 lower-case letters, digits and dashes"));
        }
        if self.pools.is_empty() {
            return Err(wrong("pools", "must name at least one pool"));
        }
        let mut names = BTreeSet::new();
        for (i, pool) in self.pools.iter().enumerate() {
            let wrong = |field: &str, problem: &str| Err(wrong(&format!("pools[{i}].{field}"), problem));
            if pool.name.is_empty() {
                return wrong("name", "is empty");
            }
            if !names.insert(&pool.name) {
                return wrong("name", &format!("is {:?}, as that of another pool", pool.name));
            }
            if pool.max_nodes == 0 {
                return wrong("max_nodes", "must be at least 1");
            }
            if pool.min_nodes > pool.max_nodes {
                return wrong("min_nodes", &format!("is above max_nodes, which is {}", pool.max_nodes));
            }
            if !(pool.node.cpus.is_finite() && pool.node.cpus > 0.0) {
                return wrong("node.cpus", "must be above 0");
            }
            if pool.node.memory == 0 {
                return wrong("node.memory", "must be above 0");
            }
        }
        Ok(())
    }

    /// The pool of that name; none if the spec has changed since.
    #[must_use]
    pub fn pool(&self, name: &str) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.name == name)
    }

    /// Says why no node of this cluster can ever run a call of `job`, if that is so.
    #[must_use]
    pub fn refusal(&self, job: &JobSpec) -> Option<String> {
        if !(job.cpu.is_finite() && job.cpu >= LEAST_CPU) {
            return Some(format!("a call asks for {} CPUs; it must be at least {LEAST_CPU}", job.cpu));
        }
        if job.max_parallelism == Some(0) {
            return Some("max_parallelism is 0; it must be at least 1".into());
        }
        if self.pools.iter().any(|pool| pool.node.slots(job.cpu, job.ram) > 0) {
            return None;
        }
        let asked = match job.ram {
            Some(ram) => format!("{} and {}", Cpus(job.cpu), Bytes(ram)),
            None => Cpus(job.cpu).to_string(),
        };
        let node = self.largest(job);
        Some(format!(
            "a call asks for {asked}; the largest node has {} and {}",
            Cpus(node.cpus),
            Bytes(node.memory)
        ))
    }

    /// The node that comes nearest to what `job` asks for: if CPUs are not what is lacking, the
    /// one with the most memory.
    fn largest(&self, job: &JobSpec) -> Capacity {
        let nodes = || self.pools.iter().map(|pool| pool.node);
        let mut enough = nodes().filter(|node| node.cpus >= job.cpu).peekable();
        let largest = if enough.peek().is_some() {
            enough.max_by_key(|node| node.memory)
        } else {
            nodes().max_by(|a, b| a.cpus.total_cmp(&b.cpus))
        };
        largest.unwrap_or(Capacity { cpus: 0.0, memory: 0 })
    }
}

impl Pool {
    /// How long a node stays without work.
    #[must_use]
    pub fn idle(&self) -> Duration {
        Duration::from_secs(self.idle)
    }
}

struct Cpus(f64);

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, if self.0 == 1.0 { "CPU" } else { "CPUs" })
    }
}

struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, name) = if self.0 >= 1 << 30 { (1u64 << 30, "GiB") } else { (1 << 20, "MiB") };
        let tenths = (self.0 as f64 / unit as f64 * 10.0).round() / 10.0;
        write!(f, "{tenths} {name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::job_spec;

    const GOOD: &str =
        r#"{"name": "prod", "pools": [{"name": "a", "max_nodes": 4, "node": {"cpus": 2, "memory": 1024}}]}"#;

    #[test]
    fn errors_name_the_field() {
        let spec = ClusterSpec::parse(GOOD.as_bytes()).unwrap();
        assert_eq!((spec.pools[0].min_nodes, spec.pools[0].idle), (0, 300));
        for (from, to, message) in [
            ("prod", "Prod", "name must be 1 to 24 lower-case letters, digits and dashes"),
            (r#""max_nodes": 4"#, r#""max_nodes": 0"#, "pools[0].max_nodes must be at least 1"),
            (
                r#""max_nodes": 4"#,
                r#""max_nodes": 4, "min_nodes": 5"#,
                "pools[0].min_nodes is above max_nodes, which is 4",
            ),
            (r#""cpus": 2"#, r#""cpus": 0"#, "pools[0].node.cpus must be above 0"),
            ("1024", "0", "pools[0].node.memory must be above 0"),
            (r#""name": "a""#, r#""name": """#, "pools[0].name is empty"),
            (r#""max_nodes": 4"#, r#""max_node": 4"#, "unknown field `max_node`"),
        ] {
            let error = ClusterSpec::parse(GOOD.replace(from, to).as_bytes()).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let twice = ClusterSpec { pools: [spec.pools.clone(), spec.pools].concat(), name: spec.name };
        assert!(twice.validate().unwrap_err().to_string().contains("pools[1].name is \"a\""));
    }

    #[test]
    fn what_fits_nowhere_is_refused_with_numbers() {
        let pool = |name: &str, cpus, memory| Pool {
            name: name.into(),
            min_nodes: 0,
            max_nodes: 1,
            idle: 60,
            node: Capacity { cpus, memory },
        };
        let mut spec = ClusterSpec { name: "c".into(), pools: vec![pool("small", 2.0, 25_125_558_682)] };
        let refusal = |spec: &ClusterSpec, cpu, ram| spec.refusal(&job_spec(cpu, ram, None));
        assert_eq!(
            refusal(&spec, 64.0, Some(1 << 30)).unwrap(),
            "a call asks for 64 CPUs and 1 GiB; the largest node has 2 CPUs and 23.4 GiB"
        );
        assert_eq!(refusal(&spec, 2.0, Some(1 << 30)), None);
        for cpu in [f64::NAN, f64::INFINITY, -1.0, 0.0, 0.0001] {
            assert!(refusal(&spec, cpu, None).unwrap().contains("must be at least 0.001"), "{cpu}");
        }
        assert!(spec.refusal(&job_spec(1.0, None, Some(0))).unwrap().contains("max_parallelism"));
        spec.pools.push(pool("large", 1.0, 64 << 30));
        let lacking_memory = refusal(&spec, 1.0, Some(65 << 30)).unwrap();
        assert!(lacking_memory.ends_with("the largest node has 1 CPU and 64 GiB"), "{lacking_memory}");
    }
}
