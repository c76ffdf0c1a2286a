//! Tokens that `tokenizer.json` lacks and other files of a base define, as Transformers 5 adds them
//! (`TokenizersBackend.__init__`).

use std::collections::BTreeMap;

use lora_spec::SourceDir;
use lora_spec::file_names::TOKENIZER_CONFIG;
use serde_json::{Map, Value as Json};
use tokenizers::AddedToken;

use crate::DataError;
use crate::tokenizer_files::{read_object, token_text};

const ADDED_TOKENS: &str = "added_tokens.json";
/// The names of the special tokens that every tokenizer may have.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Adds the tokens to `tokenizer`. `config` is `tokenizer_config.json`, and `special_tokens_map`
/// the file with this name, which has precedence.
///
/// # Errors
/// A file or an entry that cannot be read.
pub(crate) fn add(
    tokenizer: &mut tokenizers::Tokenizer,
    dir: &SourceDir,
    config: &Map<String, Json>,
    special_tokens_map: &Map<String, Json>,
) -> Result<(), DataError> {
    let decoder = config.get("added_tokens_decoder").and_then(Json::as_object);
    let find = |key: &str| {
        let given = |map: &Map<String, Json>| map.get(key).filter(|value| !value.is_null()).cloned();
        given(special_tokens_map).or_else(|| given(config))
    };
    let extra = find("extra_special_tokens").or_else(|| find("additional_special_tokens"));
    if config.get("split_special_tokens") == Some(&Json::Bool(true)) {
        let message = "split_special_tokens: true is not supported; remove it";
        return Err(DataError::file(dir.file(TOKENIZER_CONFIG).name(), message));
    }
    let mut named: Vec<Json> = NAMES.into_iter().filter_map(find).collect();
    // Special tokens of a model, such as image_token.
    let others = config.iter().filter(|(key, _)| key.ends_with("_token") && !NAMES.contains(&key.as_str()));
    named.extend(others.map(|(_, token)| token.clone()));
    let specific = find("model_specific_special_tokens");
    named.extend(specific.iter().filter_map(Json::as_object).flat_map(|map| map.values().cloned()));
    let extra: Vec<Json> = match extra {
        Some(Json::Array(tokens)) => tokens,
        // Names of its own for special tokens.
        Some(Json::Object(tokens)) => {
            named.extend(tokens.into_iter().map(|(_, token)| token));
            Vec::new()
        }
        _ => Vec::new(),
    };

    let mut tokens = match decoder {
        Some(decoder) => of_decoder(dir, decoder)?,
        None => of_added_tokens(dir, named.iter().chain(&extra))?,
    };
    let known = tokenizer.get_added_tokens_decoder();
    let is_known =
        |text: &str, tokens: &[AddedToken]| known.values().chain(tokens).any(|token| token.content == text);
    for token in named.iter().chain(&extra) {
        if let Some(text) = token_text(token).filter(|text| !is_known(text, &tokens)) {
            let flag = |name: &str| token.get(name).and_then(Json::as_bool);
            let added = AddedToken::from(text, true)
                .lstrip(flag("lstrip").unwrap_or(false))
                .rstrip(flag("rstrip").unwrap_or(false))
                .single_word(flag("single_word").unwrap_or(false))
                .normalized(flag("normalized").unwrap_or(false));
            tokens.push(added);
        }
    }
    tokenizer.add_tokens(tokens).map_err(|error| DataError::Tokenize(error.to_string()))?;
    Ok(())
}

/// The tokens of `added_tokens_decoder`, in the order of their ids.
fn of_decoder(dir: &SourceDir, decoder: &Map<String, Json>) -> Result<Vec<AddedToken>, DataError> {
    let mut tokens = BTreeMap::new();
    for (id, token) in decoder {
        let parsed = id.parse::<u32>().ok().zip(serde_json::from_value::<AddedToken>(token.clone()).ok());
        let (id, token) = parsed.ok_or_else(|| {
            let message = format!("added_tokens_decoder.{id:?} is not a token id with an added token");
            DataError::file(dir.file(TOKENIZER_CONFIG).name(), message)
        })?;
        tokens.insert(id, token);
    }
    Ok(tokens.into_values().collect())
}

/// The tokens of `added_tokens.json`, in the order of their ids. Those in `special` are special.
fn of_added_tokens<'a>(
    dir: &SourceDir,
    special: impl Iterator<Item = &'a Json>,
) -> Result<Vec<AddedToken>, DataError> {
    let file = dir.file(ADDED_TOKENS);
    let special: Vec<String> = special.filter_map(token_text).collect();
    let mut tokens = BTreeMap::new();
    for (text, id) in read_object(&file)?.unwrap_or_default() {
        let id = id.as_u64().ok_or_else(|| {
            DataError::file(file.name(), format!("the id of {text:?} is {id}, not a whole number"))
        })?;
        let is_special = special.contains(&text);
        tokens.insert(id, AddedToken::from(text, is_special).normalized(!is_special));
    }
    Ok(tokens.into_values().collect())
}
