//! Operations on candle tensors, each a forward pass and, beside it, a hand-written backward pass.
//!
//! candle's autograd is not used: it would compute and keep the gradient of every frozen weight. Activations are
//! contiguous f32 tensors `[tokens, features]`; frozen weights are f32 or bf16; everything runs on the CPU.
//!
//! Invariants:
//! - No result depends on the number of threads: loops are split over outputs, never over a sum.
//! - [`gemm`] is the only matrix product.
//! - Nothing is computed for a frozen weight but its product and the gradient of that product's input.

pub mod adamw;
pub mod attention;
mod cpu;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod gemm;
pub mod linear;
pub mod lora;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
mod simd;
pub mod swiglu;

pub use candle_core::{Error, Result};
pub use cpu::{add_assign, read_f32, update_f32};
pub use simd::instruction_set;
