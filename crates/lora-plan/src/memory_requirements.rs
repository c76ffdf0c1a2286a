//! The memory that a worker of a job needs, and the settings with which it would need less.

use std::iter;

use lora_data::Dataset;
use lora_spec::{
    ActivationCheckpointing, DeviceKind, DeviceMemory, FieldError, JobSpec, ModelConfig, QuantizationType,
    SafetensorsIndex,
};
use serde::{Deserialize, Serialize};

use crate::alternative::Alternative;
use crate::plan_inputs::PlanInputs;
use crate::{MemoryEstimate, TooLarge};

/// Maximum number of alternatives that an error names.
const MAX_SHOWN_ALTERNATIVES: usize = 3;

/// The memory that each of `workers.min` workers needs with the job's settings and with alternative
/// settings. It is stored with the job, to decide whether a worker's memory is enough and to name
/// settings that would fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryRequirements {
    cpu: DeviceRequirements,
    gpu: DeviceRequirements,
}

/// The memory that a worker on one kind of device needs, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DeviceRequirements {
    peak: u64,
    base: u64,
    /// Alternative settings that need less memory, in the order of their additional computation.
    /// Each entry has the micro-batch sizes, the largest first.
    #[serde(rename = "ways")]
    alternatives: Vec<Vec<Alternative>>,
}

impl MemoryRequirements {
    /// Computes the requirements of `job` over the base with this configuration and these stored
    /// tensors, with these training rows. Does not read weights.
    ///
    /// # Errors
    /// The adapter cannot be initialized over the base.
    pub fn new(
        job: &JobSpec,
        model: &ModelConfig,
        index: &SafetensorsIndex,
        train: &Dataset,
    ) -> Result<Self, FieldError> {
        job.adapter.check_base(model, index)?;
        Self::from_inputs(job, &PlanInputs::new(model, index, train))
    }

    pub(crate) fn from_inputs(job: &JobSpec, inputs: &PlanInputs) -> Result<Self, FieldError> {
        Ok(Self {
            cpu: DeviceRequirements::new(job, inputs, DeviceKind::Cpu)?,
            gpu: DeviceRequirements::new(job, inputs, DeviceKind::Gpu)?,
        })
    }

    /// Returns the bytes that a worker with a device of this kind needs.
    pub fn peak(&self, device: DeviceKind) -> u64 {
        self.for_device(device).peak
    }

    /// Checks that a worker with this memory can run the job.
    ///
    /// # Errors
    /// The worker needs more memory. The error has up to three changes of settings with which the
    /// job would fit, those with the fewest settings first.
    pub fn fits(&self, memory: DeviceMemory) -> Result<(), TooLarge> {
        let DeviceRequirements { peak, base, alternatives } = self.for_device(memory.kind);
        if *peak <= memory.bytes {
            return Ok(());
        }
        // For each alternative, the largest micro-batch that fits.
        let mut fitting: Vec<Alternative> = alternatives
            .iter()
            .filter_map(|sizes| sizes.iter().find(|alternative| alternative.peak <= memory.bytes))
            .cloned()
            .collect();
        fitting.sort_by_key(|alternative| alternative.settings.len());
        fitting.truncate(MAX_SHOWN_ALTERNATIVES);
        Err(TooLarge { peak: *peak, base: *base, memory, fitting })
    }

    fn for_device(&self, device: DeviceKind) -> &DeviceRequirements {
        match device {
            DeviceKind::Cpu => &self.cpu,
            DeviceKind::Gpu => &self.gpu,
        }
    }
}

impl DeviceRequirements {
    fn new(job: &JobSpec, inputs: &PlanInputs, device: DeviceKind) -> Result<Self, FieldError> {
        let training = &job.training;
        let kept = [
            ActivationCheckpointing::None,
            ActivationCheckpointing::BlockSaveAttention,
            ActivationCheckpointing::Block,
        ];
        let less_kept = kept.into_iter().skip_while(|it| *it != training.activation_checkpointing);
        let halves = |size: &usize| (*size > 1).then_some(size / 2);
        let sizes: Vec<usize> = iter::successors(Some(training.micro_batch_size), halves).collect();
        let quantizations = match job.model.quantization {
            QuantizationType::None if inputs.is_dense() => {
                vec![QuantizationType::None, QuantizationType::Nf4]
            }
            given => vec![given],
        };
        let mut alternatives = Vec::new();
        for (checkpointing, quantization) in
            less_kept.flat_map(|it| quantizations.iter().map(move |quantization| (it, *quantization)))
        {
            let mut sizes_tried = Vec::new();
            for &size in &sizes {
                let mut changed = job.clone();
                changed.training.activation_checkpointing = checkpointing;
                changed.training.micro_batch_size = size;
                changed.model.quantization = quantization;
                let peak = inputs.estimate(&changed, device)?.peak;
                sizes_tried.push(Alternative::new(job, &changed, peak));
            }
            alternatives.push(sizes_tried);
        }
        let MemoryEstimate { peak, base, .. } = inputs.estimate(job, device)?;
        Ok(Self { peak, base, alternatives })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alternative(settings: &[(&str, &str)], peak: u64) -> Alternative {
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Alternative { settings: settings.collect(), peak }
    }

    #[test]
    fn too_small_workers_get_settings_that_would_fit() {
        const MIB: u64 = 1 << 20;
        let (size, block) = ("training.micro_batch_size", ("training.activation_checkpointing", "block"));
        let alternatives = vec![
            vec![
                alternative(&[], 90 * MIB),
                alternative(&[(size, "2")], 70 * MIB),
                alternative(&[(size, "1")], 60 * MIB),
            ],
            vec![alternative(&[block], 65 * MIB), alternative(&[block, (size, "2")], 55 * MIB)],
        ];
        let cpu = DeviceRequirements { peak: 90 * MIB, base: 50 * MIB, alternatives };
        let requirements =
            MemoryRequirements { gpu: DeviceRequirements { peak: 91 * MIB, ..cpu.clone() }, cpu };
        let fits = |kind, bytes| {
            requirements.fits(DeviceMemory { kind, bytes }).map_err(|too_large| too_large.to_string())
        };
        assert_eq!(fits(DeviceKind::Cpu, 90 * MIB), Ok(()));
        assert_eq!(
            fits(DeviceKind::Cpu, 64 * MIB),
            Err("a worker needs 90.00 MiB of memory, more than 64.00 MiB; it would fit with \
                 training.micro_batch_size: 1 (60.00 MiB), or with training.activation_checkpointing: \
                 block and training.micro_batch_size: 2 (55.00 MiB)"
                .to_owned())
        );
        assert_eq!(
            fits(DeviceKind::Gpu, MIB),
            Err("a worker needs 91.00 MiB of a GPU's memory, more than 1.00 MiB; no \
                 activation_checkpointing, micro_batch_size or quantization would make it fit, the base \
                 alone takes 50.00 MiB"
                .to_owned())
        );
        let stored = serde_json::to_string(&requirements).unwrap();
        // The databases of older versions have these keys.
        assert!(stored.starts_with(r#"{"cpu":{"peak":94371840,"base":"#), "{stored}");
        assert!(stored.contains(r#""ways":[[{"settings":[],"peak":"#), "{stored}");
        assert_eq!(serde_json::from_str::<MemoryRequirements>(&stored).unwrap(), requirements);
    }
}
