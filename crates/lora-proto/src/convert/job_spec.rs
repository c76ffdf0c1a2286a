//! The settings of a job. Missing settings get the defaults of `lora-spec`.

use lora_spec::{FieldError, JobSpec};

use crate::v1;

/// The revision of the job settings that this build supports. It is raised with every new setting,
/// and with every new value of a setting, which an older coordinator would not know.
const SETTINGS_REVISION: u32 = 3;

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
            model: model.unwrap_or_default().try_into()?,
            adapter: adapter.unwrap_or_default().try_into()?,
            data: data.unwrap_or_default().try_into()?,
            training: training.unwrap_or_default().try_into()?,
            workers: workers.unwrap_or_default().try_into()?,
        })
    }
}

impl TryFrom<&JobSpec> for v1::JobSpec {
    type Error = FieldError;

    /// Converts the job with every setting set. A path that is not UTF-8 is an error.
    fn try_from(job: &JobSpec) -> Result<Self, FieldError> {
        let JobSpec { name, model, adapter, data, training, workers } = job;
        Ok(Self {
            name: Some(name.clone()),
            model: Some(model.try_into()?),
            adapter: Some(adapter.try_into()?),
            data: Some(data.try_into()?),
            training: Some(training.into()),
            workers: Some(workers.into()),
            revision: Some(SETTINGS_REVISION),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use lora_spec::{
        ActivationCheckpointing, AdapterSpec, BaseDtype, DataSpec, InitLoraWeights, LongRows,
        LrSchedulerType, ModelSpec, Optim, QuantizationType, TargetModules, TrainingSpec, WorkersSpec,
    };
    use prost::Message;
    use prost_types::FileDescriptorSet;
    use prost_types::field_descriptor_proto::Label;

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
                train: ["/t.jsonl".into(), "/other.jsonl".into()].into_iter().collect(),
                train_weights: vec![1.0, 0.5],
                eval: Some("/e.jsonl".into()),
                format: Some(lora_spec::RowFormat::AlpacaChat),
                columns: [("input".to_owned(), "question".to_owned())].into(),
                system_prompt: Some("Be brief.".into()),
                chat_template: Some("{{ messages }}".into()),
                chat_template_kwargs: [("enable_thinking".to_owned(), true.into())].into_iter().collect(),
                completion_only_loss: false,
                assistant_only_loss: false,
                split_turns: true,
                max_length: 7,
                long_rows: LongRows::Drop,
                packing: true,
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
                // A missing list is an empty one.
                let can_be_missing = field.proto3_optional() || field.label() == Label::Repeated;
                assert!(can_be_missing, "{}.{}", section.name(), field.name());
                keys.push((format!("{}.{}", section.name(), field.name()), false));
            }
        }
        assert_eq!(keys, lora_spec::known_keys());
    }
}
