//! Whether a chat template gets the contents of messages as texts or as lists of parts.
//!
//! Templates of text models print `message.content`, and a list as its `repr` or as JSON, or they
//! fail. Templates of vision models print the parts of a list, `{% for part in message.content %}`,
//! and nothing of a text. A content is passed as the row has it if the template prints all its
//! texts, and otherwise in the form that it prints.

use std::collections::BTreeSet;

use serde_json::Value as Json;

use crate::Message;
use crate::anchors::{Anchored, mark_of};
use crate::chat_template::ChatTemplate;
use crate::message::Part;

/// Returns the messages with each content in a form that the template prints. A content that it
/// prints in neither form is a text.
pub(crate) fn with_printed_contents(
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&Json>,
    add_generation_prompt: bool,
) -> Vec<Message> {
    let unprinted = |messages: &[Message]| {
        let (marked, owners) = mark_texts(messages);
        let rendered = template.render(&marked, tools, add_generation_prompt).ok()?;
        let anchored = Anchored::new(&rendered.text);
        let is_found = |mark: usize| anchored.anchor((mark, Part::Content)).is_some();
        // The mark of a part is found if the whole part is printed, as JSON.
        let is_printed = |text: usize| is_found(2 * text) && !is_found(2 * text + 1);
        let unprinted = (0..owners.len()).filter(|text| !is_printed(*text)).map(|text| owners[text]);
        Some(unprinted.collect::<BTreeSet<_>>())
    };
    let mut messages = messages.to_vec();
    let mut missing = unprinted(&messages).unwrap_or_else(|| (0..messages.len()).collect());
    for form in [Message::with_joined_content, Message::with_one_part] {
        if missing.is_empty() {
            break;
        }
        let candidate = with_form(&messages, &missing, form);
        if candidate != messages
            && let Some(still_missing) = unprinted(&candidate)
            && still_missing.len() < missing.len()
        {
            (messages, missing) = (candidate, still_missing);
        }
    }
    with_form(&messages, &missing, Message::with_joined_content)
}

/// Returns the messages, those in `which` with their contents in another form, and so those with an
/// empty content if all others are in this form.
fn with_form(messages: &[Message], which: &BTreeSet<usize>, form: fn(&Message) -> Message) -> Vec<Message> {
    let change = |(i, message): (usize, &Message)| match which.contains(&i) {
        true => form(message),
        false => message.clone(),
    };
    let messages: Vec<Message> = messages.iter().enumerate().map(change).collect();
    let is_empty = |message: &Message| message.content().trim().is_empty();
    let is_uniform = messages.iter().all(|message| is_empty(message) || message.has_parts());
    if !is_uniform || !messages.iter().any(Message::has_parts) {
        return messages;
    }
    let with_parts = |message: Message| if is_empty(&message) { message.with_one_part() } else { message };
    messages.into_iter().map(with_parts).collect()
}

/// Returns the messages with a mark in each text of their contents and one in its part, and the
/// messages of the texts.
fn mark_texts(messages: &[Message]) -> (Vec<Message>, Vec<usize>) {
    let mut owners = Vec::new();
    let mut marked = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        marked.push(message.with_marked_texts(|| {
            owners.push(i);
            let text = owners.len() - 1;
            (mark_of((2 * text, Part::Content)), mark_of((2 * text + 1, Part::Content)))
        }));
    }
    (marked, owners)
}
