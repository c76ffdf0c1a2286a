//! From a job file to a result.

use std::fs;
use std::ops::RangeInclusive;

use lora_e2e::{Finished, Fixture, RunOutcome, TestService, json_lines, loractl, sha256, until};
use lora_proto::v1::watch_job_response::Kind;
use serde_json::{Value, json};

use crate::{STEPS, expect_reference_outcome, groups};

/// Numbers of events and of steps, in the order in which they were seen.
type SeenNumbers = (Vec<u64>, Vec<u64>);

#[test]
fn two_clients_see_everything_once_and_the_result_matches_a_local_run() {
    let fixture = Fixture::with_short_steps();
    let service = TestService::start();
    let job = service.submit(&fixture);
    // From now on, only the coordinator's store has the inputs of the job.
    let files = ["base", "train.jsonl", "eval.jsonl"];
    let aside = |name: &str| fixture.path(&format!("aside-{name}"));
    files.iter().for_each(|name| fs::rename(fixture.path(name), aside(name)).unwrap());

    let watch = || service.running(&["watch", &job, "-o", "json"]);
    let (first, second) = (watch(), watch());
    let _worker = service.worker("w0");
    until("ten steps", || (numbers(&second.stdout()).1.len() >= 10).then_some(()));
    second.process.signal(lora_e2e::Signal::KILL);
    let (seen_events, seen_steps) = numbers(&second.wait().stdout);
    let again = watch();
    let (event, step) = (seen_events.len() as u64, seen_steps.len() as u64);
    assert_eq!((seen_events, seen_steps), (all(1..=event), all(1..=step)));
    assert!(step < STEPS, "it was killed too late");

    let first = first.wait().expect_code(0).stdout;
    let last = json_lines(&first).pop().unwrap();
    assert_eq!((&last["type"], &last["state"]), (&"job".into(), &"succeeded".into()));
    let events = numbers(&first).0.len() as u64;
    assert_eq!(numbers(&first), (all(1..=events), all(1..=STEPS)));
    assert_eq!(numbers(&again.wait().expect_code(0).stdout), numbers(&first));
    // A watch can also start after the numbers that the killed client saw.
    let (mut rest_events, mut rest_steps) = (Vec::new(), Vec::new());
    for kind in service.api().watch(&job, event + 1, step) {
        match kind {
            Kind::Event(event) => rest_events.push(event.number),
            Kind::Step(step) => rest_steps.push(step.metrics.unwrap().step),
        }
    }
    assert_eq!((rest_events, rest_steps), (all(event + 1..=events), all(step + 1..=STEPS)));
    let from = (event + 1).to_string();
    let logs = service.run(&["logs", &job, "--from", &from, "-o", "json"]).expect_code(0).stdout;
    let logged: Vec<u64> = json_lines(&logs).iter().map(|event| event["number"].as_u64().unwrap()).collect();
    assert_eq!(logged, all(event + 1..=events));

    let downloaded = fixture.path("downloaded");
    expect_reference_outcome(&service, &job, &downloaded);
    // The base and the data have other paths, as on another machine.
    let verify = || {
        let mut command = loractl();
        command.arg("verify").arg(&downloaded);
        command
    };
    Finished::run(&mut verify()).expect_code(1);
    let mut elsewhere = verify();
    for (flag, name) in [("--base", "base"), ("--train", "train.jsonl"), ("--eval", "eval.jsonl")] {
        elsewhere.arg(flag).arg(aside(name));
    }
    Finished::run(&mut elsewhere).expect_code(0);
    files.iter().for_each(|name| fs::rename(aside(name), fixture.path(name)).unwrap());
    let local = fixture.finish("local", &["--workers", "1", "--threads", "1"]);
    assert_eq!(RunOutcome::read(&downloaded), local, "the receipts are equal too");
    Finished::run(&mut verify()).expect_code(0);
}

#[test]
fn two_workers_give_the_same_bits() {
    let fixture = Fixture::with_short_steps();
    fixture.ask_for_workers(2, 2);
    let service = TestService::start();
    let _workers = [service.worker("w0"), service.worker("w1")];
    let submit = ["submit", fixture.job().to_str().unwrap(), "--watch", "-o", "json"].map(str::to_owned);
    let items = service.run(&submit.each_ref().map(String::as_str)).expect_code(0).stdout;
    let items = json_lines(&items);
    let job = items[0]["job_id"].as_str().unwrap();
    assert!(items.iter().any(|item| item["reduced_bytes"].as_u64() > Some(0)), "gradients were exchanged");
    expect_reference_outcome(&service, job, &fixture.path("out"));
    let groups = groups(&service, job);
    assert_eq!(groups.len(), 1, "{groups:?}");
    let mut workers = groups[0].workers.clone();
    workers.sort();
    assert_eq!(workers, ["w0", "w1"]);
}

#[test]
fn a_download_resumes_an_earlier_one() {
    let fixture = Fixture::with_steps(1);
    let service = TestService::start();
    let _worker = service.worker("w0");
    let job = service.submit(&fixture);
    let whole = fixture.path("whole");
    service.result(&job, &whole);
    let name = "adapter_model.safetensors";
    let adapter = fs::read(whole.join(name)).unwrap();
    let half = &adapter[..adapter.len() / 2];
    let corrupt: Vec<u8> = half.iter().map(|byte| !byte).collect();
    for (dir, part) in [("half", half), ("corrupt", &corrupt)] {
        let dir = fixture.path(dir);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join(format!("{name}.part")), part).unwrap();
        service.run(&["download", &job, "--out", dir.to_str().unwrap()]).expect_code(0);
        let files = |dir: &std::path::Path| {
            let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
            let mut files: Vec<(String, String)> = entries
                .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), sha256(&path)))
                .collect();
            files.sort();
            files
        };
        assert_eq!(files(&dir), files(&whole));
    }
}

#[test]
fn status_and_events_tell_the_exported_step_and_that_training_stopped_early() {
    let fixture = Fixture::default();
    // With this learning rate the first evaluation is better than the second.
    for (old, new) in [
        ("learning_rate: 5.0e-3", "learning_rate: 0.05\n  lr_scheduler_type: constant"),
        ("eval_steps: 4", "eval_steps: 2\n  early_stopping_patience: 1\n  load_best_model_at_end: true"),
    ] {
        fixture.edit("job.yaml", old, new);
    }
    let service = TestService::start();
    let _worker = service.worker("w0");
    let job = service.submit(&fixture);
    let out = fixture.path("out");
    service.result(&job, &out);
    let receipt: Value = serde_json::from_slice(&fs::read(out.join("receipt.json")).unwrap()).unwrap();
    let expected = json!({"step": 2, "eval_loss": receipt["steps"][1]["eval_loss"], "stopped_early": true});
    assert!(expected["eval_loss"].is_f64() && receipt["adapter_step"] == 2, "{receipt}");
    let status = service.run(&["status", &job, "-o", "json"]).expect_code(0).json();
    assert_eq!((&status["exported"], &status["completed_steps"]), (&expected, &json!(4)));
    let logs = json_lines(&service.run(&["logs", &job, "-o", "json"]).expect_code(0).stdout);
    let saved = logs.iter().find(|event| event["event"] == "result_saved").unwrap();
    assert_eq!(saved["exported"], expected);
    let table = service.run(&["status", &job]).expect_code(0).stdout;
    let row = table.lines().find(|line| line.starts_with("exported step")).unwrap();
    assert!(row.contains(" 2 (eval loss ") && table.contains("\nstopped early"), "{table}");
    let local = Finished::run(&mut fixture.run("local", &["-o", "json"])).expect_code(0).json();
    assert_eq!(local["exported"], expected);
}

/// The numbers in the complete lines that `loractl watch -o json` has written. The last line may be
/// incomplete.
fn numbers(stdout: &str) -> SeenNumbers {
    let whole = stdout.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let items = json_lines(whole);
    let of = |kind: &str, key: &str| -> Vec<u64> {
        let items = items.iter().filter(|item| item["type"] == kind);
        items.map(|item: &Value| item[key].as_u64().unwrap()).collect()
    };
    (of("event", "number"), of("step", "step"))
}

fn all(range: RangeInclusive<u64>) -> Vec<u64> {
    range.collect()
}
