//! Evaluations, the best adapter, and the sizes of micro-batches.

use std::collections::HashMap;

use lora_spec::LrSchedulerType;
use lora_train::{Receipt, StepOutcome};

use crate::common::{Fixture, finish};

/// Metrics are means over tokens, so they do not depend on how the rows of a step or of an
/// evaluation are divided, and not on whether they are packed. Rows have different numbers of
/// trained tokens, and some steps and evaluations have a smaller last micro-batch.
#[test]
fn metrics_do_not_depend_on_the_size_of_micro_batches() {
    let mut fixture = Fixture::new();
    fixture.job.adapter.lora_dropout = 0.1;
    let mut curves = Vec::new();
    let sizes = [1, 2, 5, 12].map(|size| (size, false)).into_iter().chain([(1, true), (2, true)]);
    for (micro_batch_size, packing) in sizes {
        fixture.job.training.micro_batch_size = micro_batch_size;
        fixture.job.data.packing = packing;
        let mut run = fixture.run();
        finish(&mut run);
        let numbers = run.history().iter().flat_map(|record| {
            [record.loss, record.grad_norm, record.eval_loss].map(|number| number.unwrap_or(0.0))
        });
        curves.push(((micro_batch_size, packing), numbers.collect::<Vec<f64>>()));
    }
    let (_, expected) = &curves[0];
    for ((micro_batch_size, packing), curve) in &curves {
        assert_eq!(curve.len(), expected.len());
        for (index, (got, expected)) in curve.iter().zip(expected).enumerate() {
            let close = (got - expected).abs() <= 2e-5 * expected;
            let case = format!("micro-batches of {micro_batch_size}, packing {packing}");
            assert!(close, "number {index} with {case}: {got}, not {expected}");
        }
    }
}

/// 8 steps with `eval_steps: 3`.
#[test]
fn the_last_step_is_evaluated() {
    let fixture = Fixture::new();
    let mut run = fixture.run();
    finish(&mut run);
    let evaluated = run.history().iter().filter(|record| record.eval_loss.is_some());
    assert_eq!(evaluated.map(|record| record.step).collect::<Vec<_>>(), [3, 6, 8]);
}

/// Returns a job whose learning rate is so high that the last evaluation is not the best one.
fn unstable(learning_rate: f64) -> Fixture {
    let mut fixture = Fixture::new();
    fixture.job.training.learning_rate = learning_rate;
    fixture.job.training.lr_scheduler_type = LrSchedulerType::Constant;
    fixture.job.training.eval_steps = 1;
    fixture.job.training.load_best_model_at_end = true;
    fixture
}

fn receipt(files: &HashMap<String, Vec<u8>>) -> Receipt {
    serde_json::from_slice(&files["receipt.json"]).unwrap()
}

/// Returns the step with the lowest evaluation loss.
fn best_step(receipt: &Receipt) -> u64 {
    let evaluated = receipt.steps.iter().filter_map(|record| Some((record.eval_loss?, record.step)));
    evaluated.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap().1
}

#[test]
fn the_best_adapter_survives_a_resume() {
    // Which evaluation of a diverging run is the best depends on the instruction set.
    let (fixture, expected, best) = [20.0, 10.0, 30.0, 15.0, 40.0]
        .into_iter()
        .find_map(|learning_rate| {
            let mut fixture = unstable(learning_rate);
            fixture.job.training.eval_steps = 3;
            let expected = finish(&mut fixture.run());
            let best = best_step(&receipt(&expected));
            (best < 8).then_some((fixture, expected, best))
        })
        .unwrap();
    let stop = best + 1;
    let mut first = fixture.run();
    for _ in 0..stop {
        assert_eq!(first.step(|| false).unwrap().outcome, StepOutcome::Continue);
    }
    let mut second = fixture.run();
    second.restore(&first.checkpoint().unwrap()).unwrap();
    assert_eq!(second.completed_steps(), stop);
    assert_eq!(finish(&mut second), expected);
}

#[test]
fn the_first_evaluation_can_be_the_best() {
    let mut fixture = unstable(20.0);
    let mut after = |steps| {
        fixture.job.training.max_steps = Some(steps);
        finish(&mut fixture.run())
    };
    let (one, two) = (after(1), after(2));
    let receipt = receipt(&two);
    assert_eq!(best_step(&receipt), 1, "{:?}", receipt.steps);
    assert_eq!(receipt.adapter_step, 1);
    let weights = "adapter_model.safetensors";
    assert!(one[weights] == two[weights], "not the adapter after step 1");
}
