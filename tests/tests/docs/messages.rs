//! Compares the messages in the page on troubleshooting with the programs' sources.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use crate::files;
use crate::markdown::Document;

const PAGE: &str = "docs/troubleshooting.md";
/// The placeholder for a value in a message.
const VALUE: char = '…';
/// The smallest number of letters and digits to compare in a message.
const MIN_COMPARED: usize = 12;
/// The smallest number of bytes of a part that is searched for.
const MIN_PART_BYTES: usize = 4;

fn problems(document: &Document) -> Vec<String> {
    let mut problems = Vec::new();
    for block in document.blocks.iter().filter(|block| block.language == "text") {
        for (index, message) in block.text.lines().enumerate() {
            let segments =
                || message.split(VALUE).map(|segment| segment.trim_matches(|c: char| !c.is_alphanumeric()));
            let compared: usize =
                segments().map(|segment| segment.chars().filter(|c| c.is_alphanumeric()).count()).sum();
            let missing =
                segments().find(|segment| segment.len() >= MIN_PART_BYTES && !is_in_sources(segment));
            let what = match missing {
                Some(segment) => format!("{segment:?} is not in the sources"),
                None if compared < MIN_COMPARED => format!("{message:?} is too short to be compared"),
                None => continue,
            };
            problems.push(document.problem(block.line + index, &what));
        }
    }
    problems
}

/// Whether a text is part of a string literal, or consists of parts of two string literals.
fn is_in_sources(text: &str) -> bool {
    let is_literal = |part: &str| literals().contains(part);
    let long_enough = |at: usize| at >= MIN_PART_BYTES && text.len() - at >= MIN_PART_BYTES;
    let cuts = text.char_indices().map(|(at, _)| at).filter(|at| long_enough(*at));
    is_literal(text) || cuts.into_iter().any(|at| is_literal(&text[..at]) && is_literal(&text[at..]))
}

/// All string literals of the programs' sources.
fn literals() -> &'static str {
    static LITERALS: OnceLock<String> = OnceLock::new();
    LITERALS.get_or_init(|| {
        let is_source =
            |path: &&String| path.starts_with("crates/") && path.contains("/src/") && path.ends_with(".rs");
        let texts: BTreeSet<String> =
            files::all().iter().filter(is_source).flat_map(|path| strings(&files::text(path))).collect();
        texts.into_iter().collect::<Vec<_>>().join("\n")
    })
}

/// The string literals of a Rust source.
fn strings(source: &str) -> Vec<String> {
    let chars: Vec<char> = source.chars().collect();
    let mut strings = Vec::new();
    let mut at = 0;
    let find = |from: usize, text: &str| {
        let text: Vec<char> = text.chars().collect();
        (from..chars.len())
            .find(|start| chars[*start..].starts_with(&text))
            .map_or(chars.len(), |start| start + text.len())
    };
    while at < chars.len() {
        match chars[at] {
            '/' if chars.get(at + 1) == Some(&'/') => at = find(at, "\n"),
            '\'' if chars.get(at + 1) == Some(&'\\') => at = find(at + 3, "'"),
            '\'' if chars.get(at + 2) == Some(&'\'') => at += 3,
            '"' => {
                let (text, end) = string(&chars, at + 1);
                strings.push(text);
                at = end;
            }
            _ => at += 1,
        }
    }
    strings
}

/// The literal whose contents start at `at`, without its line breaks, and the index after it.
fn string(chars: &[char], mut at: usize) -> (String, usize) {
    let mut text = String::new();
    while let Some(c) = chars.get(at) {
        at += 1;
        match c {
            '"' => break,
            '\\' => {
                let escaped = chars.get(at).copied().unwrap_or_default();
                at += 1;
                match escaped {
                    '\n' => at += chars[at..].iter().take_while(|c| c.is_whitespace()).count(),
                    'n' => text.push(' '),
                    other => text.push(other),
                }
            }
            other => text.push(*other),
        }
    }
    (text.replace("{{", "{").replace("}}", "}"), at)
}

#[test]
fn every_message_is_one_of_the_programs() {
    let page = Document::parse(PAGE, &files::text(PAGE));
    assert!(page.blocks.len() > 20);
    crate::expect_none(problems(&page));
}

#[test]
fn messages_that_no_program_writes_are_found() {
    for (text, expected) in [
        ("```text\nthis is not a message of any program\n```", "is not in the sources"),
        ("```text\n… is in use by another planet\n```", "is not in the sources"),
        ("```text\n… file …\n```", "too short"),
    ] {
        crate::expect_problem(problems, text, expected);
    }
    let sound = "```text\nstate_dir: … is in use by another coordinator\n\
                 …: is not a key of a job; did you mean …?\n```";
    crate::expect_sound(problems, sound);
}

#[test]
fn literals_are_found_in_sources() {
    let source = "let a = '\"'; // \"no\"\nf::<'a>(\"one \\\n    two {{x}}\", '\\'', \"\\\"q\\\"\");";
    assert_eq!(strings(source), ["one two {x}", "\"q\""]);
}
