//! Reads the tokenizer files of a base directory, in the layouts of Transformers 4 and 5.

use std::collections::BTreeMap;

use lora_spec::file_names::{
    CHAT_TEMPLATE, GENERATION_CONFIG, MODEL_CONFIG, TOKENIZER_CONFIG, TOKENIZER_FILES,
};
use lora_spec::{SourceDir, SourceFile};
use serde_json::{Map, Value as Json};

use crate::DataError;

/// The contents of a base's tokenizer files, except `tokenizer.json`.
pub(crate) struct TokenizerFiles {
    /// Special tokens by name (`bos_token`, `eos_token`, ...).
    pub(crate) special_tokens: BTreeMap<String, String>,
    /// The file with the default chat template, and the template.
    pub(crate) chat_template: Option<(SourceFile, String)>,
    /// `eos_token_id` of `generation_config.json`, otherwise of `config.json`.
    pub(crate) eos_token_ids: Vec<u32>,
    /// The tokenizer files that exist, with the names of their copies.
    pub(crate) present: Vec<(String, SourceFile)>,
    /// `tokenizer_config.json`.
    pub(crate) config: Map<String, Json>,
    /// `special_tokens_map.json`; empty if it does not count.
    pub(crate) special_tokens_map: Map<String, Json>,
}

const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
/// The default template in a directory of several, which Transformers writes if there are others.
const DEFAULT_TEMPLATE: &str = "additional_chat_templates/default.jinja";

impl TokenizerFiles {
    /// Reads the files that exist; a missing file is not an error.
    pub(crate) fn read(dir: &SourceDir) -> Result<Self, DataError> {
        let config = read_object(&dir.file(TOKENIZER_CONFIG))?.unwrap_or_default();
        let mut special_tokens_map = read_object(&dir.file(SPECIAL_TOKENS_MAP))?.unwrap_or_default();
        let mut special_tokens = BTreeMap::new();
        // As in Transformers, special_tokens_map.json counts only if tokenizer_config.json has no
        // list of added tokens, and then has precedence.
        if config.contains_key("added_tokens_decoder") {
            special_tokens_map.clear();
        }
        for map in [&config, &special_tokens_map] {
            special_tokens.extend(
                map.iter()
                    .filter(|(name, _)| name.ends_with("_token"))
                    .filter_map(|(name, value)| Some((name.clone(), token_text(value)?))),
            );
        }
        Ok(Self {
            special_tokens,
            chat_template: chat_template(dir, &config)?,
            eos_token_ids: eos_token_ids(dir)?,
            present: existing_files(dir)?,
            config,
            special_tokens_map,
        })
    }
}

/// Returns the text of a token, which is a string or a serialized `AddedToken`.
pub(crate) fn token_text(value: &Json) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn chat_template(
    dir: &SourceDir,
    config: &Map<String, Json>,
) -> Result<Option<(SourceFile, String)>, DataError> {
    for name in [CHAT_TEMPLATE, DEFAULT_TEMPLATE] {
        let file = dir.file(name);
        if let Some(source) = read_text(&file)? {
            return Ok(Some((file, source)));
        }
    }
    let file = dir.file(TOKENIZER_CONFIG);
    let source = match config.get("chat_template") {
        None | Some(Json::Null) => return Ok(None),
        Some(Json::String(source)) => Some(source.as_str()),
        Some(Json::Array(named)) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Json::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str()),
        Some(_) => None,
    };
    match source {
        Some(source) => Ok(Some((file, source.to_owned()))),
        None => Err(DataError::file(
            file.name(),
            "chat_template is neither a string nor a list of {name, template} with one named default",
        )),
    }
}

fn eos_token_ids(dir: &SourceDir) -> Result<Vec<u32>, DataError> {
    for name in [GENERATION_CONFIG, MODEL_CONFIG] {
        let file = dir.file(name);
        let Some(config) = read_object(&file)? else { continue };
        let ids: Vec<&Json> = match config.get("eos_token_id") {
            None | Some(Json::Null) => continue,
            Some(Json::Array(ids)) => ids.iter().collect(),
            Some(id) => vec![id],
        };
        return ids
            .into_iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<Vec<u32>>>()
            .ok_or_else(|| {
                DataError::file(file.name(), "eos_token_id is neither a token id nor a list of token ids")
            });
    }
    Ok(Vec::new())
}

fn existing_files(dir: &SourceDir) -> Result<Vec<(String, SourceFile)>, DataError> {
    let mut present = Vec::new();
    for name in TOKENIZER_FILES {
        let mut file = dir.file(name);
        if name == CHAT_TEMPLATE && file.is_absent() {
            file = dir.file(DEFAULT_TEMPLATE);
        }
        if file.is_absent() {
            continue;
        }
        // A copy that fails after the training would lose the result.
        if !file.path().is_file() {
            return Err(DataError::file(file.name(), "is not a file, or is a link to a missing file"));
        }
        present.push((name.to_owned(), file));
    }
    Ok(present)
}

/// Reads a JSON object; `None` if the file does not exist.
pub(crate) fn read_object(file: &SourceFile) -> Result<Option<Map<String, Json>>, DataError> {
    let Some(text) = read_text(file)? else { return Ok(None) };
    match serde_json::from_str(&text) {
        Ok(map) => Ok(Some(map)),
        Err(err) => Err(DataError::file(file.name(), format!("is not a JSON object: {err}"))),
    }
}

fn read_text(file: &SourceFile) -> Result<Option<String>, DataError> {
    match file.read_to_string() {
        Ok(text) => Ok(Some(text)),
        Err(_) if file.is_absent() => Ok(None),
        Err(source) => Err(DataError::read(file, source)),
    }
}
