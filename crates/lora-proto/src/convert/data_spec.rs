//! The section `data` of a job. Missing settings get the defaults of `lora-spec`.

use std::path::PathBuf;

use lora_spec::{DataSpec, FieldError};

use super::field::{count, enum_text, parse_enum, path_text};
use crate::v1;

impl TryFrom<v1::DataSpec> for DataSpec {
    type Error = FieldError;

    fn try_from(data: v1::DataSpec) -> Result<Self, FieldError> {
        let v1::DataSpec { train, eval, max_length, long_rows, shuffle } = data;
        let default = DataSpec::default();
        Ok(Self {
            train: train.map_or(default.train, PathBuf::from),
            eval: eval.map(PathBuf::from),
            max_length: count("data.max_length", max_length, default.max_length)?,
            long_rows: parse_enum("data.long_rows", long_rows, default.long_rows)?,
            shuffle: shuffle.unwrap_or(default.shuffle),
        })
    }
}

impl TryFrom<&DataSpec> for v1::DataSpec {
    type Error = FieldError;

    fn try_from(data: &DataSpec) -> Result<Self, FieldError> {
        Ok(Self {
            train: Some(path_text("data.train", &data.train)?),
            eval: data.eval.as_deref().map(|path| path_text("data.eval", path)).transpose()?,
            max_length: Some(data.max_length as u64),
            long_rows: enum_text(&data.long_rows),
            shuffle: Some(data.shuffle),
        })
    }
}
