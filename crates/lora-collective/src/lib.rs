//! A process group for data-parallel training: ordered all-reduce, all-gather, broadcast and barrier over TCP, and beside
//! it, with the feature `cuda`, the all-reduce between GPUs over NCCL.
//!
//! Two promises hold everything together:
//!
//! - **Same bits.** A sum over micro-batches is taken in the order of one [`tree`] that knows only the number of
//!   micro-batches, never the number of ranks, so every rank of every world size gets the same bits.
//! - **No wait without an end.** Each operation either completes or fails with a [`CollectiveError`] that names the
//!   rank at fault. After a failure the [`Group`] is of no further use; the caller forms another one, with a higher
//!   generation.
//!
//! The API blocks; it is meant for the one thread that drives training, and another one can end its waits with a
//! [`CancelToken`]. The connections are not encrypted.

#[cfg(target_endian = "big")]
compile_error!("vectors travel as the little-endian memory they lie in");

mod all_reduce;
pub mod backend_choice;
mod cancel;
mod error;
mod group;
mod handshake;
mod link;
mod mesh;
#[cfg(feature = "cuda")]
mod nccl;
mod nccl_log;
mod reduction_plan;
mod rendezvous;
pub mod segmented_all_reduce;
mod shared_gpu;
pub mod tree;

pub use cancel::CancelToken;
pub use error::{CollectiveError, Operation, PeerFailure};
pub use group::{Group, MAX_BROADCAST_BYTES, MAX_GATHER_BYTES};
pub use handshake::HandshakeRefusal;
#[cfg(feature = "cuda")]
pub use nccl::NcclGroup;
pub use nccl_log::nccl_log_variable;
pub use rendezvous::{GroupSpec, PeerListener};
pub use shared_gpu::shared_gpu_variables;
