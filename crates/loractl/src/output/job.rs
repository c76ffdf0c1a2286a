//! Jobs, as text and as data for JSON and YAML.

use lora_proto::v1::{self, StepMetrics, base};
use lora_spec::JobSpec;
use serde::Serialize;

use super::bytes;
use super::exported::ExportedView;
use super::grid::{ColumnFit, Grid};
use super::table::Table;
use super::units::{count, duration, format_age, format_time, seconds_since};

/// A job, with the field names of JSON and YAML.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct JobView {
    pub(crate) job_id: String,
    name: String,
    state: String,
    priority: i32,
    created: String,
    changed: String,
    /// What a queued or waiting job waits for, as a sentence; otherwise empty.
    waiting_for: String,
    workers: Vec<String>,
    generation: u64,
    completed_steps: u64,
    facts: Option<FactsView>,
    checkpoint_step: Option<u64>,
    metrics: Option<StepMetrics>,
    /// The speed of a running job, if it is known.
    tokens_per_second: Option<f64>,
    seconds_left: Option<f64>,
    failure: Option<FailureView>,
    /// The adapter in the result, once the job has succeeded.
    exported: Option<ExportedView>,
    result: Vec<FileView>,
    inputs: InputsView,
    /// The settings; `None` if this version of loractl does not support all of them.
    spec: Option<JobSpec>,
}

/// Facts about a run that are known once its data has been read.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct FactsView {
    total_steps: u64,
    steps_per_epoch: u64,
    trainable_parameters: u64,
    total_parameters: u64,
    adapter_bytes: u64,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct FailureView {
    worker: Option<String>,
    rank: Option<u32>,
    completed_steps: u64,
    cause: String,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct FileView {
    name: String,
    bytes: u64,
    sha256: String,
}

#[derive(Debug, Clone, Serialize)]
struct InputsView {
    base: BaseView,
    train: Vec<FileView>,
    eval: Option<FileView>,
    init_from: Vec<FileView>,
    tokens: Vec<FileView>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
enum BaseView {
    Files(Vec<FileView>),
    Url(String),
    Path(String),
    Unknown,
}

impl JobView {
    /// Creates the view of a job with its speed and the seconds that are left, if they are known.
    pub(crate) fn new(job: v1::Job, tokens_per_second: Option<f64>, seconds_left: Option<f64>) -> Self {
        let spec = job.spec.and_then(|spec| JobSpec::try_from(spec).ok());
        Self {
            job_id: job.job_id,
            name: job.name,
            state: job.state,
            priority: job.priority,
            created: format_time(job.created.as_ref()),
            changed: format_time(job.changed.as_ref()),
            waiting_for: job.waiting_for,
            workers: job.workers,
            generation: job.generation,
            completed_steps: job.completed_steps,
            facts: job.facts.map(Into::into),
            checkpoint_step: job.checkpoint_step,
            metrics: job.metrics,
            tokens_per_second,
            seconds_left,
            failure: job.failure.map(Into::into),
            exported: job.exported.map(Into::into),
            result: job.result.into_iter().map(Into::into).collect(),
            inputs: job.inputs.unwrap_or_default().into(),
            spec,
        }
    }
}

impl From<v1::Job> for JobView {
    fn from(job: v1::Job) -> Self {
        Self::new(job, None, None)
    }
}

impl From<v1::RunFacts> for FactsView {
    fn from(facts: v1::RunFacts) -> Self {
        let v1::RunFacts {
            total_steps,
            steps_per_epoch,
            trainable_parameters,
            total_parameters,
            adapter_bytes,
        } = facts;
        Self { total_steps, steps_per_epoch, trainable_parameters, total_parameters, adapter_bytes }
    }
}

impl From<v1::Failure> for FailureView {
    fn from(failure: v1::Failure) -> Self {
        let v1::Failure { worker, rank, completed_steps, cause } = failure;
        Self { worker, rank, completed_steps, cause }
    }
}

impl From<v1::StoredFile> for FileView {
    fn from(file: v1::StoredFile) -> Self {
        let digest = file.digest.unwrap_or_default();
        Self { name: file.name, bytes: digest.size, sha256: digest.hex() }
    }
}

impl From<v1::Inputs> for InputsView {
    fn from(inputs: v1::Inputs) -> Self {
        let files = |files: Vec<v1::StoredFile>| files.into_iter().map(FileView::from).collect();
        Self {
            base: match inputs.base.and_then(|base| base.source) {
                Some(base::Source::Files(set)) => BaseView::Files(files(set.files)),
                Some(base::Source::Url(url)) => BaseView::Url(url),
                Some(base::Source::Path(path)) => BaseView::Path(path),
                None => BaseView::Unknown,
            },
            train: files(inputs.train),
            eval: inputs.eval.map(Into::into),
            init_from: files(inputs.init_from),
            tokens: files(inputs.tokens),
        }
    }
}

/// Formats a failure as one sentence.
pub(crate) fn failure_text(failure: &v1::Failure) -> String {
    let v1::Failure { worker, rank, completed_steps, cause } = failure;
    let at = match completed_steps {
        0 => String::new(),
        step => format!(", after step {step}"),
    };
    match (worker, rank) {
        (Some(worker), Some(rank)) => format!("{worker} (rank {rank}){at}: {cause}"),
        (Some(worker), None) => format!("{worker}{at}: {cause}"),
        (None, _) => cause.clone(),
    }
}

/// Lists jobs in rows. The least important columns are the last ones, because the end of a row is
/// cut if it is too wide.
pub(crate) fn job_grid(jobs: &[v1::Job]) -> Grid {
    let mut grid = Grid::new(&[
        ("JOB", ColumnFit::Whole),
        ("STATE", ColumnFit::Whole),
        ("STEP", ColumnFit::Right),
        ("LOSS", ColumnFit::Right),
        ("AGE", ColumnFit::Right),
        ("NAME", ColumnFit::Cut),
        ("INFO", ColumnFit::Cut),
    ]);
    for job in jobs {
        let loss = job.metrics.as_ref().map_or_else(|| "-".into(), |metrics| format!("{:.4}", metrics.loss));
        let info = match (&job.failure, job.waiting_for.as_str()) {
            (Some(failure), _) => failure_text(failure),
            (None, "") => job.workers.join(", "),
            (None, waiting_for) => waiting_for.to_owned(),
        };
        grid.row(vec![
            job.job_id.clone(),
            job.state.clone(),
            steps(job),
            loss,
            job.created.as_ref().map_or_else(|| "-".into(), |created| format_age(seconds_since(created))),
            job.name.clone(),
            info,
        ]);
    }
    grid
}

fn steps(job: &v1::Job) -> String {
    match job.facts {
        Some(facts) => format!("{}/{}", job.completed_steps, facts.total_steps),
        None => "-".into(),
    }
}

/// Shows the status of a job, with its speed and the seconds that are left, if they are known.
pub(crate) fn job_table(job: &v1::Job, tokens_per_second: Option<f64>, seconds_left: Option<f64>) -> Table {
    let mut table = Table::new();
    table.row("job", &job.job_id);
    table.row("name", &job.name);
    let since = job.changed.as_ref().map(|changed| format!(", for {}", format_age(seconds_since(changed))));
    table.row("state", format!("{}{}", job.state, since.unwrap_or_default()));
    if !job.waiting_for.is_empty() {
        table.row("waits for", job.waiting_for.trim_start_matches("waits for "));
    }
    if let Some(failure) = &job.failure {
        table.row("failure", failure_text(failure));
    }
    table.row("submitted", format_time(job.created.as_ref()));
    if job.priority != 0 {
        table.row("priority", job.priority);
    }
    progress(&mut table, job, tokens_per_second, seconds_left);
    if !job.workers.is_empty() {
        table.row("workers", job.workers.join(", "));
    }
    if job.generation > 0 {
        table.row("generation", job.generation);
    }
    if let Some(step) = job.checkpoint_step {
        table.row("checkpoint", format!("of step {step}"));
    }
    let inputs = job.inputs.clone().unwrap_or_default();
    match inputs.base.and_then(|base| base.source) {
        Some(base::Source::Url(at) | base::Source::Path(at)) => table.row("base", at),
        Some(base::Source::Files(set)) => table.row("base", format!("{} uploaded", sizes(&set.files))),
        None => {}
    }
    let train = inputs.train.iter().map(|file| ("training data", file));
    for (name, file) in train.chain(inputs.eval.as_ref().map(|file| ("evaluation data", file))) {
        table.row(name, format!("{} ({})", file.name, bytes(size(file))));
    }
    for (index, file) in job.result.iter().enumerate() {
        let name = if index == 0 { "result" } else { "" };
        table.row(name, format!("{} ({})", file.name, bytes(size(file))));
    }
    table
}

fn progress(table: &mut Table, job: &v1::Job, tokens_per_second: Option<f64>, seconds_left: Option<f64>) {
    if let Some(facts) = &job.facts {
        let percent = 100.0 * job.completed_steps as f64 / facts.total_steps.max(1) as f64;
        table.row(
            "steps",
            format!("{} of {} ({percent:.0} %)", count(job.completed_steps), count(facts.total_steps)),
        );
    }
    if let Some(metrics) = &job.metrics {
        table.row("loss", format!("{:.4}", metrics.loss));
        if let Some(loss) = metrics.eval_loss {
            table.row("eval loss", format!("{loss:.4}"));
        }
        if let Some(exported) = job.exported {
            ExportedView::from(exported).rows(table, metrics.step);
        }
        table.row("epoch", format!("{:.2}", metrics.epoch));
        table.row("tokens", count(metrics.num_tokens));
    }
    if let Some(rate) = tokens_per_second {
        table.row("tokens/s", format!("{rate:.0}"));
    }
    if let Some(seconds) = seconds_left {
        table.row("time left", duration(seconds));
    }
    if let Some(facts) = &job.facts {
        let share = 100.0 * facts.trainable_parameters as f64 / facts.total_parameters.max(1) as f64;
        table.row("trained parameters", format!("{} ({share:.2} %)", count(facts.trainable_parameters)));
        table.row("adapter size", bytes(facts.adapter_bytes));
    }
}

fn size(file: &v1::StoredFile) -> u64 {
    file.digest.as_ref().map_or(0, |digest| digest.size)
}

fn sizes(files: &[v1::StoredFile]) -> String {
    format!("{} files ({})", files.len(), bytes(files.iter().map(size).sum()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> v1::Job {
        let facts = v1::RunFacts { total_steps: 200, ..v1::RunFacts::default() };
        let digest = v1::FileDigest { size: 2048, sha256: vec![0xab; 32] };
        v1::Job {
            job_id: "j1".into(),
            name: "dates".into(),
            state: "running".into(),
            completed_steps: 50,
            facts: Some(facts),
            workers: vec!["w0".into(), "w1".into()],
            metrics: Some(StepMetrics { step: 50, loss: 1.25, ..StepMetrics::default() }),
            result: vec![v1::StoredFile { name: "receipt.json".into(), digest: Some(digest) }],
            spec: Some(
                v1::JobSpec::try_from(&JobSpec { name: "dates".into(), ..JobSpec::default() }).unwrap(),
            ),
            ..v1::Job::default()
        }
    }

    #[test]
    fn a_status_shows_progress_pace_workers_and_files() {
        let table = job_table(&job(), Some(123.4), Some(65.0)).to_string();
        for (name, value) in [
            ("state", "running"),
            ("steps", "50 of 200 (25 %)"),
            ("loss", "1.2500"),
            ("tokens/s", "123"),
            ("time left", "1 min 05 s"),
            ("workers", "w0, w1"),
            ("result", "receipt.json (2.00 KiB)"),
        ] {
            let row = table.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            assert!(row.ends_with(value), "{name}: {table}");
        }
        assert!(!table.contains("failure") && !table.contains("waits for"), "{table}");
    }

    #[test]
    fn a_job_in_json_has_its_settings_and_hashes_in_hexadecimal() {
        let view = serde_json::to_value(JobView::from(job())).unwrap();
        assert_eq!(view["spec"]["training"]["micro_batch_size"], 4);
        assert_eq!(view["result"][0]["sha256"], "ab".repeat(32));
        assert_eq!(view["facts"]["total_steps"], 200);
    }

    #[test]
    fn a_row_shows_the_wait_reason_or_the_failure() {
        let waiting = v1::Job { waiting_for: "waits for 1 worker: none of 2 is free".into(), ..job() };
        let status = job_table(&waiting, None, None).to_string();
        assert!(
            status.lines().any(|line| line == "waits for           1 worker: none of 2 is free"),
            "{status}"
        );
        let failure = v1::Failure { cause: "out of memory".into(), ..v1::Failure::default() };
        let failed = v1::Job { failure: Some(failure), ..job() };
        let text = job_grid(&[job(), waiting, failed]).fitted();
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("50/200  1.2500") && lines[1].ends_with("w0, w1"), "{text}");
        assert!(
            lines[2].ends_with("waits for 1 worker: none of 2 is free")
                && lines[3].ends_with("out of memory"),
            "{text}"
        );
    }
}
