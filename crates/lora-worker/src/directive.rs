//! What the coordinator wants of this worker.

use std::sync::Arc;

use lora_proto::v1;

/// The newest directive.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct DesiredState {
    pub(crate) assignment: Option<Arc<v1::Assignment>>,
    pub(crate) goal: v1::Goal,
    /// Of the directive, in its connection; 0: there has been none in this one.
    pub(crate) number: u64,
}

impl DesiredState {
    /// No job.
    pub(crate) fn none() -> Self {
        Self { assignment: None, goal: v1::Goal::Unspecified, number: 0 }
    }

    /// Where nobody else can say so: stop training at the next boundary. True if that changes anything.
    pub(crate) fn stop_training(&mut self) -> bool {
        let training = self.assignment.is_some() && self.goal == v1::Goal::Train;
        if training {
            self.goal = v1::Goal::Stop;
        }
        training
    }
}

impl From<v1::Directive> for DesiredState {
    fn from(directive: v1::Directive) -> Self {
        let goal = directive.goal();
        Self { assignment: directive.assignment.map(Arc::new), goal, number: directive.number }
    }
}

/// What a piece of work is for. It is given up once that is not wanted any more.
#[derive(Debug, Clone)]
pub(crate) enum WorkScope {
    /// A job, in whatever generation.
    Job(String),
    /// A job's group of one generation.
    Group(String, u64),
}

impl WorkScope {
    /// The job of `assignment`.
    pub(crate) fn job(assignment: &v1::Assignment) -> Self {
        Self::Job(assignment.job_id.clone())
    }

    /// The group of `assignment`.
    pub(crate) fn group(assignment: &v1::Assignment) -> Self {
        Self::Group(assignment.job_id.clone(), assignment.generation)
    }

    /// Whether it is what is wanted.
    pub(crate) fn is_current(&self, desired: &DesiredState) -> bool {
        desired.assignment.as_deref().is_some_and(|assignment| match self {
            Self::Job(job_id) => *job_id == assignment.job_id,
            Self::Group(job_id, generation) => {
                (job_id, *generation) == (&assignment.job_id, assignment.generation)
            }
        })
    }
}
