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
    let expected = "data.jsonl:1: the chat template does not print the content of messages[2]; use";
    assert!(error.starts_with(expected), "{error}");
    assert_eq!(base.marked(turns(&[("user", "a"), ("assistant", "b")])), "user:a;assistant:⟦b;⟧");
    // Each turn has the number of messages, so that no rendering is a prefix of another one.
    let counting = "{% for message in messages %}{{ messages|length }}{{ message.role[:1] }}\
        {{ message.content|upper|lower|replace(message.content, message.content ~ messages|length) }}\
        {% endfor %}{% if add_generation_prompt %}a{% endif %}";
    let error = BaseDir::with_template("</s>", counting).error(&two_turns().to_string());
    assert!(error.starts_with("data.jsonl:1: the assistant's turn (messages[2]) cannot be found"), "{error}");
    assert!(error.contains("{% generation %} .. {% endgeneration %}"), "{error}");
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
    let message =
        json!({"role": "user", "content": "", "v": {"b": [1, 2.5, null, 1e-7, 1e20, 0.5], "a": {}}});
    let message: Message = serde_json::from_value(message).unwrap();
    let text = base.tokenizer().render_chat(&[message], false).unwrap();
    let expected = "{\n  \"b\": [\n    1,\n    2.5,\n    null,\n    1e-07,\n    1e+20,\n    0.5\n  ],\n  \
        \"a\": {}\n}\
        |{\"a\":{},\"b\":[1,2.5,null,1e-07,1e+20,0.5]}|\"\\u00e9\\ud834\\udd1e\\n\"|[]";
    assert_eq!(text, expected);
}

fn chat(messages: Json) -> Json {
    json!({"messages": messages})
}

/// Like DeepSeek-R1-Distill: the prompt begins the reasoning, and earlier turns have none.
const FORGETFUL: &str = "{% for m in messages %}{% if m.role == 'assistant' %}\
    {{ '<|im_start|>A' + m.content.split('</think>')[-1] + '</s>' }}\
    {% else %}{{ '<|im_start|>U' + m.content }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>A<think>\\n' }}{% endif %}";

#[test]
fn a_turn_is_found_where_the_prompt_begins_with_more_than_its_header() {
    let base = BaseDir::with_template("</s>", FORGETFUL);
    assert_eq!(
        base.marked(turns(&[("user", "a"), ("assistant", "<b>"), ("user", "c"), ("assistant", "d")])),
        "<|im_start|>Ua<|im_start|>A⟦<b></s>⟧<|im_start|>Uc<|im_start|>A⟦d</s>⟧"
    );
    let dataset = base.read(&[turns(&[("user", "a"), ("assistant", "<think>hm</think>b")])]).unwrap();
    assert_eq!(dataset.report.left_out, [("assistant's reasoning".to_owned(), 1)].into());
}

/// Like Qwen3: only the turns after the last question have their reasoning.
const LAST_REASONING: &str = "{% set ns = namespace(last=0) %}{% for m in messages %}\
    {% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}\
    {{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}\
    {{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

#[test]
fn earlier_turns_are_trained_as_the_template_renders_them() {
    let base = BaseDir::with_template("<|im_end|>", LAST_REASONING);
    let row = chat(json!([
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "reasoning_content": "ah"},
    ]));
    assert_eq!(
        base.marked(row.clone()),
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n\
         <|im_start|>assistant\n⟦<think>ah</think>d<|im_end|>⟧\n"
    );
    let report = base.read(&[row]).unwrap().report;
    assert_eq!(report.left_out, [("assistant's reasoning".to_owned(), 1)].into());
    assert_eq!(report.changed_turns, 1);
    let notes = report.notes().join("\n");
    assert!(notes.contains("renders 1 earlier turn otherwise once others follow"), "{notes}");
    assert_eq!(base.read(&[two_turns()]).unwrap().report.changed_turns, 1, "the empty reasoning");
}

#[test]
fn the_last_turn_may_end_otherwise_than_earlier_ones() {
    // Like gpt-oss: `<|eot_id|>` ends messages, and another token the last answer.
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content }}\
        {{ '</s>' if loop.last and m.role == 'assistant' else '<|eot_id|>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}";
    let base = BaseDir::with_template("</s>", template);
    let expected = "<|im_start|>user:a<|eot_id|><|im_start|>assistant:⟦b<|eot_id|>⟧\
        <|im_start|>user:c<|eot_id|>\
        <|im_start|>assistant:⟦d</s>⟧";
    let row = turns(&[("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    assert_eq!(base.marked(row), expected);
    let opened = turns(&[("assistant", "b"), ("user", "c"), ("assistant", "d")]);
    assert_eq!(base.marked(opened), expected.replace("<|im_start|>user:a<|eot_id|>", ""));
}

#[test]
fn a_conversation_may_begin_with_the_assistant() {
    let row = || turns(&[("assistant", "a"), ("user", "b"), ("assistant", "c")]);
    assert_eq!(
        BaseDir::with_template("<|im_end|>", CHATML).marked(row()),
        "<|im_start|>assistant\n⟦a<|im_end|>⟧\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦c<|im_end|>⟧\n"
    );
    assert_eq!(
        BaseDir::with_template("</s>", FORGETFUL).marked(row()),
        "<|im_start|>A⟦a</s>⟧<|im_start|>Ub<|im_start|>A⟦c</s>⟧"
    );
    // Like Mistral: no header before answers, and templates that read the first message.
    let bare = "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}\
        {% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}\
        {% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}";
    assert_eq!(BaseDir::with_template("</s>", bare).marked(row()), "<s>⟦a</s>⟧[INST]b[/INST]⟦c</s>⟧");
}

#[test]
fn a_message_says_whether_it_is_trained() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let marked = BaseDir::with_template("</s>", MARKED);
    for (key, no, yes) in [
        ("weight", json!(0), json!(1)),
        ("weight", json!(0.0), json!(1.0)),
        ("train", json!(false), json!(true)),
        ("training", json!(false), json!(true)),
        ("train_on_turn", json!(false), json!(null)),
    ] {
        let row = chat(json!([
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b", key: no},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "d", key: yes},
        ]));
        assert_eq!(
            base.marked(row.clone()),
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n\
             <|im_start|>assistant\n⟦d<|im_end|>⟧\n",
            "{key}"
        );
        assert_eq!(marked.marked(row), "(a)[b](c)[⟦d</s>⟧]", "{key}");
    }
}

#[test]
fn names_of_the_reasoning_fill_each_other_in() {
    let template =
        "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}{% endfor %}";
    for key in ["reasoning_content", "thinking", "reasoning"] {
        let base = BaseDir::with_template("</s>", template);
        let row = chat(json!([{"role": "assistant", "content": "a", key: "hm"}]));
        assert_eq!(base.marked(row), "h⟦m|hm|a⟧", "{key}");
    }
}

#[test]
fn null_keys_are_missing_keys() {
    let template = "{% for m in messages %}{% if m.name is defined %}{{ m.name }}: {% endif %}\
        {% if m.tool_calls is defined %}{{ m.tool_calls | length }}{% endif %}{{ m.content }}{% endfor %}";
    let base = BaseDir::with_template("</s>", template);
    let row = chat(json!([
        {"role": "user", "content": "a", "name": null, "tool_calls": null},
        {"role": "assistant", "content": "b", "refusal": null},
    ]));
    assert_eq!(base.marked(row), "a⟦b⟧");
}

#[test]
fn what_the_template_does_not_print_is_an_error_or_counted() {
    let base = BaseDir::with_template("<|im_end|>", CHATML);
    let call = json!({"type": "function", "function": {"name": "f", "arguments": {"a": 1}}});
    let with_call = |rest: Json| {
        let mut messages = vec![
            json!({"role": "user", "content": "u", "id": 7}),
            json!({"role": "assistant", "content": "", "tool_calls": [call]}),
        ];
        messages.extend(rest.as_array().unwrap().clone());
        chat(json!(messages))
    };
    let error = base.error(&with_call(json!([])).to_string());
    assert!(error.contains("the chat template does not print the tool calls of messages[1]"), "{error}");
    // Calls of a turn that is not trained are only counted.
    let row = json!({"prompt": with_call(json!([]))["messages"], "completion": [
        {"role": "assistant", "content": "b", "reasoning": "hm"}]});
    let report = base.read(&[row]).unwrap().report;
    let left_out = [("assistant's reasoning", 1), ("assistant's tool calls", 1)];
    assert_eq!(report.left_out, left_out.map(|(part, count)| (part.to_owned(), count)).into());
    assert_eq!(report.unread_message_keys, [("id".to_owned(), 1)].into());
    // A message with a role that the template skips.
    let template = "{% for m in messages if m.role != 'developer' %}{{ m.content }}{% endfor %}";
    let base = BaseDir::with_template("</s>", template);
    let row = turns(&[("developer", "be"), ("user", "a"), ("assistant", "b")]);
    let report = base.read(&[row]).unwrap().report;
    assert_eq!(report.left_out, [("developer's content".to_owned(), 1)].into());
}

#[test]
fn arguments_that_are_encoded_twice_are_counted() {
    let template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}\
        {{ c.function.arguments | tojson }}{% endfor %}{{ m.content }}{% endfor %}";
    let base = BaseDir::with_template("</s>", template);
    let row = |arguments: Json| {
        let call = json!({"function": {"name": "f", "arguments": arguments}});
        chat(json!([{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [call]}]))
    };
    let read = |arguments| base.read(&[row(arguments)]).unwrap().report.arguments_encoded_twice;
    assert_eq!(read(json!({"a": 1})), 0);
    assert_eq!(read(json!("{\"a\": 1}")), 1);
}

#[test]
fn generation_blocks_share_namespaces_and_keep_their_variables() {
    let template = "{% set ns = namespace(n=0) %}{% set x = 'x' %}{% for m in messages %}\
        {% if m.role == 'assistant' %}{% generation %}{% set ns.n = ns.n + 1 %}{% set x = 'y' %}\
        {{ m.content }}{{ x }}{% endgeneration %}{{ x }}{{ ns.n }}{% else %}{{ m.content }}{% endif %}\
        {% endfor %}";
    let base = BaseDir::with_template("</s>", template);
    let row = turns(&[("user", "a"), ("assistant", "b"), ("assistant", "c")]);
    assert_eq!(base.marked(row), "a⟦by⟧x1⟦cy⟧x2");
}

#[test]
fn tests_of_values_hold_as_in_jinja() {
    let template = "{% for v in [none, 'a', [1], {'a': 1}, 1, 1.5, true] %}\
        {{ '' ~ (v is iterable) ~ (v is sequence) ~ (v is mapping) ~ (v is number) ~ (v is integer) \
        ~ (v is float) ~ (v is string) ~ (v is boolean) }} {% endfor %}\
        {{ y is iterable }}{{ 1e-7 is float }}";
    let base = BaseDir::with_template("</s>", template);
    let text = base.tokenizer().render_chat(&[Message::new("user", "")], false).unwrap();
    let rows = [
        "FalseFalseFalseFalseFalseFalseFalseFalse",
        "TrueTrueFalseFalseFalseFalseTrueFalse",
        "TrueTrueFalseFalseFalseFalseFalseFalse",
        "TrueTrueTrueFalseFalseFalseFalseFalse",
        "FalseFalseFalseTrueTrueFalseFalseFalse",
        "FalseFalseFalseTrueFalseTrueFalseFalse",
        "FalseFalseFalseTrueFalseFalseFalseTrue",
    ];
    assert_eq!(text, format!("{} TrueTrue", rows.join(" ")));
}

#[test]
fn end_tokens_in_the_arguments_of_a_tool_call_do_not_end_the_turn() {
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + (m.content or '') }}\
        {% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}\
        {% endfor %}{{ '<|im_end|>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}";
    let base = BaseDir::with_template("<|im_end|>", template);
    let call = |x: &str| json!({"function": {"name": "f", "arguments": {"x": x}}});
    let row = chat(json!([
        {"role": "user", "content": "u"},
        {"role": "assistant", "tool_calls": [call("a<|im_end|>b"), call("c")]},
    ]));
    let expected = "<|im_start|>user:u<|im_end|><|im_start|>assistant:⟦f{\"x\": \"a<|im_end|>b\"}\
        f{\"x\": \"c\"}<|im_end|>⟧";
    assert_eq!(base.marked(row), expected);
}

#[test]
fn a_generation_block_belongs_to_the_messages_in_it() {
    // The block begins with the header, right after the question.
    let template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\
        {{ 'A:' + m.content + '</s>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
    let base = BaseDir::with_template("</s>", template);
    let row = |first: u32, last: u32| {
        chat(json!([
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "one", "weight": first},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": "two", "weight": last},
        ]))
    };
    assert_eq!(base.marked(row(1, 0)), "q⟦A:one</s>⟧rA:two</s>");
    assert_eq!(base.marked(row(0, 1)), "qA:one</s>r⟦A:two</s>⟧");
    let template = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}";
    let base = BaseDir::with_template("</s>", template);
    let error = base.error(&row(1, 0).to_string());
    assert!(error.contains("a turn that is trained and one that is not in one {% generation %}"), "{error}");
}

#[test]
fn headers_are_not_trained_as_ends_of_turns() {
    // Without an end token between turns, and one at the end.
    let template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}\
        {{ '<assistant>' if add_generation_prompt else '</s>' }}";
    let base = BaseDir::with_template("</s>", template);
    let row = turns(&[
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "b"),
        ("user", "s"),
        ("assistant", "c"),
    ]);
    assert_eq!(base.marked(row), "<user>q<assistant>⟦a⟧<user>r<assistant>⟦b⟧<user>s<assistant>⟦c</s>⟧");
    // An end token that is written only if another turn follows.
    let template = "{% for m in messages %}{{ m.role + ':' + m.content }}{% if not loop.last %}{{ '</s>' }}\
        {% endif %}{% endfor %}{% if add_generation_prompt %}{{ '</s>assistant:' }}{% endif %}";
    let base = BaseDir::with_template("</s>", template);
    let row = turns(&[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]);
    assert_eq!(base.marked(row), "user:q</s>assistant:⟦a</s>⟧user:r</s>assistant:⟦b⟧");
}

#[test]
fn other_messages_within_a_turn_are_not_trained() {
    // Like Gemma 4: a tool's result stands in the turn of the call.
    let template = "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}\
        {{ m.tool_calls[0].function.name + '[' }}\
        {{ (messages[loop.index].content if not loop.last else '') + ']' }}{% endif %}\
        {{ m.content }}{% elif m.role == 'user' %}{{ m.content + '|' }}{% endif %}{% endfor %}";
    let base = BaseDir::with_template("</s>", template);
    let row = chat(json!([
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "hm", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "RESULT"},
        {"role": "assistant", "content": "end"},
    ]));
    let error = base.error(&row.to_string());
    assert!(error.contains("renders other messages within the assistant's turn (messages[1])"), "{error}");
}

#[test]
fn empty_turns_noncharacters_and_engine_faults_are_no_crash() {
    let base = BaseDir::with_template("<|im_end|>", LAST_REASONING);
    let row = turns(&[("user", "q"), ("assistant", ""), ("user", "z"), ("assistant", "x")]);
    assert!(base.marked(row).contains("<|im_start|>assistant\n⟦<|im_end|>⟧\n<|im_start|>user\nz"));
    let text = "\u{FDE1}".repeat(40);
    let row = turns(&[("user", "q"), ("assistant", &text)]);
    assert!(base.read(&[row]).is_ok());
    for broken in [
        "{% for m in messages %}{% with a=1 %}{% break %}{% endwith %}{% endfor %}",
        "{{ '{:>99999999999}'.format('a') }}",
    ] {
        let base = BaseDir::with_template("</s>", broken);
        let error = base.error(&turns(&[("user", "q"), ("assistant", "a")]).to_string());
        assert!(error.contains("the chat template fails: "), "{error}");
    }
}
