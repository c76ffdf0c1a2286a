//! Quantized weights with random codes and scales, for measurements. No dense matrix is created.

use candle_core::{DType, Device, Result, Shape, Tensor};
use lora_spec::Philox;

use super::{BLOCK_SIZE, Codebook, FourBit, Int8, NESTED_BLOCK_SIZE, Scales, dynamic_map};
use crate::random::{RandomStream, Uniform, bytes, draw};
use crate::transfer::from_vec;

impl FourBit {
    /// Creates a weight with codes that are uniform over the codebook. The elements have the root
    /// mean square `deviation`; their mean is that of the codebook's values, which is not 0 for
    /// NF4. Scales are uniform within a half of their mean. With `nested` the scales' codes are
    /// uniform, and the second-level scales are uniform between a quarter and a half of the mean
    /// scale. Every part is a pure function of `philox`, with the same bits on every device.
    ///
    /// # Errors
    /// This build cannot compute on the device, or the device does not have enough memory.
    pub fn random(
        shape: (usize, usize),
        codebook: Codebook,
        nested: bool,
        deviation: f64,
        philox: &Philox,
        device: &Device,
    ) -> Result<Self> {
        let elements = shape.0 * shape.1;
        let blocks = elements.div_ceil(BLOCK_SIZE);
        // The root mean square that the scales must have.
        let scale = deviation / mean(codebook.values(), |v| v * v).sqrt();
        let floats = |len, distribution| scales(len, distribution, philox, device);
        let scales = if nested {
            let map = dynamic_map();
            let absmax = Spread { center: 0.375, bound: 0.125 };
            // Mean square of 1 + map[code] * absmax.
            let square =
                1.0 + 2.0 * mean(map, |m| m) * absmax.center + mean(map, |m| m * m) * absmax.mean_square();
            let offset = scale / square.sqrt();
            Scales::Nested {
                codes: bytes(blocks, philox, RandomStream::ScaleCodes, device)?,
                map: from_vec(map.to_vec(), map.len(), device)?,
                absmax: floats(blocks.div_ceil(NESTED_BLOCK_SIZE), absmax.times(offset))?,
                offset: offset as f32,
                block: NESTED_BLOCK_SIZE,
            }
        } else {
            let absmax = Spread { center: 1.0, bound: 0.5 };
            Scales::Plain(floats(blocks, absmax.times(scale / absmax.mean_square().sqrt()))?)
        };
        Ok(Self {
            shape,
            values: from_vec(codebook.values().to_vec(), 16, device)?,
            block: BLOCK_SIZE,
            codes: bytes(elements.div_ceil(2), philox, RandomStream::Codes, device)?,
            scales,
        })
    }
}

impl Int8 {
    /// Creates a weight with codes that are uniform over the signed bytes, and scales that are
    /// uniform within a half of their mean. The elements have the root mean square `deviation`. As
    /// with [`FourBit::random`], the bits are the same on every device.
    ///
    /// # Errors
    /// This build cannot compute on the device, or the device does not have enough memory.
    pub fn random(shape: (usize, usize), deviation: f64, philox: &Philox, device: &Device) -> Result<Self> {
        let (rows, cols) = shape;
        let codes = (i8::MIN..=i8::MAX).map(|code| f64::from(code) / 127.0);
        let code_square = codes.map(|code| code * code).sum::<f64>() / 256.0;
        let absmax = Spread { center: 1.0, bound: 0.5 };
        let scale = deviation / (code_square * absmax.mean_square()).sqrt();
        Ok(Self {
            codes: bytes(rows * cols, philox, RandomStream::Codes, device)?.reshape(shape)?,
            scales: scales(rows, absmax.times(scale), philox, device)?,
        })
    }
}

/// A uniform distribution over `center - bound` to `center + bound`, in units that [`Self::times`]
/// sets.
#[derive(Clone, Copy)]
struct Spread {
    center: f64,
    bound: f64,
}

impl Spread {
    fn mean_square(self) -> f64 {
        self.center * self.center + self.bound * self.bound / 3.0
    }

    fn times(self, unit: f64) -> Uniform {
        Uniform { center: (self.center * unit) as f32, bound: (self.bound * unit) as f32 }
    }
}

fn scales(len: usize, distribution: Uniform, philox: &Philox, device: &Device) -> Result<Tensor> {
    draw(Shape::from(len), distribution, DType::F32, philox, RandomStream::Scales, device)
}

fn mean<const N: usize>(values: [f32; N], f: impl Fn(f64) -> f64) -> f64 {
    values.iter().map(|value| f(f64::from(*value))).sum::<f64>() / N as f64
}
