//! What the operations share on a GPU: the device with its kernels, launches, products, memory.
//!
//! Everything of a process goes to one stream a GPU, in the order it was asked for; only small inputs
//! ([`crate::Ids`]) are copied beside it. So no operation waits, and memory that is freed is used again without a wait.
//! Nothing here depends on time: no floating-point atomics, one workspace, fixed algorithms.

mod blas;
mod environment;
mod functions;
mod gpu;
mod launch;
mod memory;
mod pages;
pub(crate) mod profile;
mod rows;
mod stage;

pub(crate) use blas::Product;
pub(crate) use gpu::{Gpu, wrong};
pub use gpu::{address, devices, open, stream, uuid};
pub(crate) use launch::{Arg, flat, suffix};
pub use memory::allocate;
pub(crate) use pages::Pinned;
pub(crate) use rows::{row_grid, row_threads, runs};
pub(crate) use stage::Staged;

pub use crate::reduce::tree_combine;
