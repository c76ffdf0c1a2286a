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
    /// ShareGPT's `conversations`, with optional `system` and `tools`: as `messages`.
    Conversations,
    /// `prompt` and `completion`, both strings or both lists of messages, as in TRL: the completion
    /// is trained.
    PromptCompletion,
    /// `text`: the whole text is trained.
    Text,
    /// Stanford Alpaca's `instruction`, `input` and `output`: the output is trained.
    Alpaca,
    /// The same with `system` or `history` (pairs of instruction and output), as in LLaMA-Factory:
    /// rendered with the base's chat template. The outputs are trained.
    AlpacaChat,
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
            Self::Conversations => "conversations",
            Self::PromptCompletion => "prompt/completion",
            Self::Text => "text",
            Self::Alpaca => "instruction/output",
            Self::AlpacaChat => "instruction/output with system or history",
        })
    }
}

impl RowFormat {
    /// The formats in the order of preference for a row with the keys of several.
    const ALL: [Self; 6] = [
        Self::Messages,
        Self::Conversations,
        Self::PromptCompletion,
        Self::AlpacaChat,
        Self::Alpaca,
        Self::Text,
    ];

    /// Returns the keys that a row of this format must have.
    fn needed_keys(self) -> &'static [&'static str] {
        match self {
            Self::Messages => &["messages"],
            Self::Conversations => &["conversations"],
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Text => &["text"],
            Self::Alpaca | Self::AlpacaChat => &["instruction", "output"],
        }
    }

    /// Recognizes the format of a row by its keys. A key with the value null counts as missing. If
    /// a row has the keys of several formats, the others have no effect.
    ///
    /// # Errors
    /// The row is of no format, or a key of the format is missing.
    pub(crate) fn recognize(row: &Map<String, Json>) -> Result<Self, String> {
        let has = |key: &&str| row.get(*key).is_some_and(|value| !value.is_null());
        let is_chat = ["system", "history"].iter().any(|key| row.get(*key).is_some_and(is_filled));
        let possible = Self::ALL.into_iter().filter(|format| *format != Self::AlpacaChat || is_chat);
        let complete = possible.clone().find(|format| format.needed_keys().iter().all(has));
        if let Some(format) = complete {
            return Ok(format);
        }
        if ["chosen", "rejected"].iter().all(has) {
            return Err(
                "a row of preferences (`chosen`, `rejected`), which are not trained; for supervised \
                        training rename `chosen` to `completion`, or to `messages` if it is a whole \
                        conversation"
                    .into(),
            );
        }
        let partial = possible.clone().find(|format| format.needed_keys().iter().any(has));
        if let Some(format) = partial
            && let Some(missing) = format.needed_keys().iter().find(|key| !has(key))
        {
            return Err(format!("a row of the format {format} needs `{missing}`"));
        }
        let keys: Vec<&str> = row.keys().map(String::as_str).collect();
        Err(format!(
            "not a row of a known format: it needs `messages`; `conversations`; `prompt` and `completion`; \
             `text`; or `instruction` and `output`; its keys are {}",
            if keys.is_empty() { "none".into() } else { format!("`{}`", keys.join("`, `")) }
        ))
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
            Self::Conversations => {
                let mut messages = Message::list_from_json("conversations", take(row, "conversations"))?;
                add_system(&mut messages, take_text(row, "system")?)?;
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
                let input = take_text(row, "input")?;
                let prompt = alpaca_prompt(&instruction, &input);
                let output = take_string(row, "output")?;
                Ok(RowContent::Plain { text: format!("{prompt}{output}"), from: prompt.len() })
            }
            Self::AlpacaChat => {
                let mut messages = Vec::new();
                add_system(&mut messages, take_text(row, "system")?)?;
                let history = take(row, "history");
                let pairs = match &history {
                    Json::Null => &[][..],
                    Json::Array(pairs) => pairs,
                    other => {
                        return Err(format!("`history` is {}; it must be a list", json_type_name(other)));
                    }
                };
                for (i, pair) in pairs.iter().enumerate() {
                    let pair = pair.as_array().map(Vec::as_slice);
                    let Some([Json::String(question), Json::String(answer)]) = pair else {
                        return Err(format!(
                            "history[{i}] must be a pair of strings: instruction and output"
                        ));
                    };
                    messages.extend([Message::new("user", question), Message::new("assistant", answer)]);
                }
                let instruction = take_string(row, "instruction")?;
                let input = take_text(row, "input")?;
                let question = if input.is_empty() { instruction } else { format!("{instruction}\n{input}") };
                let output = take_string(row, "output")?;
                messages.extend([Message::new("user", &question), Message::new("assistant", &output)]);
                Ok(RowContent::Chat { messages, tools: None, from: 0 })
            }
        }
    }
}

/// Whether a value is neither null nor empty.
fn is_filled(value: &Json) -> bool {
    match value {
        Json::Null => false,
        Json::String(text) => !text.is_empty(),
        Json::Array(items) => !items.is_empty(),
        _ => true,
    }
}

/// Puts a system prompt before the messages.
fn add_system(messages: &mut Vec<Message>, system: String) -> Result<(), String> {
    if system.is_empty() {
        return Ok(());
    }
    if messages.first().is_some_and(|message| message.role() == "system") {
        return Err("`system` is a second system prompt; the conversation begins with one".into());
    }
    messages.insert(0, Message::new("system", &system));
    Ok(())
}

/// Takes a text that may be missing.
fn take_text(row: &mut Map<String, Json>, key: &str) -> Result<String, String> {
    match take(row, key) {
        Json::Null => Ok(String::new()),
        Json::String(text) => Ok(text),
        other => Err(not_a_string(key, &other)),
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
        Json::String(text) if text.trim().is_empty() => Ok(None),
        Json::String(text) => match serde_json::from_str(&text) {
            Ok(tools @ Json::Array(_)) => Ok(Some(tools)),
            _ => Err("`tools` is a string that is not a JSON list".into()),
        },
        other => Err(format!("`tools` is {}; it must be a list of JSON schemas", json_type_name(&other))),
    }
}
