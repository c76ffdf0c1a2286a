//! Groups that break in the middle of a step and form again: no step is lost, and all bits stay the
//! same.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Barrier, Mutex};

use lora_collective::backend_choice::Collective;
use lora_collective::{CancelToken, Group};
use lora_model::Base;
use lora_spec::JobFiles;
use lora_train::{Run, RunData, StepOutcome, TrainError};

use crate::common::{Fixture, finish, on_ranks};

type Files = HashMap<String, Vec<u8>>;

/// Continues the runs in a new group, and returns the exported files of each.
fn finish_together(runs: Vec<Run>) -> Vec<Files> {
    let runs: Vec<_> = runs.into_iter().map(|run| Mutex::new(Some(run))).collect();
    on_ranks(runs.len(), 1, |group| {
        let mut run = runs[group.rank()].lock().unwrap().take().unwrap();
        run.join(group, Collective::Auto).unwrap();
        finish(&mut run)
    })
}

fn assert_all_equal(results: &[Files], expected: &Files) {
    assert!(results.iter().all(|files| files == expected), "the files are not those of an uninterrupted run");
}

/// Returns two runs after one step in a group. Rank 0 is then cancelled in its second step: with
/// `waiting`, while it waits for rank 1, and otherwise at its first micro-batch. Rank 1 has
/// computed all of its micro-batches when it detects that.
fn broken_in_the_second_step(fixture: &Fixture, base: &Arc<Base>, waiting: bool) -> Vec<Run> {
    let done = Barrier::new(2);
    on_ranks(2, 1, |group| {
        let (rank, token) = (group.rank(), group.cancel_token().clone());
        let mut run = fixture.run_over(base.clone());
        run.join(group, Collective::Auto).unwrap();
        run.step(|| false).unwrap();
        if rank == 0 {
            let error = std::thread::scope(|scope| {
                match waiting {
                    true => drop(scope.spawn(move || token.cancel())),
                    false => token.cancel(),
                }
                run.step(|| false).unwrap_err()
            });
            assert!(matches!(error, TrainError::Cancelled), "{error}");
        }
        done.wait();
        if rank == 1 {
            assert!(matches!(run.step(|| false), Err(TrainError::Group(_))), "rank 0 is gone");
        }
        assert_eq!(run.completed_steps(), 1);
        run.leave().unwrap();
        run
    })
}

#[test]
fn an_aborted_step_changes_no_bit() {
    let fixture = Fixture::new();
    let base = fixture.base();
    let expected = finish(&mut fixture.run_over(base.clone()));
    for waiting in [true, false] {
        let runs = broken_in_the_second_step(&fixture, &base, waiting);
        assert_all_equal(&finish_together(runs), &expected);
    }
}

#[test]
fn a_new_rank_can_take_any_rank_number() {
    let fixture = Fixture::new();
    let base = fixture.base();
    let expected = finish(&mut fixture.run_over(base.clone()));
    for rank in 0..3 {
        let mut runs = broken_in_the_second_step(&fixture, &base, true);
        runs.insert(rank, fixture.run_over(base.clone()));
        assert_all_equal(&finish_together(runs), &expected);
    }
}

/// Rank 1 has no evaluation rows and leaves while rank 0 evaluates: rank 0 then has the third step,
/// but not its evaluation.
#[test]
fn an_aborted_evaluation_is_repeated() {
    let mut fixture = Fixture::new();
    fixture.job.training.load_best_model_at_end = true;
    let base = fixture.base();
    let mut alone = fixture.run_over(base.clone());
    let expected = finish(&mut alone);
    let mut without = Fixture::new();
    without.job.data.train = fixture.job.data.train.clone();
    without.job.data.eval = None;
    let broken = || {
        let runs = on_ranks(2, 1, |group| {
            let rank = group.rank();
            let fixture = if rank == 0 { &fixture } else { &without };
            let mut run = fixture.run_over(base.clone());
            run.join(group, Collective::Auto).unwrap();
            run.step(|| false).unwrap();
            run.step(|| false).unwrap();
            let third = run.step(|| false);
            assert_eq!(run.completed_steps(), 3);
            match rank {
                0 => assert!(matches!(third, Err(TrainError::Group(_))), "its peer does not evaluate"),
                _ => assert_eq!(third.unwrap().outcome, StepOutcome::Continue),
            }
            run.leave().unwrap();
            run
        });
        runs.into_iter().next().unwrap()
    };
    let unevaluated = broken();
    assert_eq!(unevaluated.metrics_after(0).count(), 2, "the third step is not complete");
    let checkpoint = unevaluated.checkpoint().unwrap();
    assert_all_equal(&finish_together(vec![fixture.run_over(base.clone()), unevaluated]), &expected);

    let mut resumed = fixture.run_over(base.clone());
    resumed.restore(&checkpoint).unwrap();
    let report = resumed.step(|| false).unwrap();
    assert_eq!((report.metrics.step, report.metrics.eval_loss.is_some()), (3, true));
    assert_eq!(finish(&mut resumed), expected);
    assert!(
        resumed.metrics_after(0).eq(alone.metrics_after(0)),
        "the metrics are those of the uninterrupted run"
    );

    // A rank with the evaluation of its third step is ahead of a rank whose evaluation is still
    // due.
    let mut ahead = fixture.run_over(base.clone());
    (0..3).for_each(|_| drop(ahead.step(|| false).unwrap()));
    assert_all_equal(&finish_together(vec![broken(), ahead]), &expected);
}

#[test]
fn a_token_without_an_embedding_is_found_with_its_line() {
    let fixture = Fixture::new();
    let config = fixture.job.model.base.join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(&config, text.replace("\"vocab_size\":512", "\"vocab_size\":40")).unwrap();
    let files = JobFiles::from_job(&fixture.job);
    let error = RunData::read(&fixture.job, &files, None, &CancelToken::new()).err().unwrap().to_string();
    assert!(error.contains("train.jsonl:1") && error.contains("vocab_size is 40"), "{error}");
}

#[test]
fn metrics_after_matches_the_reported_metrics() {
    let mut fixture = Fixture::new();
    fixture.job.training.logging_steps = 4;
    let mut run = fixture.run();
    let mut reported = Vec::new();
    loop {
        let report = run.step(|| false).unwrap();
        reported.push(report.metrics);
        if report.outcome == StepOutcome::Finished {
            break;
        }
    }
    let logged: Vec<u64> = reported.iter().filter(|m| m.logged).map(|m| m.step).collect();
    assert_eq!(logged, [3, 4, 6, 8]);
    let losses: Vec<f64> = run.history().iter().map(|record| record.loss.unwrap()).collect();
    let mean = |range: std::ops::Range<usize>| losses[range.clone()].iter().sum::<f64>() / range.len() as f64;
    let expected =
        [losses[0], losses[1], mean(0..3), mean(3..4), losses[4], mean(4..6), losses[6], mean(6..8)];
    assert_eq!(reported.iter().map(|metrics| metrics.loss).collect::<Vec<_>>(), expected);
    let mut restored = fixture.run();
    restored.restore(&run.checkpoint().unwrap()).unwrap();
    assert!(restored.metrics_after(0).eq(reported.iter().cloned()), "a resume reports the same means");
    assert!(run.metrics_after(0).eq(reported.iter().cloned()));
    assert!(run.metrics_after(5).eq(reported[5..].iter().cloned()));
    assert_eq!(run.metrics_after(8).count(), 0);
}

/// The rank that would have exported the result is lost after the last step.
#[test]
fn a_finished_run_can_export_in_another_group() {
    let fixture = Fixture::new();
    let base = fixture.base();
    let mut first = fixture.run_over(base.clone());
    let expected = finish(&mut first);
    let results = on_ranks(2, 1, |group: Group| {
        let mut run = fixture.run_over(base.clone());
        if group.rank() == 1 {
            run.restore(&first.checkpoint().unwrap()).unwrap();
        }
        run.join(group, Collective::Auto).unwrap();
        assert!(run.is_finished());
        run.export().unwrap().into_iter().map(|artifact| (artifact.name, artifact.bytes)).collect()
    });
    assert_all_equal(&results, &expected);
}

/// The chat template is not in the base's hash, but it decides the tokens.
#[test]
fn ranks_with_different_templates_do_not_train_together() {
    let (fixture, other) = (Fixture::new(), Fixture::new());
    let chat = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#;
    for train in [&fixture.job.data.train[0], &other.job.data.train[0]] {
        std::fs::write(train, chat).unwrap();
    }
    let template = other.job.model.base.join("chat_template.jinja");
    let text = std::fs::read_to_string(&template).unwrap();
    std::fs::write(&template, text.replace("message.content", "message.content + '.'")).unwrap();
    let run = |rank: usize| if rank == 1 { other.run() } else { fixture.run() };
    on_ranks(2, 1, |group: Group| {
        let error = run(group.rank()).join(group, Collective::Auto).unwrap_err();
        assert!(matches!(error, TrainError::OtherInputs { rank: 1 }), "{error}");
    });
    let checkpoint = fixture.run().checkpoint().unwrap();
    let error = other.run().restore(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("belongs to another job: base, tokenizer, chat template"), "{error}");
}

#[test]
fn the_receipt_keeps_the_jobs_own_paths() {
    let fixture = Fixture::new();
    let base = fixture.base();
    let mut other_paths = Fixture::new();
    other_paths.job.model.base = PathBuf::from("hf://org/name@1a2b");
    other_paths.job.data.train = "/somewhere/train.jsonl".into();
    other_paths.job.data.eval = Some(PathBuf::from("/somewhere/eval.jsonl"));
    let inputs = JobFiles::from_job(&fixture.job);
    let cancel = CancelToken::new();
    let mut run = Run::prepare(&other_paths.job, &inputs, base.clone(), &cancel).unwrap();
    let files = finish(&mut run);
    let json = |name: &str| serde_json::from_slice::<serde_json::Value>(&files[name]).unwrap();
    let config = json("adapter_config.json");
    assert_eq!(
        (&config["base_model_name_or_path"], &config["revision"]),
        (&"org/name".into(), &"1a2b".into())
    );
    assert_eq!(json("receipt.json")["job"]["data"]["train"], "/somewhere/train.jsonl");
    let expected = finish(&mut fixture.run_over(base.clone()));
    assert_eq!(files["adapter_model.safetensors"], expected["adapter_model.safetensors"]);

    cancel.cancel();
    let cancelled = Run::prepare(&fixture.job, &inputs, base, &cancel);
    assert!(matches!(cancelled.err().unwrap(), TrainError::Cancelled));
}
