//! Products with a frozen weight on a GPU. A quantized weight is dequantized in panels of
//! [`gpu_panel_rows`] rows.

use candle_core::{DType, Result, Tensor};
use lora_spec::gpu_panel_rows;

use super::{FrozenLinear, Weight};
use crate::backend::Backend;
use crate::cuda::{Arg, Gpu, Product, suffix};
use crate::gemm::{no_trans, product, trans};
use crate::quant::cuda::{four_bit, int8};

/// Returns `x W^T + b`. The bias is written first, and the product is added to it.
pub(super) fn forward(gpu: &Gpu, layer: &FrozenLinear, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let ((tokens, in_features), out_features) = (x.dims2()?, layer.weight.dims()?.0);
    let y = gpu.empty((tokens, out_features), dtype)?;
    if let Some(bias) = &layer.bias {
        let args =
            [gpu.arg(bias, DType::F32)?, gpu.arg(&y, dtype)?, Arg::size(tokens)?, Arg::size(out_features)?];
        let blocks = (out_features.div_ceil(256), tokens.div_ceil(16), 1);
        gpu.launch(&format!("linear_bias_{}", suffix(dtype)?), blocks, 256, 0, &args)?;
    }
    let beta = if layer.bias.is_some() { 1.0 } else { 0.0 };
    if let Weight::Dense(weight) = &layer.weight {
        product(1.0, no_trans(x), trans(weight), beta, &y)?;
        return Ok(y);
    }
    let operands = x.dtype();
    let (x, c) = (gpu.address(x, operands)?, gpu.address(&y, dtype)?);
    panels(gpu, &layer.weight, operands, |first, rows, panel| {
        gpu.product(&Product {
            mnk: (tokens, rows, in_features),
            alpha: 1.0,
            beta,
            a: (x, false),
            a_stride: in_features,
            b: (gpu.address(panel, operands)?, true),
            c: c + (first * dtype.size_in_bytes()) as u64,
            c_stride: out_features,
            operands,
            output: dtype,
        })
    })?;
    Ok(y)
}

/// Computes `dx = dy W + beta dx`.
pub(super) fn backward(gpu: &Gpu, layer: &FrozenLinear, dy: &Tensor, dx: &Tensor, beta: f32) -> Result<()> {
    if let Weight::Dense(weight) = &layer.weight {
        return product(1.0, no_trans(dy), no_trans(weight), beta, dx);
    }
    let ((tokens, out_features), in_features) = (dy.dims2()?, dx.dims2()?.1);
    let (operands, output) = (dy.dtype(), dx.dtype());
    let (a, c) = (gpu.address(dy, operands)?, gpu.address(dx, output)?);
    panels(gpu, &layer.weight, operands, |first, rows, panel| {
        gpu.product(&Product {
            mnk: (tokens, in_features, rows),
            alpha: 1.0,
            beta: if first == 0 { beta } else { 1.0 },
            a: (a + (first * operands.size_in_bytes()) as u64, false),
            a_stride: out_features,
            b: (gpu.address(panel, operands)?, false),
            c,
            c_stride: in_features,
            operands,
            output,
        })
    })
}

/// Calls `f(first row, number of rows, their elements)` for each panel of a quantized weight, in
/// order.
fn panels(
    gpu: &Gpu,
    weight: &Weight,
    dtype: DType,
    f: impl Fn(usize, usize, &Tensor) -> Result<()>,
) -> Result<()> {
    let (rows, cols) = weight.dims()?;
    let height = gpu_panel_rows(rows, cols, dtype.size_in_bytes());
    let scratch = gpu.empty((height, cols), dtype)?;
    for first in (0..rows).step_by(height) {
        let count = height.min(rows - first);
        let panel = scratch.narrow(0, 0, count)?;
        dequantize_rows(gpu, weight, first, &panel)?;
        f(first, count, &panel)?;
    }
    Ok(())
}

/// Dequantizes the rows of a 4-bit or 8-bit weight from `first` on into `out` `[rows, cols]`, which
/// is f32 or bf16 and on the weight's GPU. The values are those of [`Weight::dense`], rounded to
/// the type of `out`.
///
/// # Errors
/// `weight` is dense, or `out` is on another device, of another type, not contiguous or does not
/// fit the weight.
pub fn dequantize(weight: &Weight, first: usize, out: &Tensor) -> Result<()> {
    let ((rows, cols), (all_rows, all_cols)) = (out.dims2()?, weight.dims()?);
    if cols != all_cols || first > all_rows || rows > all_rows - first {
        candle_core::bail!(
            "invalid dequantization of [{all_rows}, {all_cols}] from row {first} on into {:?}: the rows \
             do not fit",
            out.shape()
        );
    }
    match Backend::of_tensors(&[weight.tensor(), out])? {
        Backend::Cpu => candle_core::bail!("a weight on the CPU must be dequantized with `Weight::dense`"),
        Backend::Cuda(gpu) => dequantize_rows(&gpu, weight, first, out),
    }
}

fn dequantize_rows(gpu: &Gpu, weight: &Weight, first: usize, out: &Tensor) -> Result<()> {
    match weight {
        Weight::Dense(_) => candle_core::bail!("a dense weight cannot be dequantized"),
        Weight::FourBit(weight) => four_bit(gpu, weight, first * weight.dims().1, out),
        Weight::Int8(weight) => int8(gpu, weight, first, out),
    }
}
