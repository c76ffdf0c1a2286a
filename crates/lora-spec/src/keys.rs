//! Checks of the keys of a job file, with suggestions for unknown keys.

use serde_json::Value;

use crate::{FieldError, JobSpec, unsupported_keys};

/// Keys of other trainers, and the keys of a job file with the same meaning.
const FOREIGN_KEYS: &[(&str, &str)] = &[
    ("per_device_train_batch_size", "training.micro_batch_size"),
    ("train_batch_size", "training.global_batch_size"),
    ("batch_size", "training.global_batch_size"),
    ("gradient_accumulation_steps", "training.global_batch_size (rows of a step, over all workers)"),
    ("per_device_eval_batch_size", "training.micro_batch_size"),
    ("micro_batch", "training.micro_batch_size"),
    ("warmup_ratio", "training.warmup_steps (a value below 1 is a fraction)"),
    ("num_epochs", "training.num_train_epochs"),
    ("epochs", "training.num_train_epochs"),
    ("lr", "training.learning_rate"),
    ("lr_scheduler", "training.lr_scheduler_type"),
    ("gradient_checkpointing", "training.activation_checkpointing"),
    ("gradient_clipping", "training.max_grad_norm"),
    ("alpha", "adapter.lora_alpha"),
    ("dropout", "adapter.lora_dropout"),
    ("lora_r", "adapter.r"),
    ("lora_rank", "adapter.r"),
    ("rank", "adapter.r"),
    ("lora_target_modules", "adapter.target_modules"),
    ("lora_target", "adapter.target_modules"),
    ("modules", "adapter.target_modules"),
    ("adapter_name_or_path", "adapter.init_from"),
    ("loftq_config", "adapter.loftq_iter; the bits are those of model.quantization"),
    ("loftq_bits", "model.quantization: nf4 or int8"),
    ("pissa_init", "adapter.init_lora_weights: pissa"),
    ("base_model", "model.base"),
    ("model_name_or_path", "model.base"),
    ("base_model_name_or_path", "model.base"),
    ("torch_dtype", "model.dtype"),
    ("load_in_4bit", "model.quantization: nf4"),
    ("load_in_8bit", "model.quantization: int8"),
    ("bnb_4bit_quant_type", "model.quantization"),
    ("quantization_bit", "model.quantization"),
    ("bnb_4bit_compute_dtype", "model.dtype (the type of products on GPUs; on CPUs it is always f32)"),
    ("double_quantization", "model.bnb_4bit_use_double_quant"),
    ("max_seq_length", "data.max_length"),
    ("max_seq_len", "data.max_length"),
    ("sequence_len", "data.max_length"),
    ("cutoff_len", "data.max_length"),
    ("model_max_length", "data.max_length"),
    ("dataset", "data.train"),
    ("datasets", "data.train"),
    ("dataset_mixture", "data.train and data.train_weights"),
    ("interleave_probs", "data.train_weights (how often an epoch has the rows of each file)"),
    ("train_file", "data.train"),
    ("validation_file", "data.eval"),
    ("num_workers", "workers.max"),
    ("chat_template_path", "data.chat_template"),
    ("chat_template_jinja", "data.chat_template"),
    ("sample_packing", "data.packing"),
    ("default_system_message", "data.system_prompt"),
    ("default_system", "data.system_prompt"),
    ("train_on_inputs", TRAIN_ON_INPUTS),
    ("train_on_prompt", TRAIN_ON_INPUTS),
    ("dataset_text_field", "data.columns, which names the columns of a format's keys"),
    ("field_messages", "data.columns, which names the columns of a format's keys"),
    ("neat_packing", "data.packing"),
    ("excess_length_strategy", "data.long_rows"),
    ("enable_thinking", "data.chat_template_kwargs: {enable_thinking: true}"),
];

/// The settings that train what the model does not generate.
const TRAIN_ON_INPUTS: &str = "data.assistant_only_loss: false, which trains whole conversations, and \
                               data.completion_only_loss: false, which trains prompts";

/// Returns every key of a job file as a dotted path, and whether it is a section. A section comes
/// before its keys.
pub fn known_keys() -> Vec<(String, bool)> {
    let mut keys = Vec::new();
    if let Ok(Value::Object(sections)) = serde_json::to_value(JobSpec::default()) {
        for (name, value) in sections {
            keys.push((name.clone(), value.is_object()));
            if let Value::Object(fields) = value {
                keys.extend(fields.keys().map(|field| (format!("{name}.{field}"), false)));
            }
        }
    }
    keys
}

/// Returns an error for the first of `keys` that is not a key of a job. `keys` has dotted paths,
/// and whether their value is a mapping.
pub(crate) fn check_known(keys: &[(String, bool)]) -> Result<(), FieldError> {
    let known = known_keys();
    for (key, _) in keys {
        // Below these keys the names are the user's.
        if ["data.columns.", "data.chat_template_kwargs."].iter().any(|prefix| key.starts_with(prefix)) {
            continue;
        }
        if !known.iter().any(|(k, _)| k == key) {
            return Err(FieldError::new(key, format!("is not a key of a job; {}", suggestion(key, &known))));
        }
    }
    Ok(())
}

fn suggestion(key: &str, known: &[(String, bool)]) -> String {
    let last = |path: &str| path.rsplit('.').next().unwrap_or_default().to_owned();
    let name = last(key);
    if let Some((_, ours)) = FOREIGN_KEYS.iter().find(|(foreign, _)| *foreign == name) {
        return format!("use {ours}");
    }
    if let Some(remedy) = unsupported_keys::remedy(&name) {
        return remedy.to_owned();
    }
    if let Some((ours, _)) = known.iter().find(|(k, _)| last(k) == name) {
        return format!("it belongs at {ours}");
    }
    let section = key.rsplit_once('.').map_or("", |(section, _)| section);
    let siblings =
        known.iter().map(|(k, _)| k).filter(|k| k.rsplit_once('.').map_or("", |(s, _)| s) == section);
    let nearest = known
        .iter()
        .map(|(k, _)| (strsim::jaro_winkler(&last(k), &name), k))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((_, k)) => format!("did you mean {k}?"),
        None => format!("keys of this section: {}", siblings.map(|k| last(k)).collect::<Vec<_>>().join(", ")),
    }
}
