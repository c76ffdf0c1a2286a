//! Conversions between `lora_spec::JobSpec` and its message. Missing settings get the defaults of
//! `lora-spec`.

use std::path::{Path, PathBuf};

use lora_spec::{
    AdapterSpec, DataSpec, FieldError, JobSpec, ModelSpec, TargetModules, TrainingSpec, WorkersSpec,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde::de::value::{Error as WordError, StringDeserializer};

use crate::v1;

/// The revision of the job settings that this build supports. It is raised with every new setting,
/// and with every new value of a setting, which an older coordinator would not know.
const SETTINGS_REVISION: u32 = 2;

impl TryFrom<v1::JobSpec> for JobSpec {
    type Error = FieldError;

    /// Converts the message without checking values; `JobSpec::check` checks them.
    fn try_from(job: v1::JobSpec) -> Result<Self, FieldError> {
        let v1::JobSpec { name, model, adapter, data, training, workers, revision } = job;
        if let Some(newer) = revision.filter(|revision| *revision > SETTINGS_REVISION) {
            let message = format!(
                "is {newer}, but this coordinator supports settings up to revision \
                 {SETTINGS_REVISION}; upgrade the coordinator, or use an older client"
            );
            return Err(FieldError::new("revision", message));
        }
        Ok(Self {
            name: name.unwrap_or_default(),
            model: model_spec(model.unwrap_or_default())?,
            adapter: adapter_spec(adapter.unwrap_or_default())?,
            data: data_spec(data.unwrap_or_default())?,
            training: training_spec(training.unwrap_or_default())?,
            workers: workers_spec(workers.unwrap_or_default())?,
        })
    }
}

fn model_spec(model: v1::ModelSpec) -> Result<ModelSpec, FieldError> {
    let v1::ModelSpec { base, dtype, quantization, bnb_4bit_use_double_quant } = model;
    let default = ModelSpec::default();
    Ok(ModelSpec {
        base: base.map_or(default.base, PathBuf::from),
        dtype: parse_enum("model.dtype", dtype, default.dtype)?,
        quantization: parse_enum("model.quantization", quantization, default.quantization)?,
        bnb_4bit_use_double_quant: bnb_4bit_use_double_quant.unwrap_or(default.bnb_4bit_use_double_quant),
    })
}

fn adapter_spec(adapter: v1::AdapterSpec) -> Result<AdapterSpec, FieldError> {
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
    Ok(AdapterSpec {
        r: count("adapter.r", r, default.r)?,
        lora_alpha: lora_alpha.unwrap_or(default.lora_alpha),
        lora_dropout: lora_dropout.unwrap_or(default.lora_dropout),
        target_modules: match target_modules.map(|t| t.value) {
            None => default.target_modules,
            Some(Some(v1::target_modules::Value::Pattern(pattern))) => TargetModules::Pattern(pattern),
            Some(Some(v1::target_modules::Value::Names(list))) => TargetModules::Names(list.names),
            Some(None) => {
                let message = "has neither pattern nor names; set one of them".to_owned();
                return Err(FieldError::new("adapter.target_modules", message));
            }
        },
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

fn data_spec(data: v1::DataSpec) -> Result<DataSpec, FieldError> {
    let v1::DataSpec { train, eval, max_length, long_rows, shuffle } = data;
    let default = DataSpec::default();
    Ok(DataSpec {
        train: train.map_or(default.train, PathBuf::from),
        eval: eval.map(PathBuf::from),
        max_length: count("data.max_length", max_length, default.max_length)?,
        long_rows: parse_enum("data.long_rows", long_rows, default.long_rows)?,
        shuffle: shuffle.unwrap_or(default.shuffle),
    })
}

fn training_spec(training: v1::TrainingSpec) -> Result<TrainingSpec, FieldError> {
    let default = TrainingSpec::default();
    let t = training;
    Ok(TrainingSpec {
        num_train_epochs: t.num_train_epochs.unwrap_or(default.num_train_epochs),
        max_steps: t.max_steps,
        global_batch_size: count(
            "training.global_batch_size",
            t.global_batch_size,
            default.global_batch_size,
        )?,
        micro_batch_size: count("training.micro_batch_size", t.micro_batch_size, default.micro_batch_size)?,
        learning_rate: t.learning_rate.unwrap_or(default.learning_rate),
        lr_scheduler_type: parse_enum(
            "training.lr_scheduler_type",
            t.lr_scheduler_type,
            default.lr_scheduler_type,
        )?,
        warmup_steps: t.warmup_steps.unwrap_or(default.warmup_steps),
        optim: parse_enum("training.optim", t.optim, default.optim)?,
        adam_beta1: t.adam_beta1.unwrap_or(default.adam_beta1),
        adam_beta2: t.adam_beta2.unwrap_or(default.adam_beta2),
        adam_epsilon: t.adam_epsilon.unwrap_or(default.adam_epsilon),
        weight_decay: t.weight_decay.unwrap_or(default.weight_decay),
        max_grad_norm: t.max_grad_norm.unwrap_or(default.max_grad_norm),
        seed: t.seed.unwrap_or(default.seed),
        activation_checkpointing: parse_enum(
            "training.activation_checkpointing",
            t.activation_checkpointing,
            default.activation_checkpointing,
        )?,
        eval_steps: t.eval_steps.unwrap_or(default.eval_steps),
        save_steps: t.save_steps.unwrap_or(default.save_steps),
        save_total_limit: count("training.save_total_limit", t.save_total_limit, default.save_total_limit)?,
        logging_steps: t.logging_steps.unwrap_or(default.logging_steps),
        load_best_model_at_end: t.load_best_model_at_end.unwrap_or(default.load_best_model_at_end),
        early_stopping_patience: t.early_stopping_patience,
        early_stopping_threshold: t.early_stopping_threshold.unwrap_or(default.early_stopping_threshold),
    })
}

fn workers_spec(workers: v1::WorkersSpec) -> Result<WorkersSpec, FieldError> {
    let v1::WorkersSpec { min, max } = workers;
    let default = WorkersSpec::default();
    Ok(WorkersSpec {
        min: count("workers.min", min, default.min)?,
        max: count("workers.max", max, default.max)?,
    })
}

impl TryFrom<&JobSpec> for v1::JobSpec {
    type Error = FieldError;

    /// Converts the job with every setting set. A path that is not UTF-8 is an error.
    fn try_from(job: &JobSpec) -> Result<Self, FieldError> {
        let JobSpec { name, model, adapter, data, training, workers } = job;
        Ok(Self {
            name: Some(name.clone()),
            model: Some(v1::ModelSpec {
                base: Some(path_text("model.base", &model.base)?),
                dtype: enum_text(&model.dtype),
                quantization: enum_text(&model.quantization),
                bnb_4bit_use_double_quant: Some(model.bnb_4bit_use_double_quant),
            }),
            adapter: Some(v1::AdapterSpec {
                r: Some(adapter.r as u64),
                lora_alpha: Some(adapter.lora_alpha),
                lora_dropout: Some(adapter.lora_dropout),
                target_modules: Some(v1::TargetModules {
                    value: Some(match &adapter.target_modules {
                        TargetModules::Pattern(pattern) => {
                            v1::target_modules::Value::Pattern(pattern.clone())
                        }
                        TargetModules::Names(names) => {
                            v1::target_modules::Value::Names(v1::ModuleNames { names: names.clone() })
                        }
                    }),
                }),
                use_rslora: Some(adapter.use_rslora),
                init_lora_weights: Some(adapter.init_lora_weights.to_string()),
                loftq_iter: Some(adapter.loftq_iter),
                init_from: adapter
                    .init_from
                    .as_deref()
                    .map(|p| path_text("adapter.init_from", p))
                    .transpose()?,
            }),
            data: Some(v1::DataSpec {
                train: Some(path_text("data.train", &data.train)?),
                eval: data.eval.as_deref().map(|p| path_text("data.eval", p)).transpose()?,
                max_length: Some(data.max_length as u64),
                long_rows: enum_text(&data.long_rows),
                shuffle: Some(data.shuffle),
            }),
            training: Some(training_message(training)),
            workers: Some(v1::WorkersSpec { min: Some(workers.min as u64), max: Some(workers.max as u64) }),
            revision: Some(SETTINGS_REVISION),
        })
    }
}

fn training_message(t: &TrainingSpec) -> v1::TrainingSpec {
    v1::TrainingSpec {
        num_train_epochs: Some(t.num_train_epochs),
        max_steps: t.max_steps,
        global_batch_size: Some(t.global_batch_size as u64),
        micro_batch_size: Some(t.micro_batch_size as u64),
        learning_rate: Some(t.learning_rate),
        lr_scheduler_type: enum_text(&t.lr_scheduler_type),
        warmup_steps: Some(t.warmup_steps),
        optim: enum_text(&t.optim),
        adam_beta1: Some(t.adam_beta1),
        adam_beta2: Some(t.adam_beta2),
        adam_epsilon: Some(t.adam_epsilon),
        weight_decay: Some(t.weight_decay),
        max_grad_norm: Some(t.max_grad_norm),
        seed: Some(t.seed),
        activation_checkpointing: enum_text(&t.activation_checkpointing),
        eval_steps: Some(t.eval_steps),
        save_steps: Some(t.save_steps),
        save_total_limit: Some(t.save_total_limit as u64),
        logging_steps: Some(t.logging_steps),
        load_best_model_at_end: Some(t.load_best_model_at_end),
        early_stopping_patience: t.early_stopping_patience,
        early_stopping_threshold: Some(t.early_stopping_threshold),
    }
}

fn count(field: &str, value: Option<u64>, default: usize) -> Result<usize, FieldError> {
    value.map_or(Ok(default), |value| {
        usize::try_from(value)
            .map_err(|_| FieldError::new(field, format!("{value} is too large for this machine")))
    })
}

fn parse_enum<T: DeserializeOwned>(field: &str, value: Option<String>, default: T) -> Result<T, FieldError> {
    value.map_or(Ok(default), |value| {
        T::deserialize(StringDeserializer::<WordError>::new(value))
            .map_err(|error| FieldError::new(field, error.to_string()))
    })
}

/// Returns the serialized name of a unit variant.
fn enum_text(value: &impl Serialize) -> Option<String> {
    serde_json::to_value(value).ok().and_then(|v| v.as_str().map(str::to_owned))
}

fn path_text(field: &str, path: &Path) -> Result<String, FieldError> {
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| FieldError::new(field, format!("{} is not UTF-8", path.display())))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use lora_spec::{
        ActivationCheckpointing, BaseDtype, InitLoraWeights, LongRows, LrSchedulerType, Optim,
        QuantizationType,
    };
    use prost::Message;
    use prost_types::FileDescriptorSet;

    use super::*;

    /// Returns a job in which every setting differs from its default.
    fn unusual() -> JobSpec {
        JobSpec {
            name: "dates".into(),
            model: ModelSpec {
                base: "/m".into(),
                dtype: BaseDtype::Bf16,
                quantization: QuantizationType::Nf4,
                bnb_4bit_use_double_quant: true,
            },
            adapter: AdapterSpec {
                r: 3,
                lora_alpha: 1.5,
                lora_dropout: 0.25,
                target_modules: TargetModules::Names(vec!["q_proj".into(), "v_proj".into()]),
                use_rslora: true,
                init_lora_weights: InitLoraWeights::PissaNiter(4),
                loftq_iter: 5,
                init_from: Some("/a".into()),
            },
            data: DataSpec {
                train: "/t.jsonl".into(),
                eval: Some("/e.jsonl".into()),
                max_length: 7,
                long_rows: LongRows::Drop,
                shuffle: false,
            },
            training: TrainingSpec {
                num_train_epochs: 0.5,
                max_steps: Some(9),
                global_batch_size: 6,
                micro_batch_size: 2,
                learning_rate: 0.1,
                lr_scheduler_type: LrSchedulerType::ConstantWithWarmup,
                warmup_steps: 5.0,
                optim: Optim::PagedAdamw8bit,
                adam_beta1: 0.8,
                adam_beta2: 0.99,
                adam_epsilon: 1e-6,
                weight_decay: 0.01,
                max_grad_norm: 0.5,
                seed: u64::MAX,
                activation_checkpointing: ActivationCheckpointing::Block,
                eval_steps: 3,
                save_steps: 4,
                save_total_limit: 2,
                logging_steps: 10,
                load_best_model_at_end: true,
                early_stopping_patience: Some(2),
                early_stopping_threshold: 0.001,
            },
            workers: WorkersSpec { min: 2, max: 3 },
        }
    }

    #[test]
    fn a_job_round_trips_through_its_message() {
        for job in [unusual(), JobSpec { name: "plain".into(), ..JobSpec::default() }] {
            let bytes = v1::JobSpec::try_from(&job).unwrap().encode_to_vec();
            let message = v1::JobSpec::decode(bytes.as_slice()).unwrap();
            assert_eq!(JobSpec::try_from(message).unwrap(), job);
        }
    }

    #[test]
    fn the_test_job_sets_every_key() {
        let (ours, default) =
            (serde_json::to_value(unusual()).unwrap(), serde_json::to_value(JobSpec::default()).unwrap());
        for (key, section) in lora_spec::known_keys() {
            let pointer = format!("/{}", key.replace('.', "/"));
            assert!(section || ours.pointer(&pointer) != default.pointer(&pointer), "{key}");
        }
    }

    #[test]
    fn missing_settings_get_the_defaults() {
        assert_eq!(JobSpec::try_from(v1::JobSpec::default()).unwrap(), JobSpec::default());
    }

    #[test]
    fn an_unknown_enum_value_names_the_field_and_the_choices() {
        let training =
            v1::TrainingSpec { lr_scheduler_type: Some("cosin".into()), ..v1::TrainingSpec::default() };
        let error =
            JobSpec::try_from(v1::JobSpec { training: Some(training), ..Default::default() }).unwrap_err();
        assert_eq!(error.field, "training.lr_scheduler_type");
        assert!(error.message.contains("cosin") && error.message.contains("constant_with_warmup"), "{error}");
    }

    #[test]
    fn settings_of_a_newer_revision_are_rejected() {
        let newer = v1::JobSpec { revision: Some(SETTINGS_REVISION + 1), ..v1::JobSpec::default() };
        assert_eq!(JobSpec::try_from(newer).unwrap_err().field, "revision");
        assert!(JobSpec::try_from(v1::JobSpec::default()).is_ok());
    }

    #[test]
    fn target_modules_without_a_value_are_rejected() {
        let adapter = v1::AdapterSpec {
            target_modules: Some(v1::TargetModules { value: None }),
            ..v1::AdapterSpec::default()
        };
        let error =
            JobSpec::try_from(v1::JobSpec { adapter: Some(adapter), ..Default::default() }).unwrap_err();
        assert_eq!(error.field, "adapter.target_modules");
    }

    #[test]
    fn non_utf8_paths_are_rejected() {
        let mut job = unusual();
        job.data.eval = Some(OsStr::from_bytes(b"/e\xff").into());
        assert_eq!(v1::JobSpec::try_from(&job).unwrap_err().field, "data.eval");
    }

    #[test]
    fn proto_fields_match_job_file_keys_and_are_optional() {
        let set = FileDescriptorSet::decode(crate::DESCRIPTORS).unwrap();
        let messages: Vec<_> = set.file.iter().flat_map(|file| &file.message_type).collect();
        let fields = |name: &str| messages.iter().find(|m| m.name() == name).unwrap().field.clone();
        let mut keys = Vec::new();
        for section in fields("JobSpec").into_iter().filter(|field| field.name() != "revision") {
            assert!(section.proto3_optional(), "{}", section.name());
            let is_message = section.type_name.as_deref().and_then(|t| t.rsplit('.').next());
            keys.push((section.name().to_owned(), is_message.is_some()));
            for field in is_message.into_iter().flat_map(fields) {
                assert!(field.proto3_optional(), "{}.{}", section.name(), field.name());
                keys.push((format!("{}.{}", section.name(), field.name()), false));
            }
        }
        assert_eq!(keys, lora_spec::known_keys());
    }
}
