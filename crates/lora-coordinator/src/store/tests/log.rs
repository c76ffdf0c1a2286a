use std::pin::pin;

use futures_util::{Stream, StreamExt};

use super::*;

async fn next(
    watch: &mut (impl Stream<Item = Result<v1::WatchJobResponse, WatchError>> + Unpin),
) -> Option<WatchedItem> {
    tokio::time::timeout(TEST_TIMEOUT, watch.next()).await.unwrap().map(|item| item.unwrap().into())
}

fn events(numbers: std::ops::RangeInclusive<u64>) -> Vec<WatchedItem> {
    numbers.map(WatchedItem::Event).collect()
}

#[tokio::test]
async fn events_are_numbered_from_one_without_gaps_over_restarts() {
    let mut fixture = Fixture::new().await;
    let mut row = fixture.add(job("one")).await;
    fixture.add(job("other")).await;
    for state in [JobState::Queued, JobState::Preparing, JobState::Running, JobState::Failed] {
        row.state = state;
        fixture.store.save_job(&row, vec![notice("before"), changed(state)]).await.unwrap();
        fixture.store.save_job(&row, Vec::new()).await.unwrap();
        fixture = fixture.reopened().await;
    }
    assert_eq!(fixture.watch_items("one", 99).await, events(1..=9));
    assert_eq!(fixture.watch_items_from("one", 7, 0, true, 99).await.unwrap(), events(7..=9));
    assert_eq!(fixture.watch_items_from("one", 10, 0, true, 99).await.unwrap(), []);
    let mut last = pin!(fixture.store.watch("one".into(), 9, 0, false));
    let Some(watch_job_response::Kind::Event(last)) = last.next().await.unwrap().unwrap().kind else {
        panic!()
    };
    assert_eq!(last.kind, Some(changed(JobState::Failed)));
    assert!(last.time.is_some());
}

#[tokio::test]
async fn steps_are_stored_once() {
    let fixture = Fixture::new().await;
    fixture.add_running("one").await;
    assert_eq!(fixture.store.last_step("one").await.unwrap(), 0);
    fixture.store.add_steps("one", &steps(1..=3)).await.unwrap();
    let other = v1::StepReport { notice: "other".into(), ..step(3) };
    fixture.store.add_steps("one", &[step(2), other, step(4)]).await.unwrap();
    fixture.store.add_steps("one", &[]).await.unwrap();
    assert_eq!(fixture.store.last_step("one").await.unwrap(), 4);
    let watch = fixture.store.watch("one".into(), 2, 0, false).take(4);
    let items: Vec<_> = watch.map(|item| item.unwrap().kind.unwrap()).collect().await;
    assert_eq!(items, steps(1..=4).into_iter().map(watch_job_response::Kind::Step).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_watch_returns_steps_and_events_in_order() {
    let fixture = Fixture::new().await;
    let mut row = fixture.add_running("one").await;
    let mut expected = vec![WatchedItem::Event(1)];
    // Several pages, with runs of one kind that are longer than a page.
    for round in 1..=700 {
        if round % 3 == 0 && !(100..=400).contains(&round) {
            fixture.store.save_job(&row, vec![notice("hello")]).await.unwrap();
            expected.push(WatchedItem::Event(
                expected.iter().filter(|item| matches!(item, WatchedItem::Event(_))).count() as u64 + 1,
            ));
        }
        fixture.store.add_steps("one", &[step(round)]).await.unwrap();
        expected.push(WatchedItem::Step(round));
    }
    row.state = JobState::Failed;
    fixture.store.save_job(&row, (0..300).map(|_| notice("bye")).collect()).await.unwrap();
    let last = expected.iter().filter(|item| matches!(item, WatchedItem::Event(_))).count() as u64;
    expected.extend(events(last + 1..=last + 300));
    assert_eq!(fixture.watch_items("one", 9999).await, expected);
    let tail: Vec<_> = expected
        .into_iter()
        .filter(|item| {
            matches!(item, WatchedItem::Event(n) if *n >= 50)
                || matches!(item, WatchedItem::Step(n) if *n > 600)
        })
        .collect();
    assert_eq!(fixture.watch_items_from("one", 50, 600, false, 9999).await.unwrap(), tail);
}

#[tokio::test]
async fn a_watch_follows_new_items_and_ends_when_the_job_is_paused() {
    let fixture = Fixture::new().await;
    let mut row = fixture.add_running("one").await;
    let mut watch = pin!(fixture.store.watch("one".into(), 1, 0, false));
    assert_eq!(next(&mut watch).await, Some(WatchedItem::Event(1)));

    assert!(futures_util::poll!(watch.next()).is_pending());
    let (item, ()) = tokio::join!(next(&mut watch), async {
        fixture.store.add_steps("one", &[step(1)]).await.unwrap();
    });
    assert_eq!(item, Some(WatchedItem::Step(1)));
    let (item, committed) = tokio::join!(next(&mut watch), fixture.commit(checkpoint("one", 1, 1), b"state"));
    assert_eq!((item, committed.1), (Some(WatchedItem::Event(2)), Ok(())));
    row.state = JobState::Paused;
    let (item, ()) = tokio::join!(next(&mut watch), async {
        fixture.store.save_job(&row, vec![changed(JobState::Paused)]).await.unwrap();
    });
    assert_eq!(item, Some(WatchedItem::Event(3)));
    assert_eq!(next(&mut watch).await, None);
}

#[tokio::test]
async fn a_watch_continues_past_an_earlier_pause() {
    let fixture = Fixture::new().await;
    let mut row = fixture.add_running("one").await;
    for state in [JobState::Paused, JobState::Queued] {
        row.state = state;
        fixture.store.save_job(&row, vec![changed(state)]).await.unwrap();
    }
    let mut watch = pin!(fixture.store.watch("one".into(), 1, 0, false));
    for number in 1..=3 {
        assert_eq!(next(&mut watch).await, Some(WatchedItem::Event(number)));
    }
    assert!(futures_util::poll!(watch.next()).is_pending());
    fixture.store.close();
    assert_eq!(next(&mut watch).await, None);
    assert_eq!(fixture.watch_items("one", 9).await, []);
}

#[tokio::test]
async fn a_watch_of_an_unknown_job_fails() {
    let fixture = Fixture::new().await;
    let error = fixture.watch_items_from("none", 1, 0, false, 9).await.unwrap_err();
    assert!(matches!(error, WatchError::UnknownJob), "{error}");
}

#[tokio::test]
async fn deleted_events_are_reported_with_the_first_available() {
    let fixture = Fixture::keeping(200, 1000).await;
    let mut row = fixture.add_running("one").await;
    let notices = |count| (0..count).map(|_| notice("n")).collect::<Vec<_>>();
    fixture.store.save_job(&row, notices(199)).await.unwrap();
    let mut slow = pin!(fixture.store.watch("one".into(), 1, 0, false));
    assert_eq!(next(&mut slow).await, Some(WatchedItem::Event(1)));

    fixture.store.save_job(&row, notices(150)).await.unwrap();
    let error = fixture.watch_items_from("one", 150, 0, false, 9).await.unwrap_err();
    assert!(matches!(error, WatchError::ForgottenEvents { asked: 150, first: 151 }), "{error}");
    row.state = JobState::Failed;
    fixture.store.save_job(&row, Vec::new()).await.unwrap();
    assert_eq!(fixture.watch_items_from("one", 151, 0, false, 999).await.unwrap(), events(151..=350));

    // A slow reader still gets the page that it has read, and no more.
    let mut read = 1;
    let error = loop {
        match tokio::time::timeout(TEST_TIMEOUT, slow.next()).await.unwrap().unwrap() {
            Ok(_) => read += 1,
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, WatchError::ForgottenEvents { asked, first: 151 } if asked == read + 1),
        "{error} {read}"
    );
}

#[tokio::test]
async fn deleted_steps_are_reported_and_missing_steps_are_not() {
    let fixture = Fixture::keeping(1000, 10).await;
    let mut row = fixture.add_running("one").await;
    // The first steps were never stored.
    fixture.store.add_steps("one", &steps(5..=8)).await.unwrap();
    assert_eq!(
        fixture.watch_items_from("one", 2, 0, false, 4).await.unwrap(),
        [5, 6, 7, 8].map(WatchedItem::Step)
    );
    fixture.store.add_steps("one", &steps(9..=17)).await.unwrap();
    row.state = JobState::Failed;
    fixture.store.save_job(&row, Vec::new()).await.unwrap();
    let error = fixture.watch_items_from("one", 1, 6, false, 9).await.unwrap_err();
    assert!(matches!(error, WatchError::ForgottenSteps { asked: 7, first: 8 }), "{error}");
    let kept: Vec<_> = (8..=17).map(WatchedItem::Step).collect();
    assert_eq!(fixture.watch_items_from("one", 2, 7, false, 99).await.unwrap(), kept);
    assert_eq!(fixture.watch_items_from("one", 1, 0, true, 99).await.unwrap(), events(1..=1));
    // Deleted steps are reported after a restart with a larger limit, too.
    let Fixture { store, dir } = fixture;
    drop(store);
    let store = open(dir.path()).await.unwrap();
    let error = Fixture { store, dir }.watch_items_from("one", 1, 6, false, 9).await.unwrap_err();
    assert!(matches!(error, WatchError::ForgottenSteps { asked: 7, first: 8 }), "{error}");
}

#[tokio::test]
async fn exactly_the_configured_rows_are_kept() {
    let fixture = Fixture::keeping(5, 7).await;
    let row = fixture.add_running("one").await;
    let count = async |sql: &'static str| {
        sqlx::query_scalar::<_, i64>(sql).fetch_one(fixture.store.readers()).await.unwrap()
    };
    for round in 1..=20_u64 {
        fixture.store.add_steps("one", &[step(round)]).await.unwrap();
        fixture.store.save_job(&row, vec![notice("n")]).await.unwrap();
        // The first event is that of the new job.
        assert_eq!(count("SELECT COUNT(*) FROM events").await, (round as i64 + 1).min(5));
        assert_eq!(count("SELECT COUNT(*) FROM steps").await, (round as i64).min(7));
    }
    assert_eq!(count("SELECT MIN(number) FROM events").await, 17);
    assert_eq!(count("SELECT MIN(step) FROM steps").await, 14);
}
