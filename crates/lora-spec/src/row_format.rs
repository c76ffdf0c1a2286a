//! The formats of dataset rows.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The format of a dataset row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// `messages` and optionally `tools`: rendered with the chat template. The assistant's turns
    /// are trained.
    Messages,
    /// ShareGPT's `conversations`, with optional `system` and `tools`: as `messages`.
    Conversations,
    /// `prompt` and `completion`, both strings or both lists of messages, as in TRL: the completion
    /// is trained.
    PromptCompletion,
    /// `text`: the whole text is trained.
    Text,
    /// Stanford Alpaca's `instruction`, `input` and `output`: the output is trained.
    Alpaca,
    /// The same with optional `system` or `history` (pairs of instruction and output), as in
    /// LLaMA-Factory: rendered with the chat template. The outputs are trained.
    AlpacaChat,
}

impl RowFormat {
    /// The keys of all formats.
    pub const KEYS: [&str; 11] = [
        "messages",
        "conversations",
        "tools",
        "system",
        "prompt",
        "completion",
        "text",
        "instruction",
        "input",
        "output",
        "history",
    ];
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Messages => "messages",
            Self::Conversations => "conversations",
            Self::PromptCompletion => "prompt/completion",
            Self::Text => "text",
            Self::Alpaca => "instruction/output",
            Self::AlpacaChat => "instruction/output with system or history",
        })
    }
}
