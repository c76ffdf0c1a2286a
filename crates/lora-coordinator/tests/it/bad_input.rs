//! Missing, huge, negative and hostile values. Each is refused with an error that names the field,
//! and the coordinator continues to run.

use std::path::Path;

use lora_proto::v1::artifacts_client::ArtifactsClient;
use lora_proto::v1::worker_control_client::WorkerControlClient;
use lora_proto::v1::{self, base, download_request, job_artifact, upload_request, worker_message};
use lora_proto::{DigestBuilder, file_transfer};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::fake::{Cluster, FakeWorker, fast_config, job, train};

/// The field that a status with the code INVALID_ARGUMENT names.
fn field(status: &Status) -> String {
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    let details = status.get_error_details();
    let violation = &details.bad_request().expect("a field is named").field_violations[0];
    assert!(!violation.description.is_empty());
    violation.field.clone()
}

#[tokio::test]
async fn a_bad_submit_names_the_field_and_leaves_nothing() {
    let cluster = Cluster::start().await;
    let good = v1::SubmitJobRequest {
        job: Some(v1::JobSpec::try_from(&job(1, 1)).unwrap()),
        inputs: Some(cluster.inputs().await),
        ..v1::SubmitJobRequest::default()
    };
    type RequestChange = fn(&mut v1::SubmitJobRequest);
    let cases: Vec<(&str, RequestChange)> = vec![
        ("name", |r| r.job.as_mut().unwrap().name = None),
        ("name", |r| r.job.as_mut().unwrap().name = Some("../../etc".into())),
        ("name", |r| r.job.as_mut().unwrap().name = Some("n".repeat(100_000))),
        ("training.learning_rate", |r| {
            r.job.as_mut().unwrap().training.as_mut().unwrap().learning_rate = Some(f64::NAN);
        }),
        ("training.weight_decay", |r| {
            r.job.as_mut().unwrap().training.as_mut().unwrap().weight_decay = Some(-1.0);
        }),
        ("training.global_batch_size", |r| {
            r.job.as_mut().unwrap().training.as_mut().unwrap().global_batch_size = Some(u64::MAX);
        }),
        ("training.lr_scheduler_type", |r| {
            r.job.as_mut().unwrap().training.as_mut().unwrap().lr_scheduler_type = Some("\u{0}".into());
        }),
        ("adapter.r", |r| r.job.as_mut().unwrap().adapter.as_mut().unwrap().r = Some(0)),
        ("workers.min", |r| r.job.as_mut().unwrap().workers.as_mut().unwrap().min = Some(0)),
        ("revision", |r| r.job.as_mut().unwrap().revision = Some(99)),
        ("idempotency_key", |r| r.idempotency_key = "k".repeat(129)),
        ("priority", |r| r.priority = i32::MIN),
        ("inputs.base", |r| r.inputs.as_mut().unwrap().base = None),
        ("inputs.base", |r| r.inputs.as_mut().unwrap().base = Some(v1::Base { source: None })),
        ("inputs.base.path", |r| {
            r.inputs.as_mut().unwrap().base =
                Some(v1::Base { source: Some(base::Source::Path("etc".into())) });
        }),
        ("inputs.base.url", |r| {
            r.inputs.as_mut().unwrap().base =
                Some(v1::Base { source: Some(base::Source::Url("nowhere".into())) });
        }),
        ("inputs.base.files", |r| {
            let set = v1::FileSet { files: Vec::new() };
            r.inputs.as_mut().unwrap().base = Some(v1::Base { source: Some(base::Source::Files(set)) });
        }),
        ("inputs.base.files[1].name", |r| {
            let file = r.inputs.as_ref().unwrap().train[0].clone();
            let set = v1::FileSet { files: vec![file.clone(), file] };
            r.inputs.as_mut().unwrap().base = Some(v1::Base { source: Some(base::Source::Files(set)) });
        }),
        ("inputs.train", |r| r.inputs.as_mut().unwrap().train.clear()),
        ("inputs.train[0].name", |r| {
            r.inputs.as_mut().unwrap().train[0].name = "../secret".into();
        }),
        ("inputs.train[0].digest", |r| r.inputs.as_mut().unwrap().train[0].digest = None),
        ("inputs.train[0].digest.sha256", |r| {
            r.inputs.as_mut().unwrap().train[0].digest.as_mut().unwrap().sha256 = vec![1; 31];
        }),
        ("inputs.eval", |r| r.job.as_mut().unwrap().data.as_mut().unwrap().eval = Some("/eval".into())),
        ("inputs.init_from", |r| {
            let file = r.inputs.as_ref().unwrap().train[0].clone();
            r.inputs.as_mut().unwrap().init_from = vec![file];
        }),
    ];
    for (wanted, change) in cases {
        let mut request = good.clone();
        change(&mut request);
        let plan = v1::PlanJobRequest { job: request.job.clone(), inputs: request.inputs.clone() };
        let status = cluster.jobs().submit_job(request).await.unwrap_err();
        assert_eq!(field(&status), wanted, "{status}");
        if !["idempotency_key", "priority"].contains(&wanted) {
            assert_eq!(field(&cluster.jobs().plan_job(plan).await.unwrap_err()), wanted);
        }
    }
    let mut request = good.clone();
    request.inputs.as_mut().unwrap().train[0].digest = Some(DigestBuilder::of_bytes(b"never uploaded"));
    let status = cluster.jobs().submit_job(request).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains(&DigestBuilder::of_bytes(b"never uploaded").hex()), "{status}");
    // A message above the size limit.
    let mut request = good.clone();
    request.job.as_mut().unwrap().model.as_mut().unwrap().base = Some("b".repeat(2 << 20));
    assert_eq!(cluster.jobs().submit_job(request).await.unwrap_err().code(), Code::OutOfRange);
    let list = cluster.jobs().list_jobs(v1::ListJobsRequest::default()).await.unwrap().into_inner();
    assert!(list.jobs.is_empty(), "{list:?}");
    cluster.jobs().submit_job(good).await.unwrap();
    cluster.stop().await;
}

#[tokio::test]
async fn calls_about_unknown_jobs_fail() {
    let cluster = Cluster::start().await;
    for (job_id, code) in
        [("nobody", Code::NotFound), ("", Code::InvalidArgument), (&"x".repeat(129), Code::InvalidArgument)]
    {
        let job_id = job_id.to_owned();
        let mut jobs = cluster.jobs();
        let errors = [
            jobs.get_job(v1::GetJobRequest { job_id: job_id.clone() }).await.unwrap_err(),
            cluster.cancel(&job_id).await.unwrap_err(),
            cluster.pause(&job_id).await.unwrap_err(),
            cluster.resume(&job_id, None).await.unwrap_err(),
            jobs.watch_job(v1::WatchJobRequest { job_id, ..Default::default() }).await.unwrap_err(),
        ];
        for status in errors {
            assert_eq!(status.code(), code, "{status}");
            if code == Code::InvalidArgument {
                assert_eq!(field(&status), "job_id");
            }
        }
    }
    for (wanted, request) in [
        ("page_size", v1::ListJobsRequest { page_size: u32::MAX, ..Default::default() }),
        ("page_token", v1::ListJobsRequest { page_token: "-".into(), ..Default::default() }),
        ("states[0]", v1::ListJobsRequest { states: vec!["done".into()], ..Default::default() }),
    ] {
        assert_eq!(field(&cluster.jobs().list_jobs(request).await.unwrap_err()), wanted);
    }
    let job_id = cluster.submit(&job(1, 1)).await;
    cluster.pause(&job_id).await.unwrap();
    assert_eq!(field(&cluster.resume(&job_id, Some(0)).await.unwrap_err()), "workers.min");
    assert_eq!(field(&cluster.resume(&job_id, Some(u64::MAX)).await.unwrap_err()), "workers.max");
    cluster.stop().await;
}

async fn upload(cluster: &Cluster, kinds: Vec<upload_request::Kind>) -> Result<(), Status> {
    let messages = kinds.into_iter().map(|kind| v1::UploadRequest { kind: Some(kind) });
    let stream = tokio_stream::iter(messages.collect::<Vec<_>>());
    ArtifactsClient::new(cluster.channel.clone()).upload(stream).await.map(drop)
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[tokio::test]
async fn a_bad_upload_leaves_nothing() {
    use upload_request::Kind::{Chunk, Header};
    let mut config = fast_config();
    config.limits.upload_bytes = 1000;
    let cluster = Cluster::start_with(config).await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    let objects = cluster.config.state_dir.join("objects");
    let before = entries(&objects);
    let right = DigestBuilder::of_bytes(b"state");
    let header = |digest: &v1::FileDigest| v1::UploadHeader { digest: Some(digest.clone()), artifact: None };
    let chunk = || Chunk(b"state".to_vec());
    for (code, kinds) in [
        (Code::DataLoss, vec![Header(header(&DigestBuilder::of_bytes(b"stats"))), chunk()]),
        (Code::DataLoss, vec![Header(header(&v1::FileDigest { size: 4, ..right.clone() })), chunk()]),
        (Code::DataLoss, vec![Header(header(&v1::FileDigest { size: 6, ..right.clone() })), chunk()]),
        (Code::ResourceExhausted, vec![Header(header(&v1::FileDigest { size: 1001, ..right.clone() }))]),
        (Code::InvalidArgument, vec![chunk()]),
        (Code::InvalidArgument, vec![Header(header(&right)), Header(header(&right))]),
        (Code::InvalidArgument, vec![Header(v1::UploadHeader::default())]),
        (Code::InvalidArgument, vec![]),
    ] {
        let status = upload(&cluster, kinds).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
    let names: [(Code, Option<job_artifact::Name>); 4] = [
        (Code::InvalidArgument, None),
        (Code::InvalidArgument, Some(job_artifact::Name::ResultFile("../../x".into()))),
        (Code::InvalidArgument, Some(job_artifact::Name::ResultFile(String::new()))),
        (Code::InvalidArgument, Some(job_artifact::Name::ResultFile(".hidden".into()))),
    ];
    for (code, name) in names {
        let artifact = v1::JobArtifact { job_id: job_id.clone(), generation: 1, name };
        let header = v1::UploadHeader { digest: Some(right.clone()), artifact: Some(artifact) };
        let status = upload(&cluster, vec![Header(header), chunk()]).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
    for (code, id, generation) in [
        (Code::NotFound, "nobody", 1),
        (Code::FailedPrecondition, job_id.as_str(), 0),
        (Code::FailedPrecondition, job_id.as_str(), u64::MAX),
    ] {
        let name = Some(job_artifact::Name::CheckpointStep(1));
        let artifact = v1::JobArtifact { job_id: id.into(), generation, name };
        let header = v1::UploadHeader { digest: Some(right.clone()), artifact: Some(artifact) };
        // It is refused before the content comes.
        let (messages, stream) = tokio::sync::mpsc::channel(1);
        messages.send(v1::UploadRequest { kind: Some(Header(header)) }).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut client = ArtifactsClient::new(cluster.channel.clone());
        let answer = tokio::time::timeout(crate::fake::WAIT_TIMEOUT, client.upload(stream));
        let status = answer.await.expect("an answer").unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        drop(messages);
    }
    // A client that disconnects during an upload.
    let (messages, stream) = tokio::sync::mpsc::channel(4);
    let size = v1::FileDigest { size: 900, ..right.clone() };
    for kind in [Header(header(&size)), chunk()] {
        messages.send(v1::UploadRequest { kind: Some(kind) }).await.unwrap();
    }
    let mut client = ArtifactsClient::new(cluster.channel.clone());
    let call =
        tokio::spawn(async move { client.upload(tokio_stream::wrappers::ReceiverStream::new(stream)).await });
    let staging = cluster.config.state_dir.join("staging");
    let deadline = tokio::time::Instant::now() + crate::fake::WAIT_TIMEOUT;
    while entries(&staging) == 0 {
        assert!(tokio::time::Instant::now() < deadline, "the upload did not start");
        tokio::task::yield_now().await;
    }
    call.abort();
    drop(messages);
    while entries(&staging) > 0 {
        assert!(tokio::time::Instant::now() < deadline, "the staged file is not removed");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(entries(&objects), before);
    cluster.checkpoint(&a[0], 1, b"state").await;
    cluster.stop().await;
}

#[tokio::test]
async fn invalid_downloads_name_the_reason() {
    let cluster = Cluster::start().await;
    let file = cluster.store("train.jsonl", b"content").await;
    let digest = file.digest.unwrap();
    let download = async |source, offset| {
        let request = v1::DownloadRequest { source, offset };
        ArtifactsClient::new(cluster.channel.clone()).download(request).await.map(drop).unwrap_err()
    };
    assert_eq!(field(&download(None, 0).await), "source");
    let short = Some(download_request::Source::Sha256(vec![0; 5]));
    assert_eq!(field(&download(short, 0).await), "sha256.sha256");
    let unknown = Some(download_request::Source::Sha256(vec![0; 32]));
    assert_eq!(download(unknown, 0).await.code(), Code::NotFound);
    let known = Some(download_request::Source::Sha256(digest.sha256.clone()));
    assert_eq!(download(known, 8).await.code(), Code::OutOfRange);
    let hostile = v1::ResultFile { job_id: "nobody".into(), name: "../../etc/passwd".into() };
    let status = download(Some(download_request::Source::Result(hostile)), 0).await;
    assert_eq!(status.code(), Code::NotFound, "{status}");
    // A download continues where an earlier one ended.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, b"cont").unwrap();
    let source = download_request::Source::Sha256(digest.sha256);
    file_transfer::download(cluster.channel.clone(), source, &path, |_| {}).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), b"content");
    cluster.stop().await;
}

#[tokio::test]
async fn a_misbehaving_worker_is_refused_or_disconnected() {
    let cluster = Cluster::start().await;
    let connect = async |kind| {
        let stream = tokio_stream::iter([v1::WorkerMessage { kind }]);
        WorkerControlClient::new(cluster.channel.clone()).connect(stream).await.map(drop).unwrap_err()
    };
    let hello = v1::Hello {
        name: "w0".into(),
        instance_id: "1".into(),
        numerics_id: "n".into(),
        peer_address: "a:1".into(),
        ..v1::Hello::default()
    };
    assert_eq!(field(&connect(None).await), "hello");
    let status = worker_message::Kind::Status(v1::WorkerStatus::default());
    assert_eq!(field(&connect(Some(status)).await), "hello");
    for (wanted, hello) in [
        ("hello.name", v1::Hello { name: String::new(), ..hello.clone() }),
        ("hello.name", v1::Hello { name: "w".repeat(257), ..hello.clone() }),
        ("hello.instance_id", v1::Hello { instance_id: String::new(), ..hello.clone() }),
        ("hello.numerics_id", v1::Hello { numerics_id: String::new(), ..hello.clone() }),
        ("hello.peer_address", v1::Hello { peer_address: String::new(), ..hello.clone() }),
    ] {
        assert_eq!(field(&connect(Some(worker_message::Kind::Hello(hello))).await), wanted);
    }
    // Steps and states of another worker's job, and steps with the invalid number 0, are ignored.
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut good = FakeWorker::connect(&cluster, "good").await;
    let a = train(&mut [&mut good], 0).await;
    let bad = FakeWorker::connect(&cluster, "bad").await;
    bad.steps(&a[0], 5..=6).await;
    bad.phase(&a[0], v1::Phase::Finished, 9).await;
    good.steps(&a[0], 0..=0).await;
    good.steps(&a[0], 1..=1).await;
    good.until_acked(1).await;
    let job = cluster.job(&job_id).await;
    assert_eq!((job.state.as_str(), job.completed_steps), ("running", 1));
    cluster.stop().await;
}
