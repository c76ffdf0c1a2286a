//! Decoder models of the Llama family and its relatives with LoRA adapters on their projections.
//!
//! A [`Base`] is loaded once and never changes. Any number of [`Adapter`]s can share one
//! `Arc<Base>`.
//!
//! The crate may depend on `lora-ops` and `lora-spec`; it does not know jobs, datasets or groups.
//! To read it, begin with the forward pass of a block (`block.rs`), its two halves (`attention.rs`,
//! `mlp.rs`), and `projection.rs`, where frozen weight and adapter meet.

mod adapter;
mod attention;
mod base;
mod block;
mod error;
mod generate;
mod gguf;
mod hash;
mod init;
mod layer_input;
mod load;
mod merge;
mod mlp;
mod model;
mod norm;
mod pass;
mod peft;
mod per_layer_embedding;
mod projection;
mod random;
mod residual;
mod rotary_heads;
mod shared_inputs;
mod split_projection;
mod svd;
mod weight_source;
mod weights;

pub use adapter::{AdaptedModule, Adapter, AdapterLayout, Gradients};
pub use base::Base;
pub use error::ModelError;
pub use generate::{Generator, Sampling};
pub use gguf::gguf_adapter;
pub use hash::{sha256, sha256_file};
pub use load::BaseKey;
pub use lora_ops::cross_entropy::Loss;
pub use merge::MergeTarget;
pub use model::{Backward, PassOptions, forward_backward, hidden_states, logits, loss};
pub use peft::{PeftAdapter, PeftConfig, write_adapter};
