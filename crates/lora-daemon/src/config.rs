//! Settings: the defaults of a type, overridden by a TOML file, then by environment variables, then
//! by flags.
//!
//! A variable `LORA__SECTION__KEY` (two underscores) sets `section.key`. Other variables are
//! ignored, for example `LORA_COORDINATOR_PORT`, which Kubernetes sets itself. An unknown key is an
//! error in every source.

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

/// Prefix of environment variables that are settings.
const PREFIX: &str = "LORA__";

/// An error while loading settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{path}:{line}: {message}", path = path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// The parser's message.
        message: String,
    },
    /// A flag has no value.
    #[error("--set {0}: has no value; write --set section.key=value")]
    Flag(String),
    /// A key or a value is invalid.
    #[error("{origin}: {error}")]
    Setting {
        /// The source of the setting.
        origin: SettingSource,
        /// The key, and what is wrong with it.
        error: FieldError,
    },
    /// A default is invalid together with other settings.
    #[error(transparent)]
    Default(FieldError),
}

/// The source of a setting.
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
    /// Spells `key` as in this source.
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

/// Loads the settings of this process: applies `file`, then the environment, then `sets`
/// (`section.key=value` each), and then calls `check`.
///
/// Sections of `T` must be structs with a default for each field. Fields must not be `Option`s, and
/// lists must contain strings.
///
/// # Errors
/// A setting is invalid. The message is one line, with the source of the setting.
pub fn load<T: DeserializeOwned + Serialize + Default>(
    file: Option<&Path>,
    sets: &[String],
    check: impl FnOnce(&T) -> Result<(), FieldError>,
) -> Result<T, ConfigError> {
    let variables = std::env::vars_os()
        .map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()));
    load_from(file, variables, sets, check)
}

/// Like [`load`], with the given environment variables.
///
/// # Errors
/// Those of [`load`].
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

/// Returns the keys of all settings of `T`, as `section.key`.
pub fn known_keys<T: Serialize + Default>() -> Vec<String> {
    leaves(&defaults::<T>())
}

fn defaults<T: Serialize + Default>() -> Table {
    match Value::try_from(T::default()) {
        Ok(Value::Table(table)) => table,
        _ => Table::new(),
    }
}

/// Returns the dotted keys of all values in `table` that are not tables.
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

/// The settings while the sources are applied one after the other.
struct Layers<T> {
    defaults: Table,
    tree: Table,
    /// The settings of `tree`.
    settings: T,
    /// The sources of all settings that are not defaults.
    origins: BTreeMap<String, SettingSource>,
}

impl<T: DeserializeOwned> Layers<T> {
    fn is_section(&mut self, key: &str) -> bool {
        find(&mut self.defaults, key).is_some_and(|default| default.is_table())
    }

    /// Sets `key` to the value that `given` returns for the default.
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
        let is_integer_for_float = default.is_float() && value.is_integer();
        if !value.same_type(default) && !is_integer_for_float {
            return Err(format!("is {}; it must be {}", one_line(&value), type_name(default)));
        }
        let given = one_line(&value);
        if let Some(slot) = find(&mut self.tree, key) {
            *slot = value;
        }
        // All earlier settings are valid, so an error is about this value.
        self.settings = T::deserialize(self.tree.clone()).map_err(|error| {
            format!("is {given}: {}; the default is {}", error.message(), one_line(default))
        })?;
        Ok(())
    }
}

/// Returns the value of a dotted key.
fn find<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        Some((section, rest)) => find(table.get_mut(section)?.as_table_mut()?, rest),
        None => table.get_mut(key),
    }
}

/// Parses `text` as a value with the type of `default`.
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

/// Describes the values with the type of `default`.
fn type_name(default: &Value) -> &'static str {
    match default {
        Value::Boolean(_) => "true or false",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Array(_) => "a list of strings, such as [\"a\", \"b\"]",
        _ => "a string in quotes",
    }
}

/// Formats a value in one line.
fn one_line(value: &Value) -> String {
    match value {
        Value::Table(_) => "a section".to_owned(),
        value => value.to_string().replace('\n', " "),
    }
}
