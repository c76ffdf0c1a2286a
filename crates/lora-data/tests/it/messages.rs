//! Messages whose parts a template drops or whose keys say how they are trained.

use serde_json::{Value as Json, json};

use crate::base_dir::{BaseDir, CHATML};

/// Marks the header of the generation prompt as generated, like some training templates.
const MARKS_THE_HEADER: &str = "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}\
    {% generation %}assistant\n{{ m.content }}<|im_end|>{% endgeneration %}{% else %}\
    {{ m.role + '\\n' + m.content }}<|im_end|>{% endif %}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Prints the first tool call of a message only.
const ONE_CALL: &str = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}\
    {% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}<|im_end|>{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant{% endif %}";

fn user(content: &str) -> Json {
    json!({"role": "user", "content": content})
}

fn assistant(content: &str) -> Json {
    json!({"role": "assistant", "content": content})
}

fn error(template: &str, row: Json) -> String {
    let base = BaseDir::with_template("<|im_end|>", template);
    base.error_text(base.read(&[row]).unwrap_err())
}

fn notes(template: &str, row: Json) -> String {
    BaseDir::with_template("<|im_end|>", template).read(&[row]).unwrap().report.notes().join("\n")
}

/// As in TRL, where a token is trained if `assistant_only_loss` and `completion_only_loss` allow
/// it.
#[test]
fn a_completion_is_trained_after_the_generation_prompt() {
    let base = BaseDir::with_template("<|im_end|>", MARKS_THE_HEADER);
    let completion = json!({"prompt": [user("q")], "completion": [assistant("b")]});
    let begin = "<|im_start|>user\nq<|im_end|><|im_start|>";
    assert_eq!(base.marked(completion), format!("{begin}assistant\n⟦b<|im_end|>⟧"));
    // Without a prompt the template's marks decide.
    let conversation = json!({"messages": [user("q"), assistant("b")]});
    assert_eq!(base.marked(conversation), format!("{begin}⟦assistant\nb<|im_end|>⟧"));
}

#[test]
fn a_turn_of_which_a_tool_call_is_dropped_is_refused() {
    let call = |name: &str| json!({"function": {"name": name, "arguments": {}}});
    let row = |calls: &[&str]| {
        let calls: Vec<Json> = calls.iter().map(|name| call(name)).collect();
        json!({"messages": [user("q"), {"role": "assistant", "content": "", "tool_calls": calls}]})
    };
    let base = BaseDir::with_template("<|im_end|>", ONE_CALL);
    assert!(base.read(&[row(&["f"])]).is_ok());
    let error = error(ONE_CALL, row(&["f", "g"]));
    assert!(error.contains("prints 1 of the 2 tool calls of messages[1]"), "{error}");
}

#[test]
fn reasoning_has_one_text() {
    let row = |keys: Json| {
        let mut message = assistant("a");
        message.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        json!({"messages": [user("q"), message]})
    };
    let differ = error(CHATML, row(json!({"reasoning_content": "r1", "thinking": "r2"})));
    assert!(differ.contains("has `reasoning_content` and `thinking` with different texts"), "{differ}");
    let list = error(CHATML, row(json!({"reasoning_content": ["r"]})));
    assert!(list.contains("messages[1].reasoning_content is a list; it must be a string"), "{list}");
    let template = "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' }}{% if m.reasoning_content %}\
        <{{ m.reasoning_content }}>{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant:{% endif %}";
    let base = BaseDir::with_template("<|im_end|>", template);
    for keys in
        [json!({"reasoning_content": "", "thinking": "r"}), json!({"reasoning": "r", "thinking": "r"})]
    {
        let marked = base.marked(row(keys.clone()));
        assert!(marked.ends_with("assistant:⟦<r>a<|im_end|>⟧"), "{keys}: {marked}");
    }
}

#[test]
fn a_flag_on_a_turn_that_is_never_trained_has_a_note() {
    let flagged = |role: &str| json!({"role": role, "content": "q", "train": true});
    let noted = notes(CHATML, json!({"messages": [flagged("user"), flagged("assistant")]}));
    assert!(noted.contains("1 message of a user or tool has a key that says to train it"), "{noted}");
    assert_eq!(notes(CHATML, json!({"messages": [user("q"), flagged("assistant")]})), "");
}

#[test]
fn tools_that_a_template_replaces_have_a_note() {
    let row = json!({"messages": [user("q"), assistant("a")], "tools": [{"name": "f"}]});
    let replaced = format!("{{% set tools = [] %}}{{{{ tools | length }}}}{CHATML}");
    assert!(notes(&replaced, row.clone()).contains("does not read the tools of 1 row"));
    let printed = format!("{{{{ tools | length }}}}{CHATML}");
    assert_eq!(notes(&printed, row), "");
}

#[test]
fn documents_are_a_variable_of_a_row() {
    let template = format!("{{% for d in documents or [] %}}{{{{ d.text }}}}{{% endfor %}}{CHATML}");
    let base = BaseDir::with_template("<|im_end|>", &template);
    let row = json!({"messages": [user("q"), assistant("a")],
        "chat_template_kwargs": {"documents": [{"text": "one"}, {"text": "two"}]}});
    assert!(base.marked(row).starts_with("onetwo<|im_start|>user"));
    assert!(base.marked(json!({"messages": [user("q"), assistant("a")]})).starts_with("<|im_start|>user"));
}

/// As in Jinja: an undefined value is an empty text, and None is `None`.
#[test]
fn values_that_are_no_texts_are_trimmed_as_texts() {
    let template = format!("{{{{ messages[0].none | trim ~ '|' ~ (none | trim) ~ (7 | trim) }}}}{CHATML}");
    let base = BaseDir::with_template("<|im_end|>", &template);
    let row = json!({"messages": [user("q"), assistant("a")]});
    assert!(base.marked(row).starts_with("|None7<|im_start|>user"));
}

#[test]
fn a_line_of_more_than_64_mib_is_an_error() {
    let base = BaseDir::new("<|im_end|>", false);
    let text = format!("{{\"text\": \"a\"}}\n{{\"text\": \"{}\"}}\n", "a".repeat(64 << 20));
    let error = base.error_text(base.read_text(&text).unwrap_err());
    assert!(error.contains("data.jsonl: line 2 has more than 64 MiB; each line must be a row"), "{error}");
}
