//! Checks of command lines of this repository's programs.

use crate::markdown::Document;
use crate::programs::{flags, help, program};
use crate::shell;

/// Flags of other programs that the documents name without the program.
const FLAGS_OF_OTHER_PROGRAMS: [&str; 8] = [
    "--build-arg",
    "--gpus",
    "--volumes",
    "--no-deps",
    "--cases",
    "--max-lora-rank",
    "--enable-lora",
    "--lora",
];
/// Documents about the benchmark and the GPU checks, whose flags are not checked.
const OTHER_PROGRAMS: [&str; 2] = ["benches/", "tests/"];

/// How strictly a command line is checked.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// All required arguments must be present.
    Complete,
    /// Arguments and values may be missing.
    Partial,
}

fn problems(document: &Document) -> Vec<String> {
    let mut problems = Vec::new();
    for block in document.blocks.iter().filter(|block| block.language == "sh") {
        for words in shell::commands(&block.text) {
            if let Some(problem) = check_command(&words, Form::Complete) {
                problems.push(document.problem(block.line, &problem));
            }
        }
    }
    for code in &document.code {
        let words: Vec<String> = code.text.split(' ').map(str::to_owned).collect();
        if let Some(problem) = check_command(&words, Form::Partial) {
            problems.push(document.problem(code.line, &problem));
        }
        let is_flag =
            words[0].starts_with("--") && !OTHER_PROGRAMS.iter().any(|dir| document.path.starts_with(dir));
        let name = words[0].split('=').next().unwrap_or_default();
        let is_known = FLAGS_OF_OTHER_PROGRAMS.contains(&name) || flags().contains(name);
        if is_flag && name.len() > 2 && !is_known {
            problems.push(document.problem(code.line, &format!("no program has the flag {name}")));
        }
    }
    problems
}

/// The problem of a command, if it runs a program of this repository.
fn check_command(words: &[String], form: Form) -> Option<String> {
    let (name, arguments) = program_and_arguments(words)?;
    let line = format!("{name} {}", arguments.join(" "));
    match help(program(name)?, arguments) {
        Err(error) if form == Form::Partial && error.contains("a value is required for") => None,
        Err(error) => Some(format!("{line}: {error}")),
        Ok(_) if form == Form::Partial => None,
        Ok(help) => {
            help.missing(arguments, usize::from(name == "loractl")).map(|what| format!("{line}: {what}"))
        }
    }
}

/// The program that a command runs and its arguments, also through `cargo run` and through the
/// compose file's service for `loractl`.
fn program_and_arguments(words: &[String]) -> Option<(&str, &[String])> {
    let name = words[0].rsplit('/').next().unwrap_or_default();
    let after = |word: &str| Some(words.iter().position(|other| other == word)? + 1);
    match name {
        "cargo" if words.get(1).is_some_and(|word| word == "run") => {
            let package = words.get(after("-p")?)?;
            let arguments = after("--")?;
            program(package).is_some().then(|| (package.as_str(), &words[arguments..]))
        }
        "docker" if words.get(1).is_some_and(|word| word == "compose") => {
            let arguments = &words[after("submit")?..];
            (!arguments.is_empty()).then_some(("loractl", arguments))
        }
        _ => {
            let arguments = words.get(1..).unwrap_or_default();
            (program(name).is_some() && !arguments.is_empty()).then_some((name, arguments))
        }
    }
}

#[test]
fn every_command_and_flag_exists() {
    crate::expect_none(Document::all().iter().flat_map(problems));
}

#[test]
fn invalid_commands_are_found() {
    for (text, expected) in [
        ("```sh\nloractl lost\n```", "loractl lost: error: unrecognized subcommand 'lost'"),
        (
            "```sh\nloractl run job.yaml --out runs/a --worker 2 --nothing\n```",
            "unexpected argument '--nothing'",
        ),
        ("```sh\nloractl run job.yaml\n```", "--out is missing"),
        ("```sh\nid=$(loractl submit)\n```", "loractl submit: an argument is missing"),
        ("```sh\nloractl submit --watch\n```", "an argument is missing"),
        ("```sh\nloractl submit job.yaml --priority 101\n```", "101"),
        ("```sh\nlora-worker --devise cpu\n```", "unexpected argument '--devise'"),
        ("```sh\nA=1 target/release/lora-coordinator --port 1\n```", "unexpected argument '--port'"),
        ("```sh\ncargo run -p loractl -- lost\n```", "unrecognized subcommand"),
        ("```sh\ndocker compose run --rm submit lost JOB\n```", "unrecognized subcommand"),
        ("`loractl lost`", "unrecognized subcommand"),
        ("`loractl run --nothing`", "unexpected argument '--nothing'"),
        ("`--nothing`", "no program has the flag --nothing"),
    ] {
        crate::expect_problem(problems, text, expected);
    }
    crate::expect_sound(
        problems,
        "`loractl run --out` `loractl run` `loractl` `--measure` `--set a.b=c` `--gpus`",
    );
    crate::expect_sound(problems, "```sh\nloractl run job.yaml --out=runs/a -o json | jq .loss\n```");
}
