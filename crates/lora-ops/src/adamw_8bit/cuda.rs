use candle_core::{DType, Device, Result, Tensor, WithDType};

use super::codes::{SIGNED, UNSIGNED};
use super::parts::{Part, parts};
use super::{BLOCK, State};
use crate::adamw::Numbers;
use crate::cuda::{Arg, Gpu};
use crate::paged::{Buffers, Home, Pinned, Vector, half};
use crate::transfer::from_vec;

/// What the kernel looks up.
#[derive(Debug)]
pub(super) struct Tables {
    /// Where each block lies: see [`parts`]. With the moments.
    blocks: Tensor,
    _pinned: Option<Pinned>,
    parts: Vec<Part>,
    /// Values and bounds of both maps: f32 `[4, 256]`.
    maps: Tensor,
}

impl Tables {
    pub(super) fn new(ranges: &[std::ops::Range<usize>], home: Home) -> Result<Self> {
        let (mut blocks, parts) = parts(ranges, half(home.window()))?;
        // An allocation of nothing is an error of CUDA's.
        blocks.push(0);
        let maps = [SIGNED.values(), SIGNED.bounds(), UNSIGNED.values(), UNSIGNED.bounds()].concat();
        let blocks = vector(blocks, home.tensors())?;
        let maps = vector(maps, home.device)?;
        Ok(Self { _pinned: home.pin(&blocks)?, blocks, parts, maps })
    }
}

fn vector<T: WithDType>(values: Vec<T>, device: &Device) -> Result<Tensor> {
    let len = values.len();
    from_vec(values, len, device)
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
    let Some(Tables { blocks: table, parts, maps, .. }) = tables else {
        candle_core::bail!("8-bit AdamW: parameters on a GPU with moments that are not")
    };
    let &Numbers { factor, beta1, rest1, beta2, rest2, correction2, eps, decay, step_size } = numbers;
    let settings = [factor, beta1, rest1, beta2, rest2, correction2, eps, decay, step_size].map(Arg::from);
    let params_and_gradient = [gpu.arg(params, DType::F32)?, gpu.arg(gradient, DType::F32)?];
    let maps = gpu.arg(maps, DType::F32)?;
    let of_codes = parts.iter().map(|part| part.codes.len()).max().unwrap_or(0);
    let of_blocks = parts.iter().map(|part| part.blocks.len()).max().unwrap_or(0);
    let longest = [
        (&m.codes, of_codes),
        (&m.absmax, of_blocks),
        (&v.codes, of_codes),
        (&v.absmax, of_blocks),
        (table, 3 * of_blocks),
    ];
    let buffers = Buffers::new(&longest, params.device())?;
    let vectors = [
        Vector { tensor: &m.codes, is_changed: true },
        Vector { tensor: &m.absmax, is_changed: true },
        Vector { tensor: &v.codes, is_changed: true },
        Vector { tensor: &v.absmax, is_changed: true },
        Vector { tensor: table, is_changed: false },
    ];
    let ranges = |number: usize| {
        let Part { blocks, codes } = &parts[number];
        let table = 3 * blocks.start..3 * blocks.end;
        vec![codes.clone(), blocks.clone(), codes.clone(), blocks.clone(), table]
    };
    buffers.for_each(&vectors, parts.len(), ranges, |number, there| {
        let mut args = params_and_gradient.to_vec();
        for tensor in there {
            args.push(gpu.arg(tensor, tensor.dtype())?);
        }
        args.push(maps);
        args.extend(settings);
        gpu.launch("adamw_8bit_step_f32", (parts[number].blocks.len(), 1, 1), BLOCK as u32, 0, &args)
    })
}
