//! The gradients of a group of one rank.

use candle_core::Tensor;
use lora_collective::{CollectiveError, Group};

use super::{GradientReducer, GradientSums};
use crate::error::TrainError;

/// Does nothing: the only rank's sum is the result.
pub(crate) struct SingleRankReducer;

impl GradientReducer for SingleRankReducer {
    fn finish(&mut self, _: &mut Group, all: &GradientSums) -> Result<Tensor, TrainError> {
        match all.nodes {
            [(_, sum)] => Ok(sum.clone()),
            nodes => {
                let message = format!("{} nodes of the only rank instead of one", nodes.len());
                Err(CollectiveError::Argument(message).into())
            }
        }
    }
}
