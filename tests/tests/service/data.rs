//! Inputs on which no job can be trained, from a client that does not check them. The coordinator
//! checks them before it assigns workers; if it does not have the base, the workers do. Errors name
//! the files by the paths in the job.

use std::fs::{self, OpenOptions};

use lora_e2e::{Fixture, TestService};
use lora_proto::v1::{self, base, job_event};
use lora_spec::JobFile;

#[test]
fn an_invalid_line_fails_the_job_with_file_and_line() {
    let fixture = Fixture::default();
    fixture.append("train.jsonl", r#"{"prompt": "a", "completion": "b"#);
    expect_failure(&fixture, "train.jsonl:58:", &["invalid JSON"]);
}

#[test]
fn an_invalid_line_in_the_evaluation_rows_fails_the_job() {
    let fixture = Fixture::default();
    fixture.append("eval.jsonl", "[1]x");
    expect_failure(&fixture, "eval.jsonl:11:", &["invalid JSON"]);
}

#[test]
fn a_truncated_base_fails_the_job() {
    let fixture = Fixture::default();
    let file = OpenOptions::new().write(true).open(fixture.path("base/model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    expect_failure(&fixture, "base/model.safetensors: ", &["truncated"]);
}

#[test]
fn a_base_of_an_unknown_architecture_fails_the_job() {
    let fixture = Fixture::default();
    fixture.edit("base/config.json", "LlamaForCausalLM", "GPT2LMHeadModel");
    expect_failure(&fixture, "base/config.json: ", &["GPT2LMHeadModel", "LlamaForCausalLM"]);
}

#[test]
fn a_worker_names_the_file_by_the_path_in_the_job() {
    let fixture = Fixture::default();
    fixture.append("train.jsonl", "[1]x");
    let service = TestService::start();
    let root = fixture.path("").canonicalize().unwrap();
    let _worker = service.worker_with("w0", &[("model_roots", root.to_str().unwrap())]);
    let base = base::Source::Path(root.join("base").to_str().unwrap().to_owned());
    let job = submit(&fixture, &service, base);
    let failure = service.until_state(&job, "failed").failure.unwrap();
    let line = format!("{}:58:", fixture.path("train.jsonl").display());
    assert!(failure.cause.starts_with(&line) && failure.worker.as_deref() == Some("w0"), "{failure:?}");
}

#[test]
fn notes_of_the_plan_are_events_of_the_job() {
    let fixture = Fixture::default();
    fixture.append("train.jsonl", r#"{"prompt": "a", "completion": " b", "identity": 1}"#);
    let service = TestService::start();
    let note = r#"key "identity" of 1 row has no effect"#;
    let submitted = service.run(&["submit", fixture.job().to_str().unwrap()]).expect_code(0);
    assert!(submitted.stderr.contains(&format!("note: {note}\n")), "{}", submitted.stderr);
    let of_other_client = submit(&fixture, &service, uploaded_base(&fixture, &service));
    service.until(&of_other_client, "the job is queued", |job| job.state == "queued");
    // The events of a job that has not ended are a stream without an end.
    service.run(&["cancel", &of_other_client, "--wait"]).expect_code(0);
    let is_note = |event: &v1::JobEvent| match &event.kind {
        Some(job_event::Kind::Notice(notice)) => notice.text == note && notice.worker.is_empty(),
        _ => false,
    };
    assert_eq!(service.api().events(&of_other_client).iter().filter(|event| is_note(event)).count(), 1);
}

#[test]
fn a_worker_tells_what_is_noteworthy_if_only_workers_have_the_base() {
    let fixture = Fixture::default();
    fixture.append("train.jsonl", r#"{"prompt": "a", "completion": " b", "identity": 1}"#);
    let service = TestService::start();
    let root = fixture.path("").canonicalize().unwrap();
    let _worker = service.worker_with("w0", &[("model_roots", root.to_str().unwrap())]);
    let base = base::Source::Path(root.join("base").to_str().unwrap().to_owned());
    let job = submit(&fixture, &service, base);
    service.until_state(&job, "succeeded");
    let notices = service.api().events(&job).into_iter().filter_map(|event| match event.kind {
        Some(job_event::Kind::Notice(notice)) => Some((notice.worker, notice.text)),
        _ => None,
    });
    let expected = r#"key "identity" of 1 row has no effect"#;
    assert_eq!(notices.collect::<Vec<_>>(), [("w0".to_owned(), expected.to_owned())]);
}

/// Uploads the files as they are, submits the job without any worker, and checks that the cause of
/// its failure begins with the path `at` of the fixture.
fn expect_failure(fixture: &Fixture, at: &str, expected: &[&str]) {
    let service = TestService::start();
    let job = submit(fixture, &service, uploaded_base(fixture, &service));
    let failed = service.until_state(&job, "failed");
    let cause = failed.failure.unwrap().cause;
    assert!(cause.starts_with(fixture.path(at).to_str().unwrap()), "{at}: {cause}");
    for words in expected {
        assert!(cause.contains(words), "{words}: {cause}");
    }
    assert_eq!(failed.generation, 0);
    // `watch` prints the same error.
    let watched = service.run(&["watch", &job]).expect_code(3);
    assert!(watched.error().unwrap_or_default().contains(&cause), "{}", watched.stderr);
    assert_eq!(service.daemon().get("/healthz").status, 200);
}

/// Uploads the base of the fixture.
pub(crate) fn uploaded_base(fixture: &Fixture, service: &TestService) -> base::Source {
    let mut files =
        fs::read_dir(fixture.path("base")).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
    files.sort();
    let files = files.iter().map(|path| service.api().upload(path)).collect();
    base::Source::Files(v1::FileSet { files })
}

/// Submits the job of the fixture with its data files and `base`, and returns its id.
pub(crate) fn submit(fixture: &Fixture, service: &TestService, base: base::Source) -> String {
    let api = service.api();
    let inputs = v1::Inputs {
        base: Some(v1::Base { source: Some(base) }),
        train: vec![api.upload(&fixture.path("train.jsonl"))],
        eval: Some(api.upload(&fixture.path("eval.jsonl"))),
        init_from: Vec::new(),
        tokens: Vec::new(),
    };
    let job = v1::JobSpec::try_from(&JobFile::read(&fixture.job()).unwrap().job).unwrap();
    let request =
        v1::SubmitJobRequest { job: Some(job), inputs: Some(inputs), ..v1::SubmitJobRequest::default() };
    api.submit(request).unwrap().job_id
}
