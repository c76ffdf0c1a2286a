//! Names of the files of a base, an adapter and a result.

/// The settings of a model, in a base.
pub const MODEL_CONFIG: &str = "config.json";
/// The default settings of generation, in a base.
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// The weights of a base that are in one file.
pub const MODEL_WEIGHTS: &str = "model.safetensors";
/// The list of the files that hold the weights of a base.
pub const MODEL_WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// The tokenizer of a base.
pub const TOKENIZER: &str = "tokenizer.json";
/// The settings of a tokenizer, in a base.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// The chat template of a base.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The directory of a base's further chat templates.
pub const CHAT_TEMPLATES: &str = "additional_chat_templates";
/// All files that `save_pretrained` of a tokenizer writes in Transformers, besides those in
/// [`CHAT_TEMPLATES`].
pub const TOKENIZER_FILES: [&str; 9] = [
    TOKENIZER,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    CHAT_TEMPLATE,
];

/// The settings of an adapter, as PEFT names them.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The weights of an adapter, as PEFT names them.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// The description of an adapter's training, in a result. It is written last: a result that has it
/// is complete.
pub const RECEIPT: &str = "receipt.json";
/// The metrics of the steps, in a result.
pub const METRICS: &str = "metrics.jsonl";
/// The settings of the job, in a result.
pub const JOB: &str = "job.yaml";
