//! How many inputs go into the next message.
//!
//! Few at first, because a call may take an hour and there may be a thousand workers; many once
//! calls have proved to be short; few again towards the end, so that all workers end together.

/// Seconds of work in a message. Long against what a message costs, short against what a user notices.
const WORK: f64 = 0.04;

/// Seconds of work below which splitting the last inputs gains nothing.
const LEAST_WORK: f64 = 0.002;

/// Seconds that a call costs beside the function itself.
const CALL: f64 = 1e-6;

/// Bytes of results that a message may bring. Six of them are under way for two slots.
const RESULTS: f64 = (4 << 20) as f64;

/// Weight of the latest message against those before it.
const WEIGHT: f64 = 0.3;

/// Learns how long calls take.
#[derive(Debug, Default)]
pub(super) struct Ramp {
    /// Seconds of a call; none until one has ended.
    mean: Option<f64>,
    /// Bytes of a result.
    mean_len: f64,
    /// The most inputs of a message that came back whole.
    proved: usize,
}

impl Ramp {
    /// So many calls took so long together, and returned so many bytes.
    pub(super) fn measured(&mut self, seconds: f64, len: usize, count: u64) {
        if count == 0 {
            return;
        }
        let (latest, latest_len) = (seconds / count as f64 + CALL, len as f64 / count as f64);
        let known = self.mean.map(|mean| (mean, self.mean_len)).unwrap_or((latest, latest_len));
        self.mean = Some(known.0 + WEIGHT * (latest - known.0));
        self.mean_len = known.1 + WEIGHT * (latest_len - known.1);
    }

    /// A message of so many inputs is done.
    pub(super) fn proved(&mut self, count: usize) {
        self.proved = self.proved.max(count);
    }

    /// How many inputs the next message takes, of `waiting` ones and perhaps more to come.
    pub(super) fn size(&self, slots: usize, waiting: usize, more: bool) -> usize {
        let Some(mean) = self.mean else { return 1 };
        let calls = |seconds: f64| ((seconds / mean) as usize).max(1);
        let by_len = ((RESULTS / self.mean_len.max(1.0)) as usize).max(1);
        let size = calls(WORK).min(by_len).min(2 * self.proved.max(1));
        if more { size } else { size.min((waiting / (2 * slots)).max(calls(LEAST_WORK))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_start_at_one_double_and_halve_at_the_end() {
        let mut ramp = Ramp::default();
        assert_eq!(ramp.size(2, 1000, true), 1);
        let mut sizes = Vec::new();
        for _ in 0..30 {
            let size = ramp.size(2, 1_000_000, true);
            sizes.push(size);
            ramp.measured(0.0, 16 * size, size as u64);
            ramp.proved(size);
        }
        assert_eq!(sizes[..5], [1, 2, 4, 8, 16]);
        assert_eq!(sizes[29], 40_000, "40 ms of calls of a microsecond");
        assert_eq!(ramp.size(2, 100_000, false), 25_000);
        assert_eq!(ramp.size(2, 100, false), 2_000, "2 ms of work are not worth splitting");
    }

    #[test]
    fn long_results_travel_in_small_companies() {
        let mut ramp = Ramp::default();
        ramp.proved(1000);
        ramp.measured(0.0, 100 << 20, 100);
        assert_eq!(ramp.size(2, 1000, true), 4);
    }

    #[test]
    fn long_calls_travel_alone() {
        let mut ramp = Ramp::default();
        ramp.proved(1000);
        ramp.measured(2.0, 10, 1);
        assert_eq!(ramp.size(4, 1000, true), 1);
        assert_eq!(ramp.size(4, 1000, false), 1);
    }
}
