//! AdamW's moments, in the form that `training.optim` asks for.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use lora_model::AdapterLayout;
use lora_ops::adamw::{self, AdamW};
use lora_ops::{Result, adamw_8bit};
use lora_spec::Optim;

/// Names of the f32 moments, as torch has them.
const NAMES: [&str; 2] = ["exp_avg", "exp_avg_sq"];

pub(crate) enum Moments {
    /// f32, in the adapter's layout.
    F32([Tensor; 2]),
    EightBit(adamw_8bit::State),
}

impl Moments {
    /// Before the first step.
    pub(crate) fn zeros(optim: Optim, layout: &AdapterLayout, device: &Device) -> Result<Self> {
        let zeros = || Tensor::zeros(layout.len, DType::F32, device);
        Ok(match optim {
            Optim::Adamw => Self::F32([zeros()?, zeros()?]),
            Optim::Adamw8bit => Self::EightBit(adamw_8bit::State::new(&ranges(layout), device)?),
        })
    }

    /// Moments of the same form, whose tensors `find` gives by their names.
    pub(crate) fn read(
        &self,
        layout: &AdapterLayout,
        device: &Device,
        mut find: impl FnMut(&str) -> Result<Tensor>,
    ) -> Result<Self> {
        Ok(match self {
            Self::F32(_) => {
                let mut flat = |name| {
                    let tensor = find(name)?;
                    if tensor.dtype() != DType::F32 || tensor.dims() != [layout.len] {
                        candle_core::bail!("{name} is not f32 [{}]", layout.len);
                    }
                    tensor.to_device(device)
                };
                Self::F32([flat(NAMES[0])?, flat(NAMES[1])?])
            }
            Self::EightBit(_) => {
                Self::EightBit(adamw_8bit::State::from_tensors(&ranges(layout), device, find)?)
            }
        })
    }

    /// All there is, by name: what a checkpoint holds and a hash covers.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match self {
            Self::F32(moments) => NAMES.into_iter().zip(moments).collect(),
            Self::EightBit(state) => state.tensors().into(),
        }
    }

    /// Step number `t` of `params`; see [`AdamW::step`].
    pub(crate) fn step(
        &self,
        adamw: AdamW,
        t: u64,
        params: &Tensor,
        gradient: &Tensor,
        factor: f32,
    ) -> Result<()> {
        match self {
            Self::F32([m, v]) => adamw.step(t, adamw::State { params, m, v }, gradient, factor),
            Self::EightBit(state) => adamw.step_8bit(t, params, state, gradient, factor),
        }
    }
}

/// Where each matrix lies in the flat parameters.
fn ranges(layout: &AdapterLayout) -> Vec<Range<usize>> {
    layout.tensors().map(|(_, _, range)| range).collect()
}
