//! A message of a conversation.

use minijinja::Value;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

use crate::content_parts::{join_parts, text_of_part, text_part};
use crate::jinja;

/// Keys that say whether a message is trained: OpenAI's and Mistral's `weight` (0 or 1), and the
/// flags of other trainers. Templates do not see them.
const WEIGHT: &str = "weight";
const TRAIN_FLAGS: [&str; 3] = ["train", "training", "train_on_turn"];

/// Names of a message's reasoning. The first one that a message has fills in the others that
/// templates read, as in Transformers 5 (`reasoning_content` and `thinking`).
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message of a conversation, as it is passed to chat templates: `role` (`system`, `user`,
/// `assistant`, `tool`, ...), usually `content`, and other keys (`tool_calls`, `name`,
/// `reasoning_content`, ...).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Message {
    keys: Map<String, Json>,
    /// The content for templates if it is a list of text parts; `keys` has the joined text.
    #[serde(skip)]
    parts: Option<Vec<Json>>,
    /// Whether the row says that the message is trained or not.
    #[serde(skip)]
    is_trained: Option<bool>,
}

/// A part of a message that a template may print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Part {
    Content,
    Reasoning,
    ToolCalls,
}

impl Part {
    pub(crate) const ALL: [Self; 3] = [Self::Content, Self::Reasoning, Self::ToolCalls];

    /// The part in texts.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Content => "content",
            Self::Reasoning => "reasoning",
            Self::ToolCalls => "tool calls",
        }
    }
}

impl Message {
    /// Creates a message with only a role and a content.
    pub fn new(role: &str, content: &str) -> Self {
        let keys = [("role", role), ("content", content)];
        let keys = keys.map(|(key, value)| (key.to_owned(), Json::from(value)));
        Self { keys: keys.into_iter().collect(), parts: None, is_trained: None }
    }

    /// The role; empty if the message has none.
    pub fn role(&self) -> &str {
        self.text("role").unwrap_or_default()
    }

    /// The content; empty if the message has none.
    pub fn content(&self) -> &str {
        self.text("content").unwrap_or_default()
    }

    /// Whether templates get the content as a list of text parts.
    pub(crate) fn has_parts(&self) -> bool {
        self.parts.is_some()
    }

    /// The message with its content as one text.
    pub(crate) fn with_joined_content(&self) -> Self {
        Self { parts: None, ..self.clone() }
    }

    /// The message with its content as a list of one text part.
    pub(crate) fn with_one_part(&self) -> Self {
        let text = self.keys.get("content").and_then(Json::as_str);
        Self { parts: text.map(|text| vec![text_part(text)]), ..self.clone() }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.keys.get(key).and_then(Json::as_str)
    }

    /// Whether the message is a turn of the assistant that is trained.
    pub(crate) fn is_trained(&self) -> bool {
        self.role() == "assistant" && !self.is_excluded()
    }

    /// Whether the row says that the message is not trained.
    pub(crate) fn is_excluded(&self) -> bool {
        self.is_trained == Some(false)
    }

    /// Whether the row says that the message is trained.
    pub(crate) fn is_flagged(&self) -> bool {
        self.is_trained == Some(true)
    }

    /// Iterates over the keys that a template may read.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.keys().map(String::as_str)
    }

    /// Whether the message has something to print in this part.
    pub(crate) fn has(&self, part: Part) -> bool {
        match part {
            Part::Content => !self.content().trim().is_empty(),
            Part::Reasoning => {
                let in_content = self.content().rsplit_once("</think>").map(|(thinking, _)| thinking);
                let is_text = |text: &str| !text.trim().trim_start_matches("<think>").trim().is_empty();
                self.reasoning().or(in_content).is_some_and(is_text)
            }
            Part::ToolCalls => self.tool_calls().next().is_some(),
        }
    }

    fn reasoning(&self) -> Option<&str> {
        REASONING.iter().find_map(|key| self.text(key))
    }

    /// The tool calls.
    pub(crate) fn tool_calls(&self) -> impl Iterator<Item = &Json> {
        self.keys.get("tool_calls").and_then(Json::as_array).into_iter().flatten()
    }

    /// The number of tool calls with a name.
    pub(crate) fn named_calls(&self) -> usize {
        let names = self
            .tool_calls()
            .filter_map(|call| call.get("function").unwrap_or(call).get("name").and_then(Json::as_str));
        names.filter(|name| !name.trim().is_empty()).count()
    }

    /// The arguments of tool calls that are a text with a JSON object instead of the object.
    pub(crate) fn encoded_arguments(&self) -> impl Iterator<Item = &str> {
        let arguments = self
            .tool_calls()
            .filter_map(|call| call.get("function").unwrap_or(call).get("arguments").and_then(Json::as_str));
        arguments.filter(|text| text.trim_start().starts_with('{'))
    }

    /// The message for a template.
    pub(crate) fn value(&self) -> Value {
        let reasoning = REASONING.iter().find_map(|key| self.keys.get(*key));
        if reasoning.is_none() && self.parts.is_none() {
            return pairs(&self.keys);
        }
        let mut keys = Map::new();
        keys.extend(reasoning.map(|reasoning| ("thinking".to_owned(), reasoning.clone())));
        keys.extend(self.keys.clone());
        keys.extend(reasoning.map(|reasoning| ("reasoning_content".to_owned(), reasoning.clone())));
        if let Some(parts) = &self.parts {
            keys.insert("content".to_owned(), parts.clone().into());
        }
        pairs(&keys)
    }

    /// Appends the first of `marks()` to each text of the content that is not blank, before the
    /// white space at its end. The second one becomes a key of the part, if the content has parts.
    pub(crate) fn with_marked_texts(&self, mut marks: impl FnMut() -> (String, String)) -> Self {
        let mut marked = self.clone();
        let mut append = |text: &mut String| {
            let end = text.trim_end().len();
            let (mark, part_mark) = (end > 0).then(&mut marks)?;
            text.insert_str(end, &mark);
            Some(part_mark)
        };
        let Some(parts) = &mut marked.parts else {
            if let Some(Json::String(text)) = marked.keys.get_mut("content") {
                append(text);
            }
            return marked;
        };
        let mut joined = String::new();
        for part in parts {
            let Some(text) = text_of_part(part) else { continue };
            let part_mark = append(text);
            joined.push_str(text);
            if let (Some(mark), Some(keys)) = (part_mark, part.as_object_mut()) {
                keys.insert("mark".to_owned(), mark.into());
            }
        }
        marked.keys.insert("content".to_owned(), joined.into());
        marked
    }

    /// Appends marks to the texts of a message: `mark(part)` to each text of the part, before its
    /// white space at the end. Of the reasoning in a content, the text before `</think>` is marked.
    /// Of a content in parts, the last one with a text is marked. With `empty`, an empty content is
    /// only its mark.
    pub(crate) fn marked(&self, parts: &[Part], empty: bool, mark: impl Fn(Part) -> String) -> Self {
        let mut marked = self.clone();
        let mark = |part: Part, text: &mut String| {
            let end = text.trim_end().len();
            if end > 0 || (empty && part == Part::Content) {
                text.insert_str(end, &mark(part));
            }
        };
        for part in parts {
            match part {
                Part::Content => {
                    for text in marked.contents() {
                        if let Some((thinking, answer)) = text.rsplit_once("</think>") {
                            let (mut thinking, answer) = (thinking.to_owned(), answer.to_owned());
                            mark(Part::Reasoning, &mut thinking);
                            *text = format!("{thinking}</think>{answer}");
                        }
                        mark(Part::Content, text);
                    }
                }
                Part::Reasoning => {
                    for key in REASONING {
                        if let Some(Json::String(text)) = marked.keys.get_mut(key) {
                            mark(Part::Reasoning, text);
                        }
                    }
                }
                Part::ToolCalls => {
                    let calls = marked.keys.get_mut("tool_calls").and_then(Json::as_array_mut);
                    for call in calls.into_iter().flatten() {
                        let function = match call.get("function") {
                            Some(_) => call.get_mut("function"),
                            None => Some(call),
                        };
                        if let Some(Json::String(name)) = function.and_then(|it| it.get_mut("name")) {
                            mark(Part::ToolCalls, name);
                        }
                    }
                }
            }
        }
        marked
    }

    /// The text of the content, and its last part with a text.
    fn contents(&mut self) -> impl Iterator<Item = &mut String> {
        let joined = match self.keys.get_mut("content") {
            Some(Json::String(text)) => Some(text),
            _ => None,
        };
        let parts = self.parts.as_mut().map(|parts| {
            let is_filled = |part: &Json| !part["text"].as_str().unwrap_or_default().trim().is_empty();
            let last = parts.iter().rposition(is_filled);
            parts.get_mut(last.unwrap_or(0)).and_then(text_of_part)
        });
        joined.into_iter().chain(parts.flatten())
    }

    /// Returns the messages in a row's `field`, of the form `{"role", "content"}` or of ShareGPT's
    /// form `{"from", "value"}`.
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
        let Json::Object(mut keys) = value else {
            return Err(format!(
                " is {}; a message is an object with the strings `role` and `content`",
                json_type_name(&value)
            ));
        };
        // As in Transformers: a key with the value null is a missing key.
        keys.retain(|_, value| !value.is_null());
        if !keys.contains_key("role") && keys.contains_key("from") {
            from_sharegpt(&mut keys)?;
        }
        match keys.get("role") {
            Some(Json::String(_)) => {}
            Some(other) => return Err(format!(".role is {}; it must be a string", json_type_name(other))),
            None => return Err(" has no `role`".into()),
        }
        check_reasoning(&mut keys)?;
        let is_trained = take_flag(&mut keys)?;
        let has_calls = match keys.get("tool_calls") {
            None => false,
            Some(Json::Array(calls)) => !calls.is_empty(),
            Some(other) => {
                return Err(format!(".tool_calls is {}; it must be a list", json_type_name(other)));
            }
        };
        let mut parts = None;
        match keys.get_mut("content") {
            Some(Json::String(_)) => {}
            Some(Json::Array(items)) => {
                let mut items = std::mem::take(items);
                keys.insert("content".to_owned(), join_parts(&mut items)?.into());
                parts = Some(items).filter(|items| !items.is_empty());
            }
            Some(other) => {
                return Err(format!(
                    ".content is {}; it must be a string, or a list of text parts",
                    json_type_name(other)
                ));
            }
            None if has_calls => {}
            None => return Err(" has neither `content` nor `tool_calls`".into()),
        }
        Ok(Self { keys, parts, is_trained })
    }
}

fn pairs(keys: &Map<String, Json>) -> Value {
    Value::from_pairs(keys.iter().map(|(key, value)| (key.as_str(), jinja::value_of(value))))
}

/// Renames the keys and roles of ShareGPT.
fn from_sharegpt(keys: &mut Map<String, Json>) -> Result<(), String> {
    let role = match keys.shift_remove("from") {
        Some(Json::String(role)) => role,
        other => {
            let found = other.map_or("missing", |other| json_type_name(&other));
            return Err(format!(".from is {found}; it must be a string"));
        }
    };
    let role = match role.as_str() {
        "human" | "user" => "user",
        "gpt" | "chatgpt" | "bing" | "bard" | "bot" | "model" | "assistant" => "assistant",
        "system" => "system",
        "tool" | "observation" => "tool",
        other => {
            return Err(format!(
                ".from is {other:?}; supported: human, gpt, system, tool, user, assistant, chatgpt, bot, \
                 model, observation"
            ));
        }
    };
    let value = keys.shift_remove("value");
    keys.insert("role".to_owned(), role.into());
    if let (Some(value), false) = (value, keys.contains_key("content")) {
        keys.insert("content".to_owned(), value);
    }
    Ok(())
}

/// Checks that the names of the reasoning have one text. Blank ones are removed if another one has
/// a text.
fn check_reasoning(keys: &mut Map<String, Json>) -> Result<(), String> {
    let mut found: Option<(&str, String)> = None;
    for key in REASONING {
        let text = match keys.get(key) {
            None => continue,
            Some(Json::String(text)) => text.trim(),
            Some(other) => return Err(format!(".{key} is {}; it must be a string", json_type_name(other))),
        };
        match &found {
            _ if text.is_empty() => {}
            Some((first, other)) if other != text => {
                return Err(format!(" has `{first}` and `{key}` with different texts; remove one of them"));
            }
            _ => found = Some((key, text.to_owned())),
        }
    }
    if found.is_some() {
        keys.retain(|key, value| {
            let is_blank = value.as_str().is_some_and(|text| text.trim().is_empty());
            !(REASONING.contains(&key.as_str()) && is_blank)
        });
    }
    Ok(())
}

/// Removes the keys that say whether the message is trained.
fn take_flag(keys: &mut Map<String, Json>) -> Result<Option<bool>, String> {
    let mut flags = Vec::new();
    match keys.shift_remove(WEIGHT) {
        None => {}
        Some(Json::Number(weight)) if weight.as_f64() == Some(0.0) => flags.push((WEIGHT, false)),
        Some(Json::Number(weight)) if weight.as_f64() == Some(1.0) => flags.push((WEIGHT, true)),
        Some(other) => return Err(format!(".{WEIGHT} is {other}; it must be 0 or 1")),
    }
    for key in TRAIN_FLAGS {
        match keys.shift_remove(key) {
            None => {}
            Some(Json::Bool(flag)) => flags.push((key, flag)),
            Some(other) => return Err(format!(".{key} is {other}; it must be true or false")),
        }
    }
    match flags.iter().find(|(_, flag)| *flag != flags[0].1) {
        Some((other, _)) => Err(format!(" has `{}` and `{other}`, which contradict each other", flags[0].0)),
        None => Ok(flags.first().map(|(_, flag)| *flag)),
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
