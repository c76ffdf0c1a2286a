//! AdamW with its settings and moments.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use lora_spec::{Optim, PAGED_WINDOW_ELEMENTS};

use crate::adamw::{AdamWSettings, F32Moments};
use crate::adamw_8bit::AdamW8bitState;
use crate::paged::MomentPlacement;

/// AdamW over a flat vector of parameters, with the format and the placement of the moments that
/// `training.optim` selects.
#[derive(Debug)]
pub struct Optimizer {
    optim: Optim,
    settings: AdamWSettings,
    /// The range of each tensor in the parameters.
    ranges: Vec<Range<usize>>,
    /// The parameters' device.
    device: Device,
    moments: Moments,
    /// AdamW's `t`: number of steps so far.
    updates: u64,
}

#[derive(Debug)]
enum Moments {
    F32(F32Moments),
    EightBit(AdamW8bitState),
}

impl Optimizer {
    /// Creates the optimizer before the first step, for parameters on `device` whose tensors are at
    /// `ranges`.
    ///
    /// # Errors
    /// A range does not begin where the previous one ends (8-bit moments); the device is out of
    /// memory.
    pub fn new(
        optim: Optim,
        settings: AdamWSettings,
        ranges: Vec<Range<usize>>,
        device: &Device,
    ) -> Result<Self> {
        let placement = placement(optim, device);
        let moments = match optim {
            Optim::Adamw | Optim::PagedAdamw32bit => {
                Moments::F32(F32Moments::zeros(len(&ranges), placement)?)
            }
            Optim::Adamw8bit | Optim::PagedAdamw8bit => {
                Moments::EightBit(AdamW8bitState::new(&ranges, placement)?)
            }
        };
        Ok(Self { optim, settings, ranges, device: device.clone(), moments, updates: 0 })
    }

    /// Returns the same optimizer after `updates` steps. `find` returns each tensor of the moments
    /// by its name.
    ///
    /// # Errors
    /// A tensor is missing, or has another type or shape.
    pub fn restored(&self, updates: u64, find: impl FnMut(&str) -> Result<Tensor>) -> Result<Self> {
        let placement = placement(self.optim, &self.device);
        let moments = match self.moments {
            Moments::F32(_) => Moments::F32(F32Moments::from_tensors(len(&self.ranges), placement, find)?),
            Moments::EightBit(_) => {
                Moments::EightBit(AdamW8bitState::from_tensors(&self.ranges, placement, find)?)
            }
        };
        let Self { optim, settings, .. } = *self;
        Ok(Self {
            optim,
            settings,
            ranges: self.ranges.clone(),
            device: self.device.clone(),
            moments,
            updates,
        })
    }

    /// Returns all tensors of the moments with their names, for checkpoints and hashes.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        match &self.moments {
            Moments::F32(moments) => moments.tensors().into(),
            Moments::EightBit(moments) => moments.tensors().into(),
        }
    }

    /// Returns the number of steps so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Updates `params` in place with `gradient * factor` and the learning rate `lr`. `factor` is
    /// the clipping factor. Both vectors are f32 and as long as the ranges together.
    pub fn step(&mut self, lr: f64, params: &Tensor, gradient: &Tensor, factor: f32) -> Result<()> {
        let coefficients = self.settings.coefficients(lr, self.updates + 1, factor);
        match &self.moments {
            Moments::F32(moments) => moments.step(&coefficients, params, gradient)?,
            Moments::EightBit(moments) => moments.step(&coefficients, params, gradient)?,
        }
        self.updates += 1;
        Ok(())
    }
}

fn len(ranges: &[Range<usize>]) -> usize {
    ranges.last().map_or(0, |last| last.end)
}

fn placement(optim: Optim, device: &Device) -> MomentPlacement<'_> {
    MomentPlacement { device, window: optim.is_paged().then_some(PAGED_WINDOW_ELEMENTS) }
}
