//! What stands before and after the turns of a long conversation. Turns between the same messages
//! stand between the same texts, so one is found by comparing the text around it.

use std::collections::HashMap;

use crate::Message;
use crate::anchors::Anchored;
use crate::message::Part;
use crate::turns::Turn;

/// The number of successive turns of a shape that must have the same surroundings before others
/// are found by them.
const EQUAL_TURNS: usize = 4;

/// The texts around the turns of a conversation, by the shapes of turns.
pub(crate) struct Surroundings<'a> {
    messages: &'a [Message],
    anchored: &'a Anchored,
    last_question: usize,
    known: HashMap<Shape<'a>, (Surrounding<'a>, usize)>,
}

/// What a template may tell turns apart by.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Shape<'a> {
    /// The message before the turn, its own, and the next one.
    messages: [MessageShape<'a>; 3],
    /// Whether a question of the user follows.
    is_earlier: bool,
    /// The nearest mark before the turn: how many messages before, and in which part.
    before: (usize, Part),
    /// The parts with the first and the last mark of the turn.
    parts: [Part; 2],
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct MessageShape<'a> {
    role: &'a str,
    has: [bool; Part::ALL.len()],
    has_content_parts: bool,
    tool_calls: usize,
}

/// The text from the nearest mark before a turn to the turn, without white space at its beginning;
/// and the text from the turn to the content of the next message.
#[derive(Debug, PartialEq)]
struct Surrounding<'a> {
    before: &'a str,
    after: &'a str,
    is_changed: bool,
}

/// Where the text around a turn is.
struct Location {
    /// The nearest mark before the turn.
    before: usize,
    /// The first and the last mark of the turn.
    marks: [usize; 2],
    /// The content of the next message.
    next: usize,
}

impl<'a> Surroundings<'a> {
    /// Creates surroundings of no turns yet.
    pub(crate) fn new(messages: &'a [Message], anchored: &'a Anchored) -> Self {
        let last_question = messages.iter().rposition(|message| message.role() == "user").unwrap_or(0);
        Self { messages, anchored, last_question, known: HashMap::new() }
    }

    /// Adds the surroundings of a turn that was found by rendering.
    pub(crate) fn learn(&mut self, i: usize, turn: &Turn) {
        let Some((shape, location)) = self.locate(i) else { return };
        let text = self.anchored.text.as_str();
        let (before, after) =
            (text.get(location.before..turn.range.start), text.get(turn.range.end..location.next));
        let (Some(before), Some(after)) = (before, after) else {
            self.known.remove(&shape);
            return;
        };
        let found = Surrounding { before: before.trim_start(), after, is_changed: turn.is_changed };
        match self.known.get_mut(&shape) {
            Some((known, count)) if *known == found => *count += 1,
            _ => drop(self.known.insert(shape, (found, 1))),
        }
    }

    /// Finds a turn whose surroundings are those of enough other turns of its shape.
    pub(crate) fn find(&self, i: usize) -> Option<Turn> {
        let (shape, location) = self.locate(i)?;
        let (known, _) = self.known.get(&shape).filter(|(_, count)| *count >= EQUAL_TURNS)?;
        // White space alone may be that of a content.
        if known.before.is_empty() || known.after.trim().is_empty() {
            return None;
        }
        let text = &self.anchored.text;
        let [first, last] = location.marks;
        let start = first - text.get(location.before..first)?.trim_start().strip_prefix(known.before)?.len();
        let end = last + text.get(last..location.next)?.strip_suffix(known.after)?.len();
        let is_valid = start <= end && !self.anchored.is_between(i, start, end);
        is_valid.then_some(Turn { range: start..end, is_changed: known.is_changed })
    }

    fn locate(&self, i: usize) -> Option<(Shape<'a>, Location)> {
        let messages = [self.messages.get(i.checked_sub(1)?)?, &self.messages[i], self.messages.get(i + 1)?];
        let [_, message, next] = messages;
        // The prompt may end with a tag, such as one that begins the reasoning, and the content
        // may begin with the same.
        if message.content().trim_start().starts_with(['<', '[']) {
            return None;
        }
        let [((_, first_part), first), ((_, last_part), last)] = self.anchored.of_message(i)?;
        let ((before_message, before_part), before) = self.anchored.before(i, first)?;
        let [((_, next_part), next_mark), _] = self.anchored.of_message(i + 1)?;
        let content = next.content().trim();
        if next_part != Part::Content || !self.anchored.text.get(..next_mark)?.ends_with(content) {
            return None;
        }
        let shape = Shape {
            messages: messages.map(MessageShape::of),
            is_earlier: i < self.last_question,
            before: (i.checked_sub(before_message)?, before_part),
            parts: [first_part, last_part],
        };
        Some((shape, Location { before, marks: [first, last], next: next_mark - content.len() }))
    }
}

impl<'a> MessageShape<'a> {
    fn of(message: &'a Message) -> Self {
        Self {
            role: message.role(),
            has: Part::ALL.map(|part| message.has(part)),
            has_content_parts: message.has_parts(),
            tool_calls: message.tool_calls().count(),
        }
    }
}
