//! What the operations share on a GPU: the device with its kernels, launches, products, memory.
//!
//! Everything of a process goes to one stream a GPU, in the order it was asked for; only small inputs
//! ([`crate::Ids`]) are copied beside it. So no operation waits, and memory that is freed is used again without a wait.
//! Nothing here depends on time: no floating-point atomics, one workspace, fixed algorithms.

mod blas;
mod environment;
mod gpu;
mod input_upload;
mod kernels;
mod launch;
mod memory;
pub(crate) mod profile;
mod rows;
mod window_copies;

pub(crate) use blas::Product;
pub(crate) use gpu::{Gpu, cuda_error};
pub use gpu::{address, devices, open, stream, uuid};
pub(crate) use input_upload::UploadedInput;
pub(crate) use launch::{Arg, flat_grid, suffix};
pub use memory::allocate;
pub(crate) use rows::{row_grid, row_threads, runs};
pub(crate) use window_copies::PinnedRegistration;

pub use crate::reduce::tree_combine;
