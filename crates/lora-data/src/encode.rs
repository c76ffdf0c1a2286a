//! Converts the contents of a row to tokens and a loss mask.

use std::ops::Range;

use crate::row_format::RowContent;
use crate::row_notes::RowNotes;
use crate::tokenizer::Span;
use crate::{DataError, Message, Row, Tokenizer};

/// Roles that chat templates support by convention.
const ROLES: [&str; 7] = ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

/// Tokenizes a row.
///
/// Chats are encoded without adding special tokens, because the template has written them. Plain
/// texts are encoded with special tokens and end with the end-of-sequence token. Prompt and
/// completion are tokenized as one text. A token with characters of both is trained, because it has
/// the beginning of the completion.
pub(crate) fn encode_row(tokenizer: &Tokenizer, content: &RowContent) -> Result<(Row, RowNotes), DataError> {
    let mut notes = RowNotes::default();
    let mut row = match content {
        RowContent::Chat { messages, tools, from } => {
            check_roles(messages)?;
            let conversation = tokenizer.conversation(messages, tools.as_ref(), *from)?;
            let spans = tokenizer.encode_spans(&conversation.text, false)?;
            let row = mask(&spans, |span| conversation.trained.iter().any(|range| overlaps(span, range)));
            notes = conversation.notes;
            row
        }
        RowContent::Plain { text, from } => {
            let Some((_, eos)) = tokenizer.eos_token() else {
                return Err(DataError::Tokenize(
                    "the base has no end-of-sequence token, which ends a text; set eos_token in its \
                     tokenizer_config.json"
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
    // The first token has no predecessor, so it cannot be a target.
    if let Some(first) = row.trained.first_mut() {
        *first = false;
    }
    Ok((row, notes))
}

fn mask(spans: &[Span], trained: impl Fn(&Span) -> bool) -> Row {
    Row {
        tokens: spans.iter().map(|span| span.token).collect(),
        trained: spans.iter().map(trained).collect(),
    }
}

/// Returns whether the token contains any of these bytes. With `trim_offsets`, byte-level
/// tokenizers give a token of white space an empty range at its end.
fn overlaps(span: &Span, bytes: &Range<usize>) -> bool {
    if span.start == span.end {
        bytes.start < span.end && span.end <= bytes.end
    } else {
        span.start < bytes.end && bytes.start < span.end
    }
}

fn check_roles(messages: &[Message]) -> Result<(), DataError> {
    match messages.iter().find(|message| !ROLES.contains(&message.role())) {
        None => Ok(()),
        Some(message) => Err(DataError::ChatTemplate(format!(
            "unknown role {:?}; supported: {}",
            message.role(),
            ROLES.join(", ")
        ))),
    }
}
