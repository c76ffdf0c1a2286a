//! A coordinator for tests, with answers and failures that the tests define.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use lora_proto::v1::artifacts_server::ArtifactsServer;
use lora_proto::v1::fine_tuning_server::{FineTuning, FineTuningServer};
use lora_proto::v1::watch_job_response::Kind;
use lora_proto::{MAX_MESSAGE_BYTES, v1};
use lora_test_kit::artifacts::FakeArtifacts;
use lora_test_kit::server::TestServer;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::client::Client;

/// What happens to a stream after its last message.
#[derive(Debug, Clone)]
pub(crate) enum StreamEnd {
    End,
    Fail(Status),
    Hang,
}

#[derive(Debug, Default)]
struct FakeState {
    jobs: Vec<v1::Job>,
    largest_page: usize,
    log: Vec<Kind>,
    /// The first event and the first step that are kept.
    kept: (u64, u64),
    /// For each of the next streams: the number of messages that it sends, and how it then ends.
    /// Later streams send all messages and end.
    streams: VecDeque<(usize, StreamEnd)>,
    watched: Vec<v1::WatchJobRequest>,
    submitted: Vec<v1::SubmitJobRequest>,
    /// Errors of the next submits, which return them after their work is done.
    lost_answers: VecDeque<Status>,
}

/// A coordinator on a free port; it ends when this value is dropped.
#[derive(Debug)]
pub(crate) struct FakeCoordinator {
    pub(crate) store: FakeArtifacts,
    server: TestServer,
    state: Arc<Mutex<FakeState>>,
}

/// A proxy whose connections can be cut.
pub(crate) struct CuttableProxy {
    connections: Arc<Mutex<JoinSet<()>>>,
    _accepting: AbortOnDropHandle<()>,
}

impl CuttableProxy {
    /// Breaks all current connections.
    pub(crate) fn cut(&self) {
        self.connections.lock().unwrap().abort_all();
    }
}

impl FakeCoordinator {
    pub(crate) async fn serve(jobs: Vec<v1::Job>) -> Self {
        let state =
            Arc::new(Mutex::new(FakeState { jobs, largest_page: usize::MAX, ..FakeState::default() }));
        let store = FakeArtifacts::default();
        let artifacts = ArtifactsServer::new(store.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES);
        let router = Server::builder()
            .add_service(FineTuningServer::new(FakeService(state.clone())))
            .add_service(artifacts);
        Self { store, server: TestServer::serve(router).await, state }
    }

    pub(crate) async fn client(&self) -> Client {
        Client::connect(&self.server.url()).await.unwrap()
    }

    /// Starts a proxy with connections that can be cut, and returns it with its address.
    pub(crate) async fn proxy(&self) -> (CuttableProxy, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (connections, to) = (Arc::new(Mutex::new(JoinSet::new())), self.server.address);
        let accepted = connections.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                accepted.lock().unwrap().spawn(async move {
                    let mut far = TcpStream::connect(to).await.unwrap();
                    // Either side may end the connection.
                    let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                });
            }
        });
        (CuttableProxy { connections, _accepting: AbortOnDropHandle::new(accepting) }, address)
    }

    pub(crate) fn largest_page(&self, jobs: usize) {
        self.state().largest_page = jobs;
    }

    pub(crate) fn log(&self, log: Vec<Kind>) {
        self.state().log = log;
    }

    pub(crate) fn streams(&self, streams: Vec<(usize, StreamEnd)>) {
        self.state().streams = streams.into();
    }

    /// Deletes all events before `event` and all steps before `step`.
    pub(crate) fn forget(&self, event: u64, step: u64) {
        self.state().kept = (event, step);
    }

    pub(crate) fn watched(&self) -> Vec<v1::WatchJobRequest> {
        self.state().watched.clone()
    }

    pub(crate) fn submitted(&self) -> Vec<v1::SubmitJobRequest> {
        self.state().submitted.clone()
    }

    /// Makes the next submits return these errors after their work is done.
    pub(crate) fn lose_answers(&self, answers: Vec<Status>) {
        self.state().lost_answers = answers.into();
    }

    fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock().unwrap()
    }
}

#[derive(Debug, Clone)]
struct FakeService(Arc<Mutex<FakeState>>);

impl FakeService {
    fn state(&self) -> MutexGuard<'_, FakeState> {
        self.0.lock().unwrap()
    }

    fn job(&self, job_id: &str) -> Result<v1::Job, Status> {
        let job = self.state().jobs.iter().find(|job| job.job_id == job_id).cloned();
        job.ok_or_else(|| Status::not_found(format!("job {job_id:?} does not exist")))
    }
}

type Sent<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Returns a stream of `messages` that ends with `after`.
fn sent<T: Send + 'static>(messages: Vec<T>, after: StreamEnd) -> Sent<T> {
    use tokio_stream::{StreamExt, iter, pending};
    let messages = iter(messages.into_iter().map(Ok));
    match after {
        StreamEnd::End => Box::pin(messages),
        StreamEnd::Fail(status) => Box::pin(messages.chain(iter([Err(status)]))),
        StreamEnd::Hang => Box::pin(messages.chain(pending())),
    }
}

fn forgotten(reason: &str, first: u64) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason, "lora.v1", HashMap::from([("first".to_owned(), first.to_string())]));
    Status::with_error_details(Code::OutOfRange, "no longer kept", details)
}

#[tonic::async_trait]
impl FineTuning for FakeService {
    async fn submit_job(&self, request: Request<v1::SubmitJobRequest>) -> Result<Response<v1::Job>, Status> {
        let request = request.into_inner();
        let known: Vec<String> = {
            let mut state = self.state();
            state.submitted.push(request.clone());
            state.jobs.iter().map(|job| job.job_id.clone()).collect()
        };
        let job_id = format!("job-{}", request.idempotency_key);
        let name = request.job.and_then(|job| job.name).unwrap_or_default();
        let job = v1::Job { job_id, name, state: "validating".into(), ..v1::Job::default() };
        if !known.contains(&job.job_id) {
            self.state().jobs.push(job.clone());
        }
        self.state().lost_answers.pop_front().map_or(Ok(Response::new(job)), Err)
    }

    async fn get_job(&self, request: Request<v1::GetJobRequest>) -> Result<Response<v1::Job>, Status> {
        Ok(Response::new(self.job(&request.into_inner().job_id)?))
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        let v1::ListJobsRequest { page_size, page_token, states } = request.into_inner();
        let state = self.state();
        let size = (page_size as usize).min(state.largest_page);
        let from: usize = page_token.parse().unwrap_or(0);
        let wanted = |job: &&v1::Job| states.is_empty() || states.contains(&job.state);
        let all: Vec<v1::Job> = state.jobs.iter().filter(wanted).cloned().collect();
        let jobs: Vec<v1::Job> = all.iter().skip(from).take(size).cloned().collect();
        let next = from + jobs.len();
        let next_page_token = if next < all.len() { next.to_string() } else { String::new() };
        Ok(Response::new(v1::ListJobsResponse { jobs, next_page_token }))
    }

    type WatchJobStream = Sent<v1::WatchJobResponse>;

    async fn watch_job(
        &self,
        request: Request<v1::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let request = request.into_inner();
        let mut state = self.state();
        state.watched.push(request.clone());
        let (event, step) = state.kept;
        if request.from_number.max(1) < event {
            return Err(forgotten("EVENTS_FORGOTTEN", event));
        }
        if !request.events_only && request.after_step + 1 < step {
            return Err(forgotten("STEPS_FORGOTTEN", step));
        }
        let wanted = |kind: &&Kind| match kind {
            Kind::Event(event) => event.number >= request.from_number,
            Kind::Step(step) => {
                !request.events_only && step.metrics.is_some_and(|metrics| metrics.step > request.after_step)
            }
        };
        let (most, after) = state.streams.pop_front().unwrap_or((usize::MAX, StreamEnd::End));
        let messages = state.log.iter().filter(wanted).take(most).cloned();
        let messages = messages.map(|kind| v1::WatchJobResponse { kind: Some(kind) }).collect();
        Ok(Response::new(sent(messages, after)))
    }

    async fn cancel_job(&self, request: Request<v1::CancelJobRequest>) -> Result<Response<v1::Job>, Status> {
        Ok(Response::new(self.job(&request.into_inner().job_id)?))
    }

    async fn pause_job(&self, request: Request<v1::PauseJobRequest>) -> Result<Response<v1::Job>, Status> {
        Ok(Response::new(self.job(&request.into_inner().job_id)?))
    }

    async fn resume_job(&self, request: Request<v1::ResumeJobRequest>) -> Result<Response<v1::Job>, Status> {
        Ok(Response::new(self.job(&request.into_inner().job_id)?))
    }

    async fn plan_job(
        &self,
        _: Request<v1::PlanJobRequest>,
    ) -> Result<Response<v1::PlanJobResponse>, Status> {
        Err(Status::unimplemented("no plans"))
    }

    async fn list_workers(
        &self,
        _: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        Err(Status::unimplemented("no workers"))
    }
}
