//! From an assignment to a run that can train: base, data, and the state to continue from.

use std::sync::Arc;
use std::time::Instant;

use backon::Retryable;
use lora_collective::CancelToken;
use lora_model::{Base, BaseKey};
use lora_proto::v1::{self, Phase};
use lora_spec::{JobFiles, JobSpec, SourceDir};
use lora_train::{Run, RunData, TrainError};

use super::{EngineThread, Interruption, LoadedJob, job_spec};
use crate::backoff::backoff;
use crate::directive::WorkScope;
use crate::fetch::FetchError;
use crate::status::CurrentJob;

impl EngineThread {
    /// Fetches and loads the job in whichever generation, then takes on the rank of the newest
    /// assignment.
    pub(super) fn prepare(&mut self, assignment: &v1::Assignment) -> Result<(), Interruption> {
        let v1::Assignment { job_id, generation, rank, .. } = assignment;
        tracing::info!(job = job_id, generation, rank, "job assigned");
        self.engine.status.send_replace(Some(CurrentJob::new(assignment)));
        let spec = job_spec(assignment)?;
        let requested = assignment.inputs.clone().unwrap_or_default();
        let fetched = self.fetch(WorkScope::job(assignment), || {
            self.engine.fetcher.inputs(&requested, self.engine.channel.clone())
        })?;
        let (cancel, _watching) = self.cancel_with(WorkScope::job(assignment));
        let run = self.load(&spec, &fetched.of_job(&spec), &cancel)?;
        let facts = run.facts().into();
        self.job = Some(LoadedJob { run, _files: fetched });
        self.update(|current| current.facts = Some(facts));
        let newest = self.engine.desired.borrow().assignment.clone();
        match newest.filter(|newest| newest.job_id == *job_id) {
            Some(newest) => self.reassign(&newest),
            None => Err(Interruption::Superseded),
        }
    }

    /// Takes on the rank of `assignment` in the loaded job. The state is kept, unless the
    /// checkpoint to continue from is newer.
    pub(super) fn reassign(&mut self, assignment: &v1::Assignment) -> Result<(), Interruption> {
        let v1::Assignment { job_id, generation, rank, checkpoint, .. } = assignment;
        let Some(mut job) = self.job.take() else { return Err(Interruption::Superseded) };
        self.update(|current| {
            current.generation = *generation;
            current.notice.clear();
        });
        let is_newer = |checkpoint: &&v1::Checkpoint| checkpoint.step > job.run.completed_steps();
        let restored = match checkpoint.as_ref().filter(|_| *rank == 0).filter(is_newer) {
            Some(checkpoint) => self.restore(&mut job.run, checkpoint, assignment),
            None => Ok(()),
        };
        let completed_steps = job.run.completed_steps();
        self.job = Some(job);
        restored?;
        tracing::info!(job = job_id, generation, rank, completed_steps, "ready to train");
        self.update(|current| {
            current.enter(Phase::Prepared);
            current.completed_steps = completed_steps;
        });
        Ok(())
    }

    fn restore(
        &self,
        run: &mut Run,
        checkpoint: &v1::Checkpoint,
        assignment: &v1::Assignment,
    ) -> Result<(), Interruption> {
        self.enter(Phase::Preparing);
        let fetch = || self.engine.fetcher.checkpoint(checkpoint, self.engine.channel.clone());
        let bytes = self.fetch(WorkScope::group(assignment), fetch)?;
        Ok(run.restore(&bytes)?)
    }

    /// Runs `fetch`, and retries it while its error is transient and `scope` is desired.
    fn fetch<T, F: Future<Output = Result<T, FetchError>>>(
        &self,
        scope: WorkScope,
        fetch: impl FnMut() -> F,
    ) -> Result<T, Interruption> {
        self.wait_for(scope, async {
            let fetched = fetch.retry(backoff()).when(FetchError::is_transient).notify(|error, pause| {
                tracing::warn!(%error, ?pause, "fetch failed, will retry");
            });
            Ok(fetched.await?)
        })
    }

    fn load(&mut self, spec: &JobSpec, files: &JobFiles, cancel: &CancelToken) -> Result<Run, Interruption> {
        let data = RunData::read(spec, files, Some(self.engine.fetcher.token_cache()), cancel)?;
        // The coordinator could check this only if the base is in its store.
        data.check_memory(spec, &files.base, self.engine.memory)?;
        let base = self.load_base(spec, &files.base)?;
        Ok(Run::from_data(spec, files, data, base)?)
    }

    /// Returns the base in `dir`: the base in memory if it is the same, otherwise the base read
    /// from `dir`, after the other base has been dropped.
    fn load_base(&mut self, spec: &JobSpec, dir: &SourceDir) -> Result<Arc<Base>, Interruption> {
        let started = Instant::now();
        let key = BaseKey::from_dir(dir, spec.base_layout()).map_err(TrainError::from)?;
        let known = self.base.take().filter(|(cached, _)| *cached == key);
        let cached = known.is_some();
        let base = match known {
            Some((_, base)) => base,
            None => {
                Arc::new(Base::load(dir, spec.base_layout(), &self.engine.device).map_err(TrainError::from)?)
            }
        };
        self.base = Some((key, Arc::clone(&base)));
        let ready = v1::BaseReady {
            worker: String::new(),
            sha256: base.sha256().to_owned(),
            cached,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.update(|current| current.base = Some(ready));
        Ok(base)
    }
}
