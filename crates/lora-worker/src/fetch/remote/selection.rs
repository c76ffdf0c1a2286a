//! Selects the files of a model's repository or directory that the engine reads.

use std::collections::{BTreeMap, BTreeSet};

use lora_proto::file_name::is_file_name;
use lora_spec::file_names::{
    CHAT_TEMPLATES, GENERATION_CONFIG, MODEL_CONFIG, MODEL_WEIGHTS, MODEL_WEIGHTS_INDEX, TOKENIZER_FILES,
};
use serde::Deserialize;

use crate::fetch::FetchError;
use crate::fetch::cache::CacheDir;
use crate::fetch::source::{RemoteFile, Source};

/// The size limit of an index.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// Returns those of the files `names` that a base needs, except the shards of the weights, which
/// the index names.
///
/// # Errors
/// A required file is missing.
pub(in crate::fetch) fn needed<'a>(
    names: impl IntoIterator<Item = &'a str>,
) -> Result<BTreeSet<String>, String> {
    let names: BTreeSet<&str> = names.into_iter().collect();
    if !names.contains(MODEL_CONFIG) {
        return Err(format!("has no {MODEL_CONFIG}"));
    }
    let Some(weights) = [MODEL_WEIGHTS, MODEL_WEIGHTS_INDEX].into_iter().find(|name| names.contains(name))
    else {
        return Err(format!(
            "has neither {MODEL_WEIGHTS} nor {MODEL_WEIGHTS_INDEX}; weights in other formats are not read"
        ));
    };
    let is_template = |name: &str| {
        name.split_once('/').is_some_and(|(dir, name)| {
            dir == CHAT_TEMPLATES && is_file_name(name) && name.ends_with(".jinja")
        })
    };
    let is_needed = |name: &&str| {
        [MODEL_CONFIG, GENERATION_CONFIG, weights].contains(name)
            || TOKENIZER_FILES.contains(name)
            || is_template(name)
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
    source: &dyn Source,
    cache: &CacheDir,
    from: &str,
) -> Result<BTreeSet<String>, FetchError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(file) = files.iter().find(|file| file.name == MODEL_WEIGHTS_INDEX) else {
        return Ok(BTreeSet::new());
    };
    let fail = |message: String| FetchError::permanent(from, format!("{MODEL_WEIGHTS_INDEX} {message}"));
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
