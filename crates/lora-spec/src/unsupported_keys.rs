//! Keys of other trainers for which a job file has no key, and what to do instead.

/// Each key with the reason why it is unknown, and the remedy.
const UNSUPPORTED_KEYS: &[(&str, &str)] = &[
    ("use_dora", "DoRA is not supported; remove the key to train plain LoRA"),
    ("use_qalora", "QA-LoRA is not supported; remove the key to train plain LoRA"),
    ("bias", "trained biases are not supported; remove the key"),
    ("lora_bias", "trained biases are not supported; remove the key"),
    ("modules_to_save", "fully trained modules are not supported; remove the key"),
    ("trainable_token_indices", "trained tokens are not supported; remove the key"),
    ("rank_pattern", "one rank for all modules is supported; remove the key, and set adapter.r"),
    ("alpha_pattern", "one alpha for all modules is supported; remove the key, and set adapter.lora_alpha"),
    ("layers_to_transform", "write a regular expression of full names in adapter.target_modules"),
    ("layers_pattern", "write a regular expression of full names in adapter.target_modules"),
    ("exclude_modules", "name the modules to adapt in adapter.target_modules"),
    ("peft_type", "every adapter is a LoRA adapter; remove the key"),
    ("task_type", "every job trains a causal language model; remove the key"),
    ("finetuning_type", "every job trains a LoRA adapter; remove the key"),
    ("group_by_length", "rows of a step are sorted by length anyway; remove the key"),
    ("neftune_noise_alpha", "NEFTune is not supported; remove the key"),
    ("label_smoothing_factor", "label smoothing is not supported; remove the key"),
    ("bf16", "use model.dtype"),
    ("fp16", "f16 is not supported; use model.dtype: bf16"),
    ("deepspeed", "the base is on every worker, so nothing is sharded; remove the key"),
    ("fsdp", "the base is on every worker, so nothing is sharded; remove the key"),
    ("output_dir", "use the flag --out of loractl run"),
    ("report_to", "metrics are in metrics.jsonl; remove the key"),
    ("eval_strategy", "evaluations run every training.eval_steps steps; remove the key"),
    ("evaluation_strategy", "evaluations run every training.eval_steps steps; remove the key"),
    ("save_strategy", "checkpoints are saved every training.save_steps steps; remove the key"),
    ("logging_strategy", "metrics are logged every training.logging_steps steps; remove the key"),
    ("metric_for_best_model", "the best adapter is the one with the lowest eval_loss; remove the key"),
    ("greater_is_better", "the best adapter is the one with the lowest eval_loss; remove the key"),
    ("val_set_size", "write the evaluation rows to a file, and name it in data.eval"),
    ("eval_packing", "evaluation rows are packed like the others (data.packing); remove the key"),
    ("max_samples", "every row of data.train is used; remove the key"),
    ("template", "the base's chat template is used, or the file that data.chat_template names"),
    ("mask_history", "give the other messages a weight of 0; remove the key"),
    ("roles_to_train", "the assistant's turns are trained (data.assistant_only_loss); remove the key"),
    ("train_on_eos", "the token that ends a trained turn is trained; remove the key"),
    ("dataset_dir", "the paths of data.train start from the job file's directory; remove the key"),
    ("dataset_num_proc", "rows are tokenized on all cores; remove the key"),
    ("preprocessing_num_workers", "rows are tokenized on all cores; remove the key"),
    ("dataset_prepared_path", "tokens are kept in the user's cache directory; remove the key"),
    ("streaming", "tokens are kept in memory, 4 bytes each; remove the key"),
    ("resume_from_checkpoint", "use the flag --resume of loractl run"),
];

/// Returns why a key of another trainer is unknown, and the remedy.
pub(crate) fn remedy(name: &str) -> Option<&'static str> {
    UNSUPPORTED_KEYS.iter().find(|(key, _)| *key == name).map(|(_, remedy)| *remedy)
}

#[cfg(test)]
mod tests {
    use super::UNSUPPORTED_KEYS;

    #[test]
    fn no_key_of_a_job_is_unsupported() {
        let known = crate::known_keys();
        for (key, remedy) in UNSUPPORTED_KEYS {
            assert!(!known.iter().any(|(path, _)| path.rsplit('.').next() == Some(key)), "{key}");
            let named = known.iter().filter(|(path, section)| !section && remedy.contains(path.as_str()));
            let names_a_section =
                ["adapter.", "training.", "model.", "data."].iter().any(|s| remedy.contains(s));
            assert_eq!(named.count() > 0, names_a_section, "{key}: {remedy}");
        }
    }
}
