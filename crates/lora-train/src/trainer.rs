//! The steps of a run together with the other ranks.

use lora_collective::tree::sum_f64;
use lora_model::PassOptions;
use lora_spec::{JobSpec, MicroBatch, TrainingSpec};

use crate::engine::{AccumulatedGradients, Engine, GradientAccumulation, LossSums};
use crate::error::TrainError;
use crate::lr_schedule::learning_rate;
use crate::partition::Partition;
use crate::process_group::ProcessGroup;
use crate::step_sync::{StepMessage, all_gather, find_diverged_rank, loss_bits};
use crate::training_rows::TrainingRows;

/// The engine of a run, in its current group.
pub(crate) struct Trainer {
    engine: Engine,
    process_group: ProcessGroup,
    training: TrainingSpec,
    dropout: f64,
    total_steps: u64,
    /// Hash of the parameters and moments after the last completed step.
    state_hash: String,
}

/// The result of a step. It is the same on every rank.
#[derive(Debug)]
pub(crate) struct TrainedStep {
    /// Mean loss per trained token, in nats.
    pub(crate) loss: f64,
    /// 2-norm of the mean gradient before clipping; NaN if the gradients were not reduced.
    pub(crate) grad_norm: f64,
    /// What is not finite. The update was then skipped.
    pub(crate) not_finite: Option<String>,
    /// Whether a rank was asked to stop.
    pub(crate) stop: bool,
}

impl Trainer {
    /// Creates the trainer of a job of `total_steps` steps, in a group of one.
    pub(crate) fn new(engine: Engine, job: &JobSpec, total_steps: u64) -> Result<Self, TrainError> {
        Ok(Self {
            state_hash: engine.state_hash()?,
            engine,
            process_group: ProcessGroup::single(),
            training: job.training.clone(),
            dropout: job.adapter.lora_dropout,
            total_steps,
        })
    }

    /// Returns the engine.
    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Returns the current group.
    pub(crate) fn process_group(&self) -> &ProcessGroup {
        &self.process_group
    }

    /// Returns the hash of the parameters and moments after the last completed step.
    pub(crate) fn state_hash(&self) -> &str {
        &self.state_hash
    }

    /// Replaces the group and returns the former one.
    pub(crate) fn replace_group(&mut self, process_group: ProcessGroup) -> ProcessGroup {
        std::mem::replace(&mut self.process_group, process_group)
    }

    /// Changes the engine's state with `restore`, for example to that of a checkpoint.
    pub(crate) fn restore<T>(
        &mut self,
        restore: impl FnOnce(&mut Engine) -> Result<T, TrainError>,
    ) -> Result<T, TrainError> {
        let restored = restore(&mut self.engine)?;
        self.state_hash = self.engine.state_hash()?;
        Ok(restored)
    }

    /// Returns the learning rate of a step (from 0).
    pub(crate) fn learning_rate(&self, step: u64) -> f64 {
        learning_rate(&self.training, step, self.total_steps)
    }

    /// Computes the gradients of `step` (from 0), reduces them and updates the parameters. `stop`
    /// is called when this rank's gradients are computed.
    pub(crate) fn step(
        &mut self,
        step: u64,
        rows: &TrainingRows,
        stop: impl FnOnce() -> bool,
    ) -> Result<TrainedStep, TrainError> {
        let lr = self.learning_rate(step);
        let pass = PassOptions {
            checkpointing: self.training.activation_checkpointing,
            dropout: self.dropout,
            seed: self.training.seed,
            step,
        };
        let group = &mut self.process_group;
        let accumulated = accumulate(&mut self.engine, group, rows, pass)?;
        let not_finite = accumulated.first_not_finite()?;
        let message = StepMessage {
            step,
            state: self.state_hash.clone(),
            stop: stop(),
            losses: loss_bits(accumulated.losses()),
            not_finite,
        };
        let messages = all_gather(group.group(), &message)?;
        let states: Vec<(u64, &str)> = messages.iter().map(|m| (m.step, m.state.as_str())).collect();
        if let Some(rank) = find_diverged_rank(&states) {
            return Err(TrainError::Diverged { step, rank });
        }
        let losses: Vec<LossSums> = messages.iter().flat_map(StepMessage::losses).collect();
        let (loss_sum, weight_sum) = sum_losses(&losses);
        let mut trained = TrainedStep {
            loss: loss_sum / weight_sum,
            grad_norm: f64::NAN,
            not_finite: messages.iter().find_map(|m| m.not_finite.clone()),
            stop: messages.iter().any(|m| m.stop),
        };
        if trained.not_finite.is_some() {
            accumulated.discard(group)?;
            return Ok(trained);
        }
        let reduced = accumulated.reduce(group, weight_sum)?;
        // From here on, nothing waits for peers or can be cancelled.
        trained.grad_norm = reduced.norm();
        if trained.grad_norm.is_finite() {
            reduced.optim_step(lr, self.training.max_grad_norm)?;
            self.state_hash = self.engine.state_hash()?;
        } else {
            trained.not_finite = Some("the norm of the summed gradient".to_owned());
        }
        Ok(trained)
    }

    /// Returns the mean loss per trained token of `count` micro-batches, without dropout. The ranks
    /// divide them, and the sums have the canonical order.
    pub(crate) fn mean_loss(
        &mut self,
        count: usize,
        micro_batch: impl Fn(usize) -> MicroBatch,
    ) -> Result<f64, TrainError> {
        let group = &mut self.process_group;
        let mut losses = Vec::new();
        for index in Partition::new(count, group.world_size())?.range(group.rank()) {
            group.check_cancelled()?;
            losses.push(self.engine.eval(&micro_batch(index))?);
        }
        let gathered: Vec<Vec<(u64, u64)>> = all_gather(group.group(), &loss_bits(&losses))?;
        let bits = gathered.iter().flatten().map(|(l, w)| (f64::from_bits(*l), f64::from_bits(*w)));
        let (loss_sum, weight_sum) = sum_losses(&bits.collect::<Vec<_>>());
        Ok(loss_sum / weight_sum)
    }
}

/// Accumulates the gradients of this rank's micro-batches of a step.
fn accumulate<'a>(
    engine: &'a mut Engine,
    group: &mut ProcessGroup,
    rows: &TrainingRows,
    pass: PassOptions,
) -> Result<AccumulatedGradients<'a>, TrainError> {
    let micro_batches = rows.step(pass.step);
    let partition = Partition::new(micro_batches.len(), group.world_size())?;
    let range = partition.range(group.rank());
    let mut accumulation = GradientAccumulation::begin(engine, partition, group)?;
    for rows_of_batch in &micro_batches[range] {
        group.check_cancelled()?;
        accumulation.forward_backward(&rows.collate(rows_of_batch), pass, group)?;
    }
    accumulation.finish()
}

fn sum_losses(losses: &[LossSums]) -> LossSums {
    let (sums, weights): (Vec<f64>, Vec<f64>) = losses.iter().copied().unzip();
    (sum_f64(&sums), sum_f64(&weights))
}
