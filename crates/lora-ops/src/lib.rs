//! Operations on candle tensors, each a forward pass and a hand-written backward pass, on the CPU
//! and, with the feature `cuda`, on NVIDIA GPUs.
//!
//! candle's autograd is not used, because it would compute and keep the gradient of every frozen
//! weight. Activations are contiguous tensors `[tokens, features]`, f32 on the CPU and of the
//! base's type (f32 or bf16) on a GPU. Frozen weights are f32, bf16 or quantized. Gradients,
//! moments (except those of [`adamw_8bit`]) and sums are f32 everywhere. The file of an operation
//! has its checks and its public functions for both backends. `cpu.rs`, `cuda.rs` and the kernels
//! (`.cu`) are in the directory with the operation's name.
//!
//! Invariants:
//! - No result depends on the number of threads or on timing: work is split over outputs, never
//!   over a sum, and no floating-point sum uses atomics.
//! - [`gemm`] is the only matrix product.
//! - For a frozen weight, only its product and the gradient of that product's input are computed.
//!
//! The crate may not know models or jobs; of `lora-spec` it uses only settings, sizes of buffers
//! and Philox. To read it, begin with one operation, such as [`norm`], and its directory.

pub mod adamw;
pub mod adamw_8bit;
pub mod attention;
mod backend;
pub mod ceilings;
pub mod columns;
mod cpu;
pub mod cross_entropy;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod dropout;
pub mod embedding;
pub mod gemm;
pub mod glu;
mod gpu_properties;
mod ids;
pub mod linear;
pub mod lora;
mod memory_usage;
pub mod norm;
mod optimizer;
pub mod paged;
pub mod pointwise;
pub mod profile;
pub mod quant;
pub mod random;
pub mod reduce;
pub mod rope;
mod simd;
mod timestamp;
mod timing;
pub mod transfer;

pub use candle_core::{Error, Result};
pub use cpu::{ReadGuard, UpdateGuard, read_f32, update_f32};
pub use ids::Ids;
pub use optimizer::Optimizer;
pub use pointwise::add_assign;
pub use simd::instruction_set;
pub use timestamp::DeviceTimestamp;
