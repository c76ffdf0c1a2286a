//! Tests of the public interface, on job files and bases of `tests/golden` and of the tests.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail the test")]

mod base_model;
mod buffer_sizes;
mod gemma4;
mod init_lora_weights;
mod job;
mod job_file;
mod micro_batch;
mod published_models;
mod quantized;
mod ranges;
mod safetensors_header;
mod small_values;
