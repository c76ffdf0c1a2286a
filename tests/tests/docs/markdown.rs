//! The parts of a Markdown file that the checks compare.

use std::collections::BTreeMap;
use std::ops::Range;

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

use crate::files;

/// A Markdown file. Lines count from 1.
#[derive(Default)]
pub(crate) struct Document {
    /// Path relative to the root of the repository.
    pub(crate) path: String,
    /// Code blocks.
    pub(crate) blocks: Vec<CodeBlock>,
    /// Inline code.
    pub(crate) code: Vec<Located>,
    /// Text outside of code blocks, inline code included.
    pub(crate) prose: Vec<Located>,
    /// Targets of links.
    pub(crate) links: Vec<Located>,
    /// Anchors of the headings, as GitHub and GitLab make them.
    pub(crate) anchors: Vec<String>,
    /// Cells of the rows of all tables, headers included. Inline code keeps its backticks.
    pub(crate) rows: Vec<Vec<String>>,
}

/// A code block.
pub(crate) struct CodeBlock {
    /// Number of its first line.
    pub(crate) line: usize,
    /// Word after the opening fence; empty for an indented block.
    pub(crate) language: String,
    /// Contents.
    pub(crate) text: String,
}

/// A text with its line.
#[derive(Debug, PartialEq)]
pub(crate) struct Located {
    /// Number of the line where it starts.
    pub(crate) line: usize,
    /// Contents.
    pub(crate) text: String,
}

impl Document {
    /// All Markdown files of the repository.
    pub(crate) fn all() -> Vec<Self> {
        let paths = files::all().iter().filter(|path| path.ends_with(".md"));
        paths.map(|path| Self::parse(path, &files::text(path))).collect()
    }

    /// The document with this text at `path`.
    pub(crate) fn parse(path: &str, text: &str) -> Self {
        let mut document = Self { path: path.to_owned(), ..Self::default() };
        let mut headings = BTreeMap::new();
        let mut block: Option<CodeBlock> = None;
        let mut heading: Option<String> = None;
        for (event, range) in Parser::new_ext(text, Options::ENABLE_TABLES).into_offset_iter() {
            let located = |contents: &str| Located { line: line(text, &range), text: contents.to_owned() };
            match event {
                Event::Start(Tag::CodeBlock(kind)) => {
                    // An unclosed fence would hide the rest of the page from the checks.
                    let is_closed = text[range.clone()].trim_end().ends_with("```");
                    assert!(is_closed || kind == CodeBlockKind::Indented, "{path}: a code block has no end");
                    let (language, line) = match kind {
                        CodeBlockKind::Fenced(language) => (language.to_string(), line(text, &range) + 1),
                        CodeBlockKind::Indented => (String::new(), line(text, &range)),
                    };
                    block = Some(CodeBlock { line, language, text: String::new() });
                }
                Event::End(TagEnd::CodeBlock) => document.blocks.extend(block.take()),
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    document.anchors.extend(heading.take().map(|title| anchor(&title, &mut headings)));
                }
                Event::Start(Tag::Link { dest_url, .. }) => document.links.push(located(&dest_url)),
                Event::Start(Tag::TableHead | Tag::TableRow) => document.rows.push(Vec::new()),
                Event::Start(Tag::TableCell) => {
                    document.rows.last_mut().unwrap().push(text[range].trim().to_owned());
                }
                Event::Text(contents) => match (&mut block, &mut heading) {
                    (Some(block), _) => block.text.push_str(&contents),
                    (None, title) => {
                        title.iter_mut().for_each(|title| title.push_str(&contents));
                        document.prose.push(located(&contents));
                    }
                },
                Event::Code(contents) => {
                    heading.iter_mut().for_each(|title| title.push_str(&contents));
                    document.prose.push(located(&contents));
                    document.code.push(located(&contents));
                }
                _ => {}
            }
        }
        document
    }

    /// A message about a line of this document.
    pub(crate) fn problem(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path)
    }
}

/// The number of the line where `range` starts.
fn line(text: &str, range: &Range<usize>) -> usize {
    text[..range.start].matches('\n').count() + 1
}

/// The anchor of a heading; `seen` counts the headings with the same one.
fn anchor(title: &str, seen: &mut BTreeMap<String, usize>) -> String {
    let kept = title.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
    let count = seen.entry(anchor.clone()).or_default();
    *count += 1;
    if *count == 1 { anchor } else { format!("{anchor}-{}", *count - 1) }
}

/// Blocks without a language, whose commands would not be checked.
fn unnamed_blocks(document: &Document) -> Vec<String> {
    let unnamed = document.blocks.iter().filter(|block| block.language.is_empty());
    unnamed.map(|block| document.problem(block.line, "the code block names no language")).collect()
}

#[test]
fn every_block_names_its_language() {
    crate::expect_none(Document::all().iter().flat_map(unnamed_blocks));
    crate::expect_problem(unnamed_blocks, "```\nloractl list\n```\n", "docs/planted.md:2: the code block");
}

#[test]
fn a_document_is_parsed() {
    let text = "# A `b` c, d\n\nOne `x\ny` [two](z.md#w).\n- three\n  four\n\n| a | `b` |\n| --- | --- |\n\n\
                ```sh\nls\n```\n# a b c d\n";
    let document = Document::parse("a.md", text);
    let located = |line, text: &str| Located { line, text: text.to_owned() };
    assert_eq!(document.code, [located(1, "b"), located(3, "x y"), located(8, "b")]);
    assert_eq!(document.links, [located(4, "z.md#w")]);
    assert_eq!(document.anchors, ["a-b-c-d", "a-b-c-d-1"]);
    assert_eq!(document.rows, [["a", "`b`"]]);
    assert!(document.prose.contains(&located(5, "three")));
    assert_eq!((document.blocks[0].line, document.blocks[0].text.as_str()), (12, "ls\n"));
}
