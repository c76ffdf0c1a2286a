//! Metrics of finished steps that the coordinator has not stored yet.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lora_proto::v1;

/// The largest number of rows that are kept until the coordinator has stored them.
pub(crate) const MAX_UNACKNOWLEDGED_STEPS: usize = 1 << 16;
/// The largest number of rows in a message.
const STEPS_PER_MESSAGE: usize = 1 << 10;

/// The rows of finished steps that the coordinator has not stored yet. Every rank keeps them, and
/// rank 0 sends them: the rank that replaces rank 0 then has the rows that rank 0 could not send. A
/// clone shares the buffer.
#[derive(Clone, Default)]
pub(crate) struct StepOutbox(Arc<Mutex<Buffer>>);

#[derive(Default)]
struct Buffer {
    job_id: String,
    /// Whether this rank sends the rows (it is rank 0).
    is_first: bool,
    rows: VecDeque<v1::StepReport>,
    /// The number of rows, from the first, that were sent in the current connection.
    sent: usize,
    /// The steps of this job up to this one are stored.
    stored: u64,
    /// Whether rows were dropped, which is logged once.
    overflowed: bool,
}

impl StepOutbox {
    /// The last step of the job that is known to be stored, or 0.
    pub(crate) fn stored(&self, job_id: &str) -> u64 {
        let buffer = self.lock();
        if buffer.job_id == job_id { buffer.stored } else { 0 }
    }

    /// Starts a group of a job. The rows of the same job are kept, and rows of `past` are
    /// added for steps that have none.
    pub(crate) fn begin(&self, job_id: &str, is_first: bool, past: Vec<v1::StepReport>) {
        let mut buffer = self.lock();
        let is_same = buffer.job_id == job_id;
        let stored = if is_same { buffer.stored } else { 0 };
        let kept = std::mem::take(&mut buffer.rows).into_iter().filter(|_| is_same);
        let by_step: BTreeMap<u64, _> = past.into_iter().chain(kept).map(|row| (step(&row), row)).collect();
        let lost = by_step.len().saturating_sub(MAX_UNACKNOWLEDGED_STEPS);
        *buffer = Buffer {
            job_id: job_id.to_owned(),
            is_first,
            rows: by_step.into_values().skip(lost).collect(),
            sent: 0,
            stored,
            overflowed: false,
        };
    }

    /// Drops the rows that are not stored, because the job was released.
    pub(crate) fn clear(&self) {
        let mut buffer = self.lock();
        (buffer.rows, buffer.sent) = (VecDeque::new(), 0);
    }

    /// Adds a row. If the buffer is full, the oldest row is dropped.
    pub(crate) fn push(&self, row: v1::StepReport) {
        let mut buffer = self.lock();
        if buffer.rows.len() == MAX_UNACKNOWLEDGED_STEPS {
            buffer.rows.pop_front();
            buffer.sent = buffer.sent.saturating_sub(1);
            if !std::mem::replace(&mut buffer.overflowed, true) {
                tracing::warn!(
                    job = buffer.job_id,
                    kept = MAX_UNACKNOWLEDGED_STEPS,
                    "oldest metrics dropped, too many are not acknowledged"
                );
            }
        }
        buffer.rows.push_back(row);
    }

    /// Drops the rows of `job_id` up to `step`, which the coordinator has stored.
    pub(crate) fn acknowledge(&self, job_id: &str, step: u64) {
        let mut buffer = self.lock();
        if buffer.job_id != job_id {
            return;
        }
        buffer.stored = step;
        while buffer.rows.front().is_some_and(|row| self::step(row) <= step) {
            buffer.rows.pop_front();
            buffer.sent = buffer.sent.saturating_sub(1);
        }
    }

    /// Marks all rows as not sent, for a new connection: rows that were sent may not have arrived.
    pub(crate) fn rewind(&self) {
        self.lock().sent = 0;
    }

    /// Whether this rank has rows to send.
    pub(crate) fn has_unsent(&self) -> bool {
        let buffer = self.lock();
        buffer.is_first && buffer.sent < buffer.rows.len()
    }

    /// Returns the next rows to send, and marks them as sent.
    pub(crate) fn next(&self) -> Option<v1::Steps> {
        let mut buffer = self.lock();
        if !buffer.is_first {
            return None;
        }
        let end = buffer.rows.len().min(buffer.sent + STEPS_PER_MESSAGE);
        let steps: Vec<_> = buffer.rows.range(buffer.sent..end).cloned().collect();
        buffer.sent = end;
        let job_id = buffer.job_id.clone();
        (!steps.is_empty()).then_some(v1::Steps { job_id, steps })
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn step(row: &v1::StepReport) -> u64 {
    row.metrics.map_or(0, |metrics| metrics.step)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64) -> v1::StepReport {
        let metrics = v1::StepMetrics { step, ..v1::StepMetrics::default() };
        v1::StepReport { metrics: Some(metrics), ..v1::StepReport::default() }
    }

    fn sent(steps: &StepOutbox) -> Vec<u64> {
        let messages = std::iter::from_fn(|| steps.next());
        messages.flat_map(|message| message.steps).map(|row| row.metrics.unwrap().step).collect()
    }

    #[test]
    fn steps_are_sent_once_per_connection_until_acknowledged() {
        let steps = StepOutbox::default();
        steps.begin("job", true, Vec::new());
        (1..=5).for_each(|step| steps.push(row(step)));
        assert!(steps.has_unsent());
        assert_eq!(sent(&steps), [1, 2, 3, 4, 5]);
        assert!(!steps.has_unsent());
        steps.acknowledge("job", 2);
        steps.acknowledge("another job", 5);
        steps.push(row(6));
        assert_eq!(sent(&steps), [6]);
        steps.rewind();
        assert_eq!(sent(&steps), [3, 4, 5, 6]);
        assert_eq!((steps.stored("job"), steps.stored("another job")), (2, 0));
        steps.begin("another job", true, vec![row(1)]);
        assert_eq!(sent(&steps), [1], "rows of the previous job are dropped");
    }

    #[test]
    fn a_new_rank_0_sends_its_predecessors_unacknowledged_steps() {
        let steps = StepOutbox::default();
        steps.begin("job", false, Vec::new());
        let noted = v1::StepReport { notice: "skipped".into(), ..row(3) };
        [row(2), noted.clone()].into_iter().for_each(|row| steps.push(row));
        assert!(!steps.has_unsent() && steps.next().is_none(), "only rank 0 sends rows");
        steps.acknowledge("job", 2);
        steps.begin("job", true, vec![row(1), row(3), row(4)]);
        let message = steps.next().unwrap();
        assert_eq!(message.steps, [row(1), noted, row(4)]);
    }

    #[test]
    fn the_oldest_steps_are_dropped_when_full() {
        let steps = StepOutbox::default();
        steps.begin("job", true, Vec::new());
        (1..=MAX_UNACKNOWLEDGED_STEPS as u64 + 3).for_each(|step| steps.push(row(step)));
        let all = sent(&steps);
        assert_eq!((all.len(), all[0]), (MAX_UNACKNOWLEDGED_STEPS, 4));
        steps.push(row(MAX_UNACKNOWLEDGED_STEPS as u64 + 4));
        assert_eq!(sent(&steps), [MAX_UNACKNOWLEDGED_STEPS as u64 + 4], "sent rows are not sent again");
    }
}
