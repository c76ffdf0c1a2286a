//! `loractl merge`: merges an adapter into its base, and measures how this changes the model.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, bail};
use lora_data::{Dataset, SAMPLE_TOKENS, Tokenizer, sample_rows};
use lora_model::{Adapter, Base, MergeTarget, PeftAdapter, logits};
use lora_spec::{
    BaseDtype, BaseLayout, DataSpec, LongRows, MicroBatch, ModelConfig, Quantization, SourceDir, file_names,
};
use lora_train::{ComputeDevice, LogitDifference, Receipt};
use serde::Serialize;

use crate::commands::check_base;
use crate::output::{Format, Table};
use crate::receipt;

/// Merge an adapter into its base model
///
/// The result is one dense model, for servers that do not load adapters.
///
/// Rounding changes a model, and an adapter that was trained over a quantized base fits
/// the dequantized values of that base. Therefore the logits of the merged model are
/// compared with those of the trained model on some rows. The model card has the
/// comparison.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl merge --base examples/dates/base --adapter runs/dates --out merged
  loractl merge --base base --adapter runs/qlora --out merged --onto dequantized --dtype f32"
)]
pub(crate) struct Args {
    /// Directory of the base model.
    #[arg(long)]
    base: PathBuf,
    /// Directory of the adapter; its receipt.json, if there is one, has the layout of the base in
    /// training.
    #[arg(long)]
    adapter: PathBuf,
    /// Output directory for the merged model; it must not exist.
    #[arg(long)]
    out: PathBuf,
    /// Weights that the adapter is added to [default: those that give the model nearer to the
    /// trained one]
    #[arg(long, value_enum)]
    onto: Option<OntoArg>,
    /// Data type of the merged matrices.
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// File of rows to compare the models on [default: the training rows of the adapter]
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum OntoArg {
    /// Weights of the base as stored.
    Original,
    /// Dequantized values of the weights, as in training.
    Dequantized,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Dtype {
    Bf16,
    F32,
}

/// The difference of a merged model from the trained one.
#[derive(Debug, Clone, Copy, Serialize)]
struct MergeDifference {
    onto: OntoArg,
    #[serde(flatten)]
    logits: LogitDifference,
}

#[derive(Serialize)]
struct MergeOutcome {
    out: PathBuf,
    written: OntoArg,
    tokens: usize,
    differences: Vec<MergeDifference>,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    // `symlink_metadata` also finds a link that leads nowhere.
    if args.out.symlink_metadata().is_ok() {
        bail!("--out: {} already exists; name a new directory", args.out.display());
    }
    check_base(&args.base)?;
    let receipt = receipt::read_and_check(&args.adapter)?;
    let trained_layout = receipt.as_ref().map_or_else(BaseLayout::default, |it| it.job.base_layout());
    let is_quantized = trained_layout.format.quantization != Quantization::None;
    if args.onto == Some(OntoArg::Dequantized) && !is_quantized {
        bail!(
            "--onto dequantized: the adapter's job did not quantize its base; use --onto original, which \
             dequantizes a base that is stored quantized"
        );
    }
    let both = [OntoArg::Original, OntoArg::Dequantized];
    let dtype = match args.dtype {
        Dtype::Bf16 => BaseDtype::Bf16,
        Dtype::F32 => BaseDtype::F32,
    };
    let base = SourceDir::from(&args.base);
    let config = ModelConfig::read(&base)?;
    let adapter = PeftAdapter::read(&args.adapter.as_path().into())?.to_adapter(&config)?;
    let data = receipt.as_ref().map(|receipt| receipt.job.data.clone()).unwrap_or_default();
    let tokenizer = Tokenizer::for_job(&base, &data)?;
    let (compared, rows) = rows(&args, data, receipt.as_ref(), &tokenizer)?;
    let trained = Base::load(&base, trained_layout.clone(), &ComputeDevice::Cpu)?;
    if let Some(receipt) = receipt.as_ref().filter(|receipt| receipt.base_sha256 != trained.sha256()) {
        bail!(
            "--base: {} is not the base of the adapter's job: its SHA-256 is {}, not {}; only an adapter \
             without receipt.json is merged into another base",
            args.base.display(),
            trained.sha256(),
            receipt.base_sha256
        );
    }
    let expected = sample_logits(&trained, Some(&adapter), &rows)?;
    if expected.iter().flatten().any(|logit| !logit.is_finite()) {
        bail!(
            "the trained model gives logits that are not finite for the rows on which the models are \
             compared, of {}; name other rows with --data",
            compared.display()
        );
    }
    drop(trained);

    // The model that is written is merged a second time, so that only one dense model is in memory.
    let merge = |onto| {
        let target = if onto == OntoArg::Original { MergeTarget::Original } else { MergeTarget::Dequantized };
        Base::merged(&base, &trained_layout, target, dtype, &adapter)
    };
    let mut differences = Vec::new();
    for onto in both.into_iter().take(if is_quantized { 2 } else { 1 }) {
        let found = sample_logits(&merge(onto)?, None, &rows)?;
        differences.push(MergeDifference { onto, logits: LogitDifference::new(&found, &expected) });
    }
    let nearest = differences
        .iter()
        .min_by(|a, b| a.logits.kl_divergence.total_cmp(&b.logits.kl_divergence))
        .map_or(both[0], |it| it.onto);
    let written = args.onto.unwrap_or(nearest);
    let outcome = MergeOutcome { out: args.out.clone(), written, tokens: expected.len(), differences };
    write(&args, &merge(written)?, &tokenizer, &outcome)?;
    args.output.print(&outcome, || text(&outcome))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the rows on which the models are compared, and their file.
fn rows(
    args: &Args,
    data: DataSpec,
    receipt: Option<&Receipt>,
    tokenizer: &Tokenizer,
) -> Result<(PathBuf, Vec<MicroBatch>)> {
    let mut trained_on = receipt.into_iter().flat_map(|receipt| &*receipt.job.data.train);
    let path = args.data.as_ref().or_else(|| trained_on.find(|path| path.is_file()));
    let path = path.ok_or_else(|| {
        anyhow!("--data: the adapter's training rows are not on this machine; name a file of rows")
    })?;
    let data = DataSpec { max_length: SAMPLE_TOKENS + 1, long_rows: LongRows::Truncate, ..data };
    Ok((path.clone(), sample_rows(&Dataset::read(&path.into(), tokenizer, &data)?)))
}

/// Returns the logits after each token of `rows`, `[tokens][vocab]`.
fn sample_logits(base: &Base, adapter: Option<&Adapter>, rows: &[MicroBatch]) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::new();
    for row in rows {
        all.extend(logits(base, adapter, row)?.to_vec2::<f32>()?);
    }
    Ok(all)
}

/// Writes the merged model, the other files of the base, and the model card. After an error the
/// directory is removed.
fn write(args: &Args, merged: &Base, tokenizer: &Tokenizer, outcome: &MergeOutcome) -> Result<()> {
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let fill = || -> Result<()> {
        copy_other_files(&args.base, &args.out)?;
        merged.save(&(&args.base).into(), &args.out)?;
        for (name, file) in tokenizer.files() {
            std::fs::copy(file.path(), args.out.join(name)).with_context(|| file.to_string())?;
        }
        if let Some(template) = tokenizer.template_of_job() {
            std::fs::write(args.out.join(file_names::CHAT_TEMPLATE), template)?;
        }
        std::fs::write(args.out.join("README.md"), card(args, outcome))?;
        Ok(())
    };
    fill().inspect_err(|_| {
        // The directory does not have a complete model.
        let _ = std::fs::remove_dir_all(&args.out);
    })
}

/// Copies the files of a base that are neither weights nor the model card: generation_config.json,
/// the processor of a multimodal model, the licence, and others.
fn copy_other_files(base: &Path, out: &Path) -> Result<()> {
    const WEIGHTS: [&str; 10] =
        ["safetensors", "bin", "gguf", "pt", "pth", "onnx", "msgpack", "h5", "index", "part"];
    for entry in std::fs::read_dir(base).with_context(|| base.display().to_string())? {
        let entry = entry.with_context(|| base.display().to_string())?;
        let (path, name) = (entry.path(), entry.file_name());
        let text = name.to_string_lossy();
        let is_weights = text.split('.').skip(1).any(|part| WEIGHTS.contains(&part));
        if path.is_file() && !is_weights && !text.starts_with('.') && text != "README.md" {
            std::fs::copy(&path, out.join(&name)).with_context(|| path.display().to_string())?;
        }
    }
    Ok(())
}

/// The model card.
fn card(args: &Args, outcome: &MergeOutcome) -> String {
    let name =
        |onto| if onto == OntoArg::Original { "the original weights" } else { "the dequantized weights" };
    let row = |d: &MergeDifference| {
        let l = &d.logits;
        format!(
            "| {} | {:.3e} | {:.2} % | {:.3e} |\n",
            name(d.onto),
            l.kl_divergence,
            100.0 * l.same_token,
            l.relative()
        )
    };
    let rows: String = outcome.differences.iter().map(row).collect();
    format!(
        "# Merged model\n\n\
         This model is the adapter of `{}` added to {} of `{}`. It needs no adapter. The table compares \
         possible merged models with the trained model, over {} tokens:\n\n\
         | added to | KL divergence, nats per token | same most likely token | largest logit \
         difference, relative |\n\
         | --- | --- | --- | --- |\n{rows}\n\
         This model is the one added to {}.\n",
        args.adapter.display(),
        name(outcome.written),
        args.base.display(),
        outcome.tokens,
        name(outcome.written)
    )
}

fn text(outcome: &MergeOutcome) -> String {
    let mut table = Table::new();
    table.row("merged model", outcome.out.display());
    table.row("compared over", format!("{} tokens", outcome.tokens));
    for d in &outcome.differences {
        let onto = if d.onto == OntoArg::Original { "onto original" } else { "onto dequantized" };
        let written = if d.onto == outcome.written { ", written" } else { "" };
        table.row(
            onto,
            format!(
                "KL {:.2e} nats per token, same most likely token {:.1} %, logits differ by {:.1e}{written}",
                d.logits.kl_divergence,
                100.0 * d.logits.same_token,
                d.logits.relative()
            ),
        );
    }
    table.to_string()
}
