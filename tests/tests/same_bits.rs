//! The result of a job does not depend on the number of processes and threads, nor on
//! interruptions.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use lora_e2e::{Finished, Fixture, RunOutcome, Running, Signal, TestService, loractl, metrics, wait_until};

#[test]
fn every_number_of_workers_and_threads_gives_the_same_files() {
    let fixture = Fixture::default();
    let expected = fixture.finish("1x1", &["--workers", "1", "--threads", "1"]);
    for (workers, threads) in [("2", "1"), ("3", "1"), ("4", "1"), ("1", "2"), ("2", "2")] {
        let out = format!("{workers}x{threads}");
        let found = fixture.finish(&out, &["--workers", workers, "--threads", threads]);
        assert_eq!(found, expected, "{workers} workers of {threads} threads");
    }
}

#[test]
fn several_files_with_weights_give_the_same_bits() {
    let fixture = Fixture::default();
    let rows = std::fs::read_to_string(fixture.path("train.jsonl")).unwrap();
    let (first, second) = rows.split_at(rows.match_indices('\n').nth(19).unwrap().0 + 1);
    fixture.write("train.jsonl", first);
    fixture.write("more.ndjson", second);
    fixture.edit(
        "job.yaml",
        "train: train.jsonl",
        "train: [train.jsonl, more.ndjson]\n  train_weights: [2, 0.5]",
    );
    let expected = fixture.finish("1x1", &["--workers", "1", "--threads", "1"]);
    assert_eq!(fixture.finish("2x1", &["--workers", "2", "--threads", "1"]), expected);
    let out = fixture.path("1x1");
    let verified =
        Finished::run(loractl().arg("verify").arg(&out).args(["-o", "json"])).expect_code(0).json();
    assert!(verified["files"].as_u64().unwrap() > 2, "{verified}");
    let service = TestService::start();
    let _worker = service.worker("w0");
    let submitted = service.result(&service.submit(&fixture), &fixture.path("submitted"));
    assert_eq!(submitted.adapter_sha256, expected.adapter_sha256);
    // The files were moved.
    std::fs::create_dir(fixture.path("moved")).unwrap();
    let moved = ["train.jsonl", "more.ndjson"].map(|name| {
        let to = fixture.path("moved").join(name);
        std::fs::rename(fixture.path(name), &to).unwrap();
        to
    });
    let verify = |files: &[&std::path::PathBuf]| {
        let mut command = loractl();
        command.arg("verify").arg(&out);
        files.iter().for_each(|file| {
            command.arg("--train").arg(file);
        });
        Finished::run(&mut command)
    };
    verify(&[&moved[0], &moved[1]]).expect_code(0);
    let error = |files: &[&std::path::PathBuf]| verify(files).error().unwrap().to_owned();
    assert!(error(&[&moved[0]]).contains("data.train has 2 files"));
    let changed = format!("data.train: {} was changed", moved[1].display());
    assert!(error(&[&moved[1], &moved[0]]).contains(&changed));
    std::fs::write(&moved[1], first).unwrap();
    assert!(error(&[&moved[0], &moved[1]]).contains(&changed));
    std::fs::write(&moved[1], second).unwrap();
    let plan = Finished::run(loractl().arg("plan").arg(fixture.job()).args(["-o", "json"]));
    let error = plan.error().unwrap();
    assert!(error.contains("data.train: the file") && error.contains("does not exist"), "{error}");
}

#[test]
fn a_job_that_was_stopped_in_its_first_epoch_gives_the_same_bits() {
    // The stop is in the second step or soon after. An epoch has five steps.
    let epochs = stop_after(1, &["--workers", "2"], &["--workers", "3"]);
    assert!(epochs < 1.0, "it stopped after {epochs} epochs");
}

#[test]
fn a_job_that_was_stopped_in_its_second_epoch_gives_the_same_bits() {
    let epochs = stop_after(6, &["--workers", "3"], &["--workers", "1"]);
    assert!((1.0..2.0).contains(&epochs), "it stopped after {epochs} epochs");
}

#[test]
fn a_job_that_was_killed_gives_the_same_bits_and_leaves_no_process() {
    let fixture = Fixture::default();
    let expected = fixture.finish("expected", &["--threads", "1"]);
    let out = fixture.path("out");
    let mut running = Running::start(&mut fixture.run("out", &["--workers", "2", "--threads", "1"]));
    wait_until("some steps", &mut running, |_| (metrics(&out).len() >= 3).then_some(()));
    let workers = running.children();
    assert_eq!(workers.len(), 2, "{workers:?}");
    running.process.signal(Signal::KILL);
    assert_eq!(running.wait().code, None);
    for worker in workers {
        assert!(worker.wait(), "an orphan: {:?}", worker.arguments);
    }
    assert!(!out.join("receipt.json").exists(), "it was killed too late");
    assert_eq!(fixture.finish("out", &["--resume", "--workers", "3", "--threads", "1"]), expected);
}

/// Stops a job with Ctrl-C once `step` steps are done, resumes it with the arguments `then`, and
/// compares the result with the result of an undisturbed run. Returns the epochs that were done at
/// the stop.
fn stop_after(step: usize, first: &[&str], then: &[&str]) -> f64 {
    let fixture = Fixture::default();
    let expected: RunOutcome = fixture.finish("expected", &["--threads", "1"]);
    let out = fixture.path("out");
    let mut running = Running::start(&mut fixture.run("out", &[first, &["--threads", "1"]].concat()));
    wait_until("a step", &mut running, |_| (metrics(&out).len() >= step).then_some(()));
    running.process.signal(Signal::INT);
    running.wait().expect_code(4);
    let rows = metrics(&out);
    let last = rows.last().unwrap();
    assert!(!out.join("receipt.json").exists());
    let resume = [then, &["--resume", "--threads", "1"]].concat();
    let resumed = Finished::run(&mut fixture.run("out", &resume)).expect_code(0);
    let from = format!("from the checkpoint of step {}", last["step"]);
    assert!(resumed.stderr.contains(&from), "{from}: {}", resumed.stderr);
    assert_eq!(RunOutcome::read(&out), expected, "stopped after step {}", last["step"]);
    last["epoch"].as_f64().unwrap()
}
