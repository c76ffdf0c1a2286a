//! Selects the files of a model's repository or directory that the engine reads.

use std::collections::{BTreeMap, BTreeSet};

use lora_proto::file_name::is_file_name;
use serde::Deserialize;

use crate::fetch::FetchError;
use crate::fetch::cache::CacheDir;
use crate::fetch::source::{RemoteFile, Source};

const CONFIG_FILE: &str = "config.json";
/// The weights, if they are in one file.
const WEIGHTS_FILE: &str = "model.safetensors";
/// The index that names the files of the weights otherwise.
const WEIGHTS_INDEX_FILE: &str = "model.safetensors.index.json";
/// The size limit of an index.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// The tokenizer and the generation settings. Each of these files is optional.
const TOKENIZER_FILES: [&str; 10] = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];
/// The directory of additional chat templates.
const TEMPLATES: &str = "additional_chat_templates/";

/// Returns those of the files `names` that a base needs, except the shards of the weights, which
/// the index names.
///
/// # Errors
/// A required file is missing.
pub(in crate::fetch) fn needed<'a>(
    names: impl IntoIterator<Item = &'a str>,
) -> Result<BTreeSet<String>, String> {
    let names: BTreeSet<&str> = names.into_iter().collect();
    if !names.contains(CONFIG_FILE) {
        return Err(format!("has no {CONFIG_FILE}"));
    }
    let Some(weights) = [WEIGHTS_FILE, WEIGHTS_INDEX_FILE].into_iter().find(|name| names.contains(name))
    else {
        return Err(format!(
            "has neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX_FILE}; weights in other formats are not read"
        ));
    };
    let is_template = |name: &str| {
        name.strip_prefix(TEMPLATES).is_some_and(|name| is_file_name(name) && name.ends_with(".jinja"))
    };
    let is_needed = |name: &&str| {
        [CONFIG_FILE, weights].contains(name) || TOKENIZER_FILES.contains(name) || is_template(name)
    };
    Ok(names.into_iter().filter(is_needed).map(str::to_owned).collect())
}

/// Returns the shards that the index among `files` names, or an empty set if there is no index.
/// `source` is the source of the files, and `from` names it in messages.
///
/// # Errors
/// The index cannot be fetched or read, or names a file outside its directory.
pub(in crate::fetch) async fn shards(
    files: &[RemoteFile],
    source: &Source,
    cache: &CacheDir,
    from: &str,
) -> Result<BTreeSet<String>, FetchError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(file) = files.iter().find(|file| file.name == WEIGHTS_INDEX_FILE) else {
        return Ok(BTreeSet::new());
    };
    let fail = |message: String| FetchError::permanent(from, format!("{WEIGHTS_INDEX_FILE} {message}"));
    if file.size > MAX_INDEX_BYTES {
        return Err(fail(format!("is longer than {MAX_INDEX_BYTES} bytes")));
    }
    let text = cache.read_once(source, file).await?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|error| fail(format!("cannot be read: {error}")))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards.iter().find(|name| !is_file_name(name)) {
        Some(name) => Err(fail(format!("names {name:?}, which is not a file in the same directory"))),
        None => Ok(shards),
    }
}
