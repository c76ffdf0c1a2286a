use candle_core::{DType, Device, Result, Tensor};

use super::codes::{SIGNED, UNSIGNED};
use super::{BLOCK, State, is_8bit};
use crate::adamw::Numbers;
use crate::cuda::{Arg, Gpu};

/// What the kernel looks up.
#[derive(Debug)]
pub(super) struct Tables {
    /// First parameter, first code and number of elements of each block: U32 `[blocks, 3]`.
    blocks: Tensor,
    count: usize,
    /// Values and bounds of both maps: f32 `[4, 256]`.
    maps: Tensor,
}

impl Tables {
    pub(super) fn new(ranges: &[std::ops::Range<usize>], device: &Device) -> Result<Self> {
        let mut blocks = Vec::new();
        let mut code = 0;
        for range in ranges.iter().filter(|range| is_8bit(range)) {
            for first in range.clone().step_by(BLOCK) {
                let len = BLOCK.min(range.end - first);
                for n in [first, code, len] {
                    let Ok(n) = u32::try_from(n) else {
                        candle_core::bail!("8-bit AdamW: {n} parameters are too many")
                    };
                    blocks.push(n);
                }
                code += len;
            }
        }
        let count = blocks.len() / 3;
        // An allocation of nothing is an error of CUDA's.
        blocks.push(0);
        let maps = [SIGNED.values(), SIGNED.bounds(), UNSIGNED.values(), UNSIGNED.bounds()].concat();
        Ok(Self {
            count,
            blocks: Tensor::from_slice(&blocks, blocks.len(), device)?,
            maps: Tensor::from_slice(&maps, maps.len(), device)?,
        })
    }
}

/// Steps the tensors whose moments are in 8 bits.
pub(super) fn step(
    gpu: &Gpu,
    numbers: &Numbers,
    params: &Tensor,
    state: &State,
    gradient: &Tensor,
) -> Result<()> {
    let State { m, v, tables, .. } = state;
    let Some(Tables { blocks, count, maps }) = tables else {
        candle_core::bail!("8-bit AdamW: parameters on a GPU with moments that are not")
    };
    let &Numbers { factor, beta1, rest1, beta2, rest2, correction2, eps, decay, step_size } = numbers;
    let mut args = vec![gpu.arg(params, DType::F32)?, gpu.arg(gradient, DType::F32)?];
    for moments in [m, v] {
        args.extend([gpu.arg(&moments.codes, DType::U8)?, gpu.arg(&moments.absmax, DType::F32)?]);
    }
    args.extend([gpu.arg(blocks, DType::U32)?, gpu.arg(maps, DType::F32)?]);
    args.extend([factor, beta1, rest1, beta2, rest2, correction2, eps, decay, step_size].map(Arg::from));
    gpu.launch("adamw_8bit_step_f32", (*count, 1, 1), BLOCK as u32, 0, &args)
}
