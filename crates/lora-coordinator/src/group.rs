//! The workers that share a job in one generation.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use lora_proto::v1::Failure;
use lora_spec::JobState;
use tokio::time::Instant;

use crate::command::SessionId;

/// When a worker blames a peer, how long the peer itself may take to be heard of: its own error, or its lost connection, is
/// the better evidence.
const SETTLING: Duration = Duration::from_secs(1);

/// The workers of one assignment, by rank.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) members: Vec<Member>,
    /// Result files that have been uploaded, by name.
    pub(crate) staged: BTreeMap<String, PathBuf>,
    /// The members were told to drop the job, because it is to pause before it began.
    pub(crate) dropped: bool,
    /// A failure that blames a peer, and until when a better cause is waited for.
    suspicion: Option<(Failure, Instant)>,
}

/// A worker in a group.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) session: SessionId,
    pub(crate) worker: String,
    pub(crate) phase: Phase,
}

/// How far a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Preparing,
    Prepared,
    Ended(JobState),
    /// It has freed the job's memory, or is lost.
    Out,
}

impl Group {
    /// A group of the workers (session and name), in the order of their ranks.
    pub(crate) fn new(workers: impl IntoIterator<Item = (SessionId, String)>) -> Self {
        let member = |(session, worker)| Member { session, worker, phase: Phase::Preparing };
        Self {
            members: workers.into_iter().map(member).collect(),
            staged: BTreeMap::new(),
            dropped: false,
            suspicion: None,
        }
    }

    /// The rank of the worker with this session.
    pub(crate) fn rank_of(&self, session: SessionId) -> Option<usize> {
        self.members.iter().position(|member| member.session == session)
    }

    /// Sets a member's phase and says whether all members are there now.
    pub(crate) fn advance(&mut self, rank: usize, phase: Phase) -> bool {
        if let Some(member) = self.members.get_mut(rank) {
            member.phase = phase;
        }
        self.members.iter().all(|member| member.phase == phase)
    }

    /// Whether every member has ended its run, however.
    pub(crate) fn all_ended(&self) -> bool {
        self.members.iter().all(|member| matches!(member.phase, Phase::Ended(_)))
    }

    /// A failure that `rank` reports after `completed_steps`. Returns it if it is conclusive; one that blames a peer is kept
    /// until a better one comes or time is up.
    pub(crate) fn judge(
        &mut self,
        rank: usize,
        completed_steps: u64,
        cause: String,
        suspects: &[u32],
    ) -> Option<Failure> {
        let reporter = self.members.get(rank).map(|member| member.worker.clone());
        let suspect = suspects.first().and_then(|&s| Some((s, self.members.get(s as usize)?)));
        let Some((suspect, member)) = suspect else {
            return Some(Failure { worker: reporter, rank: Some(rank as u32), completed_steps, cause });
        };
        let by = reporter.unwrap_or_default();
        let failure = Failure {
            worker: Some(member.worker.clone()),
            rank: Some(suspect),
            completed_steps,
            cause: format!("as {by} (rank {rank}) reports: {cause}"),
        };
        self.suspicion.get_or_insert_with(|| (failure, Instant::now() + SETTLING));
        None
    }

    /// When the cause of a failure has been waited for long enough.
    pub(crate) fn settles_at(&self) -> Option<Instant> {
        self.suspicion.as_ref().map(|(_, at)| *at)
    }

    /// The failure that no better cause was found for by `now`.
    pub(crate) fn settled(&mut self, now: Instant) -> Option<Failure> {
        self.suspicion.take_if(|(_, at)| *at <= now).map(|(failure, _)| failure)
    }
}
