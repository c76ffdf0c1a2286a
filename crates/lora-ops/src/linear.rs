//! Frozen linear layers: `y = x W^T + b`, and nothing but the gradient of `x` backward.

use candle_core::{DType, Result, Tensor};

use crate::place::Place;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

pub(crate) use cpu::Panels;

/// A frozen weight `[out_features, in_features]`, f32 or bf16, with an optional f32 bias `[out_features]`.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl FrozenLinear {
    /// Takes `weight` `[out_features, in_features]` (f32 or bf16) and `bias` `[out_features]` (f32).
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        let (out_features, _) = weight.dims2()?;
        if !matches!(weight.dtype(), DType::F32 | DType::BF16) {
            candle_core::bail!("a frozen weight is f32 or bf16, not {:?}", weight.dtype());
        }
        if let Some(bias) = &bias
            && (bias.dims1()? != out_features || bias.dtype() != DType::F32)
        {
            candle_core::bail!("a bias of {out_features} f32 elements is needed, not {:?}", bias.shape());
        }
        Ok(Self { weight, bias })
    }

    /// The weight `[out_features, in_features]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `x` `[tokens, in_features]` to `x W^T + b` `[tokens, out_features]`, of `x`'s type.
    #[tracing::instrument(level = "trace", name = "linear forward", skip_all)]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check_input(x)?;
        match Place::of(&[x, &self.weight])? {
            Place::Cpu => cpu::forward(self, x),
            #[cfg(feature = "cuda")]
            Place::Cuda(gpu) => cuda::forward(&gpu, self, x, x.dtype()),
        }
    }

    /// As [`Self::forward`], with an f32 result whatever `x` is.
    pub fn forward_f32(&self, x: &Tensor) -> Result<Tensor> {
        self.check_input(x)?;
        match Place::of(&[x, &self.weight])? {
            Place::Cpu => cpu::forward(self, x),
            #[cfg(feature = "cuda")]
            Place::Cuda(gpu) => cuda::forward(&gpu, self, x, DType::F32),
        }
    }

    /// `dy` `[tokens, out_features]` to `dx = dy W` `[tokens, in_features]`.
    pub fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        let shape = (dy.dims2()?.0, self.weight.dims2()?.1);
        let dx = match Place::of(&[dy, &self.weight])? {
            Place::Cpu => crate::cpu::filled(shape, |_| ())?,
            #[cfg(feature = "cuda")]
            Place::Cuda(gpu) => gpu.empty(shape, dy.dtype())?,
        };
        self.product(dy, &dx, 0.0)?;
        Ok(dx)
    }

    /// `dx += dy W`.
    pub fn backward_add(&self, dy: &Tensor, dx: &Tensor) -> Result<()> {
        self.product(dy, dx, 1.0)
    }

    #[tracing::instrument(level = "trace", name = "linear backward", skip_all)]
    fn product(&self, dy: &Tensor, dx: &Tensor, beta: f32) -> Result<()> {
        let (tokens, out_features) = dy.dims2()?;
        let (expected, in_features) = self.weight.dims2()?;
        if out_features != expected || dx.dims2()? != (tokens, in_features) {
            candle_core::bail!(
                "layer {:?}: gradient {:?} to {:?}",
                self.weight.shape(),
                dy.shape(),
                dx.shape()
            );
        }
        match Place::of(&[dy, dx, &self.weight])? {
            Place::Cpu => cpu::backward(self, dy, dx, beta),
            #[cfg(feature = "cuda")]
            Place::Cuda(_) => {
                crate::gemm::product(1.0, crate::gemm::of(dy), crate::gemm::of(&self.weight), beta, dx)
            }
        }
    }

    fn check_input(&self, x: &Tensor) -> Result<()> {
        let (in_features, expected) = (x.dims2()?.1, self.weight.dims2()?.1);
        if in_features != expected {
            candle_core::bail!("a linear layer of {expected} features got {in_features}");
        }
        Ok(())
    }
}
