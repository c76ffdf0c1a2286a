//! Tokenizer files in all layouts of Transformers 4 and 5.

use std::path::Path;

use lora_data::{DataError, Message, Row, TokenRows, Tokenizer};
use serde_json::{Value as Json, json};

use crate::base_dir::{BaseDir, CHATML, LLAMA3};

fn rendered(base: &BaseDir) -> String {
    base.tokenizer().render_chat(&[Message::new("user", "hi")], true).unwrap()
}

const HI: &str = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n";

#[test]
fn the_template_is_a_string_in_the_config() {
    assert_eq!(rendered(&BaseDir::with_template("</s>", CHATML)), HI);
}

#[test]
fn the_template_is_the_default_one_of_a_list() {
    let base = BaseDir::new("</s>", false);
    let list = json!([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]);
    base.config(json!({"eos_token": "</s>", "chat_template": list}));
    assert_eq!(rendered(&base), HI);
}

#[test]
fn the_template_file_has_precedence_over_the_config() {
    let base = BaseDir::with_template("</s>", "from the config");
    base.write("chat_template.jinja", CHATML);
    assert_eq!(rendered(&base), HI);
}

#[test]
fn the_default_template_can_be_in_the_additional_templates_directory() {
    let base = BaseDir::new("</s>", false);
    base.write("additional_chat_templates/default.jinja", CHATML);
    assert_eq!(rendered(&base), HI);
}

#[test]
fn a_list_of_templates_without_a_default_is_refused() {
    let base = BaseDir::new("</s>", false);
    base.config(json!({"chat_template": [{"name": "rag", "template": "x"}]}));
    let error = base.error_text(Tokenizer::load(&base.dir.path().into()).err().unwrap());
    assert!(error.starts_with("tokenizer_config.json: chat_template is neither"), "{error}");
}

#[test]
fn special_tokens_may_be_objects_and_reach_the_template() {
    let base = BaseDir::new("</s>", false);
    base.config(json!({
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": false},
        "eos_token": {"content": "<|eot_id|>"},
        "add_bos_token": true,
        "chat_template": LLAMA3,
    }));
    let tokenizer = base.tokenizer();
    assert_eq!(tokenizer.eos_token(), Some(("<|eot_id|>", tokenizer.token_to_id("<|eot_id|>").unwrap())));
    let text = tokenizer.render_chat(&[Message::new("user", "  hi ")], false).unwrap();
    assert_eq!(text, "<s><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>");
}

#[test]
fn the_special_tokens_map_fills_missing_config_entries() {
    let base = BaseDir::new("</s>", false);
    base.config(json!({"chat_template": "{{ bos_token }}{{ eos_token }}"}));
    base.write(
        "special_tokens_map.json",
        &json!({"bos_token": "<s>", "eos_token": {"content": "</s>"}}).to_string(),
    );
    assert_eq!(rendered(&base), "<s></s>");
}

#[test]
fn stop_tokens_come_from_tokenizer_and_generation_config() {
    let base = BaseDir::new("</s>", false);
    let id = |token| base.tokenizer().token_to_id(token).unwrap();
    assert_eq!(base.tokenizer().stop_tokens(), [id("</s>")]);
    base.write("config.json", &json!({"eos_token_id": id("<s>")}).to_string());
    assert_eq!(base.tokenizer().stop_tokens(), [id("</s>"), id("<s>")]);
    let ids = json!([id("<|im_end|>"), id("</s>")]);
    base.write("generation_config.json", &json!({"eos_token_id": ids}).to_string());
    assert_eq!(base.tokenizer().stop_tokens(), [id("</s>"), id("<|im_end|>")]);
    base.write("generation_config.json", r#"{"eos_token_id": "x"}"#);
    let error = base.error_text(Tokenizer::load(&base.dir.path().into()).err().unwrap());
    assert_eq!(error, "generation_config.json: eos_token_id is neither a token id nor a list of token ids");
}

#[test]
fn the_generation_config_supplies_a_missing_eos_token() {
    let base = BaseDir::new("</s>", false);
    base.config(json!({}));
    assert_eq!(base.tokenizer().eos_token(), None);
    let id = base.tokenizer().token_to_id("<|im_end|>").unwrap();
    base.write("generation_config.json", &json!({"eos_token_id": id}).to_string());
    assert_eq!(base.tokenizer().eos_token(), Some(("<|im_end|>", id)));
}

#[test]
fn padding_and_truncation_settings_are_ignored() {
    let tokenizer = BaseDir::new("</s>", true).tokenizer();
    let ids = tokenizer.encode("hello wörld", true).unwrap();
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hello wörld");
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<s>hello wörld");
    assert_eq!(ids[1..], tokenizer.encode("hello wörld", false).unwrap());
    assert_eq!(tokenizer.vocab_size(), 256 + 3 + 7);
}

#[test]
fn files_lists_the_existing_tokenizer_files() {
    let base = BaseDir::with_template("</s>", CHATML);
    base.write("merges.txt", "");
    base.write("model.safetensors", "");
    base.write("additional_chat_templates/tool_use.jinja", "");
    let names =
        |base: &BaseDir| base.tokenizer().files().iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&base), ["tokenizer.json", "tokenizer_config.json", "merges.txt"]);
    base.write("additional_chat_templates/default.jinja", CHATML);
    let expected = ["tokenizer.json", "tokenizer_config.json", "merges.txt", "chat_template.jinja"];
    assert_eq!(names(&base), expected);
    let copied = |base: &BaseDir| base.tokenizer().files().last().unwrap().1.path().to_owned();
    assert!(copied(&base).ends_with("additional_chat_templates/default.jinja"));
    base.write("chat_template.jinja", CHATML);
    assert!(copied(&base).ends_with("chat_template.jinja") && names(&base) == expected);
}

#[test]
fn a_link_to_a_missing_file_is_not_an_absent_file() {
    for name in ["chat_template.jinja", "tokenizer_config.json", "vocab.json"] {
        let base = BaseDir::with_template("</s>", CHATML);
        let path = base.dir.path().join(name);
        let _ = std::fs::remove_file(&path);
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        let error = base.error_text(Tokenizer::load(&base.dir.path().into()).err().unwrap());
        assert!(error.starts_with(&format!("{name}: ")), "{error}");
    }
}

#[test]
fn marked_text_keeps_multi_token_characters() {
    let tokenizer = BaseDir::new("</s>", false).tokenizer();
    let tokens = tokenizer.encode("aöb", false).unwrap();
    let row = Row { trained: vec![false, true, true, false], tokens };
    assert_eq!(tokenizer.marked_text(TokenRows::from_iter([row]).row(0)).unwrap(), "a⟦ö⟧b");
}

#[test]
fn corrupt_and_missing_files_are_named() {
    let base = BaseDir::new("nowhere", false);
    let load = || base.error_text(Tokenizer::load(&base.dir.path().into()).err().unwrap());
    assert_eq!(load(), "tokenizer.json: its vocabulary does not have the eos_token \"nowhere\"");
    base.write("tokenizer_config.json", "{");
    assert!(load().starts_with("tokenizer_config.json: is not a JSON object: EOF"), "{}", load());
    base.write("tokenizer.json", "{}");
    assert!(load().starts_with("tokenizer.json: is not a tokenizer: "), "{}", load());
    let missing = Tokenizer::load(&Path::new("no/such/dir").into()).err().unwrap();
    assert!(matches!(missing, DataError::Read { .. }));
    let missing = missing.to_string();
    assert!(missing.starts_with("no/such/dir/tokenizer.json: No such file"), "{missing}");
}

#[test]
fn tokens_that_only_other_files_define_are_one_token() {
    let base = BaseDir::new("</s>", false);
    let size = base.tokenizer().vocab_size() as u32;
    let encode = |base: &BaseDir| base.tokenizer().encode("a<x>b", false).unwrap();
    assert_eq!(encode(&base).len(), 5);
    let token = |special: bool| {
        json!({"content": "<x>", "lstrip": false, "rstrip": false, "normalized": false,
            "single_word": false, "special": special})
    };
    let names = || json!({"bos_token": "<s>", "eos_token": "</s>"});
    let with = |key: &str, value: Json| {
        let mut config = names();
        config[key] = value;
        config
    };
    for config in [
        with("added_tokens_decoder", json!({"9": token(true)})),
        with("added_tokens_decoder", json!({"9": token(false)})),
        with("additional_special_tokens", json!(["<s>", "<x>"])),
        with("extra_special_tokens", json!([token(true)])),
        with("extra_special_tokens", json!({"image_token": "<x>"})),
        with("pad_token", json!("<x>")),
    ] {
        base.config(config.clone());
        let tokens = encode(&base);
        assert_eq!((tokens.len(), tokens[1]), (3, size), "{config}");
    }
    base.config(names());
    base.write("added_tokens.json", &json!({"<x>": 7}).to_string());
    assert_eq!(encode(&base)[1], size);
    // The list of tokenizer_config.json replaces the file.
    base.config(with("added_tokens_decoder", json!({})));
    assert_eq!(encode(&base).len(), 5);
    base.config(with("added_tokens_decoder", json!({"x": token(true)})));
    let error = base.error_text(Tokenizer::load(&base.dir.path().into()).err().unwrap());
    assert!(error.contains("tokenizer_config.json: added_tokens_decoder.\"x\" is not a token id"), "{error}");
}

#[test]
fn the_special_tokens_map_counts_without_a_list_of_added_tokens() {
    let base = BaseDir::new("</s>", false);
    base.write("special_tokens_map.json", &json!({"eos_token": "<|im_end|>"}).to_string());
    let eos = || base.tokenizer().eos_token().unwrap().0.to_owned();
    assert_eq!(eos(), "<|im_end|>");
    base.config(json!({"eos_token": "</s>", "added_tokens_decoder": {}}));
    assert_eq!(eos(), "</s>");
}
