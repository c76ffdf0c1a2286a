use candle_core::{DType, Device, Result, Tensor, WithDType};

use super::quant_map::{SIGNED_MAP, UNSIGNED_MAP};
use super::windows::{BlockWindow, block_windows};
use super::{AdamW8bitState, BLOCK};
use crate::adamw::Coefficients;
use crate::cuda::{Arg, Gpu};
use crate::paged::{MomentPlacement, PagedVector, PinnedTensor, StagingBuffers, half_window};
use crate::transfer::from_vec;

/// Lookup tables of the kernel.
#[derive(Debug)]
pub(super) struct Tables {
    /// The table of [`block_windows`], on the same device as the moments.
    blocks: Tensor,
    _pinned: Option<PinnedTensor>,
    block_windows: Vec<BlockWindow>,
    /// Values and bounds of both maps: f32 `[4, 256]`.
    maps: Tensor,
}

impl Tables {
    pub(super) fn new(ranges: &[std::ops::Range<usize>], placement: MomentPlacement) -> Result<Self> {
        let (mut blocks, block_windows) = block_windows(ranges, half_window(placement.window()))?;
        // CUDA rejects an allocation of zero bytes.
        blocks.push(0);
        let maps =
            [SIGNED_MAP.values(), SIGNED_MAP.bounds(), UNSIGNED_MAP.values(), UNSIGNED_MAP.bounds()].concat();
        let blocks = vector(blocks, placement.moment_device())?;
        let maps = vector(maps, placement.device)?;
        Ok(Self { _pinned: placement.pin(&blocks)?, blocks, block_windows, maps })
    }
}

fn vector<T: WithDType>(values: Vec<T>, device: &Device) -> Result<Tensor> {
    let len = values.len();
    from_vec(values, len, device)
}

/// Updates the tensors whose moments are in 8 bits.
pub(super) fn step(
    gpu: &Gpu,
    coefficients: &Coefficients,
    params: &Tensor,
    state: &AdamW8bitState,
    gradient: &Tensor,
) -> Result<()> {
    let AdamW8bitState { m, v, tables, .. } = state;
    let Some(Tables { blocks: table, block_windows, maps, .. }) = tables else {
        candle_core::bail!("8-bit AdamW: the parameters are on a GPU, but the moments were made for the CPU")
    };
    let c = *coefficients;
    let settings = [
        c.factor,
        c.beta1,
        c.one_minus_beta1,
        c.beta2,
        c.one_minus_beta2,
        c.sqrt_bias_correction2,
        c.eps,
        c.decay,
        c.step_size,
    ]
    .map(Arg::from);
    let params_and_gradient = [gpu.arg(params, DType::F32)?, gpu.arg(gradient, DType::F32)?];
    let maps = gpu.arg(maps, DType::F32)?;
    let of_codes = block_windows.iter().map(|part| part.codes.len()).max().unwrap_or(0);
    let of_blocks = block_windows.iter().map(|part| part.blocks.len()).max().unwrap_or(0);
    let longest = [
        (&m.codes, of_codes),
        (&m.absmax, of_blocks),
        (&v.codes, of_codes),
        (&v.absmax, of_blocks),
        (table, 3 * of_blocks),
    ];
    let buffers = StagingBuffers::new(&longest, params.device())?;
    let vectors = [
        PagedVector { tensor: &m.codes, is_changed: true },
        PagedVector { tensor: &m.absmax, is_changed: true },
        PagedVector { tensor: &v.codes, is_changed: true },
        PagedVector { tensor: &v.absmax, is_changed: true },
        PagedVector { tensor: table, is_changed: false },
    ];
    let ranges = |number: usize| {
        let BlockWindow { blocks, codes } = &block_windows[number];
        let table = 3 * blocks.start..3 * blocks.end;
        vec![codes.clone(), blocks.clone(), codes.clone(), blocks.clone(), table]
    };
    buffers.for_each(&vectors, block_windows.len(), ranges, |number, on_device| {
        let mut args = params_and_gradient.to_vec();
        for tensor in on_device {
            args.push(gpu.arg(tensor, tensor.dtype())?);
        }
        args.push(maps);
        args.extend(settings);
        gpu.launch("adamw_8bit_step_f32", (block_windows[number].blocks.len(), 1, 1), BLOCK as u32, 0, &args)
    })
}
