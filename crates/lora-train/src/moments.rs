//! AdamW's moments, in the form and the place that `training.optim` asks for.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use lora_model::AdapterLayout;
use lora_ops::adamw::{self, AdamW};
use lora_ops::paged::{Home, Pinned};
use lora_ops::transfer::{to_device, zeros};
use lora_ops::{Result, adamw_8bit};
use lora_spec::{Optim, PAGED_WINDOW_ELEMENTS};

/// Names of the f32 moments, as torch has them.
const NAMES: [&str; 2] = ["exp_avg", "exp_avg_sq"];

pub(crate) struct Moments {
    optim: Optim,
    form: Form,
}

enum Form {
    /// f32, in the adapter's layout.
    F32 {
        moments: [Tensor; 2],
        _pinned: Vec<Pinned>,
    },
    EightBit(adamw_8bit::State),
}

impl Form {
    fn f32(moments: [Tensor; 2], home: Home) -> Result<Self> {
        let mut pinned = Vec::new();
        for moment in &moments {
            pinned.extend(home.pin(moment)?);
        }
        Ok(Self::F32 { moments, _pinned: pinned })
    }
}

impl Moments {
    /// Before the first step.
    pub(crate) fn zeros(optim: Optim, layout: &AdapterLayout, device: &Device) -> Result<Self> {
        let home = home(optim, device);
        let zeros = || zeros(layout.len, DType::F32, home.tensors());
        let form = match optim.is_8bit() {
            false => Form::f32([zeros()?, zeros()?], home)?,
            true => Form::EightBit(adamw_8bit::State::new(&ranges(layout), home)?),
        };
        Ok(Self { optim, form })
    }

    /// Moments of the same form, whose tensors `find` gives by their names.
    pub(crate) fn read(
        &self,
        layout: &AdapterLayout,
        device: &Device,
        mut find: impl FnMut(&str) -> Result<Tensor>,
    ) -> Result<Self> {
        let home = home(self.optim, device);
        let form = match self.form {
            Form::F32 { .. } => {
                let mut flat = |name| {
                    let tensor = find(name)?;
                    if tensor.dtype() != DType::F32 || tensor.dims() != [layout.len] {
                        candle_core::bail!("{name} is not f32 [{}]", layout.len);
                    }
                    to_device(&tensor, home.tensors())
                };
                Form::f32([flat(NAMES[0])?, flat(NAMES[1])?], home)?
            }
            Form::EightBit(_) => {
                Form::EightBit(adamw_8bit::State::from_tensors(&ranges(layout), home, find)?)
            }
        };
        Ok(Self { optim: self.optim, form })
    }

    /// All there is, by name: what a checkpoint holds and a hash covers.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match &self.form {
            Form::F32 { moments, .. } => NAMES.into_iter().zip(moments).collect(),
            Form::EightBit(state) => state.tensors().into(),
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
        match &self.form {
            Form::F32 { moments: [m, v], .. } => {
                let window = home(self.optim, params.device()).window();
                adamw.step_paged(t, adamw::State { params, m, v }, gradient, factor, window)
            }
            Form::EightBit(state) => adamw.step_8bit(t, params, state, gradient, factor),
        }
    }
}

fn home(optim: Optim, device: &Device) -> Home<'_> {
    Home { device, window: optim.is_paged().then_some(PAGED_WINDOW_ELEMENTS) }
}

/// Where each matrix lies in the flat parameters.
fn ranges(layout: &AdapterLayout) -> Vec<Range<usize>> {
    layout.tensors().map(|(_, _, range)| range).collect()
}
