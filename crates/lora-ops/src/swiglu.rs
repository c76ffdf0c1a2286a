//! The gated activation of the MLP (GLU variants, arXiv 2002.05202): `silu(gate) * up`.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::cpu::{GRAIN, filled, read_f32};
use crate::simd::{sigmoid, vectorize};

/// `gate` and `up` `[tokens, features]` to `silu(gate) * up`.
#[tracing::instrument(level = "trace", name = "swiglu forward", skip_all)]
pub fn forward(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let shape = same_shape(&[gate, up])?;
    read_f32(gate, |gate| -> Result<Tensor> {
        read_f32(up, |up| {
            filled(shape, |y| {
                let chunks = y.par_chunks_mut(GRAIN).zip(gate.par_chunks(GRAIN)).zip(up.par_chunks(GRAIN));
                chunks.for_each(|((y, gate), up)| {
                    vectorize(|| {
                        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                            *y = g * sigmoid(*g) * u;
                        }
                    });
                });
            })
        })?
    })?
}

/// `dy` `[tokens, features]` to the gradients of `gate` and `up`.
#[tracing::instrument(level = "trace", name = "swiglu backward", skip_all)]
pub fn backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let shape = same_shape(&[gate, up, dy])?;
    let mut dgate = vec![0.0; gate.elem_count()];
    let dup = read_f32(gate, |gate| -> Result<Tensor> {
        read_f32(up, |up| -> Result<Tensor> {
            read_f32(dy, |dy| {
                filled(shape, |dup| {
                    let outputs = dup.par_chunks_mut(GRAIN).zip(dgate.par_chunks_mut(GRAIN));
                    let inputs = gate.par_chunks(GRAIN).zip(up.par_chunks(GRAIN)).zip(dy.par_chunks(GRAIN));
                    outputs.zip(inputs).for_each(|((dup, dgate), ((gate, up), dy))| {
                        vectorize(|| {
                            let inputs = gate.iter().zip(up).zip(dy);
                            for ((du, dg), ((g, u), dy)) in dup.iter_mut().zip(dgate).zip(inputs) {
                                let s = sigmoid(*g);
                                *du = dy * (g * s);
                                *dg = dy * u * (s * (1.0 + g * (1.0 - s)));
                            }
                        });
                    });
                })
            })?
        })?
    })?;
    Ok((Tensor::from_vec(dgate, shape, gate.device())?, dup?))
}

fn same_shape(tensors: &[&Tensor]) -> Result<(usize, usize)> {
    let shape = tensors[0].dims2()?;
    for tensor in tensors {
        if tensor.dims2()? != shape {
            candle_core::bail!("gated activation of {:?} and {:?}", tensors[0].shape(), tensor.shape());
        }
    }
    Ok(shape)
}
