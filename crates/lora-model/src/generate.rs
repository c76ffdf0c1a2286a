//! Text generation with a cache of keys and values.

use candle_core::{IndexOp, Tensor};
use lora_ops::transfer::to_vec;
use lora_spec::{Philox, Rope};

use crate::attention::KvCache;
use crate::pass::Positions;
use crate::{Adapter, Base, ModelError};

/// The method of choosing the next token, with the settings of Transformers' `GenerationConfig`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sampling {
    /// The most likely token.
    Greedy,
    /// A random token. The logits are divided by `temperature`, restricted to the `top_k` most
    /// likely tokens (0: all), and then to the smallest set with a total probability of at least
    /// `top_p`.
    Sample {
        /// Divisor of the logits, above 0.
        temperature: f64,
        /// Number of candidates; 0: all.
        top_k: usize,
        /// Probability mass of the candidates, in (0, 1].
        top_p: f64,
        /// Seed of the random draws.
        seed: u64,
    },
}

/// Generates text from a base and an adapter.
#[derive(Debug, Clone, Copy)]
pub struct Generator<'a> {
    /// The base.
    pub base: &'a Base,
    /// The adapter; `None`: only the base is used.
    pub adapter: Option<&'a Adapter>,
}

impl Generator<'_> {
    /// Continues `prompt` (at least one token) until a token of `stop`, which is not returned, or
    /// until `max_new_tokens`.
    pub fn generate(
        &self,
        prompt: &[u32],
        stop: &[u32],
        max_new_tokens: usize,
        sampling: Sampling,
    ) -> Result<Vec<u32>, ModelError> {
        let empty = vec![KvCache::default(); self.base.blocks.len()];
        let mut caches = empty.clone();
        let mut generated = Vec::new();
        let mut input = prompt.to_vec();
        let mut past = 0;
        while generated.len() < max_new_tokens && !input.is_empty() {
            // The cached keys are rotated with the frequencies of shorter sequences.
            let is_stale = |rope: &Rope| rope.context(past) != rope.context(past + input.len());
            if past > 0 && self.base.config.ropes.iter().any(is_stale) {
                caches.clone_from(&empty);
                input = [prompt, generated.as_slice()].concat();
                past = 0;
            }
            let positions = Positions { batch: 1, seq: input.len(), past };
            let mut pass = self.base.pass(self.adapter, positions)?;
            let x = self.base.forward(&input, &mut pass, Some(&mut caches), |_, _, _| ())?;
            past += input.len();
            let next = self.next_token(&x.i(input.len() - 1..)?, sampling, generated.len())?;
            if stop.contains(&next) {
                break;
            }
            generated.push(next);
            input = vec![next];
        }
        Ok(generated)
    }

    fn next_token(&self, last: &Tensor, sampling: Sampling, drawn: usize) -> Result<u32, ModelError> {
        let (normed, _) = self.base.norm.forward(&last.contiguous()?)?;
        let logits = to_vec(&self.base.logits(&normed)?)?;
        Ok(sample_token(&logits, sampling, drawn))
    }
}

/// Chooses a token. If logits are equal, the smaller token comes first, so that the choice depends
/// only on the logits, the settings and the number of previous draws (`drawn`).
fn sample_token(logits: &[f32], sampling: Sampling, drawn: usize) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    let (temperature, top_k, top_p, seed) = match sampling {
        Sampling::Greedy => {
            return order.into_iter().reduce(|a, b| if logits[b] > logits[a] { b } else { a }).unwrap_or(0)
                as u32;
        }
        Sampling::Sample { temperature, top_k, top_p, seed } => (temperature, top_k, top_p, seed),
    };
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    if top_k > 0 {
        order.truncate(top_k);
    }
    let top = order.first().map_or(0.0, |&i| f64::from(logits[i]));
    let weights: Vec<f64> =
        order.iter().map(|&i| ((f64::from(logits[i]) - top) / temperature).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut mass = 0.0;
    let kept = weights.iter().take_while(|w| {
        let keep = mass < top_p * total;
        mass += **w;
        keep
    });
    let kept: Vec<f64> = kept.copied().collect();
    let words = Philox::new(seed, "sample").words([drawn as u32, 0, 0, 0]);
    let unit = (u64::from(words[0]) << 21 | u64::from(words[1]) >> 11) as f64 / (1_u64 << 53) as f64;
    let mut rest = unit * kept.iter().sum::<f64>();
    for (index, weight) in order.iter().zip(&kept) {
        if rest < *weight {
            return *index as u32;
        }
        rest -= weight;
    }
    order.first().copied().unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_breaks_ties_towards_the_lower_token() {
        assert_eq!(sample_token(&[0.0, 3.0, 3.0, -1.0], Sampling::Greedy, 0), 1);
    }

    #[test]
    fn sampling_follows_the_probabilities_within_top_k_and_top_p() {
        let logits = [0.0, 1.0, 2.0, 0.5];
        let mut counts = [0; 4];
        for i in 0..4000 {
            let sampling = Sampling::Sample { temperature: 1.0, top_k: 0, top_p: 1.0, seed: 1 };
            counts[sample_token(&logits, sampling, i) as usize] += 1;
        }
        let total: f32 = logits.iter().map(|l: &f32| l.exp()).sum();
        for (count, logit) in counts.iter().zip(logits) {
            let expected = 4000.0 * logit.exp() / total;
            assert!((*count as f32 - expected).abs() < 150.0, "{counts:?}");
        }
        for i in 0..200 {
            let top_k = Sampling::Sample { temperature: 5.0, top_k: 2, top_p: 1.0, seed: 1 };
            assert!([1, 2].contains(&sample_token(&logits, top_k, i)));
            let top_p = Sampling::Sample { temperature: 1.0, top_k: 0, top_p: 0.5, seed: 1 };
            assert_eq!(sample_token(&logits, top_p, i), 2);
        }
    }
}
