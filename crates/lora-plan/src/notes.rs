//! Notes of a plan: settings without effect, and consequences of settings that users may not
//! expect.

use lora_data::{DataReport, Dataset};
use lora_spec::{
    AdapterSpec, DataSpec, InitLoraWeights, JobSpec, LinearModule, LongRows, LrSchedulerType,
    MAX_CONCURRENT_DECOMPOSITIONS, ModelConfig, Quantization, RowFormat,
};

use crate::serving_notes::serving_notes;

/// Returns the estimated seconds for the singular value decompositions of the adapted weights, with
/// [`MAX_CONCURRENT_DECOMPOSITIONS`] of them at a time; `None` if the initialization needs none.
fn decomposition_seconds(adapter: &AdapterSpec, config: &ModelConfig) -> Option<f64> {
    /// Seconds for a matrix of n x n divided by n^3, measured for 1024 and 2048 on one processor
    /// (Zen 5).
    const SECONDS: f64 = 1.2e-10;
    let rounds = match adapter.init_lora_weights {
        InitLoraWeights::Pissa => 1,
        InitLoraWeights::Loftq => adapter.loftq_iter,
        _ => return None,
    };
    let cost = |m: &LinearModule| {
        let (short, long) =
            (m.in_features.min(m.out_features) as f64, m.in_features.max(m.out_features) as f64);
        short * short * long
    };
    let all: f64 = adapter.modules(config).ok()?.iter().map(cost).sum();
    Some(f64::from(rounds) * all * SECONDS / MAX_CONCURRENT_DECOMPOSITIONS as f64)
}

/// Returns the note about a head that differs from the embedding although `config.json` ties them.
pub(crate) fn untied_note(is_untied: bool) -> Option<String> {
    is_untied.then(|| {
        "config.json ties the head to the embedding (tie_word_embeddings), but the base stores another \
         lm_head.weight; the stored head is used, as in Transformers 5, while other programs may ignore it; \
         loractl merge writes tie_word_embeddings: false"
            .into()
    })
}

/// Returns the notes about `job` over these training rows.
pub(crate) fn notes(job: &JobSpec, config: &ModelConfig, train: &Dataset) -> Vec<String> {
    let mut notes = Vec::new();
    let training = &job.training;
    if training.lr_scheduler_type == LrSchedulerType::Constant && training.warmup_steps > 0.0 {
        notes.push(
            "training.warmup_steps has no effect with lr_scheduler_type constant (see constant_with_warmup)"
                .into(),
        );
    }
    if training.optim.is_paged() {
        notes.push(
            "training.optim: paging has no effect on CPUs, where moments are in the host's memory anyway"
                .into(),
        );
    }
    if train.report.longest > config.max_position_embeddings {
        notes.push(format!(
            "the longest row has {} tokens, more than the base's max_position_embeddings {}",
            train.report.longest, config.max_position_embeddings
        ));
    }
    let init = job.adapter.init_lora_weights;
    if init.subtracts_initial() {
        notes.push(format!(
            "init_lora_weights: {init} exports an adapter of rank {} for the unchanged base, which is \
             twice the trained rank",
            job.adapter.exported().r
        ));
    }
    if let Some(seconds) = decomposition_seconds(&job.adapter, config).filter(|seconds| *seconds > 60.0) {
        let faster =
            if init == InitLoraWeights::Pissa { "; pissa_niter_4 takes a fraction of that" } else { "" };
        notes.push(format!(
            "init_lora_weights: {init} decomposes the adapted weights before the first step, which takes \
             about {:.0} minutes on four processors{faster}",
            (seconds / 60.0).ceil()
        ));
    }
    if job.base_layout().loftq.is_some() {
        notes.push(
            "loftq_iter above 1 trains over a requantized base, which only this job's result describes; \
             serve the result with loractl merge"
                .into(),
        );
    }
    // The caller has resolved the modules without an error.
    let quantization = match job.base_layout().loftq {
        Some(_) => Quantization::None,
        None => job.model.format().quantization,
    };
    notes.extend(serving_notes(
        &job.adapter,
        quantization,
        &job.adapter.modules(config).unwrap_or_default(),
        &config.linear_modules(),
    ));
    notes
}

/// Returns the notes about the rows of a job: what is not trained as they say, and settings without
/// effect.
pub fn data_notes(data: &DataSpec, train: &Dataset, eval: Option<&Dataset>) -> Vec<String> {
    let mut notes = train.notes();
    notes.extend(unused_data_settings(data, &train.report));
    let of_eval = eval.iter().flat_map(|eval| eval.notes());
    notes.extend(of_eval.map(|note| format!("evaluation rows: {note}")));
    if eval.is_some_and(|eval| eval.sha256 == train.sha256) {
        notes.push("data.eval has the rows of data.train: eval_loss says nothing about other rows".into());
    }
    notes.extend(equal_files(train));
    let problems = [Some(train), eval].into_iter().flatten().flat_map(|dataset| &dataset.cache_problems);
    notes.extend(problems.cloned());
    notes
}

/// Returns the notes about training files that are equal to one before.
fn equal_files(train: &Dataset) -> impl Iterator<Item = String> {
    train.files.iter().enumerate().filter_map(|(index, file)| {
        let earlier = train.files[..index].iter().find(|earlier| earlier.sha256 == file.sha256)?;
        let (name, earlier) = (file.name.display(), earlier.name.display());
        Some(format!("{name} has the same rows as {earlier}: an epoch has them for both"))
    })
}

/// Returns the notes about settings of the section `data` without effect on these rows.
fn unused_data_settings(data: &DataSpec, report: &DataReport) -> Vec<String> {
    let mut notes = Vec::new();
    let others = report.rows_read - report.conversations;
    if data.system_prompt.is_some() && others > 0 {
        notes.push(format!(
            "data.system_prompt has no effect on the {others} of {} rows that are not conversations",
            report.rows_read
        ));
    }
    if data.system_prompt.is_some() && report.conversations > 0 && report.system_prompts == 0 {
        notes.push(
            "data.system_prompt has no effect: every conversation begins with a system prompt of its own"
                .into(),
        );
    }
    for (key, column) in &data.columns {
        if !report.renamed_columns.contains_key(key) {
            notes.push(format!("data.columns.{key} has no effect: no row has the column {column:?}"));
        }
    }
    match data.long_rows {
        LongRows::Drop if report.dropped > 0 => notes.push(format!(
            "{} of {} rows are longer than data.max_length {} and are dropped",
            report.dropped, report.rows_read, data.max_length
        )),
        LongRows::Truncate if report.truncated > 0 => notes.push(format!(
            "{} of {} rows are longer than data.max_length {} and are truncated",
            report.truncated, report.rows_read, data.max_length
        )),
        _ => {}
    }
    for (setting, is_set) in [
        ("chat_template", data.chat_template.is_some()),
        ("chat_template_kwargs", !data.chat_template_kwargs.is_empty()),
        ("split_turns", data.split_turns),
        ("assistant_only_loss", !data.assistant_only_loss),
    ] {
        if is_set && report.conversations == 0 {
            notes.push(format!("data.{setting} has no effect: no row is a conversation"));
        }
    }
    if !data.completion_only_loss && !report.formats.contains_key(&RowFormat::PromptCompletion) {
        notes.push("data.completion_only_loss has no effect: no row has prompt and completion".into());
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_settings_without_effect_are_noted() {
        let notes = |data: &DataSpec, conversations, formats: &[RowFormat]| {
            let formats = formats.iter().map(|format| (*format, 1)).collect();
            let system_prompts = usize::from(conversations == 1);
            let report =
                DataReport { rows_read: 3, conversations, formats, system_prompts, ..DataReport::default() };
            unused_data_settings(data, &report).join("\n")
        };
        let mut data = DataSpec::default();
        assert_eq!(notes(&data, 0, &[]), "");
        data.system_prompt = Some("S".into());
        let expected = "data.system_prompt has no effect on the 2 of 3 rows that are not conversations";
        assert_eq!(notes(&data, 1, &[]), expected);
        let own =
            "data.system_prompt has no effect: every conversation begins with a system prompt of its own";
        assert_eq!(notes(&data, 3, &[]), own);
        data = DataSpec { split_turns: true, ..DataSpec::default() };
        (data.completion_only_loss, data.assistant_only_loss) = (false, false);
        data.chat_template = Some("{{ messages }}".into());
        data.chat_template_kwargs.insert("a".into(), 1.into());
        for setting in [
            "chat_template",
            "chat_template_kwargs",
            "split_turns",
            "assistant_only_loss",
            "completion_only_loss",
        ] {
            let expected = format!("data.{setting} has no effect: ");
            assert!(notes(&data, 0, &[RowFormat::Text]).contains(&expected), "{setting}");
            assert_eq!(notes(&data, 3, &[RowFormat::PromptCompletion]), "");
        }
    }

    #[test]
    fn unused_columns_and_long_rows_are_noted() {
        let mut report = DataReport { rows_read: 3, truncated: 1, dropped: 2, ..DataReport::default() };
        let mut data = DataSpec { long_rows: LongRows::Drop, max_length: 7, ..DataSpec::default() };
        data.columns.insert("prompt".into(), "question".into());
        data.columns.insert("text".into(), "body".into());
        report.renamed_columns.insert("text".into(), 3);
        assert_eq!(
            unused_data_settings(&data, &report),
            [
                "data.columns.prompt has no effect: no row has the column \"question\"",
                "2 of 3 rows are longer than data.max_length 7 and are dropped",
            ]
        );
        data.long_rows = LongRows::Truncate;
        let last = unused_data_settings(&data, &report).pop().unwrap();
        assert_eq!(last, "1 of 3 rows are longer than data.max_length 7 and are truncated");
    }

    #[test]
    fn decomposition_time_grows_cubically() {
        let config = |hidden: usize, mlp: usize| {
            ModelConfig::parse(&format!(
                r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": {hidden},
                "intermediate_size": {mlp}, "vocab_size": 50, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 4}}"#
            ))
            .unwrap()
        };
        let of = |init_lora_weights, loftq_iter, config: &ModelConfig| {
            let adapter = AdapterSpec { init_lora_weights, loftq_iter, ..AdapterSpec::default() };
            decomposition_seconds(&adapter, config)
        };
        let small = config(64, 128);
        // Four weights of 64 x 64 and three of 64 x 128; four are decomposed at a time.
        let cubes = (4 * 64 * 64 * 64 + 3 * 64 * 64 * 128) as f64;
        assert_eq!(of(InitLoraWeights::Pissa, 1, &small), Some(cubes * 1.2e-10 / 4.0));
        assert_eq!(of(InitLoraWeights::Loftq, 5, &small), Some(5.0 * cubes * 1.2e-10 / 4.0));
        assert_eq!(of(InitLoraWeights::Olora, 1, &small), None);
        assert_eq!(of(InitLoraWeights::Default, 1, &small), None);
    }
}
