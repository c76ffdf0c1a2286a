use lora_proto::v1::{self, Goal, Phase, coordinator_message};
use tokio::sync::oneshot;

use super::*;
use crate::store::{ForeignObjects, Retention};

/// A connected worker that reports only what the test says.
struct FakeWorker {
    session: SessionId,
    inbox: mpsc::Receiver<Result<v1::CoordinatorMessage, tonic::Status>>,
    /// The newest directive.
    directive: v1::Directive,
}

impl FakeWorker {
    async fn connect(service: &mut Service, name: &str) -> Self {
        let (outbox, inbox) = mpsc::channel(64);
        let hello = v1::Hello {
            name: name.to_owned(),
            instance_id: name.to_owned(),
            numerics_id: "fake".to_owned(),
            peer_address: format!("{name}:1"),
            ..v1::Hello::default()
        };
        let (reply, session) = oneshot::channel();
        service.execute(Command::Hello { hello: Box::new(hello), outbox, reply }).await;
        service.settle().await;
        Self { session: session.await.unwrap().unwrap(), inbox, directive: v1::Directive::default() }
    }

    fn goal(&mut self) -> Goal {
        while let Ok(message) = self.inbox.try_recv() {
            if let Some(coordinator_message::Kind::Directive(directive)) = message.unwrap().kind {
                self.directive = *directive;
            }
        }
        self.directive.goal()
    }

    /// Reports that the worker does its newest directive, and is in this phase.
    async fn report(&mut self, service: &mut Service, phase: Phase) {
        self.goal();
        let generation = self.directive.assignment.as_ref().unwrap().generation;
        let held = v1::HeldJob {
            job_id: "one".to_owned(),
            generation,
            phase: phase as i32,
            ..v1::HeldJob::default()
        };
        let status =
            v1::WorkerStatus { job: Some(held), directive: self.directive.number, ..Default::default() };
        service.execute(Command::Status { session: self.session, status: Box::new(status) }).await;
        service.settle().await;
    }
}

#[tokio::test]
async fn a_report_changes_the_directives_of_the_other_members() {
    let dir = tempfile::tempdir().unwrap();
    let retention = Retention { events: 100, steps: 100 };
    let store = Store::open(dir.path(), retention, ForeignObjects::Refuse).await.unwrap();
    let mut spec = JobSpec { name: "one".to_owned(), ..JobSpec::default() };
    (spec.workers.min, spec.workers.max) = (2, 2);
    let spec = v1::JobSpec::try_from(&spec).unwrap();
    let row =
        JobRow { id: "one".to_owned(), spec, state: JobState::Queued, validated: true, ..JobRow::default() };
    store.insert_job(&row, Vec::new()).await.unwrap();
    let (_commands, receiver) = mpsc::channel(1);
    let mut service = Service::new(store, Config::default(), receiver, Metrics::default()).await.unwrap();
    let mut first = FakeWorker::connect(&mut service, "first").await;
    let mut last = FakeWorker::connect(&mut service, "last").await;
    for (phase, goal) in [(Phase::Preparing, Goal::Prepare), (Phase::Prepared, Goal::Train)] {
        first.report(&mut service, phase).await;
        last.report(&mut service, phase).await;
        assert_eq!((first.goal(), last.goal()), (goal, goal));
    }
    first.report(&mut service, Phase::Training).await;
    last.report(&mut service, Phase::Forming).await;

    // The last member must enter the group before the group can stop.
    let (reply, answer) = oneshot::channel();
    service.execute(Command::Request { job_id: "one".to_owned(), request: Request::Pause, reply }).await;
    service.settle().await;
    answer.await.unwrap().unwrap();
    assert_eq!((first.goal(), last.goal()), (Goal::Train, Goal::Train));

    last.report(&mut service, Phase::Training).await;
    assert_eq!((first.goal(), last.goal()), (Goal::Stop, Goal::Stop));
}
