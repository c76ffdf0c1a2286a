//! Statistics of a dataset's rows.

use std::collections::BTreeMap;

use lora_spec::RowFormat;
use serde::{Deserialize, Serialize};

use crate::error::count;
use crate::row_notes::RowNotes;

/// Statistics of a dataset's rows. Lengths are in tokens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DataReport {
    /// Rows in the file.
    pub rows_read: usize,
    /// Rows that are used.
    pub rows_kept: usize,
    /// Rows that were dropped because they are longer than `max_length`.
    pub dropped: usize,
    /// Rows that were dropped because they have no target token.
    pub without_targets: usize,
    /// Rows that were truncated to `max_length`.
    pub truncated: usize,
    /// Tokens of the kept rows.
    pub tokens: u64,
    /// Tokens among them that are targets of the loss.
    pub trained_tokens: u64,
    /// Length of the shortest kept row.
    pub shortest: usize,
    /// Median length: half of the kept rows are at most this long.
    pub median: usize,
    /// 95th percentile of the lengths: 95 % of the kept rows are at most this long.
    pub percentile_95: usize,
    /// Length of the longest kept row.
    pub longest: usize,
    /// Number of rows in the file, by format.
    pub formats: BTreeMap<RowFormat, usize>,
    /// Keys without effect, which are not part of a row's format, and the number of rows that have
    /// them.
    pub ignored_keys: BTreeMap<String, usize>,
    /// Keys of messages that the chat template does not read, and the number of messages that have
    /// them.
    pub unread_message_keys: BTreeMap<String, usize>,
    /// Parts of messages that the chat template does not print, such as `assistant's reasoning`,
    /// and the number of messages.
    pub left_out: BTreeMap<String, usize>,
    /// Number of trained turns that the chat template renders otherwise when others follow, for
    /// example without their reasoning. They are trained as they are in the whole conversation.
    pub changed_turns: usize,
    /// Number of tool calls whose arguments are printed as a text in quotes, because they are a
    /// text in the row.
    pub arguments_encoded_twice: usize,
    /// Tokens at the end of rows' last turns at which generation does not stop, and the number of
    /// rows.
    pub unstopped: BTreeMap<u32, usize>,
    /// Number of rows that begin with two beginning-of-sequence tokens.
    pub two_bos: usize,
    /// Number of rows with a trained token that has characters of the prompt.
    pub shared_tokens: usize,
    /// Number of conversations whose prompt has other tokens alone than in the conversation. They
    /// are trained from the first of these tokens on.
    pub other_prompts: usize,
    /// Number of rows with tools that the chat template does not read.
    pub unread_tools: usize,
    /// Variables of rows that the chat template does not read, and the number of rows.
    pub unread_variables: BTreeMap<String, usize>,
    /// Number of trained answers without a text.
    pub empty_answers: usize,
    /// Number of messages of others than the assistant that say that they are trained.
    pub flagged_others: usize,
    /// Columns of `data.columns` (by the key of a format) that rows have, and the number of rows.
    pub renamed_columns: BTreeMap<String, usize>,
    /// Number of conversations that begin with `data.system_prompt`.
    pub system_prompts: usize,
    /// Number of rows that are conversations, which the chat template renders.
    pub conversations: usize,
}

impl DataReport {
    pub(crate) fn add(&mut self, notes: &RowNotes) {
        for key in &notes.unread_keys {
            *self.unread_message_keys.entry(key.clone()).or_default() += 1;
        }
        for (role, part) in &notes.left_out {
            *self.left_out.entry(format!("{role}'s {}", part.name())).or_default() += 1;
        }
        self.changed_turns += notes.changed_turns;
        self.arguments_encoded_twice += notes.encoded_twice;
        if let Some(token) = notes.unstopped {
            *self.unstopped.entry(token).or_default() += 1;
        }
        self.two_bos += usize::from(notes.has_two_bos);
        self.shared_tokens += usize::from(notes.has_shared_token);
        self.other_prompts += usize::from(notes.has_other_prompt);
        self.unread_tools += usize::from(notes.has_unread_tools);
        for name in &notes.unread_variables {
            *self.unread_variables.entry(name.clone()).or_default() += 1;
        }
        self.empty_answers += notes.empty_answers;
        self.flagged_others += notes.flagged_others;
        self.conversations += usize::from(notes.is_conversation);
    }

    /// Adds the statistics of another file, except the lengths.
    pub(crate) fn join(&mut self, other: Self) {
        let Self {
            rows_read,
            dropped,
            without_targets,
            truncated,
            trained_tokens,
            formats,
            ignored_keys,
            unread_message_keys,
            left_out,
            changed_turns,
            arguments_encoded_twice,
            unstopped,
            two_bos,
            shared_tokens,
            other_prompts,
            unread_tools,
            unread_variables,
            empty_answers,
            flagged_others,
            renamed_columns,
            system_prompts,
            conversations,
            rows_kept: _,
            tokens: _,
            shortest: _,
            median: _,
            percentile_95: _,
            longest: _,
        } = other;
        self.rows_read += rows_read;
        self.dropped += dropped;
        self.without_targets += without_targets;
        self.truncated += truncated;
        self.trained_tokens += trained_tokens;
        join_counts(&mut self.formats, formats);
        join_counts(&mut self.ignored_keys, ignored_keys);
        join_counts(&mut self.unread_message_keys, unread_message_keys);
        join_counts(&mut self.left_out, left_out);
        self.changed_turns += changed_turns;
        self.arguments_encoded_twice += arguments_encoded_twice;
        join_counts(&mut self.unstopped, unstopped);
        self.two_bos += two_bos;
        self.shared_tokens += shared_tokens;
        self.other_prompts += other_prompts;
        self.unread_tools += unread_tools;
        join_counts(&mut self.unread_variables, unread_variables);
        self.empty_answers += empty_answers;
        self.flagged_others += flagged_others;
        join_counts(&mut self.renamed_columns, renamed_columns);
        self.system_prompts += system_prompts;
        self.conversations += conversations;
    }

    /// What is not trained as the rows say, or in another way than a reader may expect.
    pub fn notes(&self) -> Vec<String> {
        let of_key = |(key, rows): (&String, &usize)| {
            format!("key {key:?} of {} has no effect", count(*rows, "row", "rows"))
        };
        let unread = |(key, messages): (&String, &usize)| {
            let messages = count(*messages, "message", "messages");
            format!("key {key:?} of {messages} is not read by the chat template")
        };
        let left_out = |(part, messages): (&String, &usize)| {
            let messages = count(*messages, "message", "messages");
            format!("the chat template leaves out the {part} of {messages}")
        };
        let mut notes: Vec<String> = self.ignored_keys.iter().map(of_key).collect();
        notes.extend(self.unread_message_keys.iter().map(unread));
        notes.extend(self.left_out.iter().map(left_out));
        if self.unread_tools > 0 {
            notes.push(format!(
                "the chat template does not read the tools of {}: the model does not see them",
                count(self.unread_tools, "row", "rows")
            ));
        }
        for (name, rows) in &self.unread_variables {
            notes.push(format!(
                "chat_template_kwargs.{name} of {} has no effect: the chat template does not read it",
                count(*rows, "row", "rows")
            ));
        }
        if self.empty_answers > 0 {
            notes.push(format!(
                "{} empty: only the end of the turn is trained",
                count(self.empty_answers, "answer is", "answers are")
            ));
        }
        if self.flagged_others > 0 {
            notes.push(format!(
                "{} a key that says to train it (weight, train), which has no effect: only the assistant's \
                 turns are trained; data.assistant_only_loss: false trains all messages",
                count(
                    self.flagged_others,
                    "message of a user or tool has",
                    "messages of users or tools have"
                )
            ));
        }
        if self.changed_turns > 0 {
            notes.push(format!(
                "the chat template renders {} otherwise once others follow (without reasoning, for example); \
                 they are trained as they are in the whole conversation; data.split_turns: true makes a \
                 sample of each, as the model would see it",
                count(self.changed_turns, "earlier turn", "earlier turns")
            ));
        }
        if self.arguments_encoded_twice > 0 {
            notes.push(format!(
                "the arguments of {} are a text, which the chat template prints in quotes; write objects",
                count(self.arguments_encoded_twice, "tool call", "tool calls")
            ));
        }
        for (token, rows) in &self.unstopped {
            notes.push(format!(
                "{} with token {token}, which is not an eos_token_id of the base's \
                 generation_config.json: generation does not stop there",
                ends(*rows)
            ));
        }
        if self.two_bos > 0 {
            let begin = if self.two_bos == 1 { "begins" } else { "begin" };
            notes.push(format!(
                "{} {begin} with two beginning-of-sequence tokens: the tokenizer adds one to the one in the \
                 text",
                count(self.two_bos, "row", "rows")
            ));
        }
        if self.shared_tokens > 0 {
            notes.push(format!(
                "in {} the first trained token has characters of the prompt, which is then tokenized \
                 otherwise than alone; end prompts with a line break, or begin completions with a space",
                count(self.shared_tokens, "row", "rows")
            ));
        }
        if self.other_prompts > 0 {
            notes.push(format!(
                "in {} the chat template renders the prompt otherwise than alone with the generation \
                 prompt; the tokens from the first difference on are trained",
                count(self.other_prompts, "row", "rows")
            ));
        }
        let of = |format| self.formats.get(&format).copied().unwrap_or(0);
        if of(RowFormat::Alpaca) > 0 && of(RowFormat::AlpacaChat) > 0 {
            notes.push(format!(
                "{} with a system prompt or a history have the chat template, the other {} of \
                 instruction/output the prompt of Alpaca",
                count(of(RowFormat::AlpacaChat), "row", "rows"),
                count(of(RowFormat::Alpaca), "row", "rows")
            ));
        }
        notes
    }

    /// Sets the fields that are computed from the lengths of the kept rows.
    pub(crate) fn set_lengths(&mut self, mut lengths: Vec<usize>) {
        lengths.sort_unstable();
        // Nearest-rank method: the smallest length that at least `percent` % of the rows do not
        // exceed.
        let percentile = |percent: usize| {
            let rank = (lengths.len() * percent).div_ceil(100).max(1);
            lengths.get(rank - 1).copied().unwrap_or(0)
        };
        self.shortest = lengths.first().copied().unwrap_or(0);
        self.median = percentile(50);
        self.percentile_95 = percentile(95);
        self.longest = lengths.last().copied().unwrap_or(0);
        self.rows_kept = lengths.len();
        self.tokens = lengths.iter().map(|&length| length as u64).sum();
    }
}

fn join_counts<K: Ord>(counts: &mut BTreeMap<K, usize>, others: BTreeMap<K, usize>) {
    for (key, count) in others {
        *counts.entry(key).or_default() += count;
    }
}

/// `1 row ends`, `2 rows end`.
fn ends(rows: usize) -> String {
    format!("{} {}", count(rows, "row", "rows"), if rows == 1 { "ends" } else { "end" })
}
