//! The formats of dataset rows, recognized by their keys.

use std::fmt;

use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::Message;
use crate::message::json_type_name;

/// The format of a dataset row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// `messages` and optionally `tools`: rendered with the base's chat template. The assistant's
    /// turns are trained.
    Messages,
    /// `prompt` and `completion`, both strings or both lists of messages, as in TRL: the completion
    /// is trained.
    PromptCompletion,
    /// `text`: the whole text is trained.
    Text,
    /// Stanford Alpaca's `instruction`, `input` and `output`: the output is trained.
    Alpaca,
}

/// The contents of a row.
pub(crate) enum RowContent {
    /// A conversation. The assistant's turns from message `from` are trained.
    Chat { messages: Vec<Message>, tools: Option<Json>, from: usize },
    /// A text. It is trained from byte `from`, and so is the end-of-sequence token after it.
    Plain { text: String, from: usize },
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Messages => "messages",
            Self::PromptCompletion => "prompt/completion",
            Self::Text => "text",
            Self::Alpaca => "instruction/output",
        })
    }
}

impl RowFormat {
    /// Returns the keys that only rows of this format have.
    fn distinguishing_keys(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Text => &["text"],
            Self::Alpaca => &["instruction", "output"],
        }
    }

    /// Recognizes the format of a row by its keys. A key with the value null counts as missing.
    ///
    /// # Errors
    /// No format has these keys, several formats do, or a key of the format is missing.
    pub(crate) fn recognize(row: &Map<String, Json>) -> Result<Self, String> {
        let has = |key: &&str| row.get(*key).is_some_and(|value| !value.is_null());
        let all = [Self::Messages, Self::PromptCompletion, Self::Text, Self::Alpaca];
        let found: Vec<Self> =
            all.into_iter().filter(|format| format.distinguishing_keys().iter().any(has)).collect();
        match found[..] {
            [format] => match format.distinguishing_keys().iter().find(|key| !has(key)) {
                Some(missing) => Err(format!("a row of the format {format} needs `{missing}`")),
                None => Ok(format),
            },
            [] => {
                let keys: Vec<&str> = row.keys().map(String::as_str).collect();
                Err(format!(
                    "not a row of a known format: it needs `messages`; `prompt` and `completion`; `text`; \
                     or `instruction` and `output`; its keys are {}",
                    if keys.is_empty() { "none".into() } else { format!("`{}`", keys.join("`, `")) }
                ))
            }
            _ => Err(format!(
                "keys of several formats ({}); keep one format",
                found.iter().map(Self::to_string).collect::<Vec<_>>().join(" and ")
            )),
        }
    }

    /// Removes the contents from `row` and returns them. The remaining keys have no effect.
    ///
    /// # Errors
    /// A value of the wrong type.
    pub(crate) fn take(self, row: &mut Map<String, Json>) -> Result<RowContent, String> {
        match self {
            Self::Messages => {
                let messages = Message::list_from_json("messages", take(row, "messages"))?;
                Ok(RowContent::Chat { messages, tools: take_tools(row)?, from: 0 })
            }
            Self::PromptCompletion => match (take(row, "prompt"), take(row, "completion")) {
                (Json::String(prompt), Json::String(completion)) => {
                    Ok(RowContent::Plain { text: format!("{prompt}{completion}"), from: prompt.len() })
                }
                (prompt @ Json::Array(_), completion @ Json::Array(_)) => {
                    let mut messages = Message::list_from_json("prompt", prompt)?;
                    let from = messages.len();
                    messages.extend(Message::list_from_json("completion", completion)?);
                    Ok(RowContent::Chat { messages, tools: take_tools(row)?, from })
                }
                (prompt, completion) => Err(format!(
                    "`prompt` is {} and `completion` is {}; both must be strings, or both lists of messages",
                    json_type_name(&prompt),
                    json_type_name(&completion)
                )),
            },
            Self::Text => Ok(RowContent::Plain { text: take_string(row, "text")?, from: 0 }),
            Self::Alpaca => {
                let instruction = take_string(row, "instruction")?;
                let input = match take(row, "input") {
                    Json::Null => String::new(),
                    Json::String(input) => input,
                    other => return Err(not_a_string("input", &other)),
                };
                let prompt = alpaca_prompt(&instruction, &input);
                let output = take_string(row, "output")?;
                Ok(RowContent::Plain { text: format!("{prompt}{output}"), from: prompt.len() })
            }
        }
    }
}

/// Returns the prompt with which Stanford Alpaca was trained
/// (github.com/tatsu-lab/stanford_alpaca, `PROMPT_DICT`).
fn alpaca_prompt(instruction: &str, input: &str) -> String {
    if input.is_empty() {
        format!(
            "Below is an instruction that describes a task. Write a response that appropriately \
             completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
        )
    } else {
        format!(
            "Below is an instruction that describes a task, paired with an input that provides further \
             context. Write a response that appropriately completes the request.\n\n\
             ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
        )
    }
}

fn take(row: &mut Map<String, Json>, key: &str) -> Json {
    row.shift_remove(key).unwrap_or(Json::Null)
}

fn take_string(row: &mut Map<String, Json>, key: &str) -> Result<String, String> {
    match take(row, key) {
        Json::String(text) => Ok(text),
        other => Err(not_a_string(key, &other)),
    }
}

fn not_a_string(key: &str, value: &Json) -> String {
    format!("`{key}` is {}; it must be a string", json_type_name(value))
}

/// Returns the tools for the chat template: a list of JSON schemas, or as in TRL a string with such
/// a list.
fn take_tools(row: &mut Map<String, Json>) -> Result<Option<Json>, String> {
    match take(row, "tools") {
        Json::Null => Ok(None),
        tools @ Json::Array(_) => Ok(Some(tools)),
        Json::String(text) => match serde_json::from_str(&text) {
            Ok(tools @ Json::Array(_)) => Ok(Some(tools)),
            _ => Err("`tools` is a string that is not a JSON list".into()),
        },
        other => Err(format!("`tools` is {}; it must be a list of JSON schemas", json_type_name(&other))),
    }
}
