use candle_core::{DType, Result, Tensor};

use super::{Numbers, State};
use crate::cuda::{Arg, Gpu};

pub(super) fn step(gpu: &Gpu, numbers: &Numbers, state: State, gradient: &Tensor) -> Result<()> {
    let &Numbers { factor, rest1, beta2, rest2, correction2, eps, decay, step_size, .. } = numbers;
    let n = gradient.elem_count();
    let mut args = Vec::new();
    for vector in [state.params, state.m, state.v] {
        args.push(gpu.arg(vector, DType::F32)?.updated());
    }
    args.push(gpu.arg(gradient, DType::F32)?);
    args.push((n as u64).into());
    args.extend([factor, rest1, beta2, rest2, correction2, eps, decay, step_size].map(Arg::from));
    gpu.launch_flat("adamw_step_f32", n, &args)
}
