use std::time::SystemTime;

use lora_plan::MemoryRequirements;

use super::*;

fn requirements() -> MemoryRequirements {
    let need = serde_json::json!({"peak": 3, "base": 1, "ways": [[{"settings": [["a.b", "c"]], "peak": 2}]]});
    serde_json::from_value(serde_json::json!({"cpu": need, "gpu": need})).unwrap()
}

/// A row in which every field differs from its default.
fn unusual(id: &str) -> JobRow {
    let member = |n: u32| MemberRow {
        worker: format!("w{n}"),
        instance_id: format!("i{n}"),
        peer_address: format!("host-{n}:7410"),
    };
    JobRow {
        idempotency_key: "key".into(),
        request_sha256: vec![1, 2, 3],
        inputs: v1::Inputs {
            base: Some(v1::Base { source: Some(v1::base::Source::Url("hf://a/b".into())) }),
            ..v1::Inputs::default()
        },
        priority: -7,
        state: JobState::Recovering,
        validated: true,
        requirements: Some(requirements()),
        generation: 3,
        members: vec![member(0), member(1)],
        token: "secret".into(),
        completed_steps: 12,
        facts: Some(v1::RunFacts { total_steps: 20, ..v1::RunFacts::default() }),
        failure: Some(v1::Failure { cause: "out of memory".into(), ..v1::Failure::default() }),
        exported: Some(v1::ExportedAdapter { step: 8, eval_loss: Some(0.5), stopped_early: true }),
        base_sha256: "abc".into(),
        waiting_for: "2 workers".into(),
        fruitless: 2,
        created: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789),
        changed: SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_001_987_654_321),
        ..job(id)
    }
}

#[tokio::test]
async fn a_job_is_unchanged_after_a_restart() {
    let fixture = Fixture::new().await;
    let plain = fixture.add(job("plain")).await;
    let unusual = fixture.add(unusual("unusual")).await;
    assert!(unusual.sequence > plain.sequence);
    let fixture = fixture.reopened().await;
    assert_eq!(fixture.store.load_job("plain").await.unwrap(), Some(plain.clone()));
    assert_eq!(fixture.store.load_job("unusual").await.unwrap(), Some(unusual.clone()));
    assert_eq!(fixture.store.load_job("none").await.unwrap(), None);

    // All columns that can change are changed.
    let kept = JobRow { id: plain.id, sequence: plain.sequence, created: plain.created, ..unusual.clone() };
    let kept =
        JobRow { idempotency_key: plain.idempotency_key, request_sha256: plain.request_sha256, ..kept };
    let kept = JobRow { inputs: plain.inputs, ..kept };
    fixture.store.save_job(&kept, Vec::new()).await.unwrap();
    assert_eq!(fixture.store.load_job("plain").await.unwrap(), Some(kept));
    assert_eq!(fixture.store.load_job("unusual").await.unwrap(), Some(unusual));
}

#[tokio::test]
async fn an_idempotency_key_returns_the_same_job() {
    let fixture = Fixture::new().await;
    let first = fixture.add(unusual("one")).await;
    let second = JobRow { id: "two".into(), request_sha256: vec![9], ..unusual("one") };
    let inserted = fixture.store.insert_job(&second, vec![notice("two")]).await.unwrap();
    assert_eq!(inserted, InsertOutcome::Existing(first));
    assert_eq!(fixture.store.load_job("two").await.unwrap(), None);
    // Two submits without a key are two jobs.
    fixture.add(job("three")).await;
    fixture.add(job("four")).await;
}

#[tokio::test]
async fn saving_a_job_that_does_not_exist_is_an_error() {
    let fixture = Fixture::new().await;
    fixture.store.save_job(&job("none"), Vec::new()).await.unwrap_err();
    fixture.store.add_steps("none", &[step(1)]).await.unwrap_err();
}

#[tokio::test]
async fn active_jobs_are_loaded_in_the_order_of_submission() {
    let fixture = Fixture::new().await;
    for state in JobState::ALL {
        fixture.add(JobRow { state, ..job(state.name()) }).await;
    }
    let active: Vec<_> =
        fixture.store.load_active().await.unwrap().into_iter().map(|job| job.state).collect();
    assert_eq!(active, JobState::ALL.into_iter().filter(|state| !state.is_stopped()).collect::<Vec<_>>());
}

#[tokio::test]
async fn job_lists_are_paged_newest_first() {
    let fixture = Fixture::new().await;
    for (id, state) in
        [("a", JobState::Queued), ("b", JobState::Failed), ("c", JobState::Queued), ("d", JobState::Paused)]
    {
        fixture.add(JobRow { state, ..job(id) }).await;
    }
    let list = async |states: &[JobState], before, limit| {
        let jobs = fixture.store.list_jobs(states, before, limit).await.unwrap();
        let ids: String = jobs.iter().map(|(_, job)| job.job_id.as_str()).collect();
        (ids, jobs.last().map(|(sequence, _)| *sequence))
    };
    let (ids, last) = list(&[], None, 3).await;
    assert_eq!(ids, "dcb");
    assert_eq!(list(&[], last, 3).await.0, "a");
    assert_eq!(list(&[JobState::Queued], None, 9).await.0, "ca");
    assert_eq!(list(&[JobState::Paused, JobState::Failed], last, 9).await.0, "");
    assert_eq!(list(&[JobState::Paused, JobState::Failed], None, 9).await.0, "db");
}

#[tokio::test]
async fn a_job_message_has_the_current_progress() {
    let fixture = Fixture::new().await;
    let row = fixture.add(JobRow { idempotency_key: String::new(), ..unusual("one") }).await;
    let message = fixture.store.job_message("one").await.unwrap().unwrap();
    assert_eq!((message.checkpoint_step, message.metrics), (None, None));

    fixture.store.add_steps("one", &steps(1..=12)).await.unwrap();
    fixture.commit(checkpoint("one", 3, 10), b"ten").await.1.unwrap();
    fixture.commit(result("one", 3, "adapter_config.json"), b"{}").await.1.unwrap();
    let message = fixture.store.job_message("one").await.unwrap().unwrap();
    let expected = v1::Job {
        job_id: "one".into(),
        name: "one".into(),
        state: "recovering".into(),
        generation: 3,
        completed_steps: 12,
        facts: row.facts,
        failure: row.failure,
        priority: -7,
        waiting_for: "2 workers".into(),
        workers: vec!["w0".into(), "w1".into()],
        created: Some(row.created.into()),
        changed: Some(row.changed.into()),
        checkpoint_step: Some(10),
        result: Vec::new(),
        spec: Some(row.spec),
        inputs: Some(row.inputs),
        metrics: step(12).metrics,
        last_event: 2,
        exported: row.exported,
    };
    assert_eq!(message, expected);
    assert_eq!(fixture.store.list_jobs(&[], None, 1).await.unwrap(), [(row.sequence, expected)]);
    assert_eq!(fixture.store.job_message("two").await.unwrap(), None);
}
