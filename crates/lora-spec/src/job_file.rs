//! Reads a job file, with errors that name file, line and field.

use std::collections::HashMap;
use std::ffi::OsStr;
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
        if tree.value.keys().is_empty() {
            let message = "has no keys; a job has at least name, model and data".to_owned();
            return Err(JobFileError::Syntax { path: path.to_owned(), line: 1, message });
        }
        let lines = tree.value.lines();
        let located = |error: FieldError| located(error, path, &lines);
        crate::keys::check_known(&tree.value.keys()).map_err(located)?;
        let mut job: JobSpec = serde_saphyr::from_str_with_options(text, options()).map_err(|error| {
            let (line, column) = error.location().map_or((1, 1), |l| (l.line(), l.column()));
            let field = tree.value.field_at((line, column));
            let fraction = field.as_ref().and_then(Field::fraction_message);
            let field = field.map_or_else(|| "job".to_owned(), |field| field.path);
            let message = fraction.unwrap_or_else(|| plain_message(&error));
            JobFileError::Field { path: path.to_owned(), line, error: FieldError::new(&field, message) }
        })?;
        check_not_shell_syntax(&job).map_err(located)?;
        tree.value.check_variables(text).map_err(located)?;
        let dir = directory(path).unwrap_or_default();
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

    /// Returns the absolute path of the directory of the file, from which relative paths start.
    pub fn dir(&self) -> Option<PathBuf> {
        directory(&self.path)
    }

    /// Adds file and line to an error about a field of this job.
    pub fn locate(&self, error: FieldError) -> JobFileError {
        located(error, &self.path, &self.lines)
    }
}

/// Checks that no path starts with what only a shell expands: `~` or a variable.
fn check_not_shell_syntax(job: &JobSpec) -> Result<(), FieldError> {
    let paths = [("model.base", &job.model.base)].into_iter();
    let paths = paths
        .chain(job.adapter.init_from.as_ref().map(|path| ("adapter.init_from", path)))
        .chain(job.data.train.iter().map(|path| ("data.train", path)))
        .chain(job.data.eval.as_ref().map(|path| ("data.eval", path)));
    for (field, path) in paths {
        let first = path.iter().next().and_then(OsStr::to_str).unwrap_or_default();
        if first.starts_with(['~', '$']) {
            let message = format!(
                "{first} is not expanded; write the whole path, or one relative to the job file \
                 (./{first} for a name)"
            );
            return Err(FieldError::new(field, message));
        }
    }
    Ok(())
}

/// Returns the absolute path of the directory of a file.
fn directory(file: &Path) -> Option<PathBuf> {
    std::path::absolute(file).ok()?.parent().map(Path::to_owned)
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
const PARSER_MESSAGES: [(&str, &str); 9] = [
    ("multiple YAML documents", "has several YAML documents; write one job in a file"),
    ("invalid floating point", "is not a number"),
    ("invalid boolean", "is not true or false"),
    ("cannot deserialize null", "has no value"),
    ("externally tagged enum expected", "is not a text"),
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
    if ["invalid u32", "invalid u64", "invalid usize", "invalid i64"].contains(&message) {
        return "is not a whole number of at least 0, or is too large".to_owned();
    }
    if let Some((value, values)) =
        message.strip_prefix("unknown variant ").and_then(|rest| rest.split_once(", expected "))
    {
        let values = values.trim_start_matches("one of ").replace('`', "");
        return format!("{} is not supported; supported: {values}", value.replace('`', "\""));
    }
    if let Some((_, expected)) =
        message.strip_prefix("invalid type: ").and_then(|rest| rest.split_once(", expected "))
    {
        return format!("must be {expected}");
    }
    let known = PARSER_MESSAGES.iter().find(|(parser, _)| message.starts_with(parser));
    known.map_or(message, |(_, plain)| plain).to_owned()
}

/// The keys of a YAML text, with their positions.
enum Node {
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
    Float(f64),
    Other,
}

impl Node {
    /// Returns the line of each field.
    fn lines(&self) -> HashMap<String, u64> {
        self.all_fields("").into_iter().map(|field| (field.path, field.value.defined.line())).collect()
    }

    /// Returns each field, and whether it is a section.
    fn keys(&self) -> Vec<(String, bool)> {
        let with_kind = |field: Field| {
            let is_section = matches!(field.value.value, Self::Map(_));
            (field.path, is_section)
        };
        self.all_fields("").into_iter().map(with_kind).collect()
    }

    /// Checks that the values of `data.chat_template_kwargs`, which have no type of their own, are
    /// not scalars that YAML parsers read in different ways.
    fn check_variables(&self, text: &str) -> Result<(), FieldError> {
        const SECTION: &str = "data.chat_template_kwargs";
        for Field { path, value, .. } in self.all_fields("") {
            let name = path.strip_prefix(SECTION).and_then(|rest| rest.strip_prefix('.'));
            let scalar = plain_scalar(text, value.referenced.line(), value.referenced.column());
            if let (Some(name), true) = (name, is_ambiguous(scalar)) {
                let message = format!(
                    "{name} is {scalar}, which YAML parsers read in different ways; write true or false, a \
                     decimal number, or put it in quotes"
                );
                return Err(FieldError::new(SECTION, message));
            }
        }
        Ok(())
    }

    /// Returns the field at a position (line and column), and its value: the last field that starts
    /// at or before the position.
    fn field_at(&self, position: (u64, u64)) -> Option<Field<'_>> {
        let start = |field: &Field| (field.key.referenced.line(), field.key.referenced.column());
        self.all_fields("")
            .into_iter()
            .filter(|field| start(field) <= position)
            .max_by_key(|field| start(field))
    }

    /// Returns all fields. A section comes before its fields.
    fn all_fields(&self, prefix: &str) -> Vec<Field<'_>> {
        let Self::Map(entries) = self else { return Vec::new() };
        let mut all = Vec::new();
        for (key, value) in entries {
            let name = &key.value;
            let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
            let below = value.value.all_fields(&path);
            all.push(Field { path, key, value });
            all.extend(below);
        }
        all
    }
}

/// The text of a scalar without quotes at a position.
fn plain_scalar(text: &str, line: u64, column: u64) -> &str {
    let line = text.lines().nth(line.saturating_sub(1) as usize).unwrap_or_default();
    let start = line.char_indices().nth(column.saturating_sub(1) as usize).map_or(line.len(), |(at, _)| at);
    let rest = &line[start..];
    rest.split([',', '}', ']', '#']).next().unwrap_or_default().trim()
}

/// Whether a scalar is a boolean, an octal number or a text, depending on the version of YAML, or
/// is a number that JSON does not have.
fn is_ambiguous(scalar: &str) -> bool {
    let digits = scalar.trim_start_matches(['-', '+']);
    let is_octal = digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit());
    let number = digits.to_ascii_lowercase();
    is_octal || ["y", "n"].contains(&number.as_str()) || [".inf", ".nan"].contains(&number.as_str())
}

/// A field of a YAML text.
struct Field<'a> {
    /// Dotted path.
    path: String,
    key: &'a Spanned<String>,
    value: &'a Spanned<Node>,
}

impl Field<'_> {
    /// Returns the error about a value that is a fraction of all steps, where Transformers has such
    /// values and a job file does not.
    fn fraction_message(&self) -> Option<String> {
        const FIELDS: [&str; 3] = ["training.eval_steps", "training.save_steps", "training.logging_steps"];
        match self.value.value {
            Node::Float(value) if FIELDS.contains(&self.path.as_str()) && value > 0.0 && value < 1.0 => {
                Some(format!(
                    "is {value}; a fraction of all steps is not supported; write the number of steps, a \
                     whole number of at least 1"
                ))
            }
            _ => None,
        }
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
                Ok(Node::Other)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
                Ok(Node::Other)
            }
            fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
                Ok(Node::Other)
            }
            fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
                Ok(Node::Other)
            }
            fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Float(value))
            }
            fn visit_str<E>(self, _: &str) -> Result<Node, E> {
                Ok(Node::Other)
            }
            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Other)
            }
            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Other)
            }
        }
        deserializer.deserialize_any(NodeVisitor)
    }
}
