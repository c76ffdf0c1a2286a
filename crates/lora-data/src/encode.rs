//! Converts the contents of a row to tokens and a loss mask.

use std::ops::Range;

use lora_spec::DataSpec;

use crate::conversation::WholeConversation;
use crate::row_format::RowContent;
use crate::row_notes::RowNotes;
use crate::tokenizer::{Chat, Span};
use crate::{DataError, Message, Row, TokenRows, Tokenizer};

/// Roles that chat templates support by convention.
const ROLES: [&str; 7] = ["system", "developer", "user", "assistant", "tool", "function", "ipython"];

/// Tokenizes a row: one sample, or with `data.split_turns` one for each trained turn.
///
/// Chats are encoded without adding special tokens, because the template has written them. Plain
/// texts are encoded with special tokens and end with the end-of-sequence token. Prompt and
/// completion are tokenized as one text. A token with characters of both is trained, because it has
/// the beginning of the completion.
pub(crate) fn encode_row(
    tokenizer: &Tokenizer,
    data: &DataSpec,
    content: RowContent,
    notes: &mut RowNotes,
) -> Result<Vec<Row>, DataError> {
    let mut samples = match content {
        RowContent::Chat { messages, tools, variables, from } if !data.assistant_only_loss => {
            check_roles(&messages)?;
            let chat = Chat { messages: &messages, tools: tools.as_ref(), variables: &variables };
            vec![encode_whole_chat(tokenizer, chat, from, notes)?]
        }
        RowContent::Chat { messages, tools, variables, from } => {
            check_roles(&messages)?;
            let encode = |messages: &[Message], from, notes: &mut RowNotes| {
                let chat = Chat { messages, tools: tools.as_ref(), variables: &variables };
                encode_chat(tokenizer, chat, from, notes)
            };
            let turns: Vec<usize> = (from..messages.len()).filter(|i| messages[*i].is_trained()).collect();
            match turns.split_last().filter(|_| data.split_turns) {
                None => vec![encode(&messages, from, notes)?],
                Some((last, earlier)) => {
                    // The whole conversation has the notes of all its messages.
                    let ignored = &mut RowNotes::default();
                    let sample = |turn: &usize| encode(&messages[..=*turn], *turn, ignored);
                    let mut samples = earlier.iter().map(sample).collect::<Result<Vec<_>, _>>()?;
                    samples.push(encode(&messages[..=*last], *last, notes)?);
                    samples
                }
            }
        }
        RowContent::Plain { text, from } => {
            vec![encode_text(tokenizer, &text, from, notes)?]
        }
    };
    for row in &mut samples {
        if let Some(token) = row.tokens.iter().find(|token| **token > TokenRows::MAX_TOKEN) {
            return Err(DataError::Tokenize(format!(
                "token {token} is larger than {}",
                TokenRows::MAX_TOKEN
            )));
        }
        // The first token has no predecessor, so it cannot be a target.
        if let Some(first) = row.trained.first_mut() {
            *first = false;
        }
        let begins_twice = row.tokens.len() > 1 && row.tokens[0] == row.tokens[1];
        notes.has_two_bos |= begins_twice && tokenizer.bos_token() == row.tokens.first().copied();
    }
    Ok(samples)
}

fn encode_chat(
    tokenizer: &Tokenizer,
    chat: Chat,
    from: usize,
    notes: &mut RowNotes,
) -> Result<Row, DataError> {
    let conversation = tokenizer.conversation(chat, from)?;
    let spans = tokenizer.encode_spans(&conversation.text, false)?;
    let mut row = mask(&spans, |span| conversation.trained.iter().any(|range| overlaps(span, range)));
    // A template may mark a part of the generation prompt.
    let prompt = tokenizer.encode(&conversation.prompt, false)?;
    let shared = shared_tokens(&prompt, &spans);
    row.trained[..shared].fill(false);
    *notes = RowNotes {
        is_conversation: true,
        has_other_prompt: shared < prompt.len(),
        unread_variables: unread_variables(tokenizer, chat),
        ..conversation.notes
    };
    let last = conversation.trained.last().and_then(|range| {
        let text = conversation.text[range.clone()].trim_end();
        spans.iter().rev().find(|span| overlaps(span, &(range.start..range.start + text.len())))
    });
    notes.unstopped = last.map(|span| span.token).filter(|token| !tokenizer.stop_tokens().contains(token));
    Ok(row)
}

/// Tokenizes a conversation of which all tokens are trained, except those that the prompt (the
/// messages before `from`, and the generation prompt) has at its beginning too, as in TRL.
fn encode_whole_chat(
    tokenizer: &Tokenizer,
    chat: Chat,
    from: usize,
    notes: &mut RowNotes,
) -> Result<Row, DataError> {
    let WholeConversation { text, prompt, notes: of_template } = tokenizer.whole_conversation(chat, from)?;
    let spans = tokenizer.encode_spans(&text, false)?;
    let prompt = tokenizer.encode(&prompt, false)?;
    let shared = shared_tokens(&prompt, &spans);
    *notes = RowNotes {
        is_conversation: true,
        has_other_prompt: shared < prompt.len(),
        unread_variables: unread_variables(tokenizer, chat),
        ..of_template
    };
    if chat.messages.last().is_some_and(|message| message.role() == "assistant") {
        let end = text.trim_end().len();
        let last = spans.iter().rev().find(|span| overlaps(span, &(0..end))).map(|span| span.token);
        notes.unstopped = last.filter(|token| !tokenizer.stop_tokens().contains(token));
    }
    let mut row = mask(&spans, |_| true);
    row.trained[..shared].fill(false);
    Ok(row)
}

/// The number of tokens at the beginning that a prompt and the whole conversation share.
fn shared_tokens(prompt: &[u32], spans: &[Span]) -> usize {
    prompt.iter().zip(spans).take_while(|(token, span)| **token == span.token).count()
}

fn unread_variables(tokenizer: &Tokenizer, chat: Chat) -> Vec<String> {
    tokenizer.unread_variables(chat.variables).map(str::to_owned).collect()
}

fn encode_text(
    tokenizer: &Tokenizer,
    text: &str,
    from: usize,
    notes: &mut RowNotes,
) -> Result<Row, DataError> {
    let Some((_, eos)) = tokenizer.eos_token() else {
        return Err(DataError::Tokenize(
            "the base has no end-of-sequence token, which ends a text; set eos_token in its \
             tokenizer_config.json"
                .into(),
        ));
    };
    let trained = from..text.len();
    let spans = tokenizer.encode_spans(text, true)?;
    notes.empty_answers = usize::from(from > 0 && text[from..].trim().is_empty());
    notes.has_shared_token = spans.iter().any(|span| span.start < from && from < span.end);
    let mut row = mask(&spans, |span| from == 0 || overlaps(span, &trained));
    if row.tokens.last() == Some(&eos) {
        row.trained.pop();
    } else {
        row.tokens.push(eos);
    }
    row.trained.push(true);
    Ok(row)
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
