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

/// The branch of a new repository.
const MAIN: &str = "main";
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
/// The token comes from HF_TOKEN, or from hf auth login; it needs write access.
/// HF_ENDPOINT names another server with the hub's endpoints.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl push runs/dates --to org/dates-lora
  loractl push runs/smollm2 --to org/smollm2-lora --base-model HuggingFaceTB/SmolLM2-135M-Instruct"
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
    /// Branch to commit to; it must exist.
    #[arg(long, default_value = MAIN, value_parser = branch)]
    revision: String,
    /// Message of the commit.
    #[arg(long, default_value = "Upload adapter", value_parser = NonEmptyStringValueParser::new())]
    message: String,
    /// Create the repository as a public one.
    #[arg(long)]
    public: bool,
    /// Also upload receipt.json, metrics.jsonl and job.yaml, which contain paths of this machine;
    /// only for a job whose base came from the hub.
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
    let adapter = PeftAdapter::read(&args.adapter.as_path().into())?;
    let (is_multimodal, adapter) = (adapter.is_multimodal(), adapter.config);
    let receipt = receipt::read(&args.adapter)?;
    let mut files = read_files(&args, receipt.as_ref())?;
    let base = set_base(&args, receipt.as_ref(), &mut files)?;
    if !files.iter().any(|file| file.name == MODEL_CARD) {
        let card = ModelCard {
            repository: &args.to,
            base: &base,
            adapter: &adapter,
            base_is_named: args.base_model.is_none(),
            is_multimodal,
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
        if args.revision != MAIN && hub.find(&args.to).await?.is_none() {
            bail!(
                "--revision: {} does not exist or cannot be read; a new repository has only the branch \
                 {MAIN}",
                args.to.as_str()
            );
        }
        let created = hub.create(&args.to, !args.public).await?;
        let committed = hub.commit(&args.to, &args.revision, &args.message, &files).await;
        let committed = committed.map_err(|error| match created {
            true => error.context(format!(
                "{} was created; if it is still empty, remedy the cause and run the command again",
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
    let card = dir.join(MODEL_CARD);
    if card.exists() && !card.is_file() {
        bail!("{}: is not a file", card.display());
    }
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
    for (name, expected) in receipt.files() {
        let found = files.iter().find(|file| file.name == name).map(|file| sha256(&file.bytes));
        let problem = match found {
            None => "does not exist",
            Some(found) if found != expected => "is not the file that receipt.json describes",
            Some(_) => continue,
        };
        bail!("{}: {problem}; train again, or download it again", dir.join(name).display());
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
    // A directory can have a name of the form org/name. The job says which of them it is. Without
    // a receipt it is the name on the hub, unless such a directory is here.
    let is_directory = match receipt {
        Some(receipt) => receipt.job.model.hub_repository().is_none(),
        None => Path::new(&named).exists(),
    };
    match RepositoryName::parse(&named) {
        Ok(base) if !is_directory => Ok(base),
        _ if args.with_receipt => bail!(
            "--with-receipt: the job's base was the directory {named:?}; a receipt can be uploaded for a \
             base from the hub only (model.base: hf://org/name)"
        ),
        _ => bail!(
            "{}: {BASE_FIELD} is {named:?}, a directory, which others cannot load; name the base on the hub \
             with --base-model org/name",
            path.display()
        ),
    }
}

/// Names the base in a model card that exists, such as the one that PEFT writes.
fn rename_base(files: &mut [HubFile], named: &str, base: &str) {
    let Some(card) = files.iter_mut().find(|file| file.name == MODEL_CARD) else { return };
    if let (false, Ok(text)) = (named.is_empty(), std::str::from_utf8(&card.bytes)) {
        card.bytes = renamed(text, named, base).into();
    }
}

/// Replaces a name in a model card where it stands alone: in the metadata, and if it is a path or
/// has the form org/name also in the text.
fn renamed(card: &str, named: &str, base: &str) -> String {
    let metadata = match card.strip_prefix("---\n").and_then(|rest| rest.find("\n---")) {
        Some(end) => end + "---\n".len(),
        None => 0,
    };
    let end = if named.contains('/') { card.len() } else { metadata };
    let is_part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '/');
    let mut text = String::with_capacity(card.len());
    let mut rest = 0;
    for (at, _) in card[..end].match_indices(named) {
        let after = &card[at + named.len()..];
        let is_extended = after.starts_with(is_part)
            || after.strip_prefix('.').is_some_and(|after| after.starts_with(is_part));
        if !is_extended && !card[..at].ends_with(|c: char| is_part(c) || c == '.') {
            text.extend([&card[rest..at], base]);
            rest = at + named.len();
        }
    }
    text + &card[rest..]
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_names_of_the_base_are_replaced_in_a_card() {
        let card = |name: &str| {
            format!(
                "---\nbase_model: {name}\nlibrary_name: peft\ntags:\n- base_model:adapter:{name}\n---\n\n\
                 # base\n\nTrained on {name} with {name}-data, {name}.v2 and /x/{name}: see {name}.\n"
            )
        };
        let expected = |name: &str, text: &str| {
            format!(
                "---\nbase_model: org/new\nlibrary_name: peft\ntags:\n- base_model:adapter:org/new\n---\n\n\
                 # base\n\nTrained on {text} with {name}-data, {name}.v2 and /x/{name}: see {text}.\n"
            )
        };
        assert_eq!(renamed(&card("base"), "base", "org/new"), expected("base", "base"));
        assert_eq!(renamed(&card("org/old"), "org/old", "org/new"), expected("org/old", "org/new"));
        assert_eq!(renamed("a base", "base", "org/new"), "a base");
    }
}
