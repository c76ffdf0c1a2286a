//! The ranges of settings: the values at their bounds are valid, and an error prints every bound.

use std::path::Path;

use lora_spec::{JobFile, JobFileError, JobSpec};
use serde_json::Value;

/// A setting with a range.
struct RangedSetting {
    key: &'static str,
    /// The range, as an error prints it.
    range: &'static str,
    /// Values at the bounds, or far from zero if there is no upper bound.
    valid: [&'static str; 2],
    /// Values just outside of the range.
    invalid: &'static [&'static str],
}

const fn at_least_1(key: &'static str) -> RangedSetting {
    RangedSetting { key, range: "at least 1", valid: ["1", "1000000000000000"], invalid: &["0"] }
}

const fn fraction(key: &'static str) -> RangedSetting {
    RangedSetting {
        key,
        range: "a finite number of at least 0 and below 1",
        valid: ["0", "0.999999999"],
        invalid: &["-1e-9", "1", ".nan", ".inf"],
    }
}

const fn above_0(key: &'static str) -> RangedSetting {
    RangedSetting {
        key,
        range: "a finite number above 0",
        valid: ["1e-300", "1e300"],
        invalid: &["0", "-1", ".nan", ".inf"],
    }
}

/// Every setting with a range that does not depend on other settings.
const RANGED_SETTINGS: [RangedSetting; 21] = [
    RangedSetting {
        key: "adapter.r",
        range: "at least 1 and at most 4096",
        valid: ["1", "4096"],
        invalid: &["0", "4097"],
    },
    above_0("adapter.lora_alpha"),
    fraction("adapter.lora_dropout"),
    RangedSetting {
        key: "adapter.loftq_iter",
        range: "at least 1 and at most 100",
        valid: ["1", "100"],
        invalid: &["0", "101"],
    },
    at_least_1("data.max_length"),
    RangedSetting {
        key: "training.num_train_epochs",
        range: "a finite number above 0 and at most 1000000",
        valid: ["1e-9", "1e6"],
        invalid: &["0", "-1", "1000000.5", ".nan", ".inf"],
    },
    at_least_1("training.max_steps"),
    RangedSetting {
        key: "training.global_batch_size",
        range: "at least 1 and at most 1048576",
        valid: ["1", "1048576"],
        invalid: &["0", "1048577"],
    },
    above_0("training.learning_rate"),
    RangedSetting {
        key: "training.warmup_steps",
        range: "a finite number of at least 0 and at most 1000000000000000",
        valid: ["0", "1e15"],
        invalid: &["-1e-9", "1000000000000001", ".nan", ".inf"],
    },
    fraction("training.adam_beta1"),
    fraction("training.adam_beta2"),
    RangedSetting {
        key: "training.adam_epsilon",
        range: "a finite number above 0 and at most 1",
        valid: ["1e-300", "1"],
        invalid: &["0", "1.000001", "2", ".nan", ".inf"],
    },
    RangedSetting {
        key: "training.weight_decay",
        range: "a finite number of at least 0 and at most 1000",
        valid: ["0", "1000"],
        invalid: &["-1e-9", "1000.001", ".nan", ".inf"],
    },
    RangedSetting {
        key: "training.max_grad_norm",
        range: "a finite number of at least 0",
        valid: ["0", "1e300"],
        invalid: &["-1e-9", ".nan", ".inf"],
    },
    at_least_1("training.eval_steps"),
    at_least_1("training.save_steps"),
    at_least_1("training.save_total_limit"),
    at_least_1("training.logging_steps"),
    at_least_1("training.early_stopping_patience"),
    RangedSetting {
        key: "training.early_stopping_threshold",
        range: "a finite number of at least 0 and at most 1000000000",
        valid: ["0", "1e9"],
        invalid: &["-1e-9", "1000000000.5", ".nan", ".inf"],
    },
];

/// Numbers without such a range: every seed is valid, and other settings limit the others.
const OTHER_NUMBERS: [&str; 4] = ["training.seed", "training.micro_batch_size", "workers.min", "workers.max"];

/// Parses a job whose only unusual setting is `key`.
fn parse(key: &str, value: &str) -> Result<JobFile, JobFileError> {
    let (section, name) = key.split_once('.').unwrap_or_default();
    let mut sections = vec![
        ("model", "base: b, quantization: nf4".to_owned()),
        ("adapter", "init_lora_weights: loftq".to_owned()),
        ("data", "train: t, eval: e".to_owned()),
        // The smallest global batch has one row.
        ("training", "micro_batch_size: 1".to_owned()),
    ];
    for (known, keys) in &mut sections {
        if *known == section {
            *keys += &format!(", {name}: {value}");
        }
    }
    let sections = sections.into_iter().map(|(section, keys)| format!("{section}: {{{keys}}}\n"));
    JobFile::parse(&format!("name: a\n{}", sections.collect::<String>()), Path::new("job.yaml"))
}

#[test]
fn range_errors_print_every_bound() {
    for RangedSetting { key, range, valid, invalid } in &RANGED_SETTINGS {
        for value in valid {
            assert!(parse(key, value).is_ok(), "{key}: {value}");
        }
        for value in *invalid {
            let Err(error) = parse(key, value) else { panic!("{key}: {value} is accepted") };
            let error = error.to_string();
            let expected = format!("; it must be {range}");
            assert!(error.contains(&format!(" {key}: is ")) && error.ends_with(&expected), "{error}");
        }
    }
}

#[test]
fn every_number_of_a_job_has_a_tested_range() -> serde_json::Result<()> {
    let Value::Object(sections) = serde_json::to_value(JobSpec::default())? else { return Ok(()) };
    for (section, keys) in sections {
        for (name, default) in keys.as_object().into_iter().flatten() {
            let key = format!("{section}.{name}");
            let is_tested = RANGED_SETTINGS.iter().any(|setting| setting.key == key);
            let is_optional_number = default.is_null() && parse(&key, "1").is_ok();
            let is_number = default.is_number() || is_optional_number;
            let is_text = key == "data.system_prompt";
            assert!(is_text || !is_number || is_tested || OTHER_NUMBERS.contains(&key.as_str()), "{key}");
        }
    }
    Ok(())
}

#[test]
fn a_micro_batch_of_no_rows_gets_both_bounds() {
    let text = "name: a\nmodel: {base: b}\ndata: {train: t}\ntraining: {micro_batch_size: 0}\n";
    let error = JobFile::parse(text, Path::new("job.yaml")).map(|_| ()).unwrap_err().to_string();
    assert!(error.ends_with("is 0; it must be at least 1 and at most 32"), "{error}");
}
