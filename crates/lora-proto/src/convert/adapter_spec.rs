//! The section `adapter` of a job. Missing settings get the defaults of `lora-spec`.

use std::path::PathBuf;

use lora_spec::{AdapterSpec, FieldError, TargetModules};

use super::field::{count, parse_enum, path_text};
use crate::v1;
use crate::v1::target_modules::Value;

impl TryFrom<v1::AdapterSpec> for AdapterSpec {
    type Error = FieldError;

    fn try_from(adapter: v1::AdapterSpec) -> Result<Self, FieldError> {
        let v1::AdapterSpec {
            r,
            lora_alpha,
            lora_dropout,
            target_modules,
            use_rslora,
            init_lora_weights,
            loftq_iter,
            init_from,
        } = adapter;
        let default = AdapterSpec::default();
        Ok(Self {
            r: count("adapter.r", r, default.r)?,
            lora_alpha: lora_alpha.unwrap_or(default.lora_alpha),
            lora_dropout: lora_dropout.unwrap_or(default.lora_dropout),
            target_modules: target_modules.map_or(Ok(default.target_modules), TargetModules::try_from)?,
            use_rslora: use_rslora.unwrap_or(default.use_rslora),
            init_lora_weights: parse_enum(
                "adapter.init_lora_weights",
                init_lora_weights,
                default.init_lora_weights,
            )?,
            loftq_iter: loftq_iter.unwrap_or(default.loftq_iter),
            init_from: init_from.map(PathBuf::from),
        })
    }
}

impl TryFrom<&AdapterSpec> for v1::AdapterSpec {
    type Error = FieldError;

    fn try_from(adapter: &AdapterSpec) -> Result<Self, FieldError> {
        let init_from = adapter.init_from.as_deref();
        Ok(Self {
            r: Some(adapter.r as u64),
            lora_alpha: Some(adapter.lora_alpha),
            lora_dropout: Some(adapter.lora_dropout),
            target_modules: Some((&adapter.target_modules).into()),
            use_rslora: Some(adapter.use_rslora),
            init_lora_weights: Some(adapter.init_lora_weights.to_string()),
            loftq_iter: Some(adapter.loftq_iter),
            init_from: init_from.map(|path| path_text("adapter.init_from", path)).transpose()?,
        })
    }
}

impl TryFrom<v1::TargetModules> for TargetModules {
    type Error = FieldError;

    fn try_from(modules: v1::TargetModules) -> Result<Self, FieldError> {
        match modules.value {
            Some(Value::Pattern(pattern)) => Ok(Self::Pattern(pattern)),
            Some(Value::Names(list)) => Ok(Self::Names(list.names)),
            None => {
                let message = "has neither pattern nor names; set one of them".to_owned();
                Err(FieldError::new("adapter.target_modules", message))
            }
        }
    }
}

impl From<&TargetModules> for v1::TargetModules {
    fn from(modules: &TargetModules) -> Self {
        let value = match modules {
            TargetModules::Pattern(pattern) => Value::Pattern(pattern.clone()),
            TargetModules::Names(names) => Value::Names(v1::ModuleNames { names: names.clone() }),
        };
        Self { value: Some(value) }
    }
}
