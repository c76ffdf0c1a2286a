//! Finds the assistant's turns in a rendered conversation.

use std::ops::Range;

use serde_json::Value as Json;

use crate::Message;
use crate::anchors::{Anchored, mark};
use crate::chat_template::ChatTemplate;
use crate::message::Part;
use crate::row_notes::RowNotes;
use crate::surroundings::Surroundings;

/// The number of turns of a conversation from which on not all of them are found by rendering the
/// messages up to them.
const MAX_RENDERED_TURNS: usize = 32;

/// The number of turns at the end of a longer conversation that are always found so.
const LAST_RENDERED_TURNS: usize = 4;

/// A conversation whose assistant's turns are searched.
pub(crate) struct Turns<'a> {
    pub(crate) template: &'a ChatTemplate,
    pub(crate) messages: &'a [Message],
    pub(crate) tools: Option<&'a Json>,
    pub(crate) stop_texts: &'a [String],
    pub(crate) text: &'a str,
    /// Where these parts of the messages are in `text`, if that can be told.
    pub(crate) anchored: Option<(Anchored, &'static [Part])>,
}

/// A turn in the rendered conversation.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Turn {
    /// The trained bytes.
    pub(crate) range: Range<usize>,
    /// Whether the turn would be rendered otherwise if no messages followed.
    pub(crate) is_changed: bool,
}

impl Turns<'_> {
    /// Finds the turns of these messages. To find one, the messages up to it are rendered, so of
    /// a long conversation most turns are found by what surrounds turns of the same shape.
    pub(crate) fn find_all(&self, turns: Vec<usize>) -> Result<Vec<Turn>, String> {
        let anchored = self.anchored.as_ref().filter(|_| turns.len() > MAX_RENDERED_TURNS);
        let mut surroundings = anchored.map(|(anchored, _)| Surroundings::new(self.messages, anchored));
        let last = turns.len().saturating_sub(LAST_RENDERED_TURNS);
        let find = |(place, i): (usize, usize)| {
            let known = surroundings.as_ref().filter(|_| place < last).and_then(|it| it.find(i));
            if let Some(turn) = known {
                return Ok(turn);
            }
            let turn = self.find(i)?;
            if let Some(surroundings) = &mut surroundings {
                surroundings.learn(i, &turn);
            }
            Ok(turn)
        };
        turns.into_iter().enumerate().map(find).collect()
    }

    /// Finds the turn of the assistant's message `i`.
    fn find(&self, i: usize) -> Result<Turn, String> {
        let start = self.start(i)?;
        let (end, is_changed) = self.end(i, start)?;
        if end < start {
            return Err(self.not_found(i));
        }
        if self.anchored.as_ref().is_some_and(|(anchored, _)| anchored.is_between(i, start, end)) {
            return Err(format!(
                "the chat template renders other messages within the assistant's turn (messages[{i}]); \
                 mark the trained text with {{% generation %}} .. {{% endgeneration %}} in the base's chat \
                 template"
            ));
        }
        let turn = self.text[start..end].trim_end();
        let ends_itself = self.stop_texts.iter().any(|stop| turn.ends_with(stop.as_str()));
        let range = start..if ends_itself { start + turn.len() } else { end };
        Ok(Turn { range, is_changed })
    }

    pub(crate) fn render(&self, count: usize, prompt: bool) -> Result<String, String> {
        Ok(self.template.render(&self.messages[..count], self.tools, prompt)?.text)
    }

    fn render_marked(&self, count: usize, prompt: bool) -> Result<Anchored, String> {
        let marked = mark(&self.messages[..count], &Part::ALL, false);
        Ok(Anchored::new(&self.template.render(&marked, self.tools, prompt)?.text))
    }

    /// The first byte that the model generates.
    fn start(&self, i: usize) -> Result<usize, String> {
        if let Ok(prompt) = self.render(i, true)
            && self.text.starts_with(&prompt)
        {
            return Ok(prompt.len());
        }
        self.moved_start(i).ok_or_else(|| self.not_found(i))
    }

    /// The first byte that the model generates, if the text before it is not the prompt. The text
    /// after the nearest mark of an earlier message is compared with the same text in the prompt.
    fn moved_start(&self, i: usize) -> Option<usize> {
        let (anchored, _) = self.anchored.as_ref()?;
        let [(_, first), _] = anchored.of_message(i)?;
        let before = anchored.before(i, first);
        let begin = before.map_or(0, |(_, at)| at);
        let between = &self.text[begin..first];
        let header = self.header();
        let aligned = before.and_then(|(place, _)| {
            let prompt = self.render_marked(i, true).ok()?;
            Some(prompt.text[prompt.anchor(place)?..].to_owned())
        });
        if let Some(expected) = aligned {
            let common = common_prefix(&expected, between);
            if common == expected.len() {
                return Some(begin + common);
            }
            // The prompt has more than the turn's header, such as a tag that begins its reasoning.
            let common = before_open_tag(&expected, common);
            let rest = &expected[common..];
            let closing = header.as_ref().and_then(|header| expected.strip_suffix(header.as_str()));
            if closing.is_some_and(|closing| common > closing.len())
                && (rest.starts_with(['<', '[']) || rest.trim().is_empty())
            {
                return Some(begin + common);
            }
        }
        // Nothing comes before, or the prompt is another one: the header alone is found, or the
        // content if turns have no header.
        let header = header?;
        if header.is_empty() {
            let content = self.messages[i].content().trim();
            return between.ends_with(content).then_some(first - content.len());
        }
        let headers = std::iter::successors(Some(header.as_str()), |header| {
            header.rfind('<').filter(|at| *at > 0).map(|at| &header[..at])
        });
        let mut headers = headers.flat_map(|header| [header, header.trim_start()]);
        headers.find_map(|header| between.rfind(header).map(|at| begin + at + header.len()))
    }

    /// What the generation prompt adds to a conversation.
    fn header(&self) -> Option<String> {
        let question = [Message::new("user", "?")];
        let render = |prompt| Some(self.template.render(&question, None, prompt).ok()?.text);
        let (prompt, closed) = (render(true)?, render(false)?);
        let common = common_prefix(&prompt, &closed);
        // Without a prompt, a template may end a conversation otherwise.
        let common = if common == closed.len() { common } else { before_open_tag(&prompt, common) };
        Some(prompt[common..].to_owned())
    }

    /// The end of the turn of message `i`, which begins at `start`, and whether the turn would be
    /// rendered otherwise if no messages followed.
    fn end(&self, i: usize, start: usize) -> Result<(usize, bool), String> {
        if i + 1 == self.messages.len() {
            return Ok((self.cut(i, self.text.len()), false));
        }
        if let Ok(turn) = self.render(i + 1, false)
            && self.text.starts_with(&turn)
            && turn.len() >= start
        {
            // A template may write the end of a turn only when another one follows.
            let next = &self.text[turn.len()..];
            let stop = self.stop_texts.iter().filter(|stop| !stop.is_empty() && next.starts_with(*stop));
            let is_ended = self.stop_texts.iter().any(|stop| turn.trim_end().ends_with(stop.as_str()));
            let stop = stop.map(String::len).max().filter(|_| !is_ended).unwrap_or(0);
            return Ok((self.cut(i, turn.len() + stop), false));
        }
        let end = self.moved_end(i).filter(|end| *end > start);
        end.map(|end| (end, true)).ok_or_else(|| self.not_found(i))
    }

    /// The end of the turn's first end-of-turn token after its texts, if it is before `end`: a
    /// template may write the beginning of another turn.
    fn cut(&self, i: usize, end: usize) -> usize {
        let marks = self.anchored.as_ref().and_then(|(anchored, _)| anchored.of_message(i));
        let stop = match marks {
            // Of tool calls the names are marked, and the arguments follow.
            Some([_, ((_, part), at)]) if part != Part::ToolCalls && at <= end => {
                self.first_stop(&self.text[at..end]).map(|stop| at + stop)
            }
            _ => None,
        };
        stop.unwrap_or(end)
    }

    /// The end of a turn that is rendered differently when others follow: the text after its last
    /// mark is compared with the same text where no message follows.
    fn moved_end(&self, i: usize) -> Option<usize> {
        let (anchored, _) = self.anchored.as_ref()?;
        let [_, (place, last)] = anchored.of_message(i)?;
        let bound = anchored.after(i, last).unwrap_or(self.text.len());
        let after = &self.text[last..bound];
        if let Ok(alone) = self.render_marked(i + 1, false)
            && let Some(at) = alone.anchor(place)
        {
            let expected = &alone.text[at..];
            let common = common_prefix(expected, after);
            if common == expected.len() {
                return Some(last + common);
            }
            if let Some(stop) = self.first_stop(&after[..common]).filter(|_| place.1 != Part::ToolCalls) {
                return Some(last + stop);
            }
            // The last turn of a conversation ends otherwise than earlier ones.
            let common = before_open_tag(expected, common);
            if after[..common].trim().is_empty()
                && let Some(closing) = first_tag(&after[common..])
                && self.closes_another(anchored, i, closing)
                && !self.opens_next(i, &after[common + closing.len()..])
            {
                return Some(last + common + closing.len());
            }
            let rest = &expected[common..];
            if first_tag(rest).is_some() || rest.trim().is_empty() {
                return Some(last + common);
            }
        }
        self.first_stop(after).filter(|_| place.1 != Part::ToolCalls).map(|stop| last + stop)
    }

    /// Whether a text begins with the next message's content, so that what is before it is a
    /// header.
    fn opens_next(&self, i: usize, text: &str) -> bool {
        let next = self.messages.get(i + 1).map(|next| next.content().trim());
        next.is_some_and(|next| !next.is_empty() && text.trim_start().starts_with(next))
    }

    /// Whether another message ends with `closing`.
    fn closes_another(&self, anchored: &Anchored, i: usize, closing: &str) -> bool {
        let others = (0..self.messages.len()).filter(|other| *other != i);
        let mut ends = others.filter_map(|other| anchored.of_message(other));
        ends.any(|[_, (_, at)]| self.text[at..].trim_start().starts_with(closing))
    }

    /// The end of the first end-of-turn token in a text.
    fn first_stop(&self, text: &str) -> Option<usize> {
        let stops = self.stop_texts.iter().filter(|stop| !stop.is_empty());
        stops.filter_map(|stop| Some(text.find(stop.as_str())? + stop.len())).min()
    }

    /// The text that the template marks with `{% generation %}` in the turns that are trained.
    pub(crate) fn marked_by_template(
        &self,
        generated: Vec<Range<usize>>,
        from: usize,
        is_trained: impl Fn(usize) -> bool,
    ) -> Result<Vec<Range<usize>>, String> {
        let assistant = |i: &usize| self.messages[*i].role() == "assistant";
        let all_trained = (0..self.messages.len()).filter(assistant).all(&is_trained);
        let generated = generated.into_iter().filter(|range| !range.is_empty());
        if all_trained {
            return Ok(generated.collect());
        }
        if (0..self.messages.len()).filter(assistant).all(|i| is_trained(i) == (i >= from))
            && let Ok(prompt) = self.render(from, true)
            && self.text.starts_with(&prompt)
        {
            let later = generated.map(|range| range.start.max(prompt.len())..range.end);
            return Ok(later.filter(|range| !range.is_empty()).collect());
        }
        let unknown = "it cannot be told which message the text in {% generation %} belongs to, and not all \
                       turns are trained";
        let (anchored, _) = self.anchored.as_ref().ok_or(unknown)?;
        let mut trained = Vec::new();
        for range in generated {
            // The messages of a range are those whose marks are in it; a mark is never at the
            // start of its text. Without one, such as an end token alone, it continues the message
            // before.
            let mut messages = anchored.between(range.start, range.end);
            if messages.is_empty() {
                messages.extend(anchored.last_before(range.start));
            }
            match messages.iter().map(|message| is_trained(*message)).reduce(|a, b| a & b) {
                None => return Err(unknown.to_owned()),
                Some(true) => trained.push(range),
                Some(false) if messages.iter().any(|message| is_trained(*message)) => {
                    return Err(
                        "the chat template renders a turn that is trained and one that is not in one \
                                {% generation %} block"
                            .to_owned(),
                    );
                }
                Some(false) => {}
            }
        }
        Ok(trained)
    }

    /// What the template leaves out of the messages, and keys that it does not read.
    ///
    /// # Errors
    /// It leaves out the tool calls of a trained turn.
    pub(crate) fn notes(&self, is_trained: impl Fn(usize) -> bool) -> Result<RowNotes, String> {
        let has_tools = self.tools.and_then(Json::as_array).is_some_and(|tools| !tools.is_empty());
        let mut notes =
            RowNotes { has_unread_tools: has_tools && !self.reads_tools(), ..RowNotes::default() };
        for (i, message) in self.messages.iter().enumerate() {
            notes.flagged_others += usize::from(message.is_flagged() && message.role() != "assistant");
            let is_empty = message.content().trim().is_empty() && !message.has(Part::ToolCalls);
            notes.empty_answers += usize::from(is_empty && is_trained(i));
            let known = |key: &&str| {
                matches!(
                    *key,
                    "role" | "content" | "tool_calls" | "reasoning" | "reasoning_content" | "thinking"
                )
            };
            let unread = message.keys().filter(|key| !known(key) && !self.template.mentions(key));
            notes.unread_keys.extend(unread.map(str::to_owned));
            for arguments in message.encoded_arguments() {
                if self.text.contains(&Json::from(arguments).to_string()) {
                    notes.encoded_twice += 1;
                }
            }
            let Some((anchored, parts)) = &self.anchored else { continue };
            for part in parts.iter().filter(|part| message.has(**part)) {
                let (printed, calls) = (anchored.count((i, *part)), message.named_calls());
                if *part == Part::ToolCalls && is_trained(i) && (1..calls).contains(&printed) {
                    return Err(format!(
                        "the chat template prints {printed} of the {calls} tool calls of messages[{i}]; \
                         write each call as a turn of its own, or use a base whose template has several"
                    ));
                }
                if printed > 0 {
                    continue;
                }
                if *part == Part::ToolCalls && is_trained(i) {
                    return Err(format!(
                        "the chat template does not print the tool calls of messages[{i}]; use a base whose \
                         template has tools, or remove the row"
                    ));
                }
                if *part == Part::Content && is_trained(i) && !message.has(Part::ToolCalls) {
                    return Err(format!(
                        "the chat template does not print the content of messages[{i}]; use a base whose \
                         template prints it, or remove the row"
                    ));
                }
                notes.left_out.push((message.role().to_owned(), *part));
            }
        }
        Ok(notes)
    }

    /// Whether the tools change the rendering. A template may replace the variable by another
    /// value.
    fn reads_tools(&self) -> bool {
        // Without tools a template may refuse the conversation.
        let without = || self.template.render(self.messages, None, false);
        self.template.mentions("tools") && without().map_or(true, |without| without.text != self.text)
    }

    fn not_found(&self, i: usize) -> String {
        format!(
            "the assistant's turn (messages[{i}]) cannot be found in the rendered conversation: the chat \
             template renders the messages up to it differently when others follow; mark the trained text \
             with {{% generation %}} .. {{% endgeneration %}} in the base's chat template, or write a row \
             that ends with this turn"
        )
    }
}

/// The number of bytes at the beginning that are equal.
fn common_prefix(a: &str, b: &str) -> usize {
    let differing = a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b);
    differing.map_or(a.len().min(b.len()), |((at, _), _)| at)
}

/// The tag `<..>` that a text begins with.
fn first_tag(text: &str) -> Option<&str> {
    text.starts_with('<').then(|| text.find('>').map(|end| &text[..=end])).flatten()
}

/// The place before the tag `<..>` that `at` is within, if there is one: a text may begin with the
/// same characters as the tag.
fn before_open_tag(text: &str, at: usize) -> usize {
    match text[..at].rfind('<') {
        Some(open) if !text[open..at].contains('>') => open,
        _ => at,
    }
}
