//! Checks that the links, paths, commands, flags, keys and messages in the Markdown documents
//! exist.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]

mod cargo;
mod commands;
mod files;
mod job_file;
mod links;
mod markdown;
mod messages;
mod paths;
mod programs;
mod readme;
mod settings;
mod shell;
mod states;

use markdown::Document;

/// Fails with all of `problems`, if there are any.
fn expect_none(problems: impl IntoIterator<Item = String>) {
    let problems: Vec<String> = problems.into_iter().collect();
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

/// Fails unless `check` finds a problem that contains `expected` in a document of `docs` with this
/// text.
fn expect_problem(check: impl Fn(&Document) -> Vec<String>, text: &str, expected: &str) {
    let found = check(&Document::parse("docs/planted.md", text));
    assert!(
        found.iter().any(|problem| problem.contains(expected)),
        "{text:?}: {expected:?} is not in {found:#?}"
    );
}

/// Fails if `check` finds a problem in a document of `docs` with this text.
fn expect_sound(check: impl Fn(&Document) -> Vec<String>, text: &str) {
    expect_none(check(&Document::parse("docs/planted.md", text)));
}
