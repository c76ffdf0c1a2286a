//! The state of a job on one rank between two steps, and how a rank joins a group.

use std::sync::Arc;

use lora_collective::backend_choice::Preference;
use lora_collective::{CancelToken, Group};
use lora_data::{BatchPlan, Dataset, MicroBatchRows, Tokenizer, eval_micro_batches};
use lora_model::Base;
use lora_spec::{FieldError, InitLoraWeights, JobSpec};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, RunProgress};
use crate::data::RunData;
use crate::engine::Engine;
use crate::inputs::{initial_adapter, job_identity};
use crate::lr_schedule::learning_rate;
use crate::process_group::ProcessGroup;
use crate::step_sync::{all_gather, find_diverged_rank};
use crate::{RunFacts, RunInputs, StepMetrics, StepRecord, TrainError};

/// The state of a job on one rank, between two steps.
///
/// If a lost peer or a [`CancelToken`] ends a step early, the run keeps the state after the last
/// complete step. This state can be saved, and the run continues after it has joined another group.
pub struct Run {
    pub(crate) job: JobSpec,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) train: Dataset,
    pub(crate) eval: Option<Dataset>,
    pub(crate) eval_batches: Vec<MicroBatchRows>,
    pub(crate) plan: BatchPlan,
    pub(crate) engine: Engine,
    pub(crate) progress: RunProgress,
    /// Parameters at the best evaluation, if the job exports them.
    pub(crate) best_params: Option<Vec<f32>>,
    pub(crate) process_group: ProcessGroup,
    /// Hash of the state after the last completed step.
    pub(crate) state_hash: String,
    /// Number of tokens seen so far, without padding.
    pub(crate) num_tokens: u64,
    pub(crate) facts: RunFacts,
}

/// The progress of a rank, and the hash of its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RankState {
    /// Number of completed steps, and whether no evaluation is due after the last one.
    at: (u64, bool),
    state: String,
}

impl Run {
    /// Reads the data and initializes the adapter: the state before the first step, in a group of
    /// one. `cancel` takes effect between two files.
    pub fn prepare(
        job: &JobSpec,
        inputs: &RunInputs,
        base: Arc<Base>,
        cancel: &CancelToken,
    ) -> Result<Self, TrainError> {
        let data = RunData::read(job, inputs, &base.dir, cancel)?;
        Self::from_data(job, inputs, data, base)
    }

    /// Like [`Self::prepare`], with rows that have already been read.
    pub fn from_data(
        job: &JobSpec,
        inputs: &RunInputs,
        data: RunData,
        base: Arc<Base>,
    ) -> Result<Self, TrainError> {
        let RunData { tokenizer, train, eval } = data;
        for (field, data) in [("data.train", Some(&train)), ("data.eval", eval.as_ref())] {
            let tokens = data.into_iter().flat_map(|data| data.rows.iter().flat_map(|row| &row.tokens));
            if let Some(token) = tokens.max().filter(|token| **token as usize >= base.config.vocab_size) {
                let vocab = base.config.vocab_size;
                let message = format!(
                    "the tokenizer gives token {token}, but the base's vocab_size is {vocab}; use the \
                     tokenizer of this base"
                );
                return Err(FieldError::new(field, message).into());
            }
        }
        let training = &job.training;
        let plan = BatchPlan::for_job(job, &train);
        let eval_batches = eval
            .as_ref()
            .map(|eval| eval_micro_batches(&eval.lengths(), training.micro_batch_size))
            .unwrap_or_default();
        let adapter = initial_adapter(job, inputs.init_from.as_deref(), &base)?;
        let identity = job_identity(job, &base, &train, eval.as_ref(), &adapter)?;
        let trainable = adapter.layout().len as u64;
        let facts = RunFacts {
            total_steps: training.total_steps(plan.steps_per_epoch()),
            steps_per_epoch: plan.steps_per_epoch(),
            trainable_parameters: trainable,
            total_parameters: base.config.parameters() + trainable,
            adapter_bytes: 4 * trainable,
        };
        let engine = Engine::new(base, adapter, job.training.optim)?;
        Ok(Self {
            state_hash: engine.state_hash()?,
            progress: RunProgress { identity, ..RunProgress::default() },
            best_params: None,
            process_group: ProcessGroup::single(),
            num_tokens: 0,
            job: job.clone(),
            tokenizer,
            train,
            eval,
            eval_batches,
            plan,
            engine,
            facts,
        })
    }

    /// Continues from a checkpoint of the same job.
    ///
    /// # Errors
    /// The checkpoint is not readable or belongs to another job. The state then does not change.
    pub fn restore(&mut self, checkpoint: &[u8]) -> Result<(), TrainError> {
        (self.progress, self.best_params) =
            checkpoint::read(&mut self.engine, checkpoint, &self.progress.identity)?;
        self.state_hash = self.engine.state_hash()?;
        self.num_tokens = self.plan.tokens(self.progress.step);
        Ok(())
    }

    /// Joins the ranks of `group`. The newest of their states is broadcast to the ranks that do not
    /// have it. States after the same step must be equal. `preference` is this rank's preference
    /// for NCCL or TCP.
    ///
    /// # Errors
    /// The newest states differ ([`TrainError::Diverged`]), or the group fails.
    pub fn join(&mut self, mut group: Group, preference: impl Into<Preference>) -> Result<(), TrainError> {
        self.leave()?;
        let mine = RankState {
            at: (self.progress.step, !self.progress.evaluation_due),
            state: self.state_hash.clone(),
        };
        let all: Vec<RankState> = all_gather(&mut group, &mine)?;
        let newest = all.iter().map(|other| other.at).max().unwrap_or(mine.at);
        let holders: Vec<usize> = (0..all.len()).filter(|&rank| all[rank].at == newest).collect();
        let root = holders.first().copied().unwrap_or(0);
        let newest_states: Vec<(u64, &str)> =
            holders.iter().map(|&rank| (newest.0, all[rank].state.as_str())).collect();
        // Hosts may compute different initial adapters from the same base, even with equal GPUs.
        // Before the first step, adopting another rank's adapter loses no training.
        let may_differ = newest.0 == 0 && self.job.adapter.init_lora_weights != InitLoraWeights::Default;
        if let Some(diverged) = find_diverged_rank(&newest_states).filter(|_| !may_differ) {
            return Err(TrainError::Diverged { step: newest.0, rank: holders[diverged] });
        }
        if all.iter().any(|other| *other != all[root]) {
            let mut bytes = if group.rank() == root { self.checkpoint()? } else { Vec::new() };
            group.broadcast(root, &mut bytes)?;
            if mine != all[root] {
                self.restore(&bytes)?;
            }
        }
        self.process_group = ProcessGroup::new(group, &preference.into(), self.engine.base().device())?;
        Ok(())
    }

    /// Leaves the group and closes its connections. To continue, the run joins another group.
    ///
    /// # Errors
    /// The device is lost: work of the group on the device cannot be aborted.
    pub fn leave(&mut self) -> Result<(), TrainError> {
        std::mem::replace(&mut self.process_group, ProcessGroup::single()).leave()
    }

    /// Returns why the group's gradients are sent over TCP although its machines have several GPUs,
    /// and the remedy. `None` if NCCL sends them or TCP is intended.
    pub fn fallback(&self) -> Option<&str> {
        self.process_group.fallback()
    }

    /// Returns the sizes of the run.
    pub fn facts(&self) -> &RunFacts {
        &self.facts
    }

    /// Returns the number of completed steps.
    pub fn completed_steps(&self) -> u64 {
        self.progress.step
    }

    /// Returns whether training has ended. This can also be true for a restored run.
    pub fn is_finished(&self) -> bool {
        self.progress.finished
    }

    /// Returns the records of the completed steps.
    pub fn history(&self) -> &[StepRecord] {
        &self.progress.history
    }

    /// Iterates over the metrics of the steps after `step`, up to the last step whose evaluation is
    /// not due any more. A rank that becomes rank 0 reads the metrics of earlier steps from this
    /// iterator, including steps that it did not compute itself.
    pub fn metrics_after(&self, step: u64) -> impl Iterator<Item = StepMetrics> {
        let mut num_tokens = self.plan.tokens(step);
        let evaluated = self.progress.step - u64::from(self.progress.evaluation_due);
        (step..evaluated).map(move |before| {
            num_tokens += self.tokens_in(&self.plan.step(before));
            self.metrics(before + 1, num_tokens)
        })
    }

    /// Returns a checkpoint file, from which a run of the same job continues with the same bits.
    pub fn checkpoint(&self) -> Result<Vec<u8>, TrainError> {
        checkpoint::write(&self.engine, &self.progress, self.best_params.as_deref())
    }

    /// Returns the number of tokens in the rows of a step.
    pub(crate) fn tokens_in(&self, micro_batches: &[MicroBatchRows]) -> u64 {
        let rows = micro_batches.iter().flat_map(|micro_batch| &micro_batch.rows);
        rows.map(|&row| self.train.rows[row].tokens.len() as u64).sum()
    }

    /// Returns the metrics of a completed step, after which `num_tokens` tokens have been seen.
    pub(crate) fn metrics(&self, step: u64, num_tokens: u64) -> StepMetrics {
        let training = &self.job.training;
        let record = &self.progress.history[step as usize - 1];
        let is_last = self.progress.finished && step == self.progress.step;
        StepMetrics {
            step,
            loss: record.loss.unwrap_or(f64::NAN),
            grad_norm: record.grad_norm.unwrap_or(f64::NAN),
            learning_rate: learning_rate(training, step - 1, self.facts.total_steps),
            epoch: step as f64 / self.facts.steps_per_epoch.max(1) as f64,
            num_tokens,
            eval_loss: record.eval_loss,
            logged: is_last || step.is_multiple_of(training.logging_steps) || self.is_evaluated_after(step),
        }
    }

    /// Returns whether an evaluation follows the step.
    pub(crate) fn is_evaluated_after(&self, step: u64) -> bool {
        let due = step >= self.facts.total_steps || step.is_multiple_of(self.job.training.eval_steps);
        self.eval.is_some() && due
    }
}
