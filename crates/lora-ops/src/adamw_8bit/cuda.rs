use candle_core::{DType, Result, Tensor};

use super::codes::{SIGNED, UNSIGNED};
use super::parts::{Part, parts};
use super::{BLOCK, State};
use crate::adamw::Numbers;
use crate::cuda::{Arg, Gpu};
use crate::paged::{Home, Room};

/// What the kernel looks up.
#[derive(Debug)]
pub(super) struct Tables {
    /// Where each block lies: see [`parts`]. With the moments.
    blocks: Tensor,
    parts: Vec<Part>,
    /// Values and bounds of both maps: f32 `[4, 256]`.
    maps: Tensor,
}

impl Tables {
    pub(super) fn new(ranges: &[std::ops::Range<usize>], home: Home) -> Result<Self> {
        let (mut blocks, parts) = parts(ranges, home.window())?;
        // An allocation of nothing is an error of CUDA's.
        blocks.push(0);
        let maps = [SIGNED.values(), SIGNED.bounds(), UNSIGNED.values(), UNSIGNED.bounds()].concat();
        Ok(Self {
            blocks: Tensor::from_slice(&blocks, blocks.len(), home.tensors())?,
            parts,
            maps: Tensor::from_slice(&maps, maps.len(), home.device)?,
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
    let Some(Tables { blocks: table, parts, maps }) = tables else {
        candle_core::bail!("8-bit AdamW: parameters on a GPU with moments that are not")
    };
    let &Numbers { factor, beta1, rest1, beta2, rest2, correction2, eps, decay, step_size } = numbers;
    let settings = [factor, beta1, rest1, beta2, rest2, correction2, eps, decay, step_size].map(Arg::from);
    let params_and_gradient = [gpu.arg(params, DType::F32)?, gpu.arg(gradient, DType::F32)?];
    let maps = gpu.arg(maps, DType::F32)?;
    let most = parts.iter().map(|part| part.blocks.len()).max().unwrap_or(0);
    let room = |vector: &Tensor, of_block: usize| Room::new(vector, of_block * most, params.device());
    // Room for all before anything changes.
    let table_room = room(table, 3)?;
    let rooms = [room(&m.codes, BLOCK)?, room(&m.absmax, 1)?, room(&v.codes, BLOCK)?, room(&v.absmax, 1)?];
    for Part { blocks, codes } in parts {
        let of_codes = |vector: &Tensor| vector.narrow(0, codes.start, codes.len());
        let of_blocks = |vector: &Tensor| vector.narrow(0, blocks.start, blocks.len());
        let home = [of_codes(&m.codes)?, of_blocks(&m.absmax)?, of_codes(&v.codes)?, of_blocks(&v.absmax)?];
        let mut args = params_and_gradient.to_vec();
        let mut copies = Vec::new();
        for (room, part) in rooms.iter().zip(&home) {
            let copy = room.load(part)?;
            args.push(gpu.arg(&copy, part.dtype())?);
            copies.push(copy);
        }
        let table = table_room.load(&table.narrow(0, 3 * blocks.start, 3 * blocks.len())?)?;
        args.extend([gpu.arg(&table, DType::U32)?, maps]);
        args.extend(settings);
        gpu.launch("adamw_8bit_step_f32", (blocks.len(), 1, 1), BLOCK as u32, 0, &args)?;
        for ((room, copy), part) in rooms.iter().zip(&copies).zip(&home) {
            room.store(copy, part)?;
        }
    }
    Ok(())
}
