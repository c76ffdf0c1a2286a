//! The plan of a job, computed from `config.json`, safetensors headers and the dataset. No weights
//! are read.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lora_collective::tree::all_reduce_bytes;
use lora_data::{
    BatchPlan, DataError, DataReport, Dataset, DatasetFile, RowLayout, TokenCache, TokenFiles, Tokenizer,
    TokenizingProgress, check_data_file,
};
use lora_spec::{FieldError, JobFiles, JobSpec, ModelConfig, SafetensorsIndex, SourceFile};
use serde::Serialize;

use crate::notes::{data_notes, notes, untied_note};
use crate::plan_inputs::PlanInputs;
use crate::{MemoryRequirements, MicroBatchShape, PlanError, PlanMemory, row_flops};

/// The plan of a job.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// The job's name.
    pub name: String,
    /// Name of the base.
    pub base: PathBuf,
    /// Number of parameters of the base.
    pub base_parameters: u64,
    /// Number of trained parameters.
    pub trainable_parameters: u64,
    /// Bytes of the result's parameters (f32).
    pub adapter_bytes: u64,
    /// Number of adapted modules by the last part of their name.
    pub modules: BTreeMap<String, usize>,
    /// Optimizer steps of the job.
    pub total_steps: u64,
    /// Optimizer steps of a pass over the data.
    pub steps_per_epoch: u64,
    /// Warm-up steps.
    pub warmup_steps: u64,
    /// Micro-batches of a full step, which is the largest number of workers that can share the
    /// step.
    pub micro_batches: usize,
    /// Tokens that the model computes over the whole job, without padding.
    pub tokens: u64,
    /// Number of rows of a full step.
    #[serde(skip)]
    pub step_rows: usize,
    /// Whether rows are packed.
    #[serde(skip)]
    pub packing: bool,
    /// Share of padding among the positions that are computed in the first epoch.
    pub padding: f64,
    /// The same if `data.packing` were off.
    pub padding_unpacked: f64,
    /// The same if `data.packing` were on.
    pub padding_packed: f64,
    /// Floating-point operations of the model over the whole job, without padding and
    /// recomputation.
    pub flops: f64,
    /// Memory of a worker.
    pub memory: PlanMemory,
    /// The largest micro-batch.
    #[serde(skip)]
    pub shape: MicroBatchShape,
    /// Memory that a worker needs, with these settings and with alternatives.
    #[serde(skip)]
    pub requirements: MemoryRequirements,
    /// The training data.
    pub train: PlanData,
    /// The evaluation data.
    pub eval: Option<PlanData>,
    /// The first training row, with trained tokens between ⟦ and ⟧.
    pub sample: String,
    /// The first training rows, if they were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub rows: Vec<PlanRow>,
    /// Where the chat template is from, if a row of the training data is a conversation.
    pub chat_template: Option<String>,
    /// Notes for the user, such as settings without effect.
    pub notes: Vec<String>,
    /// Reasons why the job would fail.
    pub problems: Vec<String>,
}

/// Options of a plan that are not part of the job.
#[derive(Clone, Copy, Default)]
pub struct PlanOptions<'a> {
    /// How many of the first training rows the plan has.
    pub shown_rows: usize,
    /// The directory in which tokens are looked up, and kept for the next time.
    pub cache: Option<&'a TokenCache>,
    /// Is told how far a dataset is tokenized.
    pub progress: Option<TokenizingProgress<'a>>,
}

/// A dataset in a plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlanData {
    /// Its files.
    pub files: Vec<PlanFile>,
    /// Statistics of all rows.
    pub report: DataReport,
    /// The files with its tokens.
    #[serde(skip)]
    pub token_files: Vec<SourceFile>,
}

/// A file of a dataset in a plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlanFile {
    /// Its name.
    pub path: PathBuf,
    /// Number of its rows that are used.
    pub rows_kept: usize,
    /// How often an epoch has them.
    pub weight: f64,
    /// How many of its rows an epoch has, counting a row as often as it is used.
    pub epoch_rows: usize,
}

impl PlanFile {
    fn of(file: &DatasetFile) -> Self {
        let (path, rows_kept) = (file.name.clone(), file.report.rows_kept);
        Self { path, rows_kept, weight: file.weight, epoch_rows: file.epoch_rows() }
    }
}

/// A training row in a plan.
#[derive(Debug, Clone, Serialize)]
pub struct PlanRow {
    /// Number of tokens.
    pub tokens: usize,
    /// Number of trained tokens.
    pub trained_tokens: usize,
    /// The text with its special tokens, and with trained tokens between ⟦ and ⟧.
    pub text: String,
}

impl Plan {
    /// Plans `job`, which reads `files`.
    ///
    /// # Errors
    /// An invalid setting, base, tokenizer or dataset. Rows that `data.long_rows` refuses and rows
    /// without targets do not fail the plan; they are listed in `problems`.
    pub fn new(job: &JobSpec, files: &JobFiles, options: PlanOptions) -> Result<Self, PlanError> {
        job.check()?;
        let base = &files.base;
        let mut config = ModelConfig::read(base)?;
        let index = SafetensorsIndex::open(base)?;
        let is_untied = index.untie_head(&mut config)?;
        index.check(&config)?;
        index.check_format(&config, job.model.format())?;
        files.train.iter().try_for_each(|train| check_data_file("data.train", train))?;
        if let Some(eval) = &files.eval {
            check_data_file("data.eval", eval)?;
        }
        let mut modules = BTreeMap::new();
        let mut trainable_parameters = 0;
        job.adapter.check_base(&config, &index)?;
        for module in job.adapter.modules(&config)? {
            let last = module.name.rsplit('.').next().unwrap_or_default().to_owned();
            *modules.entry(last).or_default() += 1;
            trainable_parameters += (job.adapter.r * (module.in_features + module.out_features)) as u64;
        }
        let tokenizer = Tokenizer::for_job(base, &job.data)?.with_vocab_size(config.vocab_size);
        let PlanOptions { shown_rows, cache, progress } = options;
        let token_files = TokenFiles { given: files.tokens.as_ref(), cache, progress };
        let mut problems = Vec::new();
        let mut without_problems = |(dataset, found): (Dataset, Vec<DataError>)| {
            problems.extend(found.iter().map(ToString::to_string));
            dataset
        };
        let train = Dataset::inspect_all(&files.train, &tokenizer, &job.data, token_files);
        let train = train.map(&mut without_problems)?;
        let eval = files.eval.as_ref().map(|file| Dataset::inspect(file, &tokenizer, &job.data, token_files));
        let eval = eval.transpose()?.map(without_problems);
        let training = &job.training;
        let order = BatchPlan::for_job(job, &train);
        let total_steps =
            if train.rows.is_empty() { 0 } else { training.total_steps(order.steps_per_epoch()) };
        let padding = |packed_len| order.padding(RowLayout { packed_len, ..RowLayout::for_job(job) });
        let (padding_unpacked, padding_packed) = (padding(None), padding(Some(job.data.max_length)));
        let inputs = PlanInputs::new(&config, &index, &train);
        let sample = train.rows.iter().next().map(|row| tokenizer.marked_text(row)).transpose()?;
        let shown = train.rows.iter().take(shown_rows).map(|row| {
            let trained_tokens = row.trained().filter(|trained| *trained).count();
            Ok(PlanRow { tokens: row.len(), trained_tokens, text: tokenizer.marked_text(row)? })
        });
        let rows = shown.collect::<Result<Vec<_>, DataError>>()?;
        let has_conversations = train.report.conversations > 0;
        let chat_template = tokenizer.template_source().filter(|_| has_conversations).map(str::to_owned);
        let mut all_notes: Vec<String> = untied_note(is_untied).into_iter().collect();
        all_notes.extend(notes(job, &config, &train));
        for name in tokenizer.unread_variables(&job.data.chat_template_kwargs) {
            all_notes.push(format!(
                "data.chat_template_kwargs.{name} has no effect: the chat template does not read it"
            ));
        }
        all_notes.extend(data_notes(&job.data, &train, eval.as_ref()));
        let data = |dataset: Dataset| PlanData {
            files: dataset.files.iter().map(PlanFile::of).collect(),
            report: dataset.report,
            token_files: dataset.token_files,
        };
        Ok(Self {
            name: job.name.clone(),
            base: base.name().to_owned(),
            base_parameters: config.parameters(),
            trainable_parameters,
            adapter_bytes: 4 * trainable_parameters * (job.adapter.exported().r / job.adapter.r) as u64,
            modules,
            total_steps,
            steps_per_epoch: order.steps_per_epoch(),
            warmup_steps: training.resolved_warmup_steps(total_steps),
            micro_batches: order.step(0).len(),
            tokens: order.tokens(total_steps),
            flops: flops(&train, &config, trainable_parameters) * total_steps as f64
                / order.steps_per_epoch().max(1) as f64,
            memory: inputs.memory(job)?,
            requirements: MemoryRequirements::from_inputs(job, &inputs)?,
            shape: inputs.shape(job),
            step_rows: training.global_batch_size.min(train.epoch_rows()),
            packing: job.data.packing,
            padding: if job.data.packing { padding_packed } else { padding_unpacked },
            padding_unpacked,
            padding_packed,
            notes: all_notes,
            train: data(train),
            eval: eval.map(data),
            sample: sample.unwrap_or_default(),
            rows,
            chat_template,
            problems,
        })
    }

    /// Returns the files with the tokens of the datasets.
    pub fn token_files(&self) -> impl Iterator<Item = &SourceFile> {
        [Some(&self.train), self.eval.as_ref()].into_iter().flatten().flat_map(|data| &data.token_files)
    }

    /// Checks that `workers` workers can share a step.
    ///
    /// # Errors
    /// A step has fewer micro-batches. The error is about `workers.max`.
    pub fn check_workers(&self, workers: usize) -> Result<(), FieldError> {
        let (most, rows) = (self.micro_batches, self.step_rows);
        if workers <= most {
            return Ok(());
        }
        let message = format!(
            "{workers} workers are more than the {most} micro-batches that the {rows} rows of a step \
             make{}; lower it to {most}",
            if self.packing { " when they are packed (data.packing)" } else { "" }
        );
        Err(FieldError::new("workers.max", message))
    }

    /// Returns the largest number of bytes that any of `workers` workers sends, and receives, in
    /// the all-reduce of a step's gradients (f32). Workers without a micro-batch do not count.
    pub fn all_reduce_bytes(&self, workers: usize) -> u64 {
        let workers = workers.min(self.micro_batches);
        // The partition is invalid only without rows, and then nothing is sent.
        all_reduce_bytes(self.micro_batches, workers, 4 * self.trainable_parameters).unwrap_or(0)
    }
}

/// Returns the floating-point operations of a pass over the rows.
fn flops(train: &Dataset, config: &ModelConfig, adapter: u64) -> f64 {
    let mut rows: BTreeMap<usize, f64> = BTreeMap::new();
    for (length, weight) in train.weighted_lengths() {
        *rows.entry(length.saturating_sub(1)).or_default() += weight;
    }
    let of = |(length, count): (usize, f64)| row_flops(config, adapter, length as u64) as f64 * count;
    rows.into_iter().map(of).sum()
}
