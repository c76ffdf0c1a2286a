//! One rank's part of a job.

use std::ops::Range;
use std::sync::Arc;

use lora_collective::Group;
use lora_collective::tree::{partition, sum_f64};
use lora_data::{BatchPlan, Dataset, MicroBatch, MicroBatchRows, Tokenizer, collate, eval_micro_batches};
use lora_model::{Adapter, Base, Batch, Pass, PeftAdapter, sha256};
use lora_ops::adamw::AdamW;
use lora_ops::read_f32;
use lora_spec::{FieldError, JobSpec, ModelConfig};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{self, Progress};
use crate::engine::{Engine, LossSums};
use crate::exchange::{StepMessage, all_gather, loss_bits, odd_one_out};
use crate::schedule::learning_rate;
use crate::{StepRecord, TrainError};

/// Steps in a row with gradients that are not finite, after which a job ends.
const NOT_FINITE_LIMIT: u64 = 10;

/// Sizes of a run that people want to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunFacts {
    /// Optimizer steps of the whole job.
    pub total_steps: u64,
    /// Optimizer steps of a pass over the data.
    pub steps_per_epoch: u64,
    /// Trained parameters.
    pub trainable_parameters: u64,
    /// Parameters of base and adapter.
    pub total_parameters: u64,
    /// Bytes of the adapter's parameters (f32).
    pub adapter_bytes: u64,
}

/// What a step did, as people see it; the same on every rank.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Completed steps, this one included.
    pub step: u64,
    /// Mean loss a trained token, in nats.
    pub loss: f64,
    /// 2-norm of the mean gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Passes over the data after the step.
    pub epoch: f64,
    /// Tokens seen so far, padding not counted.
    pub num_tokens: u64,
    /// Mean evaluation loss a trained token, where the step was evaluated.
    pub eval_loss: Option<f64>,
}

/// A completed step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Its numbers.
    pub metrics: StepMetrics,
    /// Whether `save_steps` asks for a checkpoint now.
    pub checkpoint_due: bool,
    /// Whether `logging_steps` (or an evaluation, or the end) asks for the metrics to be reported.
    pub log: bool,
    /// What comes next.
    pub outcome: StepOutcome,
    /// Bytes this rank sent in the step.
    pub reduced_bytes: u64,
    /// Something that people should know of, such as a skipped step.
    pub notice: Option<String>,
}

/// What comes after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepOutcome {
    /// The next step.
    Continue,
    /// A rank was asked to pause: all stop here alike.
    Paused,
    /// Training has ended; the adapter can be exported.
    Finished,
}

/// One rank's part of a job, between two steps.
pub struct Run {
    pub(crate) job: JobSpec,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) train: Dataset,
    pub(crate) eval: Option<Dataset>,
    pub(crate) plan: BatchPlan,
    pub(crate) engine: Engine,
    pub(crate) progress: Progress,
    /// Parameters at the best evaluation, where the job wants them at the end.
    pub(crate) best_params: Option<Vec<f32>>,
    facts: RunFacts,
    eval_batches: Vec<MicroBatchRows>,
    group: Group,
    /// Hash of the state after the last completed step.
    state_hash: String,
}

impl Run {
    /// Reads the data and makes the adapter: the state before the first step, on a group of one.
    pub fn prepare(job: &JobSpec, base: Arc<Base>) -> Result<Self, TrainError> {
        job.check()?;
        let tokenizer = Tokenizer::load(&base.dir)?;
        let read = |path| Dataset::read(path, &tokenizer, job.data.max_length, job.data.long_rows);
        let train = read(&job.data.train)?;
        let eval = job.data.eval.as_deref().map(read).transpose()?;
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
        let plan = BatchPlan::of_job(job, &train);
        let eval_batches = eval
            .as_ref()
            .map(|eval| eval_micro_batches(&eval.lengths(), training.micro_batch_size))
            .unwrap_or_default();
        let adapter = initial_adapter(job, &base.config)?;
        let identity = identity(job, &base, &train, eval.as_ref(), &adapter)?;
        let trainable = adapter.layout().len as u64;
        let facts = RunFacts {
            total_steps: training.total_steps(plan.steps_per_epoch()),
            steps_per_epoch: plan.steps_per_epoch(),
            trainable_parameters: trainable,
            total_parameters: base.config.parameters() + trainable,
            adapter_bytes: 4 * trainable,
        };
        let engine = Engine::new(base, adapter)?;
        Ok(Self {
            state_hash: engine.state_hash()?,
            progress: Progress { identity, ..Progress::default() },
            best_params: None,
            group: Group::single(),
            job: job.clone(),
            tokenizer,
            train,
            eval,
            plan,
            eval_batches,
            engine,
            facts,
        })
    }

    /// Goes on from a checkpoint of the same job.
    pub fn restore(&mut self, checkpoint: &[u8]) -> Result<(), TrainError> {
        (self.progress, self.best_params) =
            checkpoint::read(&mut self.engine, checkpoint, &self.progress.identity)?;
        self.state_hash = self.engine.state_hash()?;
        Ok(())
    }

    /// Joins the ranks of `group`: the newest of their states wins and is broadcast. Equally new states must be equal.
    pub fn join(&mut self, mut group: Group) -> Result<(), TrainError> {
        let mine = (self.progress.step, self.state_hash.clone());
        let states: Vec<(u64, String)> = all_gather(&mut group, &mine)?;
        let newest = states.iter().map(|(step, _)| *step).max().unwrap_or(0);
        let holders: Vec<usize> = (0..states.len()).filter(|&rank| states[rank].0 == newest).collect();
        let held: Vec<(u64, &str)> = holders.iter().map(|&rank| (newest, states[rank].1.as_str())).collect();
        if let Some(odd) = odd_one_out(&held) {
            return Err(TrainError::Diverged { step: newest, rank: holders[odd] });
        }
        if holders.len() < states.len() {
            let root = holders.first().copied().unwrap_or(0);
            let mut bytes = if group.rank() == root { self.checkpoint()? } else { Vec::new() };
            group.broadcast(root, &mut bytes)?;
            if mine.0 < newest {
                self.restore(&bytes)?;
            }
        }
        self.group = group;
        Ok(())
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

    /// The numbers of the completed steps.
    pub fn history(&self) -> &[StepRecord] {
        &self.progress.history
    }

    /// A file from which an equal run goes on bit by bit.
    pub fn checkpoint(&self) -> Result<Vec<u8>, TrainError> {
        checkpoint::write(&self.engine, &self.progress, self.best_params.as_deref())
    }

    /// One optimizer step; with `pause` on any rank, all stop after it.
    pub fn step(&mut self, pause: bool) -> Result<StepReport, TrainError> {
        let step = self.progress.step;
        let sent_before = self.group.bytes_sent();
        let micro_batches = self.plan.step(step);
        let ranges = partition(micro_batches.len(), self.group.world_size())?;
        let (losses, not_finite) = self.accumulate(step, &micro_batches, &ranges)?;
        let messages = all_gather(
            &mut self.group,
            &StepMessage {
                step,
                state: self.state_hash.clone(),
                pause,
                losses: loss_bits(&losses),
                not_finite,
            },
        )?;
        let states: Vec<(u64, &str)> = messages.iter().map(|m| (m.step, m.state.as_str())).collect();
        if let Some(rank) = odd_one_out(&states) {
            return Err(TrainError::Diverged { step, rank });
        }
        let losses: Vec<LossSums> = messages.iter().flat_map(StepMessage::losses).collect();
        let (loss_sum, weight_sum) = total(&losses);
        let mean_loss = loss_sum / weight_sum;

        let mut not_finite = messages.iter().find_map(|m| m.not_finite.clone());
        let divisor = not_finite.is_none().then_some(weight_sum);
        let norm = self.engine.reduce(&mut self.group, micro_batches.len(), &ranges, divisor)?;
        let grad_norm = norm.unwrap_or(f64::NAN);
        if not_finite.is_none() && !grad_norm.is_finite() {
            not_finite = Some("the norm of the summed gradient".into());
        }
        let training = &self.job.training;
        let lr = learning_rate(training, step, self.facts.total_steps);
        let mut notice = None;
        match not_finite {
            None => {
                let adamw = AdamW {
                    lr,
                    beta1: training.adam_beta1,
                    beta2: training.adam_beta2,
                    eps: training.adam_epsilon,
                    weight_decay: training.weight_decay,
                };
                self.engine.optim_step(adamw, grad_norm, training.max_grad_norm)?;
                self.progress.not_finite_in_a_row = 0;
            }
            Some(what) => {
                let count = self.progress.not_finite_in_a_row + 1;
                if count >= NOT_FINITE_LIMIT {
                    return Err(TrainError::NotFinite { step: step + 1, what, count });
                }
                self.progress.not_finite_in_a_row = count;
                notice = Some(format!("step {}: {what} is not finite; the step was skipped", step + 1));
            }
        }
        self.state_hash = self.engine.state_hash()?;
        let reduced_bytes = self.group.bytes_sent() - sent_before;
        self.complete(
            mean_loss,
            grad_norm,
            lr,
            pause || messages.iter().any(|m| m.pause),
            notice,
            reduced_bytes,
        )
    }

    /// This rank's micro-batches of the step: their gradients are accumulated. Returns their losses, and the
    /// first tensor that is not finite.
    fn accumulate(
        &mut self,
        step: u64,
        micro_batches: &[MicroBatchRows],
        ranges: &[Range<usize>],
    ) -> Result<(Vec<LossSums>, Option<String>), TrainError> {
        let range = ranges[self.group.rank()].clone();
        self.engine.start(micro_batches.len(), range.clone())?;
        let training = &self.job.training;
        let pass = Pass {
            checkpointing: training.activation_checkpointing,
            dropout: self.job.adapter.lora_dropout,
            seed: training.seed,
            step,
        };
        let mut losses = Vec::with_capacity(range.len());
        let mut first = None;
        for rows in &micro_batches[range] {
            let batch = collate(&self.train, rows);
            let (sums, not_finite) = self.engine.forward_backward(view(&batch), pass)?;
            losses.push(sums);
            first = first.or(not_finite);
        }
        Ok((losses, first))
    }

    /// Evaluates where it is due, keeps the books and says what comes next.
    fn complete(
        &mut self,
        loss: f64,
        grad_norm: f64,
        learning_rate: f64,
        pause: bool,
        notice: Option<String>,
        reduced_bytes: u64,
    ) -> Result<StepReport, TrainError> {
        let step = self.progress.step + 1;
        let training = self.job.training.clone();
        let mut finished = step >= self.facts.total_steps;
        let eval_due = self.eval.is_some() && (finished || step.is_multiple_of(training.eval_steps));
        let eval_loss = if eval_due { Some(self.evaluate()?) } else { None };
        if let Some(eval_loss) = eval_loss {
            let best = &mut self.progress.best;
            if best.observe(&training, step, eval_loss) && training.load_best_model_at_end {
                self.best_params = Some(read_f32(self.engine.adapter().params(), <[f32]>::to_vec)?);
            }
            finished |= best.is_hopeless(&training);
        }
        let progress = &mut self.progress;
        progress.step = step;
        progress.finished = finished;
        progress.history.push(StepRecord {
            step,
            loss: loss.is_finite().then_some(loss),
            grad_norm: grad_norm.is_finite().then_some(grad_norm),
            state: self.state_hash.clone(),
            eval_loss: eval_loss.filter(|loss| loss.is_finite()),
        });
        let outcome = match (finished, pause) {
            (true, _) => StepOutcome::Finished,
            (false, true) => StepOutcome::Paused,
            (false, false) => StepOutcome::Continue,
        };
        let metrics = StepMetrics {
            step,
            loss,
            grad_norm,
            learning_rate,
            epoch: step as f64 / self.facts.steps_per_epoch.max(1) as f64,
            num_tokens: self.plan.tokens(step),
            eval_loss,
        };
        Ok(StepReport {
            checkpoint_due: outcome == StepOutcome::Continue && step.is_multiple_of(training.save_steps),
            log: step.is_multiple_of(training.logging_steps)
                || eval_loss.is_some()
                || outcome != StepOutcome::Continue,
            metrics,
            outcome,
            reduced_bytes,
            notice,
        })
    }

    /// Mean loss a trained token over the evaluation rows, summed in the canonical order.
    fn evaluate(&mut self) -> Result<f64, TrainError> {
        let Some(eval) = &self.eval else { return Ok(f64::NAN) };
        let ranges = partition(self.eval_batches.len(), self.group.world_size())?;
        let mut losses = Vec::new();
        for rows in &self.eval_batches[ranges[self.group.rank()].clone()] {
            let batch = collate(eval, rows);
            losses.push(self.engine.eval(view(&batch))?);
        }
        let gathered: Vec<Vec<(u64, u64)>> = all_gather(&mut self.group, &loss_bits(&losses))?;
        let bits = gathered.iter().flatten().map(|(l, w)| (f64::from_bits(*l), f64::from_bits(*w)));
        let (loss_sum, weight_sum) = total(&bits.collect::<Vec<_>>());
        Ok(loss_sum / weight_sum)
    }
}

/// A collated micro-batch as the model takes it.
pub(crate) fn view(batch: &MicroBatch) -> Batch<'_> {
    Batch {
        batch: batch.batch,
        seq: batch.seq_len,
        tokens: &batch.tokens,
        targets: &batch.targets,
        weights: &batch.weights,
        rows: &batch.rows,
    }
}

fn total(losses: &[LossSums]) -> LossSums {
    let (sums, weights): (Vec<f64>, Vec<f64>) = losses.iter().copied().unzip();
    (sum_f64(&sums), sum_f64(&weights))
}

/// The adapter that `job` starts from over a base of `config`: a fresh one, or that of `adapter.init_from`, which must have
/// the form that the job asks for.
pub fn initial_adapter(job: &JobSpec, config: &ModelConfig) -> Result<Adapter, TrainError> {
    let fresh = Adapter::new(config, &job.adapter, job.training.seed)?;
    let Some(dir) = &job.adapter.init_from else { return Ok(fresh) };
    let field = |message: String| FieldError::new("adapter.init_from", message);
    let adapter =
        PeftAdapter::read(dir).and_then(|adapter| adapter.over(config)).map_err(|e| field(e.to_string()))?;
    if adapter.layout() != fresh.layout() || adapter.scaling() != fresh.scaling() {
        return Err(field(format!(
            "the adapter in {} has another r, scaling or set of modules than adapter.r, adapter.lora_alpha, \
             adapter.use_rslora and adapter.target_modules ask for; make them equal",
            dir.display()
        ))
        .into());
    }
    Ok(adapter)
}

/// Hash of everything the job's bits depend on, beside the build: settings and contents, not names and places.
fn identity(
    job: &JobSpec,
    base: &Base,
    train: &Dataset,
    eval: Option<&Dataset>,
    adapter: &Adapter,
) -> Result<String, TrainError> {
    let mut adapter_spec = job.adapter.clone();
    adapter_spec.init_from = None;
    let init: Vec<u8> = read_f32(adapter.params(), |p| p.iter().flat_map(|v| v.to_le_bytes()).collect())?;
    let everything = serde_json::json!({
        "base": base.sha256(),
        "dtype": job.model.dtype,
        "adapter": adapter_spec,
        "initial_parameters": sha256(&init),
        "train": train.sha256,
        "eval": eval.map(|eval| &eval.sha256),
        "max_length": job.data.max_length,
        "long_rows": job.data.long_rows,
        "shuffle": job.data.shuffle,
        "training": job.training,
    });
    Ok(sha256(everything.to_string().as_bytes()))
}
