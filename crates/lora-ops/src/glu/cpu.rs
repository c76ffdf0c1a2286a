//! Gated activations on the CPU. Both activations are `g sigmoid(a(g))` for an inner function `a`.

use candle_core::{Device, Result, Tensor};
use lora_spec::ActivationFunction;
use rayon::prelude::*;

use crate::cpu::{TASK_ELEMENTS, read_f32};
use crate::simd::{sigmoid, vectorize};

pub(super) fn forward(gate: &Tensor, up: &Tensor, activation: ActivationFunction) -> Result<Tensor> {
    match activation {
        ActivationFunction::Silu => forward_with(gate, up, silu),
        ActivationFunction::GeluTanh => forward_with(gate, up, gelu_tanh),
    }
}

/// Returns the gradients of `gate` and `up`.
pub(super) fn backward(
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
    activation: ActivationFunction,
) -> Result<(Tensor, Tensor)> {
    match activation {
        ActivationFunction::Silu => backward_with(gate, up, dy, silu),
        ActivationFunction::GeluTanh => backward_with(gate, up, dy, gelu_tanh),
    }
}

pub(super) fn activation_forward(x: &Tensor, activation: ActivationFunction) -> Result<Tensor> {
    match activation {
        ActivationFunction::Silu => map(x, x, |g, _| g * sigmoid(silu(g).0)),
        ActivationFunction::GeluTanh => map(x, x, |g, _| g * sigmoid(gelu_tanh(g).0)),
    }
}

pub(super) fn activation_backward(x: &Tensor, dy: &Tensor, activation: ActivationFunction) -> Result<Tensor> {
    match activation {
        ActivationFunction::Silu => map(x, dy, |g, dy| dy * slope(silu(g))),
        ActivationFunction::GeluTanh => map(x, dy, |g, dy| dy * slope(gelu_tanh(g))),
    }
}

/// Returns the slope of an activation from `a(g)` and `g a'(g)`.
#[inline(always)]
fn slope((value, slope): (f32, f32)) -> f32 {
    let s = sigmoid(value);
    s * (1.0 + slope * (1.0 - s))
}

/// Returns `f` of the elements of `x` and `other`.
fn map(x: &Tensor, other: &Tensor, f: impl Fn(f32, f32) -> f32 + Sync) -> Result<Tensor> {
    let shape = x.shape();
    let (x, other) = (&*read_f32(x)?, &*read_f32(other)?);
    let mut y = vec![0.0; shape.elem_count()];
    let inputs = x.par_chunks(TASK_ELEMENTS).zip(other.par_chunks(TASK_ELEMENTS));
    y.par_chunks_mut(TASK_ELEMENTS).zip(inputs).for_each(|(y, (x, other))| {
        vectorize(|| y.iter_mut().zip(x).zip(other).for_each(|((y, x), other)| *y = f(*x, *other)));
    });
    Tensor::from_vec(y, shape, &Device::Cpu)
}

/// Returns `a(g)` and `g a'(g)`.
#[inline(always)]
fn silu(g: f32) -> (f32, f32) {
    (g, g)
}

/// Returns `a(g)` and `g a'(g)`. `(1 + tanh(u)) / 2` is `sigmoid(2 u)`.
#[inline(always)]
fn gelu_tanh(g: f32) -> (f32, f32) {
    const TWICE_ROOT: f32 = 1.595_769; // 2 sqrt(2 / pi)
    const CUBIC: f32 = 0.044_715;
    // Beyond these gates the sigmoid is 0 or 1, and their powers would overflow.
    let g = if g < -100.0 { -100.0 } else { g };
    let g = if g > 100.0 { 100.0 } else { g };
    let (scaled, bent) = (TWICE_ROOT * g, CUBIC * g * g);
    (scaled * (1.0 + bent), scaled * (1.0 + 3.0 * bent))
}

fn forward_with(gate: &Tensor, up: &Tensor, inner: impl Fn(f32) -> (f32, f32) + Sync) -> Result<Tensor> {
    let shape = gate.shape();
    let (gate, up) = (&*read_f32(gate)?, &*read_f32(up)?);
    let mut y = vec![0.0; shape.elem_count()];
    let chunks =
        y.par_chunks_mut(TASK_ELEMENTS).zip(gate.par_chunks(TASK_ELEMENTS)).zip(up.par_chunks(TASK_ELEMENTS));
    chunks.for_each(|((y, gate), up)| {
        vectorize(|| {
            for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                *y = g * sigmoid(inner(*g).0) * u;
            }
        });
    });
    Tensor::from_vec(y, shape, &Device::Cpu)
}

fn backward_with(
    gate: &Tensor,
    up: &Tensor,
    dy: &Tensor,
    inner: impl Fn(f32) -> (f32, f32) + Sync,
) -> Result<(Tensor, Tensor)> {
    let shape = gate.shape();
    let (gate, up, dy) = (&*read_f32(gate)?, &*read_f32(up)?, &*read_f32(dy)?);
    let (mut dgate, mut dup) = (vec![0.0; shape.elem_count()], vec![0.0; shape.elem_count()]);
    let outputs = dup.par_chunks_mut(TASK_ELEMENTS).zip(dgate.par_chunks_mut(TASK_ELEMENTS));
    let inputs =
        gate.par_chunks(TASK_ELEMENTS).zip(up.par_chunks(TASK_ELEMENTS)).zip(dy.par_chunks(TASK_ELEMENTS));
    outputs.zip(inputs).for_each(|((dup, dgate), ((gate, up), dy))| {
        vectorize(|| {
            let inputs = gate.iter().zip(up).zip(dy);
            for ((du, dg), ((g, u), dy)) in dup.iter_mut().zip(dgate).zip(inputs) {
                let (value, slope) = inner(*g);
                let s = sigmoid(value);
                *du = dy * (g * s);
                *dg = dy * u * (s * (1.0 + slope * (1.0 - s)));
            }
        });
    });
    let dgate = Tensor::from_vec(dgate, shape, &Device::Cpu)?;
    Ok((dgate, Tensor::from_vec(dup, shape, &Device::Cpu)?))
}
