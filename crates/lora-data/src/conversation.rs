//! The bytes of a rendered conversation that are trained.

use std::ops::Range;

use serde_json::Value as Json;

use crate::Message;
use crate::chat_template::{ChatTemplate, Rendered};

/// A rendered conversation, and the byte ranges of its text that are trained.
pub(crate) struct Conversation {
    pub(crate) text: String,
    pub(crate) trained: Vec<Range<usize>>,
}

/// Renders a conversation and finds the assistant's turns in its text, from message `from`.
///
/// If the template has `{% generation %}` markers, they mark the trained text. Otherwise the turn
/// of message `i` is the text that `render(messages[..=i])` adds to
/// `render(messages[..i], add_generation_prompt)`, up to and including its end-of-turn token (one
/// of `stop_texts`). White space after this token is never generated, so it is not trained. A
/// turn without such a token is trained to its end.
///
/// # Errors
/// The template fails, or a rendering is not a prefix of the next one, so that the turns cannot be
/// found.
pub(crate) fn render_conversation(
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&Json>,
    from: usize,
    stop_texts: &[String],
) -> Result<Conversation, String> {
    let Rendered { text, generated } = template.render(messages, tools, false)?;
    let prompt_end = |i: usize| -> Result<usize, String> {
        let prompt = template.render(&messages[..i], tools, true)?.text;
        if text.starts_with(&prompt) { Ok(prompt.len()) } else { Err(prefix_error(i, "before")) }
    };
    if template.has_generation_markers() {
        let start = if from == 0 { 0 } else { prompt_end(from)? };
        let trained = generated.into_iter().map(|range| range.start.max(start)..range.end);
        let trained = trained.filter(|range| !range.is_empty()).collect();
        return Ok(Conversation { text, trained });
    }
    let mut trained = Vec::new();
    for (i, _) in messages.iter().enumerate().skip(from).filter(|(_, message)| message.role == "assistant") {
        let start = prompt_end(i)?;
        let end = if i + 1 == messages.len() {
            text.len()
        } else {
            let turn = template.render(&messages[..=i], tools, false)?.text;
            if !text.starts_with(&turn) || turn.len() < start {
                return Err(prefix_error(i, "up to"));
            }
            turn.len()
        };
        let turn = text[start..end].trim_end();
        let ends_itself = stop_texts.iter().any(|stop| turn.ends_with(stop.as_str()));
        trained.push(start..if ends_itself { start + turn.len() } else { end });
    }
    Ok(Conversation { text, trained })
}

fn prefix_error(i: usize, which: &str) -> String {
    format!(
        "the assistant's turn (messages[{i}]) cannot be found in the rendered conversation: the chat \
         template renders the messages {which} it differently when others follow, for example without \
         the reasoning of earlier turns; mark the trained text with {{% generation %}} .. \
         {{% endgeneration %}} in the base's chat template, or write a row that ends with this turn"
    )
}
