//! Markdown, as far as the documents of this repository use it.

use std::collections::BTreeMap;

use crate::files;

/// A Markdown file.
pub(crate) struct Document {
    /// Path relative to the root of the repository.
    pub(crate) path: String,
    /// Fenced blocks.
    pub(crate) blocks: Vec<Block>,
    /// Paragraphs, list items, headings and rows of tables, each with the number of its first line.
    pub(crate) paragraphs: Vec<(usize, String)>,
}

/// A fenced block.
pub(crate) struct Block {
    /// Number of the line after the opening fence.
    pub(crate) line: usize,
    /// Word after the opening fence.
    pub(crate) language: String,
    /// Contents.
    pub(crate) text: String,
}

/// A piece of inline code.
pub(crate) struct Code<'a> {
    /// Number of the first line of its paragraph.
    pub(crate) line: usize,
    /// Contents.
    pub(crate) text: &'a str,
}

impl Document {
    /// All Markdown files of the repository.
    pub(crate) fn all() -> Vec<Self> {
        let paths = files::all().iter().filter(|path| path.ends_with(".md"));
        paths.map(|path| Self::parse(path, &files::text(path))).collect()
    }

    /// The document with this text at `path`.
    pub(crate) fn parse(path: &str, text: &str) -> Self {
        let mut document = Self { path: path.to_owned(), blocks: Vec::new(), paragraphs: Vec::new() };
        let mut fenced: Option<Block> = None;
        let mut is_open = false;
        for (index, line) in text.lines().enumerate() {
            let trimmed = line.trim_start();
            if let Some(language) = trimmed.strip_prefix("```") {
                is_open = false;
                fenced = match fenced {
                    None => Some(Block {
                        line: index + 2,
                        language: language.trim().to_owned(),
                        text: String::new(),
                    }),
                    Some(block) => {
                        document.blocks.push(block);
                        None
                    }
                };
            } else if let Some(block) = &mut fenced {
                block.text.push_str(line);
                block.text.push('\n');
            } else if trimmed.is_empty() {
                is_open = false;
            } else {
                let starts = ["#", "|", "- ", "<!--"].iter().any(|start| trimmed.starts_with(start));
                match document.paragraphs.last_mut().filter(|_| is_open && !starts) {
                    Some((_, paragraph)) => {
                        paragraph.push(' ');
                        paragraph.push_str(trimmed);
                    }
                    None => document.paragraphs.push((index + 1, trimmed.to_owned())),
                }
                is_open = !trimmed.starts_with('#') && !trimmed.starts_with('|');
            }
        }
        assert!(fenced.is_none(), "{path}: a fenced block has no end");
        document
    }

    /// The inline code outside of fenced blocks.
    pub(crate) fn code(&self) -> impl Iterator<Item = Code<'_>> {
        self.paragraphs
            .iter()
            .flat_map(|(line, text)| {
                pieces(text).filter_map(|(is_code, text)| is_code.then_some((*line, text)))
            })
            .map(|(line, text)| Code { line, text })
    }

    /// The targets of links, each with the number of the first line of its paragraph.
    pub(crate) fn links(&self) -> Vec<(usize, String)> {
        let mut links = Vec::new();
        for (line, text) in &self.paragraphs {
            let plain: String = pieces(text).filter(|(is_code, _)| !is_code).map(|(_, text)| text).collect();
            links.extend(plain.split("](").skip(1).filter_map(|rest| {
                let (target, _) = rest.split_once(')')?;
                Some((*line, target.to_owned()))
            }));
        }
        links
    }

    /// The anchors of the headings, as GitHub and GitLab make them.
    pub(crate) fn anchors(&self) -> Vec<String> {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let headings = self.paragraphs.iter().filter_map(|(_, text)| {
            let title = text.trim_start_matches('#');
            title.strip_prefix(' ').filter(|_| title.len() < text.len())
        });
        headings
            .map(|title| {
                let kept = title.trim().to_lowercase();
                let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
                let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
                let count = seen.entry(anchor.clone()).or_default();
                *count += 1;
                if *count == 1 { anchor } else { format!("{anchor}-{}", *count - 1) }
            })
            .collect()
    }

    /// The cells of the rows of tables, without rules.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Vec<&str>> {
        self.paragraphs.iter().filter_map(|(_, text)| {
            let row = text.strip_prefix('|')?.strip_suffix('|')?;
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            (!cells.iter().all(|cell| cell.starts_with("---"))).then_some(cells)
        })
    }

    /// A message about a line of this document.
    pub(crate) fn problem(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path)
    }
}

/// The pieces of a text and whether they are inline code.
fn pieces(text: &str) -> impl Iterator<Item = (bool, &str)> {
    text.split('`').enumerate().map(|(index, piece)| (index % 2 == 1, piece))
}

/// The inline code in a text.
pub(crate) fn code_in(text: &str) -> impl Iterator<Item = &str> {
    pieces(text).filter_map(|(is_code, piece)| is_code.then_some(piece))
}

/// Blocks without a language, whose commands would not be checked.
fn unnamed_blocks(document: &Document) -> Vec<String> {
    let unnamed = document.blocks.iter().filter(|block| block.language.is_empty());
    unnamed.map(|block| document.problem(block.line, "the fenced block names no language")).collect()
}

#[test]
fn every_block_names_its_language() {
    crate::expect_none(Document::all().iter().flat_map(unnamed_blocks));
    crate::expect_problem(unnamed_blocks, "```\nloractl list\n```\n", "docs/planted.md:2: the fenced block");
}

#[test]
fn a_document_is_parsed() {
    let text = "# A `b` c, d\n\nOne `x\ny` [two](z.md#w).\n- three\n  four\n\n| a | `b` |\n| --- | --- |\n\n\
                ```sh\nls\n```\n# a b c d\n";
    let document = Document::parse("a.md", text);
    assert_eq!(document.code().map(|code| code.text).collect::<Vec<_>>(), ["b", "x y", "b"]);
    assert_eq!(document.links(), [(3, "z.md#w".to_owned())]);
    assert_eq!(document.anchors(), ["a-b-c-d", "a-b-c-d-1"]);
    assert_eq!(document.rows().collect::<Vec<_>>(), [["a", "`b`"]]);
    assert_eq!(document.paragraphs[2], (5, "- three four".to_owned()));
    assert_eq!((document.blocks[0].line, document.blocks[0].text.as_str()), (12, "ls\n"));
}
