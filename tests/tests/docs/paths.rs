//! Checks of repository paths in inline code and in commands.

use crate::files;
use crate::markdown::Document;
use crate::shell;

/// Extensions of files that only the repository has. Files with other extensions may belong to a
/// user.
const OWN: [&str; 9] = ["cpp", "cu", "cuh", "h", "md", "proto", "py", "rs", "sh"];

fn problems(document: &Document) -> Vec<String> {
    let inline = document
        .code
        .iter()
        .flat_map(|code| code.text.split(' ').map(move |word| (code.line, word.to_owned())));
    let blocks = document.blocks.iter().filter(|block| block.language == "sh");
    let commands = blocks.flat_map(|block| {
        shell::commands(&block.text)
            .into_iter()
            .flat_map(|command| command.into_iter().map(|word| (block.line, word)))
    });
    let words = inline.chain(commands);
    let wrong = words.filter(|(_, word)| expand_braces(word).iter().any(|path| !is_valid(path)));
    wrong.map(|(line, word)| document.problem(line, &format!("{word} does not exist"))).collect()
}

/// Whether a word is an existing path, or is not a path of this repository.
fn is_valid(word: &str) -> bool {
    if word.contains(['<', '>', '…', '$', '=']) || word.contains("://") {
        return true;
    }
    let Some((first, _)) = word.split_once('/') else {
        let is_own =
            word.rsplit_once('.').is_some_and(|(stem, ending)| !stem.is_empty() && OWN.contains(&ending));
        return !is_own || files::all().iter().any(|file| matches(file.rsplit('/').next().unwrap(), word));
    };
    let is_ours = !first.is_empty() && files::exists(first) && !files::all().contains(first);
    match word.contains('*') {
        _ if !is_ours => true,
        true => files::all().iter().any(|file| matches(file, word)),
        false => files::exists(word),
    }
}

/// Whether `name` matches `pattern`, in which one `*` stands for any text.
fn matches(name: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
        None => name == pattern,
    }
}

/// Expands braces: `a{b,c}d` gives `abd` and `acd`.
fn expand_braces(word: &str) -> Vec<String> {
    let braces = word.split_once('{').and_then(|(start, rest)| Some((start, rest.split_once('}')?)));
    match braces {
        Some((start, (list, end))) => list.split(',').map(|one| format!("{start}{one}{end}")).collect(),
        None => vec![word.to_owned()],
    }
}

#[test]
fn every_path_exists() {
    crate::expect_none(Document::all().iter().flat_map(problems));
}

#[test]
fn paths_that_do_not_exist_are_found() {
    for (text, expected) in [
        ("`crates/lora-speck`", "crates/lora-speck does not exist"),
        ("`crates/lora-spec/src/{job,jib}.rs`", "{job,jib}.rs does not exist"),
        ("`tests/*.nothing`", "tests/*.nothing does not exist"),
        ("`nothing.rs`", "nothing.rs does not exist"),
        ("`tests/gpu/nothing.sh BIN_DIR`", "tests/gpu/nothing.sh does not exist"),
        ("```sh\nlora-worker --config configs/none.toml\n```", "configs/none.toml does not exist"),
    ] {
        crate::expect_problem(problems, text, expected);
    }
    crate::expect_sound(
        problems,
        "`crates/lora-spec/src/{job,keys}.rs` `tests/gpu/` `driver_*.cpp` `<op>.rs` `runs/dates` `a.json`",
    );
}
