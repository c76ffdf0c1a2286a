//! Inputs on which no job can be trained, from a client that does not check them. The coordinator
//! checks them before it assigns workers.

use std::fs::{self, OpenOptions};

use lora_e2e::{Fixture, TestService};
use lora_proto::v1::{self, base};
use lora_spec::JobFile;

#[test]
fn an_invalid_line_fails_the_job_with_file_and_line() {
    let fixture = Fixture::default();
    fixture.append("train.jsonl", r#"{"prompt": "a", "completion": "b"#);
    expect_failure(&fixture, &["train.jsonl:58", "invalid JSON"]);
}

#[test]
fn an_invalid_line_in_the_evaluation_rows_fails_the_job() {
    let fixture = Fixture::default();
    fixture.append("eval.jsonl", "[1]x");
    expect_failure(&fixture, &["eval.jsonl:11", "invalid JSON"]);
}

#[test]
fn a_truncated_base_fails_the_job() {
    let fixture = Fixture::default();
    let file = OpenOptions::new().write(true).open(fixture.path("base/model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    expect_failure(&fixture, &["model.safetensors", "truncated"]);
}

#[test]
fn a_base_of_an_unknown_architecture_fails_the_job() {
    let fixture = Fixture::default();
    fixture.edit("base/config.json", "LlamaForCausalLM", "GPT2LMHeadModel");
    expect_failure(&fixture, &["config.json", "GPT2LMHeadModel", "LlamaForCausalLM"]);
}

/// Uploads the files as they are, submits the job without any worker, and checks the cause of its
/// failure.
fn expect_failure(fixture: &Fixture, expected: &[&str]) {
    let service = TestService::start();
    let api = service.api();
    let mut files =
        fs::read_dir(fixture.path("base")).unwrap().map(|file| file.unwrap().path()).collect::<Vec<_>>();
    files.sort();
    let files = files.iter().map(|path| api.upload(path)).collect();
    let inputs = v1::Inputs {
        base: Some(v1::Base { source: Some(base::Source::Files(v1::FileSet { files })) }),
        train: Some(api.upload(&fixture.path("train.jsonl"))),
        eval: Some(api.upload(&fixture.path("eval.jsonl"))),
        init_from: Vec::new(),
    };
    let job = v1::JobSpec::try_from(&JobFile::read(&fixture.job()).unwrap().job).unwrap();
    let request =
        v1::SubmitJobRequest { job: Some(job), inputs: Some(inputs), ..v1::SubmitJobRequest::default() };
    let job = api.submit(request).unwrap().job_id;
    let failed = service.until_state(&job, "failed");
    let cause = failed.failure.unwrap().cause;
    for words in expected {
        assert!(cause.contains(words), "{words}: {cause}");
    }
    let temporary = std::env::temp_dir();
    assert!(!cause.contains(temporary.to_str().unwrap()), "a path of the coordinator: {cause}");
    assert_eq!(failed.generation, 0);
    // `watch` prints the same error.
    let watched = service.run(&["watch", &job]).expect_code(3);
    assert!(watched.error().unwrap_or_default().contains(expected[0]), "{}", watched.stderr);
    assert_eq!(service.daemon().get("/healthz").status, 200);
}
