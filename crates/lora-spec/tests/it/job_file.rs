//! Job files: defaults, and errors that name file, line, field and remedy.

use std::path::Path;

use lora_spec::{JobFile, JobSpec, LongRows, LrSchedulerType, Optim, TargetModules};

const HEAD: &str = "name: dates\nmodel: {base: base}\ndata: {train: rows.jsonl}\n";

fn error(text: &str) -> String {
    JobFile::parse(text, Path::new("/jobs/job.yaml")).unwrap_err().to_string()
}

#[test]
fn paths_are_relative_to_the_job_file_and_missing_keys_have_defaults() {
    let text = format!("{HEAD}training:\n  lr_scheduler_type: constant_with_warmup\n  learning_rate: 1e-3\n");
    let job = JobFile::parse(&text, Path::new("/jobs/job.yaml")).unwrap().job;
    assert_eq!(job.model.base, Path::new("/jobs/base"));
    assert_eq!(job.data.train[..], [Path::new("/jobs/rows.jsonl")]);
    assert_eq!(job.training.lr_scheduler_type, LrSchedulerType::ConstantWithWarmup);
    assert_eq!(job.training.learning_rate, 1e-3);
    assert_eq!((job.adapter.r, job.adapter.lora_alpha, job.adapter.scaling()), (16, 32.0, 2.0));
    assert_eq!(job.adapter.target_modules, TargetModules::Pattern("all-linear".into()));
    assert_eq!((job.data.long_rows, job.training.micro_batches()), (LongRows::Error, 8));
}

#[test]
fn target_modules_are_a_string_or_a_list() {
    for (yaml, expected) in [
        ("'.*_proj'", TargetModules::Pattern(".*_proj".into())),
        ("[q_proj, v_proj]", TargetModules::Names(vec!["q_proj".into(), "v_proj".into()])),
    ] {
        let text = format!("{HEAD}adapter: {{target_modules: {yaml}}}\n");
        let job = JobFile::parse(&text, Path::new("job.yaml")).unwrap().job;
        assert_eq!(job.adapter.target_modules, expected);
    }
}

#[test]
fn optimizers_have_the_names_of_transformers() {
    for (name, optim, is_8bit, is_paged) in [
        ("adamw", Optim::Adamw, false, false),
        ("adamw_8bit", Optim::Adamw8bit, true, false),
        ("paged_adamw_32bit", Optim::PagedAdamw32bit, false, true),
        ("paged_adamw_8bit", Optim::PagedAdamw8bit, true, true),
    ] {
        let text = format!("{HEAD}training: {{optim: {name}}}\n");
        let job = JobFile::parse(&text, Path::new("job.yaml")).unwrap().job;
        assert_eq!(job.training.optim, optim);
        assert_eq!((optim.is_8bit(), optim.is_paged()), (is_8bit, is_paged), "{name}");
    }
}

#[test]
fn errors_name_file_line_field_and_remedy() {
    let cases = [
        (
            "training:\n  learnig_rate: 1\n",
            5,
            "training.learnig_rate",
            "did you mean training.learning_rate?",
        ),
        (
            "training:\n  per_device_train_batch_size: 4\n",
            5,
            "per_device_train_batch_size",
            "training.micro_batch_size",
        ),
        ("learning_rate: 1\n", 4, "learning_rate", "it belongs at training.learning_rate"),
        ("trainng: {}\n", 4, "trainng", "did you mean training?"),
        ("adapter:\n  alpha: 3\n  r: 0\n", 5, "adapter.alpha", "adapter.lora_alpha"),
        ("adapter:\n  r: 0\n", 5, "adapter.r", "at least 1"),
        ("adapter:\n  r: -3\n", 5, "adapter.r", "is not a whole number of at least 0"),
        ("adapter:\n  r: many\n", 5, "adapter.r", "is not a whole number of at least 0"),
        ("training:\n  seed: -1\n", 5, "training.seed", "is not a whole number of at least 0"),
        ("training:\n  eval_steps: 1.5\n", 5, "training.eval_steps", "is not a whole number of at least 0"),
        ("adapter: 3\n", 4, "adapter", "is not a section with keys"),
        ("training: {learning_rate: fast}\n", 4, "training.learning_rate", "is not a number"),
        (
            "training: {load_best_model_at_end: maybe}\n",
            4,
            "training.load_best_model_at_end",
            "is not true or",
        ),
        ("training:\n\n  learning_rate: .nan\n", 6, "training.learning_rate", "finite number above 0"),
        ("training: {learning_rate: .inf}\n", 4, "training.learning_rate", "finite"),
        ("training: {warmup_steps: 2.5}\n", 4, "training.warmup_steps", "whole number"),
        ("training: {micro_batch_size: 64}\n", 4, "training.micro_batch_size", "global_batch_size 32"),
        ("training: {lr_scheduler_type: cosin}\n", 4, "training.lr_scheduler_type", "cosine"),
        ("training: {optim: sgd}\n", 4, "training.optim", "\"sgd\" is not supported; supported: adamw, "),
        ("model:\n", 4, "model", "is given twice; keep one"),
        ("adapter:\n  r: 8\n  r: 8\n", 6, "r", "is given twice; keep one"),
        ("adapter: {use_dora: true}\n", 4, "adapter.use_dora", "DoRA is not supported; remove the key"),
        ("adapter: {init_from: ~/a}\n", 4, "adapter.init_from", "~ is not expanded; write the whole path"),
        ("data2: {}\n", 4, "data2", "did you mean data?"),
        ("training: {max_steps: -2}\n", 4, "training.max_steps", "at least 1, or null"),
        ("training: {max_steps: 0}\n", 4, "training.max_steps", "at least 1"),
        ("training: {max_steps: 0.5}\n", 4, "training.max_steps", "is not a whole number"),
        ("training: {load_best_model_at_end: true}\n", 4, "training.load_best_model_at_end", "data.eval"),
        ("workers: {min: 1, max: 9}\n", 4, "workers.max", "8 micro-batches"),
        ("workers: {min: 3, max: 2}\n", 4, "workers.max", "workers.min 3"),
    ];
    for (tail, line, field, remedy) in cases {
        let error = error(&format!("{HEAD}{tail}"));
        assert!(error.starts_with(&format!("/jobs/job.yaml:{line}: ")), "{tail}: {error}");
        assert!(error.contains(field) && error.contains(remedy), "{tail}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn a_sample_for_each_turn_contradicts_a_loss_over_whole_conversations() {
    let tail = "assistant_only_loss: false, split_turns: true}";
    let error = error(&HEAD.replace("rows.jsonl}", &format!("rows.jsonl, {tail}")));
    assert!(error.starts_with("/jobs/job.yaml:3: data.assistant_only_loss: is false, "), "{error}");
    assert!(error.contains("data.split_turns"), "{error}");
}

#[test]
fn keys_that_train_inputs_name_both_settings() {
    for key in ["train_on_inputs", "train_on_prompt"] {
        let error = error(&HEAD.replace("rows.jsonl}", &format!("rows.jsonl, {key}: true}}")));
        for ours in ["data.assistant_only_loss: false", "data.completion_only_loss: false"] {
            assert!(error.contains(&format!("data.{key}: is not a key of a job")), "{error}");
            assert!(error.contains(ours), "{error}");
        }
    }
}

/// A mapping on one line has all of its fields on that line.
#[test]
fn the_field_of_a_wrong_value_is_found_in_one_line_and_in_many() {
    let default = serde_json::to_value(JobSpec::default()).unwrap();
    for (field, is_section) in lora_spec::known_keys() {
        let Some((section, key)) = field.split_once('.').filter(|_| !is_section) else { continue };
        for wrong in ["[[1]]", "{a: 1}", "'?'", "-7", "1.5"] {
            let mut fields: Vec<(String, String)> = Vec::new();
            for (name, value) in default[section].as_object().unwrap() {
                let value = match (name == key, name.as_str()) {
                    (true, _) => wrong.into(),
                    (false, "base" | "train") => "x".into(),
                    (false, _) => value.to_string(),
                };
                fields.push((name.clone(), value));
            }
            let lines = |separator: &str| {
                let pairs = fields.iter().map(|(name, value)| format!("{name}: {value}"));
                pairs.collect::<Vec<_>>().join(separator)
            };
            let head: String = [("model", "{base: x}"), ("data", "{train: x}")]
                .iter()
                .filter(|(name, _)| *name != section)
                .map(|(name, value)| format!("{name}: {value}\n"))
                .collect();
            let texts = [
                format!("name: a\n{head}{section}: {{{}}}\n", lines(", ")),
                format!("name: a\n{head}{section}:\n  {}\n", lines("\n  ")),
            ];
            let errors = texts.map(|text| {
                let error = JobFile::parse(&text, Path::new("j")).err()?.to_string();
                let (_, error) = error.strip_prefix("j:").unwrap().split_once(": ").unwrap();
                assert!(error.starts_with(&*field) || error.starts_with("model.bnb"), "{error}\n{text}");
                for word in ["invalid", "enum", "deserialize", "variant", "scalar", "Option", "u64"] {
                    assert!(!error.contains(word), "{error}");
                }
                Some(error.to_owned())
            });
            assert_eq!(errors[0], errors[1]);
        }
    }
}

#[test]
fn values_of_other_trainers_are_taken_where_they_mean_the_same() {
    for (theirs, ours) in [
        ("training: {optim: adamw_torch}", "training: {optim: adamw}"),
        ("training: {optim: adamw_torch_fused}", "training: {optim: adamw}"),
        ("training: {optim: adamw_bnb_8bit}", "training: {optim: adamw_8bit}"),
        ("training: {optim: paged_adamw}", "training: {optim: paged_adamw_32bit}"),
        ("training: {max_steps: -1}", "training: {max_steps: null}"),
        ("adapter: {target_modules: all}", "adapter: {target_modules: all-linear}"),
        ("adapter: {target_modules: All-Linear}", "adapter: {target_modules: all-linear}"),
    ] {
        let job = |tail: &str| JobFile::parse(&format!("{HEAD}{tail}\n"), Path::new("j")).unwrap().job;
        let json = |tail: &str| serde_json::to_string(&job(tail)).unwrap();
        assert_eq!(json(theirs), json(ours), "only our value is kept");
    }
    for optim in
        ["adamw_torch_8bit", "adamw_torch_4bit", "adafactor", "lion_8bit", "paged_lion_8bit", "ADAMW"]
    {
        let error = error(&format!("{HEAD}training: {{optim: {optim}}}\n"));
        assert!(
            error.contains("supported: adamw, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit"),
            "{error}"
        );
    }
    for field in ["eval_steps", "save_steps", "logging_steps"] {
        let error = error(&format!("{HEAD}training: {{max_steps: 5, {field}: 0.1, seed: 3}}\n"));
        let expected = format!("/jobs/job.yaml:4: training.{field}: is 0.1; a fraction of all steps");
        assert!(error.starts_with(&expected), "{error}");
    }
}

#[test]
fn paths_with_shell_syntax_are_refused() {
    for (path, is_refused) in [
        ("~/rows.jsonl", true),
        ("~me/rows.jsonl", true),
        ("$HOME/rows.jsonl", true),
        ("'${DATA}/rows.jsonl'", true),
        ("./~/rows.jsonl", false),
        ("rows~.jsonl", false),
    ] {
        let text = format!("name: a\nmodel: {{base: b}}\ndata: {{train: {path}}}\n");
        let parsed = JobFile::parse(&text, Path::new("j"));
        assert_eq!(parsed.is_err(), is_refused, "{path}");
        if let Err(error) = parsed {
            let text = error.to_string();
            assert!(text.starts_with("j:3: data.train: ") && text.contains("is not expanded"), "{text}");
        }
    }
}

#[test]
fn missing_keys_and_invalid_yaml_are_reported() {
    assert!(error("name: x\nmodel: {base: b}\n").contains("data.train: is missing"));
    assert!(error("model: {base: b}\ndata: {train: t}\n").contains("name: "));
    assert!(error("").contains("/jobs/job.yaml:1: "));
    let broken = error("name: x\nmodel: {base: [\n");
    assert!(broken.starts_with("/jobs/job.yaml:"), "{broken}");
    let twice = error("name: x\nname: y\n");
    assert!(twice.starts_with("/jobs/job.yaml:2: ") && twice.contains("name"), "{twice}");
    let missing = JobFile::read(Path::new("/nonexistent/job.yaml")).unwrap_err().to_string();
    assert!(missing.starts_with("/nonexistent/job.yaml: "), "{missing}");
}

#[test]
fn a_fraction_of_warm_up_steps_is_rounded_up() {
    let steps = |warmup_steps, total| {
        lora_spec::TrainingSpec { warmup_steps, ..lora_spec::TrainingSpec::default() }
            .resolved_warmup_steps(total)
    };
    for (warmup_steps, total, expected) in
        [(0.0, 100, 0), (0.03, 100, 3), (0.03, 101, 4), (0.5, 3, 2), (1.0, 100, 1), (7.0, 3, 7)]
    {
        assert_eq!(steps(warmup_steps, total), expected, "{warmup_steps} of {total}");
    }
}

#[test]
fn several_training_files_have_weights() {
    let parse = |data: &str| {
        let text = format!("name: a\nmodel: {{base: b}}\ndata:\n  train: {data}\n");
        JobFile::parse(&text, Path::new("/jobs/j"))
    };
    let job = parse("[a.jsonl, ../b.csv]\n  train_weights: [1, 0.5]").unwrap().job;
    assert_eq!(job.data.train[..], [Path::new("/jobs/a.jsonl"), Path::new("/jobs/../b.csv")]);
    assert_eq!(job.data.train_weights, [1.0, 0.5]);
    // A job with one file is written as before.
    let json = |data: &str| serde_json::to_value(parse(data).unwrap().job).unwrap()["data"]["train"].clone();
    assert_eq!(json("a.jsonl"), "/jobs/a.jsonl");
    assert_eq!(json("[a.jsonl]"), "/jobs/a.jsonl");
    assert_eq!(json("[a.jsonl, b.jsonl]"), serde_json::json!(["/jobs/a.jsonl", "/jobs/b.jsonl"]));
    for (data, expected) in [
        ("[]", "/jobs/j:4: data.train: is missing"),
        ("[a.jsonl, '']", "/jobs/j:4: data.train: is missing"),
        (
            "[a.jsonl, b.jsonl, a.jsonl]",
            "/jobs/j:4: data.train: a.jsonl is listed twice; to take its rows twice",
        ),
        ("[a.jsonl, ~/b.jsonl]", "/jobs/j:4: data.train: ~ is not expanded"),
        (
            "a.jsonl\n  train_weights: [1, 2]",
            "/jobs/j:5: data.train_weights: has 2 numbers, but data.train has 1",
        ),
        ("a.jsonl\n  train_weights: [0]", "/jobs/j:5: data.train_weights: has 0; a weight is above 0"),
        ("a.jsonl\n  train_weights: [.nan]", "/jobs/j:5: data.train_weights: has NaN; a weight is above 0"),
        ("a.jsonl\n  train_weights: [1001]", "/jobs/j:5: data.train_weights: has 1001; a weight is above 0"),
        ("{path: a.jsonl}", "/jobs/j:4"),
        ("7", "/jobs/j:4"),
    ] {
        let error = parse(data).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{data}: {error}");
    }
    for (data, expected) in [
        ("7", "data.train: must be a path or a list of paths"),
        ("{path: a.jsonl}", "data.train"),
        ("[[a]]", "data.train: is not a text"),
    ] {
        let error = parse(data).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_file_of_several_documents_and_a_column_for_two_keys_are_refused() {
    let error = |text: &str| JobFile::parse(text, Path::new("/jobs/j")).unwrap_err().to_string();
    let two = error("name: a\n---\nname: b\n");
    assert!(two.ends_with("has several YAML documents; write one job in a file"), "{two}");
    let data = "data:\n  train: t\n  columns: {prompt: q, completion: q}\n";
    let columns = error(&format!("name: a\nmodel: {{base: b}}\n{data}"));
    assert!(
        columns.starts_with("/jobs/j:5: data.columns: has the column \"q\" for several keys"),
        "{columns}"
    );
}
