//! Datasets are tokenized once: by `loractl`, otherwise by the coordinator, and only if it does not
//! have the base by the workers.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use lora_e2e::{Fixture, TestService};
use lora_proto::v1::{self, base};

use crate::data::{submit, uploaded_base};
use crate::expect_reference_outcome;

/// The names of a job's token files.
fn tokens(job: &v1::Job) -> BTreeSet<String> {
    job.inputs.iter().flat_map(|inputs| &inputs.tokens).map(|file| file.name.clone()).collect()
}

/// The names of the token files that a process has made.
fn made(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir.join("tokens"));
    entries.into_iter().flatten().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_submitted_job_brings_its_tokens() {
    let fixture = Fixture::with_short_steps();
    let service = TestService::start();
    let workers = [service.worker("w0"), service.worker("w1")];
    let id = service.submit(&fixture);
    expect_reference_outcome(&service, &id, &fixture.path("result"));
    let job = service.api().job(&id).unwrap();
    assert_eq!(tokens(&job).len(), 2, "of training and evaluation rows");
    assert_eq!(made(service.state_dir()), BTreeSet::new(), "the coordinator has not tokenized");
    for worker in &workers {
        assert_eq!(made(worker.cache_dir()), BTreeSet::new(), "{} has not tokenized", worker.name);
    }
}

#[test]
fn the_coordinator_tokenizes_for_all_workers_and_for_later_jobs() {
    let fixture = Fixture::with_short_steps();
    let service = TestService::start();
    let base = uploaded_base(&fixture, &service);
    let first = submit(&fixture, &service, base.clone());
    let queued = service.until(&first, "the job is queued", |job| job.state == "queued");
    let (of_job, of_coordinator) = (tokens(&queued), made(service.state_dir()));
    assert!(of_job.len() == 2 && of_job == of_coordinator, "{of_job:?}, {of_coordinator:?}");
    let worker = service.worker("w0");
    let second = submit(&fixture, &service, base);
    for (id, dir) in [(first, "first"), (second, "second")] {
        expect_reference_outcome(&service, &id, &fixture.path(dir));
        assert_eq!(tokens(&service.api().job(&id).unwrap()), of_job);
    }
    assert_eq!(made(service.state_dir()), of_coordinator);
    assert_eq!(made(worker.cache_dir()), BTreeSet::new());
}

#[test]
fn a_worker_tokenizes_if_only_workers_have_the_base() {
    let fixture = Fixture::with_short_steps();
    let service = TestService::start();
    let root = fixture.path("").canonicalize().unwrap();
    let worker = service.worker_with("w0", &[("model_roots", root.to_str().unwrap())]);
    let base = base::Source::Path(root.join("base").to_str().unwrap().to_owned());
    let id = submit(&fixture, &service, base);
    expect_reference_outcome(&service, &id, &fixture.path("result"));
    assert_eq!(tokens(&service.api().job(&id).unwrap()), BTreeSet::new());
    assert_eq!((made(worker.cache_dir()).len(), made(service.state_dir()).len()), (2, 0));
}

#[test]
fn tokens_that_cannot_be_used_are_made_again() {
    let fixture = Fixture::with_short_steps();
    let service = TestService::start();
    let _worker = service.worker("w0");
    let api = service.api();
    fixture.write("other.safetensors", "not tokens");
    let mut inputs = v1::Inputs {
        base: Some(v1::Base { source: Some(uploaded_base(&fixture, &service)) }),
        train: vec![api.upload(&fixture.path("train.jsonl"))],
        eval: Some(api.upload(&fixture.path("eval.jsonl"))),
        tokens: vec![api.upload(&fixture.path("other.safetensors"))],
        ..v1::Inputs::default()
    };
    let job = lora_spec::JobFile::read(&fixture.job()).unwrap().job;
    let mut request = v1::SubmitJobRequest {
        job: Some(v1::JobSpec::try_from(&job).unwrap()),
        inputs: Some(inputs.clone()),
        ..v1::SubmitJobRequest::default()
    };
    let id = api.submit(request.clone()).unwrap().job_id;
    expect_reference_outcome(&service, &id, &fixture.path("first"));
    let mut names = tokens(&api.job(&id).unwrap());
    assert!(names.len() == 3 && names.remove("other.safetensors"), "{names:?}");
    // The right names, and contents that are no tokens.
    let unusable = |name: String| v1::StoredFile { name, ..inputs.tokens[0].clone() };
    inputs.tokens = names.into_iter().map(unusable).collect();
    request.inputs = Some(inputs);
    let id = api.submit(request).unwrap().job_id;
    expect_reference_outcome(&service, &id, &fixture.path("second"));
}
