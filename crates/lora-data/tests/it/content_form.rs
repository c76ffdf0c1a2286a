//! Contents of messages as texts and as lists of parts.

use lora_data::Message;
use serde_json::{Value as Json, json};

use crate::base_dir::{BaseDir, CHATML};

/// Like Idefics 3: prints the parts of lists only.
const PARTS: &str = "{% for m in messages %}{{ m.role[0] }}:\
    {% for part in m.content %}{% if part.type == 'text' %}[{{ part.text }}]{% endif %}{% endfor %}</s>\
    {% endfor %}{% if add_generation_prompt %}a:{% endif %}";

/// Like Qwen2-VL: prints texts, and the parts of lists.
const BOTH: &str = "{% for m in messages %}{{ m.role[0] }}:\
    {% if m.content is string %}{{ m.content }}{% else %}\
    {% for part in m.content %}{% if 'text' in part %}[{{ part.text }}]{% endif %}{% endfor %}{% endif %}</s>\
    {% endfor %}{% if add_generation_prompt %}a:{% endif %}";

fn row(question: Json, answer: Json) -> Json {
    json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
}

fn parts(texts: &[&str]) -> Json {
    texts.iter().map(|text| json!({"type": "text", "text": text})).collect()
}

#[test]
fn a_template_gets_lists_of_parts_if_it_prints_them() {
    let two = || parts(&["a", "b "]);
    for (template, question, answer, expected) in [
        (PARTS, two(), parts(&["c"]), "u:[a][b ]</s>a:⟦[c]</s>⟧"),
        (PARTS, json!("a"), json!("c"), "u:[a]</s>a:⟦[c]</s>⟧"),
        (PARTS, json!(""), two(), "u:[]</s>a:⟦[a][b ]</s>⟧"),
        (PARTS, two(), json!("c"), "u:[a][b ]</s>a:⟦[c]</s>⟧"),
        (PARTS, json!(["a", {"type": "input_text", "text": "b"}]), json!("c"), "u:[a][b]</s>a:⟦[c]</s>⟧"),
        (BOTH, two(), json!("c"), "u:[a][b ]</s>a:⟦c</s>⟧"),
        (BOTH, json!("a"), two(), "u:a</s>a:⟦[a][b ]</s>⟧"),
    ] {
        let marked = BaseDir::with_template("</s>", template).marked(row(question, answer));
        assert_eq!(marked, expected);
    }
}

#[test]
fn a_template_that_prints_texts_gets_the_text_of_a_list() {
    let row = || row(parts(&["a", "b"]), parts(&["c", " d"]));
    // Adds the content to a text, prints it, trims it, or writes it as JSON.
    for content in ["'' + m.content", "m.content", "m.content | trim", "m.content | tojson"] {
        let template = format!(
            "{{% for m in messages %}}{{{{ m.role[0] + ':' }}}}{{{{ {content} }}}}</s>{{% endfor %}}\
             {{% if add_generation_prompt %}}a:{{% endif %}}"
        );
        let marked = BaseDir::with_template("</s>", &template).marked(row());
        let expected = if content.ends_with("tojson") {
            "u:\"ab\"</s>a:⟦\"c d\"</s>⟧"
        } else {
            "u:ab</s>a:⟦c d</s>⟧"
        };
        assert_eq!(marked, expected, "{content}");
    }
    // Prints only the first part of a list.
    let first = "{% for m in messages %}{{ m.role[0] + ':' + m.content[0]['text'] }}</s>{% endfor %}";
    assert_eq!(BaseDir::with_template("</s>", first).marked(row()), "u:ab</s>⟦a:c d</s>⟧");
}

#[test]
fn a_prompt_has_the_content_in_the_form_that_the_template_prints() {
    let empty = BaseDir::with_template("</s>", CHATML).tokenizer();
    assert!(empty.render_chat(&[Message::new("user", "")], true).is_ok());
    let question = [Message::new("user", "a")];
    for (template, expected) in [(PARTS, "u:[a]</s>a:"), (BOTH, "u:a</s>a:"), (CHATML, "user\na<")] {
        let text = BaseDir::with_template("</s>", template).tokenizer().render_chat(&question, true).unwrap();
        assert!(text.contains(expected), "{text}");
    }
}
