//! Checks of relative links and their anchors.

use std::path::{Component, Path};

use crate::files;
use crate::markdown::{Document, Located};

fn problems(document: &Document) -> Vec<String> {
    let mut problems = Vec::new();
    for Located { line, text: link } in &document.links {
        if link.contains("://") {
            continue;
        }
        let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
        let target = if path.is_empty() { document.path.clone() } else { resolve(&document.path, path) };
        if path.is_empty() || files::exists(&target) {
            let has_anchor = || match path.is_empty() {
                true => document.anchors.iter().any(|known| known == anchor),
                false => Document::parse(&target, &files::text(&target))
                    .anchors
                    .iter()
                    .any(|known| known == anchor),
            };
            if !anchor.is_empty() && !has_anchor() {
                problems.push(document.problem(*line, &format!("{link}: {target} has no heading {anchor}")));
            }
        } else {
            problems.push(document.problem(*line, &format!("{link}: {target} does not exist")));
        }
    }
    problems
}

/// The path of a link in the document at `from`, relative to the root of the repository.
fn resolve(from: &str, link: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for component in Path::new(link).components() {
        match component {
            Component::ParentDir => {
                parts.pop();
            }
            Component::Normal(part) => parts.push(part.to_str().unwrap()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    parts.join("/")
}

#[test]
fn every_relative_link_has_a_target() {
    crate::expect_none(Document::all().iter().flat_map(problems));
}

#[test]
fn broken_links_are_found() {
    for (text, expected) in [
        ("[a](nowhere.md)", "docs/nowhere.md does not exist"),
        ("[a](../nowhere/)", "nowhere does not exist"),
        ("[a](data.md#nothing)", "docs/data.md has no heading nothing"),
        ("# One\n\n[a](#two)", "has no heading two"),
        ("One\n[a](nowhere.md)", "docs/planted.md:2: nowhere.md"),
    ] {
        crate::expect_problem(problems, text, expected);
    }
    crate::expect_sound(
        problems,
        "# One\n[a](#one) [b](data.md#row-formats) [c](../tests/gpu/) [d](https://example.com/x)",
    );
}
