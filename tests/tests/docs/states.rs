//! Compares the table of job states in ARCHITECTURE.md with `JobState`.

use lora_spec::JobState;

use crate::files;
use crate::markdown::Document;

const PAGE: &str = "ARCHITECTURE.md";
const COLUMNS: [&str; 3] = ["state", "meaning", "next states"];

fn problems(page: &Document) -> Vec<String> {
    let quoted = |state: &JobState| format!("`{}`", state.name());
    let rows = page.rows.iter().skip_while(|row| row[..] != COLUMNS).skip(1);
    let written: Vec<String> = rows
        .take_while(|row| row[0].starts_with('`'))
        .map(|row| format!("{} -> {}", row[0], row[2]))
        .collect();
    let missing = JobState::ALL.iter().filter_map(|state| {
        let next: Vec<String> = state.successors().iter().map(quoted).collect();
        let right = format!("{} -> {}", quoted(state), next.join(", "));
        (!written.contains(&right)).then(|| format!("{PAGE}: the row is missing: {right}"))
    });
    let mut problems: Vec<String> = missing.collect();
    if written.len() != JobState::ALL.len() {
        problems.push(format!("{PAGE}: the table of states has {} rows", written.len()));
    }
    problems
}

#[test]
fn the_table_of_states_has_every_transition() {
    crate::expect_none(problems(&Document::parse(PAGE, &files::text(PAGE))));
}

#[test]
fn missing_transitions_are_found() {
    let text = files::text(PAGE).replacen("`paused`, `cancelled`", "`cancelled`", 1);
    assert_eq!(problems(&Document::parse(PAGE, &text)).len(), 1);
}
