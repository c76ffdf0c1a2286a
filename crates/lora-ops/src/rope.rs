//! Rotary position embedding (RoFormer, arXiv 2104.09864) in the layout of Hugging Face: feature
//! `i` of a head is paired with feature `i + head_dim / 2`.

use candle_core::{Device, Result, Tensor};
use lora_spec::{Rope, RopeScaling};

use crate::backend::Backend;
use crate::transfer::from_vec;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Cosines and sines of every position, `[positions, head_dim / 2]` each, f32. YaRN multiplies them
/// by its attention factor.
#[derive(Debug, Clone)]
pub struct RopeTable {
    half: usize,
    positions: usize,
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    /// Computes the angles of `positions` positions for heads of `head_dim` features, for tensors
    /// on `device`.
    pub fn new(rope: &Rope, head_dim: usize, positions: usize, device: &Device) -> Result<Self> {
        if head_dim == 0 || !head_dim.is_multiple_of(2) || positions == 0 {
            candle_core::bail!(
                "invalid rotary embedding of {positions} positions for heads of {head_dim} features: there \
                 must be at least one position and an even number of features"
            );
        }
        let half = head_dim / 2;
        let frequencies = frequencies(rope, head_dim);
        let angle = |i: usize| f64::from((i / half) as f32 * frequencies[i % half]);
        let factor = match rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        };
        let table = |of: fn(f64) -> f64| {
            let values: Vec<f32> = (0..positions * half).map(|i| (factor * of(angle(i))) as f32).collect();
            from_vec(values, (positions, half), device)
        };
        Ok(Self { half, positions, cos: table(f64::cos)?, sin: table(f64::sin)? })
    }

    /// Rotates `x` `[sequences * seq, heads * head_dim]` in place. Token `t` of a sequence has
    /// position `first + t`.
    pub fn forward(&self, x: &Tensor, seq: usize, first: usize) -> Result<()> {
        self.rotate(x, seq, first, 1.0)
    }

    /// Converts the gradient of the rotated tensor into that of the original tensor, in place.
    pub fn backward(&self, dx: &Tensor, seq: usize) -> Result<()> {
        self.rotate(dx, seq, 0, -1.0)
    }

    #[tracing::instrument(level = "trace", name = "rope", skip_all)]
    fn rotate(&self, x: &Tensor, seq: usize, first: usize, direction: f32) -> Result<()> {
        let (tokens, features) = x.dims2()?;
        let fits = seq > 0 && features > 0 && features % (2 * self.half) == 0 && tokens % seq == 0;
        if !fits || first.saturating_add(seq) > self.positions {
            candle_core::bail!(
                "invalid rotary embedding of {:?} from position {first}: the table has {} positions for \
                 heads of {} features",
                x.shape(),
                self.positions,
                2 * self.half
            );
        }
        match Backend::of_tensors(&[x, &self.cos, &self.sin])? {
            Backend::Cpu => cpu::rotate(self, x, seq, first, direction),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::rotate(&gpu, self, x, seq, first, direction),
        }
    }
}

/// Returns the radians per position of each feature pair, in f32 as Transformers computes them.
fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f32> {
    let exponent = |i: usize| f64::from((2 * i) as f32 / head_dim as f32);
    let base = (0..head_dim / 2).map(|i| f64::from((1.0 / rope.theta.powf(exponent(i))) as f32));
    let scaled = base.enumerate().map(|(i, frequency)| match rope.scaling {
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
        RopeScaling::Yarn { factor, original_max_position_embeddings, beta_fast, beta_slow, .. } => {
            // The pair that turns this many times within the original context.
            let pair = |turns: f64| {
                let wavelength = original_max_position_embeddings / (turns * 2.0 * std::f64::consts::PI);
                head_dim as f64 * wavelength.ln() / (2.0 * rope.theta.ln())
            };
            let from = pair(beta_fast).floor().max(0.0);
            let to = pair(beta_slow).ceil().min(head_dim as f64 - 1.0);
            let to = if to == from { to + 0.001 } else { to };
            let divided = ((i as f64 - from) / (to - from)).clamp(0.0, 1.0);
            frequency / factor * divided + frequency * (1.0 - divided)
        }
    });
    scaled.map(|frequency| frequency as f32).collect()
}
