//! Reads a job file, with errors that name file, line and field.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use crate::data_spec::is_template;
use crate::{FieldError, JobSpec};

/// A job file, with the line of each field.
#[derive(Debug, Clone)]
pub struct JobFile {
    /// The job, with absolute paths.
    pub job: JobSpec,
    path: PathBuf,
    lines: HashMap<String, u64>,
}

/// An error in a job file.
#[derive(Debug, thiserror::Error)]
pub enum JobFileError {
    /// The file cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The job file.
        path: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// The text is not valid YAML.
    #[error("{path}:{line}: {message}", path = path.display())]
    Syntax {
        /// The job file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// The parser's message.
        message: String,
    },
    /// A key is unknown, or a value is invalid.
    #[error("{path}:{line}: {error}", path = path.display())]
    Field {
        /// The job file.
        path: PathBuf,
        /// Line, from 1.
        line: u64,
        /// The error about the field.
        error: FieldError,
    },
}

impl JobFile {
    /// Reads and checks the job file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, is not valid YAML, or has an unknown key or an invalid value.
    pub fn read(path: &Path) -> Result<Self, JobFileError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| JobFileError::Io { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Parses and checks the text of the job file at `path`.
    ///
    /// # Errors
    /// The text is not valid YAML, or has an unknown key or an invalid value.
    pub fn parse(text: &str, path: &Path) -> Result<Self, JobFileError> {
        let syntax = |error: serde_saphyr::Error| JobFileError::Syntax {
            path: path.to_owned(),
            line: error.location().map_or(1, |l| l.line()),
            message: plain_message(&error),
        };
        let options = || {
            // NaN is refused by the checks of the job, which name the field.
            serde_saphyr::options! {
                with_snippet: false,
                non_finite_float_policy: serde_saphyr::options::NonFiniteFloatPolicy::PassThrough,
            }
        };
        let tree: Spanned<Node> = serde_saphyr::from_str_with_options(text, options()).map_err(syntax)?;
        let mut lines = HashMap::new();
        tree.value.collect_lines("", &mut lines);
        let located = |error: FieldError| located(error, path, &lines);
        crate::keys::check_known(&tree.value.keys("")).map_err(located)?;
        let mut job: JobSpec = serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
            let line = error.location().map_or(1, |l| l.line());
            let field = tree.value.field_at(line);
            let message = plain_message(&error);
            JobFileError::Field { path: path.to_owned(), line, error: FieldError::new(&field, message) }
        })?;
        let dir = std::path::absolute(path).ok().and_then(|p| p.parent().map(Path::to_owned));
        let dir = dir.unwrap_or_default();
        if let Some(file) = job.data.chat_template.take_if(|template| !is_template(template)) {
            let file = dir.join(file);
            let text = std::fs::read_to_string(&file).map_err(|error| {
                let message = format!("the file {} cannot be read: {error}", file.display());
                located(FieldError::new("data.chat_template", message))
            })?;
            job.data.chat_template = Some(text);
        }
        job.check().map_err(located)?;
        job.resolve_paths(&dir);
        Ok(Self { job, path: path.to_owned(), lines })
    }

    /// Adds file and line to an error about a field of this job.
    pub fn locate(&self, error: FieldError) -> JobFileError {
        located(error, &self.path, &self.lines)
    }
}

/// Adds file and line to an error about a field. A field that is not in the file gets the line of
/// the innermost section around it.
fn located(error: FieldError, path: &Path, lines: &HashMap<String, u64>) -> JobFileError {
    let mut field = error.field.as_str();
    let line = loop {
        match (lines.get(field), field.rfind('.')) {
            (Some(line), _) => break *line,
            (None, Some(dot)) => field = &field[..dot],
            (None, None) => break 1,
        }
    };
    JobFileError::Field { path: path.to_owned(), line, error }
}

/// The parser's messages that use words of Rust, and what they mean in a job file.
const PARSER_MESSAGES: [(&str, &str); 7] = [
    ("invalid floating point", "is not a number"),
    ("invalid boolean", "is not true or false"),
    ("cannot deserialize null", "has no value"),
    ("expected mapping start", "is not a section with keys"),
    ("expected sequence start", "is not a list"),
    ("expected string scalar", "is not a text"),
    ("duplicate mapping key,", "has a key twice; keep one"),
];

/// Returns the parser's message in the words of a job file, without the position, which
/// `JobFileError` has as a field.
fn plain_message(error: &serde_saphyr::Error) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default();
    let cut = first.find(" at line ").unwrap_or(first.len());
    let message = first[..cut].trim_start_matches("error: ");
    if let Some(rest) = message.strip_prefix("duplicate mapping key: ") {
        let key = rest.split(',').next().unwrap_or(rest);
        return format!("{key} is given twice; keep one");
    }
    // The types of the job's whole numbers.
    if ["invalid u32", "invalid u64", "invalid usize"].contains(&message) {
        return "is not a whole number of at least 0, or is too large".to_owned();
    }
    let known = PARSER_MESSAGES.iter().find(|(parser, _)| message.starts_with(parser));
    known.map_or(message, |(_, plain)| plain).to_owned()
}

/// The keys of a YAML text, with their lines.
enum Node {
    Map(Vec<(String, Spanned<Node>)>),
    Leaf,
}

impl Node {
    fn collect_lines(&self, prefix: &str, lines: &mut HashMap<String, u64>) {
        for (field, value) in self.fields(prefix) {
            lines.insert(field.clone(), value.defined.line());
            value.value.collect_lines(&field, lines);
        }
    }

    fn keys(&self, prefix: &str) -> Vec<(String, bool)> {
        self.fields(prefix)
            .flat_map(|(field, value)| {
                let section = matches!(value.value, Node::Map(_));
                let mut below = value.value.keys(&field);
                below.insert(0, (field, section));
                below
            })
            .collect()
    }

    /// Returns the field whose value starts on `line`, the most deeply nested one if there are
    /// several.
    fn field_at(&self, line: u64) -> String {
        let mut lines = HashMap::new();
        self.collect_lines("", &mut lines);
        let mut at: Vec<_> = lines.into_iter().filter(|(_, l)| *l == line).map(|(field, _)| field).collect();
        at.sort_by_key(|field| field.matches('.').count());
        at.pop().unwrap_or_else(|| "job".into())
    }

    fn fields<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (String, &'a Spanned<Node>)> {
        let entries = match self {
            Node::Map(entries) => entries.as_slice(),
            Node::Leaf => &[],
        };
        entries.iter().map(move |(key, value)| {
            (if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") }, value)
        })
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NodeVisitor;
        impl<'de> Visitor<'de> for NodeVisitor {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Node::Map(entries))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Node::Leaf)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
                Ok(Node::Leaf)
            }
            fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
                Ok(Node::Leaf)
            }
            fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
                Ok(Node::Leaf)
            }
            fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
                Ok(Node::Leaf)
            }
            fn visit_str<E>(self, _: &str) -> Result<Node, E> {
                Ok(Node::Leaf)
            }
            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Leaf)
            }
            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Leaf)
            }
        }
        deserializer.deserialize_any(NodeVisitor)
    }
}
