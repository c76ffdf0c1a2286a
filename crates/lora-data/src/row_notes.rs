//! What a user should know about a row that is trained.

use crate::message::Part;

/// What a user should know about a row.
#[derive(Debug, Default)]
pub(crate) struct RowNotes {
    /// Keys of messages that the chat template does not read.
    pub(crate) unread_keys: Vec<String>,
    /// Parts of messages that the chat template does not print: the role, and which part.
    pub(crate) left_out: Vec<(String, Part)>,
    /// Trained turns that the chat template renders otherwise when others follow.
    pub(crate) changed_turns: usize,
    /// Arguments of tool calls that are printed as a text in quotes.
    pub(crate) encoded_twice: usize,
    /// The token that ends the last trained turn, if generation does not stop at it.
    pub(crate) unstopped: Option<u32>,
    /// Whether the row begins with two beginning-of-sequence tokens.
    pub(crate) has_two_bos: bool,
    /// Whether a trained token has characters of the prompt.
    pub(crate) has_shared_token: bool,
    /// Whether the prompt of a conversation has other tokens alone than in the conversation.
    pub(crate) has_other_prompt: bool,
    /// Whether the row has tools that the chat template does not read.
    pub(crate) has_unread_tools: bool,
    /// Variables of the row that the chat template does not read.
    pub(crate) unread_variables: Vec<String>,
    /// Messages of others than the assistant that say that they are trained.
    pub(crate) flagged_others: usize,
    /// Trained answers without a text.
    pub(crate) empty_answers: usize,
    /// Whether the row is a conversation, which the chat template renders.
    pub(crate) is_conversation: bool,
}
