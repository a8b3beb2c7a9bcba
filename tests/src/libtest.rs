//! What the output of Rust's test harness adds up to, and the part of it that tells of failures.

/// Counted tests.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Count {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed.
    pub failed: u32,
    /// Names of those that failed.
    pub failures: Vec<String>,
}

impl Count {
    /// Adds what one line says.
    pub fn read(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("test result: ") {
            let number = |word: &str| {
                let before = rest.split(word).next().unwrap_or("");
                before.split_whitespace().last().and_then(|n| n.parse().ok()).unwrap_or(0)
            };
            self.passed += number(" passed");
            self.failed += number(" failed");
        } else if let Some(name) = line.strip_prefix("test ").and_then(|l| l.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
    }

    /// Counts a whole output.
    pub fn of(output: &str) -> Self {
        let mut count = Self::default();
        output.lines().for_each(|line| count.read(line));
        count
    }
}

/// What failed tests said: from the harness's heading to the list of names. The whole output if it has no such part, as
/// when the harness itself died.
pub fn complaints(output: &str) -> &str {
    const HEADING: &str = "\nfailures:\n";
    output.split_once(HEADING).map_or(output, |(_, rest)| rest.split(HEADING).next().unwrap_or(rest)).trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_the_harness_add_up() {
        let count = Count::of(
            "test one ... ok\n\
             test a::two ... FAILED\n\
             test result: FAILED. 12 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.04s\n\
             test result: ok. 30 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.04s\n",
        );
        assert_eq!((count.passed, count.failed, count.failures), (42, 1, vec!["a::two".to_owned()]));
    }

    #[test]
    fn complaints_are_what_stands_between_the_headings() {
        let output =
            "test a ... FAILED\n\nfailures:\n\n---- a stdout ----\nwhy\n\n\nfailures:\n    a\n\ntest result: FAILED.";
        assert_eq!(complaints(output), "---- a stdout ----\nwhy");
        assert_eq!(complaints("signal: 11"), "signal: 11");
    }
}
