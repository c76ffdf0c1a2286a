//! Tests of the public interface, on small bases and datasets that the tests write.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod arrow;
mod base_dir;
mod batch_plan;
mod chat;
mod chat_golden;
mod content_form;
mod errors;
mod formats;
mod long_conversations;
mod long_rows;
mod messages;
mod parquet;
mod settings;
mod several_files;
mod token_files;
mod tokenizer;
