//! Settings: the defaults of a type, changed by a TOML file, then by the environment, then by flags.
//!
//! A variable `LORA__SECTION__KEY` (two underscores) sets `section.key`; other variables, such as `LORA_COORDINATOR_PORT`,
//! which Kubernetes sets by itself, mean nothing. An unknown key is an error wherever it stands.

mod file;
mod suggestion;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use lora_spec::FieldError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

const PREFIX: &str = "LORA__";

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        source: io::Error,
    },
    /// The file is no TOML.
    #[error("{path}:{line}: {message}", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What the parser says.
        message: String,
    },
    /// A flag without a value.
    #[error("--set {0}: has no value; write --set section.key=value")]
    Flag(String),
    /// A key or a value is wrong.
    #[error("{origin}: {error}")]
    Setting {
        /// Where it was set.
        origin: SettingSource,
        /// The key, and what is wrong.
        error: FieldError,
    },
    /// A default does not go with what was set.
    #[error(transparent)]
    Default(FieldError),
}

/// Where a setting comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SettingSource {
    /// A line of the file.
    File {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// The environment variable of this name.
    Variable(String),
    /// `--set` with this text.
    Flag(String),
}

impl SettingSource {
    /// How `key` is spelled here.
    fn key_as_written(&self, key: &str) -> String {
        match self {
            Self::Variable(_) => format!("{PREFIX}{}", key.to_uppercase().replace('.', "__")),
            Self::File { .. } | Self::Flag(_) => key.to_owned(),
        }
    }
}

impl fmt::Display for SettingSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => write!(f, "environment variable {name}"),
            Self::Flag(text) => write!(f, "--set {text}"),
        }
    }
}

/// The settings of this process: those of `file`, then of the environment, then of `sets` (`section.key=value` each). `check`
/// then looks at the values.
///
/// Sections of `T` are structs with a default for each field; no field is an `Option`, and lists are of texts.
///
/// # Errors
/// What is wrong and where it was set, in one line.
pub fn load<T: DeserializeOwned + Serialize + Default>(
    file: Option<&Path>,
    sets: &[String],
    check: impl FnOnce(&T) -> Result<(), FieldError>,
) -> Result<T, ConfigError> {
    let variables = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
    load_from(file, variables, sets, check)
}

/// Like [`load`], with these environment variables.
///
/// # Errors
/// What is wrong and where it was set, in one line.
pub fn load_from<T: DeserializeOwned + Serialize + Default>(
    file: Option<&Path>,
    variables: impl Iterator<Item = (String, String)>,
    sets: &[String],
    check: impl FnOnce(&T) -> Result<(), FieldError>,
) -> Result<T, ConfigError> {
    let defaults = defaults::<T>();
    let mut layers =
        Layers { tree: defaults.clone(), defaults, settings: T::default(), origins: BTreeMap::new() };
    if let Some(path) = file {
        for entry in file::read(path)? {
            if entry.value.is_table() && layers.is_section(&entry.key) {
                continue;
            }
            let origin = SettingSource::File { path: path.to_owned(), line: entry.line };
            layers.set(&entry.key, origin, |_| Ok(entry.value))?;
        }
    }
    let ours = variables.filter_map(|(name, value)| {
        let key = name.strip_prefix(PREFIX)?.to_lowercase().replace("__", ".");
        Some((name, (key, value)))
    });
    for (name, (key, value)) in ours.collect::<BTreeMap<_, _>>() {
        layers.set(&key, SettingSource::Variable(name), |default| parse_like(&value, default))?;
    }
    for set in sets {
        let (key, value) = set.split_once('=').ok_or_else(|| ConfigError::Flag(set.clone()))?;
        layers
            .set(key.trim(), SettingSource::Flag(set.clone()), |default| parse_like(value.trim(), default))?;
    }
    check(&layers.settings).map_err(|error| match layers.origins.remove(&error.field) {
        Some(origin) => ConfigError::Setting { origin, error },
        None => ConfigError::Default(error),
    })?;
    Ok(layers.settings)
}

/// Every setting of `T`: `section.key`.
pub fn known_keys<T: Serialize + Default>() -> Vec<String> {
    leaves(&defaults::<T>())
}

fn defaults<T: Serialize + Default>() -> Table {
    match Value::try_from(T::default()) {
        Ok(Value::Table(table)) => table,
        _ => Table::new(),
    }
}

/// Dotted keys of everything in `table` that is no table.
fn leaves(table: &Table) -> Vec<String> {
    let mut keys = Vec::new();
    for (key, value) in table {
        match value {
            Value::Table(section) => {
                keys.extend(leaves(section).into_iter().map(|below| format!("{key}.{below}")));
            }
            _ => keys.push(key.clone()),
        }
    }
    keys
}

/// Settings, while one after the other is applied.
struct Layers<T> {
    defaults: Table,
    tree: Table,
    /// What `tree` means.
    settings: T,
    /// Where settings that are no defaults come from.
    origins: BTreeMap<String, SettingSource>,
}

impl<T: DeserializeOwned> Layers<T> {
    fn is_section(&mut self, key: &str) -> bool {
        find(&mut self.defaults, key).is_some_and(|default| default.is_table())
    }

    /// Sets `key` to the value that `given` makes, for which it gets the default.
    fn set(
        &mut self,
        key: &str,
        origin: SettingSource,
        given: impl FnOnce(&Value) -> Result<Value, String>,
    ) -> Result<(), ConfigError> {
        let applied = match find(&mut self.defaults, key) {
            Some(default) if !default.is_table() => {
                let default = default.clone();
                given(&default).and_then(|value| self.apply(key, value, &default))
            }
            _ => Err(suggestion::unknown_key_message(key, &leaves(&self.defaults), |key| {
                origin.key_as_written(key)
            })),
        };
        applied.map_err(|message| ConfigError::Setting {
            origin: origin.clone(),
            error: FieldError::new(key, message),
        })?;
        self.origins.insert(key.to_owned(), origin);
        Ok(())
    }

    fn apply(&mut self, key: &str, value: Value, default: &Value) -> Result<(), String> {
        let whole_for_a_number = default.is_float() && value.is_integer();
        if !value.same_type(default) && !whole_for_a_number {
            return Err(format!("is {}; it must be {}", one_line(&value), type_name(default)));
        }
        let given = one_line(&value);
        if let Some(place) = find(&mut self.tree, key) {
            *place = value;
        }
        // What was applied before is right, so what is wrong now is this value.
        self.settings = T::deserialize(self.tree.clone()).map_err(|error| {
            format!("is {given}: {}; the default is {}", error.message(), one_line(default))
        })?;
        Ok(())
    }
}

fn find<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        Some((section, rest)) => find(table.get_mut(section)?.as_table_mut()?, rest),
        None => table.get_mut(key),
    }
}

/// The value that `text` stands for where `default` has the right type.
fn parse_like(text: &str, default: &Value) -> Result<Value, String> {
    let wrong = || format!("is {text:?}; it must be {}", type_name(default));
    match default {
        Value::Boolean(_) => text.parse().map(Value::Boolean).map_err(|_| wrong()),
        Value::Integer(_) => text.parse().map(Value::Integer).map_err(|_| wrong()),
        Value::Float(_) => text.parse().map(Value::Float).map_err(|_| wrong()),
        Value::Array(_) => {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            Ok(Value::Array(parts.map(Value::from).collect()))
        }
        _ => Ok(Value::from(text)),
    }
}

/// What a value of the type of `default` is.
fn type_name(default: &Value) -> &'static str {
    match default {
        Value::Boolean(_) => "true or false",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Array(_) => "a list of texts, such as [\"a\", \"b\"]",
        _ => "a text in quotes",
    }
}

/// A value in one line.
fn one_line(value: &Value) -> String {
    match value {
        Value::Table(_) => "a section".to_owned(),
        value => value.to_string().replace('\n', " "),
    }
}
