//! The checkpoint of a run: a safetensors file.
//!
//! These tensors are flat f32 in the adapter's layout:
//! - `params`: the parameters;
//! - `taken_off`: the parameters of the initial term, if the adapter has one;
//! - `best`: the parameters at the best evaluation, if the job exports them.
//!
//! AdamW's moments are `exp_avg` and `exp_avg_sq`, or the tensors of moments in 8 bits. Everything
//! else is JSON in the metadata entry `progress`.

use std::collections::HashMap;

use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use lora_ops::transfer::to_device;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensors};

use crate::engine::Engine;
use crate::error::TrainError;
use crate::progress::Progress;

const PROGRESS: &str = "progress";

/// Returns the checkpoint file of `engine` at `progress`. `best` has the parameters at the best
/// evaluation, if the job exports them.
pub(crate) fn write(
    engine: &Engine,
    progress: &Progress,
    best: Option<&[f32]>,
) -> Result<Vec<u8>, TrainError> {
    let moments = engine.optimizer().tensors();
    let initial = engine.adapter().initial().map(|initial_params| ("taken_off", initial_params));
    let tensors: Vec<(&str, &Tensor)> =
        std::iter::once(("params", engine.adapter().params())).chain(initial).chain(moments).collect();
    let of = |tensor: &Tensor| match tensor.dtype() {
        DType::U8 => Dtype::U8,
        _ => Dtype::F32,
    };
    let mut shapes: Vec<(&str, Dtype, usize)> =
        tensors.iter().map(|(name, tensor)| (*name, of(tensor), tensor.elem_count())).collect();
    shapes.extend(best.map(|best| ("best", Dtype::F32, best.len())));
    let progress = serde_json::to_string(&progress.with_updates(engine.optimizer().updates()))
        .map_err(|e| TrainError::Checkpoint(e.to_string()))?;
    let mut file = header(&shapes, HashMap::from([(PROGRESS.to_owned(), progress)]))?;
    for (_, tensor) in tensors {
        append(&mut file, tensor)?;
    }
    if let Some(best) = best {
        append_f32(&mut file, best);
    }
    Ok(file)
}

/// Returns the header of a safetensors file, in a buffer with capacity for the bytes of `tensors`.
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
    // Aligns the data to 8 bytes.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = Vec::with_capacity(8 + text.len() + end);
    file.extend_from_slice(&(text.len() as u64).to_le_bytes());
    file.append(&mut text);
    Ok(file)
}

/// Appends a tensor's bytes, without another copy if the tensor is on the CPU.
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

/// Restores `engine` from the checkpoint `bytes` of the job `identity`. On an error nothing
/// changes. Returns the progress and the parameters at the best evaluation.
///
/// # Errors
/// The checkpoint is not readable, incomplete, or belongs to another job.
pub(crate) fn read(
    engine: &mut Engine,
    bytes: &[u8],
    identity: &str,
) -> Result<(Progress, Option<Vec<f32>>), TrainError> {
    let fail = |message: &str| TrainError::Checkpoint(message.to_owned());
    let unreadable = |e: &dyn std::fmt::Display| TrainError::Checkpoint(format!("is not readable: {e}"));
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| unreadable(&e))?;
    let progress = metadata.metadata().as_ref().and_then(|m| m.get(PROGRESS));
    let progress = progress.ok_or_else(|| fail("has no metadata entry progress"))?;
    let progress: Progress = serde_json::from_str(progress).map_err(|e| unreadable(&e))?;
    if progress.identity() != identity {
        return Err(fail(
            "belongs to another job: base, tokenizer, chat template, data, adapter or training settings \
             differ from this one's",
        ));
    }
    let (records, steps) = (progress.history().len(), progress.step());
    if records as u64 != steps {
        return Err(TrainError::Checkpoint(format!("has {records} records for {steps} steps")));
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
    engine.set_state(flat("params")?, initial, moment, progress.updates()).map_err(|e| unreadable(&e))?;
    Ok((progress, best))
}
