use candle_core::{DType, Result, Tensor};

use super::{AdamWTensors, Coefficients};
use crate::cuda::{Arg, Gpu};

pub(super) fn step(
    gpu: &Gpu,
    coefficients: &Coefficients,
    state: AdamWTensors,
    gradient: &Tensor,
) -> Result<()> {
    let c = *coefficients;
    let n = gradient.elem_count();
    let mut args = Vec::new();
    for vector in [state.params, state.m, state.v] {
        args.push(gpu.arg(vector, DType::F32)?.updated());
    }
    args.push(gpu.arg(gradient, DType::F32)?);
    args.push((n as u64).into());
    args.extend(
        [
            c.factor,
            c.one_minus_beta1,
            c.beta2,
            c.one_minus_beta2,
            c.sqrt_bias_correction2,
            c.eps,
            c.decay,
            c.step_size,
        ]
        .map(Arg::from),
    );
    gpu.launch_flat("adamw_step_f32", n, &args)
}
