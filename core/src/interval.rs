//! Sets of indexes as intervals: 100 million covered indexes are a handful of ranges.

use std::{collections::BTreeMap, ops::Range};

/// A set of `u64`, kept as disjoint ranges that do not touch.
#[derive(Clone, Debug, Default)]
pub struct IntervalSet {
    ranges: BTreeMap<u64, u64>,
}

impl IntervalSet {
    /// Adds `range` and returns the parts of it that were not there yet, in order.
    pub fn insert(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let fresh = self.missing(range.clone());
        if fresh.is_empty() {
            return fresh;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&s, &e)) = self.ranges.range(..=start).next_back()
            && e >= start
        {
            start = s;
            end = end.max(e);
        }
        while let Some((&s, &e)) = self.ranges.range(start..=end).next() {
            end = end.max(e);
            self.ranges.remove(&s);
        }
        self.ranges.insert(start, end);
        fresh
    }

    /// The parts of `range` that are not in the set, in order.
    #[must_use]
    pub fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut at = range.start;
        let mut gaps = Vec::new();
        if let Some((_, &end)) = self.ranges.range(..=at).next_back() {
            at = at.max(end);
        }
        for (&start, &end) in self.ranges.range(range.clone()) {
            if start > at {
                gaps.push(at..start);
            }
            at = at.max(end);
        }
        if at < range.end {
            gaps.push(at..range.end);
        }
        gaps
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::{RngExt, SeedableRng, rngs::StdRng};

    use super::*;

    #[test]
    fn agrees_with_a_plain_set() {
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let (mut set, mut plain) = (IntervalSet::default(), BTreeSet::new());
            for _ in 0..60 {
                let start = rng.random_range(0..80);
                let range = start..start + rng.random_range(0..12);
                let fresh: Vec<u64> = set.insert(range.clone()).into_iter().flatten().collect();
                let expected: Vec<u64> = range.filter(|i| plain.insert(*i)).collect();
                assert_eq!(fresh, expected, "seed {seed}");
            }
            for i in 0..100 {
                assert_eq!(set.missing(i..i + 1).is_empty(), plain.contains(&i), "seed {seed}, index {i}");
            }
            let runs = plain.iter().filter(|i| **i == 0 || !plain.contains(&(*i - 1))).count();
            assert_eq!(set.ranges.len(), runs, "ranges that touch are one");
        }
    }
}
