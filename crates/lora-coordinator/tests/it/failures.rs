//! Workers that die, hang, leave and join.

use lora_proto::v1::{Fault, Goal, Phase, job_artifact, job_event};

use crate::fake::{Cluster, FakeWorker, TwoWorkerJob, fast_config, job, train};

#[tokio::test]
async fn survivors_continue_and_a_new_worker_joins_at_a_step_boundary() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, w0, mut w1, a } = TwoWorkerJob::training(&cluster, &job(1, 2)).await;
    w0.steps(&a[0], 1..=2).await;
    w1.phase(&a[1], Phase::Training, 2).await;
    // Rank 0 dies, and rank 1 reports it.
    w0.disconnect();
    w1.broken(&a[1], 2, "rank 0 closed the connection", &[]).await;
    let b = w1.prepare(2).await;
    assert_eq!((b.generation, b.rank, b.peers.len(), &b.checkpoint), (2, 0, 1, &None));
    w1.goal(Goal::Train).await;
    w1.phase(&b, Phase::Training, 2).await;
    w1.steps(&b, 3..=3).await;
    // Uploads of the old generation are refused.
    let old = cluster.upload(&a[0], job_artifact::Name::CheckpointStep(2), b"old").await.unwrap_err();
    assert!(old.to_string().contains("generation 1 may not write"), "{old}");

    let mut w2 = FakeWorker::connect(&cluster, "w2").await;
    w1.goal(Goal::Stop).await;
    w1.phase(&b, Phase::Stopped, 4).await;
    let c = w1.prepare(4).await;
    assert_eq!(
        (c.generation, c.rank, c.peers.as_slice()),
        (3, 0, ["w1:1".to_owned(), "w2:1".to_owned()].as_slice())
    );
    let d = w2.prepare(0).await;
    assert_eq!((d.rank, d.checkpoint), (1, None));
    w1.goal(Goal::Train).await;
    w2.goal(Goal::Train).await;
    let job = cluster.until(&job_id, "running").await;
    assert_eq!((job.workers, job.completed_steps), (vec!["w1".to_owned(), "w2".to_owned()], 4));
    cluster.cancel(&job_id).await.unwrap();
    w1.release().await;
    w2.release().await;
    let lost = cluster.events(&job_id).await.into_iter().find_map(|event| match event {
        job_event::Kind::WorkerLost(lost) => Some((lost.worker, lost.rank)),
        _ => None,
    });
    assert_eq!(lost, Some(("w0".to_owned(), 0)));
    cluster.stop().await;
}

#[tokio::test]
async fn a_job_that_loses_its_only_worker_resumes_from_its_checkpoint() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    w0.steps(&a[0], 1..=3).await;
    cluster.checkpoint(&a[0], 2, b"two").await;
    w0.disconnect();
    let waiting = cluster.until(&job_id, "waiting").await;
    assert!(waiting.workers.is_empty());
    cluster.until_that(&job_id, |job| job.waiting_for.contains("1 worker")).await;
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    let b = w1.prepare(2).await;
    assert_eq!((b.generation, b.checkpoint.clone().unwrap().step), (2, 2));
    w1.goal(Goal::Train).await;
    // Steps that are computed again are accepted.
    w1.steps(&b, 3..=4).await;
    w1.until_acked(4).await;
    assert_eq!(cluster.job(&job_id).await.completed_steps, 4);
    cluster.stop().await;
}

#[tokio::test]
async fn a_restarted_worker_replaces_its_old_process() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut first = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut first], 0).await;
    let status = Default::default();
    let refused = FakeWorker::connect_as(&cluster, "w0", "2", "fake", status).await.err().unwrap();
    assert_eq!(refused.code(), tonic::Code::AlreadyExists, "{refused}");
    first.disconnect();
    let mut second = connect_again(&cluster, "w0").await;
    let b = second.prepare(0).await;
    assert_eq!((b.job_id, b.generation), (job_id, a[0].generation + 1));
    cluster.stop().await;
}

/// Connects a new process of a worker.
async fn connect_again(cluster: &Cluster, name: &str) -> FakeWorker {
    loop {
        // The coordinator may not have noticed the end of the first connection yet.
        match FakeWorker::connect_as(cluster, name, "2", "fake", Default::default()).await {
            Ok(worker) => return worker,
            Err(status) => assert_eq!(status.code(), tonic::Code::AlreadyExists, "{status}"),
        }
    }
}

#[tokio::test]
async fn a_reconnect_changes_nothing() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    let status = w0.disconnect();
    let mut w0 = FakeWorker::connect_as(&cluster, "w0", "1", "fake", status).await.unwrap();
    assert_eq!(w0.goal(Goal::Train).await, a[0]);
    w0.steps(&a[0], 1..=1).await;
    w0.until_acked(1).await;
    let job = cluster.job(&job_id).await;
    assert_eq!((job.state.as_str(), job.generation), ("running", 1));
    cluster.stop().await;
}

#[tokio::test]
async fn a_draining_worker_saves_its_state_before_it_leaves() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    w0.steps(&a[0], 1..=5).await;
    w0.drain().await;
    w0.goal(Goal::Stop).await;
    w0.phase(&a[0], Phase::Stopped, 5).await;
    w0.goal(Goal::Save).await;
    cluster.checkpoint(&a[0], 5, b"five").await;
    w0.phase(&a[0], Phase::Saved, 5).await;
    w0.release().await;
    cluster.until(&job_id, "waiting").await;
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    assert_eq!(w1.prepare(5).await.checkpoint.unwrap().step, 5);
    cluster.stop().await;
}

#[tokio::test]
async fn peers_of_a_draining_worker_continue() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { mut w0, mut w1, a, .. } = TwoWorkerJob::training(&cluster, &job(1, 2)).await;
    w0.drain().await;
    for (worker, assignment) in [(&mut w0, &a[0]), (&mut w1, &a[1])] {
        worker.goal(Goal::Stop).await;
        worker.phase(assignment, Phase::Stopped, 3).await;
    }
    w0.release().await;
    let b = w1.prepare(3).await;
    assert_eq!((b.peers.len(), b.rank), (1, 0));
    cluster.stop().await;
}

#[tokio::test]
async fn a_stuck_worker_is_evicted() {
    let mut config = fast_config();
    config.recovery.step_seconds = 1.0;
    let cluster = Cluster::start_with(config).await;
    let TwoWorkerJob { job_id, mut w0, mut w1, a } = TwoWorkerJob::training(&cluster, &job(2, 2)).await;
    let slow = |waiting_for_peers, assignment| lora_proto::v1::HeldJob {
        seconds_in_phase: 5.0,
        waiting_for_peers,
        ..crate::fake::held(assignment, Phase::Training, 0)
    };
    // The acknowledgement of a step shows that the status before it was handled.
    w1.steps(&a[1], 1..=1).await;
    w1.until_acked(1).await;
    // The worker that waits for the other one exceeds its time limit first.
    w0.say(Some(slow(true, &a[0]))).await;
    w0.steps(&a[0], 2..=2).await;
    w0.until_acked(2).await;
    w1.say(Some(slow(false, &a[1]))).await;
    cluster.until(&job_id, "waiting").await;
    let lost = cluster.job(&job_id).await;
    assert_eq!(lost.workers, ["w0"]);
    cluster.stop().await;
}

#[tokio::test]
async fn mutually_unreachable_ranks_are_not_grouped_again() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { mut w0, mut w1, a, .. } = TwoWorkerJob::training(&cluster, &job(1, 2)).await;
    w0.broken(&a[0], 0, "ranks [1] did not connect", &[1]).await;
    w1.broken(&a[1], 0, "no connection to rank 0", &[0]).await;
    w1.release().await;
    let b = w0.prepare(0).await;
    assert_eq!((b.generation, b.peers.len()), (2, 1));
    w0.goal(Goal::Train).await;
    w0.phase(&b, Phase::Training, 0).await;
    w0.steps(&b, 1..=1).await;
    w0.until_acked(1).await;
    // The other worker is free, but the job does not use it again.
    assert_eq!(w0.directive.goal(), Goal::Train);
    cluster.stop().await;
}

#[tokio::test]
async fn a_job_without_progress_fails_with_the_last_cause() {
    let mut config = fast_config();
    config.recovery.fruitless_generations = 2;
    let cluster = Cluster::start_with(config).await;
    let job_id = cluster.submit(&job(1, 1)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    for _ in 0..2 {
        let a = train(&mut [&mut w0], 0).await;
        w0.broken(&a[0], 0, "a socket of this rank failed", &[]).await;
    }
    let failure = cluster.until(&job_id, "failed").await.failure.unwrap();
    assert!(
        failure.cause.contains("2 groups in a row") && failure.cause.contains("a socket of this rank failed")
    );
    cluster.stop().await;
}

#[tokio::test]
async fn workers_whose_bases_differ_do_not_train_together() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(2, 2)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    w0.prepare(0).await;
    let a = w1.goal(Goal::Prepare).await;
    let mut held = crate::fake::held(&a, Phase::Prepared, 0);
    held.base.as_mut().unwrap().sha256 = "0the4".into();
    w1.say(Some(held)).await;
    let failure = cluster.until(&job_id, "failed").await.failure.unwrap();
    assert!(failure.cause.contains("0the4") && failure.cause.contains("ba5e"), "{failure:?}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_pause_during_worker_loss_keeps_the_survivors_state() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, w0, mut w1, a } = TwoWorkerJob::training(&cluster, &job(2, 2)).await;
    w0.steps(&a[0], 1..=3).await;
    w1.phase(&a[1], Phase::Training, 3).await;
    cluster.pause(&job_id).await.unwrap();
    w0.disconnect();
    w1.broken(&a[1], 3, "rank 0 closed the connection", &[]).await;
    w1.goal(Goal::Save).await;
    cluster.checkpoint(&a[1], 3, b"three").await;
    w1.phase(&a[1], Phase::Saved, 3).await;
    assert_eq!(cluster.until(&job_id, "paused").await.checkpoint_step, Some(3));
    cluster.stop().await;
}

/// Brings an older and a newer job with these priorities into the state `waiting`, each with one of
/// its two workers. One of them must save its state and give its worker to the other one.
async fn one_of_two_waiting_jobs_gives_way(older_priority: i32, newer_priority: i32, newer_stays: bool) {
    let cluster = Cluster::start().await;
    let older = cluster.submit_with_priority(&job(2, 2), older_priority).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    let a = train(&mut [&mut w0, &mut w1], 0).await;
    let newer = cluster.submit_with_priority(&job(2, 2), newer_priority).await;
    let mut w2 = FakeWorker::connect(&cluster, "w2").await;
    let mut w3 = FakeWorker::connect(&cluster, "w3").await;
    let b = train(&mut [&mut w2, &mut w3], 0).await;
    assert_eq!((&a[0].job_id, &b[0].job_id), (&older, &newer));
    w1.disconnect();
    w3.disconnect();
    cluster.until_lost(&["w1", "w3"]).await;
    let (stays, mut stays_worker, a, leaves, mut leaves_worker, b) = match newer_stays {
        false => (older, w0, &a[0], newer, w2, &b[0]),
        true => (newer, w2, &b[0], older, w0, &a[0]),
    };
    stays_worker.broken(a, 4, "its peer is gone", &[]).await;
    cluster.until(&stays, "waiting").await;
    leaves_worker.broken(b, 6, "its peer is gone", &[]).await;
    // The remaining worker saves its state before it leaves.
    leaves_worker.goal(Goal::Save).await;
    cluster.checkpoint(b, 6, b"six").await;
    leaves_worker.phase(b, Phase::Saved, 6).await;
    leaves_worker.release().await;
    let c = stays_worker.prepare(4).await;
    let d = leaves_worker.prepare(0).await;
    assert_eq!((&c.job_id, &d.job_id, d.peers.len()), (&stays, &stays, 2));
    let leaves = cluster.until(&leaves, "waiting").await;
    assert_eq!((leaves.checkpoint_step, leaves.workers.len()), (Some(6), 0));
    cluster.stop().await;
}

#[tokio::test]
async fn of_two_waiting_jobs_the_later_one_releases_its_workers() {
    one_of_two_waiting_jobs_gives_way(0, 0, false).await;
}

#[tokio::test]
async fn of_two_waiting_jobs_the_one_with_the_lower_priority_releases_its_workers() {
    one_of_two_waiting_jobs_gives_way(0, 5, true).await;
    one_of_two_waiting_jobs_gives_way(5, 0, false).await;
}

#[tokio::test]
async fn a_worker_that_fails_by_itself_is_left_out_and_no_step_is_lost() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, mut w0, mut w1, a } = TwoWorkerJob::training(&cluster, &job(1, 2)).await;
    w0.steps(&a[0], 1..=2).await;
    w0.phase(&a[0], Phase::Training, 2).await;
    w1.failed_by(&a[1], Fault::Disk, "/cache: No space left on device").await;
    w1.release().await;
    let b = w0.prepare(2).await;
    assert_eq!((b.generation, b.rank, b.peers.len(), &b.checkpoint), (2, 0, 1, &None));
    w0.goal(Goal::Train).await;
    w0.phase(&b, Phase::Training, 2).await;
    let is_lost = |event: &job_event::Kind| {
        matches!(event, job_event::Kind::WorkerLost(lost)
            if lost.worker == "w1" && lost.cause == "/cache: No space left on device")
    };
    cluster.until_event(&job_id, is_lost).await;
    // The process is not used again, but another one of this name is.
    w1.disconnect();
    let mut w1 = connect_again(&cluster, "w1").await;
    w0.goal(Goal::Stop).await;
    w0.phase(&b, Phase::Stopped, 3).await;
    let c = w0.prepare(3).await;
    assert_eq!((c.generation, c.peers.len()), (3, 2));
    w1.prepare(0).await;
    w0.goal(Goal::Train).await;
    w1.goal(Goal::Train).await;
    cluster.until(&job_id, "running").await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_joining_worker_that_fails_ends_no_job() {
    let cluster = Cluster::start().await;
    let job_id = cluster.submit(&job(1, 2)).await;
    let mut w0 = FakeWorker::connect(&cluster, "w0").await;
    let a = train(&mut [&mut w0], 0).await;
    let mut w1 = FakeWorker::connect(&cluster, "w1").await;
    w0.goal(Goal::Stop).await;
    w0.phase(&a[0], Phase::Stopped, 1).await;
    w0.prepare(1).await;
    let joining = w1.goal(Goal::Prepare).await;
    w1.failed_by(&joining, Fault::Base, "model.base: /models/a is not below a directory of model_roots")
        .await;
    w1.release().await;
    let c = w0.prepare(1).await;
    assert_eq!((c.generation, c.peers.len()), (3, 1));
    w0.goal(Goal::Train).await;
    assert_eq!(cluster.until(&job_id, "running").await.failure, None);
    cluster.stop().await;
}

#[tokio::test]
async fn the_same_fault_of_two_workers_or_of_the_only_one_fails_the_job() {
    let cluster = Cluster::start().await;
    let TwoWorkerJob { job_id, mut w0, mut w1, a } = TwoWorkerJob::training(&cluster, &job(1, 2)).await;
    w1.failed_by(&a[1], Fault::Memory, "too large for w1").await;
    w1.release().await;
    let b = w0.prepare(0).await;
    w0.failed_by(&b, Fault::Memory, "too large for w0").await;
    let failure = cluster.until(&job_id, "failed").await.failure.unwrap();
    assert_eq!((failure.worker.as_deref(), failure.cause.as_str()), (Some("w0"), "too large for w0"));
    w0.release().await;
    // After a resume the processes have another chance.
    w1.disconnect();
    cluster.resume(&job_id, None).await.unwrap();
    let c = w0.prepare(0).await;
    w0.failed_by(&c, Fault::Engine, "the engine panicked").await;
    assert_eq!(cluster.until(&job_id, "failed").await.failure.unwrap().cause, "the engine panicked");
    cluster.stop().await;
}
