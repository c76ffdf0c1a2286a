//! One rank's part of a job, between two steps.

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

/// One rank's part of a job, between two steps.
///
/// Whatever ends a step early, a lost peer or [`CancelToken`], leaves the state after the last whole step: it can be saved, and
/// the run goes on after it has joined another group.
pub struct Run {
    pub(crate) job: JobSpec,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) train: Dataset,
    pub(crate) eval: Option<Dataset>,
    pub(crate) eval_batches: Vec<MicroBatchRows>,
    pub(crate) plan: BatchPlan,
    pub(crate) engine: Engine,
    pub(crate) progress: RunProgress,
    /// Parameters at the best evaluation, where the job wants them at the end.
    pub(crate) best_params: Option<Vec<f32>>,
    pub(crate) process_group: ProcessGroup,
    /// Hash of the state after the last completed step.
    pub(crate) state_hash: String,
    /// Tokens seen so far, padding not counted.
    pub(crate) num_tokens: u64,
    facts: RunFacts,
}

/// How far a rank is, and the hash of its state there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RankState {
    /// Completed steps, and whether the last of them has its evaluation, where one is due.
    at: (u64, bool),
    state: String,
}

impl Run {
    /// Reads the data and makes the adapter: the state before the first step, on a group of one. `cancel` ends it
    /// between two files.
    pub fn prepare(
        job: &JobSpec,
        inputs: &RunInputs,
        base: Arc<Base>,
        cancel: &CancelToken,
    ) -> Result<Self, TrainError> {
        let data = RunData::read(job, inputs, &base.dir, cancel)?;
        Self::from_data(job, inputs, data, base)
    }

    /// The same from rows that were read already.
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
                let message =
                    format!("the tokenizer gave token {token}, but the base's vocab_size is {vocab}");
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

    /// Goes on from a checkpoint of the same job.
    pub fn restore(&mut self, checkpoint: &[u8]) -> Result<(), TrainError> {
        (self.progress, self.best_params) =
            checkpoint::read(&mut self.engine, checkpoint, &self.progress.identity)?;
        self.state_hash = self.engine.state_hash()?;
        self.num_tokens = self.plan.tokens(self.progress.step);
        Ok(())
    }

    /// Joins the ranks of `group`: the newest of their states wins and is broadcast. Equally new states must be equal.
    /// `preference`: how this rank would sum gradients with the others.
    pub fn join(&mut self, mut group: Group, preference: impl Into<Preference>) -> Result<(), TrainError> {
        self.leave()?;
        let mine = RankState {
            at: (self.progress.step, !self.progress.evaluation_due),
            state: self.state_hash.clone(),
        };
        let all: Vec<RankState> = all_gather(&mut group, &mine)?;
        let newest = all.iter().map(|rank| rank.at).max().unwrap_or(mine.at);
        let holders: Vec<usize> = (0..all.len()).filter(|&rank| all[rank].at == newest).collect();
        let root = holders.first().copied().unwrap_or(0);
        let held: Vec<(u64, &str)> =
            holders.iter().map(|&rank| (newest.0, all[rank].state.as_str())).collect();
        // What hosts compute of the base may differ where their GPUs do not. Before the first step nobody has a state to lose.
        let may_differ = newest.0 == 0 && self.job.adapter.init_lora_weights != InitLoraWeights::Default;
        if let Some(diverged) = find_diverged_rank(&held).filter(|_| !may_differ) {
            return Err(TrainError::Diverged { step: newest.0, rank: holders[diverged] });
        }
        if all.iter().any(|rank| *rank != all[root]) {
            let mut bytes = if group.rank() == root { self.checkpoint()? } else { Vec::new() };
            group.broadcast(root, &mut bytes)?;
            if mine != all[root] {
                self.restore(&bytes)?;
            }
        }
        self.process_group = ProcessGroup::new(group, &preference.into(), self.engine.base().device())?;
        Ok(())
    }

    /// Leaves the group, which closes its connections; to go on, the run joins another one.
    ///
    /// # Errors
    /// The device is lost: something of the group does not come to an end there.
    pub fn leave(&mut self) -> Result<(), TrainError> {
        std::mem::replace(&mut self.process_group, ProcessGroup::single()).leave()
    }

    /// Reason why the group's gradients travel over TCP although there are several GPUs.
    pub fn fallback(&self) -> Option<&str> {
        self.process_group.fallback()
    }

    /// Sizes of the run.
    pub fn facts(&self) -> &RunFacts {
        &self.facts
    }

    /// Completed steps.
    pub fn completed_steps(&self) -> u64 {
        self.progress.step
    }

    /// Whether training has ended (a restored run may have).
    pub fn is_finished(&self) -> bool {
        self.progress.finished
    }

    /// The records of the completed steps.
    pub fn history(&self) -> &[StepRecord] {
        &self.progress.history
    }

    /// The numbers of the steps after `step`, up to the last one that needs nothing more. A rank that takes rank 0's place
    /// has them from here, whoever computed them.
    pub fn metrics_after(&self, step: u64) -> impl Iterator<Item = StepMetrics> {
        let mut num_tokens = self.plan.tokens(step);
        let evaluated = self.progress.step - u64::from(self.progress.evaluation_due);
        (step..evaluated).map(move |before| {
            num_tokens += self.tokens_in(&self.plan.step(before));
            self.metrics(before + 1, num_tokens)
        })
    }

    /// A file from which an equal run goes on bit by bit.
    pub fn checkpoint(&self) -> Result<Vec<u8>, TrainError> {
        checkpoint::write(&self.engine, &self.progress, self.best_params.as_deref())
    }

    /// Tokens in the rows of a step.
    pub(crate) fn tokens_in(&self, micro_batches: &[MicroBatchRows]) -> u64 {
        let rows = micro_batches.iter().flat_map(|micro_batch| &micro_batch.rows);
        rows.map(|&row| self.train.rows[row].tokens.len() as u64).sum()
    }

    /// The numbers of a completed step, after which `num_tokens` have been seen.
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

    /// Whether an evaluation follows the step.
    pub(crate) fn is_evaluated_after(&self, step: u64) -> bool {
        let due = step >= self.facts.total_steps || step.is_multiple_of(self.job.training.eval_steps);
        self.eval.is_some() && due
    }
}
