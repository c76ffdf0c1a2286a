//! Adapters that are initialized from the base's weights.

use candle_core::safetensors::load_buffer;
use candle_core::{Device, Tensor};
use lora_collective::backend_choice::Collective;
use lora_spec::{InitLoraWeights, QuantizationType};
use lora_train::{InputPaths, Run, TrainError, verify};
use safetensors::SafeTensors;

use crate::common::{Fixture, finish, on_ranks, write_result};

const WEIGHTS: &str = "adapter_model.safetensors";

fn fixture(init_lora_weights: InitLoraWeights) -> Fixture {
    let mut fixture = Fixture::new();
    fixture.job.adapter.init_lora_weights = init_lora_weights;
    // With dropout, a mask could wrongly apply to the frozen terms too.
    fixture.job.adapter.lora_dropout = 0.1;
    if init_lora_weights == InitLoraWeights::Loftq {
        fixture.job.model.quantization = QuantizationType::Nf4;
        fixture.job.adapter.loftq_iter = 2;
    }
    fixture
}

#[test]
fn initialization_is_the_same_on_every_rank_and_after_a_resume() {
    for (init, rank) in [
        (InitLoraWeights::Pissa, 8),
        (InitLoraWeights::PissaNiter(2), 8),
        (InitLoraWeights::Olora, 8),
        (InitLoraWeights::Loftq, 4),
    ] {
        let fixture = fixture(init);
        let mut run = fixture.run();
        let expected = finish(&mut run);
        let adapter = load_buffer(&expected[WEIGHTS], &Device::Cpu).unwrap();
        let a = &adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"];
        assert_eq!(a.dims(), [rank, 32], "{init}");
        let losses: Vec<f64> = run.history().iter().filter_map(|record| record.loss).collect();
        assert!(losses[losses.len() - 1] < losses[0], "{init}: {losses:?}");

        let of_ranks = on_ranks(2, 2, |group| {
            let mut run = fixture.run();
            run.join(group, Collective::Auto).unwrap();
            finish(&mut run)
        });
        assert!(of_ranks.iter().all(|files| *files == expected), "{init}");

        let mut first = fixture.run();
        first.step(|| true).unwrap();
        let mut second = fixture.run();
        second.restore(&first.checkpoint().unwrap()).unwrap();
        assert_eq!(finish(&mut second), expected, "{init}");

        let out = write_result(fixture.dir.path(), &expected);
        assert_eq!(verify(&out, &InputPaths::default(), 2).unwrap().replayed_steps, 2, "{init}");
    }
}

/// A worker keeps the base in memory for later jobs, whose files have other paths.
#[test]
fn loftq_reads_the_files_of_its_own_job() {
    let (fixture, other) = (fixture(InitLoraWeights::Loftq), fixture(InitLoraWeights::Loftq));
    let expected = finish(&mut fixture.run());
    let base = other.base();
    std::fs::remove_dir_all(&other.job.model.base).unwrap();
    assert_eq!(finish(&mut fixture.run_over(base))[WEIGHTS], expected[WEIGHTS]);
}

/// Returns the run's checkpoint with slightly changed first parameters, as another machine might
/// have computed them.
fn perturbed_checkpoint(run: &Run) -> Vec<u8> {
    let bytes = run.checkpoint().unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let mut tensors = load_buffer(&bytes, &Device::Cpu).unwrap();
    for name in ["params", "taken_off"] {
        let Some(tensor) = tensors.get(name) else { continue };
        let mut values: Vec<f32> = tensor.to_vec1().unwrap();
        values[0] *= 1.0 + 1e-6;
        let len = values.len();
        tensors.insert(name.into(), Tensor::from_vec(values, len, &Device::Cpu).unwrap());
    }
    safetensors::serialize(&tensors, header.metadata().clone()).unwrap()
}

#[test]
fn ranks_adopt_the_initial_adapter_of_rank_0() {
    let join = |init| {
        let fixture = fixture(init);
        let expected = finish(&mut fixture.run());
        let results = on_ranks(2, 1, |group| {
            let mut run = fixture.run();
            if group.rank() == 1 {
                let other = perturbed_checkpoint(&run);
                run.restore(&other).unwrap();
            }
            run.join(group, Collective::Auto).map(|()| finish(&mut run))
        });
        (expected, results)
    };
    let (expected, results) = join(InitLoraWeights::Pissa);
    for files in results {
        assert_eq!(files.unwrap(), expected, "rank 0's initial adapter is used");
    }
    // An adapter that is not computed from the weights must have the same bits on all ranks.
    let (_, results) = join(InitLoraWeights::Default);
    assert!(results.iter().all(|it| matches!(it, Err(TrainError::Diverged { step: 0, .. }))));
}
