//! Rotary position embedding (RoFormer, arXiv 2104.09864) in the layout of Hugging Face: feature
//! `i` of the `2 n` rotated features of a head is paired with feature `i + n`; or, interleaved,
//! feature `2 i` with feature `2 i + 1`.

use candle_core::{Device, Result, Tensor};
use lora_spec::{PositionScaling, Rope, RopeScaling};

use crate::backend::Backend;
use crate::transfer::from_vec;
use crate::{Ids, embedding};

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

/// Cosines and sines of every position, `[positions, rotary_dim / 2]` each, f32, multiplied by the
/// attention factor and by the factor of the position, if the embedding has them.
#[derive(Debug, Clone)]
pub struct RopeTable {
    head_dim: usize,
    half: usize,
    is_interleaved: bool,
    /// That of [`Rope::context`].
    context: usize,
    positions: usize,
    cos: Tensor,
    sin: Tensor,
}

impl RopeTable {
    /// Computes the angles of `positions` positions, for tensors on `device`.
    pub fn new(rope: &Rope, positions: usize, device: &Device) -> Result<Self> {
        Self::with_context(rope, positions, rope.context(positions), device)
    }

    /// Like [`Self::new`], for sequences with this [`Rope::context`].
    pub fn with_context(rope: &Rope, positions: usize, context: usize, device: &Device) -> Result<Self> {
        let Rope { head_dim, rotary_dim, .. } = *rope;
        let half = rotary_dim / 2;
        if half == 0 || !rotary_dim.is_multiple_of(2) || rotary_dim > head_dim || positions == 0 {
            candle_core::bail!(
                "invalid rotary embedding of {positions} positions for {rotary_dim} of {head_dim} features \
                 of a head: there must be at least one position and an even number of features"
            );
        }
        let frequencies = frequencies(rope, context)?;
        let angle = |i: usize| f64::from((i / half) as f32 * frequencies[i % half]);
        let factor = match rope.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        };
        let of_position = |position: usize| match rope.position_scaling {
            None => 1.0,
            Some(PositionScaling { beta, original_max_position_embeddings }) => {
                1.0 + beta * (1.0 + (position as f64 / original_max_position_embeddings).floor()).ln()
            }
        };
        let table = |of: fn(f64) -> f64| {
            let value = |i: usize| (of_position(i / half) * factor * of(angle(i))) as f32;
            from_vec((0..positions * half).map(value).collect(), (positions, half), device)
        };
        let is_interleaved = rope.is_interleaved;
        Ok(Self {
            head_dim,
            half,
            is_interleaved,
            context,
            positions,
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
        })
    }

    /// Whether the table has `positions` positions for sequences with this [`Rope::context`].
    pub fn serves(&self, positions: usize, context: usize) -> bool {
        self.context == context && positions <= self.positions
    }

    /// Returns the table whose row `i` is the row `positions[i]` of this one.
    ///
    /// # Errors
    /// A position that the table does not have.
    pub fn at_positions(&self, positions: &Ids) -> Result<Self> {
        let (cos, sin) =
            (embedding::forward(&self.cos, positions)?, embedding::forward(&self.sin, positions)?);
        Ok(Self { cos, sin, positions: positions.host().len(), ..*self })
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
        let fits = seq > 0 && features > 0 && features % self.head_dim == 0 && tokens % seq == 0;
        if !fits || first.saturating_add(seq) > self.positions {
            candle_core::bail!(
                "invalid rotary embedding of {:?} from position {first}: the table has {} positions for \
                 heads of {} features",
                x.shape(),
                self.positions,
                self.head_dim
            );
        }
        match Backend::of_tensors(&[x, &self.cos, &self.sin])? {
            Backend::Cpu => cpu::rotate(self, x, seq, first, direction),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::rotate(&gpu, self, x, seq, first, direction),
        }
    }
}

/// Returns the radians per position of each feature pair, in f32 as Transformers computes them, for
/// sequences with this [`Rope::context`].
fn frequencies(rope: &Rope, context: usize) -> Result<Vec<f32>> {
    let (dim, pairs) = (rope.rotary_dim, rope.rotary_dim / 2);
    let theta = match rope.scaling {
        RopeScaling::Dynamic { factor, max_position_embeddings } if context > 0 => {
            let longer = factor * context as f64 / max_position_embeddings - (factor - 1.0);
            rope.theta * longer.powf(dim as f64 / (dim as f64 - 2.0))
        }
        _ => rope.theta,
    };
    let exponent = |i: usize| f64::from((2 * i) as f32 / dim as f32);
    let base = (0..pairs).map(|i| f64::from((1.0 / theta.powf(exponent(i))) as f32));
    let divisors = match &rope.scaling {
        RopeScaling::LongRope { short_factor, .. } if context == 0 => Some(short_factor),
        RopeScaling::LongRope { long_factor, .. } => Some(long_factor),
        _ => None,
    };
    if let Some(divisors) = divisors.filter(|divisors| divisors.len() != pairs) {
        candle_core::bail!("invalid rotary embedding: {} divisors of {pairs} frequencies", divisors.len());
    }
    let scaled = base.enumerate().map(|(i, frequency)| match rope.scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } => frequency,
        RopeScaling::LongRope { .. } => frequency / divisors.map_or(1.0, |divisors| divisors[i]),
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Proportional { factor, rotated_pairs } if i < rotated_pairs => frequency / factor,
        RopeScaling::Proportional { .. } => 0.0,
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
                dim as f64 * wavelength.ln() / (2.0 * rope.theta.ln())
            };
            let from = pair(beta_fast).floor().max(0.0);
            let to = pair(beta_slow).ceil().min(dim as f64 - 1.0);
            let to = if to == from { to + 0.001 } else { to };
            let divided = ((i as f64 - from) / (to - from)).clamp(0.0, 1.0);
            frequency / factor * divided + frequency * (1.0 - divided)
        }
    });
    Ok(scaled.map(|frequency| frequency as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proportional_frequencies_are_divided_and_end_after_the_rotated_pairs() {
        let plain = Rope::new(1e4, 8);
        let scaling = RopeScaling::Proportional { factor: 4.0, rotated_pairs: 2 };
        let scaled = frequencies(&Rope { scaling, ..plain.clone() }, 0).unwrap();
        let plain = frequencies(&plain, 0).unwrap();
        assert_eq!(scaled, [plain[0] / 4.0, plain[1] / 4.0, 0.0, 0.0]);
    }
}
