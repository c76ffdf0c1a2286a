//! Checks of the README.

use crate::files;

/// CI and users call these commands.
const COMMANDS: [&str; 2] = ["cargo run --release -p loractl -- quickstart", "cargo test --workspace"];
const MAX_LINES: usize = 100;

fn problems(text: &str) -> Vec<String> {
    let missing = COMMANDS.iter().filter(|command| !text.contains(*command));
    let mut problems: Vec<String> =
        missing.map(|command| format!("README.md: {command} is missing")).collect();
    let lines = text.lines().count();
    if lines > MAX_LINES {
        problems.push(format!("README.md: has {lines} lines; {MAX_LINES} are allowed"));
    }
    problems
}

#[test]
fn the_readme_is_short_and_has_the_two_commands() {
    crate::expect_none(problems(&files::text("README.md")));
}

#[test]
fn a_long_readme_without_the_commands_is_found() {
    let found = problems(&"\n".repeat(101));
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found[2].contains("has 101 lines"), "{found:?}");
}
