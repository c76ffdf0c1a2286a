//! The scheduler: which jobs get which workers. Everything here is pure: [`view`] describes jobs
//! and workers, [`placement`] assigns workers, and [`decide`] turns the assignment into actions.

mod decide;
pub(crate) mod placement;
mod view;

use std::collections::BTreeMap;

use placement::{JobIndex, Schedule};

use crate::control::action::Action;
use crate::control::job::Job;
use crate::control::workers::Workers;

/// Returns the actions that form the groups which can be formed, and that tell users what the other
/// jobs wait for, by job id. `fruitless_limit` is the number of groups in a row without a finished
/// step after which a job fails.
pub(crate) fn schedule(jobs: Vec<&Job>, workers: &Workers, fruitless_limit: u32) -> Vec<(String, Action)> {
    let views = view::View::new(jobs, workers);
    if views.jobs.is_empty() {
        return Vec::new();
    }
    let Schedule { assign, waiting } = placement::schedule(&views.jobs, &views.workers);
    let mut assign: BTreeMap<JobIndex, _> = assign.into_iter().collect();
    let mut actions = Vec::new();
    for view in &views.jobs {
        let Some(job) = views.job(view.id) else { continue };
        let new = assign.remove(&view.id).unwrap_or_default();
        let new = new.into_iter().filter_map(|worker| views.worker(worker)).collect();
        let too_large = |memory| {
            let too_large = job.row.requirements.as_ref().and_then(|it| it.fits(memory).err());
            too_large.map(|error| error.to_string()).unwrap_or_default()
        };
        let name = |other| views.job(other).map(|job| job.row.id.clone()).unwrap_or_default();
        let reason = waiting.iter().find(|(waiting, _)| *waiting == view.id);
        let reason = reason.map(|(_, reason)| reason.sentence(name, too_large)).unwrap_or_default();
        let decided = decide::place(job, new, reason, workers, fruitless_limit);
        actions.extend(decided.into_iter().map(|action| (job.row.id.clone(), action)));
    }
    actions
}
