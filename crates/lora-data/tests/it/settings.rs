//! The settings of the section `data` that choose what is read from the rows.

use lora_data::{DataError, Dataset, Tokenizer};
use lora_spec::{DataSpec, RowFormat};
use serde_json::{Value as Json, json};

use crate::base_dir::{BaseDir, CHATML};

fn read(base: &BaseDir, data: &DataSpec, rows: &[Json]) -> Result<(Dataset, Vec<String>), DataError> {
    let text: Vec<String> = rows.iter().map(Json::to_string).collect();
    let tokenizer = Tokenizer::for_job(&base.dir.path().into(), data)?;
    let dataset = Dataset::read(&base.write("data.jsonl", &text.join("\n")).into(), &tokenizer, data)?;
    let marked = dataset.rows.iter().map(|row| tokenizer.marked_text(row).unwrap()).collect();
    Ok((dataset, marked))
}

fn marked(data: &DataSpec, row: Json) -> Vec<String> {
    read(&BaseDir::with_template("<|im_end|>", CHATML), data, &[row]).unwrap().1
}

fn error(data: &DataSpec, row: Json) -> String {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    base.error_text(read(&base, data, &[row]).unwrap_err())
}

#[test]
fn a_format_chooses_among_the_keys_of_a_row() {
    let row = json!({"messages": [{"role": "assistant", "content": "m"}], "text": "t",
        "instruction": "i", "output": "o"});
    let of = |format| marked(&DataSpec { format, ..DataSpec::default() }, row.clone()).concat();
    assert_eq!(of(None), "<|im_start|>assistant\n⟦m<|im_end|>⟧\n");
    assert_eq!(of(Some(RowFormat::Text)), "t⟦<|im_end|>⟧");
    assert!(of(Some(RowFormat::Alpaca)).ends_with("### Response:⟦o<|im_end|>⟧"));
    let chat = "<|im_start|>user\ni<|im_end|>\n<|im_start|>assistant\n⟦o<|im_end|>⟧\n";
    assert_eq!(of(Some(RowFormat::AlpacaChat)), chat);
    let prompts = DataSpec { format: Some(RowFormat::PromptCompletion), ..DataSpec::default() };
    assert_eq!(error(&prompts, row), "data.jsonl:1: a row of the format prompt/completion needs `prompt`");
}

#[test]
fn columns_name_the_keys_of_a_format() {
    let columns = [("prompt", "question"), ("completion", "answer")];
    let columns = columns.map(|(key, column)| (key.to_owned(), column.to_owned())).into();
    let data = DataSpec { columns, ..DataSpec::default() };
    assert_eq!(marked(&data, json!({"question": "q ", "answer": "a"})), ["q ⟦a<|im_end|>⟧"]);
    let base = BaseDir::new("</s>", false);
    // A key that has the name of a format's key, but is not its column, has no effect.
    let row = json!({"question": "q ", "answer": "a", "prompt": "another"});
    let (dataset, texts) = read(&base, &data, &[row]).unwrap();
    assert_eq!(texts, ["q ⟦a</s>⟧"]);
    let notes = dataset.report.notes().join("\n");
    assert!(notes.contains("prompt (not the column of data.columns)"), "{notes}");
    let data = DataSpec { format: Some(RowFormat::PromptCompletion), ..data };
    let error = error(&data, json!({"question": "q"}));
    assert_eq!(error, "data.jsonl:1: a row of the format prompt/completion needs `answer`");
}

#[test]
fn conversations_without_a_system_prompt_get_the_one_of_the_job() {
    let data = DataSpec { system_prompt: Some("S".into()), ..DataSpec::default() };
    let answer = json!({"role": "assistant", "content": "a"});
    let turn = "<|im_start|>assistant\n⟦a<|im_end|>⟧\n";
    assert_eq!(
        marked(&data, json!({"messages": [answer]})),
        [format!("<|im_start|>system\nS<|im_end|>\n{turn}")]
    );
    let own = json!({"messages": [{"role": "system", "content": "own"}, answer]});
    assert_eq!(marked(&data, own), [format!("<|im_start|>system\nown<|im_end|>\n{turn}")]);
    // The prompt's turns stay untrained.
    let row = json!({"prompt": [answer, {"role": "user", "content": "q"}], "completion": [answer]});
    let text = marked(&data, row.clone()).concat();
    assert_eq!((text.matches('⟦').count(), text.ends_with(turn)), (1, true), "{text}");
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let rows = [json!({"text": "t"}), json!({"messages": [answer]}), row];
    let (dataset, texts) = read(&base, &data, &rows).unwrap();
    assert_eq!((texts[0].as_str(), dataset.report.conversations), ("t⟦<|im_end|>⟧", 2));
}

#[test]
fn a_template_of_the_job_and_its_variables_replace_those_of_the_base() {
    let template = "{% for m in messages %}[{{ m.role }}{{ mood }}]{{ m.content }}</s>{% endfor %}\
                    {% if add_generation_prompt %}[assistant{{ mood }}]{% endif %}";
    let mut data = DataSpec { chat_template: Some(template.into()), ..DataSpec::default() };
    data.chat_template_kwargs.insert("mood".into(), "!".into());
    let base = BaseDir::with_template("</s>", CHATML);
    let row = json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
    let (_, texts) = read(&base, &data, std::slice::from_ref(&row)).unwrap();
    assert_eq!(texts, ["[user!]q</s>[assistant!]⟦a</s>⟧"]);
    let tokenizer = Tokenizer::for_job(&base.dir.path().into(), &data).unwrap();
    assert_eq!(
        (tokenizer.template_source(), tokenizer.template_of_job()),
        (Some("data.chat_template"), Some(template))
    );
    let invalid = DataSpec { chat_template: Some("{% if %}".into()), ..DataSpec::default() };
    let error = base.error_text(read(&base, &invalid, &[row]).unwrap_err());
    assert!(error.starts_with("data.chat_template: "), "{error}");
}

#[test]
fn variables_of_a_single_row_are_refused_unless_they_are_the_jobs() {
    let mut row = json!({"messages": [{"role": "assistant", "content": "a"}]});
    row["chat_template_kwargs"] = json!({"enable_thinking": false});
    let mut data = DataSpec::default();
    let error = error(&data, row.clone());
    assert!(error.contains("set data.chat_template_kwargs"), "{error}");
    data.chat_template_kwargs.insert("enable_thinking".into(), false.into());
    assert_eq!(marked(&data, row).len(), 1);
}

#[test]
fn prompts_are_trained_if_the_job_says_so() {
    let data = DataSpec { completion_only_loss: false, ..DataSpec::default() };
    let text = marked(&data, json!({"prompt": "ab ", "completion": "c"}));
    assert_eq!(text, ["a⟦b c<|im_end|>⟧"], "the first token has no predecessor");
    let turn = |content| json!([{"role": "assistant", "content": content}]);
    let text = marked(&data, json!({"prompt": turn("p"), "completion": turn("c")})).concat();
    assert!(text.contains("⟦p<|im_end|>⟧") && text.contains("⟦c<|im_end|>⟧"), "{text}");
}

/// Each turn is rendered as the model sees it, also by a template that drops earlier reasoning.
#[test]
fn split_turns_make_a_sample_of_each_trained_turn() {
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n\
                    {% if m.reasoning_content and loop.last %}({{ m.reasoning_content }}){% endif %}\
                    {{ m.content }}<|im_end|>\n{% endfor %}\
                    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let base = BaseDir::with_template("<|im_end|>", template);
    let answer =
        |content, thought| json!({"role": "assistant", "content": content, "reasoning_content": thought});
    let mut skipped = answer("b", "y");
    skipped["weight"] = 0.into();
    let user = json!({"role": "user", "content": "q"});
    let row = json!({"messages": [user, answer("a", "x"), user, skipped, user, answer("c", "z"), user]});
    let split = DataSpec { split_turns: true, ..DataSpec::default() };
    let (dataset, texts) = read(&base, &split, std::slice::from_ref(&row)).unwrap();
    let q = "<|im_start|>user\nq<|im_end|>\n";
    let a = "<|im_start|>assistant\n";
    assert_eq!(
        texts,
        [
            format!("{q}{a}⟦(x)a<|im_end|>⟧\n"),
            format!("{q}{a}a<|im_end|>\n{q}{a}b<|im_end|>\n{q}{a}⟦(z)c<|im_end|>⟧\n"),
        ]
    );
    assert_eq!((dataset.report.rows_read, dataset.report.rows_kept), (1, 2));
    assert_eq!(dataset.report.changed_turns, 0);
    let (dataset, texts) = read(&base, &DataSpec::default(), &[row]).unwrap();
    assert!(texts.len() == 1 && !texts[0].contains("(x)"), "{texts:?}");
    let notes = dataset.report.notes().join("\n");
    assert!(notes.contains("data.split_turns: true"), "{notes}");
}

#[test]
fn unexpected_special_tokens_are_noted() {
    let notes = |base: &BaseDir, row: Json| {
        read(base, &DataSpec::default(), &[row]).unwrap().0.report.notes().join("\n")
    };
    let answer = json!({"messages": [{"role": "assistant", "content": "a"}]});
    let ends = notes(&BaseDir::with_template("</s>", CHATML), answer.clone());
    assert!(ends.contains("1 row ends with token") && ends.contains("eos_token_id"), "{ends}");
    assert_eq!(notes(&BaseDir::with_template("<|im_end|>", CHATML), answer), "");
    let twice = notes(&BaseDir::new("</s>", true), json!({"text": "<s>a"}));
    assert!(twice.contains("1 row begins with two beginning-of-sequence tokens"), "{twice}");
    // `hel` is one token.
    let shared = notes(&BaseDir::new("</s>", false), json!({"prompt": "he", "completion": "lo"}));
    assert!(shared.contains("in 1 row the first trained token has characters of the prompt"), "{shared}");
}
