//! From an assignment to a run that can train: base, data, and the state to go on from.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use backon::Retryable;
use lora_collective::CancelToken;
use lora_model::{Base, BaseKey};
use lora_proto::v1::{self, Phase};
use lora_spec::JobSpec;
use lora_train::{Run, RunData, RunFacts, RunInputs, TrainError};

use super::{EngineThread, Interruption, LoadedJob, job_spec};
use crate::backoff::backoff;
use crate::directive::WorkScope;
use crate::fetch::{FetchError, LocalInputs};
use crate::memory::MemoryLimit;
use crate::status::CurrentJob;

impl EngineThread {
    /// Fetches and loads the job, whatever its generation, then takes the place that is wanted by then.
    pub(super) fn prepare(&mut self, assignment: &v1::Assignment) -> Result<(), Interruption> {
        let v1::Assignment { job_id, generation, rank, .. } = assignment;
        tracing::info!(job = job_id, generation, rank, "job assigned");
        self.engine.status.send_replace(Some(CurrentJob::new(assignment)));
        let spec = job_spec(assignment)?;
        let wanted = assignment.inputs.clone().unwrap_or_default();
        let inputs = self.fetch(WorkScope::job(assignment), || {
            self.engine.fetcher.inputs(&wanted, self.engine.channel.clone())
        })?;
        let (cancel, _watching) = self.cancel_with(WorkScope::job(assignment));
        let run = self
            .load(&spec, &inputs, &cancel)
            .map_err(|interruption| with_job_paths(interruption, &spec, &inputs))?;
        let facts = facts_message(run.facts());
        self.job = Some(LoadedJob { run, _inputs: inputs });
        self.update(|current| current.facts = Some(facts));
        let newest = self.engine.desired.borrow().assignment.clone();
        match newest.filter(|newest| newest.job_id == *job_id) {
            Some(newest) => self.reassign(&newest),
            None => Err(Interruption::Superseded),
        }
    }

    /// Takes a place in the job that is held. The state stays, unless the checkpoint to go on from is newer.
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

    /// What `fetch` gets, tried again for as long as it may work later and `scope` is wanted.
    fn fetch<T, F: Future<Output = Result<T, FetchError>>>(
        &self,
        scope: WorkScope,
        fetch: impl FnMut() -> F,
    ) -> Result<T, Interruption> {
        self.wait_for(scope, async {
            let fetched = fetch.retry(backoff()).when(FetchError::is_transient).notify(|error, pause| {
                tracing::warn!(%error, ?pause, "fetching failed, trying again");
            });
            fetched.await.map_err(|error| Interruption::Failed(error.to_string()))
        })
    }

    fn load(
        &mut self,
        spec: &JobSpec,
        inputs: &LocalInputs,
        cancel: &CancelToken,
    ) -> Result<Run, Interruption> {
        let files = RunInputs {
            train: inputs.train.clone(),
            eval: inputs.eval.clone(),
            init_from: inputs.init_from.clone(),
        };
        let data = RunData::read(spec, &files, &inputs.base, cancel)?;
        // The coordinator knew it only where the base is in its store.
        let MemoryLimit { bytes, gpu } = self.engine.memory;
        if let Some(problem) = data.too_large(spec, &inputs.base, bytes.unwrap_or(u64::MAX), gpu)? {
            return Err(Interruption::Failed(problem));
        }
        let base = self.load_base(spec, &inputs.base)?;
        Ok(Run::from_data(spec, &files, data, base)?)
    }

    /// The base in `dir`: the one in memory if it is the same, else read now, after the other has been let go.
    fn load_base(&mut self, spec: &JobSpec, dir: &Path) -> Result<Arc<Base>, Interruption> {
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

/// People know files by what their job calls them, not by where this worker keeps them.
fn with_job_paths(interruption: Interruption, spec: &JobSpec, inputs: &LocalInputs) -> Interruption {
    let Interruption::Failed(cause) = interruption else { return interruption };
    let data = &spec.data;
    let names = [
        (Some(&inputs.train), Some(&data.train)),
        (inputs.eval.as_ref(), data.eval.as_ref()),
        (inputs.init_from.as_ref(), spec.adapter.init_from.as_ref()),
        (Some(&inputs.base), Some(&spec.model.base)),
    ];
    let known = names.into_iter().filter_map(|(here, named)| here.zip(named));
    Interruption::Failed(known.fold(cause, |cause, (here, named)| {
        cause.replace(&*here.to_string_lossy(), &named.to_string_lossy())
    }))
}

fn facts_message(facts: &RunFacts) -> v1::RunFacts {
    v1::RunFacts {
        total_steps: facts.total_steps,
        steps_per_epoch: facts.steps_per_epoch,
        trainable_parameters: facts.trainable_parameters,
        total_parameters: facts.total_parameters,
        adapter_bytes: facts.adapter_bytes,
    }
}
