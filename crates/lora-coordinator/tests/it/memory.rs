//! Jobs that are too large for some workers, or for all workers.

use lora_proto::v1;
use lora_spec::{JobSpec, LongRows};

use crate::fake::{Cluster, FakeWorker, fast_config, job};

/// A job with one micro-batch in a step, on one worker.
fn large() -> JobSpec {
    let mut large = job(1, 1);
    large.adapter.r = 64;
    large.training.micro_batch_size = 4;
    large.training.global_batch_size = 4;
    large
}

async fn plan(cluster: &Cluster, job: &JobSpec) -> v1::PlanJobResponse {
    let job = Some(v1::JobSpec::try_from(job).unwrap());
    let request = v1::PlanJobRequest { job, inputs: Some(cluster.whole_inputs().await) };
    cluster.jobs().plan_job(request).await.unwrap().into_inner()
}

fn peak(plan: &v1::PlanJobResponse) -> u64 {
    plan.memory_cpu.as_ref().unwrap().peak
}

#[tokio::test]
async fn a_plan_has_row_counts_and_memory() {
    let cluster = Cluster::start().await;
    let mut two = job(1, 2);
    two.training.micro_batch_size = 1;
    let alone = plan(&cluster, &JobSpec { workers: job(1, 1).workers, ..two.clone() }).await;
    assert_eq!(alone.all_reduce_bytes, 0);
    let together = plan(&cluster, &two).await;
    assert!(together.all_reduce_bytes >= 4 * together.trainable_parameters, "{together:?}");
    let whole = together.train.unwrap();
    assert!(whole.rows_read > 0 && whole.rows_kept == whole.rows_read && whole.dropped == 0, "{whole:?}");
    assert!(whole.shortest <= whole.median && whole.median <= whole.longest, "{whole:?}");
    // With a lower limit, the longest rows are truncated.
    two.data.max_length = whole.longest as usize - 1;
    two.data.long_rows = LongRows::Truncate;
    let cut = plan(&cluster, &two).await.train.unwrap();
    assert!(cut.truncated > 0 && cut.longest == whole.longest - 1, "{cut:?}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_job_that_fits_no_worker_fails_with_settings_that_would_fit() {
    let cluster = Cluster::start().await;
    let before = plan(&cluster, &large()).await;
    assert_eq!(before.problems, Vec::<String>::new(), "no worker has reported its memory");
    let _too_small = FakeWorker::connect_with_memory(&cluster, "w0", 1 << 20).await;
    let _almost = FakeWorker::connect_with_memory(&cluster, "w1", peak(&before) - 1).await;

    let refused = plan(&cluster, &large()).await.problems;
    let [text] = refused.as_slice() else { panic!("{refused:?}") };
    assert!(text.starts_with("a worker needs ") && text.contains(" of memory, more than "), "{text}");
    assert!(text.contains("; it would fit with "), "{text}");

    let job_id = cluster.submit_with(&large(), cluster.whole_inputs().await, 0).await;
    let failed = cluster.until(&job_id, "failed").await;
    assert_eq!(&failed.failure.unwrap().cause, text);
    assert_eq!(cluster.states(&job_id).await, ["validating", "failed"]);
    assert_eq!(failed.generation, 0, "no worker was taken");

    // The job fits once a worker with enough memory connects.
    let _enough = FakeWorker::connect_with_memory(&cluster, "w2", peak(&before)).await;
    assert_eq!(plan(&cluster, &large()).await.problems, Vec::<String>::new());
    cluster.stop().await;
}

#[tokio::test]
async fn a_job_waits_for_a_large_enough_worker_across_a_restart() {
    let mut config = fast_config();
    // Workers have this time to reconnect after the restart.
    config.workers.lease_seconds = 600.0;
    let cluster = Cluster::start_with(config).await;
    let peak = peak(&plan(&cluster, &large()).await);
    let job_id = cluster.submit_with(&large(), cluster.whole_inputs().await, 0).await;
    let queued = cluster.until_that(&job_id, |job| !job.waiting_for.is_empty()).await;
    assert_eq!(queued.state, "queued");
    assert!(queued.waiting_for.ends_with("none is connected"), "{}", queued.waiting_for);
    let cluster = cluster.restart().await;

    let mut small = FakeWorker::connect_with_memory(&cluster, "w0", 1 << 20).await;
    let prefix = "waits for a worker with more memory: ";
    let waits = |job: &v1::Job| job.waiting_for.starts_with(prefix);
    let waiting = cluster.until_that(&job_id, waits).await;
    assert!(waiting.waiting_for.contains(" of memory, more than 1.00 MiB; "), "{}", waiting.waiting_for);

    // A job that is planned or submitted now is not refused either: other workers may still
    // reconnect.
    assert_eq!(plan(&cluster, &large()).await.problems, Vec::<String>::new());
    let submitted = cluster.submit_with(&large(), cluster.whole_inputs().await, 0).await;
    cluster.until_that(&submitted, waits).await;
    cluster.cancel(&submitted).await.unwrap();

    // The large jobs block no other job. A job that cannot be planned is given to any worker.
    let other = cluster.submit(&job(1, 1)).await;
    assert_eq!(small.prepare(0).await.job_id, other);

    let mut large_enough = FakeWorker::connect_with_memory(&cluster, "w1", peak).await;
    assert_eq!(large_enough.prepare(0).await.job_id, job_id);
    let listed = cluster.jobs().list_workers(v1::ListWorkersRequest {}).await.unwrap().into_inner().workers;
    let memory: Vec<_> = listed.iter().map(|worker| (worker.memory, worker.gpu)).collect();
    assert_eq!(memory, [(1 << 20, false), (peak, false)]);
    cluster.stop().await;
}

#[tokio::test]
async fn changing_the_number_of_workers_replans_the_job() {
    let cluster = Cluster::start().await;
    let mut of_two = large();
    of_two.training.micro_batch_size = 1;
    (of_two.workers.min, of_two.workers.max) = (4, 4);
    let on_four = peak(&plan(&cluster, &of_two).await);
    let job_id = cluster.submit_with(&of_two, cluster.whole_inputs().await, 0).await;
    cluster.until(&job_id, "queued").await;
    cluster.pause(&job_id).await.unwrap();
    let _enough_of_four = FakeWorker::connect_with_memory(&cluster, "w0", on_four).await;

    // A single worker needs memory to sum the gradients of four micro-batches.
    cluster.resume(&job_id, Some(1)).await.unwrap();
    let failed = cluster.until(&job_id, "failed").await;
    assert!(failed.failure.unwrap().cause.starts_with("a worker needs "));
    cluster.resume(&job_id, Some(4)).await.unwrap();
    let waiting =
        cluster.until_that(&job_id, |job| job.state == "queued" && !job.waiting_for.is_empty()).await;
    assert!(waiting.waiting_for.contains("1 is connected"), "{}", waiting.waiting_for);
    cluster.stop().await;
}
