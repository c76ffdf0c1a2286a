//! The chat template of a base, rendered as in Transformers' `apply_chat_template`.

use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{self, AssertUnwindSafe};

use minijinja::{Environment, Value, context};
use serde_json::{Map, Value as Json};

use crate::Message;
use crate::jinja::{self, GENERATED_END, GENERATED_START};

/// A compiled chat template. The special tokens of the base are variables.
#[derive(Clone)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    has_generation_markers: bool,
    /// The variable `documents`, which Transformers defines as None if the caller passes none.
    documents: Value,
}

/// A rendered conversation.
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// Byte ranges of `text` that the template wrote between `{% generation %}` and
    /// `{% endgeneration %}`.
    pub(crate) generated: Vec<Range<usize>>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles `source`.
    ///
    /// # Errors
    /// The message of the template engine.
    pub(crate) fn new(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self, String> {
        jinja::check_method_names(source)?;
        jinja::check_conditions(source)?;
        jinja::check_safe_texts(source)?;
        let (rewritten, has_generation_markers) = jinja::rewrite(source);
        let mut environment = jinja::environment()?;
        for (name, token) in special_tokens {
            environment.add_global(name.clone(), token.clone());
        }
        environment.add_template_owned(NAME, rewritten).map_err(|err| err.to_string())?;
        let documents = Value::from(());
        Ok(Self { environment, source: source.to_owned(), has_generation_markers, documents })
    }

    /// Sets variables of the template, as keyword arguments of `apply_chat_template` do.
    pub(crate) fn set_variables(&mut self, variables: &Map<String, Json>) {
        for (name, value) in variables {
            if name == "documents" {
                self.documents = jinja::value_of(value);
            }
            self.environment.add_global(name.clone(), jinja::value_of(value));
        }
    }

    /// Returns whether the template marks the trained text with `{% generation %}`.
    pub(crate) fn has_generation_markers(&self) -> bool {
        self.has_generation_markers
    }

    /// Returns whether the template may read the key `key` of a message: its source has the name.
    pub(crate) fn mentions(&self, key: &str) -> bool {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        self.source.match_indices(key).any(|(at, _)| {
            !self.source[..at].ends_with(is_part) && !self.source[at + key.len()..].starts_with(is_part)
        })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// The message of the template (`raise_exception`) or of the template engine; a noncharacter in
    /// a message, or nested `{% generation %}` blocks.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<Rendered, String> {
        if self.has_generation_markers && has_noncharacters(messages, tools) {
            return Err("a message contains the noncharacter U+FDD0 or U+FDD1; remove it".into());
        }
        // Transformers defines `tools` as None if the caller passes none.
        let context = context! {
            messages => messages.iter().map(Message::value).collect::<Value>(),
            tools => tools.map_or(Value::from(()), jinja::value_of),
            documents => self.documents.clone(),
            add_generation_prompt,
        };
        let render = || self.environment.get_template(NAME).and_then(|template| template.render(context));
        // The template engine panics at a `break` that leaves some kinds of blocks.
        let text = panic::catch_unwind(AssertUnwindSafe(render))
            .map_err(|_| "the chat template fails: the template engine does not support it".to_owned())?
            .map_err(|err| format!("the chat template fails: {err}"))?;
        if self.has_generation_markers {
            strip_marks(&text)
        } else {
            Ok(Rendered { text, generated: Vec::new() })
        }
    }
}

fn strip_marks(marked: &str) -> Result<Rendered, String> {
    let mut text = String::with_capacity(marked.len());
    let mut generated = Vec::new();
    let mut start = None;
    for c in marked.chars() {
        match (c, start) {
            (GENERATED_START, None) => start = Some(text.len()),
            (GENERATED_END, Some(begin)) => {
                generated.push(begin..text.len());
                start = None;
            }
            (GENERATED_START | GENERATED_END, _) => {
                return Err("the chat template nests {% generation %} blocks".into());
            }
            (c, _) => text.push(c),
        }
    }
    Ok(Rendered { text, generated })
}

fn has_noncharacters(messages: &[Message], tools: Option<&Json>) -> bool {
    let json = serde_json::to_string(&(messages, tools)).unwrap_or_default();
    json.contains([GENERATED_START, GENERATED_END])
}
