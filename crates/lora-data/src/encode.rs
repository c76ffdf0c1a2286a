//! From a row's contents to tokens and loss mask.

use std::ops::Range;

use crate::row_format::RowContent;
use crate::tokenizer::Span;
use crate::{DataError, Message, Row, Tokenizer};

/// Roles that chat templates know by convention.
const ROLES: [&str; 7] = ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

/// Tokenizes a row.
///
/// Chats are encoded without special tokens (the template wrote them), plain texts with them; a plain text ends with the
/// end-of-sequence token. Prompt and completion are tokenized as one text; a token that stands for characters of both
/// is trained, since without it the completion would lack its beginning.
pub(crate) fn encode_row(tokenizer: &Tokenizer, content: &RowContent) -> Result<Row, DataError> {
    let mut row = match content {
        RowContent::Chat { messages, tools, from } => {
            check_roles(messages)?;
            let conversation = tokenizer.conversation(messages, tools.as_ref(), *from)?;
            let spans = tokenizer.encode_spans(&conversation.text, false)?;
            mask(&spans, |span| conversation.trained.iter().any(|range| overlaps(span, range)))
        }
        RowContent::Plain { text, from } => {
            let Some((_, eos)) = tokenizer.eos_token() else {
                return Err(DataError::Tokenize(
                    "the base has no end-of-sequence token to end a text with; set eos_token in its tokenizer_config.json"
                        .into(),
                ));
            };
            let trained = *from..text.len();
            let spans = tokenizer.encode_spans(text, true)?;
            let mut row = mask(&spans, |span| *from == 0 || overlaps(span, &trained));
            if row.tokens.last() == Some(&eos) {
                row.trained.pop();
            } else {
                row.tokens.push(eos);
            }
            row.trained.push(true);
            row
        }
    };
    // Nothing predicts the first token.
    if let Some(first) = row.trained.first_mut() {
        *first = false;
    }
    Ok(row)
}

fn mask(spans: &[Span], trained: impl Fn(&Span) -> bool) -> Row {
    Row {
        tokens: spans.iter().map(|span| span.token).collect(),
        trained: spans.iter().map(trained).collect(),
    }
}

/// Does the token stand for any of these bytes? Byte-level tokenizers with `trim_offsets` give a token of white space
/// the empty range at its end.
fn overlaps(span: &Span, bytes: &Range<usize>) -> bool {
    if span.start == span.end {
        bytes.start < span.end && span.end <= bytes.end
    } else {
        span.start < bytes.end && bytes.start < span.end
    }
}

fn check_roles(messages: &[Message]) -> Result<(), DataError> {
    match messages.iter().find(|message| !ROLES.contains(&message.role.as_str())) {
        None => Ok(()),
        Some(message) => Err(DataError::ChatTemplate(format!(
            "unknown role {:?}; known are {}",
            message.role,
            ROLES.join(", ")
        ))),
    }
}
