//! What the operations share on a GPU: the device with its kernels, launches, products and memory.
//!
//! All operations of a process run on one stream per GPU, in the order of the calls, except
//! [`crate::reduce::tree_combine`], which runs on the stream of its caller. Only small inputs
//! ([`crate::Ids`]) and paged moments are copied on other streams. Operations therefore do not have
//! to wait, and freed memory is reused without a wait. No result depends on timing: there are no
//! floating-point atomics, and cuBLAS has one workspace and fixed algorithms.

mod arg;
mod blas;
mod environment;
mod error;
mod gpu;
mod input_upload;
mod kernels;
mod launch;
mod memory;
mod pool;
pub(crate) mod profile;
mod rows;
mod window_copies;

pub(crate) use arg::Arg;
pub(crate) use blas::Product;
pub(crate) use error::cuda_error;
pub(crate) use gpu::Gpu;
pub use gpu::{devices, open, stream};
pub(crate) use input_upload::UploadedInput;
pub(crate) use launch::{flat_grid, suffix};
pub use memory::allocate;
pub(crate) use rows::{row_grid, row_threads, runs};
pub(crate) use window_copies::PinnedRegistration;
