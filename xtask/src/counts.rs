//! Counts tests by the summary lines of `cargo test` and of nextest.

use std::fmt;

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Counts {
    /// Adds what a line of output says, if it is a summary.
    pub(crate) fn add(&mut self, line: &str) {
        let line = without_colours(line);
        let line = line.trim();
        let summary = line.strip_prefix("test result: ").or_else(|| {
            line.strip_prefix("Summary [")
                .filter(|rest| rest.contains(" tests run: ") || rest.contains(" test run: "))
        });
        let Some(summary) = summary else { return };
        let words: Vec<&str> =
            summary.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].parse::<u64>() else { continue };
            match pair[1] {
                "passed" => self.passed += number,
                "failed" | "timed" | "exec" => self.failed += number,
                "ignored" | "skipped" => self.skipped += number,
                _ => {}
            }
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

fn without_colours(line: &str) -> String {
    let mut parts = line.split('\u{1b}');
    let mut plain = parts.next().unwrap_or("").to_owned();
    for part in parts {
        plain.push_str(part.split_once('m').map_or("", |(_, rest)| rest));
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::Counts;

    fn counted(lines: &[&str]) -> String {
        let mut counts = Counts::default();
        lines.iter().for_each(|line| counts.add(line));
        counts.to_string()
    }

    #[test]
    fn summaries_of_cargo_test_are_added_up() {
        let lines = [
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.52s\n",
            "test some::name ... ok\n",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\n",
        ];
        assert_eq!(counted(&lines), "13 passed, 2 failed, 1 skipped");
    }

    #[test]
    fn summaries_of_nextest_are_read_through_their_colours() {
        let line = "\u{1b}[31;1m     Summary\u{1b}[0m [   1.234s] \u{1b}[1m9\u{1b}[0m tests run: \
                    \u{1b}[1m6\u{1b}[0m \u{1b}[32;1mpassed\u{1b}[0m (1 slow), 2 failed, 1 timed out, 4 skipped\n";
        assert_eq!(counted(&[line]), "6 passed, 3 failed, 4 skipped");
        assert_eq!(
            counted(&["     Summary [   0.004s] 1 test run: 1 passed, 0 skipped\n"]),
            "1 passed, 0 failed, 0 skipped"
        );
    }

    #[test]
    fn other_lines_count_nothing() {
        assert_eq!(
            counted(&["5 passed, 3 failed\n", "Summary of 4 failed things\n"]),
            "0 passed, 0 failed, 0 skipped"
        );
    }
}
