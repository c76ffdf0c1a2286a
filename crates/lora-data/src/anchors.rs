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
    /// The number of marks of each part.
    counts: BTreeMap<Place, usize>,
    /// The anchors, sorted by their places in the text.
    by_position: Vec<(usize, Place)>,
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
        let (mut anchors, mut counts) = (BTreeMap::new(), BTreeMap::new());
        let mut number: usize = 0;
        for c in marked.chars() {
            if DIGITS.contains(&c) {
                let digit = u32::from(c) - u32::from(*DIGITS.start());
                // A text of a user may have any number of digits.
                number = number.wrapping_mul(RADIX as usize).wrapping_add(digit as usize);
            } else if c == END {
                let part = Part::ALL[number % Part::ALL.len()];
                let place = (number / Part::ALL.len(), part);
                anchors.entry(place).or_insert(text.len());
                *counts.entry(place).or_default() += 1;
                number = 0;
            } else {
                text.push(c);
                number = 0;
            }
        }
        let mut by_position: Vec<_> = anchors.iter().map(|(place, at)| (*at, *place)).collect();
        by_position.sort_unstable();
        Self { text, anchors, counts, by_position }
    }

    /// Where the mark of a part was.
    pub(crate) fn anchor(&self, place: Place) -> Option<usize> {
        self.anchors.get(&place).copied()
    }

    /// The number of marks of a part.
    pub(crate) fn count(&self, place: Place) -> usize {
        self.counts.get(&place).copied().unwrap_or(0)
    }

    /// The marks of a message: the first and the last in the text.
    pub(crate) fn of_message(&self, message: usize) -> Option<[(Place, usize); 2]> {
        let of = || {
            Part::ALL.into_iter().filter_map(|part| Some(((message, part), self.anchor((message, part))?)))
        };
        let first = of().min_by_key(|(_, at)| *at)?;
        Some([first, of().max_by_key(|(_, at)| *at)?])
    }

    /// The nearest mark of another message before `at`.
    pub(crate) fn before(&self, message: usize, at: usize) -> Option<(Place, usize)> {
        let mut earlier = self.up_to(at).iter().rev();
        earlier.find(|(_, (of, _))| *of != message).map(|(at, place)| (*place, *at))
    }

    /// The nearest mark of another message after `at`.
    pub(crate) fn after(&self, message: usize, at: usize) -> Option<usize> {
        let start = self.by_position.partition_point(|(place, _)| *place < at);
        let mut later = self.by_position[start..].iter();
        later.find(|(_, (of, _))| *of != message).map(|(at, _)| *at)
    }

    /// The messages with a mark after `start` and up to `end`.
    pub(crate) fn between(&self, start: usize, end: usize) -> BTreeSet<usize> {
        let within = self.up_to(end).iter().rev().take_while(|(at, _)| start < *at);
        within.map(|(_, (message, _))| *message).collect()
    }

    /// Whether another message has a mark between `start` and `end`.
    pub(crate) fn is_between(&self, message: usize, start: usize, end: usize) -> bool {
        let within = self.up_to(end).iter().rev().take_while(|(at, _)| start < *at);
        within.filter(|(at, _)| *at < end).any(|(_, (of, _))| *of != message)
    }

    /// The message with the nearest mark up to `at`.
    pub(crate) fn last_before(&self, at: usize) -> Option<usize> {
        self.up_to(at).last().map(|(_, (message, _))| *message)
    }

    /// The marks up to `at`, in the order of the text.
    fn up_to(&self, at: usize) -> &[(usize, Place)] {
        &self.by_position[..self.by_position.partition_point(|(place, _)| *place <= at)]
    }
}
