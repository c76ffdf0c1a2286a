use candle_core::{DType, Result, Tensor};
use lora_spec::{GPU_LOGITS_PER_CHUNK, chunk_rows};

use super::{Head, Targets};
use crate::cuda::{Arg, Gpu, suffix};
use crate::gemm::{no_trans, product, trans};

/// Threads per block: for the loss of a row, and for the copy of a row.
const THREADS: (u32, u32) = (512, 256);

/// Returns the losses of the rows, and the gradient of their sum.
pub(super) fn forward_backward(
    gpu: &Gpu,
    x: &Tensor,
    Head { weight, softcap }: Head,
    targets: &Targets,
    gradient: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    let (tokens, features) = x.dims2()?;
    let (vocab, dtype) = (weight.dims2()?.0, x.dtype());
    let rows = targets.rows.len();
    let chunk_rows = chunk_rows(rows, vocab, GPU_LOGITS_PER_CHUNK);
    let row_losses = gpu.empty(rows, DType::F64)?;
    // The chunk's rows of `x`, and later of its gradient.
    let some = gpu.empty((chunk_rows, features), dtype)?;
    let logits = gpu.empty((chunk_rows, vocab), DType::F32)?;
    let gradients = match (gradient, dtype) {
        (false, _) => None,
        (true, DType::F32) => Some(logits.clone()),
        (true, _) => Some(gpu.empty((chunk_rows, vocab), dtype)?),
    };
    let dx = if gradient { Some(gpu.empty((tokens, features), dtype)?) } else { None };
    if let Some(dx) = &dx {
        gpu.zero(dx)?;
    }
    for first in (0..rows).step_by(chunk_rows) {
        let n = chunk_rows.min(rows - first);
        let some = some.narrow(0, 0, n)?;
        let logits = logits.narrow(0, 0, n)?;
        let launch = |what: &str, threads: u32, args: &[Arg]| {
            gpu.launch(&format!("cross_entropy_{what}_{}", suffix(dtype)?), (n, 1, 1), threads, 0, args)
        };
        let copy = |what: &str, all: &Tensor| {
            let rows_bytes = n * features * dtype.size_in_bytes();
            let (all, some) = (gpu.arg(all, dtype)?.with_bytes(rows_bytes), gpu.arg(&some, dtype)?);
            let args = [all, some, targets.rows.arg()?, Arg::size(first)?, Arg::size(features)?];
            launch(what, THREADS.1, &args)
        };
        copy("gather", x)?;
        product(1.0, no_trans(&some), trans(weight), 0.0, &logits)?;
        let args = [
            gpu.arg(&logits, DType::F32)?,
            gradients.as_ref().map_or(Ok(0_u64.into()), |gradients| gpu.arg(gradients, dtype))?,
            targets.tokens.arg()?,
            targets.weights.arg()?,
            gpu.arg(&row_losses, DType::F64)?,
            Arg::size(first)?,
            Arg::size(vocab)?,
            softcap.unwrap_or(0.0).into(),
        ];
        launch("row", THREADS.0, &args)?;
        if let (Some(gradients), Some(dx)) = (&gradients, &dx) {
            product(1.0, no_trans(&gradients.narrow(0, 0, n)?), no_trans(weight), 0.0, &some)?;
            copy("scatter", dx)?;
        }
    }
    Ok((row_losses, dx))
}
