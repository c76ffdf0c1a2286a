//! The settings of the section `data` that choose what is read from the rows.

use lora_data::{DataError, DataReport, Dataset, Tokenizer};
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
    assert_eq!(
        error(&prompts, row),
        "data.jsonl:1: data.format prompt_completion needs `prompt`; the row's keys are `messages`, `text`, \
         `instruction`, `output`"
    );
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
    assert_eq!(
        error,
        "data.jsonl:1: data.format prompt_completion needs `answer` (data.columns.completion); the row's \
         keys are `question`"
    );
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
fn variables_of_a_row_precede_those_of_the_job() {
    let template = "{% for m in messages %}\
                    [{{ m.role }} {{ mood }}{{ other }}]{{ m.content }}</s>{% endfor %}\
                    {% if add_generation_prompt %}[assistant {{ mood }}{{ other }}]{% endif %}";
    let mut data = DataSpec { chat_template: Some(template.into()), ..DataSpec::default() };
    data.chat_template_kwargs.insert("mood".into(), "job".into());
    data.chat_template_kwargs.insert("other".into(), "!".into());
    let base = BaseDir::with_template("</s>", CHATML);
    let mut row =
        json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
    let mut rows = vec![row.clone()];
    for variables in [json!({"mood": "row"}), json!({}), Json::Null, json!({"mood": null, "unread": 1})] {
        row["chat_template_kwargs"] = variables;
        rows.push(row.clone());
    }
    for (whole, from) in [
        (false, "[user job!]q</s>[assistant job!]⟦a</s>⟧"),
        (true, "[⟦user job!]q</s>[assistant job!]a</s>⟧"),
    ] {
        let data = DataSpec { assistant_only_loss: !whole, ..data.clone() };
        let (dataset, texts) = read(&base, &data, &rows).unwrap();
        assert_eq!(dataset.report.unread_variables, [("unread".to_owned(), 1)].into());
        let with = |mood: &str| from.replace("job", mood);
        assert_eq!(texts, [with("job"), with("row"), with("job"), with("job"), with("None")]);
    }
    for (variables, expected) in [
        (json!("mood"), "`chat_template_kwargs` is a string; it must be an object"),
        (json!({"tools": []}), "`chat_template_kwargs` has `tools`, which the row sets itself"),
    ] {
        row["chat_template_kwargs"] = variables;
        let error = error(&data, row.clone());
        assert!(error.ends_with(expected), "{error}");
    }
    // Other rows have no template.
    let plain = json!({"text": "t", "chat_template_kwargs": {"mood": "row"}});
    let (dataset, _) = read(&base, &data, &[plain]).unwrap();
    assert_eq!(dataset.report.ignored_keys["chat_template_kwargs"], 1);
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

fn whole_conversations() -> DataSpec {
    DataSpec { assistant_only_loss: false, ..DataSpec::default() }
}

#[test]
fn whole_conversations_are_trained_if_the_job_says_so() {
    let data = whole_conversations();
    let (user, answer) =
        (json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "a"}));
    let (q, a) = ("<|im_start|>user\nq<|im_end|>\n", "<|im_start|>assistant\n");
    let expected = [format!("<|im_start|>⟦{}{a}a<|im_end|>\n⟧", &q["<|im_start|>".len()..])];
    assert_eq!(marked(&data, json!({"messages": [user, answer]})), expected);
    let sharegpt = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
    assert_eq!(marked(&data, json!({"conversations": sharegpt})), expected);
    let alpaca = DataSpec { format: Some(RowFormat::AlpacaChat), ..data.clone() };
    assert_eq!(marked(&alpaca, json!({"instruction": "q", "output": "a"})), expected);
    // completion_only_loss decides about a prompt: the completion is trained with its later turns.
    let row = json!({"prompt": [user], "completion": [answer, user]});
    let first = q.trim_end_matches('\n');
    assert_eq!(marked(&data, row.clone()), [format!("{q}{a}⟦a<|im_end|>\n{first}\n⟧")]);
    let prompts = DataSpec { completion_only_loss: false, ..data.clone() };
    assert!(marked(&prompts, row)[0].starts_with("<|im_start|>⟦user\nq<|im_end|>"));
    // Texts have no turns.
    assert_eq!(marked(&data, json!({"prompt": "p ", "completion": "c"})), ["p ⟦c<|im_end|>⟧"]);
    assert_eq!(marked(&data, json!({"text": "ab"})), ["a⟦b<|im_end|>⟧"]);
}

/// The template renders every message otherwise once others follow.
#[test]
fn whole_conversations_need_no_turns() {
    let template = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{{ loop.length }}{% endfor %}";
    let base = BaseDir::with_template("</s>", template);
    let turn = |role, content| json!({"role": role, "content": content});
    let row = json!({"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "r"),
        turn("assistant", "b"), turn("user", "s")]});
    let rows = std::slice::from_ref(&row);
    let error = read(&base, &DataSpec::default(), rows).unwrap_err().to_string();
    assert!(error.contains("cannot be found in the rendered conversation"), "{error}");
    let (dataset, texts) = read(&base, &whole_conversations(), rows).unwrap();
    assert_eq!(texts, ["5⟦q54a53r52b51s5⟧"]);
    assert_eq!(dataset.report.notes(), [""; 0]);
    let row = json!({"prompt": [turn("user", "q")], "completion": [turn("assistant", "a")]});
    let (dataset, texts) = read(&base, &whole_conversations(), &[row]).unwrap();
    assert_eq!(texts, ["2⟦q21a2⟧"]);
    let notes = dataset.report.notes().join("\n");
    assert!(notes.contains("in 1 row the chat template renders the prompt otherwise than alone"), "{notes}");
}

#[test]
fn a_message_without_weight_contradicts_a_loss_over_whole_conversations() {
    let turn = |role, weight| json!({"role": role, "content": "x", "weight": weight});
    for role in ["user", "assistant"] {
        let row = json!({"messages": [turn("assistant", 1), turn(role, 0)]});
        let expected = "data.jsonl:1: messages[1] is not to be trained (weight 0, or a false flag), but with \
                        data.assistant_only_loss: false all messages are trained; set \
                        data.assistant_only_loss: true, or remove the key from the message";
        assert_eq!(error(&whole_conversations(), row), expected);
    }
    let row = json!({"prompt": [turn("user", 0)], "completion": [turn("assistant", 1)]});
    assert_eq!(marked(&whole_conversations(), row).len(), 1, "the prompt is not trained anyway");
}

#[test]
fn the_end_of_a_whole_conversation_is_noted_if_it_is_an_answer() {
    let notes = |rows: Json| {
        let base = BaseDir::with_template("</s>", CHATML);
        read(&base, &whole_conversations(), &[json!({"messages": rows})]).unwrap().0.report.notes().join("\n")
    };
    let turn = |role| json!({"role": role, "content": "x"});
    assert!(notes(json!([turn("assistant")])).contains("1 row ends with token"));
    assert_eq!(notes(json!([turn("assistant"), turn("user")])), "");
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

/// The report of these rows, and its notes.
fn report(base: &BaseDir, data: &DataSpec, rows: &[Json]) -> (DataReport, String) {
    let report = read(base, data, rows).unwrap().0.report;
    let notes = report.notes().join("\n");
    (report, notes)
}

#[test]
fn empty_answers_and_unread_tools_are_noted() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let data = DataSpec::default();
    let chat =
        |answer: &str| json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]);
    let rows = [
        json!({"messages": chat("")}),
        json!({"messages": chat(" \n")}),
        json!({"prompt": "a ", "completion": ""}),
        json!({"instruction": "a", "output": ""}),
        json!({"messages": chat("a"), "tools": [{"name": "f"}]}),
        json!({"messages": chat("a"), "tools": []}),
        json!({"text": "a"}),
    ];
    let (found, notes) = report(&base, &data, &rows);
    assert_eq!((found.empty_answers, found.unread_tools), (4, 1));
    assert!(notes.contains("the chat template does not read the tools of 1 row: "), "{notes}");
    assert!(notes.contains("4 answers are empty: only the end of the turn is trained"), "{notes}");
    let with_tools = BaseDir::with_template("<|im_end|>", &format!("{{{{ tools }}}}{CHATML}"));
    assert_eq!(report(&with_tools, &data, &rows[4..]).0.unread_tools, 0);
}

#[test]
fn the_report_says_which_settings_rows_use() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let mut data = DataSpec { system_prompt: Some("S".into()), ..DataSpec::default() };
    data.columns.insert("prompt".into(), "question".into());
    data.columns.insert("text".into(), "body".into());
    let turn = |role: &str| json!({"role": role, "content": "q"});
    let chat = |role: &str| json!({"messages": [turn(role), turn("assistant")]});
    let rows = [chat("user"), chat("system"), json!({"question": "q", "completion": "c"})];
    let (found, _) = report(&base, &data, &rows);
    assert_eq!(found.system_prompts, 1);
    assert_eq!(found.renamed_columns, [("prompt".to_owned(), 1)].into());
    let tokenizer = Tokenizer::for_job(&base.dir.path().into(), &data).unwrap();
    let variables = json!({"messages": 1, "enable_thinking": false}).as_object().unwrap().clone();
    assert_eq!(tokenizer.unread_variables(&variables).collect::<Vec<_>>(), ["enable_thinking"]);
}
