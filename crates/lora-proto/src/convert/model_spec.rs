//! The section `model` of a job. Missing settings get the defaults of `lora-spec`.

use std::path::PathBuf;

use lora_spec::{FieldError, ModelSpec};

use super::field::{enum_text, parse_enum, path_text};
use crate::v1;

impl TryFrom<v1::ModelSpec> for ModelSpec {
    type Error = FieldError;

    fn try_from(model: v1::ModelSpec) -> Result<Self, FieldError> {
        let v1::ModelSpec { base, dtype, quantization, bnb_4bit_use_double_quant } = model;
        let default = ModelSpec::default();
        Ok(Self {
            base: base.map_or(default.base, PathBuf::from),
            dtype: parse_enum("model.dtype", dtype, default.dtype)?,
            quantization: parse_enum("model.quantization", quantization, default.quantization)?,
            bnb_4bit_use_double_quant: bnb_4bit_use_double_quant.unwrap_or(default.bnb_4bit_use_double_quant),
        })
    }
}

impl TryFrom<&ModelSpec> for v1::ModelSpec {
    type Error = FieldError;

    fn try_from(model: &ModelSpec) -> Result<Self, FieldError> {
        Ok(Self {
            base: Some(path_text("model.base", &model.base)?),
            dtype: enum_text(&model.dtype),
            quantization: enum_text(&model.quantization),
            bnb_4bit_use_double_quant: Some(model.bnb_4bit_use_double_quant),
        })
    }
}
