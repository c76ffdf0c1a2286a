//! Row formats: the tokens of a row, and those that are trained.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use lora_data::Dataset;
use lora_spec::{DataSpec, RowFormat};
use serde_json::json;

use crate::base_dir::{BaseDir, CHATML};

#[test]
fn text_rows_train_all_but_the_first_token_and_end_with_eos() {
    assert_eq!(BaseDir::new("</s>", false).marked(json!({"text": "hello w"})), "hel⟦lo w</s>⟧");
    assert_eq!(BaseDir::new("</s>", true).marked(json!({"text": "  a "})), "<s>⟦  a </s>⟧");
}

#[test]
fn eos_is_not_added_twice() {
    assert_eq!(BaseDir::new("</s>", false).marked(json!({"text": "ab</s>"})), "a⟦b</s>⟧");
    let row = json!({"prompt": "a", "completion": "b</s>"});
    assert_eq!(BaseDir::new("</s>", false).marked(row), "a⟦b</s>⟧");
}

#[test]
fn a_token_across_the_prompt_boundary_is_trained() {
    let base = BaseDir::new("</s>", true);
    assert_eq!(base.marked(json!({"prompt": "hello", "completion": " world"})), "<s>hello⟦ world</s>⟧");
    assert_eq!(base.marked(json!({"prompt": "hello ", "completion": "world"})), "<s>hello⟦ world</s>⟧");
    assert_eq!(
        base.marked(json!({"prompt": "é\n", "completion": "\n"})),
        "<s>é⟦\n\n</s>⟧".replace("⟦\n", "\n⟦")
    );
    assert_eq!(base.marked(json!({"prompt": "a", "completion": ""})), "<s>a⟦</s>⟧");
}

#[test]
fn prompt_and_completion_may_be_messages() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let row = json!({
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}],
    });
    assert_eq!(
        base.marked(row),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n\
         <|im_start|>assistant\n⟦d<|im_end|>⟧\n"
    );
}

#[test]
fn alpaca_rows_have_the_published_prompt() {
    let base = BaseDir::new("</s>", false);
    let marked = base.marked(json!({"instruction": "Add.", "input": "", "output": "3"}));
    assert_eq!(
        marked,
        "Below is an instruction that describes a task. Write a response that appropriately completes \
         the request.\n\n### Instruction:\nAdd.\n\n### Response:⟦3</s>⟧"
    );
    let marked = base.marked(json!({"instruction": "Add.", "input": "1 2", "output": "3"}));
    assert_eq!(
        marked,
        "Below is an instruction that describes a task, paired with an input that provides further \
         context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n\
         ### Input:\n1 2\n\n### Response:⟦3</s>⟧"
    );
}

#[test]
fn blank_lines_and_mixed_formats_are_accepted_and_counted() {
    let base = BaseDir::new("</s>", false);
    let dataset = base
        .read_text(
            "\u{FEFF}{\"text\": \"abc\", \"id\": 7, \"prompt\": null}\r\n\r\n\
             {\"prompt\": \"a\", \"completion\": \"b\"}\n  \n{\"text\": \"a\"}",
        )
        .unwrap();
    let report = &dataset.report;
    assert_eq!((report.rows_read, report.rows_kept, report.dropped, report.truncated), (3, 3, 0, 0));
    assert_eq!((report.tokens, report.trained_tokens), (4 + 3 + 2, 3 + 2 + 1));
    assert_eq!((report.shortest, report.median, report.percentile_95, report.longest), (2, 3, 4, 4));
    assert_eq!(report.formats, [(RowFormat::PromptCompletion, 1), (RowFormat::Text, 2)].into());
    assert_eq!(report.ignored_keys, [("id".to_owned(), 1)].into());
    assert_eq!(dataset.lengths(), [4, 3, 2]);
}

#[test]
fn the_hash_is_the_sha256_of_the_file() {
    let dataset = BaseDir::new("</s>", false).read_text("{\"text\": \"abc\"}\n").unwrap();
    // printf '{"text": "abc"}\n' | sha256sum
    assert_eq!(dataset.sha256, "b3b44c015f2cfd9f6727c04576599da0309a65ffc71323b91e87b469177983c2");
}

#[test]
fn rows_keep_the_order_of_the_file_on_any_number_of_threads() {
    let base = BaseDir::new("</s>", false);
    let lines: Vec<_> = (0..500).map(|i| json!({"text": format!("{i}")})).collect();
    let read = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| base.read(&lines).unwrap()).rows
    };
    let rows = read(1);
    assert_eq!(rows, read(4));
    let tokenizer = base.tokenizer();
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(tokenizer.decode(&row.tokens().collect::<Vec<_>>(), true).unwrap(), i.to_string());
    }
}

/// Returns the rows of a file as marked texts.
fn marked_file(name: &str, contents: &[u8]) -> Vec<String> {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let path = base.dir.path().join(name);
    std::fs::write(&path, contents).unwrap();
    let dataset = Dataset::read(&path.into(), &base.tokenizer(), &DataSpec::default()).unwrap();
    dataset.rows.iter().map(|row| base.tokenizer().marked_text(row).unwrap()).collect()
}

#[test]
fn every_file_format_gives_the_same_rows() {
    let lines =
        b"{\"prompt\": \"a, b\", \"completion\": \"c\\nd\"}\n{\"prompt\": \"e\", \"completion\": \"f\"}\n";
    let expected = ["a, b⟦c\nd<|im_end|>⟧", "e⟦f<|im_end|>⟧"];
    let array =
        b"[{\"prompt\": \"a, b\", \"completion\": \"c\\nd\"},\r\n{\"prompt\": \"e\", \"completion\": \"f\"}]";
    let csv = b"\xEF\xBB\xBFprompt,completion\r\n\"a, b\",\"c\nd\"\r\ne,f\r\n";
    let gzip = |bytes: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 0).unwrap();
    // Two members, as `cat a.gz b.gz` gives.
    let half = lines.iter().position(|&byte| byte == b'\n').unwrap() + 1;
    let members = [gzip(&lines[..half]), gzip(&lines[half..])].concat();
    for (name, contents) in [
        ("a.jsonl", lines.to_vec()),
        ("a.ndjson", lines.to_vec()),
        ("a.json", array.to_vec()),
        ("a.jsonl", array.to_vec()),
        ("a.csv", csv.to_vec()),
        ("a.jsonl.gz", gzip(lines)),
        ("a.jsonl.gz", [&members[..], &[0; 512]].concat()),
        ("a.jsonl.gz", members),
        ("a.json.zst", zstd(array)),
        ("a.csv.gz", gzip(csv)),
    ] {
        assert_eq!(marked_file(name, &contents), expected, "{name}");
    }
}

#[test]
fn sharegpt_rows_are_conversations() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let conversations = json!([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]);
    let text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n";
    assert_eq!(base.marked(json!({"conversations": conversations})), text);
    assert_eq!(base.marked(json!({"messages": conversations})), text);
    assert_eq!(
        base.marked(json!({"conversations": conversations, "system": "s", "tools": ""})),
        format!("<|im_start|>system\ns<|im_end|>\n{text}")
    );
}

#[test]
fn alpaca_rows_with_a_history_are_conversations() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let row =
        json!({"instruction": "c", "input": "d", "output": "e", "system": "s", "history": [["a", "b"]]});
    assert_eq!(
        base.marked(row),
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\
         ⟦b<|im_end|>⟧\n<|im_start|>user\nc\nd<|im_end|>\n<|im_start|>assistant\n⟦e<|im_end|>⟧\n"
    );
    let empty = json!({"instruction": "a", "output": "b", "system": "", "history": []});
    assert!(base.marked(empty).starts_with("Below is an instruction"));
}

#[test]
fn the_keys_of_other_formats_have_no_effect_and_are_counted() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let dataset = base
        .read(&[
            json!({"prompt": "p", "prompt_id": "1", "messages": messages}),
            json!({"instruction": "i", "input": "", "output": "o", "text": "rendered"}),
        ])
        .unwrap();
    assert_eq!(dataset.report.formats, [(RowFormat::Messages, 1), (RowFormat::Alpaca, 1)].into());
    let ignored = ["prompt", "prompt_id", "text"].map(|key| (key.to_owned(), 1));
    assert_eq!(dataset.report.ignored_keys, ignored.into());
}

#[test]
fn a_list_of_text_parts_is_its_text() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let row =
        json!({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]});
    assert!(base.marked(row).starts_with("<|im_start|>user\nab<|im_end|>"));
}
