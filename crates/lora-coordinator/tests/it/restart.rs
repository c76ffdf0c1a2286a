//! Restarts of the coordinator.

use lora_proto::v1::{self, Goal, Phase, job_event};

use crate::fake::{Cluster, FakeWorker, TwoWorkerJob, fast_config, held, job, train};

#[tokio::test]
async fn running_workers_are_recovered_after_a_restart() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, w0, mut w1, a } = TwoWorkerJob::training(&cluster, &job(2, 2)).await;
    w0.steps(&a[0], 1..=2).await;
    w1.until_acked(2).await;
    let term = w0.welcome.term;
    let statuses = [w0.disconnect(), w1.disconnect()];
    let cluster = cluster.restart().await;
    assert_eq!(cluster.job(&job_id).await.state, "running");
    let [s0, s1] = statuses;
    let mut w0 = FakeWorker::connect_as(&cluster, "w0", "1", "fake", s0).await.unwrap();
    let mut w1 = FakeWorker::connect_as(&cluster, "w1", "1", "fake", s1).await.unwrap();
    assert_eq!(w0.welcome.term, term + 1);
    let recovery = &cluster.config.recovery;
    assert_eq!(
        (w0.welcome.forming_seconds, w0.welcome.step_seconds),
        (recovery.forming_seconds, recovery.step_seconds)
    );
    let resent = w0.goal(Goal::Train).await;
    assert_eq!((resent.generation, resent.rank, &resent.token), (1, 0, &a[0].token));
    assert_eq!(w1.goal(Goal::Train).await.rank, 1);
    // The worker sends a step again whose acknowledgement it may have missed, and the next one.
    w0.steps(&a[0], 2..=3).await;
    w0.until_acked(3).await;
    let job = cluster.job(&job_id).await;
    assert_eq!((job.state.as_str(), job.generation, job.completed_steps), ("running", 1, 3));
    cluster.stop().await;
}

#[tokio::test]
async fn a_worker_that_does_not_reconnect_is_lost_after_its_lease() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, w0, w1, a } = TwoWorkerJob::training(&cluster, &job(1, 2)).await;
    w1.disconnect();
    let status = w0.disconnect();
    let cluster = cluster.restart().await;
    let mut w0 = FakeWorker::connect_as(&cluster, "w0", "1", "fake", status).await.unwrap();
    w0.goal(Goal::Train).await;
    w0.broken(&a[0], 4, "rank 1 closed the connection", &[]).await;
    let b = w0.prepare(4).await;
    assert_eq!((b.generation, b.peers.len()), (2, 1));
    assert_eq!(cluster.until(&job_id, "running").await.completed_steps, 4);
    cluster.stop().await;
}

/// Restarts the coordinator of two disconnected workers whose steps have exceeded the time limit.
/// The first worker waits for the second. Returns their statuses, by worker.
async fn slow_pair(cluster: Cluster, min: usize) -> (Cluster, String, [v1::WorkerStatus; 2]) {
    let TwoWorkerJob { job_id, w0, w1, a } = TwoWorkerJob::training(&cluster, &job(min, 2)).await;
    let slow = |assignment, waiting_for_peers| v1::WorkerStatus {
        job: Some(v1::HeldJob {
            seconds_in_phase: 5.0,
            waiting_for_peers,
            ..held(assignment, Phase::Training, 3)
        }),
        ..v1::WorkerStatus::default()
    };
    let statuses = [slow(&a[0], true), slow(&a[1], false)];
    w0.disconnect();
    w1.disconnect();
    (cluster.restart().await, job_id, statuses)
}

#[tokio::test]
async fn a_worker_that_waits_for_a_disconnected_peer_is_not_evicted() {
    let mut config = fast_config();
    config.recovery.step_seconds = 1.0;
    // The second worker counts as disconnected, not as lost, until it connects.
    config.workers.lease_seconds = 60.0;
    let (cluster, job_id, [s0, s1]) = slow_pair(Cluster::start_with(config).await, 2).await;
    let mut w0 = FakeWorker::connect_as(&cluster, "w0", "1", "fake", s0).await.unwrap();
    let resent = w0.goal(Goal::Train).await;
    // The acknowledgement of a step shows that the status before it was handled.
    w0.steps(&resent, 1..=1).await;
    w0.until_acked(1).await;
    let _w1 = FakeWorker::connect_as(&cluster, "w1", "1", "fake", s1).await.unwrap();
    assert_eq!(cluster.until(&job_id, "waiting").await.workers, ["w0"]);
    cluster.stop().await;
}

#[tokio::test]
async fn a_worker_that_waits_for_a_lost_peer_continues_without_it() {
    let mut config = fast_config();
    config.recovery.step_seconds = 1.0;
    let (cluster, _, [s0, _]) = slow_pair(Cluster::start_with(config).await, 1).await;
    let mut w0 = FakeWorker::connect_as(&cluster, "w0", "1", "fake", s0).await.unwrap();
    let b = w0.prepare(3).await;
    // No checkpoint is stored: the newest state is in this worker's memory.
    assert_eq!((b.generation, b.peers.len(), b.checkpoint), (2, 1, None));
    cluster.stop().await;
}

#[tokio::test]
async fn paused_waiting_and_cancelling_jobs_survive_a_restart() {
    let cluster = Cluster::start().await;
    let paused = cluster.submit(&job(1, 1)).await;
    cluster.pause(&paused).await.unwrap();
    let waiting = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    cluster.checkpoint(&a[0], 7, b"seven").await;
    w0.disconnect();
    cluster.until(&waiting, "waiting").await;
    let cancelling = cluster.submit(&job(1, 1)).await;
    let cluster = cluster.restart().await;
    assert_eq!(cluster.job(&paused).await.state, "paused");
    cluster.until(&cancelling, "queued").await;
    // The older job is served first.
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    let b = w1.prepare(7).await;
    assert_eq!((&b.job_id, b.checkpoint.unwrap().step), (&waiting, 7));
    cluster.cancel(&waiting).await.unwrap();
    let cluster = cluster.restart().await;
    cluster.until(&waiting, "cancelled").await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_result_finished_during_downtime_is_accepted() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    cluster.result(&a[0], "receipt.json", b"{}").await;
    w0.disconnect();
    let cluster = cluster.restart().await;
    let finished = v1::HeldJob { files: vec!["receipt.json".into()], ..held(&a[0], Phase::Finished, 2) };
    let status = v1::WorkerStatus { job: Some(finished), ..v1::WorkerStatus::default() };
    let mut w0 = FakeWorker::connect_as(&cluster, "w0", "1", "fake", status).await.unwrap();
    // The last steps come after the hello; the coordinator waits for them.
    w0.steps(&a[0], 1..=2).await;
    w0.release().await;
    let job = cluster.until(&job_id, "succeeded").await;
    assert_eq!(job.completed_steps, 2);
    assert_eq!(cluster.download(&job_id, "metrics.jsonl").await.iter().filter(|b| **b == b'\n').count(), 2);
    cluster.stop().await;
}

#[tokio::test]
async fn a_group_notice_is_recorded_once_per_generation() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    let status = |assignment, steps| {
        Some(v1::HeldJob { notice: "over TCP".into(), ..held(assignment, Phase::Training, steps) })
    };
    w0.say(status(&a[0], 0)).await;
    w0.steps(&a[0], 1..=1).await;
    w0.until_acked(1).await;
    w0.say(status(&a[0], 1)).await;
    let last = w0.disconnect();

    let cluster = cluster.restart().await;
    let mut w0 = FakeWorker::connect_as(&cluster, "w0", "1", "fake", last).await.unwrap();
    w0.goal(Goal::Train).await;
    w0.steps(&a[0], 2..=2).await;
    w0.until_acked(2).await;
    w0.broken(&a[0], 2, "rank 0 closed the connection", &[]).await;
    let b = w0.prepare(2).await;
    w0.goal(Goal::Train).await;
    w0.say(status(&b, 2)).await;
    w0.steps(&b, 3..=3).await;
    w0.until_acked(3).await;

    cluster.cancel(&job_id).await.unwrap();
    w0.release().await;
    let notices = cluster.events(&job_id).await.into_iter().filter_map(|event| match event {
        job_event::Kind::Notice(notice) if notice.text == "over TCP" => Some((notice.worker, notice.step)),
        _ => None,
    });
    assert_eq!(notices.collect::<Vec<_>>(), [("w0".to_owned(), 0), ("w0".to_owned(), 2)]);
    cluster.stop().await;
}

#[tokio::test]
async fn the_base_of_a_member_is_recorded_once() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(2, 2)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    let a = w0.prepare(0).await;
    w1.goal(Goal::Prepare).await;
    // The coordinator ends while the job is preparing, and one member has loaded the base.
    cluster.until_event(&job_id, |event| matches!(event, job_event::Kind::BaseReady(_))).await;
    w1.disconnect();
    let status = w0.disconnect();
    let cluster = cluster.restart().await;
    let mut w0 = FakeWorker::connect_as(&cluster, "w0", "1", "fake", status).await.unwrap();
    let mut w1 =
        FakeWorker::connect_as(&cluster, "w1", "1", "fake", v1::WorkerStatus::default()).await.unwrap();
    w0.goal(Goal::Prepare).await;
    w1.prepare(0).await;
    w0.phase(&a, Phase::Prepared, 0).await;
    w0.goal(Goal::Train).await;
    cluster.until(&job_id, "running").await;
    cluster.cancel(&job_id).await.unwrap();
    w0.release().await;
    w1.release().await;
    let bases = cluster.events(&job_id).await.into_iter().filter_map(|event| match event {
        job_event::Kind::BaseReady(base) => Some(base.worker),
        _ => None,
    });
    assert_eq!(bases.collect::<Vec<_>>(), ["w0", "w1"]);
    cluster.stop().await;
}

#[tokio::test]
async fn a_repeated_submit_returns_the_same_job_after_a_restart() {
    let cluster = Cluster::start().await;
    let request = v1::SubmitJobRequest {
        idempotency_key: "once".into(),
        job: Some(v1::JobSpec::try_from(&job(1, 1)).unwrap()),
        inputs: Some(cluster.inputs().await),
        priority: 0,
    };
    let first = cluster.jobs().submit_job(request.clone()).await.unwrap().into_inner();
    let cluster = cluster.restart().await;
    let second = cluster.jobs().submit_job(request.clone()).await.unwrap().into_inner();
    assert_eq!(first.job_id, second.job_id);
    // A client of another build has other tokens of the same rows.
    let mut with_tokens = request.clone();
    let inputs = with_tokens.inputs.as_mut().unwrap();
    inputs.tokens = vec![v1::StoredFile { name: "key.safetensors".into(), ..inputs.train[0].clone() }];
    let third = cluster.jobs().submit_job(with_tokens).await.unwrap().into_inner();
    assert_eq!(first.job_id, third.job_id);
    let mut other = job(1, 1);
    other.training.learning_rate = 0.5;
    let other = v1::SubmitJobRequest { job: Some(v1::JobSpec::try_from(&other).unwrap()), ..request };
    let error = cluster.jobs().submit_job(other).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::AlreadyExists);
    assert!(error.message().contains("training.learning_rate is 0.5, and was 0.0002"), "{error}");
    cluster.stop().await;
}
