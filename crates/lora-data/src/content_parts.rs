//! Contents of messages that are lists of parts.

use serde_json::{Value as Json, json};

/// The text of a content that is a list of parts. All parts get the form that templates read,
/// `{"type": "text", "text": ..}`.
pub(crate) fn join_parts(parts: &mut [Json]) -> Result<String, String> {
    let mut joined = String::new();
    for (i, part) in parts.iter_mut().enumerate() {
        if let Json::String(text) = part {
            *part = text_part(text);
        }
        let kind = part.get("type").and_then(Json::as_str).unwrap_or("text");
        if !["text", "input_text", "output_text"].contains(&kind) {
            return Err(format!(".content[{i}] has the type {kind:?}; only text can be trained"));
        }
        let (Some(Json::String(text)), Some(keys)) = (part.get("text").cloned(), part.as_object_mut()) else {
            return Err(format!(".content[{i}] has no string `text`"));
        };
        keys.insert("type".to_owned(), "text".into());
        joined.push_str(&text);
    }
    Ok(joined)
}

/// A part with a text.
pub(crate) fn text_part(text: &str) -> Json {
    json!({"type": "text", "text": text})
}

/// The text of a part.
pub(crate) fn text_of_part(part: &mut Json) -> Option<&mut String> {
    match part.get_mut("text") {
        Some(Json::String(text)) => Some(text),
        _ => None,
    }
}
