//! Where a chat template prints the messages: marks in their texts, found again in the rendering.

use std::collections::{BTreeMap, BTreeSet};

use crate::Message;
use crate::message::Part;

/// Unicode noncharacters: digits of a mark, and its end. Valid texts do not contain them.
const DIGITS: std::ops::RangeInclusive<char> = '\u{FDD2}'..='\u{FDE1}';
const END: char = '\u{FDEF}';
const RADIX: u32 = 16;

/// The part of a message that a mark is in.
pub(crate) type Place = (usize, Part);

/// A rendered text without its marks, and where the first mark of each part was.
#[derive(Debug)]
pub(crate) struct Anchored {
    pub(crate) text: String,
    anchors: BTreeMap<Place, usize>,
}

/// Returns the messages with marks in these parts, and with `empty` also in empty contents.
pub(crate) fn mark(messages: &[Message], parts: &[Part], empty: bool) -> Vec<Message> {
    let marked = |(i, message): (usize, &Message)| message.marked(parts, empty, |part| mark_of((i, part)));
    messages.iter().enumerate().map(marked).collect()
}

/// The mark of a part.
pub(crate) fn mark_of((message, part): Place) -> String {
    let mut number = message * Part::ALL.len() + part as usize;
    let mut digits = Vec::new();
    loop {
        digits.extend(char::from_u32(u32::from(*DIGITS.start()) + (number % RADIX as usize) as u32));
        number /= RADIX as usize;
        if number == 0 {
            break;
        }
    }
    digits.into_iter().rev().chain([END]).collect()
}

impl Anchored {
    /// Removes the marks from a rendered text.
    pub(crate) fn new(marked: &str) -> Self {
        let mut text = String::with_capacity(marked.len());
        let mut anchors = BTreeMap::new();
        let mut number: usize = 0;
        for c in marked.chars() {
            if DIGITS.contains(&c) {
                let digit = u32::from(c) - u32::from(*DIGITS.start());
                // A text of a user may have any number of digits.
                number = number.wrapping_mul(RADIX as usize).wrapping_add(digit as usize);
            } else if c == END {
                let part = Part::ALL[number % Part::ALL.len()];
                anchors.entry((number / Part::ALL.len(), part)).or_insert(text.len());
                number = 0;
            } else {
                text.push(c);
                number = 0;
            }
        }
        Self { text, anchors }
    }

    /// Where the mark of a part was.
    pub(crate) fn anchor(&self, place: Place) -> Option<usize> {
        self.anchors.get(&place).copied()
    }

    /// The marks of a message: the first and the last in the text.
    pub(crate) fn of_message(&self, message: usize) -> Option<[(Place, usize); 2]> {
        let of = || self.all().filter(|((of, _), _)| *of == message);
        let first = of().min_by_key(|(_, at)| *at)?;
        Some([first, of().max_by_key(|(_, at)| *at)?])
    }

    /// The nearest mark of another message before `at`.
    pub(crate) fn before(&self, message: usize, at: usize) -> Option<(Place, usize)> {
        self.all().filter(|((of, _), place)| *of != message && *place <= at).max_by_key(|(_, at)| *at)
    }

    /// The nearest mark of another message after `at`.
    pub(crate) fn after(&self, message: usize, at: usize) -> Option<usize> {
        self.all().filter(|((of, _), place)| *of != message && *place >= at).map(|(_, at)| at).min()
    }

    /// The messages with a mark after `start` and up to `end`.
    pub(crate) fn between(&self, start: usize, end: usize) -> BTreeSet<usize> {
        let within = self.all().filter(|(_, at)| start < *at && *at <= end);
        within.map(|((message, _), _)| message).collect()
    }

    /// Whether another message has a mark between `start` and `end`.
    pub(crate) fn is_between(&self, message: usize, start: usize, end: usize) -> bool {
        self.all().any(|((of, _), at)| of != message && start < at && at < end)
    }

    /// The message with the nearest mark up to `at`.
    pub(crate) fn last_before(&self, at: usize) -> Option<usize> {
        let before = self.all().filter(|(_, place)| *place <= at);
        before.max_by_key(|(_, place)| *place).map(|((message, _), _)| message)
    }

    fn all(&self) -> impl Iterator<Item = (Place, usize)> {
        self.anchors.iter().map(|(place, at)| (*place, *at))
    }
}
