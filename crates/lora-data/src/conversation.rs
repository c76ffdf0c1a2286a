//! The bytes of a rendered conversation that are trained.

use std::borrow::Cow;
use std::ops::Range;

use serde_json::Value as Json;

use crate::Message;
use crate::anchors::{Anchored, mark};
use crate::chat_template::{ChatTemplate, Rendered};
use crate::content_form::with_printed_contents;
use crate::message::Part;
use crate::row_notes::RowNotes;
use crate::turns::Turns;

/// A rendered conversation, and the byte ranges of its text that are trained.
pub(crate) struct Conversation {
    pub(crate) text: String,
    pub(crate) trained: Vec<Range<usize>>,
    /// If the template marks the trained text: the messages before the first one that may be
    /// trained, rendered with the generation prompt. It is empty if there are none.
    pub(crate) prompt: String,
    pub(crate) notes: RowNotes,
}

/// A rendered conversation of which not only the assistant's turns are trained.
pub(crate) struct WholeConversation {
    pub(crate) text: String,
    /// The messages that are not trained, rendered with the generation prompt; empty if there are
    /// none.
    pub(crate) prompt: String,
    pub(crate) notes: RowNotes,
}

/// Renders a conversation and finds the assistant's turns in its text, from message `from`. A turn
/// whose message says that it is not trained is left out.
///
/// If the template has `{% generation %}` markers, they mark the trained text. Otherwise the turn
/// of message `i` is the text that `render(messages[..=i])` adds to
/// `render(messages[..i], add_generation_prompt)`, up to and including its end-of-turn token (one
/// of `stop_texts`). White space after this token is never generated, so it is not trained. A
/// turn without such a token is trained to its end.
///
/// A template may render the messages before a turn, or the turn, differently when others follow:
/// without the reasoning of earlier turns, or with another generation prompt. The turn is then what
/// stands at its place in the whole conversation: marks in the texts of the messages tell which
/// text belongs to which message.
///
/// # Errors
/// The template fails; the turns cannot be found; or the template leaves out the tool calls of a
/// trained turn.
pub(crate) fn render_conversation(
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&Json>,
    from: usize,
    stop_texts: &[String],
) -> Result<Conversation, String> {
    let (messages, (Rendered { text, generated }, anchored)) = render_printed(template, messages, tools)?;
    let messages = messages.as_ref();
    let turns = Turns { template, messages, tools, stop_texts, text: &text, anchored };
    let is_trained = |i: usize| i >= from && messages[i].is_trained();
    let mut notes = turns.notes(is_trained)?;
    let mut prompt = String::new();
    let trained = if template.has_generation_markers() {
        if from > 0 {
            prompt = turns.render(from, true)?;
        }
        turns.marked_by_template(generated, from, is_trained)?
    } else {
        let found = turns.find_all((0..messages.len()).filter(|i| is_trained(*i)).collect())?;
        notes.changed_turns = found.iter().filter(|turn| turn.is_changed).count();
        found.into_iter().map(|turn| turn.range).collect()
    };
    Ok(Conversation { text, trained, prompt, notes })
}

/// Renders a conversation of which everything from message `from` on is trained. The assistant's
/// turns are not searched, so any template that renders the conversation is supported.
///
/// # Errors
/// A message that is trained has a weight of 0; the template fails, or leaves out the content or
/// the tool calls of an assistant's turn that is trained.
pub(crate) fn render_whole_conversation(
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&Json>,
    from: usize,
) -> Result<WholeConversation, String> {
    if let Some(i) = (from..messages.len()).find(|i| messages[*i].is_excluded()) {
        return Err(format!(
            "messages[{i}] is not to be trained (weight 0, or a false flag), but with \
             data.assistant_only_loss: false all messages are trained; set data.assistant_only_loss: true, \
             or remove the key from the message"
        ));
    }
    let (messages, (Rendered { text, .. }, anchored)) = render_printed(template, messages, tools)?;
    let messages = messages.as_ref();
    let turns = Turns { template, messages, tools, stop_texts: &[], text: &text, anchored };
    let notes = turns.notes(|i| i >= from && messages[i].is_trained())?;
    let prompt = if from == 0 { String::new() } else { turns.render(from, true)? };
    Ok(WholeConversation { text, prompt, notes })
}

/// Renders the messages, with each content in a form that the template prints. Returns the messages
/// in this form too.
fn render_printed<'a>(
    template: &ChatTemplate,
    messages: &'a [Message],
    tools: Option<&Json>,
) -> Result<(Cow<'a, [Message]>, AnchoredRendering), String> {
    let mut given = Cow::Borrowed(messages);
    let mut rendered = render_with_anchors(template, messages, tools);
    if !prints_all_contents(messages, &rendered) {
        let messages = with_printed_contents(template, messages, tools, false);
        if given != messages {
            rendered = render_with_anchors(template, &messages, tools);
            given = Cow::Owned(messages);
        }
    }
    Ok((given, rendered?))
}

type AnchoredRendering = (Rendered, Option<(Anchored, &'static [Part])>);

fn render_with_anchors(
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&Json>,
) -> Result<AnchoredRendering, String> {
    let rendered = template.render(messages, tools, false)?;
    let anchored = anchored(template, messages, tools, &rendered.text);
    Ok((rendered, anchored))
}

/// Whether it is certain that the template prints the contents of all messages.
fn prints_all_contents(messages: &[Message], rendered: &Result<AnchoredRendering, String>) -> bool {
    let Ok((_, Some((anchored, _)))) = rendered else { return false };
    messages.iter().enumerate().all(|(i, message)| {
        let is_printed = !message.has(Part::Content) || anchored.anchor((i, Part::Content)).is_some();
        !message.has_parts() && is_printed
    })
}

/// Renders the messages with marks in all parts, or only in their contents. Returns the marks and
/// the parts; `None` if the marks change the rendering.
fn anchored(
    template: &ChatTemplate,
    messages: &[Message],
    tools: Option<&Json>,
    text: &str,
) -> Option<(Anchored, &'static [Part])> {
    let has_empty = messages.iter().any(|message| message.content().trim().is_empty());
    let attempts = [(&Part::ALL[..], true), (&Part::ALL[..], false), (&[Part::Content][..], false)];
    attempts.into_iter().filter(|(_, empty)| has_empty || !empty).find_map(|(parts, empty)| {
        let rendered = template.render(&mark(messages, parts, empty), tools, false).ok()?;
        let anchored = Anchored::new(&rendered.text);
        (anchored.text == text).then_some((anchored, parts))
    })
}
