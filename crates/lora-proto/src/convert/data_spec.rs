//! The section `data` of a job. Missing settings get the defaults of `lora-spec`.

use std::path::PathBuf;

use lora_spec::{DataSpec, FieldError, RowFormat};

use super::field::{count, enum_text, parse_enum, path_text};
use crate::v1;

impl TryFrom<v1::DataSpec> for DataSpec {
    type Error = FieldError;

    fn try_from(data: v1::DataSpec) -> Result<Self, FieldError> {
        let default = DataSpec::default();
        let kwargs = |text: String| {
            serde_json::from_str(&text).map_err(|error| {
                FieldError::new("data.chat_template_kwargs", format!("is not a JSON object: {error}"))
            })
        };
        let format = |text| parse_enum("data.format", Some(text), RowFormat::Text);
        Ok(Self {
            train: data.train.into_iter().map(PathBuf::from).collect(),
            train_weights: data.train_weights,
            eval: data.eval.map(PathBuf::from),
            format: data.format.map(format).transpose()?,
            columns: data.columns.unwrap_or_default().columns.into_iter().collect(),
            system_prompt: data.system_prompt,
            chat_template: data.chat_template,
            chat_template_kwargs: data.chat_template_kwargs.map(kwargs).transpose()?.unwrap_or_default(),
            completion_only_loss: data.completion_only_loss.unwrap_or(default.completion_only_loss),
            assistant_only_loss: data.assistant_only_loss.unwrap_or(default.assistant_only_loss),
            split_turns: data.split_turns.unwrap_or(default.split_turns),
            max_length: count("data.max_length", data.max_length, default.max_length)?,
            long_rows: parse_enum("data.long_rows", data.long_rows, default.long_rows)?,
            packing: data.packing.unwrap_or(default.packing),
            shuffle: data.shuffle.unwrap_or(default.shuffle),
        })
    }
}

impl TryFrom<&DataSpec> for v1::DataSpec {
    type Error = FieldError;

    fn try_from(data: &DataSpec) -> Result<Self, FieldError> {
        let kwargs = &data.chat_template_kwargs;
        Ok(Self {
            train: data.train.iter().map(|path| path_text("data.train", path)).collect::<Result<_, _>>()?,
            train_weights: data.train_weights.clone(),
            eval: data.eval.as_deref().map(|path| path_text("data.eval", path)).transpose()?,
            format: data.format.as_ref().and_then(enum_text),
            columns: (!data.columns.is_empty())
                .then(|| v1::Columns { columns: data.columns.clone().into_iter().collect() }),
            system_prompt: data.system_prompt.clone(),
            chat_template: data.chat_template.clone(),
            chat_template_kwargs: (!kwargs.is_empty()).then(|| serde_json::json!(kwargs).to_string()),
            completion_only_loss: Some(data.completion_only_loss),
            assistant_only_loss: Some(data.assistant_only_loss),
            split_turns: Some(data.split_turns),
            max_length: Some(data.max_length as u64),
            long_rows: enum_text(&data.long_rows),
            packing: Some(data.packing),
            shuffle: Some(data.shuffle),
        })
    }
}
