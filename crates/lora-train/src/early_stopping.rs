//! The best evaluation and early stopping.

use serde::{Deserialize, Serialize};

use lora_spec::TrainingSpec;

/// The best evaluation so far, by the rules of Transformers' `EarlyStoppingCallback` and
/// `load_best_model_at_end`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct BestEvaluation {
    /// Lowest `eval_loss` and its step.
    pub(crate) best: Option<(f64, u64)>,
    /// Number of evaluations in a row without an improvement of more than the threshold.
    without_improvement: u64,
}

impl BestEvaluation {
    /// Records an evaluation. Returns whether it is the best so far.
    pub(crate) fn observe(&mut self, training: &TrainingSpec, step: u64, eval_loss: f64) -> bool {
        let best = self.best.map_or(f64::INFINITY, |(loss, _)| loss);
        let improved = eval_loss < best && best - eval_loss > training.early_stopping_threshold;
        self.without_improvement = if improved { 0 } else { self.without_improvement + 1 };
        let is_best = eval_loss < best;
        if is_best {
            self.best = Some((eval_loss, step));
        }
        is_best
    }

    /// Returns whether `early_stopping_patience` is exhausted.
    pub(crate) fn patience_exhausted(&self, training: &TrainingSpec) -> bool {
        training.early_stopping_patience.is_some_and(|patience| self.without_improvement >= patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_counts_evaluations_without_improvement() {
        let training = TrainingSpec {
            early_stopping_patience: Some(2),
            early_stopping_threshold: 0.1,
            ..TrainingSpec::default()
        };
        let mut best = BestEvaluation::default();
        assert!(best.observe(&training, 1, 2.0));
        assert!(best.observe(&training, 2, 1.95), "better, but by less than the threshold");
        assert!(!best.patience_exhausted(&training));
        assert!(!best.observe(&training, 3, f64::NAN));
        assert!(best.patience_exhausted(&training));
        assert!(best.observe(&training, 4, 1.0));
        assert!(!best.patience_exhausted(&training));
        assert_eq!(best.best, Some((1.0, 4)));
    }

    #[test]
    fn an_improvement_must_exceed_the_threshold() {
        // The differences are exact in binary.
        let training = TrainingSpec {
            early_stopping_patience: Some(1),
            early_stopping_threshold: 0.5,
            ..TrainingSpec::default()
        };
        for (second, exhausted) in [(1.5, true), (1.25, false), (2.5, true)] {
            let mut best = BestEvaluation::default();
            assert!(best.observe(&training, 1, 2.0), "the first evaluation is the best so far");
            assert!(!best.patience_exhausted(&training));
            best.observe(&training, 2, second);
            assert_eq!(best.patience_exhausted(&training), exhausted, "2 to {second}");
        }
    }

    #[test]
    fn of_equal_evaluations_the_first_is_the_best() {
        let training = TrainingSpec::default();
        let mut best = BestEvaluation::default();
        assert!(best.observe(&training, 1, 2.0));
        assert!(!best.observe(&training, 2, 2.0));
        assert_eq!(best.best, Some((2.0, 1)));
    }
}
