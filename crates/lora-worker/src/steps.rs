//! Finished steps on their way to the coordinator.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lora_proto::v1;

/// Rows that are kept at most until the coordinator has stored them.
pub(crate) const KEPT: usize = 1 << 16;
/// Rows in one message.
const TOGETHER: usize = 1 << 10;

/// The finished steps that the coordinator has not stored yet. A clone is the same buffer.
#[derive(Clone, Default)]
pub(crate) struct Steps(Arc<Mutex<Buffer>>);

#[derive(Default)]
struct Buffer {
    job_id: String,
    generation: u64,
    rows: VecDeque<v1::StepReport>,
    /// How many of the rows, from the first, have been sent to the coordinator that is connected now.
    sent: usize,
    /// Steps of this job up to this one are stored.
    stored: u64,
    /// Rows were lost, and somebody was told.
    overflowed: bool,
}

impl Steps {
    /// From here on, rows of this job and generation. Returns the last step of the job that is known to be stored.
    pub(crate) fn begin(&self, job_id: &str, generation: u64) -> u64 {
        let mut buffer = self.lock();
        let stored = if buffer.job_id == job_id { buffer.stored } else { 0 };
        *buffer = Buffer { job_id: job_id.to_owned(), generation, stored, ..Buffer::default() };
        stored
    }

    /// Forgets rows that are not stored; they are another rank's to tell, or nobody's.
    pub(crate) fn clear(&self) {
        let mut buffer = self.lock();
        (buffer.rows, buffer.sent) = (VecDeque::new(), 0);
    }

    /// Takes a row; where there is no room, the oldest one is lost.
    pub(crate) fn push(&self, row: v1::StepReport) {
        let mut buffer = self.lock();
        if buffer.rows.len() == KEPT {
            buffer.rows.pop_front();
            buffer.sent = buffer.sent.saturating_sub(1);
            if !std::mem::replace(&mut buffer.overflowed, true) {
                tracing::warn!(
                    job = buffer.job_id,
                    kept = KEPT,
                    "oldest metrics lost, too many are not stored"
                );
            }
        }
        buffer.rows.push_back(row);
    }

    /// Steps of `job_id` up to `step` are stored.
    pub(crate) fn acknowledge(&self, job_id: &str, step: u64) {
        let mut buffer = self.lock();
        if buffer.job_id != job_id {
            return;
        }
        buffer.stored = step;
        let is_stored = |row: &v1::StepReport| row.metrics.is_some_and(|metrics| metrics.step <= step);
        while buffer.rows.front().is_some_and(is_stored) {
            buffer.rows.pop_front();
            buffer.sent = buffer.sent.saturating_sub(1);
        }
    }

    /// Another connection: what was sent may not have arrived.
    pub(crate) fn rewind(&self) {
        self.lock().sent = 0;
    }

    /// Whether there are rows to send.
    pub(crate) fn are_waiting(&self) -> bool {
        let buffer = self.lock();
        buffer.sent < buffer.rows.len()
    }

    /// The next rows to send.
    pub(crate) fn next(&self) -> Option<v1::Steps> {
        let mut buffer = self.lock();
        let end = buffer.rows.len().min(buffer.sent + TOGETHER);
        let steps: Vec<_> = buffer.rows.range(buffer.sent..end).cloned().collect();
        buffer.sent = end;
        let (job_id, generation) = (buffer.job_id.clone(), buffer.generation);
        (!steps.is_empty()).then_some(v1::Steps { job_id, generation, steps })
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64) -> v1::StepReport {
        let metrics = v1::StepMetrics { step, ..v1::StepMetrics::default() };
        v1::StepReport { metrics: Some(metrics), ..v1::StepReport::default() }
    }

    fn sent(steps: &Steps) -> Vec<u64> {
        let messages = std::iter::from_fn(|| steps.next());
        messages.flat_map(|message| message.steps).map(|row| row.metrics.unwrap().step).collect()
    }

    #[test]
    fn rows_are_sent_once_a_connection_until_they_are_stored() {
        let steps = Steps::default();
        assert_eq!(steps.begin("job", 1), 0);
        (1..=5).for_each(|step| steps.push(row(step)));
        assert!(steps.are_waiting());
        assert_eq!(sent(&steps), [1, 2, 3, 4, 5]);
        assert!(!steps.are_waiting());
        steps.acknowledge("job", 2);
        steps.acknowledge("another job", 5);
        steps.push(row(6));
        assert_eq!(sent(&steps), [6]);
        steps.rewind();
        assert_eq!(sent(&steps), [3, 4, 5, 6]);
        assert_eq!(steps.begin("job", 2), 2, "this much of the job is stored");
        assert_eq!(sent(&steps), [0_u64; 0]);
        assert_eq!(steps.begin("another job", 1), 0);
    }

    #[test]
    fn the_oldest_rows_are_lost_where_there_is_no_room() {
        let steps = Steps::default();
        steps.begin("job", 1);
        (1..=KEPT as u64 + 3).for_each(|step| steps.push(row(step)));
        let all = sent(&steps);
        assert_eq!((all.len(), all[0]), (KEPT, 4));
        steps.push(row(KEPT as u64 + 4));
        assert_eq!(sent(&steps), [KEPT as u64 + 4], "what was sent is not sent again");
    }
}
