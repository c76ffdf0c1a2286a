//! A process group for data-parallel training: ordered all-reduce, all-gather, broadcast and
//! barrier over TCP, and, with the feature `cuda`, the all-reduce between GPUs over NCCL.
//!
//! The crate makes two guarantees:
//!
//! - **Same bits.** A sum over micro-batches is computed in the order of one [`tree`] that depends
//!   only on the number of micro-batches, never on the number of ranks. Every rank of every world
//!   size therefore gets the same bits.
//! - **Every wait has a time limit.** Each operation either completes or fails with a
//!   [`CollectiveError`] that names the rank at fault, if a peer is at fault. After a failure the
//!   [`Group`] cannot be used; the caller forms another one with a higher generation.
//!
//! The API blocks. It is meant for the one thread that drives training. Another thread can end its
//! waits with a [`CancelToken`]. The connections are not encrypted.
//!
//! The crate may not know models, jobs or gRPC. To read it, begin with [`Group`], and with [`tree`]
//! for the order of sums.

#[cfg(target_endian = "big")]
compile_error!("vectors are sent as they are in memory, which must be little-endian");

mod all_reduce;
pub mod backend_choice;
mod cancel;
mod error;
mod group;
mod group_spec;
mod handshake;
mod link;
mod mesh;
#[cfg(feature = "cuda")]
mod nccl;
mod nccl_log;
#[cfg(not(feature = "cuda"))]
mod nccl_without_cuda;
mod reduction_plan;
mod refusal;
mod rendezvous;
pub mod segmented_all_reduce;
mod shared_gpu;
pub mod tree;

pub use cancel::CancelToken;
pub use error::{CollectiveError, Operation, PeerFailure};
pub use group::{Group, MAX_BROADCAST_BYTES, MAX_GATHER_BYTES};
pub use group_spec::GroupSpec;
#[cfg(feature = "cuda")]
pub use nccl::NcclGroup;
pub use nccl_log::nccl_log_variable;
#[cfg(not(feature = "cuda"))]
pub use nccl_without_cuda::NcclGroup;
pub use refusal::HandshakeRefusal;
pub use rendezvous::PeerListener;
pub use shared_gpu::shared_gpu_variables;
