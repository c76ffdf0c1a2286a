//! The checkpoint of a run.
//!
//! A safetensors file: `params` and, where there is such, `initial` (what the base is trained without) and `best` (the parameters
//! at the best evaluation, where they are wanted at the end): flat f32 in the adapter's layout; and AdamW's moments, `exp_avg` and `exp_avg_sq` or what those are in 8 bits. Everything else is JSON in its metadata under
//! `progress`.

use std::collections::HashMap;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use lora_ops::transfer::to_device;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};

use crate::early_stopping::BestEvaluation;
use crate::engine::Engine;
use crate::{StepRecord, TrainError};

/// Where a run stands, beside its tensors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(crate) struct RunProgress {
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
    progress: &RunProgress,
    best: Option<&[f32]>,
) -> Result<Vec<u8>, TrainError> {
    let moments = engine.moments.tensors();
    let initial = engine.adapter().initial().map(|initial_params| ("taken_off", initial_params));
    let held: Vec<(&str, &Tensor)> =
        std::iter::once(("params", engine.adapter().params())).chain(initial).chain(moments).collect();
    let of = |tensor: &Tensor| match tensor.dtype() {
        DType::U8 => Dtype::U8,
        _ => Dtype::F32,
    };
    let mut shapes: Vec<(&str, Dtype, usize)> =
        held.iter().map(|(name, tensor)| (*name, of(tensor), tensor.elem_count())).collect();
    shapes.extend(best.map(|best| ("best", Dtype::F32, best.len())));
    let progress = RunProgress { updates: engine.updates, ..progress.clone() };
    let progress = serde_json::to_string(&progress).map_err(|e| TrainError::Checkpoint(e.to_string()))?;
    let mut file = header(&shapes, HashMap::from([(PROGRESS.to_owned(), progress)]))?;
    for (_, tensor) in held {
        append(&mut file, tensor)?;
    }
    if let Some(best) = best {
        append_f32(&mut file, best);
    }
    Ok(file)
}

/// The beginning of a safetensors file, before the bytes of `tensors`; with room for those.
fn header(
    tensors: &[(&str, Dtype, usize)],
    metadata: HashMap<String, String>,
) -> Result<Vec<u8>, TrainError> {
    let mut end = 0;
    let infos = tensors.iter().map(|(name, dtype, len)| {
        let start = end;
        end += if *dtype == Dtype::F32 { 4 * len } else { *len };
        ((*name).to_owned(), TensorInfo { dtype: *dtype, shape: vec![*len], data_offsets: (start, end) })
    });
    let metadata = Metadata::new(Some(metadata), infos.collect()).map_err(candle_core::Error::from)?;
    let mut text = serde_json::to_vec(&metadata).map_err(|e| TrainError::Checkpoint(e.to_string()))?;
    // The data are aligned.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = Vec::with_capacity(8 + text.len() + end);
    file.extend_from_slice(&(text.len() as u64).to_le_bytes());
    file.append(&mut text);
    Ok(file)
}

/// Adds a tensor's bytes; on the CPU without another copy.
fn append(file: &mut Vec<u8>, tensor: &Tensor) -> Result<(), TrainError> {
    let on_host = to_device(tensor, &Device::Cpu)?.contiguous()?;
    let (storage, layout) = on_host.storage_and_layout();
    let (Storage::Cpu(storage), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        return Err(TrainError::Checkpoint("a tensor is not on the host".into()));
    };
    match storage {
        CpuStorage::U8(values) => file.extend_from_slice(&values[start..end]),
        _ => append_f32(file, &storage.as_slice::<f32>()?[start..end]),
    }
    Ok(())
}

fn append_f32(file: &mut Vec<u8>, values: &[f32]) {
    file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
}

/// Sets `engine` to the checkpoint `bytes` of the job `identity`; on error nothing is changed. Returns the progress and
/// the best parameters.
pub(crate) fn read(
    engine: &mut Engine,
    bytes: &[u8],
    identity: &str,
) -> Result<(RunProgress, Option<Vec<f32>>), TrainError> {
    let fail = |message: &str| TrainError::Checkpoint(message.to_owned());
    let unreadable = |e: &dyn std::fmt::Display| TrainError::Checkpoint(format!("is not readable: {e}"));
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| unreadable(&e))?;
    let progress = metadata.metadata().as_ref().and_then(|m| m.get(PROGRESS));
    let progress = progress.ok_or_else(|| fail("holds no progress"))?;
    let progress: RunProgress = serde_json::from_str(progress).map_err(|e| unreadable(&e))?;
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
    let initial = engine.adapter().initial().map(|_| flat("taken_off")).transpose()?;
    engine.set_state(flat("params")?, initial, moment, progress.updates).map_err(|e| unreadable(&e))?;
    Ok((progress, best))
}
