//! One step of a run.
//!
//! Parameters, moments and progress change together, after everything has arrived from the peers.
//! An evaluation follows and stays due until it is complete: if a run is interrupted during an
//! evaluation, its next step begins with this evaluation.

use lora_collective::tree::sum_f64;
use lora_data::collate;
use lora_model::PassOptions;
use lora_ops::adamw::AdamW;
use lora_ops::transfer::to_vec;

use crate::engine::{GradientAccumulation, LossSums, ReducedGradients};
use crate::lr_schedule::learning_rate;
use crate::partition::Partition;
use crate::step_sync::{StepMessage, all_gather, find_diverged_rank, loss_bits};
use crate::{Run, StepOutcome, StepRecord, StepReport, TrainError};

/// The outcome of a step's update of the parameters.
#[derive(Default)]
struct OptimizerOutcome {
    /// Whether a rank was asked to stop.
    stop: bool,
    notice: Option<String>,
}

impl Run {
    /// Runs one optimizer step and the evaluation that is due after it. If an evaluation was
    /// interrupted, only this evaluation runs. `stop` is called when this rank's gradients are
    /// computed; if it returns true on any rank, all ranks stop after the step.
    pub fn step(&mut self, stop: impl FnOnce() -> bool) -> Result<StepReport, TrainError> {
        let (sent_before, tokens_before) = (self.process_group.bytes_sent(), self.num_tokens);
        let evaluation_pending = self.progress.evaluation_due;
        let OptimizerOutcome { stop, notice } =
            if evaluation_pending { OptimizerOutcome::default() } else { self.optimize(stop)? };
        if self.progress.evaluation_due {
            self.evaluate()?;
        }
        let training = &self.job.training;
        let step = self.progress.step;
        self.progress.finished =
            step >= self.facts().total_steps || self.progress.best.patience_exhausted(training);
        let outcome = match (self.progress.finished, stop) {
            (true, _) => StepOutcome::Finished,
            (false, true) => StepOutcome::Stopped,
            (false, false) => StepOutcome::Continue,
        };
        Ok(StepReport {
            metrics: self.metrics(step, self.num_tokens),
            checkpoint_due: outcome == StepOutcome::Continue && step.is_multiple_of(training.save_steps),
            outcome,
            tokens: self.num_tokens - tokens_before,
            reduced_bytes: self.process_group.bytes_sent() - sent_before,
            notice,
        })
    }

    /// Computes the gradients, reduces them and updates the parameters.
    fn optimize(&mut self, stop: impl FnOnce() -> bool) -> Result<OptimizerOutcome, TrainError> {
        let step = self.progress.step;
        let training = &self.job.training;
        let micro_batches = self.plan.step(step);
        let partition = Partition::new(micro_batches.len(), self.process_group.world_size())?;
        let pass = PassOptions {
            checkpointing: training.activation_checkpointing,
            dropout: self.job.adapter.lora_dropout,
            seed: training.seed,
            step,
        };
        let range = partition.range(self.process_group.rank());
        let mut accumulation =
            GradientAccumulation::begin(&mut self.engine, partition, &mut self.process_group)?;
        for rows in &micro_batches[range] {
            self.process_group.check_cancelled()?;
            let batch = collate(&self.train, rows);
            accumulation.forward_backward(&batch, pass, &mut self.process_group)?;
        }
        let accumulated = accumulation.finish()?;
        let messages = all_gather(
            self.process_group.group(),
            &StepMessage {
                step,
                state: self.state_hash.clone(),
                stop: stop(),
                losses: loss_bits(accumulated.losses()),
                not_finite: accumulated.first_not_finite()?,
            },
        )?;
        let states: Vec<(u64, &str)> = messages.iter().map(|m| (m.step, m.state.as_str())).collect();
        if let Some(rank) = find_diverged_rank(&states) {
            return Err(TrainError::Diverged { step, rank });
        }
        let losses: Vec<LossSums> = messages.iter().flat_map(StepMessage::losses).collect();
        let (loss_sum, weight_sum) = sum_losses(&losses);
        let loss = loss_sum / weight_sum;

        let reduced = match messages.iter().find_map(|m| m.not_finite.clone()) {
            None => Ok(accumulated.reduce(&mut self.process_group, weight_sum)?),
            Some(what) => {
                accumulated.discard(&mut self.process_group)?;
                Err(what)
            }
        };
        let grad_norm = reduced.as_ref().map_or(f64::NAN, ReducedGradients::norm);
        // From here to the end of this function, nothing waits for peers or can be cancelled.
        let finite_gradients = reduced.and_then(|reduced| match grad_norm.is_finite() {
            true => Ok(reduced),
            false => Err("the norm of the summed gradient".to_owned()),
        });
        let notice = match finite_gradients {
            Ok(gradients) => {
                let adamw = AdamW {
                    lr: learning_rate(training, step, self.facts.total_steps),
                    beta1: training.adam_beta1,
                    beta2: training.adam_beta2,
                    eps: training.adam_epsilon,
                    weight_decay: training.weight_decay,
                };
                gradients.optim_step(adamw, training.max_grad_norm)?;
                self.progress.not_finite_in_a_row = 0;
                None
            }
            Err(what) => Some(self.progress.skip_step(what)?),
        };
        self.state_hash = self.engine.state_hash()?;
        let finite = |number: f64| number.is_finite().then_some(number);
        self.progress.step = step + 1;
        self.progress.evaluation_due = self.is_evaluated_after(step + 1);
        self.progress.history.push(StepRecord {
            step: step + 1,
            loss: finite(loss),
            grad_norm: finite(grad_norm),
            state: self.state_hash.clone(),
            eval_loss: None,
        });
        self.num_tokens += self.tokens_in(&micro_batches);
        Ok(OptimizerOutcome { stop: messages.iter().any(|m| m.stop), notice })
    }

    /// Runs the evaluation after the last completed step.
    fn evaluate(&mut self) -> Result<(), TrainError> {
        let loss = self.evaluation_loss()?;
        let training = &self.job.training;
        let mut best = self.progress.best;
        if best.observe(training, self.progress.step, loss) && training.load_best_model_at_end {
            self.best_params = Some(to_vec(self.engine.adapter().params())?);
        }
        self.progress.best = best;
        if let Some(record) = self.progress.history.last_mut() {
            record.eval_loss = loss.is_finite().then_some(loss);
        }
        self.progress.evaluation_due = false;
        Ok(())
    }

    /// Returns the mean loss per trained token of the evaluation rows, summed in the canonical
    /// order.
    fn evaluation_loss(&mut self) -> Result<f64, TrainError> {
        let Some(eval) = &self.eval else { return Ok(f64::NAN) };
        let partition = Partition::new(self.eval_batches.len(), self.process_group.world_size())?;
        let mut losses = Vec::new();
        for rows in &self.eval_batches[partition.range(self.process_group.rank())] {
            self.process_group.check_cancelled()?;
            let batch = collate(eval, rows);
            losses.push(self.engine.eval(&batch)?);
        }
        let gathered: Vec<Vec<(u64, u64)>> = all_gather(self.process_group.group(), &loss_bits(&losses))?;
        let bits = gathered.iter().flatten().map(|(l, w)| (f64::from_bits(*l), f64::from_bits(*w)));
        let (loss_sum, weight_sum) = sum_losses(&bits.collect::<Vec<_>>());
        Ok(loss_sum / weight_sum)
    }
}

fn sum_losses(losses: &[LossSums]) -> LossSums {
    let (sums, weights): (Vec<f64>, Vec<f64>) = losses.iter().copied().unzip();
    (sum_f64(&sums), sum_f64(&weights))
}
