//! Chat templates and which tokens of a conversation are trained.

use lora_data::Message;
use serde_json::{Value as Json, json};

use crate::base_dir::{BaseDir, CHATML, LLAMA3};

fn turns(turns: &[(&str, &str)]) -> Json {
    let messages: Vec<Json> =
        turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    json!({"messages": messages})
}

fn two_turns() -> Json {
    turns(&[("system", "be"), ("user", "a"), ("assistant", " b"), ("user", "c"), ("assistant", "d é")])
}

#[test]
fn chatml_trains_assistant_turns_including_the_end_token() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    assert_eq!(
        base.marked(two_turns()),
        "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\na<|im_end|>\n\
         <|im_start|>assistant\n⟦ b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n\
         <|im_start|>assistant\n⟦d é<|im_end|>⟧\n"
    );
}

#[test]
fn a_turn_without_a_known_end_token_is_trained_to_its_end() {
    let base = BaseDir::with_template("</s>", CHATML);
    assert!(base.marked(two_turns()).ends_with("assistant\n⟦d é<|im_end|>\n⟧"));
}

#[test]
fn llama3_trains_assistant_turns_and_end_tokens_of_the_generation_config() {
    let base = BaseDir::with_template("</s>", LLAMA3);
    let eot = base.tokenizer().token_to_id("<|eot_id|>").unwrap();
    base.write("generation_config.json", &json!({"eos_token_id": [eot]}).to_string());
    let marked = base.marked(turns(&[("user", "a"), ("assistant", "b"), ("assistant", "c")]));
    assert_eq!(
        marked,
        "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n\
         ⟦b<|eot_id|>⟧<|start_header_id|>assistant<|end_header_id|>\n\n⟦c<|eot_id|>⟧"
    );
}

const MARKED: &str = "{%- for message in messages %}\n\
    {%- if message.role == 'assistant' %}\n\
    {{- '[' }}\n\
    {%- generation -%}\n\
      {{ message.content }}{% if loop.last %}</s>{% endif %}\n\
    {%- endgeneration %}\n\
    {{- ']' }}\n\
    {%- else %}\n\
    {{- '(' + message.content + ')' }}\n\
    {%- endif %}\n\
    {%- endfor %}\n\
    {%- if add_generation_prompt %}{{ '[' }}{% endif %}";

#[test]
fn generation_markers_select_the_trained_tokens() {
    let base = BaseDir::with_template("</s>", MARKED);
    assert_eq!(base.marked(two_turns()), "(be)(a)[⟦ b⟧](c)[⟦d é</s>⟧]");
    let row = json!({
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}],
    });
    assert_eq!(base.marked(row), "(a)[b](c)[⟦d</s>⟧]");
    let error = base.error(&turns(&[("user", "\u{FDD0}"), ("assistant", "b")]).to_string());
    assert_eq!(error, "data.jsonl:1: a message contains the noncharacter U+FDD0 or U+FDD1; remove it");
}

#[test]
fn generation_tags_keep_their_white_space_rules() {
    let base = BaseDir::with_template("</s>", "a \n  {% generation %}\n  b\n  {% endgeneration %}\n c\n");
    let text = base.tokenizer().render_chat(&[], false).unwrap();
    assert_eq!(text, "a \n  b\n c");
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_rejected_with_a_remedy() {
    let forgetful = "{% for message in messages %}\
        {{ message.role }}:{% if message.role == 'user' or loop.last %}{{ message.content }}{% endif %};\
        {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
    let base = BaseDir::with_template("</s>", forgetful);
    let error = base.error(&two_turns().to_string());
    assert!(error.starts_with("data.jsonl:1: the assistant's turn (messages[2]) cannot be found"), "{error}");
    assert!(error.contains("{% generation %} .. {% endgeneration %}"), "{error}");
    assert_eq!(base.marked(turns(&[("user", "a"), ("assistant", "b")])), "user:a;assistant:⟦b;⟧");
}

#[test]
fn template_exceptions_are_reported_with_the_row() {
    let strict = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}";
    let base = BaseDir::with_template("</s>", strict);
    let good = turns(&[("user", "a"), ("assistant", "b")]);
    let error = base.error(&format!("{good}\n\n{}", turns(&[("user", "a"), ("user", "b")])));
    assert!(error.starts_with("data.jsonl:3: the chat template fails: "), "{error}");
    assert!(error.contains("roles must alternate"), "{error}");
}

#[test]
fn an_endless_template_ends_with_an_error() {
    let base = BaseDir::with_template(
        "</s>",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    );
    let error = base.tokenizer().render_chat(&[], false).unwrap_err().to_string();
    assert!(error.contains("fuel"), "{error}");
}

#[test]
fn a_missing_or_invalid_template_fails_chats_only() {
    let base = BaseDir::new("</s>", false);
    assert!(base.error(&two_turns().to_string()).contains("has no chat template (chat_template.jinja, or"));
    base.write("chat_template.jinja", "{% if %}");
    let error = base.error(&two_turns().to_string());
    assert!(error.contains("chat_template.jinja cannot be used: syntax error"), "{error}");
    assert_eq!(base.marked(json!({"text": "ab"})), "a⟦b</s>⟧");
}

#[test]
fn tool_calls_and_tools_reach_the_template() {
    let template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ documents is none }}\
        {% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}\
        {{ m.content }}{% endfor %}";
    let base = BaseDir::with_template("</s>", template);
    let call = json!({"function": {"name": "f", "arguments": {"b": 1, "a": "é<"}}});
    let messages = json!([{"role": "user", "content": "u"},
        {"role": "assistant", "content": null, "tool_calls": [call]}]);
    let expected = "[{\"name\": \"f\"}]Trueu⟦{\"name\": \"f\", \"arguments\": {\"b\": 1, \"a\": \"é<\"}}⟧";
    assert_eq!(base.marked(json!({"messages": messages, "tools": [{"name": "f"}]})), expected);
    assert_eq!(base.marked(json!({"messages": messages, "tools": "[{\"name\": \"f\"}]"})), expected);
}

#[test]
fn the_date_is_fixed_and_python_methods_and_loop_controls_work() {
    let template = "{{ strftime_now('%d %b %Y, %A %-m/%-H %%') }} {{ ' x '.strip() }} \
        {% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}\
        {{ m['content'].split('|')[-1] }}{% endfor %} {{ none }}";
    let base = BaseDir::with_template("</s>", template);
    let messages = [Message::new("user", "a|b"), Message::new("assistant", "c")];
    let text = base.tokenizer().render_chat(&messages, false).unwrap();
    assert_eq!(text, "26 Jul 2024, Friday 7/0 % x b None");
}

#[test]
fn tojson_matches_python_json_dumps() {
    let template = "{{ messages[0].v | tojson(indent=2) }}|\
        {{ messages[0].v | tojson(separators=[',', ':'], sort_keys=true) }}\
        |{{ 'é𝄞\\n' | tojson(ensure_ascii=true) }}|{{ [] | tojson(indent=1) }}";
    let base = BaseDir::with_template("</s>", template);
    let mut message = Message::new("user", "");
    message.extra.insert("v".into(), json!({"b": [1, 2.5, null], "a": {}}));
    let text = base.tokenizer().render_chat(&[message], false).unwrap();
    let expected = "{\n  \"b\": [\n    1,\n    2.5,\n    null\n  ],\n  \"a\": {}\n}\
        |{\"a\":{},\"b\":[1,2.5,null]}|\"\\u00e9\\ud834\\udd1e\\n\"|[]";
    assert_eq!(text, expected);
}
