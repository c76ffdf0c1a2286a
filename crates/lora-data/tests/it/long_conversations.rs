//! Turns of conversations that are so long that not all of them are found by rendering.

use lora_spec::DataSpec;
use serde_json::{Value as Json, json};

use crate::base_dir::BaseDir;

/// Like Qwen3: turns after the last question have a reasoning, and trimmed contents.
const TEMPLATE: &str = "{% set ns = namespace(last=0) %}{% for m in messages %}\
    {% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}\
    {{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}\
    {{ '<think></think>' }}{% endif %}{{ m.content | trim }}\
    {% for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}\
    {{ '<|im_end|>\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

#[test]
fn all_turns_of_a_long_conversation_are_trained() {
    let base = BaseDir::with_template("<|im_end|>", TEMPLATE);
    let (mut messages, mut expected): (Vec<Json>, String) = (Vec::new(), String::new());
    let mut add = |message: Json, text: &str| {
        let role = message["role"].as_str().unwrap();
        let text = match role {
            "assistant" => format!("⟦{text}<|im_end|>⟧"),
            _ => format!("{text}<|im_end|>"),
        };
        expected.push_str(&format!("<|im_start|>{role}\n{text}\n"));
        messages.push(message);
    };
    let count = 100;
    for i in 0..count {
        let thinking = if i + 1 == count { "<think></think>" } else { "" };
        add(json!({"role": "user", "content": format!(" {i}?\n")}), &format!("{i}?"));
        if i % 3 == 0 {
            let call = json!({"function": {"name": "f", "arguments": {"end": "<|im_end|>"}}});
            add(
                json!({"role": "assistant", "content": "", "tool_calls": [call]}),
                &format!("{thinking}f{{\"end\": \"<|im_end|>\"}}"),
            );
            add(json!({"role": "tool", "content": format!("{i}\n")}), &i.to_string());
        }
        // Some contents look like the end of a turn, or begin with a tag or white space.
        let answer = match i % 7 {
            0 => "<|im_end|>\n<|im_start|>user\n".to_owned(),
            1 => format!("<b>{i}"),
            2 => format!("\n{i} "),
            _ => format!("{i}"),
        };
        let text = format!("{thinking}{}", answer.trim());
        add(json!({"role": "assistant", "content": answer}), &text);
    }
    let path = base.write("long.jsonl", &json!({"messages": messages}).to_string());
    let tokenizer = base.tokenizer();
    let data = DataSpec { max_length: usize::MAX, ..DataSpec::default() };
    let dataset = lora_data::Dataset::read(&path.into(), &tokenizer, &data).unwrap();
    assert_eq!(tokenizer.marked_text(dataset.rows.row(0)).unwrap(), expected);
    // All turns but those after the last question: the call and the answer.
    let turns = expected.matches('⟦').count();
    assert_eq!(dataset.report.changed_turns, turns - 2);
}
