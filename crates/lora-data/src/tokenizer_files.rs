//! Reads the tokenizer files of a base directory, in the layouts of Transformers 4 and 5.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use crate::DataError;

/// The contents of a base's tokenizer files, except `tokenizer.json`.
pub(crate) struct TokenizerFiles {
    /// Special tokens by name (`bos_token`, `eos_token`, ...).
    pub(crate) special_tokens: BTreeMap<String, String>,
    /// The file with the default chat template, and the template.
    pub(crate) chat_template: Option<(PathBuf, String)>,
    /// `eos_token_id` of `generation_config.json`, otherwise of `config.json`.
    pub(crate) eos_token_ids: Vec<u32>,
    /// Paths of the tokenizer files that exist, relative to the base directory.
    pub(crate) present: Vec<PathBuf>,
}

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";
const CHAT_TEMPLATE: &str = "chat_template.jinja";
const ADDITIONAL_TEMPLATES: &str = "additional_chat_templates";
/// All file names that `save_pretrained` of a tokenizer writes in Transformers.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    CHAT_TEMPLATE,
];

impl TokenizerFiles {
    /// Reads the files that exist; a missing file is not an error.
    pub(crate) fn read(dir: &Path) -> Result<Self, DataError> {
        let config = read_object(&dir.join(TOKENIZER_CONFIG))?.unwrap_or_default();
        let mut special_tokens = BTreeMap::new();
        // As in Transformers, tokenizer_config.json has precedence.
        for map in [&read_object(&dir.join(SPECIAL_TOKENS_MAP))?.unwrap_or_default(), &config] {
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
        })
    }
}

/// Returns the text of a token, which is a string or a serialized `AddedToken`.
fn token_text(value: &Json) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn chat_template(dir: &Path, config: &Map<String, Json>) -> Result<Option<(PathBuf, String)>, DataError> {
    for path in [dir.join(CHAT_TEMPLATE), dir.join(ADDITIONAL_TEMPLATES).join("default.jinja")] {
        if let Some(source) = read_text(&path)? {
            return Ok(Some((path, source)));
        }
    }
    let path = dir.join(TOKENIZER_CONFIG);
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
        Some(source) => Ok(Some((path, source.to_owned()))),
        None => Err(DataError::file(
            &path,
            "chat_template is neither a string nor a list of {name, template} with one named default",
        )),
    }
}

fn eos_token_ids(dir: &Path) -> Result<Vec<u32>, DataError> {
    for name in ["generation_config.json", "config.json"] {
        let path = dir.join(name);
        let Some(config) = read_object(&path)? else { continue };
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
                DataError::file(&path, "eos_token_id is neither a token id nor a list of token ids")
            });
    }
    Ok(Vec::new())
}

fn existing_files(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut present: Vec<PathBuf> =
        TOKENIZER_FILES.iter().map(PathBuf::from).filter(|name| dir.join(name).is_file()).collect();
    let templates = dir.join(ADDITIONAL_TEMPLATES);
    if templates.is_dir() {
        let mut named = Vec::new();
        for entry in fs::read_dir(&templates).map_err(|source| read_error(&templates, source))? {
            let name = entry.map_err(|source| read_error(&templates, source))?.file_name();
            if Path::new(&name).extension().is_some_and(|extension| extension == "jinja") {
                named.push(Path::new(ADDITIONAL_TEMPLATES).join(name));
            }
        }
        named.sort();
        present.extend(named);
    }
    Ok(present)
}

fn read_object(path: &Path) -> Result<Option<Map<String, Json>>, DataError> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    match serde_json::from_str(&text) {
        Ok(map) => Ok(Some(map)),
        Err(err) => Err(DataError::file(path, format!("is not a JSON object: {err}"))),
    }
}

fn read_text(path: &Path) -> Result<Option<String>, DataError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(read_error(path, source)),
    }
}

fn read_error(path: &Path, source: io::Error) -> DataError {
    DataError::Read { path: path.to_owned(), source }
}
