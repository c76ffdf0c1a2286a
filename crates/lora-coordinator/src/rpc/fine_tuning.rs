//! `FineTuning`: what people and their tools ask.

use lora_proto::v1;
use tonic::{Request, Response, Status};

use super::Commands;
use crate::command::{Command, EventStream};

#[derive(Debug)]
pub(crate) struct FineTuning(Commands);

impl FineTuning {
    pub(crate) fn new(commands: Commands) -> Self {
        Self(commands)
    }
}

#[tonic::async_trait]
impl v1::fine_tuning_server::FineTuning for FineTuning {
    async fn submit_job(
        &self,
        request: Request<v1::SubmitJobRequest>,
    ) -> Result<Response<v1::SubmitJobResponse>, Status> {
        let request = Box::new(request.into_inner());
        let job_id = self.0.ask(|reply| Command::Submit { request, reply }).await?;
        Ok(Response::new(v1::SubmitJobResponse { job_id }))
    }

    async fn get_job(&self, request: Request<v1::GetJobRequest>) -> Result<Response<v1::Job>, Status> {
        let job_id = request.into_inner().job_id;
        Ok(Response::new(self.0.ask(|reply| Command::Get { job_id, reply }).await?))
    }

    type WatchJobStream = EventStream;

    async fn watch_job(
        &self,
        request: Request<v1::WatchJobRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let v1::WatchJobRequest { job_id, from_number: from } = request.into_inner();
        Ok(Response::new(self.0.ask(|reply| Command::Watch { job_id, from, reply }).await?))
    }

    async fn pause_job(&self, request: Request<v1::PauseJobRequest>) -> Result<Response<v1::Job>, Status> {
        let job_id = request.into_inner().job_id;
        Ok(Response::new(self.0.ask(|reply| Command::Pause { job_id, reply }).await?))
    }
}
