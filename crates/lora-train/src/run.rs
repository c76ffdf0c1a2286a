//! A job on one rank: its steps, how it joins a group, its checkpoints and its result.

use std::sync::Arc;

use lora_collective::backend_choice::Preference;
use lora_collective::{CancelToken, Group};
use lora_data::{Tokenizer, sample_rows};
use lora_model::{Base, sha256};
use lora_ops::adamw::AdamWSettings;
use lora_spec::file_names::{ADAPTER_WEIGHTS, RECEIPT};
use lora_spec::{
    ExportedAdapter, FieldError, InitLoraWeights, JobFiles, JobSpec, RunFacts, StepMetrics, WorkersSpec,
};
use serde::{Deserialize, Serialize};

use crate::checkpoint;
use crate::data::RunData;
use crate::device::numerics_id;
use crate::engine::Engine;
use crate::error::TrainError;
use crate::evaluator::Evaluator;
use crate::export::{ResultFile, adapter_files, tokenizer_files};
use crate::inputs::{TokenHashes, initial_adapter, job_identity};
use crate::logit_difference::LogitDifference;
use crate::process_group::ProcessGroup;
use crate::progress::Progress;
use crate::receipt::{FileHash, InputHashes, Receipt, StepRecord};
use crate::step_report::{StepOutcome, StepReport};
use crate::step_sync::{all_gather, find_diverged_rank};
use crate::trainer::Trainer;
use crate::training_rows::TrainingRows;

/// The state of a job on one rank, between two steps.
///
/// If a lost peer or a [`CancelToken`] ends a step early, the run keeps the state after the last
/// complete step. This state can be saved, and the run continues after it has joined another group.
///
/// Parameters, moments and progress change together, after everything has arrived from the peers.
/// An evaluation follows and stays due until it is complete: if a run is interrupted during an
/// evaluation, its next step begins with this evaluation.
pub struct Run {
    job: JobSpec,
    tokenizer: Tokenizer,
    rows: TrainingRows,
    tokens: TokenHashes,
    trainer: Trainer,
    evaluator: Evaluator,
    progress: Progress,
    facts: RunFacts,
}

/// How far a rank is. A later position is greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Position {
    completed_steps: u64,
    /// Whether no evaluation is due after the last completed step.
    evaluated: bool,
}

/// The position of a rank, and the hash of its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct RankState {
    tokens: TokenHashes,
    position: Position,
    state: String,
}

impl RankState {
    fn is_at(&self, other: &Self) -> bool {
        self.position == other.position && self.state == other.state
    }
}

impl Run {
    /// Reads the data and initializes the adapter: the state before the first step, in a group of
    /// one. `cancel` takes effect between two files.
    pub fn prepare(
        job: &JobSpec,
        files: &JobFiles,
        base: Arc<Base>,
        cancel: &CancelToken,
    ) -> Result<Self, TrainError> {
        let data = RunData::read(job, files, None, cancel)?;
        Self::from_data(job, files, data, base)
    }

    /// Returns what a user should know about the rows.
    pub fn data_notes(&self) -> Vec<String> {
        lora_plan::data_notes(&self.job.data, self.rows.dataset(), self.evaluator.dataset())
    }

    /// Like [`Self::prepare`], with rows that have already been read.
    pub fn from_data(
        job: &JobSpec,
        files: &JobFiles,
        data: RunData,
        base: Arc<Base>,
    ) -> Result<Self, TrainError> {
        let RunData { tokenizer, train, eval } = data;
        let adapter = initial_adapter(job, files, &base)?;
        let tokens = TokenHashes::new(&train, eval.as_ref());
        let identity = job_identity(job, &base, &train, eval.as_ref(), &tokens, &adapter)?;
        let rows = TrainingRows::new(job, train);
        let trainable = adapter.layout().len as u64;
        let facts = RunFacts {
            total_steps: job.training.total_steps(rows.steps_per_epoch()),
            steps_per_epoch: rows.steps_per_epoch(),
            trainable_parameters: trainable,
            total_parameters: base.config.parameters() + trainable,
            adapter_bytes: 4 * trainable,
        };
        let training = &job.training;
        let settings = AdamWSettings {
            beta1: training.adam_beta1,
            beta2: training.adam_beta2,
            eps: training.adam_epsilon,
            weight_decay: training.weight_decay,
        };
        let engine = Engine::new(base, adapter, training.optim, settings)?;
        Ok(Self {
            trainer: Trainer::new(engine, job, facts.total_steps)?,
            evaluator: Evaluator::new(job, eval, facts.total_steps),
            progress: Progress::new(identity),
            job: job.clone(),
            tokenizer,
            rows,
            tokens,
            facts,
        })
    }

    /// Runs one optimizer step and the evaluation that is due after it. If an evaluation was
    /// interrupted, only this evaluation runs. `stop` is called when this rank's gradients are
    /// computed; if it returns true on any rank, all ranks stop after the step.
    pub fn step(&mut self, stop: impl FnOnce() -> bool) -> Result<StepReport, TrainError> {
        let (sent_before, tokens_before) =
            (self.trainer.process_group().bytes_sent(), self.progress.num_tokens());
        let (mut stopped, mut notice) = (false, None);
        if !self.progress.is_evaluation_due() {
            let step = self.progress.step();
            let trained = self.trainer.step(step, &self.rows, stop)?;
            let evaluation_due = self.evaluator.is_due_after(step + 1);
            let (tokens, state) = (self.rows.tokens_in(step), self.trainer.state_hash());
            notice = self.progress.complete_step(
                &trained,
                tokens,
                state,
                evaluation_due,
                self.facts.total_steps,
            )?;
            stopped = trained.stop;
        }
        if self.progress.is_evaluation_due() {
            self.evaluator.evaluate(&mut self.trainer, &mut self.progress)?;
        }
        let training = &self.job.training;
        self.progress.update_finished(training, self.facts.total_steps);
        let outcome = match (self.progress.is_finished(), stopped) {
            (true, _) => StepOutcome::Finished,
            (false, true) => StepOutcome::Stopped,
            (false, false) => StepOutcome::Continue,
        };
        let notices = [notice, self.end_notice().filter(|_| outcome == StepOutcome::Finished)];
        let notices: Vec<String> = notices.into_iter().flatten().collect();
        let (step, num_tokens) = (self.progress.step(), self.progress.num_tokens());
        Ok(StepReport {
            metrics: self.metrics(step, num_tokens),
            checkpoint_due: outcome == StepOutcome::Continue && step.is_multiple_of(training.save_steps),
            outcome,
            tokens: num_tokens - tokens_before,
            reduced_bytes: self.trainer.process_group().bytes_sent() - sent_before,
            notice: (!notices.is_empty()).then(|| notices.join("; ")),
        })
    }

    /// Returns why training ended before the last step, and which adapter is exported if it is not
    /// the last one.
    fn end_notice(&self) -> Option<String> {
        let step = self.progress.step();
        let exported = self.exported_adapter();
        let mut parts = Vec::new();
        if exported.stopped_early {
            parts.push(format!(
                "training stopped after step {step} of {}: eval_loss did not improve in {} evaluations",
                self.facts.total_steps,
                self.job.training.early_stopping_patience.unwrap_or_default()
            ));
        }
        if exported.step != step {
            let loss = exported.eval_loss.map(|loss| format!(" (eval_loss {loss:.4})")).unwrap_or_default();
            parts.push(format!("the adapter of step {} is exported{loss}", exported.step));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// Returns a checkpoint file, from which a run of the same job continues with the same bits.
    pub fn checkpoint(&self) -> Result<Vec<u8>, TrainError> {
        checkpoint::write(self.trainer.engine(), &self.progress, self.evaluator.best_params())
    }

    /// Continues from a checkpoint of the same job.
    ///
    /// # Errors
    /// The checkpoint is not readable or belongs to another job. The state then does not change.
    pub fn restore(&mut self, checkpoint: &[u8]) -> Result<(), TrainError> {
        let identity = self.progress.identity();
        let restored = self.trainer.restore(|engine| checkpoint::read(engine, checkpoint, identity));
        let (progress, best_params) = restored?;
        let num_tokens = self.rows.tokens(progress.step());
        self.progress = progress.with_num_tokens(num_tokens);
        self.evaluator.restore_best_params(best_params);
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
            tokens: self.tokens.clone(),
            position: Position {
                completed_steps: self.progress.step(),
                evaluated: !self.progress.is_evaluation_due(),
            },
            state: self.trainer.state_hash().to_owned(),
        };
        let all: Vec<RankState> = all_gather(&mut group, &mine)?;
        if let Some(other) = all.iter().position(|rank| rank.tokens.differ(&all[0].tokens)) {
            return Err(TrainError::OtherInputs { rank: other });
        }
        let newest = all.iter().map(|other| other.position).max().unwrap_or(mine.position);
        let holders: Vec<usize> = (0..all.len()).filter(|&rank| all[rank].position == newest).collect();
        let root = holders.first().copied().unwrap_or(0);
        let newest_states: Vec<(u64, &str)> =
            holders.iter().map(|&rank| (newest.completed_steps, all[rank].state.as_str())).collect();
        // Hosts may compute different initial adapters from the same base, even with equal GPUs.
        // Before the first step, adopting another rank's adapter loses no training.
        let may_differ =
            newest.completed_steps == 0 && self.job.adapter.init_lora_weights != InitLoraWeights::Default;
        if let Some(diverged) = find_diverged_rank(&newest_states).filter(|_| !may_differ) {
            return Err(TrainError::Diverged { step: newest.completed_steps, rank: holders[diverged] });
        }
        if !all.iter().all(|other| other.is_at(&all[root])) {
            let mut bytes = if group.rank() == root { self.checkpoint()? } else { Vec::new() };
            group.broadcast(root, &mut bytes)?;
            if !mine.is_at(&all[root]) {
                self.restore(&bytes)?;
            }
        }
        let device = self.trainer.engine().base().device();
        let process_group = ProcessGroup::new(group, &preference.into(), device)?;
        self.trainer.replace_group(process_group);
        Ok(())
    }

    /// Leaves the group and closes its connections. To continue, the run joins another group.
    ///
    /// # Errors
    /// The device is lost: work of the group on the device cannot be aborted.
    pub fn leave(&mut self) -> Result<(), TrainError> {
        self.trainer.replace_group(ProcessGroup::single()).leave()
    }

    /// Returns why the group's gradients are sent over TCP although its machines have several GPUs,
    /// and the remedy. `None` if NCCL sends them or TCP is intended.
    pub fn fallback(&self) -> Option<&str> {
        self.trainer.process_group().fallback()
    }

    /// Returns the sizes of the run.
    pub fn facts(&self) -> &RunFacts {
        &self.facts
    }

    /// Returns the number of completed steps.
    pub fn completed_steps(&self) -> u64 {
        self.progress.step()
    }

    /// Returns whether training has ended. This can also be true for a restored run.
    pub fn is_finished(&self) -> bool {
        self.progress.is_finished()
    }

    /// Returns the records of the completed steps.
    pub fn history(&self) -> &[StepRecord] {
        self.progress.history()
    }

    /// Iterates over the metrics of the steps after `step`, up to the last step whose evaluation is
    /// not due any more. A rank that becomes rank 0 reads the metrics of earlier steps from this
    /// iterator, including steps that it did not compute itself.
    pub fn metrics_after(&self, step: u64) -> impl Iterator<Item = StepMetrics> {
        let mut num_tokens = self.rows.tokens(step);
        let evaluated = self.progress.step() - u64::from(self.progress.is_evaluation_due());
        (step..evaluated).map(move |before| {
            num_tokens += self.rows.tokens_in(before);
            self.metrics(before + 1, num_tokens)
        })
    }

    /// Returns the metrics of a completed step, after which `num_tokens` tokens have been seen.
    fn metrics(&self, step: u64, num_tokens: u64) -> StepMetrics {
        let record = &self.progress.history()[step as usize - 1];
        let is_last = self.progress.is_finished() && step == self.progress.step();
        let logged = is_last || self.is_logged(step);
        let loss = match logged {
            true => {
                let last_logged = (1..step).rev().find(|earlier| self.is_logged(*earlier));
                self.progress.mean_loss(last_logged.unwrap_or(0) + 1, step)
            }
            false => record.loss.unwrap_or(f64::NAN),
        };
        StepMetrics {
            step,
            loss,
            grad_norm: record.grad_norm.unwrap_or(f64::NAN),
            learning_rate: self.trainer.learning_rate(step - 1),
            epoch: step as f64 / self.facts.steps_per_epoch.max(1) as f64,
            num_tokens,
            eval_loss: record.eval_loss,
            logged,
        }
    }

    /// Returns whether a step is logged, even if training does not end with it.
    fn is_logged(&self, step: u64) -> bool {
        step.is_multiple_of(self.job.training.logging_steps) || self.evaluator.is_due_after(step)
    }

    /// Returns the files of the result: the adapter in PEFT's format, the tokenizer's files, and
    /// `receipt.json`. The adapter's files are parsed, and compared with the trained adapter on the
    /// first rows of the evaluation data, or of the training data if there is none.
    ///
    /// # Errors
    /// The logits of the parsed adapter differ ([`TrainError::Export`]), or a file of the tokenizer
    /// cannot be read.
    pub fn export(&self) -> Result<Vec<ResultFile>, TrainError> {
        let engine = self.trainer.engine();
        let (base, last) = (engine.base(), engine.adapter());
        let adapter = match self.evaluator.best_params() {
            Some(best) => &last.with_params(best.to_vec(), None)?,
            None => last,
        };
        let rows = sample_rows(self.evaluator.dataset().unwrap_or_else(|| self.rows.dataset()));
        let (mut files, export) = adapter_files(&self.job, base, adapter, &rows)?;
        files.extend(tokenizer_files(&self.tokenizer)?);
        let receipt = self.receipt(&files, export)?;
        let mut bytes =
            serde_json::to_vec_pretty(&receipt).map_err(|e| FieldError::new(RECEIPT, e.to_string()))?;
        bytes.push(b'\n');
        files.push(ResultFile { name: RECEIPT.into(), bytes });
        Ok(files)
    }

    /// Returns which adapter [`Self::export`] exports, if training ends now.
    pub fn exported_adapter(&self) -> ExportedAdapter {
        let best = self.evaluator.best_params().and(self.progress.best().best);
        let step = best.map_or(self.progress.step(), |(_, step)| step);
        let record = self.history().iter().find(|record| record.step == step);
        ExportedAdapter {
            step,
            eval_loss: record.and_then(|record| record.eval_loss),
            stopped_early: self.progress.step() < self.facts.total_steps,
        }
    }

    /// Returns the receipt of a result with these `files`.
    fn receipt(&self, files: &[ResultFile], export: LogitDifference) -> Result<Receipt, TrainError> {
        let hashes =
            files.iter().map(|file| FileHash { name: file.name.clone(), sha256: sha256(&file.bytes) });
        let (weights, others): (Vec<FileHash>, Vec<FileHash>) =
            hashes.partition(|file| file.name == ADAPTER_WEIGHTS);
        let inputs = self.input_hashes(self.completed_steps());
        Ok(Receipt {
            format: 1,
            numerics_id: numerics_id(self.trainer.engine().base().device())?,
            job: JobSpec { workers: WorkersSpec::default(), ..self.job.clone() },
            base_sha256: inputs.base,
            train_sha256: inputs.train,
            train_files_sha256: inputs.train_files,
            eval_sha256: inputs.eval,
            order_sha256: inputs.order,
            trainable_parameters: self.facts.trainable_parameters,
            adapter_step: self.exported_adapter().step,
            adapter_sha256: weights.into_iter().map(|file| file.sha256).collect(),
            files: others,
            export: Some(export),
            steps: self.history().to_vec(),
        })
    }

    /// Returns the hashes of the run's inputs, and of the order of the rows in the first `steps`
    /// steps.
    pub(crate) fn input_hashes(&self, steps: u64) -> InputHashes {
        InputHashes {
            base: self.trainer.engine().base().sha256().to_owned(),
            train: self.rows.sha256().to_owned(),
            train_files: self.rows.files_sha256(),
            eval: self.evaluator.sha256().map(str::to_owned),
            order: self.rows.order_sha256(steps),
        }
    }
}
