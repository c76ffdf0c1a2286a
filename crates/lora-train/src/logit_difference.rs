//! How far the logits of one model are from those of another.

use candle_core::Tensor;
use lora_model::{Adapter, Base, ModelError, hidden_states};
use lora_ops::transfer::to_vec;
use lora_spec::{CPU_LOGITS_PER_CHUNK, MicroBatch, chunk_rows};
use serde::{Deserialize, Serialize};

/// The difference of a model's logits from those of the trained model, over the tokens of some
/// rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LogitDifference {
    /// Number of tokens after which the logits were compared.
    pub tokens: usize,
    /// Kullback-Leibler divergence of the next token's distribution from the trained model's, as
    /// the mean over tokens, in nats: the sum of `p (ln p - ln q)` with `p` of the trained model.
    pub kl_divergence: f64,
    /// Share of the tokens after which both models have the same most likely next token.
    pub same_token: f64,
    /// Largest absolute difference of a logit; infinite if only one of two logits is finite.
    pub largest_difference: f64,
    /// Largest absolute logit of the trained model; infinite if one is not finite.
    pub largest_logit: f64,
}

impl LogitDifference {
    /// Compares logits of some rows, `[tokens][vocab]` each. All of `found` and `expected` have the
    /// same lengths.
    pub fn new(found: &[Vec<f32>], expected: &[Vec<f32>]) -> Self {
        let mut sums = Sums::default();
        found.iter().zip(expected).for_each(|(found, expected)| sums.add(found, expected));
        sums.mean()
    }

    /// The largest difference in units of the largest logit.
    pub fn relative(&self) -> f64 {
        if self.largest_difference == 0.0 { 0.0 } else { self.largest_difference / self.largest_logit }
    }

    /// Whether all logits of the trained model are finite.
    pub fn is_finite(&self) -> bool {
        self.largest_logit.is_finite()
    }

    /// Compares two adapters of `base` on `rows`.
    ///
    /// # Errors
    /// A tensor operation fails.
    pub(crate) fn of_adapters(
        base: &Base,
        found: &Adapter,
        expected: &Adapter,
        rows: &[MicroBatch],
    ) -> Result<Self, ModelError> {
        let mut sums = Sums::default();
        let vocab = base.config.vocab_size.max(1);
        for row in rows {
            let of = |adapter| hidden_states(base, Some(adapter), row);
            let (found, expected) = (of(found)?, of(expected)?);
            let tokens = row.tokens.len();
            // At most two matrices of logits and a copy of one exist at a time.
            let chunk = chunk_rows(tokens, vocab, CPU_LOGITS_PER_CHUNK / 3);
            for start in (0..tokens).step_by(chunk) {
                let count = chunk.min(tokens - start);
                let logits = |hidden: &Tensor| {
                    let rows = hidden.narrow(0, start, count)?;
                    Ok::<Vec<f32>, ModelError>(to_vec(&base.logits(&rows)?)?)
                };
                let (found, expected) = (logits(&found)?, logits(&expected)?);
                for (found, expected) in found.chunks(vocab).zip(expected.chunks(vocab)) {
                    sums.add(found, expected);
                }
            }
        }
        Ok(sums.mean())
    }
}

/// Sums and maxima over tokens.
#[derive(Default)]
struct Sums {
    tokens: usize,
    kl: f64,
    same: usize,
    largest_difference: f64,
    largest_logit: f64,
}

impl Sums {
    /// Adds the logits after a token.
    fn add(&mut self, found: &[f32], expected: &[f32]) {
        self.tokens += 1;
        self.same += usize::from(top(found) == top(expected));
        for (a, b) in found.iter().zip(expected) {
            let magnitude = if b.is_finite() { f64::from(b.abs()) } else { f64::INFINITY };
            self.largest_logit = self.largest_logit.max(magnitude);
            if a.to_bits() != b.to_bits() {
                let difference = (f64::from(*a) - f64::from(*b)).abs();
                let difference = if difference.is_nan() { f64::INFINITY } else { difference };
                self.largest_difference = self.largest_difference.max(difference);
            }
        }
        let (q, p) = (log_probabilities(found), log_probabilities(expected));
        self.kl += p.zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
    }

    fn mean(self) -> LogitDifference {
        let tokens = self.tokens.max(1) as f64;
        LogitDifference {
            tokens: self.tokens,
            kl_divergence: self.kl / tokens,
            same_token: self.same as f64 / tokens,
            largest_difference: self.largest_difference,
            largest_logit: self.largest_logit,
        }
    }
}

fn log_probabilities(logits: &[f32]) -> impl Iterator<Item = f64> {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - most).exp()).sum();
    let normalizer = most + sum.ln();
    logits.iter().map(move |logit| f64::from(*logit) - normalizer)
}

fn top(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).reduce(|a, b| if logits[b] > logits[a] { b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_do_not_differ() {
        let logits = [vec![1.0, -2.0, 0.5]];
        let same = LogitDifference::new(&logits, &logits);
        assert_eq!((same.tokens, same.kl_divergence, same.same_token), (1, 0.0, 1.0));
        assert_eq!((same.largest_difference, same.largest_logit, same.relative()), (0.0, 2.0, 0.0));
    }

    #[test]
    fn differences_are_measured() {
        // p = (1/2, 1/2) and q = (1/4, 3/4): KL = ln 2 - ln(3) / 2.
        let (p, q) = ([0.0, 0.0].to_vec(), [0.0, 3.0_f32.ln()].to_vec());
        let measured = LogitDifference::new(&[q, vec![4.0, 2.0]], &[p, vec![4.0, 2.0]]);
        let kl = (2.0_f64.ln() - 3.0_f64.ln() / 2.0) / 2.0;
        assert!((measured.kl_divergence - kl).abs() < 1e-7, "{measured:?}");
        assert!((measured.largest_difference - 3.0_f64.ln()).abs() < 1e-7, "{measured:?}");
        assert_eq!((measured.same_token, measured.largest_logit), (0.5, 4.0));
    }

    #[test]
    fn a_logit_that_is_not_a_number_differs_infinitely() {
        for wrong in [f32::NAN, f32::INFINITY] {
            let found = LogitDifference::new(&[vec![1.0, wrong]], &[vec![1.0, 2.0]]);
            assert_eq!(found.largest_difference, f64::INFINITY);
            assert!(found.relative() > 1e9 && found.is_finite());
            let both = LogitDifference::new(&[vec![1.0, wrong]], &[vec![1.0, wrong]]);
            assert!(!both.is_finite());
        }
    }
}
