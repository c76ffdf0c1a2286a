//! The phase of a worker's job.

use crate::v1::Phase;

impl Phase {
    /// Returns the name for users and metrics, in lower case.
    pub fn name(self) -> String {
        self.as_str_name().trim_start_matches("PHASE_").to_lowercase()
    }
}
