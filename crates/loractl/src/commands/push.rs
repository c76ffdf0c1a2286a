//! `loractl push`: uploads an adapter to a model repository.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::builder::NonEmptyStringValueParser;
use lora_model::{PeftAdapter, sha256};
use lora_proto::file_name::is_file_name;
use lora_spec::file_names::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, JOB, METRICS, RECEIPT, TOKENIZER, TOKENIZER_FILES,
};
use lora_train::Receipt;
use serde::Serialize;
use serde_json::Value;

use crate::hub::{Hub, HubFile, ModelCard, RepositoryName};
use crate::output::{Format, Table, bytes};
use crate::receipt;

/// The model card, which the hub shows.
const MODEL_CARD: &str = "README.md";
/// The field of adapter_config.json from which programs load the base.
const BASE_FIELD: &str = "base_model_name_or_path";
/// The size limit of a file in one request to the hub's storage.
const MAX_FILE_BYTES: u64 = 5_000_000_000;

/// Upload an adapter to a model repository of the Hugging Face Hub
///
/// Uploads the adapter, the tokenizer's files and a model card, in one commit. A
/// repository that does not exist is created, as a private one. A README.md in the
/// adapter's directory replaces the model card.
///
/// The token comes from HF_TOKEN; it needs write access. HF_ENDPOINT names another
/// server with the hub's endpoints.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  HF_TOKEN=hf_... loractl push runs/dates --to org/dates-lora
  loractl push runs/dates --to org/dates-lora --base-model HuggingFaceTB/SmolLM2-135M-Instruct"
)]
pub(crate) struct Args {
    /// Directory of the adapter.
    #[arg(value_name = "DIR")]
    adapter: PathBuf,
    /// Repository to upload to.
    #[arg(long, value_name = "ORG/NAME", value_parser = RepositoryName::parse)]
    to: RepositoryName,
    /// Name of the base on the hub, for an adapter whose base was a directory.
    #[arg(long, value_name = "ORG/NAME", value_parser = RepositoryName::parse)]
    base_model: Option<RepositoryName>,
    /// Branch to commit to.
    #[arg(long, default_value = "main", value_parser = branch)]
    revision: String,
    /// Message of the commit.
    #[arg(long, default_value = "Upload adapter", value_parser = NonEmptyStringValueParser::new())]
    message: String,
    /// Create the repository as a public one.
    #[arg(long)]
    public: bool,
    /// Also upload receipt.json, metrics.jsonl and job.yaml, which contain paths of this machine.
    #[arg(long, conflicts_with = "base_model")]
    with_receipt: bool,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Serialize)]
struct Pushed {
    repository: String,
    commit: String,
    created: bool,
    files: Vec<String>,
    bytes: usize,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let adapter = PeftAdapter::read(&args.adapter.as_path().into())?.config;
    let receipt = receipt::read(&args.adapter)?;
    let mut files = read_files(&args, receipt.as_ref())?;
    let base = set_base(&args, receipt.as_ref(), &mut files)?;
    if !files.iter().any(|file| file.name == MODEL_CARD) {
        let card = ModelCard {
            repository: &args.to,
            base: &base,
            adapter: &adapter,
            has_tokenizer: files.iter().any(|file| file.name == TOKENIZER),
            receipt: receipt.as_ref(),
        };
        files.push(HubFile { name: MODEL_CARD.into(), bytes: card.text().into() });
    }
    let hub = Hub::from_environment()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let (created, commit) = runtime.block_on(async {
        let created = hub.create(&args.to, !args.public).await?;
        let committed = hub.commit(&args.to, &args.revision, &args.message, &files).await;
        let committed = committed.map_err(|error| match created {
            true => error.context(format!(
                "{} was created and is empty; remedy the cause and run the command again",
                args.to.as_str()
            )),
            false => error,
        });
        Ok::<_, anyhow::Error>((created, committed?))
    })?;
    let pushed = Pushed {
        repository: hub.page(&args.to),
        commit,
        created,
        bytes: files.iter().map(|file| file.bytes.len()).sum(),
        files: files.into_iter().map(|file| file.name).collect(),
    };
    args.output.print(&pushed, || text(&pushed, args.public))?;
    Ok(ExitCode::SUCCESS)
}

fn branch(text: &str) -> Result<String, String> {
    match text.len() <= 255 && text.split('/').all(is_file_name) {
        true => Ok(text.to_owned()),
        false => Err(format!("{text:?} is not the name of a branch")),
    }
}

/// Reads the files of the adapter, and compares them with its receipt.
fn read_files(args: &Args, receipt: Option<&Receipt>) -> Result<Vec<HubFile>> {
    let dir = &args.adapter;
    let mut names = vec![ADAPTER_CONFIG.to_owned(), ADAPTER_WEIGHTS.to_owned()];
    match receipt {
        Some(receipt) => names.extend(receipt.files.iter().map(|file| file.name.clone())),
        None => names.extend(TOKENIZER_FILES.iter().map(|name| (*name).to_owned())),
    }
    names.extend(
        args.with_receipt.then_some([RECEIPT, METRICS, JOB]).into_iter().flatten().map(str::to_owned),
    );
    names.push(MODEL_CARD.into());
    if args.with_receipt && receipt.is_none() {
        bail!("--with-receipt: {} has no {RECEIPT}", dir.display());
    }
    names.retain(|name| is_file_name(name) && dir.join(name).is_file());
    names.sort();
    names.dedup();
    let read = |name: String| {
        let path = dir.join(&name);
        let size = std::fs::metadata(&path).with_context(|| path.display().to_string())?.len();
        if size > MAX_FILE_BYTES {
            bail!("{}: has {}; at most {} are supported", path.display(), bytes(size), bytes(MAX_FILE_BYTES));
        }
        let content = std::fs::read(&path).with_context(|| path.display().to_string())?;
        Ok(HubFile { name, bytes: content.into() })
    };
    let files: Vec<HubFile> = names.into_iter().map(read).collect::<Result<_>>()?;
    let Some(receipt) = receipt else { return Ok(files) };
    let weights = (ADAPTER_WEIGHTS, &receipt.adapter_sha256);
    let others = receipt.files.iter().map(|file| (file.name.as_str(), &file.sha256));
    for (name, expected) in std::iter::once(weights).chain(others) {
        let found = files.iter().find(|file| file.name == name).map(|file| sha256(&file.bytes));
        if found.as_ref() != Some(expected) {
            let path = dir.join(name);
            bail!(
                "{}: is not the file that {RECEIPT} describes; train again, or download it again",
                path.display()
            );
        }
    }
    Ok(files)
}

/// Returns the base's name on the hub, which `adapter_config.json` then names.
fn set_base(args: &Args, receipt: Option<&Receipt>, files: &mut [HubFile]) -> Result<RepositoryName> {
    let path = args.adapter.join(ADAPTER_CONFIG);
    let Some(file) = files.iter_mut().find(|file| file.name == ADAPTER_CONFIG) else {
        bail!("{}: does not exist", path.display());
    };
    let mut config: Value =
        serde_json::from_slice(&file.bytes).with_context(|| path.display().to_string())?;
    let named = config[BASE_FIELD].as_str().unwrap_or_default().to_owned();
    if let Some(base) = &args.base_model {
        if named != base.as_str() {
            config[BASE_FIELD] = base.as_str().into();
            // The revision is one of the other base.
            config["revision"] = Value::Null;
            let mut text = serde_json::to_vec_pretty(&config)?;
            text.push(b'\n');
            file.bytes = text.into();
            rename_base(files, &named, base.as_str());
        }
        return Ok(base.clone());
    }
    // A directory can have a name of the form org/name. The job says which of them it is.
    let is_directory = match receipt {
        Some(receipt) => receipt.job.model.base_url().is_none_or(|url| !url.starts_with("hf://")),
        None => Path::new(&named).exists(),
    };
    match RepositoryName::parse(&named) {
        Ok(base) if !is_directory => Ok(base),
        _ => bail!(
            "{}: {BASE_FIELD} is {named:?}, which others cannot load; name the base on the hub with \
             --base-model org/name",
            path.display()
        ),
    }
}

/// Names the base in a model card that exists, such as the one that PEFT writes.
fn rename_base(files: &mut [HubFile], named: &str, base: &str) {
    let Some(card) = files.iter_mut().find(|file| file.name == MODEL_CARD) else { return };
    if let (false, Ok(text)) = (named.is_empty(), std::str::from_utf8(&card.bytes)) {
        card.bytes = text.replace(named, base).into();
    }
}

fn text(pushed: &Pushed, public: bool) -> String {
    let mut table = Table::new();
    let created = match (pushed.created, public) {
        (false, true) => " (existed; --public does not change it)",
        (false, false) => "",
        (true, true) => " (created, public)",
        (true, false) => " (created, private)",
    };
    table.row("repository", format!("{}{created}", pushed.repository));
    table.row("commit", &pushed.commit);
    table.row("files", format!("{}, {}", pushed.files.len(), bytes(pushed.bytes as u64)));
    table.to_string()
}
