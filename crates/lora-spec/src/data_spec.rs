//! The section `data` of a job.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::range::check_count;
use crate::{FieldError, RowFormat, TrainFiles};

/// Variables that a chat template has already.
pub const TEMPLATE_VARIABLES: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// The largest weight of a file.
const MAX_WEIGHT: f64 = 1000.0;

/// The training and evaluation data of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSpec {
    /// Files with training rows: JSON, CSV, Parquet or Arrow IPC.
    pub train: TrainFiles,
    /// How often an epoch has the rows of each file; empty: once. For a fractional part, an epoch
    /// has that share of the rows once more, chosen at random.
    pub train_weights: Vec<f64>,
    /// File with evaluation rows; `None`: no evaluation.
    pub eval: Option<PathBuf>,
    /// The format of all rows; `None`: each row's keys decide.
    pub format: Option<RowFormat>,
    /// The keys of the rows under which they have the keys of a format, such as
    /// `{prompt: question}`.
    pub columns: BTreeMap<String, String>,
    /// The system prompt of conversations that do not begin with one.
    pub system_prompt: Option<String>,
    /// The text of a chat template that replaces the base's. In a job file it may be the name of a
    /// file.
    pub chat_template: Option<String>,
    /// Variables of the chat template, such as `enable_thinking`.
    pub chat_template_kwargs: Map<String, Value>,
    /// Train only the completion of a row of `prompt` and `completion`; otherwise the prompt too.
    pub completion_only_loss: bool,
    /// Train only the assistant's turns of a conversation; otherwise all its tokens.
    pub assistant_only_loss: bool,
    /// Make a sample of each assistant's turn: the conversation up to this turn, of which only the
    /// turn is trained.
    pub split_turns: bool,
    /// Maximum number of tokens of a row.
    pub max_length: usize,
    /// The handling of longer rows.
    pub long_rows: LongRows,
    /// Put several rows of a step into one of `max_length` tokens, so that little padding is
    /// computed. It does not change which rows a step has.
    pub packing: bool,
    /// Shuffle the rows again in each epoch (with `training.seed`).
    pub shuffle: bool,
}

impl Default for DataSpec {
    fn default() -> Self {
        Self {
            train: TrainFiles::default(),
            train_weights: Vec::new(),
            eval: None,
            format: None,
            columns: BTreeMap::new(),
            system_prompt: None,
            chat_template: None,
            chat_template_kwargs: Map::new(),
            completion_only_loss: true,
            assistant_only_loss: true,
            split_turns: false,
            max_length: 512,
            long_rows: LongRows::Error,
            packing: false,
            shuffle: true,
        }
    }
}

/// The handling of rows longer than `max_length`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongRows {
    /// Refuse the job with an error that names the rows.
    #[default]
    Error,
    /// Truncate the rows at the right end.
    Truncate,
    /// Drop the rows.
    Drop,
}

impl DataSpec {
    /// Checks every value that can be checked without reading a file.
    pub(crate) fn check(&self) -> Result<(), FieldError> {
        if self.train.is_empty() || self.train.iter().any(|path| path.as_os_str().is_empty()) {
            return Err(FieldError::new("data.train", "is missing".into()));
        }
        let (files, weights) = (self.train.len(), &self.train_weights);
        if let Some(twice) = (1..files).find(|&i| self.train[..i].contains(&self.train[i])) {
            let message = format!(
                "{} is listed twice; to take its rows twice, set data.train_weights",
                self.train[twice].display()
            );
            return Err(FieldError::new("data.train", message));
        }
        if !weights.is_empty() && weights.len() != files {
            let message = format!("has {} numbers, but data.train has {files} files", weights.len());
            return Err(FieldError::new("data.train_weights", message));
        }
        if let Some(weight) = weights.iter().find(|weight| !(**weight > 0.0 && **weight <= MAX_WEIGHT)) {
            let message = format!("has {weight}; a weight is above 0 and at most {MAX_WEIGHT}");
            return Err(FieldError::new("data.train_weights", message));
        }
        if let Some(key) = self.columns.keys().find(|key| !RowFormat::KEYS.contains(&key.as_str())) {
            let known = RowFormat::KEYS.join(", ");
            let message = format!("{key:?} is not a key of a format; the keys are {known}");
            return Err(FieldError::new("data.columns", message));
        }
        let twice = self
            .columns
            .iter()
            .find(|(key, column)| self.columns.iter().any(|(other, same)| *key < other && *column == same));
        if let Some((_, column)) = twice {
            let message = format!("has the column {column:?} for several keys; name it once");
            return Err(FieldError::new("data.columns", message));
        }
        if self.system_prompt.as_ref().is_some_and(String::is_empty) {
            return Err(FieldError::new("data.system_prompt", "is empty; leave it out".into()));
        }
        if self.chat_template.as_ref().is_some_and(|template| !is_template(template)) {
            let message = "is not a chat template: it has neither {{ nor {%".to_owned();
            return Err(FieldError::new("data.chat_template", message));
        }
        if let Some(name) =
            self.chat_template_kwargs.keys().find(|name| TEMPLATE_VARIABLES.contains(&&***name))
        {
            let message = format!("{name} is set by the row; name another variable");
            return Err(FieldError::new("data.chat_template_kwargs", message));
        }
        if self.split_turns && !self.assistant_only_loss {
            let message = "is false, which trains whole conversations, but data.split_turns: true makes a \
                           sample of each turn; remove one of the two";
            return Err(FieldError::new("data.assistant_only_loss", message.into()));
        }
        check_count("data.max_length", self.max_length as u64, 1..)
    }
}

/// Returns whether a setting is the text of a template, not the name of a file.
pub(crate) fn is_template(text: &str) -> bool {
    text.contains("{{") || text.contains("{%")
}
