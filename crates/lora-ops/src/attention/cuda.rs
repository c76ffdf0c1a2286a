//! Attention on a GPU: bf16 by tensor cores, where the rows of a head are whole vectors of 16 bytes; everything else in f32.

use candle_core::{DType, Result, Tensor};

use super::Shape;
use crate::Ids;
use crate::cuda::{Arg, Gpu, suffix};

/// A kernel, and what a block of it has.
struct Kernel {
    name: String,
    /// Queries or keys.
    rows: usize,
    /// Blocks that share the work on them.
    parts: usize,
    threads: u32,
    /// Bytes of shared memory.
    shared: u32,
}

/// The kernels for one shape.
struct Kernels {
    forward: Kernel,
    backward_keys: Kernel,
    backward_queries: Kernel,
}

impl Kernels {
    /// For tensors of `dtype` that start at `addresses`.
    fn of(shape: Shape, dtype: DType, addresses: &[u64]) -> Result<Self> {
        if shape.head_dim > 256 || shape.kv_seq > 1 << 30 {
            candle_core::bail!(
                "attention {shape:?}; on a GPU heads have up to 256 features, sequences up to 2^30 keys"
            );
        }
        let vectors =
            shape.head_dim.is_multiple_of(8) && addresses.iter().all(|address| address.is_multiple_of(16));
        match dtype {
            DType::BF16 if vectors => Ok(Self::mma(shape.head_dim)),
            _ => Ok(Self::plain(shape.head_dim, suffix(dtype)?)),
        }
    }

    /// Those of `attention_forward_mma.cu` and `attention_backward_mma.cu`.
    fn mma(head_dim: usize) -> Self {
        // Template arguments: the features that fit; of each kernel the warps of a block, how many times 16 rows a warp has, and
        // the rows of the tiles that they go through.
        let (features, forward, keys, queries) = match head_dim {
            ..=64 => (64, (4, 2, 64), (4, 2, 32), (4, 2, 32)),
            65..=96 => (96, (4, 2, 64), (8, 1, 32), (8, 1, 64)),
            97..=128 => (128, (4, 2, 32), (8, 1, 32), (8, 1, 64)),
            _ => (256, (4, 1, 32), (4, 1, 16), (4, 1, 16)),
        };
        // So wide that the registers hold neither both gradients of keys and values nor queries beside their gradients.
        let wide = features == 256;
        let kernel = |what: &str, (warps, times, _), parts, shared_rows| Kernel {
            name: format!("attention_{what}_mma_{features}_bf16"),
            rows: 16 * warps * times,
            parts,
            threads: 32 * warps as u32,
            shared: (shared_rows * features * size_of::<half::bf16>()) as u32,
        };
        let rows = |(warps, times, _): (usize, usize, usize)| 16 * warps * times;
        let (of_queries, of_keys) = (2 * rows(queries), 4 * queries.2);
        let shared_rows = if wide { of_queries + of_keys } else { of_queries.max(of_keys) };
        let mut backward_keys =
            kernel("backward_keys", keys, if wide { 2 } else { 1 }, 2 * rows(keys) + 4 * keys.2);
        backward_keys.shared += (2 * keys.2 * ROW) as u32;
        Self {
            forward: kernel("forward", forward, 1, rows(forward) + 4 * forward.2),
            backward_keys,
            backward_queries: kernel("backward_queries", queries, 1, shared_rows),
        }
    }

    /// Those of `attention.cu`.
    fn plain(head_dim: usize, dtype: &str) -> Self {
        // Features that fit, and rows of a tile.
        let (features, rows, backward_rows) = match head_dim {
            ..=64 => (64, 64, 64),
            65..=128 => (128, 64, 32),
            _ => (256, 32, 16),
        };
        // Tiles of inputs, and one of scores; rows are padded by 4 elements.
        let kernel = |what: &str, rows: usize, inputs: usize| Kernel {
            name: format!("attention_{what}_{features}_{dtype}"),
            rows,
            parts: 1,
            threads: 256,
            shared: ((inputs * rows * (features + 4) + rows * (rows + 4)) * size_of::<f32>()) as u32,
        };
        Self {
            forward: kernel("forward", rows, 2),
            backward_keys: kernel("backward_keys", backward_rows, 4),
            backward_queries: kernel("backward_queries", backward_rows, 4),
        }
    }
}

/// Bytes that the backward pass wants of a query of a head: four f32.
const ROW: usize = 16;

/// Blocks for each tile of `seq` positions of each of `heads` heads of each sequence.
fn launch(gpu: &Gpu, kernel: &Kernel, shape: Shape, heads: usize, args: &[Arg]) -> Result<()> {
    let blocks = shape.seq.div_ceil(kernel.rows) * heads * shape.batch;
    gpu.launch(&kernel.name, (blocks, kernel.parts, 1), kernel.threads, kernel.shared, args)
}

fn first_arg(first: Option<&Ids>) -> Result<Arg> {
    first.map_or(Ok(0_u64.into()), Ids::arg)
}

/// The output and the log-sum-exps.
pub(super) fn forward(
    gpu: &Gpu,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    shape: Shape,
    first: Option<&Ids>,
) -> Result<(Tensor, Tensor)> {
    let dtype = q.dtype();
    let Shape { batch, seq, kv_seq, heads, kv_heads, head_dim } = shape;
    let inputs = [gpu.address(q, dtype)?, gpu.address(k, dtype)?, gpu.address(v, dtype)?];
    let kernels = Kernels::of(shape, dtype, &inputs)?;
    let output = gpu.empty(q.shape(), dtype)?;
    let lse = gpu.empty((batch, heads, seq), DType::F32)?;
    let args = [
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
        shape.scale().into(),
    ];
    launch(gpu, &kernels.forward, shape, heads, &args)?;
    Ok((output, lse))
}

/// The gradients of `q`, `k` and `v`.
pub(super) fn backward(
    gpu: &Gpu,
    lse: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    output: &Tensor,
    d_output: &Tensor,
    shape: Shape,
    first: Option<&Ids>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let dtype = q.dtype();
    let Shape { batch, seq, heads, kv_heads, head_dim, .. } = shape;
    let address = |x: &Tensor| gpu.address(x, dtype);
    let inputs = [address(q)?, address(k)?, address(v)?, address(d_output)?];
    let kernels = Kernels::of(shape, dtype, &inputs)?;
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
    // A warp for each head of each query.
    let blocks = (batch * seq * heads).div_ceil(8);
    gpu.launch(&format!("attention_rows_{}", suffix(dtype)?), (blocks, 1, 1), 256, 0, &args)?;

    let args = |outputs: &[&Tensor]| -> Result<Vec<Arg>> {
        let mut args: Vec<Arg> = inputs.map(Arg::from).into();
        args.extend([first, gpu.arg(&rows, DType::F32)?]);
        for output in outputs {
            args.push(gpu.arg(output, dtype)?);
        }
        for size in [seq, heads, kv_heads, head_dim] {
            args.push(Arg::size(size)?);
        }
        args.push(shape.scale().into());
        Ok(args)
    };
    launch(gpu, &kernels.backward_keys, shape, kv_heads, &args(&[&dk, &dv])?)?;
    launch(gpu, &kernels.backward_queries, shape, heads, &args(&[&dq])?)?;
    Ok((dq, dk, dv))
}
