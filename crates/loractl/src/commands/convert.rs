//! `loractl convert`: writes an adapter in the format of another program.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lora_model::{PeftAdapter, gguf_adapter};
use lora_spec::{ModelConfig, SourceDir};
use serde::Serialize;

use crate::commands::check_base;
use crate::output::{Format, Table, bytes};
use crate::receipt;

/// Convert an adapter to the format of another program
///
/// PEFT, Transformers, vLLM and SGLang load an adapter as it is. llama.cpp and the
/// programs that build on it need it as GGUF; the base is then the GGUF file of the
/// same model (llama.cpp's convert_hf_to_gguf.py), with its weights in any type.
#[derive(Debug, clap::Args)]
#[command(
    verbatim_doc_comment,
    after_help = "Examples:
  loractl convert --base base --adapter runs/dates --to gguf --out dates.gguf
  llama-server -m base.gguf --lora dates.gguf"
)]
pub(crate) struct Args {
    /// Directory of the base model, for its config.json.
    #[arg(long)]
    base: PathBuf,
    /// Directory of the adapter.
    #[arg(long)]
    adapter: PathBuf,
    /// Format to convert to.
    #[arg(long, value_enum)]
    to: Target,
    /// File to write; it must not exist.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Output format.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Target {
    /// The adapter format of llama.cpp, in f32.
    Gguf,
}

#[derive(Debug, Serialize)]
struct Converted {
    out: PathBuf,
    format: Target,
    adapted_modules: usize,
    bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

pub(crate) fn execute(args: Args) -> Result<ExitCode> {
    let Args { base, adapter, to, out, output } = args;
    // `symlink_metadata` also finds a link that leads nowhere.
    if out.symlink_metadata().is_ok() {
        bail!("--out: {} already exists; name a new file", out.display());
    }
    if let Some(parent) = out.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    }
    check_base(&base)?;
    let config = ModelConfig::read(&SourceDir::from(&base))?;
    let peft = PeftAdapter::read(&adapter.as_path().into())?;
    let receipt = receipt::read_and_check(&adapter)?;
    let adapter = peft.to_adapter(&config)?;
    let file = match to {
        Target::Gguf => gguf_adapter(&adapter, &config)?,
    };
    write_new(&out, &file).with_context(|| out.display().to_string())?;
    let adapted_modules = adapter.layout().modules.len();
    let quantization = receipt.and_then(|receipt| receipt.job.base_layout().format.quantization.name());
    let note = quantization.map(|quantization| {
        format!(
            "the adapter was trained over the base in {quantization}, whose values no GGUF file has; \
             loractl merge --onto dequantized writes a model that has them"
        )
    });
    let converted = Converted { out, format: to, adapted_modules, bytes: file.len(), note };
    output.print(&converted, || {
        let mut table = Table::new();
        table.row("file", converted.out.display());
        table.row("adapted modules", converted.adapted_modules);
        table.row("size", bytes(converted.bytes as u64));
        if let Some(note) = &converted.note {
            table.row("note", note);
        }
        table.to_string()
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a new file. After an error there is no file.
fn write_new(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = File::create_new(path)?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    written.inspect_err(|_| {
        // The file does not have a complete adapter.
        let _ = std::fs::remove_file(path);
    })
}
