//! From a dataset file to token rows, without tensors: JSONL and Parquet readers, chat templates, loss masks, and the
//! global batch order.
//!
//! Everything here is blocking and a pure function of its inputs: no result depends on threads, ranks or time.

mod batch;
mod chat_template;
mod dataset;
mod error;
mod jsonl;
mod message;
mod order;
mod parquet_rows;
mod plan;
mod report;
mod row_format;
mod sample;
mod tojson;
mod tokenizer;
mod tokenizer_files;
mod turns;

pub use batch::{MicroBatch, MicroBatchRows, collate, eval_micro_batches};
pub use dataset::{Dataset, Row};
pub use error::{DataError, RowList};
pub use message::Message;
pub use order::BatchPlan;
pub use plan::{Needs, Plan, PlanData, PlanError, PlanMemory};
pub use report::DataReport;
pub use row_format::RowFormat;
pub use tokenizer::Tokenizer;
