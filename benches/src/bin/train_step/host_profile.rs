//! The profile of the CPU: the busy time of the operations' `trace` spans, without the time of
//! nested spans.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::{Value, json};
use tracing::Subscriber;
use tracing::span::Id;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Totals by span name.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostProfile {
    totals: Arc<Mutex<HashMap<&'static str, Total>>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Total {
    calls: u64,
    busy: Duration,
}

/// A span that this thread has entered.
struct Frame {
    entered: Instant,
    /// The time in nested spans.
    inside: Duration,
}

thread_local! {
    static FRAMES: RefCell<Vec<Frame>> = const { RefCell::new(Vec::new()) };
}

/// Starts to measure the spans of the process.
pub(crate) fn install() -> Result<HostProfile> {
    let profile = HostProfile::default();
    tracing_subscriber::registry().with(profile.clone()).try_init()?;
    Ok(profile)
}

impl HostProfile {
    /// Discards the measurements so far.
    pub(crate) fn reset(&self) {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Returns a table with one row per span name, the longest first.
    pub(crate) fn table(&self, steps: usize) -> String {
        let mut table = format!("{:<24}{:>8}{:>12}{:>10}\n", "operation", "calls", "ms per step", "percent");
        for SpanRow { name, calls, milliseconds, percent } in self.rows_per_step(steps) {
            let _ = writeln!(table, "{name:<24}{calls:>8}{milliseconds:>12.1}{percent:>10.1}");
        }
        table
    }

    /// Returns the same rows as JSON.
    pub(crate) fn rows(&self, steps: usize) -> Value {
        let row = |row: SpanRow| {
            json!({
                "name": row.name,
                "calls": row.calls,
                "milliseconds": row.milliseconds,
                "percent": row.percent,
            })
        };
        self.rows_per_step(steps).into_iter().map(row).collect()
    }

    fn rows_per_step(&self, steps: usize) -> Vec<SpanRow> {
        let totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<_> = totals.iter().collect();
        sorted.sort_by_key(|(name, total)| (std::cmp::Reverse(total.busy), **name));
        let all: Duration = sorted.iter().map(|(_, total)| total.busy).sum();
        let row = |(name, total): (&&'static str, &Total)| SpanRow {
            name,
            calls: total.calls / steps as u64,
            milliseconds: total.busy.as_secs_f64() * 1e3 / steps as f64,
            percent: 100.0 * total.busy.as_secs_f64() / all.as_secs_f64(),
        };
        sorted.into_iter().map(row).collect()
    }
}

/// The numbers of a span name, per step.
struct SpanRow {
    name: &'static str,
    calls: u64,
    milliseconds: f64,
    percent: f64,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for HostProfile {
    fn on_enter(&self, _: &Id, _: Context<'_, S>) {
        FRAMES.with_borrow_mut(|frames| {
            frames.push(Frame { entered: Instant::now(), inside: Duration::ZERO });
        });
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let Some(frame) = FRAMES.with_borrow_mut(Vec::pop) else { return };
        let whole = frame.entered.elapsed();
        FRAMES.with_borrow_mut(|frames| {
            if let Some(parent) = frames.last_mut() {
                parent.inside += whole;
            }
        });
        let Some(name) = context.metadata(id).map(|metadata| metadata.name()) else { return };
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let total = totals.entry(name).or_default();
        total.calls += 1;
        total.busy += whole.saturating_sub(frame.inside);
    }
}
