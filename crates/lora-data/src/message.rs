//! A message of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

/// A message of a conversation, as it is passed to chat templates.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, ...
    pub role: String,
    /// The text. It is empty if an assistant's message has only tool calls.
    pub content: String,
    /// Other keys (`tool_calls`, `name`, `reasoning_content`, ...). They are passed to the template
    /// unchanged.
    #[serde(flatten)]
    pub extra: Map<String, Json>,
}

impl Message {
    /// Creates a message with only a role and a content.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
    }

    /// Returns the messages in a row's `field`.
    ///
    /// # Errors
    /// The invalid message or key, why it is invalid, and what would be right.
    pub(crate) fn list_from_json(field: &str, value: Json) -> Result<Vec<Self>, String> {
        let Json::Array(items) = value else {
            return Err(format!("`{field}` is {}; it must be a list of messages", json_type_name(&value)));
        };
        if items.is_empty() {
            return Err(format!("`{field}` is an empty list; a conversation needs at least one message"));
        }
        items
            .into_iter()
            .enumerate()
            .map(|(i, item)| Self::from_json(item).map_err(|message| format!("{field}[{i}]{message}")))
            .collect()
    }

    fn from_json(value: Json) -> Result<Self, String> {
        let Json::Object(mut extra) = value else {
            return Err(format!(
                " is {}; a message is an object with the strings `role` and `content`",
                json_type_name(&value)
            ));
        };
        let role = match extra.shift_remove("role") {
            Some(Json::String(role)) => role,
            Some(other) => return Err(format!(".role is {}; it must be a string", json_type_name(&other))),
            None if extra.contains_key("from") => {
                return Err(" has `from` and `value`; rename them to `role` and `content`".into());
            }
            None => return Err(" has no `role`".into()),
        };
        let content = match extra.shift_remove("content") {
            Some(Json::String(content)) => content,
            None | Some(Json::Null) if extra.contains_key("tool_calls") => String::new(),
            None => return Err(" has no `content`".into()),
            Some(other) => {
                return Err(format!(".content is {}; it must be a string", json_type_name(&other)));
            }
        };
        Ok(Self { role, content, extra })
    }
}

/// Returns the type of a JSON value, with its article.
pub(crate) fn json_type_name(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}
