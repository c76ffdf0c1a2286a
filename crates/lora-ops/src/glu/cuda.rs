//! Gated activations on a GPU.

use candle_core::{Result, Tensor};
use lora_spec::ActivationFunction;

use crate::cuda::{Arg, Gpu, runs, suffix};

const THREADS: u32 = 256;

pub(super) fn forward(
    gpu: &Gpu,
    gate: &Tensor,
    up: &Tensor,
    activation: ActivationFunction,
) -> Result<Tensor> {
    let dtype = gate.dtype();
    let y = gpu.empty(gate.shape(), dtype)?;
    launch(gpu, "forward", activation, &[&y, gate, up])?;
    Ok(y)
}

/// Returns the gradients of `gate` and `up`.
pub(super) fn backward(
    gpu: &Gpu,
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
    activation: ActivationFunction,
) -> Result<(Tensor, Tensor)> {
    let dtype = gate.dtype();
    let (dgate, dup) = (gpu.empty(gate.shape(), dtype)?, gpu.empty(gate.shape(), dtype)?);
    launch(gpu, "backward", activation, &[&dgate, &dup, gate, up, dy])?;
    Ok((dgate, dup))
}

pub(super) fn activation_forward(gpu: &Gpu, x: &Tensor, activation: ActivationFunction) -> Result<Tensor> {
    let y = gpu.empty(x.shape(), x.dtype())?;
    launch(gpu, "activation_forward", activation, &[&y, x])?;
    Ok(y)
}

pub(super) fn activation_backward(
    gpu: &Gpu,
    x: &Tensor,
    dy: &Tensor,
    activation: ActivationFunction,
) -> Result<Tensor> {
    let dx = gpu.empty(x.shape(), x.dtype())?;
    launch(gpu, "activation_backward", activation, &[&dx, x, dy])?;
    Ok(dx)
}

/// Launches a thread for each run of the tensors, which have equal lengths.
fn launch(gpu: &Gpu, direction: &str, activation: ActivationFunction, tensors: &[&Tensor]) -> Result<()> {
    let (dtype, elements) = (tensors[0].dtype(), tensors[0].elem_count());
    let activation = match activation {
        ActivationFunction::Silu => "silu",
        ActivationFunction::GeluTanh => "gelu_tanh",
    };
    let kernel = format!("glu_{direction}_{activation}_{}", suffix(dtype)?);
    let mut args = tensors.iter().map(|tensor| gpu.arg(tensor, dtype)).collect::<Result<Vec<Arg>>>()?;
    args.push((elements as u64).into());
    gpu.launch(&kernel, (runs(elements, dtype).div_ceil(THREADS as usize), 1, 1), THREADS, 0, &args)
}
