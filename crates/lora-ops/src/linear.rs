//! Frozen linear layers: forward `y = x W^T + b`; backward only the gradient of `x`.

use candle_core::{DType, Device, Result, Tensor};

use crate::backend::Backend;
use crate::quant::{FourBit, Int8, Scales};
use crate::transfer::to_device;

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod panels;

#[cfg(feature = "cuda")]
pub use cuda::dequantize;
pub(crate) use panels::Panels;

/// A frozen matrix `[out_features, in_features]`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// f32 or bf16.
    Dense(Tensor),
    /// NF4 or FP4.
    FourBit(FourBit),
    /// Signed bytes with a scale for each row.
    Int8(Int8),
}

impl From<Tensor> for Weight {
    fn from(weight: Tensor) -> Self {
        Self::Dense(weight)
    }
}

impl From<FourBit> for Weight {
    fn from(weight: FourBit) -> Self {
        Self::FourBit(weight)
    }
}

impl From<Int8> for Weight {
    fn from(weight: Int8) -> Self {
        Self::Int8(weight)
    }
}

impl Weight {
    /// `(out_features, in_features)`.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(weight) => weight.dims2(),
            Self::FourBit(weight) => Ok(weight.dims()),
            Self::Int8(weight) => Ok(weight.dims()),
        }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.elem_count() * weight.dtype().size_in_bytes(),
            Self::FourBit(weight) => weight.bytes(),
            Self::Int8(weight) => weight.codes().elem_count() + 4 * weight.scales().elem_count(),
        }
    }

    /// The same weight on `device`.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(match self {
            Self::Dense(weight) => to_device(weight, device)?.into(),
            Self::FourBit(weight) => weight.to_device(device)?.into(),
            Self::Int8(weight) => weight.to_device(device)?.into(),
        })
    }

    /// The whole matrix, f32, on the CPU.
    pub fn dense(&self) -> Result<Tensor> {
        match self.to_device(&Device::Cpu)? {
            Self::Dense(weight) => weight.to_dtype(DType::F32),
            Self::FourBit(weight) => weight.dequantize(),
            Self::Int8(weight) => weight.dequantize(),
        }
    }

    /// All tensors that define the weight: a dense weight itself, or codes and scales.
    pub fn tensors(&self) -> Vec<&Tensor> {
        match self {
            Self::Dense(weight) => vec![weight],
            Self::FourBit(weight) => match weight.scales() {
                Scales::Plain(absmax) => vec![weight.codes(), absmax],
                Scales::Nested { codes, absmax, .. } => vec![weight.codes(), codes, absmax],
            },
            Self::Int8(weight) => vec![weight.codes(), weight.scales()],
        }
    }

    /// A tensor on the weight's device.
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Dense(weight) => weight,
            Self::FourBit(weight) => weight.codes(),
            Self::Int8(weight) => weight.codes(),
        }
    }
}

/// A frozen weight `[out_features, in_features]` with an optional f32 bias `[out_features]`.
#[derive(Debug, Clone)]
pub struct FrozenLinear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl FrozenLinear {
    /// Takes `weight` `[out_features, in_features]` and `bias` `[out_features]` (f32).
    pub fn new(weight: impl Into<Weight>, bias: Option<Tensor>) -> Result<Self> {
        let weight = weight.into();
        let (out_features, _) = weight.dims()?;
        if let Weight::Dense(weight) = &weight
            && !matches!(weight.dtype(), DType::F32 | DType::BF16)
        {
            candle_core::bail!("a dense frozen weight must be f32 or bf16, not {:?}", weight.dtype());
        }
        if let Some(bias) = &bias
            && (bias.dims1()? != out_features || bias.dtype() != DType::F32)
        {
            candle_core::bail!("a bias of {out_features} f32 elements is needed, not {:?}", bias.shape());
        }
        Ok(Self { weight, bias })
    }

    /// The weight `[out_features, in_features]`.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The bias `[out_features]`, f32.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Bytes of weight and bias.
    pub fn bytes(&self) -> usize {
        self.weight.bytes() + self.bias.as_ref().map_or(0, |bias| 4 * bias.elem_count())
    }

    /// Returns `x W^T + b` `[tokens, out_features]` for `x` `[tokens, in_features]`, in the type of
    /// `x`.
    #[tracing::instrument(level = "trace", name = "linear forward", skip_all)]
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.check_input(x)?;
        match Backend::of_tensors(&[x, self.weight.tensor()])? {
            Backend::Cpu => cpu::forward(self, x),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::forward(&gpu, self, x, x.dtype()),
        }
    }

    /// Does the same as [`Self::forward`], with an f32 result for every type of `x`.
    pub fn forward_f32(&self, x: &Tensor) -> Result<Tensor> {
        self.check_input(x)?;
        match Backend::of_tensors(&[x, self.weight.tensor()])? {
            Backend::Cpu => cpu::forward(self, x),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::forward(&gpu, self, x, DType::F32),
        }
    }

    /// Returns `dx = dy W` `[tokens, in_features]` for `dy` `[tokens, out_features]`.
    pub fn backward(&self, dy: &Tensor) -> Result<Tensor> {
        let shape = (dy.dims2()?.0, self.weight.dims()?.1);
        let dx = match Backend::of_tensors(&[dy, self.weight.tensor()])? {
            Backend::Cpu => Tensor::zeros(shape, DType::F32, dy.device())?,
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => gpu.empty(shape, dy.dtype())?,
        };
        self.product(dy, &dx, 0.0)?;
        Ok(dx)
    }

    /// Computes `dx += dy W`.
    pub fn backward_add(&self, dy: &Tensor, dx: &Tensor) -> Result<()> {
        self.product(dy, dx, 1.0)
    }

    #[tracing::instrument(level = "trace", name = "linear backward", skip_all)]
    fn product(&self, dy: &Tensor, dx: &Tensor, beta: f32) -> Result<()> {
        let (tokens, out_features) = dy.dims2()?;
        let (expected, in_features) = self.weight.dims()?;
        if out_features != expected || dx.dims2()? != (tokens, in_features) {
            candle_core::bail!(
                "invalid gradients of a linear layer [{expected}, {in_features}]: dy is {:?}, dx is {:?}",
                dy.shape(),
                dx.shape()
            );
        }
        match Backend::of_tensors(&[dy, dx, self.weight.tensor()])? {
            Backend::Cpu => cpu::backward(self, dy, dx, beta),
            #[cfg(feature = "cuda")]
            Backend::Cuda(gpu) => cuda::backward(&gpu, self, dy, dx, beta),
        }
    }

    fn check_input(&self, x: &Tensor) -> Result<()> {
        let (in_features, expected) = (x.dims2()?.1, self.weight.dims()?.1);
        if in_features != expected {
            candle_core::bail!(
                "invalid input of a linear layer: {in_features} features; it must have {expected} features"
            );
        }
        Ok(())
    }
}
