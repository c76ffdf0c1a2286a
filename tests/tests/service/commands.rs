//! The commands of `loractl` that call a coordinator: exit codes, errors and output formats.

use lora_e2e::{Finished, Fixture, TestService, loractl, on_terminal};
use serde_json::Value;

#[test]
fn an_unreachable_coordinator_has_its_own_exit_code() {
    let fixture = Fixture::default();
    let job = fixture.job();
    let mut service = TestService::start();
    service.kill();
    for arguments in [
        &["list"][..],
        &["workers"],
        &["status", "j"],
        &["watch", "j"],
        &["logs", "j"],
        &["cancel", "j"],
        &["pause", "j"],
        &["resume", "j"],
        &["download", "j"],
        &["submit", job.to_str().unwrap()],
    ] {
        let refused = service.run(arguments).expect_code(5);
        let error = refused.error().unwrap_or_default();
        assert!(
            error.contains(service.address()) && error.contains("--coordinator"),
            "{arguments:?}: {error}"
        );
        assert_eq!(refused.stdout, "", "{arguments:?}");
    }
}

#[test]
fn jobs_are_found_by_id_or_prefix_and_shown_in_every_format() {
    let fixture = Fixture::default();
    fixture.edit("job.yaml", "name: small", "name: a-name-that-is-rather-long-for-a-column");
    let service = TestService::start();
    let (first, second) = (service.submit(&fixture), service.submit(&fixture));
    for job in [&first, &second] {
        service.until_state(job, "queued");
    }

    let prefix = "a-name-that-is";
    for arguments in [["status", prefix], ["cancel", prefix], ["watch", prefix], ["download", prefix]] {
        let refused = service.run(&arguments).expect_code(1);
        let error = refused.error().unwrap_or_default();
        assert!(error.contains("could be one of 2 jobs") && error.contains(&first), "{error}");
    }
    for command in ["status", "watch", "logs", "cancel", "pause", "resume", "download"] {
        let refused = service.run(&[command, "unknown-job"]).expect_code(1);
        assert!(
            refused.error().unwrap_or_default().contains("job \"unknown-job\" does not exist"),
            "{}",
            refused.stderr
        );
    }
    // The shortest prefix of the id that the other id does not have.
    let short = (1..=first.len()).map(|end| &first[..end]).find(|short| !second.starts_with(short)).unwrap();
    let status = service.run(&["status", short, "-o", "json"]).expect_code(0).json();
    assert_eq!(
        (&status["job_id"], &status["spec"]["training"]["max_steps"]),
        (&first.clone().into(), &12.into())
    );

    for arguments in
        [&["status", &first][..], &["list"], &["workers"], &["pause", &first], &["cancel", &second]]
    {
        let output = |format: &str| service.run(&[arguments, &["-o", format]].concat()).expect_code(0).stdout;
        let mut json: Value = serde_json::from_str(&output("json")).unwrap();
        let mut yaml: Value = serde_saphyr::from_str(&output("yaml")).unwrap();
        for value in [&mut json, &mut yaml] {
            without_times(value);
        }
        assert_eq!(json, yaml, "{arguments:?}");
        service.run(arguments).expect_code(0);
    }
    let logs = service.run(&["logs", &first, "-o", "yaml"]).expect_code(0).stdout;
    let events: Vec<Value> = serde_saphyr::from_multiple(&logs).unwrap();
    assert_eq!(events.iter().map(|event| &event["number"]).collect::<Vec<_>>(), [1, 2, 3], "{logs}");

    let list = on_terminal(service.loractl(&["list"]), 80);
    let lines: Vec<&str> = list.lines().collect();
    assert_eq!(lines.len(), 3, "{list}");
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{list}");
    assert!(list.contains(&first) && list.contains(&second), "ids are not shortened: {list}");
    assert!(list.contains("paused") && list.contains("cancelled"), "{list}");
}

#[test]
fn a_bad_job_file_is_refused_with_file_and_line() {
    let service = TestService::start();
    for (old, new, expected) in [
        ("learning_rate:", "learning_rat:", "did you mean training.learning_rate?"),
        ("r: 4", "r: 0", "adapter.r"),
        ("max_steps: 12", "max_steps: 12\n  lr_scheduler_type: cosin", "cosine"),
    ] {
        let fixture = Fixture::default();
        fixture.edit("job.yaml", old, new);
        let text = std::fs::read_to_string(fixture.job()).unwrap();
        let line = text.lines().position(|line| line.contains(new.lines().last().unwrap())).unwrap() + 1;
        let refused = service.run(&["submit", fixture.job().to_str().unwrap()]).expect_code(1);
        let error = refused.error().unwrap_or_default();
        let location = format!("{}:{line}: ", fixture.job().display());
        assert!(error.starts_with(&location) && error.contains(expected), "{error}");
    }
    let fixture = Fixture::default();
    fixture.append("train.jsonl", "{");
    let refused = service.run(&["submit", fixture.job().to_str().unwrap()]).expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("train.jsonl:58"), "{}", refused.stderr);
    let list = service.run(&["list", "-o", "json"]).expect_code(0);
    assert_eq!(list.json(), serde_json::json!([]), "nothing was submitted");
}

#[test]
fn an_idempotency_key_returns_the_same_job_or_an_error() {
    let fixture = Fixture::default();
    let service = TestService::start();
    let job = fixture.job();
    let submit = || service.run(&["submit", job.to_str().unwrap(), "--idempotency-key", "k", "-o", "json"]);
    let (first, second) = (submit().expect_code(0), submit().expect_code(0));
    assert_eq!(second.json()["job_id"], first.json()["job_id"]);
    let uploads = |finished: &Finished| finished.stderr.contains("uploading ");
    assert!(uploads(&first) && !uploads(&second), "stored files are not uploaded again: {}", second.stderr);
    fixture.edit("job.yaml", "max_steps: 12", "max_steps: 13");
    let refused = submit().expect_code(1);
    let error = refused.error().unwrap_or_default();
    assert!(error.contains("idempotency_key") && error.contains("training.max_steps"), "{error}");
}

#[test]
fn a_failed_job_has_its_own_exit_code_and_one_clear_error() {
    let fixture = Fixture::default();
    let service = TestService::start();
    let _worker = service.worker("w0");
    // Without an upload the base must be on the worker's disk, but the worker has no model_roots.
    let submit =
        ["submit", fixture.job().to_str().unwrap(), "--watch", "--max-upload", "0"].map(str::to_owned);
    let failed = service.run(&submit.each_ref().map(String::as_str)).expect_code(3);
    let error = failed.error().unwrap_or_default();
    for words in ["w0 (rank 0)", "model.base", "model_roots"] {
        assert!(error.contains(words), "{words}: {}", failed.stderr);
    }
    service.until_worker("w0", "idle");
    let job = service.run(&["list", "-o", "json"]).expect_code(0).json()[0]["job_id"].clone();
    let refused = service.run(&["download", job.as_str().unwrap()]).expect_code(1);
    assert!(refused.error().unwrap_or_default().contains("is failed"), "{}", refused.stderr);
}

#[test]
fn a_base_on_the_worker_needs_no_upload() {
    let fixture = Fixture::with_steps(1);
    let service = TestService::start();
    let root = fixture.path("").canonicalize().unwrap();
    let _worker = service.worker_with("w0", &[("model_roots", root.to_str().unwrap())]);
    let submit =
        ["submit", fixture.job().to_str().unwrap(), "--watch", "--max-upload", "0"].map(str::to_owned);
    let done = service.run(&submit.each_ref().map(String::as_str)).expect_code(0);
    assert!(done.stderr.contains("it is not uploaded"), "{}", done.stderr);
}

#[test]
fn every_help_text_has_an_example() {
    let help = Finished::run(loractl().arg("--help")).expect_code(0).stdout;
    let (_, commands) = help.split_once("Commands:\n").unwrap();
    let names = commands.lines().take_while(|line| line.starts_with("  "));
    let names: Vec<&str> =
        names.filter_map(|line| line.split_whitespace().next()).filter(|n| *n != "help").collect();
    for name in [
        "run", "submit", "status", "list", "watch", "logs", "cancel", "pause", "resume", "download",
        "workers",
    ] {
        assert!(names.contains(&name), "{name}: {help}");
    }
    for name in &names {
        let help = Finished::run(loractl().args([name, "--help"])).expect_code(0).stdout;
        assert!(help.contains("Example") && help.contains(&format!("loractl {name}")), "{help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = Finished::run(loractl().args(["completions", shell])).expect_code(0).stdout;
        let missing: Vec<_> = names.iter().filter(|name| !script.contains(**name)).collect();
        assert!(missing.is_empty(), "{shell}: {missing:?}");
    }
    Finished::run(loractl().args(["completions", "tcsh"])).expect_code(2);
    Finished::run(loractl().args(["list", "--coordinator", "https://here"])).expect_code(1);
}

/// Removes the fields that change with time.
fn without_times(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields
                .retain(|key, _| !["changed", "seconds_in_phase", "silent_seconds"].contains(&key.as_str()));
            fields.values_mut().for_each(without_times);
        }
        Value::Array(items) => items.iter_mut().for_each(without_times),
        _ => {}
    }
}
