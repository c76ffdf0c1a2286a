//! The messages that ranks exchange in every step, in addition to the gradients.

use lora_collective::Group;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::engine::LossSums;
use crate::error::TrainError;

/// The message of one rank in the exchange of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StepMessage {
    /// Number of completed steps.
    pub(crate) step: u64,
    /// Hash of the state after these steps.
    pub(crate) state: String,
    /// Whether this rank was asked to stop after the step.
    pub(crate) stop: bool,
    /// Losses of this rank's micro-batches, in order, as bits, because JSON has no NaN.
    pub(crate) losses: Vec<(u64, u64)>,
    /// The first of this rank's losses and gradients that is not finite.
    pub(crate) not_finite: Option<String>,
}

impl StepMessage {
    pub(crate) fn losses(&self) -> impl Iterator<Item = LossSums> {
        self.losses.iter().map(|(loss, weight)| (f64::from_bits(*loss), f64::from_bits(*weight)))
    }
}

/// Converts losses to bits.
pub(crate) fn loss_bits(losses: &[LossSums]) -> Vec<(u64, u64)> {
    losses.iter().map(|(loss, weight)| (loss.to_bits(), weight.to_bits())).collect()
}

/// Sends `message` to all ranks and returns the messages of all ranks, by rank.
pub(crate) fn all_gather<T: Serialize + DeserializeOwned>(
    group: &mut Group,
    message: &T,
) -> Result<Vec<T>, TrainError> {
    let bytes = serde_json::to_vec(message).map_err(|_| TrainError::Message { rank: group.rank() })?;
    let gathered = group.all_gather(&bytes)?;
    let parse = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|_| TrainError::Message { rank })
    };
    gathered.iter().enumerate().map(parse).collect()
}

/// Returns the first rank whose state differs from the state of most ranks, if there is one. If two
/// ranks differ, this is the second.
pub(crate) fn find_diverged_rank(states: &[(u64, &str)]) -> Option<usize> {
    let votes = |state: &(u64, &str)| states.iter().filter(|s| *s == state).count();
    let majority = states.iter().rev().max_by_key(|state| votes(state))?;
    states.iter().position(|state| state != majority)
}

#[cfg(test)]
mod tests {
    use super::find_diverged_rank;

    #[test]
    fn the_diverged_rank_is_found() {
        assert_eq!(find_diverged_rank(&[(1, "a"), (1, "a"), (1, "a")]), None);
        assert_eq!(find_diverged_rank(&[(1, "b"), (1, "a"), (1, "a")]), Some(0));
        assert_eq!(find_diverged_rank(&[(1, "a"), (2, "a"), (1, "a")]), Some(1));
        assert_eq!(find_diverged_rank(&[(1, "a"), (1, "b")]), Some(1));
    }
}
