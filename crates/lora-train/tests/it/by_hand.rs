//! A run against its definition: the same steps, with the engine driven by hand.

use lora_data::{BatchPlan, Dataset, Tokenizer, collate};
use lora_model::{Adapter, PassOptions};
use lora_ops::adamw::AdamWSettings;
use lora_spec::{ActivationCheckpointing, LrSchedulerType};
use lora_train::{Engine, GradientAccumulation, Partition, ProcessGroup, StepOutcome, learning_rate};

use crate::common::Fixture;

/// Every setting of the steps has another value than its default. `tests/golden/jobs` compares such
/// a job with PEFT within a tolerance; here the state after every step has the same bits.
#[test]
fn a_run_has_the_bits_of_an_engine_that_is_driven_by_hand() {
    let mut fixture = Fixture::new();
    fixture.job.adapter.lora_dropout = 0.3;
    fixture.job.adapter.use_rslora = true;
    fixture.job.adapter.lora_alpha = 5.0;
    let training = &mut fixture.job.training;
    training.micro_batch_size = 5;
    training.lr_scheduler_type = LrSchedulerType::Linear;
    training.warmup_steps = 2.0;
    training.adam_beta1 = 0.8;
    training.adam_beta2 = 0.9;
    training.adam_epsilon = 1e-4;
    training.weight_decay = 0.3;
    training.max_grad_norm = 3.0;
    training.seed = 3;
    let job = &fixture.job;
    let (training, base) = (&job.training, fixture.base());
    let tokenizer = Tokenizer::load(&job.model.base.as_path().into()).unwrap();
    let rows = Dataset::read(&(&job.data.train[0]).into(), &tokenizer, &job.data).unwrap();
    let plan = BatchPlan::for_job(job, &rows);
    let adapter =
        Adapter::init(&base, &job.model.base.as_path().into(), &job.adapter, training.seed).unwrap();
    let adamw = AdamWSettings { beta1: 0.8, beta2: 0.9, eps: 1e-4, weight_decay: 0.3 };
    let mut engine = Engine::new(base.clone(), adapter, training.optim, adamw).unwrap();
    let mut alone = ProcessGroup::single();
    let mut run = fixture.run_over(base);
    let total = run.facts().total_steps;
    let mut norms = Vec::new();
    for step in 0..total {
        let micro_batches = plan.step(step);
        let partition = Partition::new(micro_batches.len(), 1).unwrap();
        let mut accumulation = GradientAccumulation::begin(&mut engine, partition, &mut alone).unwrap();
        for micro_batch in &micro_batches {
            let batch = collate(&rows, micro_batch);
            let pass =
                PassOptions { checkpointing: ActivationCheckpointing::None, dropout: 0.3, seed: 3, step };
            accumulation.forward_backward(&batch, pass, &mut alone).unwrap();
        }
        let accumulated = accumulation.finish().unwrap();
        let weights: f64 = accumulated.losses().iter().map(|(_, weight)| weight).sum();
        let reduced = accumulated.reduce(&mut alone, weights).unwrap();
        let norm = reduced.norm();
        norms.push(norm);
        let lr = learning_rate(training, step, total);
        reduced.optim_step(lr, 3.0).unwrap();

        let report = run.step(|| false).unwrap();
        assert_eq!(report.outcome == StepOutcome::Finished, step + 1 == total);
        assert_eq!((report.metrics.grad_norm, report.metrics.learning_rate), (norm, lr), "step {step}");
        assert_eq!(run.history().last().unwrap().state, engine.state_hash().unwrap(), "step {step}");
    }
    assert!(norms.iter().any(|norm| *norm < 3.0) && norms.iter().any(|norm| *norm > 3.0), "{norms:?}");
}
