//! Compares expressions with Jinja as Transformers sets it up (`tests/golden/chat`, made by
//! `tests/oracle/expressions.py`).

use std::fs;
use std::panic::{self, AssertUnwindSafe};

use lora_test_kit::golden;
use serde::Deserialize;
use serde_json::Value as Json;

use super::{check_method_names, environment, rewrite, value_of};

#[derive(Deserialize)]
struct Goldens {
    variables: Json,
    renderings: Vec<Rendering>,
}

#[derive(Deserialize)]
struct Rendering {
    template: String,
    /// None if the template fails.
    text: Option<String>,
}

/// What is in templates that fail, and have a text in Jinja.
const UNSUPPORTED: [&str; 18] = [
    "| wordwrap",
    "| striptags",
    "| urlencode",
    "| random",
    "{'k': s, 'l': [s, s], 'm': {'n': s}} | pprint",
    "'%r' | format",
    "!r}",
    ":%}",
    ".encode(",
    ".expandtabs(",
    ".format_map(",
    ".translate(",
    ".istitle(",
    ".isidentifier(",
    "lipsum",
    "varargs",
    "dict([",
    "namespace({'a': 1}, b=2)",
];

#[test]
fn expressions_give_what_jinja_gives() {
    let goldens: Goldens =
        serde_json::from_slice(&fs::read(golden("chat/expressions.json")).unwrap()).unwrap();
    let environment = environment().unwrap();
    let variables = value_of(&goldens.variables);
    let mut differing = Vec::new();
    for Rendering { template, text } in goldens.renderings {
        let source = rewrite(&template).0;
        let render = || match check_method_names(&template) {
            Ok(()) => environment.render_str(&source, &variables).map_err(|error| error.to_string()),
            Err(error) => Err(error),
        };
        let rendered = panic::catch_unwind(AssertUnwindSafe(render)).unwrap();
        let expected = text.filter(|_| !UNSUPPORTED.iter().any(|part| template.contains(part)));
        if rendered.as_ref().ok() != expected.as_ref() {
            differing.push(format!("{template}: {rendered:?} instead of {expected:?}"));
        }
    }
    assert!(differing.is_empty(), "{}", differing.join("\n"));
}
