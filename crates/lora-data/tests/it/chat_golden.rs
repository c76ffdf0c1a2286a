//! Compares renderings, tokens and masks with Transformers' `apply_chat_template` and TRL's
//! `SFTTrainer` (`tests/golden/chat`, made by `tests/oracle`).

use std::collections::BTreeMap;
use std::fs;

use lora_data::{DataError, Dataset, Message, Tokenizer};
use lora_spec::DataSpec;
use lora_test_kit::golden;
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tempfile::TempDir;

#[derive(Deserialize)]
struct Goldens {
    conversations: BTreeMap<String, Vec<Json>>,
    renderings: Vec<Rendering>,
}

#[derive(Deserialize)]
struct Rendering {
    template: String,
    conversation: String,
    add_generation_prompt: bool,
    text: Option<String>,
    tokens: Option<Vec<u32>>,
    assistant_mask: Option<Vec<u8>>,
    error: Option<String>,
}

/// Rows as TRL prepares them.
#[derive(Deserialize)]
struct Losses {
    templates: BTreeMap<String, String>,
    rows: BTreeMap<String, Json>,
    results: Vec<Loss>,
}

#[derive(Deserialize)]
struct Loss {
    template: String,
    row: String,
    assistant_only_loss: bool,
    completion_only_loss: bool,
    tokens: Vec<u32>,
    trained: Vec<u8>,
}

fn goldens() -> Goldens {
    serde_json::from_slice(&fs::read(golden("chat/renderings.json")).unwrap()).unwrap()
}

fn messages(conversation: &[Json]) -> Vec<Message> {
    conversation.iter().map(|message| serde_json::from_value(message.clone()).unwrap()).collect()
}

/// Copies the base of the golden files, with a chat template of theirs.
fn base_with(template: &str) -> TempDir {
    let template = golden(format!("chat/templates/{template}.jinja"));
    base_with_source(&fs::read_to_string(template).unwrap())
}

fn base_with_source(template: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(golden("chat/tokenizer").join(name), dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    dir
}

#[test]
fn texts_tokens_and_errors_match_transformers() {
    let goldens = goldens();
    assert!(goldens.renderings.len() >= 50);
    for golden in &goldens.renderings {
        let case = format!("{} {} {}", golden.template, golden.conversation, golden.add_generation_prompt);
        let tokenizer = Tokenizer::load(&base_with(&golden.template).path().into()).unwrap();
        let messages = messages(&goldens.conversations[&golden.conversation]);
        match (tokenizer.render_chat(&messages, golden.add_generation_prompt), &golden.text) {
            (Ok(text), Some(expected)) => {
                assert_eq!(text, *expected, "{case}");
                assert_eq!(
                    tokenizer.encode(&text, false).unwrap(),
                    *golden.tokens.as_ref().unwrap(),
                    "{case}"
                );
            }
            (Err(DataError::ChatTemplate(error)), None) => {
                assert!(error.contains(golden.error.as_ref().unwrap()), "{case}: {error}");
            }
            (result, _) => {
                panic!("{case}: {result:?}, but Transformers gives {:?} {:?}", golden.text, golden.error)
            }
        }
    }
}

#[test]
fn generation_masks_match_transformers() {
    let goldens = goldens();
    let mut checked = 0;
    for golden in goldens.renderings.iter().filter(|golden| !golden.add_generation_prompt) {
        let Some(mask) = golden.assistant_mask.as_ref().filter(|mask| mask[1..].contains(&1)) else {
            continue;
        };
        let base = base_with(&golden.template);
        let path = base.path().join("data.jsonl");
        fs::write(&path, json!({"messages": goldens.conversations[&golden.conversation]}).to_string())
            .unwrap();
        let tokenizer = Tokenizer::load(&base.path().into()).unwrap();
        let dataset = Dataset::read(
            &path.as_path().into(),
            &tokenizer,
            &DataSpec { max_length: 4096, ..DataSpec::default() },
        )
        .unwrap();
        let row = dataset.rows.row(0);
        let tokens: Vec<u32> = row.tokens().collect();
        assert_eq!(tokens, *golden.tokens.as_ref().unwrap(), "{}", golden.conversation);
        let trained: Vec<u8> = row.trained().map(Into::into).collect();
        assert_eq!(trained, *mask, "{}", golden.conversation);
        checked += 1;
    }
    assert!(checked >= 4, "{checked}");
}

#[test]
fn tokens_and_masks_of_each_loss_setting_match_trl() {
    let losses: Losses = serde_json::from_slice(&fs::read(golden("chat/losses.json")).unwrap()).unwrap();
    assert!(losses.results.len() >= 30);
    for loss in &losses.results {
        let Loss { template, row, assistant_only_loss, completion_only_loss, .. } = loss;
        let case = format!("{template} {row} {assistant_only_loss} {completion_only_loss}");
        let base = base_with_source(&losses.templates[template]);
        let path = base.path().join("data.jsonl");
        fs::write(&path, losses.rows[row].to_string()).unwrap();
        let data = DataSpec {
            max_length: 4096,
            assistant_only_loss: *assistant_only_loss,
            completion_only_loss: *completion_only_loss,
            ..DataSpec::default()
        };
        let tokenizer = Tokenizer::load(&base.path().into()).unwrap();
        let dataset = Dataset::read(&path.as_path().into(), &tokenizer, &data).unwrap();
        let trained: Vec<u8> = dataset.rows.row(0).trained().map(Into::into).collect();
        assert_eq!(dataset.rows.row(0).tokens().collect::<Vec<_>>(), loss.tokens, "{case}");
        assert_eq!(trained, loss.trained, "{case}");
    }
}

#[test]
fn transformers_4_and_5_tokenizer_files_give_the_same_result() {
    let load = |name| Tokenizer::load(&golden("chat").join(name).into()).unwrap();
    let (v4, v5) = (load("tokenizer-v4"), load("tokenizer"));
    assert_eq!(v4.eos_token(), v5.eos_token());
    assert_eq!(v4.stop_tokens(), v5.stop_tokens());
    for conversation in goldens().conversations.values() {
        let messages = messages(conversation);
        assert_eq!(v4.render_chat(&messages, true).unwrap(), v5.render_chat(&messages, true).unwrap());
    }
    assert_eq!(v4.encode("Grüße", true).unwrap(), v5.encode("Grüße", true).unwrap());
}
