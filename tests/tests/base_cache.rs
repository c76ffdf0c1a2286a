//! The base stays in a worker's memory between jobs.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

use lora_coordinator::{Coordinator, Options};
use lora_e2e::{Fixture, LIMIT, Running, loractl};
use lora_proto::v1::fine_tuning_client::FineTuningClient;
use lora_proto::v1::{self, job_event};
use lora_spec::JobFile;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

#[tokio::test(flavor = "multi_thread")]
async fn a_second_job_on_the_same_base_skips_loading_and_one_on_another_does_not() {
    let fixture = Fixture::default();
    fixture.edit("job.yaml", "max_steps: 12", "max_steps: 1");
    let coordinator = Coordinator::bind(&Options::default()).await.unwrap();
    let handle = coordinator.handle();
    let serving = tokio::spawn(coordinator.serve());
    let address = format!("http://{}", handle.address());
    let arguments = ["worker", "--coordinator", &address, "--name", "w0", "--threads", "1"];
    let worker = Running::start(loractl().args(arguments));
    let channel = Endpoint::from_shared(address).unwrap().connect().await.unwrap();
    let mut client = FineTuningClient::new(channel);

    let first = run(&mut client, &fixture, "first").await;
    assert!(!first.cached);
    let second = run(&mut client, &fixture, "second").await;
    assert!(second.cached);
    assert_eq!(second.sha256, first.sha256);
    fixture.copy_base("copy");
    fixture.edit("job.yaml", "base: base", "base: copy");
    let third = run(&mut client, &fixture, "third").await;
    assert!(!third.cached);
    assert_eq!(third.sha256, first.sha256, "the hash is of the contents");
    assert_eq!([first.worker, second.worker, third.worker], ["w0", "w0", "w0"]);

    handle.shutdown();
    worker.wait().expect_code(0);
    timeout(LIMIT, serving).await.unwrap().unwrap().unwrap();
}

/// Submits the job, waits until it has succeeded, and returns what was said of the base.
async fn run(client: &mut FineTuningClient<Channel>, fixture: &Fixture, out: &str) -> v1::BaseReady {
    let request = v1::SubmitJobRequest {
        job: Some(v1::JobSpec::try_from(&JobFile::read(&fixture.job()).unwrap().job).unwrap()),
        output_dir: fixture.path(out).to_str().unwrap().to_owned(),
        resume: false,
    };
    let job_id = client.submit_job(request).await.unwrap().into_inner().job_id;
    let watch = v1::WatchJobRequest { job_id, from_number: 1 };
    let mut events = client.watch_job(watch).await.unwrap().into_inner();
    let (mut base, mut state) = (None, None);
    while let Some(event) = timeout(LIMIT, events.message()).await.unwrap().unwrap() {
        match event.kind {
            Some(job_event::Kind::BaseReady(ready)) => base = Some(ready),
            Some(job_event::Kind::StateChanged(change)) => state = Some(change),
            _ => {}
        }
    }
    let state = state.unwrap();
    assert_eq!(state.state, "succeeded", "{state:?}");
    base.unwrap()
}
