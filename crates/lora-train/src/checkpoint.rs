//! The checkpoint of a run.
//!
//! A safetensors file: `params` and, where there is such, `taken_off` (what the base is trained without) and `best` (the parameters
//! at the best evaluation, where they are wanted at the end): flat f32 in the adapter's layout; and AdamW's moments, `exp_avg` and `exp_avg_sq` or what those are in 8 bits. Everything else is JSON in its metadata under
//! `progress`.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::early_stopping::BestEvaluation;
use crate::engine::Engine;
use crate::{StepRecord, TrainError};

/// Where a run stands, beside its tensors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// What the job's bits depend on; a checkpoint of another job is refused.
    pub(crate) identity: String,
    /// Completed steps.
    pub(crate) step: u64,
    /// AdamW's `t`: steps that changed the parameters.
    pub(crate) updates: u64,
    /// Steps in a row whose gradients were not finite.
    pub(crate) not_finite_in_a_row: u64,
    /// The last completed step still needs its evaluation.
    pub(crate) evaluation_due: bool,
    /// Whether training has ended.
    pub(crate) finished: bool,
    pub(crate) best: BestEvaluation,
    /// One record a completed step.
    pub(crate) history: Vec<StepRecord>,
}

const PROGRESS: &str = "progress";

/// The checkpoint file of `engine` at `progress`; `best`: parameters at the best evaluation, where they are wanted.
pub(crate) fn write(
    engine: &Engine,
    progress: &Progress,
    best: Option<&[f32]>,
) -> Result<Vec<u8>, TrainError> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors = vec![("params", Dtype::F32, bytes(&engine.adapter().params().to_vec1()?))];
    for (name, tensor) in engine.moments.tensors() {
        tensors.push(match tensor.dtype() {
            DType::U8 => (name, Dtype::U8, tensor.to_vec1()?),
            _ => (name, Dtype::F32, bytes(&tensor.to_vec1()?)),
        });
    }
    if let Some(start) = engine.adapter().taken_off() {
        tensors.push(("taken_off", Dtype::F32, bytes(&start.to_vec1()?)));
    }
    tensors.extend(best.map(|best| ("best", Dtype::F32, bytes(best))));
    let mut views = Vec::new();
    for (name, dtype, data) in &tensors {
        let len = if *dtype == Dtype::F32 { data.len() / 4 } else { data.len() };
        let view = TensorView::new(*dtype, vec![len], data);
        views.push((*name, view.map_err(candle_core::Error::from)?));
    }
    let progress = Progress { updates: engine.updates, ..progress.clone() };
    let progress = serde_json::to_string(&progress).map_err(|e| TrainError::Checkpoint(e.to_string()))?;
    let metadata = HashMap::from([(PROGRESS.to_owned(), progress)]);
    Ok(safetensors::serialize(views, Some(metadata)).map_err(candle_core::Error::from)?)
}

/// Sets `engine` to the checkpoint `bytes` of the job `identity`; on error nothing is changed. Returns the progress and
/// the best parameters.
pub(crate) fn read(
    engine: &mut Engine,
    bytes: &[u8],
    identity: &str,
) -> Result<(Progress, Option<Vec<f32>>), TrainError> {
    let fail = |message: &str| TrainError::Checkpoint(message.to_owned());
    let unreadable = |e: &dyn std::fmt::Display| TrainError::Checkpoint(format!("is not readable: {e}"));
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| unreadable(&e))?;
    let progress = metadata.metadata().as_ref().and_then(|m| m.get(PROGRESS));
    let progress = progress.ok_or_else(|| fail("holds no progress"))?;
    let progress: Progress = serde_json::from_str(progress).map_err(|e| unreadable(&e))?;
    if progress.identity != identity {
        return Err(fail(
            "belongs to another job: base, data, adapter or training settings differ from this one's",
        ));
    }
    if progress.history.len() as u64 != progress.step {
        let (records, steps) = (progress.history.len(), progress.step);
        return Err(TrainError::Checkpoint(format!("holds {records} records of {steps} steps")));
    }
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| unreadable(&e))?;
    let len = engine.adapter().layout().len;
    let floats =
        |data: &[u8]| data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect::<Vec<_>>();
    let flat = |name: &str| -> Result<Vec<f32>, TrainError> {
        let tensor = tensors.tensor(name).map_err(|e| unreadable(&e))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != [len] {
            return Err(TrainError::Checkpoint(format!("{name} is not f32 [{len}]")));
        }
        Ok(floats(tensor.data()))
    };
    let moment = |name: &str| -> candle_core::Result<Tensor> {
        let tensor = tensors.tensor(name)?;
        match tensor.dtype() {
            Dtype::U8 => Tensor::from_slice(tensor.data(), tensor.shape(), &Device::Cpu),
            Dtype::F32 => Tensor::from_vec(floats(tensor.data()), tensor.shape(), &Device::Cpu),
            other => candle_core::bail!("{name} is {other:?}"),
        }
    };
    let best = tensors.names().contains(&"best").then(|| flat("best")).transpose()?;
    let taken_off = engine.adapter().taken_off().map(|_| flat("taken_off")).transpose()?;
    engine.set(flat("params")?, taken_off, moment, progress.updates).map_err(|e| unreadable(&e))?;
    Ok((progress, best))
}
