//! Rotary position embedding (RoFormer, arXiv 2104.09864) in Hugging Face's layout: feature `i` of a head is paired with
//! feature `i + head_dim / 2`.

use candle_core::{Result, Tensor};
use lora_spec::{Rope, RopeScaling};
use rayon::prelude::*;

use crate::cpu::update_f32;
use crate::simd::vectorize;

/// Cosines and sines of every position, `[positions, head_dim / 2]` each.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// The angles of `positions` positions for heads of `head_dim` features.
    pub fn new(rope: &Rope, head_dim: usize, positions: usize) -> Self {
        let half = head_dim / 2;
        let frequencies = frequencies(rope, head_dim);
        let angle = |i: usize| (i / half) as f32 * frequencies[i % half];
        Self {
            half,
            cos: (0..positions * half).map(|i| f64::from(angle(i)).cos() as f32).collect(),
            sin: (0..positions * half).map(|i| f64::from(angle(i)).sin() as f32).collect(),
        }
    }

    /// Rotates `x` `[sequences * seq, heads * head_dim]` in place; token `t` of a sequence has position `first + t`.
    pub fn forward(&self, x: &Tensor, seq: usize, first: usize) -> Result<()> {
        self.rotate(x, seq, first, 1.0)
    }

    /// Turns the gradient of the rotated tensor into that of the tensor before, in place.
    pub fn backward(&self, dx: &Tensor, seq: usize) -> Result<()> {
        self.rotate(dx, seq, 0, -1.0)
    }

    #[tracing::instrument(level = "trace", name = "rope", skip_all)]
    fn rotate(&self, x: &Tensor, seq: usize, first: usize, direction: f32) -> Result<()> {
        let (tokens, features) = x.dims2()?;
        let half = self.half;
        let fits = half > 0 && seq > 0 && features % (2 * half) == 0 && tokens % seq == 0;
        if !fits || first.saturating_add(seq) > self.cos.len() / half {
            candle_core::bail!("rotary embedding of {:?} from position {first}", x.shape());
        }
        update_f32(x, |x| {
            x.par_chunks_mut(features).with_min_len(8).enumerate().for_each(|(token, row)| {
                let at = (first + token % seq) * half;
                let (cos, sin) = (&self.cos[at..at + half], &self.sin[at..at + half]);
                vectorize(|| {
                    for head in row.chunks_exact_mut(2 * half) {
                        let (low, high) = head.split_at_mut(half);
                        for (((l, h), c), s) in low.iter_mut().zip(high).zip(cos).zip(sin) {
                            let s = s * direction;
                            (*l, *h) = (*l * c - *h * s, *h * c + *l * s);
                        }
                    }
                });
            });
        })
    }
}

/// Radians a position of each feature pair, in f32 as Transformers computes them.
fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let exponent = |i: usize| f64::from((2 * i) as f32 / head_dim as f32);
    let base = (0..head_dim / 2).map(|i| f64::from((1.0 / rope.theta.powf(exponent(i))) as f32));
    let scaled = base.map(|frequency| match rope.scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings;
            let wavelength = 2.0 * std::f64::consts::PI / frequency;
            if wavelength > original / low_freq_factor {
                frequency / factor
            } else if wavelength < original / high_freq_factor {
                frequency
            } else {
                let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    });
    scaled.map(|frequency| frequency as f32).collect()
}
