//! Runs of whole jobs on a tiny base: same bits everywhere, exact resume, evaluation, losses that
//! are not finite.

use lora_collective::CancelToken;
use lora_collective::backend_choice::Collective;
use lora_spec::{ActivationCheckpointing, JobFiles, Optim};
use lora_train::{InputPaths, Receipt, Run, StepOutcome, TrainError, verify};

use crate::common::{Fixture, finish, on_ranks, write_base, write_result, write_rows};

const WEIGHTS: &str = "adapter_model.safetensors";

/// 37 rows in steps of 12 and micro-batches of 2: the last step of an epoch has one micro-batch,
/// which is fewer than the ranks.
#[test]
fn every_number_of_ranks_and_threads_gives_the_same_files() {
    let mut fixture = Fixture::new();
    fixture.job.adapter.lora_dropout = 0.1;
    let base = fixture.base();
    let alone = finish(&mut fixture.run_over(base.clone()));
    for (ranks, threads) in [(1, 2), (2, 1), (2, 2), (3, 1), (4, 2)] {
        let results = on_ranks(ranks, threads, |group| {
            let mut run = fixture.run_over(base.clone());
            run.join(group, Collective::Auto).unwrap();
            finish(&mut run)
        });
        for (rank, result) in results.iter().enumerate() {
            assert_eq!(result, &alone, "rank {rank} of {ranks} with {threads} threads");
        }
    }
}

#[test]
fn training_lowers_the_loss_and_changes_every_matrix() {
    let mut fixture = Fixture::new();
    fixture.job.training.num_train_epochs = 6.0;
    let mut run = fixture.run();
    let before = run.checkpoint().unwrap();
    let files = finish(&mut run);
    let receipt: Receipt = serde_json::from_slice(&files["receipt.json"]).unwrap();
    let losses: Vec<f64> = receipt.steps.iter().filter_map(|s| s.loss).collect();
    assert_eq!(losses.len() as u64, run.facts().total_steps);
    assert!(losses[losses.len() - 1] < 0.9 * losses[0], "{losses:?}");
    let load =
        |bytes: &[u8]| candle_core::safetensors::load_buffer(bytes, &candle_core::Device::Cpu).unwrap();
    let initial = load(&before)["params"].to_vec1::<f32>().unwrap();
    let adapter = load(&files[WEIGHTS]);
    assert_eq!(adapter.len(), 2 * 7 * 2);
    for (name, tensor) in adapter {
        let values = tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(values.iter().all(|v| !initial.contains(v) && v.is_finite()), "{name} kept initial values");
    }
}

#[test]
fn checkpoints_are_due_at_multiples_of_save_steps_before_the_end() {
    let mut fixture = Fixture::new();
    (fixture.job.training.save_steps, fixture.job.training.max_steps) = (2, Some(6));
    let mut run = fixture.run();
    let mut due = Vec::new();
    loop {
        let report = run.step(|| false).unwrap();
        if report.checkpoint_due {
            due.push(report.metrics.step);
        }
        if report.outcome != StepOutcome::Continue {
            break;
        }
    }
    // After the last step the result is saved instead.
    assert_eq!(due, [2, 4]);
}

/// A run stops after 2 steps (first epoch) or 6 steps (second epoch). A new run continues from its
/// checkpoint, as in a new process.
#[test]
fn a_resumed_run_gives_the_same_files() {
    resumes(&Fixture::new());
}

/// Some matrices have moments in 8 bits, small ones in f32.
#[test]
fn eight_bit_moments_resume_and_match_on_every_rank() {
    let mut fixture = Fixture::new();
    fixture.job.adapter.r = 128;
    let mut full = fixture.run();
    let other = finish(&mut full);
    fixture.job.training.optim = Optim::Adamw8bit;
    let mut run = fixture.run();
    let expected = finish(&mut run);
    assert_ne!(expected[WEIGHTS], other[WEIGHTS]);
    let last = |run: &Run| run.history().last().unwrap().loss.unwrap();
    assert!((last(&run) - last(&full)).abs() < 0.05 * last(&full), "{} {}", last(&run), last(&full));
    assert!(run.checkpoint().unwrap().len() < full.checkpoint().unwrap().len() * 3 / 4);
    let of_ranks = on_ranks(2, 1, |group| {
        let mut run = fixture.run();
        run.join(group, Collective::Auto).unwrap();
        finish(&mut run)
    });
    assert!(of_ranks.iter().all(|files| *files == expected));
    resumes(&fixture);
}

/// Paging of moments changes no bit, for f32 and for 8-bit moments, also after a resume and on a
/// rank that joins.
#[test]
fn paged_moments_give_the_same_bits() {
    let mut fixture = Fixture::new();
    fixture.job.adapter.r = 128;
    for (plain, paged) in [(Optim::Adamw, Optim::PagedAdamw32bit), (Optim::Adamw8bit, Optim::PagedAdamw8bit)]
    {
        fixture.job.training.optim = plain;
        let mut run = fixture.run();
        let expected = finish(&mut run);
        let checkpoint = run.checkpoint().unwrap();
        fixture.job.training.optim = paged;
        let mut other = fixture.run();
        let files = finish(&mut other);
        assert_eq!(files[WEIGHTS], expected[WEIGHTS], "{paged:?}");
        assert_eq!(other.history(), run.history(), "{paged:?}");
        // A rank that joins gets the moments from the rank that is ahead.
        let of_ranks = on_ranks(2, 1, |group| {
            let mut run = fixture.run();
            if group.rank() == 0 {
                run.step(|| false).unwrap();
                run.step(|| false).unwrap();
            }
            run.join(group, Collective::Auto).unwrap();
            finish(&mut run)
        });
        assert!(of_ranks.iter().all(|of_rank| *of_rank == files), "{paged:?}");
        let refused = fixture.run().restore(&checkpoint).unwrap_err().to_string();
        assert!(refused.contains("another job"), "{refused}");
        resumes(&fixture);
    }
}

/// Checks that a run which stops and resumes gives the files of an uninterrupted run.
fn resumes(fixture: &Fixture) {
    let mut whole = fixture.run();
    let expected = finish(&mut whole);
    assert_eq!(whole.facts().steps_per_epoch, 4);
    for stop in [2, 6] {
        let mut first = fixture.run();
        for _ in 1..stop {
            assert_eq!(first.step(|| false).unwrap().outcome, StepOutcome::Continue);
        }
        assert_eq!(first.step(|| true).unwrap().outcome, StepOutcome::Stopped);
        let checkpoint = first.checkpoint().unwrap();
        let mut second = fixture.run();
        second.restore(&checkpoint).unwrap();
        assert_eq!(second.completed_steps(), stop);
        assert_eq!(finish(&mut second), expected, "stopped after step {stop}");
    }
}

#[test]
fn a_group_uses_the_newest_state_and_stops_together() {
    let fixture = Fixture::new();
    let mut ahead = fixture.run();
    ahead.step(|| false).unwrap();
    ahead.step(|| false).unwrap();
    let checkpoint = ahead.checkpoint().unwrap();
    let expected = finish(&mut fixture.run());
    let results = on_ranks(3, 1, |group| {
        let mut run = fixture.run();
        let rank = group.rank();
        if rank == 1 {
            run.restore(&checkpoint).unwrap();
        }
        run.join(group, Collective::Auto).unwrap();
        assert_eq!(run.completed_steps(), 2);
        let report = run.step(|| rank == 2).unwrap();
        assert_eq!(report.outcome, StepOutcome::Stopped, "one rank is asked to stop, all ranks stop");
        finish(&mut run)
    });
    assert!(results.iter().all(|files| *files == expected));
}

#[test]
fn diverged_ranks_are_detected() {
    let fixture = Fixture::new();
    let mut other = Fixture::new();
    other.job.training.seed = 7;
    let errors = on_ranks(2, 1, |group| {
        let fixture = if group.rank() == 1 { &other } else { &fixture };
        fixture.run().join(group, Collective::Auto).unwrap_err().to_string()
    });
    assert!(errors.iter().all(|e| e.contains("rank 1")), "{errors:?}");
}

#[test]
fn recomputation_changes_no_bit() {
    let mut fixture = Fixture::new();
    fixture.job.adapter.lora_dropout = 0.2;
    let kept = finish(&mut fixture.run());
    for checkpointing in [ActivationCheckpointing::Block, ActivationCheckpointing::BlockSaveAttention] {
        fixture.job.training.activation_checkpointing = checkpointing;
        assert!(finish(&mut fixture.run())[WEIGHTS] == kept[WEIGHTS], "{checkpointing:?}");
    }
}

#[test]
fn the_best_adapter_is_exported_and_early_stopping_ends_the_run() {
    let mut fixture = Fixture::new();
    fixture.job.training.learning_rate = 0.5;
    fixture.job.training.num_train_epochs = 10.0;
    fixture.job.training.eval_steps = 1;
    fixture.job.training.load_best_model_at_end = true;
    fixture.job.training.early_stopping_patience = Some(3);
    let mut run = fixture.run();
    let files = finish(&mut run);
    let receipt: Receipt = serde_json::from_slice(&files["receipt.json"]).unwrap();
    let evals: Vec<(f64, u64)> = receipt.steps.iter().map(|s| (s.eval_loss.unwrap(), s.step)).collect();
    let best = evals.iter().copied().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    assert_eq!(receipt.adapter_step, best.1);
    assert_eq!(run.completed_steps(), best.1 + 3, "patience 3");
    assert!(run.completed_steps() < run.facts().total_steps);
    let mut notices = Vec::new();
    let mut noted = fixture.run();
    while !noted.is_finished() {
        notices.extend(noted.step(|| false).unwrap().notice);
    }
    let expected = format!(
        "training stopped after step {} of {}: eval_loss did not improve in 3 evaluations; the adapter of \
         step {} is exported (eval_loss {:.4})",
        best.1 + 3,
        run.facts().total_steps,
        best.1,
        best.0
    );
    assert_eq!(notices, [expected]);
    let mut repeated = fixture.run();
    while repeated.completed_steps() < best.1 {
        repeated.step(|| false).unwrap();
    }
    let checkpoint =
        candle_core::safetensors::load_buffer(&repeated.checkpoint().unwrap(), &candle_core::Device::Cpu);
    let at_best = checkpoint.unwrap()["params"].to_vec1::<f32>().unwrap();
    let adapter = candle_core::safetensors::load_buffer(&files[WEIGHTS], &candle_core::Device::Cpu).unwrap();
    let exported: Vec<f32> = adapter["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap();
    assert_eq!(exported, at_best[..exported.len()]);
}

#[test]
fn truncated_checkpoints_and_those_of_other_jobs_are_rejected() {
    let mut fixture = Fixture::new();
    let mut run = fixture.run();
    run.step(|| false).unwrap();
    let checkpoint = run.checkpoint().unwrap();
    fixture.job.training.learning_rate *= 2.0;
    let mut other = fixture.run();
    let error = other.restore(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("another job"), "{error}");
    assert_eq!(other.completed_steps(), 0);
    for cut in [0, 7, 100, checkpoint.len() - 1] {
        assert!(matches!(run.restore(&checkpoint[..cut]), Err(TrainError::Checkpoint(_))), "cut at {cut}");
    }
    assert_eq!(run.completed_steps(), 1);
}

#[test]
fn non_finite_losses_skip_steps_on_all_ranks_and_end_the_run() {
    let mut fixture = Fixture::new();
    fixture.job.training.num_train_epochs = 4.0;
    write_base(&fixture.job.model.base, |value| if value > 0.299 { 3e38 } else { value });
    let base = fixture.base();
    let errors = on_ranks(2, 1, |group| {
        let mut run = fixture.run_over(base.clone());
        run.join(group, Collective::Auto).unwrap();
        let before = run.checkpoint().unwrap();
        let report = run.step(|| false).unwrap();
        assert!(report.notice.unwrap().contains("step 1: the loss is not finite"));
        let params = |bytes: &[u8]| {
            let tensors = candle_core::safetensors::load_buffer(bytes, &candle_core::Device::Cpu).unwrap();
            ["params", "exp_avg", "exp_avg_sq"].map(|name| tensors[name].to_vec1::<f32>().unwrap())
        };
        assert_eq!(params(&before), params(&run.checkpoint().unwrap()), "a skipped step changes nothing");
        loop {
            if let Err(error) = run.step(|| false) {
                return (run.completed_steps(), error.to_string());
            }
        }
    });
    assert!(errors.iter().all(|(steps, e)| *steps == 9 && e.contains("for 10 steps in a row")), "{errors:?}");
}

#[test]
fn a_job_of_which_every_step_is_skipped_fails() {
    let mut fixture = Fixture::new();
    fixture.job.training.max_steps = Some(3);
    write_base(&fixture.job.model.base, |value| if value > 0.299 { 3e38 } else { value });
    let mut run = fixture.run();
    for _ in 0..2 {
        assert!(run.step(|| false).unwrap().notice.unwrap().contains("the step was skipped"));
    }
    let error = run.step(|| false).unwrap_err().to_string();
    assert!(error.starts_with("step 3: the loss is not finite, for 3 steps in a row"), "{error}");
}

#[test]
fn an_adapter_with_logits_that_are_not_finite_is_not_exported() {
    let mut fixture = Fixture::new();
    fixture.job.training.max_steps = Some(2);
    fixture.job.training.learning_rate = 1e30;
    fixture.job.training.lr_scheduler_type = lora_spec::LrSchedulerType::Constant;
    let mut run = fixture.run();
    while run.step(|| false).unwrap().outcome == StepOutcome::Continue {}
    let error = run.export().unwrap_err().to_string();
    assert!(error.starts_with("the trained adapter gives logits that are not finite"), "{error}");
}

#[test]
fn verify_detects_any_change_of_result_or_inputs() {
    let fixture = Fixture::new();
    let files = finish(&mut fixture.run());
    let receipt: Receipt = serde_json::from_slice(&files["receipt.json"]).unwrap();
    let export = receipt.export.unwrap();
    assert!(export.tokens > 8 && export.largest_logit > 0.0, "{export:?}");
    assert_eq!((export.largest_difference, export.kl_divergence, export.same_token), (0.0, 0.0, 1.0));
    let out = write_result(fixture.dir.path(), &files);
    let verification = verify(&out, &InputPaths::default(), 3).unwrap();
    assert_eq!((verification.replayed_steps, verification.steps), (3, 8));
    assert_eq!(verification.files, files.len() - 1);

    let weights = out.join(WEIGHTS);
    let mut bytes = files[WEIGHTS].clone();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &bytes).unwrap();
    assert!(
        verify(&out, &InputPaths::default(), 3)
            .unwrap_err()
            .to_string()
            .contains("adapter_model.safetensors was changed")
    );
    std::fs::write(&weights, &files[WEIGHTS]).unwrap();

    let mut receipt: Receipt = serde_json::from_slice(&files["receipt.json"]).unwrap();
    let loss = receipt.steps[1].loss.unwrap();
    receipt.steps[1].loss = Some(f64::from_bits(loss.to_bits() + 1));
    std::fs::write(out.join("receipt.json"), serde_json::to_vec(&receipt).unwrap()).unwrap();
    assert!(
        verify(&out, &InputPaths::default(), 3).unwrap_err().to_string().contains("step 2 gave other bits")
    );
    std::fs::write(out.join("receipt.json"), &files["receipt.json"]).unwrap();

    let mut receipt: Receipt = serde_json::from_slice(&files["receipt.json"]).unwrap();
    receipt.order_sha256 = receipt.train_sha256.clone();
    std::fs::write(out.join("receipt.json"), serde_json::to_vec(&receipt).unwrap()).unwrap();
    assert!(
        verify(&out, &InputPaths::default(), 3)
            .unwrap_err()
            .to_string()
            .contains("the order of the rows was changed")
    );
    std::fs::write(out.join("receipt.json"), &files["receipt.json"]).unwrap();

    let moved = fixture.dir.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    let [base, train, eval] = ["base", "train.jsonl", "eval.jsonl"].map(|name| {
        std::fs::rename(fixture.dir.path().join(name), moved.join(name)).unwrap();
        Some(moved.join(name))
    });
    assert!(verify(&out, &InputPaths::default(), 3).is_err(), "the inputs are not at the paths in the job");
    let train: Vec<_> = train.into_iter().collect();
    let input_paths = InputPaths { base, train, eval, init_from: None };
    assert_eq!(verify(&out, &input_paths, 3).unwrap(), verification);

    write_rows(&input_paths.train[0], 1..38);
    assert!(verify(&out, &input_paths, 3).unwrap_err().to_string().contains("data.train was changed"));
}

#[test]
fn init_from_continues_an_adapter_and_must_fit_the_job() {
    let mut fixture = Fixture::new();
    let out = write_result(fixture.dir.path(), &finish(&mut fixture.run()));
    let trained = fixture.run().facts().trainable_parameters;
    fixture.job.adapter.init_from = Some(out);
    let mut run = fixture.run();
    assert_eq!(run.facts().trainable_parameters, trained);
    let again = finish(&mut run);
    let first: Receipt = serde_json::from_slice(&again["receipt.json"]).unwrap();
    let fresh: Receipt = {
        fixture.job.adapter.init_from = None;
        serde_json::from_slice(&finish(&mut fixture.run())["receipt.json"]).unwrap()
    };
    assert!(first.steps[0].loss < fresh.steps[0].loss, "training starts with the trained adapter");
    fixture.job.adapter.init_from = Some(fixture.dir.path().join("out"));
    fixture.job.adapter.r = 8;
    let inputs = JobFiles::from_job(&fixture.job);
    let prepared = Run::prepare(&fixture.job, &inputs, fixture.base(), &CancelToken::new());
    let error = prepared.err().unwrap().to_string();
    assert!(error.starts_with("adapter.init_from: ") && error.contains("another r"), "{error}");
}
