//! Which files of a model's repository or directory the engine reads.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::cache::CacheDir;
use super::source::{RemoteFile, Source};
use super::{FetchError, is_bare};

const CONFIG_FILE: &str = "config.json";
/// The weights, if they are one file.
const WEIGHTS_FILE: &str = "model.safetensors";
/// Names the files of the weights otherwise.
const WEIGHTS_INDEX_FILE: &str = "model.safetensors.index.json";
/// An index is no longer than this.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// Tokenizer and generation settings: those that are there.
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
/// Directory of further chat templates.
const TEMPLATES: &str = "additional_chat_templates/";

/// What is needed of the files called `names`: all but the shards of the weights, which the index among them names.
///
/// # Errors
/// What a base cannot do without.
pub(super) fn needed<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<BTreeSet<String>, String> {
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
        name.strip_prefix(TEMPLATES).is_some_and(|name| is_bare(name) && name.ends_with(".jinja"))
    };
    let is_needed = |name: &&str| {
        [CONFIG_FILE, weights].contains(name) || TOKENIZER_FILES.contains(name) || is_template(name)
    };
    Ok(names.into_iter().filter(is_needed).map(str::to_owned).collect())
}

/// The shards that the index among `files`, which are of `source` (for people: `from`), names; none without an index.
///
/// # Errors
/// An index that cannot be had or read, or names what is not to be named.
pub(super) async fn shards(
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
    match shards.iter().find(|name| !is_bare(name)) {
        Some(name) => Err(fail(format!("names {name:?}, which is no file beside it"))),
        None => Ok(shards),
    }
}
