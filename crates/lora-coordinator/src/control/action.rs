//! The changes of a job that are decided elsewhere. [`super::jobs`] applies them.

use lora_plan::MemoryRequirements;
use lora_proto::v1::{self, job_event};
use lora_spec::JobSpec;

use super::fault::Exclusion;
use super::group::{GroupPhase, Regroup};
use crate::store::MemberRow;

/// A change of a job.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Action {
    /// The job is valid and waits for workers.
    Queue {
        /// The memory that it needs; `None` if it is not known.
        requirements: Option<Box<MemoryRequirements>>,
        /// Files of tokens that are added to the inputs.
        tokens: Vec<v1::StoredFile>,
        /// The notes of its plan, for users.
        notes: Vec<String>,
    },
    /// The job must be validated, or is valid already, and continues with these settings.
    Resume {
        spec: Box<JobSpec>,
        /// `spec` as the store keeps it.
        message: Box<v1::JobSpec>,
        is_valid: bool,
    },
    /// The job is paused as soon as its newest state is safe.
    StartPause,
    Pause,
    /// The job is cancelled as soon as no worker holds it.
    StartCancel,
    Cancel,
    Fail(v1::Failure),
    /// The result that `worker` uploaded in this generation, as this rank, has these files, after
    /// `steps` steps.
    Succeed {
        worker: String,
        rank: usize,
        files: Vec<String>,
        steps: u64,
        exported: Option<v1::ExportedAdapter>,
    },
    /// All members have loaded the job: they train.
    Train {
        facts: Option<v1::RunFacts>,
        completed_steps: u64,
    },
    /// The group enters a phase.
    Enter(GroupPhase),
    /// The job does not use these processes again.
    Exclude(Vec<Exclusion>),
    /// Only these members stay in a job that waits for others.
    KeepMembers(Vec<MemberRow>),
    /// A group is formed.
    Form(NewGroup),
    /// The job waits for members. `fruitless` groups in a row finished no step.
    Wait {
        regroup: Regroup,
        fruitless: u32,
    },
    /// The text that tells users what the job waits for.
    ExplainWait(String),
    /// A member has loaded the base.
    RecordBase {
        member: MemberRow,
        base: v1::BaseReady,
    },
    /// The notice of the group of this generation.
    RecordNotice(v1::Notice),
    /// Steps that were finished.
    AddSteps(Vec<v1::StepReport>),
}

impl Action {
    /// Whether the store keeps the change. Of phases and excluded processes it knows nothing: after
    /// a restart, the workers' reports lead to them again.
    pub(crate) fn is_stored(&self) -> bool {
        !matches!(self, Self::Enter(_) | Self::Exclude(_))
    }
}

/// A group that is formed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NewGroup {
    /// The members, by rank.
    pub(crate) members: Vec<MemberRow>,
    /// The most steps that a member has in memory. Rank 0 has this state.
    pub(crate) newest_in_memory: Option<u64>,
    /// The reason, as text for users.
    pub(crate) reason: String,
    /// The events to record before the group's.
    pub(crate) events: Vec<job_event::Kind>,
    /// Number of groups in a row that finished no step.
    pub(crate) fruitless: u32,
}
