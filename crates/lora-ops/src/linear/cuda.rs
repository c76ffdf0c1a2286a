//! Products with a frozen weight on a GPU.

use candle_core::{DType, Result, Tensor};

use super::FrozenLinear;
use crate::cuda::{Arg, Gpu, suffix};
use crate::gemm::{of, product, t};

/// The bias is laid out first, and the product added to it.
pub(super) fn forward(gpu: &Gpu, layer: &FrozenLinear, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let (tokens, out_features) = (x.dims2()?.0, layer.weight.dims2()?.0);
    let y = gpu.empty((tokens, out_features), dtype)?;
    let Some(bias) = &layer.bias else {
        product(1.0, of(x), t(&layer.weight), 0.0, &y)?;
        return Ok(y);
    };
    let args =
        [gpu.arg(bias, DType::F32)?, gpu.arg(&y, dtype)?, Arg::size(tokens)?, Arg::size(out_features)?];
    let blocks = (out_features.div_ceil(256), tokens.div_ceil(16), 1);
    gpu.launch(&format!("linear_bias_{}", suffix(dtype)?), blocks, 256, 0, &args)?;
    product(1.0, of(x), t(&layer.weight), 1.0, &y)?;
    Ok(y)
}
