//! What a job does with the workers that it gets, or without them.

use std::cmp::Reverse;

use lora_proto::v1;
use lora_spec::JobState;

use crate::control::action::{Action, NewGroup};
use crate::control::group::{GroupPhase, Regroup};
use crate::control::job::Job;
use crate::control::member::member_process;
use crate::control::workers::{Workers, has_state};
use crate::store::MemberRow;

/// Returns what follows for `job`, which gets the workers `new` and otherwise waits for `reason`.
pub(super) fn place(
    job: &Job,
    new: Vec<MemberRow>,
    reason: String,
    workers: &Workers,
    fruitless_limit: u32,
) -> Vec<Action> {
    match (job.state(), job.phase.regroup()) {
        (JobState::Queued, _) if new.is_empty() => explain(job, reason),
        (JobState::Queued, _) => form(job, &Regroup::default(), new, workers, fruitless_limit),
        (_, Some(regroup)) if regroup.remaining.len() + new.len() >= job.spec.workers.min => {
            form(job, regroup, new, workers, fruitless_limit)
        }
        (JobState::Waiting, Some(_)) => explain(job, reason),
        (_, Some(regroup)) => match failed(job, regroup, fruitless_limit) {
            Some(failed) => vec![failed],
            None => {
                let fruitless = job.fruitless_after(regroup);
                let explain = (!reason.is_empty()).then_some(Action::ExplainWait(reason));
                let wait = Action::Wait { regroup: regroup.clone(), fruitless };
                std::iter::once(wait).chain(explain).collect()
            }
        },
        (JobState::Running, None) if !new.is_empty() => {
            let names: Vec<&str> = new.iter().map(|member| member.worker.as_str()).collect();
            vec![Action::Enter(GroupPhase::Stopping { reason: format!("{} can join", names.join(", ")) })]
        }
        (_, None) => Vec::new(),
    }
}

fn explain(job: &Job, reason: String) -> Vec<Action> {
    if job.row.waiting_for == reason { Vec::new() } else { vec![Action::ExplainWait(reason)] }
}

/// Forms a group. The remaining members come first, those with the newest state before the others,
/// so that rank 0 already has the newest state.
fn form(
    job: &Job,
    regroup: &Regroup,
    new: Vec<MemberRow>,
    workers: &Workers,
    fruitless_limit: u32,
) -> Vec<Action> {
    if let Some(failed) = failed(job, regroup, fruitless_limit) {
        return vec![failed];
    }
    let Regroup { reason, mut remaining, events, .. } = regroup.clone();
    let steps_in_memory = |member: &MemberRow| {
        let held = member_process(member, workers).and_then(|worker| worker.held());
        held.filter(|held| held.job_id == job.row.id && has_state(held.phase()))
            .map(|held| held.completed_steps)
    };
    remaining.sort_by_key(|member| Reverse(steps_in_memory(member)));
    let newest_in_memory = remaining.first().and_then(steps_in_memory);
    remaining.extend(new);
    let fruitless = job.fruitless_after(regroup);
    vec![Action::Form(NewGroup { members: remaining, newest_in_memory, reason, events, fruitless })]
}

/// Fails a job whose groups finish no step, with the cause of the last break.
fn failed(job: &Job, regroup: &Regroup, fruitless_limit: u32) -> Option<Action> {
    let fruitless = job.fruitless_after(regroup);
    if !regroup.is_failure || fruitless < fruitless_limit {
        return None;
    }
    let cause = format!(
        "{fruitless} groups in a row broke without a finished step; the last one: {}",
        regroup.reason
    );
    let completed_steps = job.row.completed_steps;
    Some(Action::Fail(v1::Failure { cause, completed_steps, ..v1::Failure::default() }))
}
