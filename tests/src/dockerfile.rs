//! A parser for the parts of `deploy/docker/Dockerfile` that the tests use.

use std::collections::BTreeMap;
use std::fs;

use crate::repository;

/// A build stage. Its instructions include those of the stages that it is based on, which come
/// first.
#[derive(Clone, Debug)]
pub struct Stage {
    /// The name, after `AS`.
    pub name: String,
    /// The external image that the stage is based on. `ARG`s are replaced by their values.
    pub base: String,
    /// Each instruction, and the rest of its line. Continued lines are joined.
    pub instructions: Vec<(String, String)>,
}

/// Returns the stages in the order of the file. `ARG`s before the first stage are replaced by their
/// values.
///
/// # Panics
/// If a stage has no name.
pub fn stages() -> Vec<Stage> {
    parse(&fs::read_to_string(repository().join("deploy/docker/Dockerfile")).unwrap())
}

/// Like [`stages`], for the given text.
pub fn parse(text: &str) -> Vec<Stage> {
    let mut arguments = BTreeMap::new();
    let mut stages: Vec<Stage> = Vec::new();
    for (instruction, rest) in instructions(text) {
        if instruction == "FROM" {
            let rest = fill_in(&rest, &arguments);
            let [base, _, name] = rest.split_whitespace().collect::<Vec<_>>()[..] else {
                panic!("invalid FROM {rest}: must be FROM BASE AS NAME");
            };
            let below = stages.iter().find(|stage| stage.name == base);
            let (base, instructions) = match below {
                Some(stage) => (stage.base.clone(), stage.instructions.clone()),
                None => (base.to_owned(), Vec::new()),
            };
            stages.push(Stage { name: name.to_owned(), base, instructions });
        } else if let Some(stage) = stages.last_mut() {
            stage.instructions.push((instruction, rest));
        } else if let Some((name, value)) = rest.split_once('=') {
            arguments.insert(name.to_owned(), value.to_owned());
        }
    }
    stages
}

impl Stage {
    /// Returns the rest of the last `instruction`; `None` if the stage does not have it.
    pub fn last(&self, instruction: &str) -> Option<&str> {
        self.all(instruction).last()
    }

    /// Returns the rest of each `instruction`.
    pub fn all(&self, instruction: &str) -> impl Iterator<Item = &str> {
        self.instructions.iter().filter(move |(name, _)| name == instruction).map(|(_, rest)| rest.as_str())
    }

    /// Returns the words of the `ENTRYPOINT`; empty if the stage has none.
    pub fn entrypoint(&self) -> Vec<String> {
        self.last("ENTRYPOINT").map(json_words).unwrap_or_default()
    }

    /// Returns the port and path of the `HEALTHCHECK`: `CMD ["healthcheck", PORT, PATH]`.
    pub fn healthcheck(&self) -> Option<(u16, String)> {
        let (_, command) = self.last("HEALTHCHECK")?.split_once("CMD ")?;
        match &json_words(command)[..] {
            [program, port, path] if program == "healthcheck" => Some((port.parse().unwrap(), path.clone())),
            other => panic!("{}: invalid health check {other:?}", self.name),
        }
    }

    /// Returns the value of a label.
    pub fn label(&self, name: &str) -> Option<&str> {
        let labels = self.all("LABEL").flat_map(|rest| rest.split("\" "));
        labels
            .filter_map(|label| label.trim().split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, v)| v.trim_matches('"'))
    }
}

fn json_words(text: &str) -> Vec<String> {
    serde_json::from_str(text.trim()).unwrap()
}

fn fill_in(text: &str, arguments: &BTreeMap<String, String>) -> String {
    arguments.iter().fold(text.to_owned(), |text, (name, value)| text.replace(&format!("${{{name}}}"), value))
}

fn instructions(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#') && !line.trim().is_empty());
    let mut joined: Vec<String> = vec![String::new()];
    for line in lines {
        let current = joined.last_mut().unwrap();
        match line.trim_end().strip_suffix('\\') {
            Some(part) => current.push_str(part),
            None => {
                current.push_str(line);
                joined.push(String::new());
            }
        }
    }
    let words = joined.iter().filter_map(|line| line.trim().split_once(' '));
    words.map(|(instruction, rest)| (instruction.to_owned(), rest.trim().to_owned())).collect()
}
