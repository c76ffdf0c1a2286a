//! The contents of dataset rows, by their format.

use lora_spec::{DataSpec, RowFormat, TEMPLATE_VARIABLES};
use serde_json::{Map, Value as Json};

use crate::Message;
use crate::message::json_type_name;

/// The contents of a row.
pub(crate) enum RowContent {
    /// A conversation. The assistant's turns from message `from` are trained.
    Chat {
        messages: Vec<Message>,
        tools: Option<Json>,
        /// Variables of the chat template, besides those of the job.
        variables: Map<String, Json>,
        from: usize,
    },
    /// A text. It is trained from byte `from`, and so is the end-of-sequence token after it.
    Plain { text: String, from: usize },
}

/// The contents of a row, and what of the job's settings they took.
pub(crate) struct TakenRow {
    pub(crate) format: RowFormat,
    pub(crate) content: RowContent,
    /// Keys of `data.columns` whose column the row has.
    pub(crate) renamed: Vec<String>,
    /// Whether the conversation begins with `data.system_prompt`.
    pub(crate) has_system_prompt: bool,
}

/// Recognizes the format of a row, or takes the job's, and removes its contents from `row`. The
/// keys that remain have no effect.
///
/// # Errors
/// The row is of no format, a key of the format is missing, or a value has the wrong type.
pub(crate) fn take_row(data: &DataSpec, row: &mut Map<String, Json>) -> Result<TakenRow, String> {
    let renamed = rename_columns(data, row);
    let format = match data.format {
        None => recognize(data, row)?,
        Some(format) => {
            let missing = needed_keys(format).iter().find(|key| row.get(**key).is_none_or(Json::is_null));
            if let Some(missing) = missing {
                return Err(format!(
                    "data.format {} {}",
                    serde_json::to_value(format).unwrap_or_default().as_str().unwrap_or_default(),
                    needs(data, row, missing)
                ));
            }
            format
        }
    };
    let mut content = take_content(format, data, row)?;
    let mut has_system_prompt = false;
    if let (RowContent::Chat { messages, from, .. }, Some(system)) = (&mut content, &data.system_prompt)
        && !messages.first().is_some_and(|message| ["system", "developer"].contains(&message.role()))
    {
        messages.insert(0, Message::new("system", system));
        *from += usize::from(*from > 0);
        has_system_prompt = true;
    }
    if let RowContent::Chat { variables, .. } = &mut content {
        *variables = take_variables(row)?;
    }
    Ok(TakenRow { format, content, renamed, has_system_prompt })
}

/// Removes the row's variables of the chat template, which are TRL's `chat_template_kwargs`.
fn take_variables(row: &mut Map<String, Json>) -> Result<Map<String, Json>, String> {
    match take(row, "chat_template_kwargs") {
        Json::Null => Ok(Map::new()),
        Json::Object(variables) => match variables.keys().find(|name| TEMPLATE_VARIABLES.contains(&&***name))
        {
            Some(name) => Err(format!("`chat_template_kwargs` has `{name}`, which the row sets itself")),
            None => Ok(variables),
        },
        other => Err(format!("`chat_template_kwargs` is {}; it must be an object", json_type_name(&other))),
    }
}

/// Which key a row lacks, by its name in the row, and which keys the row has.
fn needs(data: &DataSpec, row: &Map<String, Json>, key: &str) -> String {
    let of_file = |key| data.columns.get(key).unwrap_or(key).as_str();
    let keys: Vec<&str> = row.keys().map(of_file).collect();
    let keys = if keys.is_empty() { "none".into() } else { format!("`{}`", keys.join("`, `")) };
    match data.columns.get(key) {
        None => format!("needs `{key}`; the row's keys are {keys}"),
        Some(column) => format!("needs `{column}` (data.columns.{key}); the row's keys are {keys}"),
    }
}

/// Gives the columns of `data.columns` the names of the formats' keys, and returns those that the
/// row has. A key of a row that has such a name already, but not the meaning, has no effect.
fn rename_columns(data: &DataSpec, row: &mut Map<String, Json>) -> Vec<String> {
    let take = |(key, column): (&String, &String)| Some((key.clone(), row.shift_remove(column)?));
    let renamed: Vec<(String, Json)> = data.columns.iter().filter_map(take).collect();
    let mut keys = Vec::with_capacity(renamed.len());
    for (key, value) in renamed {
        if let Some(other) = row.insert(key.clone(), value) {
            row.insert(format!("{key} (not the column of data.columns)"), other);
        }
        keys.push(key);
    }
    keys
}

/// The formats in the order of preference for a row with the keys of several.
const ALL: [RowFormat; 6] = [
    RowFormat::Messages,
    RowFormat::Conversations,
    RowFormat::PromptCompletion,
    RowFormat::AlpacaChat,
    RowFormat::Alpaca,
    RowFormat::Text,
];

/// Returns the keys that a row of this format must have.
fn needed_keys(format: RowFormat) -> &'static [&'static str] {
    match format {
        RowFormat::Messages => &["messages"],
        RowFormat::Conversations => &["conversations"],
        RowFormat::PromptCompletion => &["prompt", "completion"],
        RowFormat::Text => &["text"],
        RowFormat::Alpaca | RowFormat::AlpacaChat => &["instruction", "output"],
    }
}

/// Recognizes the format of a row by its keys. A key with the value null counts as missing. If
/// a row has the keys of several formats, the others have no effect.
///
/// # Errors
/// The row is of no format, or a key of the format is missing.
fn recognize(data: &DataSpec, row: &Map<String, Json>) -> Result<RowFormat, String> {
    let has = |key: &&str| row.get(*key).is_some_and(|value| !value.is_null());
    let is_chat = ["system", "history"].iter().any(|key| row.get(*key).is_some_and(is_filled));
    let possible = ALL.into_iter().filter(|format| *format != RowFormat::AlpacaChat || is_chat);
    let complete = possible.clone().find(|format| needed_keys(*format).iter().all(has));
    if let Some(format) = complete {
        return Ok(format);
    }
    if ["chosen", "rejected"].iter().all(has) {
        return Err("a row of preferences (`chosen`, `rejected`), which are not trained; for supervised \
                    training rename `chosen` to `completion`, or to `messages` if it is a whole \
                    conversation"
            .into());
    }
    let partial = possible.clone().find(|format| needed_keys(*format).iter().any(has));
    if let Some(format) = partial
        && let Some(missing) = needed_keys(format).iter().find(|key| !has(key))
    {
        return Err(format!("a row of the format {format} {}", needs(data, row, missing)));
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
fn take_content(
    format: RowFormat,
    data: &DataSpec,
    row: &mut Map<String, Json>,
) -> Result<RowContent, String> {
    match format {
        RowFormat::Messages => {
            let messages = Message::list_from_json("messages", take(row, "messages"))?;
            Ok(RowContent::Chat { messages, tools: take_tools(row)?, variables: Map::new(), from: 0 })
        }
        RowFormat::Conversations => {
            let mut messages = Message::list_from_json("conversations", take(row, "conversations"))?;
            add_system(&mut messages, take_text(row, "system")?)?;
            Ok(RowContent::Chat { messages, tools: take_tools(row)?, variables: Map::new(), from: 0 })
        }
        RowFormat::PromptCompletion => match (take(row, "prompt"), take(row, "completion")) {
            (Json::String(prompt), Json::String(completion)) => {
                let from = if data.completion_only_loss { prompt.len() } else { 0 };
                Ok(RowContent::Plain { text: format!("{prompt}{completion}"), from })
            }
            (prompt @ Json::Array(_), completion @ Json::Array(_)) => {
                let mut messages = Message::list_from_json("prompt", prompt)?;
                let from = if data.completion_only_loss { messages.len() } else { 0 };
                messages.extend(Message::list_from_json("completion", completion)?);
                Ok(RowContent::Chat { messages, tools: take_tools(row)?, variables: Map::new(), from })
            }
            (prompt, completion) => Err(format!(
                "`prompt` is {} and `completion` is {}; both must be strings, or both lists of messages",
                json_type_name(&prompt),
                json_type_name(&completion)
            )),
        },
        RowFormat::Text => Ok(RowContent::Plain { text: take_string(row, "text")?, from: 0 }),
        RowFormat::Alpaca => {
            let instruction = take_string(row, "instruction")?;
            let input = take_text(row, "input")?;
            let prompt = alpaca_prompt(&instruction, &input);
            let output = take_string(row, "output")?;
            Ok(RowContent::Plain { text: format!("{prompt}{output}"), from: prompt.len() })
        }
        RowFormat::AlpacaChat => {
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
                    return Err(format!("history[{i}] must be a pair of strings: instruction and output"));
                };
                messages.extend([Message::new("user", question), Message::new("assistant", answer)]);
            }
            let instruction = take_string(row, "instruction")?;
            let input = take_text(row, "input")?;
            let question = if input.is_empty() { instruction } else { format!("{instruction}\n{input}") };
            let output = take_string(row, "output")?;
            messages.extend([Message::new("user", &question), Message::new("assistant", &output)]);
            Ok(RowContent::Chat { messages, tools: None, variables: Map::new(), from: 0 })
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
