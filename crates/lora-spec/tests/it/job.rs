//! Jobs as a whole, and small values of the public interface.

use lora_spec::{
    DeviceKind, DeviceMemory, InitLoraWeights, JobFile, JobSpec, ModelConfig, NormModule, is_git_lfs_pointer,
};
use serde_json::json;

fn job() -> JobSpec {
    let mut job = JobSpec { name: "a".into(), ..JobSpec::default() };
    (job.model.base, job.data.train) = ("base".into(), "train.jsonl".into());
    job
}

#[test]
fn names_have_1_to_63_characters() {
    for (name, is_valid) in [
        ("a".repeat(63), true),
        ("A-b_c.9".to_owned(), true),
        ("a".repeat(64), false),
        (String::new(), false),
        ("a b".to_owned(), false),
        ("é".to_owned(), false),
        (".a".to_owned(), false),
    ] {
        let checked = JobSpec { name: name.clone(), ..job() }.check();
        assert_eq!(checked.is_ok(), is_valid, "{name:?}: {checked:?}");
    }
}

#[test]
fn jobs_differ_in_every_setting_but_the_number_of_workers() {
    let same = JobSpec { workers: serde_json::from_value(json!({"min": 2, "max": 3})).unwrap(), ..job() };
    assert_eq!(job().difference(&same), None);
    let mut other = job();
    other.training.seed = 7;
    assert_eq!(other.difference(&job()).unwrap().to_string(), "training.seed: is 7, and was 42");
    other = job();
    other.data.chat_template_kwargs.insert("a".into(), true.into());
    assert!(other.difference(&job()).unwrap().to_string().starts_with("data.chat_template_kwargs: is "));
}

#[test]
fn only_several_rounds_of_loftq_change_the_base() {
    let mut job = job();
    for (init, rounds, changes) in [
        (InitLoraWeights::Loftq, 1, false),
        (InitLoraWeights::Loftq, 2, true),
        (InitLoraWeights::Pissa, 2, false),
    ] {
        (job.adapter.init_lora_weights, job.adapter.loftq_iter, job.adapter.r) = (init, rounds, 5);
        let loftq = job.base_layout().loftq.map(|loftq| (loftq.rounds, loftq.r));
        assert_eq!(loftq, changes.then_some((2, 5)), "{init:?} {rounds}");
    }
}

#[test]
fn contradictions_in_the_section_data_are_errors() {
    let error = |data: serde_json::Value| {
        let mut all = json!({"train": "train.jsonl"});
        all.as_object_mut().unwrap().extend(data.as_object().unwrap().clone());
        let job = JobSpec { data: serde_json::from_value(all).unwrap(), ..job() };
        job.check().map_err(|error| error.to_string())
    };
    for (data, expected) in [
        (
            json!({"columns": {"prompt": "q", "completion": "q"}}),
            "data.columns: has the column \"q\" for several",
        ),
        (json!({"columns": {"question": "q"}}), "data.columns: \"question\" is not a key of a format"),
        (json!({"chat_template": "template.jinja"}), "data.chat_template: is not a chat template"),
        (
            json!({"split_turns": true, "assistant_only_loss": false}),
            "data.assistant_only_loss: is false, which trains whole",
        ),
    ] {
        let error = error(data.clone()).unwrap_err();
        assert!(error.starts_with(expected), "{data}: {error}");
    }
    for data in [
        json!({"columns": {"prompt": "q", "completion": "a"}}),
        json!({"chat_template": "{{ messages }}"}),
        json!({"chat_template": "{% if a %}{% endif %}"}),
        json!({"split_turns": true}),
        json!({"assistant_only_loss": false}),
    ] {
        assert_eq!(error(data.clone()), Ok(()), "{data}");
    }
}

#[test]
fn a_template_in_a_job_file_is_a_text_or_a_file_beside_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("t.jinja"), "{{ messages }}").unwrap();
    let read = |template: &str| {
        let path = dir.path().join("job.yaml");
        let text = format!(
            "name: a\nmodel: {{base: base}}\ndata: {{train: t.jsonl, chat_template: {template:?}}}\n"
        );
        std::fs::write(&path, text).unwrap();
        JobFile::read(&path).map(|file| {
            assert_eq!(file.dir().unwrap(), dir.path());
            file.job.data.chat_template.unwrap()
        })
    };
    assert_eq!(read("t.jinja").unwrap(), "{{ messages }}");
    assert_eq!(read("{% if messages %}{% endif %}").unwrap(), "{% if messages %}{% endif %}");
    let error = read("u.jinja").unwrap_err().to_string();
    assert!(error.contains("job.yaml:3: data.chat_template: the file"), "{error}");
}

#[test]
fn fractions_of_all_steps_have_an_error_of_their_own() {
    let error = |value: &str| {
        let text = format!(
            "name: a\nmodel: {{base: base}}\ndata: {{train: t.jsonl}}\ntraining: {{eval_steps: {value}}}\n"
        );
        JobFile::parse(&text, "job.yaml".as_ref()).unwrap_err().to_string()
    };
    assert!(error("0.5").contains("training.eval_steps: is 0.5; a fraction of all steps is not supported"));
    for other in ["0.0", "1.0", "1.5", "-0.5"] {
        assert!(!error(other).contains("a fraction of all steps"), "{other}");
    }
}

#[test]
fn a_job_file_without_keys_says_so() {
    for text in ["", "# only a comment\n", "[]", "a text"] {
        let error = JobFile::parse(text, "job.yaml".as_ref()).unwrap_err().to_string();
        assert!(error.starts_with("job.yaml:1: has no keys; a job has at least name"), "{text:?}: {error}");
    }
}

#[test]
fn variables_of_a_template_are_not_ambiguous() {
    let parse = |values: &str| {
        let text = format!(
            "name: a\nmodel: {{base: base}}\ndata:\n  train: t.jsonl\n  chat_template_kwargs: {values}\n"
        );
        JobFile::parse(&text, "job.yaml".as_ref()).map_err(|error| error.to_string())
    };
    for value in ["y", "N", "08", "-017", ".inf", "-.Inf", ".nan"] {
        let error = parse(&format!("{{other: 1, flag: {value}}}")).unwrap_err();
        let expected =
            format!("job.yaml:5: data.chat_template_kwargs: flag is {value}, which YAML parsers read");
        assert!(error.starts_with(&expected), "{error}");
        let error = parse(&format!("\n    flag: {value} # comment")).unwrap_err();
        assert!(error.contains(&format!("flag is {value}, which")), "{error}");
    }
    for value in ["true", "yes", "off", "0", "-3.5", "1e3", "'y'", "\"08\"", "a, b: y1", "[y2, n]", "0.5"] {
        let parsed = parse(&format!("{{flag: {value}}}"));
        assert!(parsed.is_ok(), "{value}: {parsed:?}");
    }
}

#[test]
fn an_unknown_amount_of_memory_has_no_bytes() {
    let memory = |bytes| DeviceMemory::new(DeviceKind::Cpu, bytes);
    assert_eq!((memory(None).known_bytes(), memory(Some(5)).known_bytes()), (None, Some(5)));
    assert!(memory(None) > memory(Some(u64::MAX - 1)));
}

#[test]
fn a_pointer_of_git_lfs_is_known_by_its_first_line() {
    assert!(is_git_lfs_pointer(b"version https://git-lfs.github.com/spec/v1\noid sha256:"));
    assert!(!is_git_lfs_pointer(b"version https://example.com") && !is_git_lfs_pointer(b""));
}

#[test]
fn norms_with_an_offset_a_scale_or_no_weight_have_factors_of_their_own() {
    let config = ModelConfig::read(&lora_test_kit::golden("models/llama-gqa").into()).unwrap();
    let block = config.blocks().next().unwrap();
    let plain = block.norms().next().unwrap().clone();
    assert!(!plain.has_own_factors());
    for other in [
        NormModule { offset: 1.0, ..plain.clone() },
        NormModule { scale: 0.5, ..plain.clone() },
        NormModule { has_weight: false, ..plain.clone() },
    ] {
        assert!(other.has_own_factors(), "{other:?}");
    }
}
