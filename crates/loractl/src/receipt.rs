//! How an adapter was trained, where that is known.

use std::path::Path;

use anyhow::{Context, Result};
use lora_train::Receipt;

/// The receipt beside an adapter; `None` for one that another program trained.
pub(crate) fn read(adapter: &Path) -> Result<Option<Receipt>> {
    let path = adapter.join("receipt.json");
    if !path.exists() {
        return Ok(None);
    }
    let parse = || Ok::<Receipt, anyhow::Error>(serde_json::from_slice(&std::fs::read(&path)?)?);
    parse().map(Some).with_context(|| path.display().to_string())
}
