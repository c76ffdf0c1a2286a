//! AdamW's moments, with the format and the placement that `training.optim` selects.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use lora_model::AdapterLayout;
use lora_ops::adamw::{self, AdamW};
use lora_ops::paged::{MomentPlacement, PinnedTensor};
use lora_ops::transfer::{to_device, zeros};
use lora_ops::{Result, adamw_8bit};
use lora_spec::{Optim, PAGED_WINDOW_ELEMENTS};

/// Names of the f32 moments, as in torch.
const NAMES: [&str; 2] = ["exp_avg", "exp_avg_sq"];

/// AdamW's moments of an adapter's parameters.
pub(crate) struct Moments {
    optim: Optim,
    format: MomentFormat,
}

enum MomentFormat {
    /// f32, in the adapter's layout.
    F32 {
        moments: [Tensor; 2],
        _pinned: Vec<PinnedTensor>,
    },
    EightBit(adamw_8bit::AdamW8bitState),
}

impl MomentFormat {
    fn f32(moments: [Tensor; 2], placement: MomentPlacement) -> Result<Self> {
        let mut pinned = Vec::new();
        for moment in &moments {
            pinned.extend(placement.pin(moment)?);
        }
        Ok(Self::F32 { moments, _pinned: pinned })
    }
}

impl Moments {
    /// Creates the moments before the first step.
    pub(crate) fn zeros(optim: Optim, layout: &AdapterLayout, device: &Device) -> Result<Self> {
        let placement = placement(optim, device);
        let zeros = || zeros(layout.len, DType::F32, placement.moment_device());
        let format = match optim.is_8bit() {
            false => MomentFormat::f32([zeros()?, zeros()?], placement)?,
            true => MomentFormat::EightBit(adamw_8bit::AdamW8bitState::new(&ranges(layout), placement)?),
        };
        Ok(Self { optim, format })
    }

    /// Reads moments of the same format. `find` returns each tensor by its name.
    ///
    /// # Errors
    /// A tensor is missing, or has another type or shape.
    pub(crate) fn read(
        &self,
        layout: &AdapterLayout,
        device: &Device,
        mut find: impl FnMut(&str) -> Result<Tensor>,
    ) -> Result<Self> {
        let placement = placement(self.optim, device);
        let format =
            match self.format {
                MomentFormat::F32 { .. } => {
                    let mut flat = |name| {
                        let tensor = find(name)?;
                        if tensor.dtype() != DType::F32 || tensor.dims() != [layout.len] {
                            candle_core::bail!("{name} is not f32 [{}]", layout.len);
                        }
                        to_device(&tensor, placement.moment_device())
                    };
                    MomentFormat::f32([flat(NAMES[0])?, flat(NAMES[1])?], placement)?
                }
                MomentFormat::EightBit(_) => MomentFormat::EightBit(
                    adamw_8bit::AdamW8bitState::from_tensors(&ranges(layout), placement, find)?,
                ),
            };
        Ok(Self { optim: self.optim, format })
    }

    /// Returns all tensors with their names, for checkpoints and hashes.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match &self.format {
            MomentFormat::F32 { moments, .. } => NAMES.into_iter().zip(moments).collect(),
            MomentFormat::EightBit(state) => state.tensors().into(),
        }
    }

    /// Updates `params` and the moments with step number `t`; see [`AdamW::step`].
    pub(crate) fn step(
        &self,
        adamw: AdamW,
        t: u64,
        params: &Tensor,
        gradient: &Tensor,
        factor: f32,
    ) -> Result<()> {
        match &self.format {
            MomentFormat::F32 { moments: [m, v], .. } => {
                let window = placement(self.optim, params.device()).window();
                adamw.step_in_windows(t, adamw::AdamWTensors { params, m, v }, gradient, factor, window)
            }
            MomentFormat::EightBit(state) => adamw.step_8bit(t, params, state, gradient, factor),
        }
    }
}

fn placement(optim: Optim, device: &Device) -> MomentPlacement<'_> {
    MomentPlacement { device, window: optim.is_paged().then_some(PAGED_WINDOW_ELEMENTS) }
}

/// Returns the range of each matrix in the flat parameters.
fn ranges(layout: &AdapterLayout) -> Vec<Range<usize>> {
    layout.tensors().map(|(_, _, range)| range).collect()
}
