//! Two workers in one group.

use lora_proto::v1::{Goal, Phase};

use crate::fake::{FakeCoordinator, WorkerStream};
use crate::job::{ENDLESS, assignment, newer, place, spec};
use crate::worker::TestWorker;

/// Two workers, in the order of their ranks.
async fn two(fake: &mut FakeCoordinator) -> ([TestWorker; 2], [WorkerStream; 2]) {
    let first = TestWorker::start(fake, "w0");
    let zero = fake.accept().await;
    let second = TestWorker::start(fake, "w1");
    ([first, second], [zero, fake.accept().await])
}

#[tokio::test(flavor = "multi_thread")]
async fn all_ranks_stop_after_the_same_step_and_continue_in_a_newer_generation() {
    let mut fake = FakeCoordinator::start().await;
    let (workers, [mut zero, mut one]) = two(&mut fake).await;
    let first = assignment(&fake, &spec(ENDLESS), &[&zero, &one]);
    zero.direct(&first, Goal::Train).await;
    one.direct(&place(&first, 1), Goal::Train).await;
    zero.job(|job| job.completed_steps >= 2).await;
    one.direct(&place(&first, 1), Goal::Stop).await;
    let stopped = one.phase(Phase::Stopped).await.completed_steps;
    assert_eq!(zero.phase(Phase::Stopped).await.completed_steps, stopped, "one was asked, all stop");
    assert!(one.steps.is_empty(), "only rank 0 sends steps");

    // The worker with rank 1 gets rank 0, and sends its steps that are not stored.
    one.acknowledge("job-1", 1).await;
    let mut swapped = newer(&first);
    swapped.peers.reverse();
    one.direct(&swapped, Goal::Prepare).await;
    assert_eq!(one.phase(Phase::Prepared).await.completed_steps, stopped);
    one.direct(&swapped, Goal::Train).await;
    zero.direct(&place(&swapped, 1), Goal::Train).await;
    one.job(|job| job.completed_steps > stopped).await;
    assert_eq!(one.step_numbers()[..2], [2, 3]);
    let [first, second] = workers;
    tokio::join!(first.kill(zero), second.kill(one));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_generation_interrupts_the_group_and_keeps_the_state() {
    let mut fake = FakeCoordinator::start().await;
    let (workers, [mut zero, mut one]) = two(&mut fake).await;
    let first = assignment(&fake, &spec(ENDLESS), &[&zero, &one]);
    zero.direct(&first, Goal::Train).await;
    one.direct(&place(&first, 1), Goal::Train).await;
    let before = zero.job(|job| job.completed_steps >= 2).await.completed_steps;
    let mut alone = newer(&first);
    alone.peers.truncate(1);
    zero.direct(&alone, Goal::Prepare).await;
    let prepared = zero.phase(Phase::Prepared).await;
    assert_eq!(prepared.generation, 2);
    assert!(prepared.completed_steps >= before);
    let broken = one.phase(Phase::Broken).await;
    assert_eq!((broken.suspects.as_slice(), broken.generation), ([0].as_slice(), 1));
    assert!(broken.cause.contains("rank 0") && broken.unreachable.is_empty(), "{}", broken.cause);

    // The workers hold the states after the same step, or after neighboring steps.
    assert!(broken.completed_steps.abs_diff(prepared.completed_steps) <= 1);
    one.release().await;
    one.free().await;
    zero.direct(&alone, Goal::Train).await;
    zero.job(|job| job.completed_steps > prepared.completed_steps).await;
    let [first, second] = workers;
    tokio::join!(first.kill(zero), second.kill(one));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_breaks_the_group_and_the_state_is_saved() {
    let mut fake = FakeCoordinator::start().await;
    let ([first, second], [mut zero, mut one]) = two(&mut fake).await;
    let group = assignment(&fake, &spec(ENDLESS), &[&zero, &one]);
    zero.direct(&place(&group, 0), Goal::Train).await;
    one.direct(&place(&group, 1), Goal::Train).await;
    zero.job(|job| job.completed_steps >= 1).await;
    second.kill(one).await;
    let broken = zero.phase(Phase::Broken).await;
    assert_eq!(broken.suspects, [1]);
    zero.direct(&group, Goal::Save).await;
    let saved = zero.phase(Phase::Saved).await;
    assert_eq!(saved.completed_steps, broken.completed_steps);
    assert!(saved.cause.is_empty() && saved.suspects.is_empty());
    first.kill(zero).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_generation_ends_the_rendezvous() {
    let mut fake = FakeCoordinator::start().await;
    let (workers, [mut zero, one]) = two(&mut fake).await;
    let group = assignment(&fake, &spec(2), &[&zero, &one]);
    zero.direct(&group, Goal::Train).await;
    let forming = zero.job(|job| job.phase() == Phase::Forming && job.waiting_for_peers).await;
    assert_eq!(forming.generation, 1);
    let mut alone = newer(&group);
    alone.peers.truncate(1);
    zero.direct(&alone, Goal::Train).await;
    assert_eq!(zero.phase(Phase::Finished).await.completed_steps, 2);
    let [first, second] = workers;
    tokio::join!(first.kill(zero), second.kill(one));
}
