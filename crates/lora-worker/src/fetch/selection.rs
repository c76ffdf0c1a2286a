//! Which files of a model's repository or directory the engine reads.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::disk::Disk;
use super::origin::{Origin, Wanted};
use super::{FetchError, is_bare};

const CONFIG: &str = "config.json";
/// The weights, if they are one file.
const WEIGHTS: &str = "model.safetensors";
/// Names the files of the weights otherwise.
const INDEX: &str = "model.safetensors.index.json";
/// An index is no longer than this.
const MAX_INDEX: u64 = 64 << 20;
/// Tokenizer and generation settings: those that are there.
const SMALL: [&str; 10] = [
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
    if !names.contains(CONFIG) {
        return Err(format!("has no {CONFIG}"));
    }
    let Some(weights) = [WEIGHTS, INDEX].into_iter().find(|name| names.contains(name)) else {
        return Err(format!("has neither {WEIGHTS} nor {INDEX}; weights in other formats are not read"));
    };
    let is_template = |name: &str| {
        name.strip_prefix(TEMPLATES).is_some_and(|name| is_bare(name) && name.ends_with(".jinja"))
    };
    let is_needed =
        |name: &&str| [CONFIG, weights].contains(name) || SMALL.contains(name) || is_template(name);
    Ok(names.into_iter().filter(is_needed).map(str::to_owned).collect())
}

/// The shards that the index among `files`, which are of `origin` (for people: `from`), names; none without an index.
///
/// # Errors
/// An index that cannot be had or read, or names what is not to be named.
pub(super) async fn shards(
    files: &[Wanted],
    origin: &Origin,
    disk: &Disk,
    from: &str,
) -> Result<BTreeSet<String>, FetchError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(file) = files.iter().find(|file| file.name == INDEX) else { return Ok(BTreeSet::new()) };
    let fail = |message: String| FetchError::lasting(from, format!("{INDEX} {message}"));
    if file.size > MAX_INDEX {
        return Err(fail(format!("is longer than {MAX_INDEX} bytes")));
    }
    let text = disk.read_once(origin, file).await?;
    let index: Index =
        serde_json::from_slice(&text).map_err(|error| fail(format!("cannot be read: {error}")))?;
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    match shards.iter().find(|name| !is_bare(name)) {
        Some(name) => Err(fail(format!("names {name:?}, which is no file beside it"))),
        None => Ok(shards),
    }
}
