//! The receipt of an adapter, which describes its training.

use std::path::Path;

use anyhow::{Context, Result};
use lora_spec::file_names::RECEIPT;
use lora_train::Receipt;

/// Reads the receipt in the directory of an adapter, and compares the files there with it; `None`
/// if the adapter has no receipt, because another program trained it.
pub(crate) fn read_and_check(adapter: &Path) -> Result<Option<Receipt>> {
    let receipt = read(adapter)?;
    if let Some(receipt) = &receipt {
        receipt.check_files(adapter)?;
    }
    Ok(receipt)
}

/// Reads the receipt in the directory of an adapter; `None` if the adapter has none.
pub(crate) fn read(adapter: &Path) -> Result<Option<Receipt>> {
    let path = adapter.join(RECEIPT);
    if !path.exists() {
        return Ok(None);
    }
    let parse = || Ok::<Receipt, anyhow::Error>(serde_json::from_slice(&std::fs::read(&path)?)?);
    parse().map(Some).with_context(|| path.display().to_string())
}
