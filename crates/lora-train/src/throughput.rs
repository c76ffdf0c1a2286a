//! Measurement of how fast this machine's CPU trains a model, with a few blocks of the model and
//! random weights.

use std::time::{Duration, Instant};

use lora_model::{Adapter, Base, Gradients, PassOptions, forward_backward};
use lora_plan::{MicroBatchShape, ModelFootprint, TrainingWorkload, row_flops};
use lora_spec::{
    AdapterSpec, BaseFormat, DeviceKind, Document, InitLoraWeights, JobSpec, MicroBatch, ModelConfig, Philox,
};

use crate::device::ComputeDevice;
use crate::error::TrainError;

/// Number of blocks of the larger of the two timed models. The other one has one block.
const MEASURED_BLOCKS: usize = 2;
/// The micro-batch of a model is repeated until this time has passed. The fastest run is used.
const TARGET_DURATION: Duration = Duration::from_secs(2);
/// Maximum number of runs of a model's micro-batch.
const MAX_RUNS: usize = 5;

/// Returns the peak memory of [`training_throughput`] in bytes.
pub fn throughput_memory(
    job: &JobSpec,
    config: &ModelConfig,
    format: BaseFormat,
    shape: MicroBatchShape,
) -> Result<u64, TrainError> {
    let model = shortened(config, MEASURED_BLOCKS);
    let modules = job.adapter.target_modules.resolve(&model)?;
    let training = TrainingWorkload {
        modules: &modules,
        // The measurement does not decompose any weight.
        adapter: &AdapterSpec { init_lora_weights: InitLoraWeights::Default, ..job.adapter.clone() },
        shape: MicroBatchShape { count: 1, ..shape },
        checkpointing: job.training.activation_checkpointing,
        optim: job.training.optim,
        keeps_best: false,
    };
    Ok(ModelFootprint { model: &model, index: None, format, device: DeviceKind::Cpu }.memory(&training).peak)
}

/// Measures how many floating-point operations per second this process does on the CPU for `job`,
/// counted with [`row_flops`]. The time of one block is the difference between the times of two
/// blocks and one.
pub fn training_throughput(
    job: &JobSpec,
    config: &ModelConfig,
    format: BaseFormat,
    shape: MicroBatchShape,
) -> Result<f64, TrainError> {
    let (one, two) = (
        forward_backward_seconds(job, config, format, shape, 1)?,
        forward_backward_seconds(job, config, format, shape, MEASURED_BLOCKS)?,
    );
    let blocks = config.layers.len() as f64;
    let whole = one + (blocks - 1.0) * (two - one).max(0.0);
    let modules = job.adapter.target_modules.resolve(config)?;
    let adapter: usize = modules.iter().map(|m| job.adapter.r * (m.in_features + m.out_features)).sum();
    let flops = shape.rows as f64 * row_flops(config, adapter as u64, shape.positions as u64) as f64;
    Ok(flops / whole)
}

/// Measures the seconds of a forward and backward pass of a micro-batch through embedding, `blocks`
/// blocks and head.
fn forward_backward_seconds(
    job: &JobSpec,
    config: &ModelConfig,
    format: BaseFormat,
    shape: MicroBatchShape,
    blocks: usize,
) -> Result<f64, TrainError> {
    let config = shortened(config, blocks);
    let mut adapter = Adapter::new(&config, &job.adapter, 0)?;
    if job.adapter.init_lora_weights.subtracts_initial() {
        adapter = adapter.with_initial_subtracted()?;
    }
    let base = Base::random(config, format, 0, &ComputeDevice::Cpu)?;
    let gradients = Gradients::zeros(adapter.layout(), base.device())?;
    let (philox, vocab) = (Philox::new(0, "tokens"), base.config.vocab_size as u64);
    let count = shape.rows * shape.positions;
    let tokens: Vec<u32> = (0..count).map(|i| philox.below(vocab, [0, i as u32, 0, 0]) as u32).collect();
    let mut targets = tokens.clone();
    targets.rotate_left(1.min(count));
    let batch = MicroBatch {
        rows: Document::whole_rows(0..shape.rows as u64, shape.positions),
        seq_len: shape.positions,
        tokens,
        targets,
        weights: vec![1.0; count],
    };
    let pass = PassOptions {
        checkpointing: job.training.activation_checkpointing,
        dropout: job.adapter.lora_dropout,
        seed: 0,
        step: 0,
    };
    let (began, mut fastest) = (Instant::now(), f64::INFINITY);
    for _ in 0..MAX_RUNS {
        let started = Instant::now();
        forward_backward(&base, &adapter, &gradients, &batch, pass)?.sum()?;
        fastest = fastest.min(started.elapsed().as_secs_f64());
        if began.elapsed() >= TARGET_DURATION {
            break;
        }
    }
    Ok(fastest)
}

/// Returns the configuration of the model with `blocks` blocks.
fn shortened(config: &ModelConfig, blocks: usize) -> ModelConfig {
    ModelConfig { layers: config.layers.iter().copied().cycle().take(blocks).collect(), ..config.clone() }
}
