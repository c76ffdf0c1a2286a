//! Uploads the state in memory to the coordinator's store, as a checkpoint or as the result.

use lora_proto::v1::job_artifact::Name;
use lora_proto::v1::{self, Fault, Phase};

use super::{EngineThread, Interruption};
use crate::directive::WorkScope;
use crate::uploads;

impl EngineThread {
    /// Uploads a checkpoint of the loaded job's state.
    pub(super) fn save(&mut self, assignment: &v1::Assignment) -> Result<(), Interruption> {
        let Some(job) = &self.job else { return Err(Interruption::Superseded) };
        self.enter(Phase::Saving);
        let step = job.run.completed_steps();
        self.upload(assignment, Name::CheckpointStep(step), job.run.checkpoint()?)?;
        tracing::info!(job = assignment.job_id, step, "state saved");
        self.enter(Phase::Saved);
        Ok(())
    }

    /// Verifies and uploads the result.
    pub(super) fn finish(&mut self, assignment: &v1::Assignment) -> Result<(), Interruption> {
        // The result makes pending checkpoints superfluous.
        self.end_checkpoints();
        let Some(job) = &self.job else { return Err(Interruption::Superseded) };
        self.enter(Phase::Exporting);
        let mut files = Vec::new();
        let exported = job.run.exported_adapter().into();
        for artifact in job.run.export()? {
            files.push(artifact.name.clone());
            self.upload(assignment, Name::ResultFile(artifact.name), artifact.bytes)?;
        }
        tracing::info!(job = assignment.job_id, files = files.len(), "result uploaded");
        self.update(|current| {
            current.enter(Phase::Finished);
            current.files = files;
            current.exported = Some(exported);
        });
        Ok(())
    }

    fn upload(&self, assignment: &v1::Assignment, name: Name, bytes: Vec<u8>) -> Result<(), Interruption> {
        let (file, uploads) = (uploads::artifact_name(&name), self.uploads(assignment));
        self.wait_for(WorkScope::group(assignment), async move {
            let uploaded = uploads.upload(name, &bytes).await;
            uploaded.map_err(|error| Interruption::Failed(Fault::Job, format!("{file}: {error}")))
        })
    }
}
