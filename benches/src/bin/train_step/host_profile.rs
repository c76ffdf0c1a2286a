//! Where the time goes: busy time of the operations' `trace` spans, without that of spans inside them.

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

/// Times by span name.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostProfile {
    totals: Arc<Mutex<HashMap<&'static str, Total>>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Total {
    calls: u64,
    busy: Duration,
}

/// A span that this thread is in.
struct Frame {
    entered: Instant,
    /// Time in spans inside it.
    inside: Duration,
}

thread_local! {
    static FRAMES: RefCell<Vec<Frame>> = const { RefCell::new(Vec::new()) };
}

/// Starts to measure the process's spans.
pub(crate) fn install() -> Result<HostProfile> {
    let profile = HostProfile::default();
    tracing_subscriber::registry().with(profile.clone()).try_init()?;
    Ok(profile)
}

impl HostProfile {
    /// Forgets what was measured so far.
    pub(crate) fn reset(&self) {
        self.totals.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A row a span name, the longest first.
    pub(crate) fn table(&self, steps: usize) -> String {
        let mut table = format!("{:<24}{:>8}{:>12}{:>10}\n", "operation", "calls", "ms a step", "% of it");
        for SpanRow { name, calls, milliseconds, percent } in self.rows_per_step(steps) {
            let _ = writeln!(table, "{name:<24}{calls:>8}{milliseconds:>12.1}{percent:>10.1}");
        }
        table
    }

    /// The same rows for a line of JSON.
    pub(crate) fn rows(&self, steps: usize) -> Value {
        let row = |SpanRow { name, calls, milliseconds, percent }| json!({"name": name, "calls": calls, "milliseconds": milliseconds, "percent": percent});
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

/// A span name's numbers of a step.
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
            if let Some(around) = frames.last_mut() {
                around.inside += whole;
            }
        });
        let Some(name) = context.metadata(id).map(|metadata| metadata.name()) else { return };
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let total = totals.entry(name).or_default();
        total.calls += 1;
        total.busy += whole.saturating_sub(frame.inside);
    }
}
