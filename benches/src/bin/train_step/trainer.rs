//! Training steps of an engine without other ranks.

use std::sync::Arc;

use anyhow::{Context, Result};
use lora_model::{Adapter, Base, PassOptions};
use lora_ops::adamw::AdamWSettings;
use lora_spec::{ActivationCheckpointing, AdapterSpec, Document, MicroBatch, Optim, Philox};
use lora_train::{Engine, GradientAccumulation, Partition, ProcessGroup};

use crate::args::MicroBatchCase;

/// An engine with a new adapter, and the shape of its only micro-batch.
pub(crate) struct Trainer {
    engine: Engine,
    rows: Vec<u64>,
    seq: usize,
    checkpointing: ActivationCheckpointing,
}

impl Trainer {
    pub(crate) fn new(
        base: Arc<Base>,
        case: MicroBatchCase,
        checkpointing: ActivationCheckpointing,
    ) -> Result<Self> {
        let adapter = Adapter::new(&base.config, &AdapterSpec::default(), 0)?;
        let adamw = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };
        Ok(Self {
            engine: Engine::new(base, adapter, Optim::default(), adamw)?,
            rows: (0..case.rows.get().into()).collect(),
            seq: case.positions.get() as usize,
            checkpointing,
        })
    }

    /// Returns the number of elements of the adapter.
    pub(crate) fn trainable_parameters(&self) -> u64 {
        self.engine.adapter().layout().len as u64
    }

    /// Returns random tokens for the micro-batch of a step.
    pub(crate) fn tokens(&self, step: usize) -> Vec<u32> {
        let vocab = self.engine.base().config.vocab_size as u64;
        let philox = Philox::new(0, "tokens");
        let count = (self.rows.len() * self.seq) as u32;
        (0..count).map(|i| philox.below(vocab, [step as u32, i, 0, 0]) as u32).collect()
    }

    /// Makes one optimizer step and returns the mean loss per token.
    pub(crate) fn step(&mut self, tokens: &[u32], step: usize) -> Result<f64> {
        let mut targets = tokens.to_vec();
        targets.rotate_left(1);
        let batch = MicroBatch {
            rows: Document::whole_rows(self.rows.iter().copied(), self.seq),
            seq_len: self.seq,
            tokens: tokens.to_vec(),
            targets,
            weights: vec![1.0; tokens.len()],
        };
        let pass =
            PassOptions { checkpointing: self.checkpointing, dropout: 0.0, seed: 0, step: step as u64 };
        let mut alone = ProcessGroup::single();
        let partition = Partition::new(1, 1)?;
        let mut accumulation = GradientAccumulation::begin(&mut self.engine, partition, &mut alone)?;
        accumulation.forward_backward(&batch, pass, &mut alone)?;
        let accumulated = accumulation.finish()?;
        let (loss, weight) = *accumulated.losses().first().context("no loss")?;
        accumulated.reduce(&mut alone, weight)?.optim_step(2e-4, 1.0)?;
        Ok(loss / weight)
    }
}
