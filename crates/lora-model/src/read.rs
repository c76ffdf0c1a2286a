//! Reading a checkpoint's tensors one at a time, so that no more than one is in memory twice.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use lora_spec::{BaseDtype, Checkpoint, CheckpointError};

use crate::ModelError;

/// The open files of a checkpoint.
pub(crate) struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    files: Vec<File>,
    device: &'a Device,
}

impl<'a> Reader<'a> {
    pub(crate) fn open(checkpoint: &'a Checkpoint, device: &'a Device) -> Result<Self, ModelError> {
        let open =
            |path: &PathBuf| File::open(path).map_err(|source| ModelError::Io { path: path.clone(), source });
        let files = checkpoint.files.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { checkpoint, files, device })
    }

    /// Reads a tensor and holds it as `dtype` on the device.
    pub(crate) fn read(&self, name: &str, dtype: BaseDtype) -> Result<Tensor, ModelError> {
        let fail = |file: usize, message: String| {
            let path = self.checkpoint.files.get(file).cloned().unwrap_or_default();
            CheckpointError { path, message }
        };
        let Some(entry) = self.checkpoint.tensors.get(name) else {
            return Err(fail(0, format!("tensor {name} is missing")).into());
        };
        let mut bytes = vec![0; (entry.bytes.end - entry.bytes.start) as usize];
        self.files[entry.file]
            .read_exact_at(&mut bytes, entry.bytes.start)
            .map_err(|e| fail(entry.file, format!("tensor {name}: {e}")))?;
        let halves = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        let shape = entry.shape.as_slice();
        let tensor = match (entry.dtype.as_str(), dtype) {
            ("BF16", BaseDtype::Auto | BaseDtype::Bf16) => {
                Tensor::from_vec(halves().map(bf16::from_le_bytes).collect(), shape, self.device)?
            }
            (stored, dtype) => {
                let values: Vec<f32> = match stored {
                    "BF16" => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
                    "F16" => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
                    "F32" => {
                        bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
                    }
                    other => return Err(fail(entry.file, format!("tensor {name} is {other}")).into()),
                };
                match dtype {
                    BaseDtype::Bf16 => Tensor::from_vec(
                        values.into_iter().map(bf16::from_f32).collect(),
                        shape,
                        self.device,
                    )?,
                    BaseDtype::Auto | BaseDtype::F32 => Tensor::from_vec(values, shape, self.device)?,
                }
            }
        };
        Ok(tensor)
    }
}
