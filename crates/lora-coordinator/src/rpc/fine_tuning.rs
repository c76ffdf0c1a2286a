//! The gRPC service `FineTuning`: the calls of clients.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use lora_proto::v1;
use lora_spec::{FieldError, JobSpec, JobState};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::Commands;
use crate::admission::validate::{self, PlanFailure};
use crate::control::request::Request as JobRequest;
use crate::refusal::Refusal;
use crate::service::command::Command;
use crate::store::Store;

const MAX_ID_BYTES: usize = 128;
const DEFAULT_PAGE: u32 = 100;
const MAX_PAGE: u32 = 1000;
/// The number of plans that are computed at the same time; further calls wait.
const MAX_CONCURRENT_PLANS: usize = 2;

/// The implementation of the gRPC service `FineTuning`.
#[derive(Debug)]
pub(crate) struct FineTuning {
    commands: Commands,
    store: Store,
    plans: Arc<Semaphore>,
}

impl FineTuning {
    pub(crate) fn new(commands: Commands, store: Store) -> Self {
        Self { commands, store, plans: Arc::new(Semaphore::new(MAX_CONCURRENT_PLANS)) }
    }

    async fn request(&self, job_id: &str, request: JobRequest) -> Result<(), Refusal> {
        let job_id = job_id.to_owned();
        self.commands.ask(|reply| Command::Request { job_id, request, reply }).await
    }

    async fn job(&self, job_id: &str) -> Result<Response<v1::Job>, Status> {
        let job = self.store.job_message(job_id).await.map_err(Refusal::from)?;
        Ok(Response::new(job.ok_or_else(|| Refusal::UnknownJob(job_id.to_owned()))?))
    }
}

#[tonic::async_trait]
impl v1::fine_tuning_server::FineTuning for FineTuning {
    async fn submit_job(&self, request: Request<v1::SubmitJobRequest>) -> Result<Response<v1::Job>, Status> {
        let request = Box::new(request.into_inner());
        let job_id = self.commands.ask(|reply| Command::Submit { request, reply }).await?;
        self.job(&job_id).await
    }

    async fn get_job(&self, request: Request<v1::GetJobRequest>) -> Result<Response<v1::Job>, Status> {
        self.job(&checked_id(request.into_inner().job_id)?).await
    }

    async fn list_jobs(
        &self,
        request: Request<v1::ListJobsRequest>,
    ) -> Result<Response<v1::ListJobsResponse>, Status> {
        let v1::ListJobsRequest { page_size, page_token, states } = request.into_inner();
        let (limit, before, states) = page(page_size, &page_token, &states).map_err(Refusal::from)?;
        // One job more than asked for shows whether there is another page.
        let mut jobs = self.store.list_jobs(&states, before, limit + 1).await.map_err(Refusal::from)?;
        let is_last = jobs.len() <= limit as usize;
        jobs.truncate(limit as usize);
        let last = jobs.last().filter(|_| !is_last);
        let next_page_token = last.map(|(sequence, _)| sequence.to_string()).unwrap_or_default();
        let jobs = jobs.into_iter().map(|(_, job)| job).collect();
        Ok(Response::new(v1::ListJobsResponse { jobs, next_page_token }))
    }

    type WatchJobStream = BoxStream<'static, Result<v1::WatchJobResponse, Status>>;

    async fn watch_job(
        &self,
        request: Request<v1::WatchJobRequest>,
    ) -> Result<Response<Self::WatchJobStream>, Status> {
        let v1::WatchJobRequest { job_id, from_number, after_step, events_only } = request.into_inner();
        let job_id = checked_id(job_id)?;
        let known = self.store.load_job(&job_id).await.map_err(Refusal::from)?;
        known.ok_or_else(|| Refusal::UnknownJob(job_id.clone()))?;
        let stream = self.store.watch(job_id.clone(), from_number, after_step, events_only);
        let stream =
            stream.map(move |item| item.map_err(|error| Refusal::from_watch_error(error, &job_id).into()));
        Ok(Response::new(stream.boxed()))
    }

    async fn cancel_job(&self, request: Request<v1::CancelJobRequest>) -> Result<Response<v1::Job>, Status> {
        let job_id = checked_id(request.into_inner().job_id)?;
        self.request(&job_id, JobRequest::Cancel).await?;
        self.job(&job_id).await
    }

    async fn pause_job(&self, request: Request<v1::PauseJobRequest>) -> Result<Response<v1::Job>, Status> {
        let job_id = checked_id(request.into_inner().job_id)?;
        self.request(&job_id, JobRequest::Pause).await?;
        self.job(&job_id).await
    }

    async fn resume_job(&self, request: Request<v1::ResumeJobRequest>) -> Result<Response<v1::Job>, Status> {
        let v1::ResumeJobRequest { job_id, workers } = request.into_inner();
        let job_id = checked_id(job_id)?;
        self.commands.ask(|reply| Command::Resume { job_id: job_id.clone(), workers, reply }).await?;
        self.job(&job_id).await
    }

    async fn plan_job(
        &self,
        request: Request<v1::PlanJobRequest>,
    ) -> Result<Response<v1::PlanJobResponse>, Status> {
        let v1::PlanJobRequest { job, inputs } = request.into_inner();
        let inputs = inputs.unwrap_or_default();
        let spec = submitted(job, &inputs).map_err(Refusal::from)?;
        let named = inputs.digests();
        let missing = self.store.find_missing(named).await.map_err(Refusal::from)?;
        if !missing.is_empty() {
            return Err(Refusal::MissingInputs(missing).into());
        }
        let Ok(permit) = Arc::clone(&self.plans).acquire_owned().await else {
            return Err(Refusal::ShuttingDown.into());
        };
        let store = self.store.clone();
        let job = spec.clone();
        let planned = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            validate::plan(&store, &job, &inputs)
        });
        let plan = planned
            .await
            .map_err(|error| Status::internal(format!("the task of the plan failed: {error}")))?;
        let mut plan = plan.map_err(plan_refusal)?;
        let available = self.commands.ask(|reply| Command::Memory { reply }).await?;
        if let Err(too_large) = validate::fits_any(&plan.requirements, &available) {
            plan.problems.push(too_large.to_string());
        }
        Ok(Response::new(validate::plan_response(plan, &spec)))
    }

    async fn list_workers(
        &self,
        _: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        let workers = self.commands.ask(|reply| Command::Workers { reply }).await?;
        Ok(Response::new(v1::ListWorkersResponse { workers }))
    }
}

fn submitted(job: Option<v1::JobSpec>, inputs: &v1::Inputs) -> Result<JobSpec, FieldError> {
    crate::admission::submit::spec(job.unwrap_or_default(), inputs)
}

fn plan_refusal(error: PlanFailure) -> Refusal {
    match error {
        PlanFailure::NoBase => Refusal::NoBase,
        PlanFailure::Field(error) => error.into(),
        PlanFailure::Content(text) => FieldError::new("inputs", text).into(),
    }
}

fn checked_id(job_id: String) -> Result<String, Refusal> {
    let problem = match job_id.len() {
        0 => "is missing".to_owned(),
        1..=MAX_ID_BYTES => return Ok(job_id),
        n => format!("has {n} bytes; it must have at most {MAX_ID_BYTES}"),
    };
    Err(FieldError::new("job_id", problem).into())
}

/// Checks the fields of a `ListJobsRequest`. Returns the page size, the sequence number below which
/// the page starts, and the states to list.
fn page(size: u32, token: &str, states: &[String]) -> Result<(u32, Option<i64>, Vec<JobState>), FieldError> {
    let limit = match size {
        0 => DEFAULT_PAGE,
        1..=MAX_PAGE => size,
        n => return Err(FieldError::new("page_size", format!("is {n}; it must be at most {MAX_PAGE}"))),
    };
    let before = match token {
        "" => None,
        token => {
            let bad = |_| FieldError::new("page_token", "is not a token that ListJobs returned".into());
            Some(token.parse().map_err(bad)?)
        }
    };
    let named = |(index, name): (usize, &String)| {
        JobState::from_name(name).ok_or_else(|| {
            let known: Vec<&str> = JobState::ALL.into_iter().map(JobState::name).collect();
            let message = format!("{name:?} is not a state; the states are {}", known.join(", "));
            FieldError::new(&format!("states[{index}]"), message)
        })
    };
    Ok((limit, before, states.iter().enumerate().map(named).collect::<Result<_, _>>()?))
}
