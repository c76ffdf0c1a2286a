//! Converts dataset files to token rows, without tensors: JSON, CSV, Parquet and Arrow
//! readers, chat templates, loss masks, and the global batch order.
//!
//! All functions block. Results are pure functions of the inputs: they do not depend on threads,
//! ranks or time.
//!
//! The crate may depend on `lora-spec` only. To read it, begin with [`Dataset`], and with
//! [`BatchPlan`] for the order of rows.

mod added_tokens;
mod anchors;
mod arrow_rows;
mod arrow_values;
mod batch;
mod batch_plan;
mod chat_template;
mod content_form;
mod content_parts;
mod conversation;
mod csv_rows;
mod data_file;
mod data_report;
mod dataset;
mod encode;
mod encoded_rows;
mod error;
mod file_format;
mod gzip_members;
mod hashed_file;
mod jinja;
mod joined;
mod jsonl;
mod message;
mod packing;
mod parquet_rows;
mod raw_rows;
mod row_format;
mod row_notes;
mod surroundings;
mod token_file;
mod token_files;
mod token_rows;
mod tokenizer;
mod tokenizer_files;
mod turns;

pub use batch::{MicroBatchRows, PAD_MULTIPLE, RowLayout, SAMPLE_ROWS, SAMPLE_TOKENS, collate, sample_rows};
pub use batch_plan::BatchPlan;
pub use data_file::check_data_file;
pub use data_report::DataReport;
pub use dataset::{Dataset, Row};
pub use error::{DataError, RowList};
pub use joined::DatasetFile;
pub use message::Message;
pub use token_files::{TokenCache, TokenFiles, TokenizingProgress};
pub use token_rows::{TokenRow, TokenRows};
pub use tokenizer::Tokenizer;
