//! Attention on a GPU: in bf16 on tensor cores if the rows of a head are whole vectors of 16 bytes
//! and have at most [`MAX_MMA_HEAD_DIM`] features, and there is no soft cap; otherwise in f32
//! arithmetic.

use candle_core::{DType, Result, Tensor};
use lora_spec::MAX_MMA_HEAD_DIM;

use super::AttentionShape;
use crate::Ids;
use crate::cuda::{Arg, Gpu, suffix};

/// The largest number of features of a head.
const MAX_HEAD_DIM: usize = 512;

/// A kernel and the launch that it is compiled for.
struct Kernel {
    name: String,
    /// Queries or keys per block.
    rows: usize,
    /// Heads that have their own blocks.
    heads: usize,
    /// Blocks that share the work on the same rows.
    parts: usize,
    threads: u32,
    /// Bytes of shared memory.
    shared: u32,
}

/// The kernels for one shape.
struct Kernels {
    /// Whether the kernels take the soft cap, which is 0 if there is none.
    has_softcap: bool,
    forward: Kernel,
    /// If the kernel has a block for each query head instead of each key/value head, it writes f32
    /// partial gradients, which [`sum_groups`] adds.
    backward_keys: Kernel,
    backward_queries: Kernel,
}

/// Template arguments of a tensor-core kernel. They are part of the kernel's name, so a difference
/// between a kernel and its launch is an error: no such kernel exists.
#[derive(Clone, Copy)]
struct Tiles {
    /// The largest number of features of a head.
    features: usize,
    /// Warps per block.
    warps: usize,
    /// Rows per warp, in units of 16.
    times: usize,
    /// Rows of the tiles that a block loops over.
    step: usize,
}

impl Tiles {
    /// Rows per block.
    fn rows(self) -> usize {
        16 * self.times * self.warps
    }

    /// Bytes of `rows` rows in shared memory.
    fn bytes(self, rows: usize) -> usize {
        rows * self.features * size_of::<half::bf16>()
    }

    /// A kernel with `shared` bytes of shared memory.
    fn kernel(self, what: &str, heads: usize, parts: usize, shared: usize) -> Kernel {
        let Self { features, warps, times, step } = self;
        Kernel {
            name: format!("attention_{what}_mma_{features}_{warps}_{times}_{step}_bf16"),
            rows: self.rows(),
            heads,
            parts,
            threads: 32 * warps as u32,
            shared: shared as u32,
        }
    }
}

impl Kernels {
    /// The kernels for tensors of `dtype` that start at `addresses`.
    fn for_shape(shape: AttentionShape, dtype: DType, addresses: &[u64]) -> Result<Self> {
        if shape.head_dim > MAX_HEAD_DIM || shape.kv_seq > 1 << 30 {
            candle_core::bail!(
                "invalid {shape:?}: on a GPU heads have at most {MAX_HEAD_DIM} features, and sequences at \
                 most 2^30 keys"
            );
        }
        let vectors =
            shape.head_dim.is_multiple_of(8) && addresses.iter().all(|address| address.is_multiple_of(16));
        match dtype {
            DType::BF16 if vectors && shape.head_dim <= MAX_MMA_HEAD_DIM && shape.softcap.is_none() => {
                Ok(Self::mma(shape))
            }
            _ => Ok(Self::plain(shape, suffix(dtype)?)),
        }
    }

    /// The argument with the soft cap, if the kernels have it.
    fn softcap(&self, shape: AttentionShape) -> Option<Arg> {
        self.has_softcap.then(|| shape.softcap.unwrap_or(0.0).into())
    }

    /// The kernels of `attention_forward_mma.cu` and `attention_backward_mma.cu`.
    fn mma(shape: AttentionShape) -> Self {
        let AttentionShape { heads, head_dim, .. } = shape;
        let (features, forward, keys, queries) = match head_dim {
            ..=64 => (64, (4, 2, 64), (4, 2, 32), (4, 2, 32)),
            65..=96 => (96, (4, 2, 64), (8, 1, 32), (8, 1, 64)),
            97..=128 => (128, (4, 2, 32), (8, 1, 32), (8, 1, 64)),
            _ => (256, (4, 1, 32), (4, 1, 16), (4, 1, 16)),
        };
        let tiles = |(warps, times, step)| Tiles { features, warps, times, step };
        let (forward, keys, queries) = (tiles(forward), tiles(keys), tiles(queries));
        // `WIDE` in the kernels.
        let wide = features > 128;
        // The comment of each kernel lists its shared memory: tiles of the block's own rows, and
        // two of each tensor that the block loops over.
        let of_forward = forward.bytes(forward.rows() + 4 * forward.step);
        let of_keys = keys.bytes(2 * keys.rows() + 4 * keys.step) + 2 * keys.step * ROW;
        let (own, passing) = (queries.bytes(2 * queries.rows()), queries.bytes(4 * queries.step));
        let of_queries = if wide { own + passing } else { own.max(passing) };
        Self {
            has_softcap: false,
            forward: forward.kernel("forward", heads, 1, of_forward),
            backward_keys: keys.kernel("backward_keys", heads, if wide { 2 } else { 1 }, of_keys),
            backward_queries: queries.kernel("backward_queries", heads, 1, of_queries),
        }
    }

    /// The kernels of `attention.cu`.
    fn plain(shape: AttentionShape, dtype: &str) -> Self {
        let AttentionShape { heads, kv_heads, .. } = shape;
        // The largest number of features, and the rows of a tile.
        let (features, rows, backward_rows) = match shape.head_dim {
            ..=64 => (64, 64, 64),
            65..=128 => (128, 64, 32),
            129..=256 => (256, 32, 16),
            _ => (512, 16, 16),
        };
        // `has_two_tiles` in the kernels.
        let backward_inputs = if features > 256 { 2 } else { 4 };
        // Tiles of inputs, and one of scores; rows are padded by 4 elements.
        let kernel = |what: &str, heads: usize, rows: usize, inputs: usize| Kernel {
            name: format!("attention_{what}_{features}_{dtype}"),
            rows,
            heads,
            parts: 1,
            threads: 256,
            shared: ((inputs * rows * (features + 4) + rows * (rows + 4)) * size_of::<f32>()) as u32,
        };
        Self {
            has_softcap: true,
            forward: kernel("forward", heads, rows, 2),
            backward_keys: kernel("backward_keys", kv_heads, backward_rows, backward_inputs),
            backward_queries: kernel("backward_queries", heads, backward_rows, backward_inputs),
        }
    }
}

/// Bytes of the backward pass's inputs for each query of each head: four f32.
const ROW: usize = 16;

/// Threads per block of `attention_sum_groups_bf16`.
const SUM_THREADS: usize = 256;

/// Launches a block for each tile of positions of each head of each sequence.
fn launch(gpu: &Gpu, kernel: &Kernel, shape: AttentionShape, args: &[Arg]) -> Result<()> {
    let blocks = shape.seq.div_ceil(kernel.rows) * kernel.heads * shape.batch;
    gpu.launch(&kernel.name, (blocks, kernel.parts, 1), kernel.threads, kernel.shared, args)
}

fn first_arg(first: Option<&Ids>) -> Result<Arg> {
    first.map_or(Ok(0_u64.into()), Ids::arg)
}

/// Returns the output and the log-sum-exps.
pub(super) fn forward(
    gpu: &Gpu,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    shape: AttentionShape,
    first: Option<&Ids>,
) -> Result<(Tensor, Tensor)> {
    let dtype = q.dtype();
    let AttentionShape { batch, seq, kv_seq, heads, kv_heads, head_dim, .. } = shape;
    let inputs = [gpu.address(q, dtype)?, gpu.address(k, dtype)?, gpu.address(v, dtype)?];
    let kernels = Kernels::for_shape(shape, dtype, &inputs)?;
    let output = gpu.empty(q.shape(), dtype)?;
    let lse = gpu.empty((batch, heads, seq), DType::F32)?;
    let mut args = vec![
        inputs[0].into(),
        inputs[1].into(),
        inputs[2].into(),
        first_arg(first)?,
        gpu.arg(&output, dtype)?,
        gpu.arg(&lse, DType::F32)?,
        Arg::size(seq)?,
        Arg::size(kv_seq)?,
        Arg::size(heads)?,
        Arg::size(kv_heads)?,
        Arg::size(head_dim)?,
        shape.scale.into(),
    ];
    args.extend(kernels.softcap(shape));
    launch(gpu, &kernels.forward, shape, &args)?;
    Ok((output, lse))
}

/// Returns the gradients of `q`, `k` and `v`.
pub(super) fn backward(
    gpu: &Gpu,
    lse: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Tensor,
    d_output: &Tensor,
    shape: AttentionShape,
    first: Option<&Ids>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let dtype = q.dtype();
    let AttentionShape { batch, seq, heads, kv_heads, head_dim, .. } = shape;
    let address = |x: &Tensor| gpu.address(x, dtype);
    let inputs = [address(q)?, address(k)?, address(v)?, address(d_output)?];
    let kernels = Kernels::for_shape(shape, dtype, &inputs)?;
    let first = first_arg(first)?;
    let rows = gpu.empty((batch, heads, seq, ROW / size_of::<f32>()), DType::F32)?;
    let like = |x: &Tensor| gpu.empty(x.shape(), dtype);
    let (dq, dk, dv) = (like(q)?, like(k)?, like(v)?);

    let args = [
        address(output)?.into(),
        inputs[3].into(),
        gpu.arg(lse, DType::F32)?,
        first,
        gpu.arg(&rows, DType::F32)?,
        Arg::size(batch * seq)?,
        Arg::size(seq)?,
        Arg::size(heads)?,
        Arg::size(head_dim)?,
    ];
    // One warp for each head of each query.
    let blocks = (batch * seq * heads).div_ceil(8);
    gpu.launch(&format!("attention_rows_{}", suffix(dtype)?), (blocks, 1, 1), 256, 0, &args)?;

    let args = |outputs: &[Arg]| -> Result<Vec<Arg>> {
        let mut args: Vec<Arg> = inputs.map(Arg::from).into();
        args.extend([first, gpu.arg(&rows, DType::F32)?]);
        args.extend(outputs);
        for size in [seq, heads, kv_heads, head_dim] {
            args.push(Arg::size(size)?);
        }
        args.push(shape.scale.into());
        args.extend(kernels.softcap(shape));
        Ok(args)
    };
    if kernels.backward_keys.heads == kv_heads {
        let outputs = [gpu.arg(&dk, dtype)?, gpu.arg(&dv, dtype)?];
        launch(gpu, &kernels.backward_keys, shape, &args(&outputs)?)?;
    } else {
        // With f32 partial gradients, a gradient is rounded only once, as it is without groups.
        // bf16 would halve this memory, but for most models the MLP's backward pass needs more
        // memory than that of attention anyway.
        let partial = || gpu.empty(q.shape(), DType::F32);
        let (partial_dk, partial_dv) = (partial()?, partial()?);
        let partial = [gpu.arg(&partial_dk, DType::F32)?, gpu.arg(&partial_dv, DType::F32)?];
        launch(gpu, &kernels.backward_keys, shape, &args(&partial)?)?;
        sum_groups(gpu, partial, [gpu.arg(&dk, dtype)?, gpu.arg(&dv, dtype)?], shape)?;
    }
    launch(gpu, &kernels.backward_queries, shape, &args(&[gpu.arg(&dq, dtype)?])?)?;
    Ok((dq, dk, dv))
}

/// Sums the partial gradients of keys and of values over the query heads of each group, in the
/// order of the heads.
fn sum_groups(gpu: &Gpu, partial: [Arg; 2], sums: [Arg; 2], shape: AttentionShape) -> Result<()> {
    let AttentionShape { batch, seq, heads, kv_heads, head_dim, .. } = shape;
    let rows = batch * seq * kv_heads;
    let rows_per_block = SUM_THREADS / (head_dim / 4);
    let mut args = [partial, sums].concat();
    for size in [rows, heads / kv_heads, head_dim] {
        args.push(Arg::size(size)?);
    }
    let grid = (rows.div_ceil(rows_per_block), 2, 1);
    gpu.launch("attention_sum_groups_bf16", grid, SUM_THREADS as u32, 0, &args)
}
